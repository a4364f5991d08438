"""Affine codes: `x ~ scale * code + zero`, the numbers of a group sharing scale and zero."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import struct

from kvjax.axes import OF_SLOTS, OF_SLOTS_LAST
from pallas_kernels.quantize_pack import WORD_BITS, Axis, Packed, quantize_pack, words_in_row
from pallas_kernels.words import planes

_IN_ROW = 4
"""Words that fill a row of 32 channels or more."""


@struct.dataclass
class Affine:
    """2, 3, 4 or 8 bits a number, in groups over the tokens of a channel (KIVI's keys) or the channels of a token.

    Groups over tokens are written in whole blocks; groups over channels may be written slot by slot (`tokens=1`).
    Where a head has fewer channels than a TPU has lanes, words of a block lie side by side, see `words_in_row`.

    Bytes, with scales and zeros of e bytes: `B * K * S * H * (bits / 8 + 2 * e / group)`.
    """

    packed: Packed | None
    bits: int = struct.field(pytree_node=False)
    group: int | None = struct.field(pytree_node=False)  # None, or no divisor for single slots: all channels
    axis: Axis = struct.field(pytree_node=False)
    tokens: int = struct.field(pytree_node=False)  # of a block that is written together; 0: not chosen yet
    scale_dtype: str = struct.field(pytree_node=False, default="bfloat16")
    clip: float = struct.field(pytree_node=False, default=1.0)  # see `quantize_pack`

    @classmethod
    def of_blocks(cls, bits: int, group: int | None, axis: Axis, *, block: int | None = None, **how) -> Affine:
        """Makes the codec of blocks of `block` tokens; without it, of what `for_slots` says."""
        return cls(None, bits, group, axis, 0 if block is None else block, **how)

    @classmethod
    def of_slots(cls, bits: int, group: int | None, **how) -> Affine:
        """Makes the codec of single slots, each with scales over `group` of its channels (None: over all)."""
        return cls(None, bits, group, "token", 1, **how)

    def for_slots(self, slots: int, block: int | None = None) -> Affine:
        """Returns the codec for slots that are written in blocks, or once: few, in blocks that fill rows of words."""
        if self.tokens:
            return self
        fewest = math.lcm(self.group if self.axis == "channel" else 1, self._word)
        if block is not None:
            return self.replace(tokens=fewest if block % fewest else block)
        return self.replace(tokens=fewest * math.gcd(-(-slots // fewest), _IN_ROW))

    @property
    def by_slot(self) -> bool:
        """See `Encoded.by_slot`."""
        return self.tokens == 1

    @property
    def block(self) -> int:
        """See `Encoded.block`."""
        return self._word if self.by_slot else self.tokens

    @property
    def _word(self) -> int:
        """Slots that fill words: of 3 bits, which are planes of 2 and 1, those of the narrower."""
        return WORD_BITS // min(planes(self.bits))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """See `Encoded.shape`."""
        return self.packed.shape

    def like(self, x: jax.Array, occupied: jax.Array) -> Affine:
        """See `Encoded.like`."""
        H = x.shape[3]
        whole = self.group is None or self.by_slot and H % self.group
        in_row = 1 if self.by_slot or self.bits == 3 else words_in_row(H, self.tokens * self.bits // WORD_BITS)
        how = dict(bits=self.bits, axis=self.axis, scale_dtype=self.scale_dtype, clip=self.clip, in_row=in_row)
        return self.replace(packed=quantize_pack(x, occupied, group=H if whole else self.group, **how))

    def decode(self, dtype=jnp.float32) -> jax.Array:
        """See `Encoded.decode`."""
        return self.packed.decode(dtype)

    def cut(self, start, size) -> Affine:
        """See `Encoded.cut`."""
        return self.replace(packed=self.packed.cut(start, size))

    def axes(self) -> Affine:
        """See `Encoded.axes`."""
        affine = OF_SLOTS if self.axis == "channel" else OF_SLOTS_LAST
        high = None if self.packed.high is None else OF_SLOTS
        return self.replace(packed=self.packed.replace(words=OF_SLOTS, affine=affine, high=high))

    def fields(self) -> Affine:
        """See `Encoded.fields`."""
        low, *high = planes(self.bits)
        return self.replace(packed=self.packed.replace(words=low, affine=0, high=high[0] if high else None))

    def leaf_and_gain(self):
        """See `Encoded.leaf_and_gain`."""
        return self.packed, None
