"""What the kernel benchmark runs: every kernel, at one shape, on numbers drawn on the device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.attention_mass import attention_mass
from pallas_kernels.decode_attention import Pages, Rotation, decode_attention
from pallas_kernels.levels import Levels, nearest_levels
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.quantize_pack import WORD_BITS, Packed, quantize_pack, words_in_row
from pallas_kernels.shapes import DecodeShape

DENSE = "dense"
"""The case that the others' bytes and times are compared with."""

_GROUP = 32  # slots of a key's scale, channels of a value's, as in configs/methods/int4.gin
_PAGE = 16  # slots
_RANK = 64  # coordinates of a key and of a value
_QUERIES = 32  # the observation window of which `attention_mass` is asked


@dataclasses.dataclass(frozen=True)
class KernelCase:
    """One kernel and its inputs.

    Attributes:
      name: in the tables.
      op: `(*arrays, implementation=...)`.
      draw: `(shape, key) -> arrays`, random.
      every_step: whether a decode step runs it; the others run once for a prompt.
      bandwidth_bound: whether bytes, not products, decide how long it takes.
      longest: slots beyond which the case is not run; None for no limit.
    """

    name: str
    op: Callable
    draw: Callable[[DecodeShape, jax.Array], tuple]
    every_step: bool = True
    bandwidth_bound: bool = True
    longest: int | None = None

    def program(self, shape: DecodeShape, implementation: str) -> Callable:
        """The op as a function of arrays."""
        return functools.partial(self.op, implementation=implementation)

    def abstract(self, shape: DecodeShape) -> tuple:
        """The arrays' shapes."""
        return jax.eval_shape(lambda: self.draw(shape, jax.random.key(0)))


def _normal(key, dtype, *shape) -> jax.Array:
    # 16 bits at a time: the largest caches leave no room for a float32 copy of themselves.
    return jax.random.normal(key, shape, jnp.bfloat16 if jnp.dtype(dtype).itemsize < 4 else dtype).astype(dtype)


def _queries(shape: DecodeShape, key, T: int) -> tuple[jax.Array, jax.Array]:
    """The last T tokens of the context."""
    q = _normal(key, shape.dtype, shape.B, T, shape.K * shape.G, shape.H)
    return q, jnp.broadcast_to(shape.S - T + jnp.arange(T, dtype=jnp.int32), (shape.B, T))


def _positions(shape: DecodeShape, key) -> jax.Array:
    """Slots in order, one in 16 empty."""
    slots = (shape.B, shape.K, shape.S)
    occupied = jax.random.bits(key, slots, jnp.uint8) >= 16
    return jnp.where(occupied, jnp.arange(shape.S, dtype=jnp.int32), -1)


def _draw_dense(shape: DecodeShape, key, dtype=None) -> tuple:
    keys = jax.random.split(key, 4)
    q, q_pos = _queries(shape, keys[0], 1)
    k, v = (_normal(i, dtype or shape.dtype, shape.B, shape.K, shape.S, shape.H) for i in keys[1:3])
    return q, k, v, q_pos, _positions(shape, keys[3])


