"""CSKV: maps from all heads' keys, and values, of a layer to a few coordinates and back.

Wang, Zhao, Ning, Li, Wu, Wang. "CSKV: Training-Efficient Channel Shrinking for KV Cache in Long-Context Scenarios".
2024. arXiv:2409.10593.
"""

from __future__ import annotations

import math

import gin
import jax
import jax.numpy as jnp

from experiments import measurements
from experiments.recipes.recipe import Recipe, context_positions, read_context
from kvjax.segments.segment import unrotated
from models.decoder import layer_rope
from pallas_kernels.quantize_pack import WORD_BITS, Axis, quantize_pack


@gin.configurable(module="experiments")
def train_cskv(
    key_density: float = 0.5, value_density: float = 0.5, bits: int | None = None, group: int = 32
) -> Recipe:
    """Trains A and B of `k ~ (k A) B^T`, and of values, in every layer: all heads' un-rotated vectors side by side.

    Starts from the activation-aware SVD of the projections, `A = B`. The loss is the sum over layers, and over keys
    and values, of the mean squared error, divided by the mean square so that every layer counts alike. The decoder's
    own loss takes no part.

    Deviations: A reads k instead of the layer's input x; with `k = x W`, `x (W A)` is the paper's, and no other map
    of x of that rank comes closer to k. Afterwards A and B become one matrix, the orthonormal columns that span B, in
    B's order: the projection on them is as close to every k as B can come, and the cache holds one matrix, as it does
    untrained. Where coordinates are rounded A and B stay as they are.

    Args:
      key_density: coordinates of a token's keys over all heads, as a fraction of K H.
      value_density: the same for values.
      bits: of the coordinates that the loss sees, for a cache that `kvjax.quantize` stores in as many, keys per channel
        and values per token; gradients pass as if nothing was rounded. None: exact coordinates.
      group: tokens of a channel, or channels of a token, that share a scale.
    """

    def start(model):
        found = measurements.weight_directions(model, measurements.Settings.of(model))
        trained = {}
        for name, density in (("key", key_density), ("value", value_density)):
            axes = found[f"{name}_axes"]  # [L, K, H, K H]
            axes = axes[..., : max(1, int(density * axes.shape[1] * axes.shape[2]))]
            trained |= {f"{name}_axes": axes, f"{name}_inverse": axes.copy()}
        return trained, ()

    def loss(config, trained, frozen, batch, key):
        cache = read_context(config, frozen.params, batch).cache
        there = (context_positions(batch) >= 0)[:, None, :, None]
        total = {"key": 0.0, "value": 0.0}
        for index, layer in enumerate(cache.layers):
            slots = layer.segments[0]
            parts = {"key": unrotated(slots, layer_rope(config, index)).k, "value": slots.v}
            for name, x in parts.items():
                x = jnp.where(there, x.astype(jnp.float32), 0.0)
                c = jnp.einsum("bkph,khr->bpr", x, trained[f"{name}_axes"][index])
                if bits is not None:
                    c = rounded(c, bits, group, "channel" if name == "key" else "token")
                back = jnp.einsum("bpr,khr->bkph", c, trained[f"{name}_inverse"][index])
                total[name] += jnp.sum((x - back) ** 2) / jnp.sum(x**2)
        count = 2 * len(cache.layers)
        mean = (total["key"] + total["value"]) / count
        return mean, {f"{name}_error": x / len(cache.layers) for name, x in total.items()}

    def finish(model, trained, constants):
        if bits is not None:
            return trained
        return {f"{name}_axes": _orthonormal(trained[f"{name}_inverse"]) for name in ("key", "value")}

    return Recipe("cskv_trained", start, loss, finish)


def _orthonormal(columns: jax.Array) -> jax.Array:
    """f32[L, K, H, R]: columns of all heads together, of which the first r span what the first r given ones do."""
    L, K, H, R = columns.shape
    return jnp.linalg.qr(columns.reshape(L, K * H, R))[0].reshape(L, K, H, R)


def rounded(c: jax.Array, bits: int, group: int, axis: Axis) -> jax.Array:
    """f32[B, P, R] as `kvjax.quantize` stores and reads it, whose gradient is that of c itself (straight-through).

    Args:
      c: coordinates of P tokens.
      bits: of each.
      group: tokens of a channel (axis "channel"), or channels of a token ("token"), that share a scale.
      axis: which of the two.
    """
    exact, P = jax.lax.stop_gradient(c), c.shape[1]
    exact = jnp.pad(exact, ((0, 0), (0, -P % math.lcm(group, WORD_BITS // bits)), (0, 0)))[:, None]
    there = jnp.broadcast_to(jnp.arange(exact.shape[2]) < P, exact.shape[:3])
    packed = quantize_pack(exact, there, bits=bits, group=group, axis=axis, scale_dtype=jnp.bfloat16)
    return c + packed.decode()[:, 0, :P] - exact[:, 0, :P]
