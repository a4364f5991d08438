"""What head-wise budgets cost as they are stored: masked, padded to the longest head, or in pages of their own.

    python -m experiments.head_budgets --methods=adakv_snapkv,kvzip --keep=0.25

Reads one real text, compresses its cache with each method, and stores what the heads kept in three ways. All three give
the same next token; the largest difference of its logits is printed. About six minutes on 2 cores, with the calibration
that it makes on its first run.
"""

from __future__ import annotations

from experiments import interrupts

if __name__ == "__main__":
    interrupts.quit_in_one_line()  # the imports below take seconds

import dataclasses

import jax.numpy as jnp
import numpy as np
from absl import flags

import kvjax
from experiments import cli
from experiments.bench_decode import read_prompt
from experiments.calibrations import Calibrations
from experiments.methods import Method, check_method_names, load_method
from experiments.report import human_bytes
from kvjax.inspection import held_positions, masked, padded
from models import Model, load_model
from models.decoder import bind

for _name in ("gin_file", "gin_bindings", "model", "methods", "keep", "context"):
    flags.declare_key_flag(_name)
_TOKENS = 2048  # of the text, without --context

_METHODS = ("adakv_snapkv", "adakv_expected", "kvzip", "duoattention")
_KEEP = 0.25


@dataclasses.dataclass(frozen=True)
class Stored:
    """One line of the table.

    Attributes:
      method: name of its config.
      storage: "masked", "padded" or "as stored".
      cache_bytes: all arrays of the cache after the prompt.
      difference: largest absolute difference of the next token's logits to the cache as stored.
    """

    method: str
    storage: str
    cache_bytes: int
    difference: float


def compare(model: Model, method: Method, ids: list[int]) -> tuple[list[Stored], list[int]]:
    """The three caches of one method, and how many tokens each KV head of each layer kept."""
    step, T = bind(model.params, model.config), len(ids)
    prompt, next_token = jnp.asarray([ids[:-1]]), jnp.asarray([ids[-1:]])
    lengths = jnp.array([T - 1])

    whole = kvjax.prefill(step, kvjax.methods.full(), prompt, lengths, step.empty_cache(1), room=0)
    kept = kvjax.bind(step, method.transform).prefill(prompt, lengths, room=0, chunk=method.prefill_chunk)

    def logits(cache):
        out = step(next_token, cache.length[:, None], cache.reserve(1), needs=kvjax.Needs(), last_only=True)
        return np.asarray(out.logits)

    full, own = whole.cache, kept.cache
    held = held_positions(own)
    caches = {"masked": masked(full, held), "padded": padded(full, held), "as stored": own}
    reference = logits(own)
    lines = [
        Stored(method.name, how, kvjax.nbytes(cache), float(np.max(np.abs(logits(cache) - reference))))
        for how, cache in caches.items()
    ]
    return lines, [len(head) for layer in held for head in layer]


def run() -> None:
    """The program."""
    names = list(cli.METHODS.value or _METHODS)
    check_method_names(names)
    tokens = cli.only(cli.CONTEXT, _TOKENS)
    if tokens < 2:
        raise ValueError(f"--context must be at least 2 tokens, got {tokens}.")
    model = load_model(cli.MODEL.value or "smollm2")
    configs = dict(
        **cli.configs(),
        calibrate=Calibrations(model),
        tokenizer=model.tokenizer,
    )
    methods = [load_method(name, budget=cli.only(cli.KEEP, _KEEP), **configs) for name in names]
    cli.check_reached(method.config for method in methods)
    ids, _ = read_prompt(model, [tokens], 1)
    full = model.config.num_layers * model.config.num_kv_heads * (len(ids) - 1)
    print(f"{model.config.name}, {len(ids) - 1} tokens, a full cache of {full} slots\n")
    print(f"{'method':<18}{'storage':<12}{'cache':>10}{'of masked':>11}{'logits differ':>15}")
    for method in methods:
        lines, counts = compare(model, method, ids)
        for line in lines:
            print(
                f"{line.method:<18}{line.storage:<12}{human_bytes(line.cache_bytes):>10}"
                f"{line.cache_bytes / lines[0].cache_bytes:>11.2f}{line.difference:>15.1e}"
            )
        share = sum(counts) / full
        print(f"{'':<18}heads kept {min(counts)} to {max(counts)} tokens, {share:.3f} of all slots\n", flush=True)


if __name__ == "__main__":
    cli.start(run)
