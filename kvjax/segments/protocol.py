"""What a layer cache asks of a segment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from kvjax.rope import Rope, rotate
from kvjax.segments.edits import Edit
from kvjax.segments.slots import token_order
from pallas_kernels.attention_mass import Reduce
from pallas_kernels.logits import Scale
from pallas_kernels.partial import Partial

KeyRope = Literal["stored", "at_attend", "rank", "window"]
"""Where keys meet their position.

stored: rotated once, when written, at the token's position.
at_attend: stored un-rotated and rotated on every read, at the token's position.
rank: stored un-rotated and rotated on every read at the slot's rank among the occupied slots of its
  layer cache; so is the query (Locret).
window: what "rank" gives in a ring whose newest tokens follow each other, of keys that stay rotated: there ranks differ
  as positions do, so the sinks alone are read by the query at its rank (StreamingLLM).
"""


class Queries(NamedTuple):
    """Queries before their rotation, with what is needed to rotate them any way a segment wants."""

    raw: Float[Array, "B T N H"]  # un-rotated
    pos: Int32[Array, "B T"]  # -1 = padding
    rope: Rope
    ahead: jax.Array | int = 0  # i32[B, T]: tokens before the query that no slot holds yet

    @property
    def rotated(self) -> Float[Array, "B T N H"]:
        """[B, T, N, H], rotated at the token positions."""
        return rotate(self.raw, self.pos[..., None], self.rope)


class KeyBasis(Protocol):
    """How keys follow from coordinates: see `kvjax.segments.latent`."""

    def of(self, k: Any, rope: Rope) -> tuple[Any, Any]:
        """Returns what the decode op takes for coordinates `k`: keys, and the rotation that makes keys of them."""


class Ranks(NamedTuple):
    """Positions that count only what the layer cache holds."""

    slots: Int32[Array, "B K S"]  # this segment's slots among all occupied slots of the layer
    queries: Int32[Array, "B T K"]

    @classmethod
    def of(cls, pos: jax.Array, queries: Queries) -> Ranks:
        """Counts from positions i32[B, K, S] of all slots of a layer that have ranks."""
        earlier = (pos >= 0)[:, None] & (pos[:, None] < queries.pos[:, :, None, None])
        ahead = jnp.broadcast_to(queries.ahead, queries.pos.shape)[..., None]
        return cls(jnp.argsort(token_order(pos), axis=-1), jnp.sum(earlier, axis=-1) + ahead)

    def rotated_queries(self, queries: Queries) -> Float[Array, "B T N H"]:
        """[B, T, N, H], each query head rotated at its rank in the cache of its KV head."""
        B, T, N, H = queries.raw.shape
        K = self.queries.shape[-1]
        grouped = queries.raw.reshape(B, T, K, N // K, H)
        return rotate(grouped, self.queries[..., None], queries.rope).reshape(B, T, N, H)


class AnySegment(Protocol):
    """A set of slots of a layer, or a layout of several; a frozen pytree.

    Every segment attends; the last of a layer cache also appends. Empty slots have `pos == -1` (any `pos < 0`) and hold
    finite values. What a segment cannot do it refuses with a `TypeError` that says what to do instead.
    """

    key_rope: KeyRope

    @property
    def pos(self) -> Int32[Array, "B K S"]:
        """i32[B, K, S], token position of every slot, -1 = empty."""

    def axes(self) -> AnySegment:
        """The same tree with a `PartitionSpec` of names in place of every array: what its axes are.

        Names are "batch", "kv_heads", "slots", "tail" and "pages", or one of them with a suffix
        (`kvjax.sharding.layout`); None and "tail" are axes that are never split. An axis of slots may have an entry for
        several of them.
        """

    def attend(
        self,
        queries: Queries,
        *,
        window: int | None,
        scale: Scale | None,
        ranks: Ranks | None = None,
        key_basis: KeyBasis | None = None,
    ) -> Partial:
        """Attends with the queries to this segment's slots.

        Args:
          queries: of all its KV heads.
          window: tokens a query looks back over, itself included; None: all.
          scale: multiplies the dot products, and may cap them; None: `H ** -0.5`.
          ranks: for `key_rope="rank"` and "window".
          key_basis: in which its keys are coordinates of un-rotated keys (`LatentSegment`). None: they are keys.
        """

    def mass(
        self,
        queries: Queries,
        lse: jax.Array,
        *,
        window: int | None,
        scale: Scale | None,
        ranks: Ranks | None = None,
        reduce: Reduce = "sum",
    ) -> Float32[Array, "B N S"]:
        """f32[B, N, S]: probability each slot received, given the queries' lse over the whole layer.

        Summed over the queries, or what else `reduce` asks for.
        """

    def dense(self) -> AnySegment:
        """Returns the same slots with keys and values as arrays: what transforms that need values read."""

    def map_dense(self, body: Rewrite, tail: Rewrite) -> AnySegment:
        """Rewrites the dense slots it holds, wherever they are nested; refuses where there are none.

        Args:
          body: for slots that are written once, or in whole blocks.
          tail: for slots that tokens are appended to one by one.
        """

    def edited(self, edit: Edit) -> AnySegment:
        """Gives slots other positions, or empties them; keeps shapes, and refuses what it cannot do exactly."""

    def append(self, k: jax.Array, v: jax.Array, pos: jax.Array, rope: Rope) -> AnySegment:
        """Writes T new tokens: k, v [B, K, T, H], k un-rotated; pos i32[B, T], padding (-1) last."""

    def reserve(self, tokens: int) -> AnySegment:
        """Makes room for `tokens` more appended tokens. Changes shapes: only before the loop starts."""


class LayerView(Protocol):
    """What a layer cache holds in place of a segment whose slots are in `Cache.shared`; a frozen pytree.

    A layer cache replaces it by the segment before anything is read, so a view has no other methods. Nothing is
    appended to it.

    Attributes:
      name: in `Cache.shared`.
      shares_keys: whether what is shared are keys and values, not coordinates of them.
    """

    name: str
    shares_keys: bool

    def inlined(self, shared: dict[str, AnySegment]) -> AnySegment:
        """The segment that this layer sees."""

    def axes(self) -> LayerView:
        """See `AnySegment.axes`."""

    def edited(self, edit: Edit) -> LayerView:
        """Itself: as `map_dense`."""

    def map_dense(self, body: Rewrite, tail: Rewrite) -> LayerView:
        """Itself: what is shared is rewritten where it lies, once."""


Rewrite = Callable[["Segment"], AnySegment]  # noqa: F821, the one of kvjax.segments.segment
"""From a `Segment` of arrays to what replaces it."""
