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
from pallas_kernels.dispatch import Kernel
from pallas_kernels.partial import Partial
from pallas_kernels.quantize_pack import WORD_BITS, Packed
from pallas_kernels.tpu_decode import Keys, Stored, Values, attend, logits_bytes, padded_rows, product, row_limit
from pallas_kernels.tpu_decode_blocks import Blocks, blocks
from pallas_kernels.tpu_tiles import LANES, SUBLANES

_MOST_GROUPS = 16  # of channels
_MOST_SUMS = 512  # rows of sums of a KV head, one for every query and group of channels


def unpacked(words: jax.Array, bits: int, H: int, dtype) -> jax.Array:
    """u32[w, n * H] -> codes [s, H]: every word is broadcast to the rows of its slots, and shifted by row."""
    w, width = words.shape
    per, in_row = WORD_BITS // bits, width // H
    shape = (w, in_row * per, H)
    slot = jax.lax.broadcasted_iota(jnp.uint32, shape, 1)
    words = words[:, None]
    word = jnp.broadcast_to(words[..., :H], shape)
    for i in range(1, in_row):  # what lies in further lanes belongs to further slots
        word = jnp.where(slot >= i * per, words[..., i * H : (i + 1) * H], word)
    code = (word >> (slot & (per - 1)) * bits) & (2**bits - 1)
    return code.astype(jnp.int32).astype(jnp.float32).reshape(-1, H).astype(dtype)


def keys_per_channel(k: Packed, bits: int, slots: int, dtype) -> Keys:
    """Scales and zeros [B, K, S / g, 2 * H]: groups of g slots are restored in float32, as in the reference."""
    group, H = slots // k.affine.shape[2], k.affine.shape[3] // 2

    def logits(q, pos, words, affine):
        n, affine = affine.shape[0], affine.astype(jnp.float32)
        code = unpacked(words, bits, H, jnp.float32).reshape(n, group, H)
        x = code * affine[:, None, :H] + affine[:, None, H:]
        return product(q, x.reshape(n * group, H).astype(dtype), (1, 1))

    return Keys((_words(k, slots), Stored(k.affine, 2, group)), logits)


def keys_per_token(k: Packed, bits: int, slots: int, dtype) -> Keys:
    """Scales and zeros [B, K, 2 * n, S]: `sum_i scale[i, s] <q_i, code_i[s]> + zero[i, s] sum(q_i)`, i of n groups."""

    def logits(q, pos, words, affine):
        n, (R, H) = affine.shape[0] // 2, q.shape
        own = _group_of_channel((n, R, H), n, 2) == jax.lax.broadcasted_iota(jnp.int32, (n, R, H), 0)
        parts = jnp.where(own, q.astype(jnp.float32)[None], 0.0)
        sums = jnp.sum(parts, axis=2, keepdims=True)  # [n, R, 1]
        product_ = product(parts.reshape(n * R, H).astype(dtype), unpacked(words, bits, H, dtype), (1, 1))
        affine = affine.astype(jnp.float32)[:, None]
        return jnp.sum(product_.reshape(n, R, -1) * affine[:n] + sums * affine[n:], axis=0)

    return Keys((_words(k, slots), Stored(k.affine, 3)), logits)


def values_per_token(v: Packed, bits: int, slots: int, dtype) -> Values:
    """Scales and zeros [B, K, 2 * n, S]: `sum_s p[s] scale[i, s] code_i[s] + sum_s p[s] zero[i, s]`, i of n groups."""
    n, H = v.affine.shape[2] // 2, v.channels(bits, slots)

    def weigh(p, words, affine):
        R, affine = p.shape[0], affine.astype(jnp.float32)
        scaled = p[None] * affine[:n, None]  # [n, R, s]
        codes = product(scaled.reshape(n * R, -1).astype(dtype), unpacked(words, bits, H, dtype))
        return codes.reshape(n, R, H), product(p, affine[n:], (1, 1))[None]

    def output(codes, zeros):
        mine = _group_of_channel(codes.shape[1:], n, 1)
        return sum(jnp.where(mine == i, codes[i] + zeros[0, :, i : i + 1], 0.0) for i in range(n))

    return Values((_words(v, slots), Stored(v.affine, 3)), ((n, H), (1, n)), weigh, output, H)


