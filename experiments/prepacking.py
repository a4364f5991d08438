"""Reads short prompts in a padded batch and in shared rows: tokens that are computed, seconds, and whether they agree.

    python -m experiments.prepacking --model=smollm2

Prompts are openings of passages of essays, as long as lengths drawn from a log-normal distribution say: most are short
and a few long. About a minute on 2 cores.
"""

from __future__ import annotations

from experiments import interrupts

if __name__ == "__main__":
    interrupts.quit_in_one_line()  # the imports below take seconds

import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import kvjax
from experiments import cli
from experiments.bench_decode import read_prompt
from kvjax import methods
from kvjax.reuse import packed_rows, prepacking
from models import load_model
from models.decoder import bind

flags.declare_key_flag("model")
_COUNT = flags.DEFINE_integer("batch_prompts", 32, "Prompts of a batch.")
_LONGEST = flags.DEFINE_integer("longest", 512, "Tokens of a prompt at most.")
_MEDIAN, _SPREAD, _REPEATS = 64, 0.8, 3


def drawn_lengths(count: int, longest: int) -> list[int]:
    """Draws lengths of prompts: the median is 64 tokens, one in six is longer than 142."""
    lengths = np.random.default_rng(0).lognormal(np.log(_MEDIAN), _SPREAD, size=count)
    return np.clip(np.round(lengths), 2, longest).astype(int).tolist()


def run() -> None:
    """Prints a line for the padded batch and one for shared rows."""
    count, longest = _COUNT.value, _LONGEST.value
    if count < 1 or longest < 2:
        raise ValueError(f"--batch_prompts must be at least 1 and --longest at least 2, got {count} and {longest}.")
    model = load_model(cli.MODEL.value or "smollm2")
    lengths = drawn_lengths(count, longest)
    ids, _ = read_prompt(model, [sum(lengths)], 1)
    starts = np.cumsum([0, *lengths])
    prompts = [ids[start : start + n] for start, n in zip(starts, lengths)]
    step, T = bind(model.params, model.config), max(lengths)
    tokens = np.zeros((count, T), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    padded = jax.jit(
        lambda step, tokens: kvjax.prefill(
            step, methods.full(), tokens, jnp.int32(lengths), step.empty_cache(count), room=1
        )
    )
    packed = jax.jit(lambda step, _: prepacking(step, methods.full(), prompts, step.empty_cache, room=1))
    rows = len(packed_rows([n - 1 for n in lengths], T - 1))
    computed = {"padded": count * T, "packed": rows * (T - 1) + count}
    logits = {}
    print(f"{count} prompts of {min(lengths)} to {T} tokens, {sum(lengths)} in all")
    print("          rows   tokens computed   of them real   seconds")
    for name, call in {"padded": padded, "packed": packed}.items():
        run = jax.block_until_ready(call(step, tokens))
        logits[name], seconds = run.logits, []
        for _ in range(_REPEATS):
            start = time.perf_counter()
            jax.block_until_ready(call(step, tokens))
            seconds.append(time.perf_counter() - start)
        width, share = rows if name == "packed" else count, sum(lengths) / computed[name]
        print(f"{name:8s} {width:5d} {computed[name]:17d} {share:14.0%} {min(seconds):9.2f}", flush=True)
    print(f"logits differ by {float(jnp.max(jnp.abs(logits['padded'] - logits['packed']))):.1e} at most")


if __name__ == "__main__":
    cli.start(run)
