"""LoCoCo: convolutions that mix what a cache of fixed size has no room for.

Cai, Tian, Wang, Chen. "LoCoCo: Dropping In Convolutions for Long Context Compression". ICML 2024. arXiv:2406.05317.
"""

from __future__ import annotations

import gin
import jax
import jax.numpy as jnp

import kvjax
from experiments.recipes.recipe import Recipe, context_positions, cross_entropy, read_follow
from kvjax.methods import lococo
from models.decoder import prompt_cache, step


@gin.configurable(module="experiments")
def train_lococo(
    budget: int = 64,
    merged: int = 32,
    chunk: int = 96,
    width: int = 21,
    recent: int | float = 0.25,
    seed: int = 0,
    remat: bool = False,
) -> Recipe:
    """Trains, in every layer, a convolution and how much its mixture counts (`mix`, from 0.5, kept in [0, 1]).

    `loss = CE(what follows)`, after the context was read chunk by chunk into `budget` slots, as the method does. No
    gradient passes through a cache that a chunk starts from: what the last chunk leaves is what is trained.

    Deviations: kernels are trained in units of `(2 H width)^-1/2`, of which the first ones are normal, so that one
    learning rate suits them and `mix`; the official code has no such unit. The decoder is not tuned. The rest as in the
    method.

    Args:
      budget: [M] slots of a KV head.
      merged: [C] of them that mix the others.
      chunk: tokens of the context that are read at a time.
      width: tokens that an output of the convolution reads, odd.
      recent: see `kvjax.methods.lococo`.
      seed: of the first kernels.
      remat: compute the layers' activations again in the backward pass instead of keeping them.
    """

    def start(model):
        L, H = model.config.num_layers, model.config.head_dim
        kernel = jax.random.normal(jax.random.key(seed), (L, width, 2 * H, merged))
        return {"kernel": kernel, "bias": jnp.zeros((L, merged)), "mix": jnp.full(L, 0.5, jnp.float32)}, ()

    def loss(config, trained, frozen, batch, key):
        method, positions = lococo(_scaled(trained), budget, recent=recent), context_positions(batch)
        B, P = batch.context.shape
        cache, state = prompt_cache(config, B, frozen.params.embed.dtype), None
        for first in range(0, P, chunk):
            tokens, at = (x[:, first : first + chunk] for x in (batch.context, positions))
            how = dict(needs=method.schedule.needs, last_only=True)
            out = step(frozen.params, config, tokens, at, jax.lax.stop_gradient(cache), **how)
            seen = kvjax.Observation(out.layers, jnp.sum(at >= 0, axis=1), batch.lengths, prompt_slots=P)
            cache, state = method.init(out.cache, seen) if state is None else method.step(out.cache, state, seen)
            if first == 0:
                cache = cache.reserve(chunk)
        ce = cross_entropy(read_follow(config, frozen.params, batch, cache, remat=remat).logits, batch)
        return ce, {"mix": jnp.mean(trained["mix"])}

    def finish(model, trained, constants):
        return _scaled(trained)

    clip = lambda trained: trained | {"mix": jnp.clip(trained["mix"], 0.0, 1.0)}
    return Recipe("lococo", start, loss, finish, clip)


def _scaled(trained: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What the method reads: kernels f32[L, width, 2 H, C] in its unit."""
    kernel = trained["kernel"]
    return trained | {"kernel": kernel * (kernel.shape[1] * kernel.shape[2]) ** -0.5}