def _words(x: Packed, slots: int) -> Stored:
    return Stored(x.words, 2, slots // x.words.shape[2])


def _group_of_channel(shape, groups: int, axis: int) -> jax.Array:
    index = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    # `//` asks for the sign, whose lowering asks the device which generation it is: none when compiling ahead.
    return jax.lax.div(index, jnp.int32(shape[axis] // groups))


def sizes(
    q,
    k: Packed,
    v: Packed,
    S: int,
    bits: int,
    key_axis: str,
    *,
    name: str = "quantized_decode_attention.mosaic_tpu",
    unit: int = 0,
    step: int = 1,
    expanded: float = 0.0,
) -> Blocks | None:
    """What a step of the grid reads, for a kernel of this `name`, with what it adds for units of pages."""
    K = k.words.shape[1]
    slot_bytes, expanded = 4.0, expanded + logits_bytes(q, K)
    in_lanes = lambda width: -(-width // LANES) * LANES
    for x, axis in ((k, key_axis), (v, "token")):
        in_row = S // x.words.shape[2]  # slots
        slot_bytes += 4 * in_lanes(x.words.shape[3]) / in_row
        expanded += 2 * in_lanes(x.channels(bits, S)) * 4  # codes, and what they stand for
        step = math.lcm(step, SUBLANES * in_row)
        if axis == "token":
            slot_bytes += x.affine.shape[2] * x.affine.dtype.itemsize
            expanded += x.affine.shape[2] * logits_bytes(q, K) / 4  # a row for every query and scale
        else:
            group = S // x.affine.shape[2]
            slot_bytes += in_lanes(x.affine.shape[3]) / group * x.affine.dtype.itemsize
            step = math.lcm(step, SUBLANES * group)
    group_of = lambda x, axis: (S if axis == "channel" else 2 * x.channels(bits, S)) // x.affine.shape[2]
    key = block_sizes.key(
        heads=K,
        rows=padded_rows(q, K),
        H=q.shape[3],
        bits=bits,
        key_axis=key_axis,
        key_group=group_of(k, key_axis),
        value_group=group_of(v, "token"),
        q=q.dtype,
        scale=k.affine.dtype,
        unit=unit,
    )
    return blocks(name, key, K, S, slot_bytes, expanded, step=step)


def _unsupported(q, k, v, q_pos, k_pos, bias=None, *, bits, key_axis, window, scale) -> str | None:
    if v is None:
        return "takes values of their own"
    S = k_pos.shape[2]
    if limit := row_limit(q, k.words.shape[1], S) or unsupported_groups(q, k, v, S, key_axis):
        return limit
    if sizes(q, k, v, S, bits, key_axis) is None:
        group = S // k.affine.shape[2]
        return f"finds no tile of [K, S, H] = {[*k_pos.shape[1:], q.shape[3]]} in groups of {group} that fits"
    return None


def unsupported_groups(q, k: Packed, v: Packed, S: int, key_axis: str) -> str | None:
    """What is wrong with what shares a scale."""
    group = S // k.affine.shape[2]
    if key_axis == "channel" and group % SUBLANES:
        return f"takes groups of a multiple of {SUBLANES} tokens, got {group}"
    groups = max(x.affine.shape[2] // 2 for x in ((v,) if key_axis == "channel" else (k, v)))
    if groups > _MOST_GROUPS:
        return f"takes up to {_MOST_GROUPS} groups of channels, got {groups}"
    rows = q.shape[1] * q.shape[2] // k.words.shape[1] * groups
    if rows > _MOST_SUMS:
        return f"takes up to {_MOST_SUMS} queries of a KV head times groups of channels, got T * G * {groups} = {rows}"
    return None


def _quantized_decode_attention(q, k, v, q_pos, k_pos, bias=None, *, bits, key_axis, window, scale) -> Partial:
    keys, S = keys_per_channel if key_axis == "channel" else keys_per_token, k_pos.shape[2]
    return attend(
        q,
        keys(k, bits, S, q.dtype),
        values_per_token(v, bits, S, q.dtype),
        q_pos,
        k_pos,
        bias,
        sizes=sizes(q, k, v, S, bits, key_axis),
        window=window,
        scale=scale,
    )


kernel = Kernel(_quantized_decode_attention, _unsupported)
