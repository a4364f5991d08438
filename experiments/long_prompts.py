"""Measures what a prompt loses that reads chosen blocks of its keys: likelihood of what follows, and what was read.

    python -m experiments.long_prompts --model=smollm2 --context=4096

Reads one real text with the dense prompt, with `xattention` at several tau and with `videoxl2`, then scores the tokens
that follow it. Eight minutes on 2 busy cores.
"""

from __future__ import annotations

from experiments import interrupts

if __name__ == "__main__":
    interrupts.quit_in_one_line()  # the imports below take seconds

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import kvjax
from experiments import cli
from experiments.bench_decode import read_prompt
from kvjax import methods
from kvjax.prompt_attention import PromptAttention, attend_blocks
from models import Model, load_model
from models.decoder import bind

for _name in ("gin_file", "gin_bindings", "model", "context", "following"):
    flags.declare_key_flag(_name)
_TAUS = flags.DEFINE_list("taus", ["0.95", "0.8", "0.5"], "Shares of the attention that xattention reads.")
_TOKENS = 4096  # of the prompt, without --context


@dataclasses.dataclass(frozen=True, eq=False)
class Counted:
    """A prompt attention that counts the blocks it reads, and those it could have read."""

    attention: PromptAttention
    counts: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    def __call__(self, q, k, v, pos, *, window=None, scale=None):
        """Counts, and attends as `PromptAttention` does."""
        how = dict(window=window, scale=scale)
        index = self.attention.blocks(q, k, pos, **how).index
        possible = index.shape[0] * index.shape[1] * index.shape[2] * (index.shape[2] + 1) // 2
        jax.debug.callback(lambda read: self.counts.append((int(read), possible)), jnp.sum(index >= 0))
        return attend_blocks(q, k, v, pos, index, block=self.attention.block, **how)

    @property
    def share(self) -> float:
        """Fraction of the blocks at or before the queries that were read, over layers and heads."""
        jax.effects_barrier()
        read, possible = np.sum(self.counts, axis=0)
        return read / possible


def scored(model: Model, transform: kvjax.CacheTransform, ids: list[int], following: int) -> jax.Array:
    """Returns f32[following, V]: log probabilities of each token behind the prompt."""
    step, (prompt, answer) = bind(model.params, model.config), (ids[:-following], ids[-following:])
    run = kvjax.prefill(
        step,
        transform,
        jnp.int32([prompt]),
        jnp.int32([len(prompt)]),
        step.empty_cache(1),
        room=following,
        call_tokens=following,
    )
    _, logits = kvjax.extend(step, transform, run, jnp.int32([answer]), jnp.int32([following]))
    return jax.nn.log_softmax(jnp.concatenate([run.logits, logits[0, :-1]]))


def run() -> None:
    """Prints a line for the dense prompt and for every tau."""
    model, count = load_model(cli.MODEL.value or "smollm2"), cli.FOLLOWING.value
    ids, _ = read_prompt(model, [cli.only(cli.CONTEXT, _TOKENS) + count], 1)
    if not 1 <= count < len(ids):
        raise ValueError(f"--following must be from 1 to {len(ids) - 1} tokens, got {count}.")
    answer = np.arange(count), np.array(ids[-count:])
    dense = scored(model, methods.full(), ids, count)
    print("              blocks   nll of what    KL to")
    print("prompt          read       follows    dense")
    print(f"dense           100%  {-float(jnp.mean(dense[answer])):12.3f}        -", flush=True)
    candidates = {f"tau {float(tau):g}": methods.xattention(float(tau)) for tau in _TAUS.value}
    for name, transform in {**candidates, "videoxl2": methods.videoxl2()}.items():
        needs = transform.schedule.needs
        counted = Counted(needs.prompt_attention)
        schedule = transform.schedule._replace(needs=needs._replace(prompt_attention=counted))
        found = scored(model, transform._replace(schedule=schedule), ids, count)
        far = jnp.mean(jnp.sum(jnp.exp(dense) * (dense - found), axis=-1))
        print(f"{name:14s} {counted.share:5.0%}  {-float(jnp.mean(found[answer])):12.3f} {float(far):8.4f}", flush=True)


if __name__ == "__main__":
    cli.start(run)
