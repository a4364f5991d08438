"""Shapes at which decode kernels are checked, timed and tuned, and random inputs of these shapes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_attention import Pages, Rotation
from pallas_kernels.quantize_pack import WORD_BITS, Axis, Packed, quantize_pack, words_in_row


@dataclasses.dataclass(frozen=True)
class DecodeShape:
    """Queries over slots, in the letters of every op."""

    B: int = 1
    T: int = 1
    K: int = 1
    G: int = 1
    S: int = 128
    H: int = 128
    dtype: str = "float32"  # of queries, and of keys and values where they are not packed

    def __str__(self) -> str:
        return "-".join(f"{name}{value}" for name, value in dataclasses.asdict(self).items()).replace("dtype", "")

    def abstract(self, *, bias: bool = False) -> tuple:
        """`(q, k, v, q_pos, k_pos, bias)` without numbers, for what is compiled only."""
        at = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
        slots = (self.B, self.K, self.S)
        return (
            at(self.dtype, self.B, self.T, self.K * self.G, self.H),
            at(self.dtype, *slots, self.H),
            at(self.dtype, *slots, self.H),
            at(jnp.int32, self.B, self.T),
            at(jnp.int32, *slots),
            at(jnp.float32, *slots) if bias else None,
        )

    def draw(self, seed: int) -> tuple[jax.Array, ...]:
        """`(q, k, v, q_pos, k_pos)` of normal numbers, slots in no order, an eighth of them empty.

        The last query of the first row is padding if there are several. Of several rows of heads the last is empty
        and the one before it has one slot.
        """
        rng = np.random.default_rng(seed)
        q = rng.normal(size=(self.B, self.T, self.K * self.G, self.H))
        k, v = rng.normal(size=(2, self.B, self.K, self.S, self.H))
        k_pos = np.tile(np.arange(self.S), (self.B * self.K, 1))
        k_pos = np.where(rng.random(k_pos.shape) < 0.125, -1, k_pos)
        if len(k_pos) > 2:
            k_pos[-1] = -1
            k_pos[-2, 1:] = -1
        k_pos = rng.permuted(k_pos, axis=1).reshape(self.B, self.K, self.S)
        q_pos = np.sort(rng.integers(self.S // 2, self.S + 1, size=(self.B, self.T)), axis=1)
        if self.T > 1:
            q_pos[0, -1] = -1
        return (*(jnp.asarray(x, self.dtype) for x in (q, k, v)), jnp.int32(q_pos), jnp.int32(k_pos))


@dataclasses.dataclass(frozen=True)
class QuantizedShape:
    """Queries over packed slots."""

    decode: DecodeShape
    bits: int
    key_axis: Axis = "channel"
    key_group: int = 32
    value_group: int = 32
    scale_dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"{self.bits}bit-{self.key_axis}{self.key_group}-{self.value_group}-{self.decode}"

    def abstract(self, *, bias: bool = False) -> tuple:
        """As `DecodeShape.abstract`."""
        at, x = jax.ShapeDtypeStruct, self.decode
        q, k, v, *rest = x.abstract(bias=bias)
        return q, *jax.eval_shape(self._pack, at((x.B, x.K, x.S), bool), k, v), *rest

    def draw(self, seed: int) -> tuple:
        """As `DecodeShape.draw`, with keys and values packed."""
        q, k, v, q_pos, k_pos = self.decode.draw(seed)
        return q, *jax.jit(self._pack)(k_pos >= 0, k, v), q_pos, k_pos

    def _pack(self, valid, k, v) -> tuple[Packed, Packed]:
        in_row = words_in_row(self.decode.H, self.decode.S * self.bits // WORD_BITS)
        how = dict(bits=self.bits, scale_dtype=self.scale_dtype, in_row=in_row)
        k = quantize_pack(k, valid, axis=self.key_axis, group=self.key_group, **how)
        return k, quantize_pack(v, valid, axis="token", group=self.value_group, **how)


@dataclasses.dataclass(frozen=True)
class RaggedShape:
    """Queries over pages that belong to KV heads; `decode.S` is left unused."""

    decode: DecodeShape
    P: int
    page: int = 16

    def __str__(self) -> str:
        return f"P{self.P}-page{self.page}-{self.decode}"

    def abstract(self) -> tuple:
        """`(q, k, v, q_pos, k_pos, pages)` without numbers."""
        at, x = jax.ShapeDtypeStruct, self.decode
        q, _, _, q_pos, _, _ = x.abstract()
        slots = (x.B, 1, self.P * self.page)
        kv = at((*slots, x.H), x.dtype)
        return q, kv, kv, q_pos, at(slots, jnp.int32), Pages(at((x.B, self.P), jnp.int32), x.K)

    def draw(self, seed: int) -> tuple[jax.Array, ...]:
        """Half of the pages belong to head 0; pages of a head lie together, and the last ones are empty."""
        rng = np.random.default_rng(seed)
        x = dataclasses.replace(self.decode, K=self.P, G=1, S=self.page)
        _, k, v, _, k_pos = x.draw(seed)
        q = jnp.asarray(rng.normal(size=(x.B, x.T, self.decode.K * self.decode.G, x.H)), x.dtype)
        owner = np.sort(np.where(rng.random((x.B, self.P)) < 0.5, 0, rng.integers(0, self.decode.K, (x.B, self.P))))
        owner[:, -2:] = 0
        k_pos = k_pos.at[:, -2:].set(-1)
        q_pos = rng.integers(self.page // 2, self.page + 1, size=(x.B, x.T))
        one_head = lambda x: x.reshape(x.shape[0], 1, -1, *x.shape[3:])
        pages = Pages(jnp.int32(owner), self.decode.K)
        return q, one_head(k), one_head(v), jnp.int32(q_pos), one_head(k_pos), pages


@dataclasses.dataclass(frozen=True)
class RaggedQuantizedShape:
    """Queries over packed pages; bits, groups and scales are those of `packed`, whose `decode` is left unused."""

    pages: RaggedShape
    packed: QuantizedShape

    def __str__(self) -> str:
        x = self.packed
        return f"{x.bits}bit-{x.key_axis}{x.key_group}-{x.value_group}-{self.pages}"

    def abstract(self) -> tuple:
        """`(q, k, v, q_pos, k_pos, pages)` without numbers."""
        q, k, v, q_pos, k_pos, pages = self.pages.abstract()
        return q, *jax.eval_shape(self._pack, k, v, k_pos), q_pos, k_pos, pages

    def draw(self, seed: int) -> tuple:
        """As `RaggedShape.draw`, with keys and values packed page by page."""
        q, k, v, q_pos, k_pos, pages = self.pages.draw(seed)
        return q, *jax.jit(self._pack)(k, v, k_pos), q_pos, k_pos, pages

    def _pack(self, k, v, k_pos) -> tuple[Packed, Packed]:
        of_page = dataclasses.replace(self.pages.decode, S=self.pages.page)
        return dataclasses.replace(self.packed, decode=of_page)._pack(k_pos >= 0, k, v)


@dataclasses.dataclass(frozen=True)
class LowrankShape:
    """Queries over coordinates of un-rotated keys, and of values."""

    decode: DecodeShape
    R: int
    joint: bool = False

    def __str__(self) -> str:
        return f"R{self.R}-{'joint-' if self.joint else ''}{self.decode}"

    def abstract(self) -> tuple:
        """`(q, k, v, q_pos, k_pos, rotation)` without numbers."""
        at, x = jax.ShapeDtypeStruct, self.decode
        q, _, _, q_pos, _, _ = x.abstract()
        slots = (x.B, 1 if self.joint else x.K, x.S)
        latent = at((*slots, self.R), x.dtype)
        basis = at((1, x.K, x.H, self.R), jnp.float32)
        rotation = Rotation(at((x.H // 2,), jnp.float32), basis=basis)
        return q, latent, latent, q_pos, at(slots, jnp.int32), rotation

    def draw(self, seed: int) -> tuple[jax.Array, ...]:
        """As `DecodeShape.draw`; coordinates of norm `sqrt(R)` make keys of norm `sqrt(H)`."""
        x, rng = self.decode, np.random.default_rng(seed)
        q, _, _, q_pos, _ = x.draw(seed)
        _, k, v, _, k_pos = dataclasses.replace(x, K=1 if self.joint else x.K, H=self.R).draw(seed)
        basis = rng.normal(size=(1, x.K, x.H, self.R)) * self.R**-0.5
        inv_freq = 10000.0 ** (-np.arange(0, x.H, 2) / x.H)
        return q, k, v, q_pos, k_pos, Rotation(jnp.float32(inv_freq), basis=jnp.float32(basis))


CHECKED = (
    DecodeShape(K=3, S=37, H=64),
    DecodeShape(T=4, K=2, G=3, S=300, H=64, dtype="bfloat16"),
    DecodeShape(B=2, K=2, G=4, S=512, dtype="bfloat16"),
    DecodeShape(T=4, G=16, S=129),
    DecodeShape(B=2, T=2, K=2, S=9),
    DecodeShape(G=2, S=250, H=256),
)
"""Small ones for every head size, groups from 1 to 16, odd lengths, one token and several, empty and one-slot heads."""

CHECKED_QUANTIZED = (
    QuantizedShape(DecodeShape(K=3, G=3, S=32, H=64), 8, key_group=16, value_group=64, scale_dtype="float32"),
    QuantizedShape(DecodeShape(K=3, G=3, S=608, H=64, dtype="bfloat16"), 4, key_group=16),
    QuantizedShape(DecodeShape(T=2, G=2, S=96, H=64), 2, key_axis="token", key_group=64, value_group=64),
    QuantizedShape(DecodeShape(T=4, G=4, S=288), 4),
    QuantizedShape(DecodeShape(B=2, K=2, S=512, dtype="bfloat16"), 2, key_group=16),
    QuantizedShape(DecodeShape(G=16, S=272, dtype="bfloat16"), 2, key_axis="token", value_group=128),
    QuantizedShape(DecodeShape(T=2, G=2, S=144, H=256), 8, key_axis="token", key_group=64),
)
"""Small ones for all bits and both axes."""

CHECKED_RAGGED = (
    RaggedShape(DecodeShape(T=2, K=3, G=2, H=64), P=7),
    RaggedShape(DecodeShape(B=2, K=2, G=4, dtype="bfloat16"), P=160, page=8),
)
"""Small ones: a tile, and several of which the last reaches over the end."""

CHECKED_RAGGED_QUANTIZED = (
    RaggedQuantizedShape(
        RaggedShape(DecodeShape(T=2, K=3, G=2, H=64), P=7, page=32), QuantizedShape(DecodeShape(), 4, value_group=32)
    ),
    RaggedQuantizedShape(
        RaggedShape(DecodeShape(B=2, K=2, G=4, dtype="bfloat16"), P=80, page=16),
        QuantizedShape(DecodeShape(), 2, key_axis="token", key_group=64, value_group=64),
    ),
)
"""Small ones: keys per channel and per token, a tile and several of which the last reaches over the end."""

CHECKED_LOWRANK = (
    LowrankShape(DecodeShape(T=2, K=2, G=2, S=160, H=64), R=24),
    LowrankShape(DecodeShape(B=2, K=2, G=4, S=300, dtype="bfloat16"), R=128, joint=True),
)
"""Small ones: by head and shared by heads, slots minor and coordinates minor."""

SMOLLM2 = DecodeShape(K=3, G=3, S=2048, H=64, dtype="bfloat16")
LLAMA_8B = DecodeShape(K=8, G=4, S=32768, H=128, dtype="bfloat16")
