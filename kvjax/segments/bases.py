"""Bases of the channels of a KV head: matrices, selections and scales of channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Float32, Int32

from kvjax.axes import P


class Basis(Protocol):
    """A linear map between the H channels of a KV head and R coordinates."""

    mean: Float[Array, "K H"] | None  # or of each row [B, K, H]; subtracted before and added after
    mixes_heads: bool  # coordinates of a head depend on other heads: only expanded vectors can be read
    selects: bool  # coordinates are some of the channels: of keys alone, or values would lose the others
    columns: Float[Array, "#B K H R"] | None  # of which an expanded vector is the weighted sum; None: structured

    def coordinates(self, x: jax.Array) -> Float[Array, "B K n R"]:
        """[B, K, n, H] -> [B, K, n, R], without the mean."""

    def expand(self, c: jax.Array) -> Float[Array, "B K n H"]:
        """[B, K or 1, n, R] -> [B, K, n, H], without the mean."""

    def coordinates_of_queries(self, q: jax.Array) -> Float[Array, "B K n R"]:
        """[B, K, n, H] -> [B, K, n, R], the transpose of `expand`: `<q, expand(c)> = <result, c>`."""

    def axes(self) -> Basis:
        """See `AnySegment.axes`."""


@struct.dataclass
class Matrix:
    """Coordinates `x @ matrix`, per KV head, expanded by the transpose of `inverse`.

    Without `inverse` that is the matrix itself, whose columns are orthonormal then.
    """

    matrix: Float[Array, "#B K H R"]
    mean: jax.Array | None = None
    inverse: Float[Array, "#B K H R"] | None = None  # of which `matrix^T inverse` is the identity
    mixes_heads = selects = False

    def coordinates(self, x: jax.Array) -> jax.Array:
        """See `Basis.coordinates`."""
        return jnp.matmul(x, self.matrix.astype(x.dtype))

    def expand(self, c: jax.Array) -> jax.Array:
        """See `Basis.expand`."""
        return jnp.matmul(c, self.columns.swapaxes(2, 3).astype(c.dtype))

    def coordinates_of_queries(self, q: jax.Array) -> jax.Array:
        """See `Basis.coordinates_of_queries`."""
        return jnp.matmul(q, self.columns.astype(q.dtype))

    def axes(self) -> Matrix:
        """See `AnySegment.axes`."""
        of_heads = lambda x, names: None if x is None else names
        inverse = of_heads(self.inverse, P("batch", "kv_heads"))
        return Matrix(P("batch", "kv_heads"), of_heads(self.mean, P("kv_heads")), inverse)

    def cut(self, heads: Sequence[int], rank: int) -> Matrix:
        """The same for some of the KV heads, with the first `rank` coordinates."""
        heads = np.array(heads)
        return Matrix(
            self.matrix[:, heads, :, :rank],
            None if self.mean is None else self.mean[heads],
            None if self.inverse is None else self.inverse[:, heads, :, :rank],
        )

    @property
    def columns(self) -> Float[Array, "#B K H R"]:
        """[1 or B, K, H, R], of which an expanded vector is the weighted sum."""
        return self.matrix if self.inverse is None else self.inverse


@struct.dataclass
class Channels:
    """Coordinates are some of the channels, each row's own."""

    index: Int32[Array, "B K R"]
    channels: int = struct.field(pytree_node=False)  # [H]
    mean: jax.Array | None = None
    mixes_heads = False
    selects = True
    columns = None

    def coordinates(self, x: jax.Array) -> jax.Array:
        """See `Basis.coordinates`."""
        return jnp.take_along_axis(x, self.index[:, :, None], axis=-1)

    def axes(self) -> Channels:
        """See `AnySegment.axes`."""
        return self.replace(index=P("batch", "kv_heads"), mean=None if self.mean is None else P("kv_heads"))

    def expand(self, c: jax.Array) -> jax.Array:
        """See `Basis.expand`."""
        B, K, n, _ = c.shape
        put = jax.vmap(jax.vmap(lambda row, index: jnp.zeros((n, self.channels), c.dtype).at[:, index].set(row)))
        return put(c, self.index)

    coordinates_of_queries = coordinates


@struct.dataclass
class Offset:
    """Coordinates are the channels less their mean: an offset that all slots share is stored once, in float32."""

    mean: Float32[Array, "B K H"]
    mixes_heads = selects = False
    columns = None

    def coordinates(self, x: jax.Array) -> jax.Array:
        """See `Basis.coordinates`; the mean is subtracted already."""
        return x

    expand = coordinates_of_queries = coordinates

    def axes(self) -> Offset:
        """See `AnySegment.axes`."""
        return Offset(P("batch", "kv_heads"))


@struct.dataclass
class Scales:
    """Coordinates are the channels, each multiplied by a positive number: queries are divided by it."""

    factor: Float32[Array, "B K H"]
    mean: jax.Array | None = None
    mixes_heads = selects = False
    columns = None

    def coordinates(self, x: jax.Array) -> jax.Array:
        """See `Basis.coordinates`."""
        return (x * self.factor[:, :, None]).astype(x.dtype)

    def axes(self) -> Scales:
        """See `AnySegment.axes`."""
        return Scales(P("batch", "kv_heads"), None if self.mean is None else P("kv_heads"))

    def expand(self, c: jax.Array) -> jax.Array:
        """See `Basis.expand`."""
        return (c / self.factor[:, :, None]).astype(c.dtype)

    coordinates_of_queries = expand
