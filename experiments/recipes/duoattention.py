"""DuoAttention: which heads need the whole context, by gates between full and streaming attention.

Xiao, Tang, Zuo, Guo, Yang, Tang, Fu, Han. "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and
Streaming Heads". ICLR 2025. arXiv:2410.10819.
"""

from __future__ import annotations

import gin
import jax
import jax.numpy as jnp
from flax import struct

import kvjax
from experiments.recipes.recipe import Recipe, follow_positions, read_context
from models.decoder import hidden_states


@gin.configurable(module="experiments")
def train_duoattention(sinks: int = 64, recent: int = 256, penalty: float = 0.05, remat: bool = False) -> Recipe:
    """Trains one gate for every KV head: `out = g full + (1 - g) streaming`, g from 1, kept in [0, 1].

    `loss = mean (h_full - h_mixed)^2 + penalty mean |g|`, h what the last layer leaves where a token of the answer is
    predicted.

    Deviations: contexts are read with full attention, as the cache that is compressed afterwards was; gates act on
    what follows. The squares are divided by the mean square of h_full, so that a penalty suits models of any size.

    Args:
      sinks: first tokens that streaming attention sees.
      recent: newest tokens of a context that it sees, beside those that follow.
      penalty: weight of the gates' mean.
      remat: compute the layers' activations again in the backward pass instead of keeping them.
    """

    def start(model):
        return {"gates": jnp.ones((model.config.num_layers, model.config.num_kv_heads))}, ()

    def loss(config, trained, frozen, batch, key):
        cache = read_context(config, frozen.params, batch).cache
        positions, room = follow_positions(batch), batch.follow.shape[1]
        last = lambda layers, **how: hidden_states(
            frozen.params, config, batch.follow, positions, layers, **how
        )[-1].astype(jnp.float32)
        full = last(cache.reserve(room).layers)
        mixed = [
            MixedLayer(layer, _streaming(layer, batch.lengths, sinks, recent), gate)
            for layer, gate in zip(cache.layers, trained["gates"])
        ]
        off = jnp.mean((full - last(mixed, remat=remat)) ** 2, axis=-1) / jnp.mean(full**2, axis=-1)  # [B, T]
        moved = jnp.mean(jnp.sum(batch.weight[:, 1:] * off[:, :-1], axis=1))
        size = jnp.mean(jnp.abs(trained["gates"]))
        return moved + penalty * size, {"moved": moved, "gates": size}

    def finish(model, trained, constants):
        return trained

    clip = lambda trained: jax.tree.map(lambda x: jnp.clip(x, 0.0, 1.0), trained)
    return Recipe("duoattention_trained", start, loss, finish, clip)


@struct.dataclass
class MixedLayer:
    """Two caches of one layer that a decoder reads as one: `gate` of the first, `1 - gate` of the second.

    Only to be attended to: what is appended is dropped.
    """

    full: kvjax.LayerCache
    other: kvjax.LayerCache
    gate: jax.Array  # f32[K]

    def attend(self, queries: kvjax.Queries, **how) -> kvjax.Partial:
        """See `LayerCache.attend`; the lse is that of the first."""
        a, b = self.full.attend(queries, **how), self.other.attend(queries, **how)
        gate = jnp.repeat(self.gate, a.out.shape[2] // self.gate.shape[0])[:, None]
        return kvjax.Partial(gate * a.out + (1 - gate) * b.out, a.lse)

    def choose(self, queries: kvjax.Queries, *, given=None, **how):
        """See `LayerCache.choose`: nothing is chosen here."""
        return given

    def append(self, *new, **how) -> MixedLayer:
        """Itself."""
        return self


def _streaming(layer: kvjax.LayerCache, lengths: jax.Array, sinks: int, recent: int) -> kvjax.LayerCache:
    slots = layer.segments[0]
    return layer.with_tail(slots.drop((slots.pos >= sinks) & (slots.pos < lengths[:, None, None] - recent)))
