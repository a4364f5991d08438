"""`quantized_decode_attention` on TPU: the decode skeleton over words that are unpacked in VMEM.

What varies along what a product keeps apart is taken out of it. Scales per token of the values multiply the
probabilities, those of the keys multiply the logits, and codes, which bfloat16 holds exactly, go to the matrix unit as
they are. With n groups of channels there are n times as many rows, which cost nothing while all of them fit its height.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pallas_kernels import block_sizes
from pallas_kernels.decode_attention.config import Blocks, blocks
from pallas_kernels.decode_attention.mosaic_tpu import (
    Keys,
    Stored,
    Values,
    attend,
    logits_bytes,
    padded_rows,
    product,
    row_limit,
)
from pallas_kernels.dispatch import Kernel
from pallas_kernels.partial import Partial
from pallas_kernels.quantize_pack import WORD_BITS, Packed

_SUBLANES = 8
_MOST_GROUPS = 16  # of channels
_MOST_SUMS = 512  # rows of sums of a KV head, one for every query and group of channels


def unpacked(words: jax.Array, bits: int, dtype) -> jax.Array:
    """u32[w, H] -> codes [s, H]: every word is broadcast to the rows of its slots, and shifted by row."""
    w, H = words.shape
    shape = (w, WORD_BITS // bits, H)
    shifts = jax.lax.broadcasted_iota(jnp.uint32, shape, 1) * bits
    code = (jnp.broadcast_to(words[:, None], shape) >> shifts) & (2**bits - 1)
    return code.astype(jnp.int32).astype(jnp.float32).reshape(-1, H).astype(dtype)


def keys_per_channel(k: Packed, bits: int, dtype) -> Keys:
    """Scales [B, K, S / g, H]: groups of g slots are restored in float32, as in the reference."""
    group = k.words.shape[2] * (WORD_BITS // bits) // k.scale.shape[2]

    def logits(q, pos, words, scale, zero):
        n, H = scale.shape
        code = unpacked(words, bits, jnp.float32).reshape(n, group, H)
        x = code * scale.astype(jnp.float32)[:, None] + zero.astype(jnp.float32)[:, None]
        return product(q, x.reshape(n * group, H).astype(dtype), (1, 1))

    return Keys((_words(k, bits), Stored(k.scale, 2, group), Stored(k.zero, 2, group)), logits)


def keys_per_token(k: Packed, bits: int, dtype) -> Keys:
    """Scales [B, K, n, S]: `logit[s] = sum_i (scale[i, s] <q_i, code_i[s]> + zero[i, s] sum(q_i))`, i of n groups."""

    def logits(q, pos, words, scale, zero):
        n, (R, H) = scale.shape[0], q.shape
        own = _group_of_channel((n, R, H), n, 2) == jax.lax.broadcasted_iota(jnp.int32, (n, R, H), 0)
        parts = jnp.where(own, q.astype(jnp.float32)[None], 0.0)
        sums = jnp.sum(parts, axis=2, keepdims=True)  # [n, R, 1]
        product_ = product(parts.reshape(n * R, H).astype(dtype), unpacked(words, bits, dtype), (1, 1))
        scale, zero = scale.astype(jnp.float32)[:, None], zero.astype(jnp.float32)[:, None]
        return jnp.sum(product_.reshape(n, R, -1) * scale + sums * zero, axis=0)

    return Keys((_words(k, bits), Stored(k.scale, 3), Stored(k.zero, 3)), logits)


def values_per_token(v: Packed, bits: int, dtype) -> Values:
    """Scales [B, K, n, S]: `sum_s p[s] scale[i, s] code_i[s] + sum_s p[s] zero[i, s]`, i of n groups."""
    n, H = v.scale.shape[2], v.words.shape[3]

    def weigh(p, words, scale, zero):
        R = p.shape[0]
        scaled = p[None] * scale.astype(jnp.float32)[:, None]  # [n, R, s]
        codes = product(scaled.reshape(n * R, -1).astype(dtype), unpacked(words, bits, dtype))
        return codes.reshape(n, R, H), product(p, zero.astype(jnp.float32), (1, 1))[None]

    def output(codes, zeros):
        mine = _group_of_channel(codes.shape[1:], n, 1)
        return sum(jnp.where(mine == i, codes[i] + zeros[0, :, i : i + 1], 0.0) for i in range(n))

    return Values((_words(v, bits), Stored(v.scale, 3), Stored(v.zero, 3)), ((n, H), (1, n)), weigh, output, H)


def _words(x: Packed, bits: int) -> Stored:
    return Stored(x.words, 2, WORD_BITS // bits)


def _group_of_channel(shape, groups: int, axis: int) -> jax.Array:
    index = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    # `//` asks for the sign, whose lowering asks the device which generation it is: none when compiling ahead.
    return jax.lax.div(index, jnp.int32(shape[axis] // groups))


def _sizes(q, k: Packed, v: Packed, bits: int, key_axis: str) -> Blocks | None:
    per = WORD_BITS // bits
    K, S = k.words.shape[1], k.words.shape[2] * per
    slot_bytes, expanded, step = 4.0, logits_bytes(q, K), _SUBLANES * per
    for x, axis in ((k, key_axis), (v, "token")):
        width = -(-x.words.shape[3] // 128) * 128
        slot_bytes += width * bits / 8
        expanded += 2 * width * 4  # codes, and what they stand for
        if axis == "token":
            groups = x.scale.shape[2]
            slot_bytes += 2 * groups * x.scale.dtype.itemsize
            expanded += groups * logits_bytes(q, K) / 2  # as many rows
        else:
            group = S // x.scale.shape[2]
            slot_bytes += 2 * width / group * x.scale.dtype.itemsize
            step = math.lcm(step, _SUBLANES * group)
    group_of = lambda x, axis: S // x.scale.shape[2] if axis == "channel" else x.words.shape[3] // x.scale.shape[2]
    key = block_sizes.key(
        heads=K,
        rows=padded_rows(q, K),
        H=q.shape[3],
        bits=bits,
        key_axis=key_axis,
        key_group=group_of(k, key_axis),
        value_group=group_of(v, "token"),
        q=q.dtype,
        scale=k.scale.dtype,
    )
    return blocks("quantized_decode_attention.mosaic_tpu", key, K, S, slot_bytes, expanded, step=step)


def _unsupported(q, k, v, q_pos, k_pos, bias=None, *, bits, key_axis, window, scale) -> str | None:
    if v is None:
        return "takes values of their own"
    limit = row_limit(q, k.words.shape[1], k_pos.shape[2])
    if limit is not None:
        return limit
    group = k_pos.shape[2] // k.scale.shape[2]
    if key_axis == "channel" and group % _SUBLANES:
        return f"takes groups of a multiple of {_SUBLANES} tokens, got {group}"
    groups = max(x.scale.shape[2] for x in ((v,) if key_axis == "channel" else (k, v)))
    if groups > _MOST_GROUPS:
        return f"takes up to {_MOST_GROUPS} groups of channels, got {groups}"
    rows = q.shape[1] * q.shape[2] // k.words.shape[1] * groups
    if rows > _MOST_SUMS:
        return f"takes up to {_MOST_SUMS} queries of a KV head times groups of channels, got T * G * {groups} = {rows}"
    if _sizes(q, k, v, bits, key_axis) is None:
        return f"finds no tile of [K, S, H] = {[*k_pos.shape[1:], q.shape[3]]} in groups of {group} that fits"
    return None


def _quantized_decode_attention(q, k, v, q_pos, k_pos, bias=None, *, bits, key_axis, window, scale) -> Partial:
    keys = keys_per_channel if key_axis == "channel" else keys_per_token
    return attend(
        q,
        keys(k, bits, q.dtype),
        values_per_token(v, bits, q.dtype),
        q_pos,
        k_pos,
        bias,
        sizes=_sizes(q, k, v, bits, key_axis),
        window=window,
        scale=scale,
    )


kernel = Kernel(_quantized_decode_attention, _unsupported)
