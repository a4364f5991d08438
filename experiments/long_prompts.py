"""Measures what a prompt loses that reads chosen blocks of its keys: likelihood of what follows, and what was read.

    python -m experiments.long_prompts --model=smollm2 --context=4096

Reads one real text with the dense prompt and with those of --methods, then scores the tokens that follow it. Eight
minutes on 2 busy cores for `xattention` and `videoxl2`.

    python -m experiments.long_prompts --methods=minference,zipvl --calibration=out/minference --taus=0.975,0.9

`minference` stands there with all heads' columns and diagonals, and with the patterns of a calibration; `zipvl` with
the whole cache, and with what it stores.
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
from experiments import calibrations, cli
from experiments.bench_decode import read_prompt
from kvjax import methods
from kvjax.line_choices import Important
from kvjax.prompt_attention import PromptAttention, attend_blocks, keys_read
from models import Model, load_model
from models.decoder import bind

for _name in ("gin_file", "gin_bindings", "model", "methods", "context", "following"):
    flags.declare_key_flag(_name)
_TAUS = flags.DEFINE_list("taus", ["0.95", "0.8", "0.5"], "Shares of the attention that xattention and zipvl read.")
_CALIBRATION = flags.DEFINE_string("calibration", None, "Folder of minference's patterns; none: without that line.")
_TOKENS = 4096  # of the prompt, without --context


@dataclasses.dataclass(frozen=True, eq=False)
class Counted:
    """A prompt attention that counts the keys it reads, and those it could have read."""

    attention: PromptAttention
    counts: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    @property
    def patterns(self):
        """Those of the attention."""
        return self.attention.patterns

    def of_layer(self, *args):
        """See `PromptAttention`."""
        return self.attention.of_layer(*args)

    def __call__(self, q, k, v, pos, patterns=None, *, window=None, scale=None):
        """Counts, and attends as `PromptAttention` does."""
        how, block = dict(window=window, scale=scale), self.attention.block
        chosen = self.attention.blocks(q, k, pos, patterns, **how)
        possible = chosen.cut.size * (chosen.cut.shape[2] + 1) / 2 * block
        read = jnp.sum(keys_read(chosen, block).astype(jnp.float32))
        jax.debug.callback(lambda read: self.counts.append((float(read), possible)), read)
        return attend_blocks(q, k, v, pos, chosen.index, chosen.columns, block=block, **how)

    @property
    def share(self) -> float:
        """Fraction of the keys in blocks at or before the queries' that were read, over layers and heads."""
        jax.effects_barrier()
        read, possible = np.sum(self.counts, axis=0)
        return read / possible


def candidates(model: Model) -> dict[str, kvjax.CacheTransform]:
    """Returns what --methods, --taus and --calibration ask for, by what the table calls it."""
    taus = [float(tau) for tau in _TAUS.value]
    found: dict[str, kvjax.CacheTransform] = {}
    for name in cli.METHODS.value or ("xattention", "videoxl2"):
        if name == "xattention":
            found |= {f"tau {tau:g}": methods.xattention(tau) for tau in taus}
        elif name == "videoxl2":
            found[name] = methods.videoxl2()
        elif name == "minference":
            found |= {f"lines {c} {d}": methods.minference(None, c, d) for c, d in ((500, 700), (100, 750), (30, 200))}
            if _CALIBRATION.value:
                data = calibrations.load(_CALIBRATION.value, "minference", model)
                found["patterns"] = methods.minference(data)
        elif name == "zipvl":
            found |= {f"zipvl {tau:g}": kvjax.attend_prompt(Important(tau)) for tau in taus}
            found |= {f"  stored {tau:g}": methods.zipvl(tau) for tau in taus[:1]}
        else:
            raise ValueError(f"--methods must be of xattention, videoxl2, minference and zipvl, got {name!r}.")
    return found


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
    wanted = candidates(model)
    answer = np.arange(count), np.array(ids[-count:])
    dense = scored(model, methods.full(), ids, count)
    print("                keys   nll of what    KL to")
    print("prompt          read       follows    dense")
    print(f"dense           100%  {-float(jnp.mean(dense[answer])):12.3f}        -", flush=True)
    for name, transform in wanted.items():
        needs = transform.schedule.needs
        counted = Counted(needs.prompt_attention)
        schedule = transform.schedule._replace(needs=needs._replace(prompt_attention=counted))
        found = scored(model, transform._replace(schedule=schedule), ids, count)
        far = jnp.mean(jnp.sum(jnp.exp(dense) * (dense - found), axis=-1))
        print(f"{name:14s} {counted.share:5.0%}  {-float(jnp.mean(found[answer])):12.3f} {float(far):8.4f}", flush=True)


if __name__ == "__main__":
    cli.start(run)