def _packed(shape: DecodeShape, key, bits: int, axis: str) -> Packed:
    """Codes of every value, in groups about 3 wide around 0."""
    slots = (shape.B, shape.K, shape.S)
    in_row = words_in_row(shape.H, shape.S * bits // WORD_BITS)
    pack = functools.partial(quantize_pack, bits=bits, group=_GROUP, axis=axis, scale_dtype="bfloat16", in_row=in_row)
    like = jax.eval_shape(pack, *(jax.ShapeDtypeStruct(*x) for x in (((*slots, shape.H), jnp.bfloat16), (slots, bool))))
    words, scale, zero = jax.random.split(key, 3)
    along, step = 3 if axis == "channel" else 2, 3.0 / (2**bits - 1)
    half = list(like.affine.shape)
    half[along] //= 2
    affine = [
        jax.random.uniform(scale, half, jnp.bfloat16, 0.5 * step, step),
        jax.random.uniform(zero, half, jnp.bfloat16, -1.5, -0.5),
    ]
    return Packed(jax.random.bits(words, like.words.shape, jnp.uint32), jnp.concatenate(affine, along), bits, axis)


def _draw_packed(shape: DecodeShape, key, bits: int) -> tuple:
    keys = jax.random.split(key, 4)
    q, q_pos = _queries(shape, keys[0], 1)
    k, v = _packed(shape, keys[1], bits, "channel"), _packed(shape, keys[2], bits, "token")
    return q, k, v, q_pos, _positions(shape, keys[3])


def _draw_levels(shape: DecodeShape, key, bits: int) -> tuple:
    """Codes of every level of both, and norms."""
    keys = jax.random.split(key, 7)
    q, q_pos = _queries(shape, keys[0], 1)
    slots, in_row = (shape.B, shape.K, shape.S), words_in_row(shape.H, shape.S // WORD_BITS)
    table = jnp.linspace(-2.5, 2.5, 2**bits)
    words = jax.eval_shape(lambda: nearest_levels(jnp.zeros((*slots, shape.H)), table, in_row=in_row)).planes
    drawn = lambda key: Levels(tuple(jax.random.bits(key, x.shape, jnp.uint32) for x in words), table, in_row)
    gains = [jax.random.uniform(i, slots, jnp.float32, 0.5, 1.5) for i in keys[3:5]]
    return q, drawn(keys[1]), drawn(keys[2]), q_pos, _positions(shape, keys[5]), *gains


def _draw_pages(shape: DecodeShape, key) -> tuple:
    """As many slots as in the dense case, half of them of head 0."""
    q, k, v, q_pos, k_pos = _draw_dense(shape, key)
    one_head = lambda x: x.reshape(shape.B, 1, -1, *x.shape[3:])
    return q, one_head(k), one_head(v), q_pos, one_head(k_pos), _pages(shape, _PAGE)


def _pages(shape: DecodeShape, page: int) -> Pages:
    pages = shape.K * shape.S // page
    head = jnp.arange(pages, dtype=jnp.int32) * 2 * shape.K // pages  # 0 to 2 K - 1
    return Pages(jnp.broadcast_to(jnp.maximum(head - shape.K, 0), (shape.B, pages)), shape.K)


def _draw_packed_pages(shape: DecodeShape, key, bits: int) -> tuple:
    """The same packed, a group of tokens a page."""
    keys = jax.random.split(key, 4)
    q, q_pos = _queries(shape, keys[0], 1)
    one_head = dataclasses.replace(shape, K=1, S=shape.K * shape.S)
    k, v = _packed(one_head, keys[1], bits, "channel"), _packed(one_head, keys[2], bits, "token")
    return q, k, v, q_pos, _positions(shape, keys[3]).reshape(shape.B, 1, -1), _pages(shape, _GROUP)


def _draw_lowrank(shape: DecodeShape, key) -> tuple:
    """Coordinates of keys from before the rotation, and of values."""
    key, basis = jax.random.split(key)
    q, q_pos = _queries(shape, key, 1)
    _, k, v, _, k_pos = _draw_dense(dataclasses.replace(shape, H=_RANK), key)
    basis = _normal(basis, shape.dtype, 1, shape.K, shape.H, _RANK) * _RANK**-0.5
    return q, k, v, q_pos, k_pos, Rotation(_frequencies(shape), basis=basis)


def _frequencies(shape: DecodeShape) -> jax.Array:
    return 500_000.0 ** -(jnp.arange(0, shape.H, 2) / shape.H)


def _draw_unrotated(shape: DecodeShape, key) -> tuple:
    """Keys from before the rotation, and the ranks of their slots, by which they are rotated when they are read."""
    q, k, v, q_pos, k_pos = _draw_dense(shape, key)
    return q, k, v, q_pos, k_pos, Rotation(_frequencies(shape), jnp.cumsum(k_pos >= 0, axis=-1, dtype=jnp.int32))


def _draw_observed(shape: DecodeShape, key) -> tuple:
    keys = jax.random.split(key, 3)
    q, q_pos = _queries(shape, keys[0], min(_QUERIES, shape.S))
    k = _normal(keys[1], shape.dtype, shape.B, shape.K, shape.S, shape.H)
    # Logits of normal numbers have variance one: about the log-sum-exp of as many.
    lse = jnp.full(q.shape[:3], jnp.log(shape.S) + 0.5, jnp.float32)
    return q, k, q_pos, _positions(shape, keys[2]), lse


def _draw_prompt(shape: DecodeShape, key) -> tuple:
    keys = jax.random.split(key, 3)
    q, pos = _queries(shape, keys[0], shape.S)
    return (q, *(_normal(i, shape.dtype, shape.B, shape.K, shape.S, shape.H) for i in keys[1:]), pos)


def _draw_slots(shape: DecodeShape, key) -> tuple:
    values, empty = jax.random.split(key)
    return _normal(values, shape.dtype, shape.B, shape.K, shape.S, shape.H), _positions(shape, empty) >= 0


def _quantized(bits: int) -> KernelCase:
    return KernelCase(f"int{bits}", decode_attention, functools.partial(_draw_packed, bits=bits))


def _levels(bits: int) -> KernelCase:
    return KernelCase(f"levels {bits}", _with("k_gain", "v_gain"), functools.partial(_draw_levels, bits=bits))


def _with(*names: str) -> Callable:
    """`decode_attention` that takes some of what it knows by name last."""
    return lambda *args, **how: decode_attention(*args[:5], **dict(zip(names, args[5:], strict=True)), **how)


def _packing(name: str, axis: str) -> KernelCase:
    op = functools.partial(quantize_pack, bits=4, group=_GROUP, axis=axis, scale_dtype="bfloat16")
    return KernelCase(name, op, _draw_slots, every_step=False)


def _quantized_pages(bits: int) -> KernelCase:
    return KernelCase(f"int{bits} pages", _with("pages"), functools.partial(_draw_packed_pages, bits=bits))


CASES = (
    KernelCase(DENSE, decode_attention, _draw_dense),
    KernelCase("fp8", decode_attention, functools.partial(_draw_dense, dtype=jnp.float8_e4m3fn)),
    *map(_quantized, (8, 4, 2)),
    *map(_levels, (4, 3, 2)),
    KernelCase("ragged", _with("pages"), _draw_pages),
    _quantized_pages(4),
    KernelCase(f"rank {_RANK}", _with("rotation"), _draw_lowrank),
    KernelCase("unrotated", _with("rotation"), _draw_unrotated),
    KernelCase("mass", attention_mass, _draw_observed, every_step=False),
    _packing("pack keys", "channel"),
    _packing("pack values", "token"),
    # The reference is unrolled by blocks of queries.
    KernelCase("prefill", prefill_attention, _draw_prompt, every_step=False, bandwidth_bound=False, longest=4096),
)
"""Every kernel; of those of a decode step the first is the dense one."""
