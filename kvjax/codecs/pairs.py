"""OliVe's outlier-victim pairs: 4 bits a number, of which an outlier takes the range and its neighbour's precision."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, UInt8

from kvjax.axes import OF_SLOTS, cut_slots

_NORMAL = 8  # levels in steps of the scale: beyond, a number is an outlier
_OUTLIERS = np.float32([12, 16, 24, 32, 48, 64, 96])
"""abfloat E2M1 with bias, in steps; with a sign 14 of 16 codes."""
_VICTIM = 8
"""The code 1000 that marks a neighbour as given up."""
_SHARES = tuple(0.4 + 0.1 * i for i in range(9))
"""Of `|mean| + 3 std` that 7 steps span: what is tried for the scale of a vector."""


@struct.dataclass
class Pairs:
    """Channels 2 i and 2 i + 1 as two codes of 4 bits: whole steps from -7 to 7, or one outlier and a zero.

    A number of 8 steps or more is an outlier, stored as the nearest of +-12, 16, 24, 32, 48, 64, 96 steps; its
    neighbour becomes 0. Of two outliers the first survives, the second becomes 0. The step of a vector is the one
    that loses least squared error, of several shares of `(|mean| + 3 std) / 7`; of equal ones the smallest.

    Bytes, with scales of e bytes: `B * K * S * (H / 2 + e)`.

    Source: Guo et al., OliVe (2023), arXiv:2304.07493, section 3.
    """

    codes: UInt8[Array, "B K S H/2"] | None  # the first of a pair in the low bits
    scale: Float[Array, "B K S"] | None
    dtype: str = struct.field(pytree_node=False, default="bfloat16")  # of scales

    by_slot, block = True, 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """See `Encoded.shape`."""
        return *self.codes.shape[:3], 2 * self.codes.shape[3]

    def for_slots(self, slots: int, block: int | None = None) -> Pairs:
        """See `Encoded.for_slots`."""
        return self

    def like(self, x: jax.Array, occupied: jax.Array) -> Pairs:
        """See `Encoded.like`.

        Raises:
          ValueError: the channels are no pairs.
        """
        if x.shape[3] % 2:
            raise ValueError(f"OliVe's pairs need an even number of channels, got {x.shape[3]}.")
        x = jnp.where(occupied[..., None], x.astype(jnp.float32), 0.0)
        span = jnp.abs(jnp.mean(x, axis=-1)) + 3 * jnp.std(x, axis=-1)
        best = least = None
        for share in _SHARES:
            scale = (span * share / 7).astype(self.dtype)
            scale = jnp.where(scale > 0, scale, jnp.ones_like(scale))
            tried = self.replace(codes=_encode(x / scale.astype(jnp.float32)[..., None]), scale=scale)
            error = jnp.sum(jnp.square(tried.decode() - x), axis=-1)
            if best is None:
                best, least = tried, error
                continue
            better = error < least
            choose = lambda new, old: jnp.where(better.reshape(better.shape + (1,) * (new.ndim - 3)), new, old)
            best, least = jax.tree.map(choose, tried, best), jnp.minimum(error, least)
        return best

    def decode(self, dtype=jnp.float32) -> jax.Array:
        """See `Encoded.decode`."""
        pair = jnp.stack([self.codes & 15, self.codes >> 4], axis=-1).astype(jnp.int32)  # [B, K, S, H / 2, 2]
        victim = pair == _VICTIM
        normal = jnp.where(pair > 7, pair - 16, pair).astype(jnp.float32)
        size = sum(jnp.where((pair & 7) == i + 1, level, 0.0) for i, level in enumerate(_OUTLIERS))
        outlier = jnp.where(pair > 7, -size, size)
        steps = jnp.where(victim, 0.0, jnp.where(victim[..., ::-1], outlier, normal))
        return (steps.reshape(self.shape) * self.scale.astype(jnp.float32)[..., None]).astype(dtype)

    def cut(self, start, size) -> Pairs:
        """See `Encoded.cut`."""
        return cut_slots(self, self.axes(), self.shape[2], start, size, 1)

    def axes(self) -> Pairs:
        """See `Encoded.axes`."""
        return self.replace(codes=OF_SLOTS, scale=OF_SLOTS)

    def fields(self) -> Pairs:
        """See `Encoded.fields`."""
        return self.replace(codes=0, scale=0)

    def leaf_and_gain(self):
        """See `Encoded.leaf_and_gain`."""
        return self, None


def _encode(steps: jax.Array) -> jax.Array:
    """u8[B, K, S, H / 2] codes of f32[B, K, S, H] numbers in steps."""
    pair = steps.reshape(*steps.shape[:3], steps.shape[3] // 2, 2)
    size = jnp.abs(pair)
    out = size >= _NORMAL
    wins = jnp.stack([out[..., 0], out[..., 1] & ~out[..., 0]], axis=-1)
    normal = jnp.clip(jnp.round(pair), -7, 7).astype(jnp.int32) & 15
    nearest = sum((size > middle).astype(jnp.int32) for middle in (_OUTLIERS[1:] + _OUTLIERS[:-1]) / 2)
    outlier = 1 + nearest + jnp.where(pair < 0, 8, 0)
    code = jnp.where(wins, outlier, jnp.where(wins[..., ::-1], _VICTIM, normal))
    return (code[..., 0] | code[..., 1] << 4).astype(jnp.uint8)
