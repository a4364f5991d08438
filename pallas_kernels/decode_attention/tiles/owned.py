"""Reads pages of KV heads: one list of slots, which the queries of all heads read.

Every tile of pages is multiplied by all T * N queries, of which each sees the slots of its own head. The matrix unit
holds the slots and streams the queries, so up to its height the queries of other heads take no time; the time is that
of reading the pages, once each, whoever owns them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_attention.pages import Pages
from pallas_kernels.tpu_decode import LEAST_SLOTS, MOST_ROWS, Keys, Stored, repeated_rows
from pallas_kernels.tpu_decode_blocks import Blocks
from pallas_kernels.tpu_tiles import LANES

_UNIT = 8  # slots that one entry of the owners stands for, at most
_ENCODED_UNIT = 4  # the same where they are decoded: a tile of twice as many is too large then
_MOST_HEADS = 256  # numbers that bfloat16 holds exactly


class OwnedSlots(NamedTuple):
    """The slots of pages, in one list."""

    pages: Pages
    slots: int  # [S]
    encoded: bool

    @property
    def page(self) -> int:
        """Slots of a page."""
        return self.slots // self.pages.owner.shape[1]

    @property
    def unit(self) -> int:
        """Slots that one entry of the owners stands for in the kernel: a page, or a part of it."""
        return math.gcd(self.page, _ENCODED_UNIT if self.encoded else _UNIT)

    @property
    def step(self) -> int:
        """Slots of a tile, of which owners fill whole lanes in every tile but a single one."""
        return LANES * self.unit

    def whole(self, sizes: Blocks | None) -> Blocks | None:
        """Blocks whose owners fill whole lanes, or that are one step at most."""
        if sizes is None or sizes.slots % self.step == 0 or sizes.slots < self.step:
            return sizes
        return Blocks(sizes.heads, self.step, 1)

    @property
    def expanded_bytes(self) -> int:
        """Of one slot: owners and masks."""
        return 64

    def owned(self, keys: Keys, q: jax.Array) -> Keys:
        """Keys of the list, each of which the queries of its owner alone see, of all [B, T, N, H]."""
        unit, heads, period = self.unit, q.shape[2], repeated_rows(q, 1)
        group = heads // self.pages.kv_heads
        units = Stored(_repeated(self.pages.owner, self.page // unit)[:, None, None], 3, unit)

        def logits(queries, pos, *tiles):
            *tiles, owner = tiles
            # Owners of slots from owners of units: a product with zeros and ones, of as many units as lanes.
            n = min(LANES, owner.shape[1])
            owner = owner.astype(jnp.float32)
            parts = jnp.concatenate([owner[:, i : i + n] for i in range(0, owner.shape[1], n)], axis=0)
            slot = jax.lax.broadcasted_iota(jnp.int32, (n, n * unit), 1)
            first = jax.lax.broadcasted_iota(jnp.int32, (n, n * unit), 0) * unit
            spread = ((slot >= first) & (slot < first + unit)).astype(jnp.float32).astype(jnp.bfloat16)
            of_slot = jnp.dot(parts.astype(jnp.bfloat16), spread, preferred_element_type=jnp.float32)
            of_slot = jnp.concatenate([of_slot[i : i + 1] for i in range(parts.shape[0])], axis=1)  # [1, s]
            found = keys.logits(queries, pos, *tiles)
            row = jax.lax.broadcasted_iota(jnp.int32, (found.shape[0], 1), 0)
            query = jax.lax.rem(jax.lax.rem(row, jnp.int32(period)), jnp.int32(heads))
            head = jax.lax.div(query, jnp.int32(group)).astype(jnp.float32)
            return jnp.where(of_slot == head, found, -jnp.inf)

        return Keys((*keys.stored, units), logits, lambda q, pos, *tiles: keys.queries(q, pos, *tiles[:-1]))

    @property
    def within(self) -> tuple[jax.Array, jax.Array] | None:
        """The slots of a run of pages, for `attend`."""
        run = self.pages.run
        return None if run is None else (run.first * self.page, (run.first + run.count) * self.page)


def _repeated(x: jax.Array, times: int) -> jax.Array:
    """`jnp.repeat(x, times, axis=1)` in int32, of up to 256; as a product: repeating makes a row of lanes of each."""
    B, P = x.shape
    rows = jnp.pad(x, ((0, 0), (0, -P % LANES))).reshape(B, -1, LANES).astype(jnp.bfloat16)
    spread = np.repeat(np.eye(LANES), times, axis=1)
    return jnp.dot(rows, spread.astype(jnp.bfloat16)).astype(jnp.int32).reshape(B, -1)[:, : P * times]


def head_limit(q: jax.Array, kv_heads: int, slots: int) -> str | None:
    """Returns why pages of these heads and slots are unsupported, or None."""
    rows = q.shape[1] * q.shape[2]
    if rows > MOST_ROWS:
        return f"takes up to {MOST_ROWS} queries of all heads, got T * N = {rows} of q {list(q.shape)}"
    if kv_heads > _MOST_HEADS:
        return f"takes up to {_MOST_HEADS} KV heads, got {kv_heads}"
    if slots < LEAST_SLOTS:
        return f"takes {LEAST_SLOTS} slots or more, got S = {slots}"
    return None
