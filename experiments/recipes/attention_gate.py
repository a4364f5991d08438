"""Attention-Gate: gates that say which tokens what follows will need.

Zeng, Lin, Hou, Zhang, Deng. "In-context KV-Cache Eviction for LLMs via Attention-Gate". 2024. arXiv:2410.12876.
"""

from __future__ import annotations

import gin
import jax
import jax.numpy as jnp

from experiments.recipes.recipe import (
    Recipe,
    context_positions,
    cross_entropy,
    divergence,
    read_context,
    read_follow,
)
from kvjax.gating import gate_logits
from kvjax.segments.segment import unrotated
from models.decoder import layer_rope

_SHUT = 1e-6  # what a dropped token weighs: nothing in float32 beside those that stay, but not without a gradient


@gin.configurable(module="experiments")
def train_attention_gate(
    rate: float = 0.25,
    heads: int = 2,
    channels: int = 32,
    sinks: int = 4,
    recent: int = 32,
    opened: float = 0.9,
    distillation: float = 0.0,
    penalty: float = 1.0,
    seed: int = 0,
    remat: bool = False,
) -> Recipe:
    """Trains, in every layer, a small attention over the prompt that opens or shuts each head to each token.

    `loss = d KL(full || gated) + (1 - d) CE(gated) + penalty mean_l |mean p - rate|` on what follows, where
    `p = sigmoid(kvjax.gating.gate_logits)`. A token's weight in attention is 1 if it is among the highest p that
    the method would keep of its layer and 0 if not; the gradient goes to p as if the weight were p itself
    (straight-through), to dropped tokens too.

    Deviations: contexts are read exactly, as the cache that is compressed afterwards was; the gates act on what
    follows. tau is what leaves `rate` of the tokens, as in the method. The rest as in the method.

    Args:
      rate: fraction of a context's tokens that a head keeps on average, the first and the newest included.
      heads: [A] of the gate.
      channels: [C] of each of them.
      sinks: first tokens, which pass in any case.
      recent: newest tokens of a context, which do too.
      opened: p of every token before training.
      distillation: d; 0 in the paper.
      penalty: weight of the last term.
      seed: of the first weights.
      remat: compute the layers' activations again in the backward pass instead of keeping them.
    """

    def start(model):
        L, K, H = model.config.num_layers, model.config.num_kv_heads, model.config.head_dim
        first, second = jax.random.split(jax.random.key(seed))
        wide, narrow = 2 * K * H, heads * channels
        bias = jnp.log(opened / (1 - opened))
        trained = {
            "qkv": jax.random.normal(first, (L, 2, K, H, 3, heads, channels)) * wide**-0.5,
            "out": jax.random.normal(second, (L, heads, channels, K)) * narrow**-0.5,
            "bias": jnp.full((L, K), bias, jnp.float32),
        }
        return trained, ()

    def loss(config, trained, frozen, batch, key):
        cache, pos = read_context(config, frozen.params, batch).cache, context_positions(batch)
        always = (pos >= 0) & ((pos < sinks) | (pos >= batch.lengths[:, None] - recent))
        layers, uneven, mean = [], 0.0, 0.0
        for index, layer in enumerate(cache.layers):
            slots = layer.segments[0]
            gate = {name: x[index] for name, x in trained.items()}
            p = jax.nn.sigmoid(gate_logits(gate, unrotated(slots, layer_rope(config, index))))
            opening = open_gates(p, pos, always[:, None], rate)
            layers.append(layer.with_tail(slots.with_slots(bias=jnp.log(opening + _SHUT))))
            size = jnp.sum(jnp.where(pos[:, None] >= 0, p, 0.0)) / (p.shape[1] * jnp.sum(pos >= 0))
            uneven, mean = uneven + jnp.abs(size - rate), mean + size
        student = read_follow(config, frozen.params, batch, cache.replace(layers=tuple(layers)), remat=remat).logits
        kl, ce = 0.0, cross_entropy(student, batch)
        if distillation:
            kl = divergence(read_follow(config, frozen.params, batch, cache).logits, student, batch)
        uneven, mean = uneven / len(layers), mean / len(layers)
        metrics = {"kl": kl, "ce": ce, "uneven": uneven, "mean": mean}
        return distillation * kl + (1 - distillation) * ce + penalty * uneven, metrics

    def finish(model, trained, constants):
        return trained

    return Recipe("attention_gate", start, loss, finish)


def open_gates(p: jax.Array, pos: jax.Array, always: jax.Array, rate: float) -> jax.Array:
    """f32[B, K, P] of ones and zeros, whose gradient is that of p: one for the highest of a layer, K rate n of them.

    Args:
      p: f32[B, K, P].
      pos: i32[B, P], -1 at padding.
      always: bool[B, 1, P], tokens that are among them in any case.
      rate: fraction of the n tokens of a row.
    """
    B, K, P = p.shape
    worth = jnp.where(always, 2.0, jnp.where(pos[:, None] >= 0, jax.lax.stop_gradient(p), -1.0)).reshape(B, -1)
    count = (K * jnp.floor(rate * jnp.sum(pos >= 0, axis=1) + 1e-3)).astype(jnp.int32)
    least = jnp.take_along_axis(jnp.sort(worth, axis=1), (K * P - count)[:, None], axis=1)
    kept = ((worth >= least) & (worth > 0)).reshape(B, K, P).astype(jnp.float32)
    return kept + jnp.where(always, 0.0, p - jax.lax.stop_gradient(p))
