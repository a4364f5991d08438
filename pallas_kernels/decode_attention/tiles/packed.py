"""Reads packed codes: words are unpacked in VMEM.

Codes, which bfloat16 holds exactly, go to the matrix unit as they are; scales multiply what they are multiplied by.
Those of keys per channel multiply the queries of a group of slots, those per token the logits, those of the values the
probabilities; zeros are summed beside the product in float32. With n groups there are n times as many rows, which cost
little while all of them fit the matrix unit, and nothing where they take the place of copies in one register.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.tiles.word_rows import BLOCK, halves, in_order, of_half
from pallas_kernels.quantize_pack import Packed
from pallas_kernels.tpu_decode import (
    Cost,
    Keys,
    Loader,
    Numbers,
    Stored,
    Values,
    logits_bytes,
    product,
    repeated_rows,
    sum_of_copies,
    transposed,
)
from pallas_kernels.tpu_tiles import LANES, SUBLANES
from pallas_kernels.words import WORD_BITS

_MOST_GROUPS = 16  # of channels
_CHUNK = 256  # slots that are multiplied by the same queries: those that the largest matrix unit holds
_MOST_FOLDED = 64  # queries of a chunk
_INTEGER = {8: jnp.int8, 4: jnp.int4, 2: jnp.int2}
_MOST_SUMS = 512  # rows of sums of a KV head, one for every query and group of channels


def unpacked(words: jax.Array, bits: int, dtype) -> jax.Array:
    """u32[w, X] -> codes - 2**(bits - 1) as [w * 32 / bits, X].

    The words of 32 / bits slots are what a register of narrow integers holds of these slots, so nothing is moved: with
    the sign bit of every code inverted the unit that widens integers does the rest.
    """
    sign = sum(1 << i for i in range(bits - 1, WORD_BITS, bits))
    return pltpu.bitcast(words ^ jnp.uint32(sign), _INTEGER[bits]).astype(dtype)


def _in_slots(words: jax.Array, H: int) -> jax.Array:
    """u32[w, n * H] -> [n * w, H]: what lies in further lanes belongs to further slots."""
    w, width = words.shape
    if width == H:
        return words
    row = jax.lax.broadcasted_iota(jnp.int32, (w, width // H, H), 1)
    apart = jnp.broadcast_to(words[:, None, :H], row.shape)
    for i in range(1, width // H):
        apart = jnp.where(row == i, words[:, None, i * H : (i + 1) * H], apart)
    return apart.reshape(-1, H)


def _halved(words: jax.Array, H: int, slots: int) -> bool:
    """Whether two words lie side by side, of slots that fill registers."""
    return 2 * H == words.shape[1] == LANES and slots % BLOCK == 0


def keys_per_channel(k: Packed, q: jax.Array, kv_heads: int) -> Keys:
    """Scales and zeros [B, K, S / g, 2 * H].

    Scales multiply the queries: of a chunk of slots every group has its own, all of which are multiplied by all slots
    of the chunk, where the matrix unit has nothing else to do. Where that makes too many queries groups are restored in
    float32, as in the reference.
    """
    group, H, bits = k.group, k.shape[3], k.bits
    half, dtype, per_word = 2.0 ** (bits - 1), q.dtype, WORD_BITS // bits
    chunk, per, period = _chunk(q, kv_heads, group)
    base = max(period, SUBLANES)

    def folds(pos, words):
        return chunk > 0 and pos.shape[1] % chunk == 0 and (words.shape[1] == H or _halved(words, H, pos.shape[1]))

    def queries(q, pos, words, affine):
        """(scaled f32[n * period, X] for every part of a row, offsets f32[n * period, 1]), or what was given."""
        if not folds(pos, words):
            return q
        rows = affine.shape[0] * period
        affine = product(_one_hot(rows, period, affine.dtype), affine)  # a row of each is picked, so it is exact
        own = q[:base].astype(jnp.float32)[None]
        if words.shape[1] == H:
            scale, zero = affine[:, :H].reshape(-1, base, H), affine[:, H:].reshape(-1, base, H)
            scaled = [own * scale]
            offsets = own * (zero + half * scale)
        else:  # scales lie in the first half of the lanes, zeros in the second
            affine = affine.reshape(-1, base, LANES)
            swapped = pltpu.roll(affine, H, 2)
            own = jnp.concatenate([own, own], axis=2)
            left = _index(affine.shape, 2, 1) < H
            scaled = [jnp.where(left, own * affine, 0.0), jnp.where(left, 0.0, own * swapped)]
            offsets = jnp.where(left, 0.0, own * (affine + half * swapped))
        # What codes are multiplied by is rounded; what the zeros and the codes' offset add is not.
        offsets = jnp.sum(offsets, axis=2, keepdims=True).reshape(rows, 1)
        return [x.reshape(rows, -1) for x in scaled], offsets

    def of_groups(part, of_slot):
        """f32[rows of a chunk, s] -> [base, s]: of every slot the queries of its own group."""
        part = part.reshape(-1, base, part.shape[1])
        x = part[0]
        for first in range(1, len(part)):
            x = jnp.where(of_slot >= first * (base // period), part[first], x)
        if period < SUBLANES:
            x = jnp.where(jax.lax.rem(of_slot, base // period) == _index(x.shape, 0, period), x, 0.0)
        return x

    def logits(queries, pos, words, affine):
        if not folds(pos, words):
            return product(queries, _restored(words, affine, H, bits).astype(dtype), (1, 1))
        (scaled, offsets), rows = queries, per * period
        code, parts = unpacked(words, bits, dtype), len(scaled)
        size = chunk // parts  # rows of codes of a chunk
        row = _index((base, size), 1, 1)
        run, at = (jax.lax.div(row, per_word), jax.lax.rem(row, per_word)) if parts > 1 else (row, 0)
        found = [[] for _ in scaled]
        for i in range(pos.shape[1] // chunk):
            mine = slice(i * rows, (i + 1) * rows)
            stacked = jnp.concatenate([x[mine] for x in scaled], axis=0).astype(dtype)
            part = product(stacked, code[i * size : (i + 1) * size], (1, 1))
            for j, x in enumerate(found):
                slot = (run * parts + j) * per_word + at if parts > 1 else row
                x.append(of_groups(part[j * rows : (j + 1) * rows] + offsets[mine], jax.lax.div(slot, group)))
        found = [jnp.concatenate(x, axis=1) for x in found]
        return sum_of_copies(in_order(*found, per_word, dtype) if parts > 1 else found[0], period)

    return Keys((_words(k), Stored(k.affine, 2, group, mixed=True)), logits, queries)


def _chunk(q: jax.Array, kv_heads: int, group: int) -> tuple[int, int, int]:
    """(slots of a chunk, groups of it, rows of the queries of a group); (0, 0, 0) where scales multiply the keys."""
    chunk = max(_CHUNK, group)
    per = chunk // group
    period = max(repeated_rows(q, kv_heads), SUBLANES // per)
    folds = chunk % group == 0 and chunk % LANES == 0 and per * period <= _MOST_FOLDED
    return (chunk, per, period) if folds else (0, 0, 0)


def keys_per_token(k: Packed, q: jax.Array, kv_heads: int) -> Keys:
    """Scales and zeros [B, K, 2 * n, S]: `sum_i scale[i, s] <q_i, code_i[s]> + zero[i, s] sum(q_i)`, i of n groups."""
    bits = k.bits
    period, dtype, half = repeated_rows(q, kv_heads), q.dtype, 2.0 ** (bits - 1)

    def logits(q, pos, words, affine):
        n, (R, H) = affine.shape[0] // 2, q.shape
        scale, zero = _of_rows(affine, R, period)
        own = _own_channels((len(scale), R, H), n, period)
        parts = jnp.where(own, q.astype(jnp.float32)[None], 0.0)
        sums = jnp.sum(parts, axis=2, keepdims=True)  # [n', R, 1]
        parts = parts.reshape(-1, H)
        if _halved(words, H, pos.shape[1]):
            stacked = jnp.concatenate([of_half(parts, 0), of_half(parts, 1)], axis=0).astype(dtype)
            found = product(stacked, unpacked(words, bits, dtype), (1, 1))
            found = in_order(found[: len(parts)], found[len(parts) :], WORD_BITS // bits, dtype)
        else:
            found = product(parts.astype(dtype), unpacked(_in_slots(words, H), bits, dtype), (1, 1))
        found = found.reshape(*scale.shape) + half * sums
        return sum_of_copies(jnp.sum(found * scale + sums * zero, axis=0), period)

    return Keys((_words(k), Stored(k.affine, 3)), logits)


def values_per_token(v: Packed, q: jax.Array, kv_heads: int) -> Values:
    """Scales and zeros [B, K, 2 * n, S]: `sum_s p[s] scale[i, s] code_i[s] + sum_s p[s] zero[i, s]`, i of n groups."""
    n, H, bits = v.affine.shape[2] // 2, v.shape[3], v.bits
    period, dtype, half = repeated_rows(q, kv_heads), q.dtype, 2.0 ** (bits - 1)
    width = v.words.shape[3] if 2 * H == LANES else H  # of sums: what halves of rows add is kept apart
    groups = -(-n * period // max(period, SUBLANES))  # of registers of rows, a group of channels for each copy

    def weigh(p, words, affine):
        scale, zero = _of_rows(affine, p.shape[0], period)
        scaled = p[None] * scale  # [n', R, s]
        zeros = jnp.sum(p[None] * zero + half * scaled, axis=2, keepdims=True)
        scaled = scaled.reshape(-1, p.shape[1])
        if _halved(words, H, p.shape[1]):
            stacked = jnp.concatenate(halves(scaled, WORD_BITS // bits, dtype), axis=0).astype(dtype)
            first, second = jnp.split(product(stacked, unpacked(words, bits, dtype)), 2, axis=0)
            codes = jnp.where(_index(first.shape, 1, 1) < H, first, second)
        else:
            codes = product(scaled.astype(dtype), unpacked(_in_slots(words, H), bits, dtype))
            codes = of_half(codes, 0) if width > H else codes
        return codes.reshape(groups, -1, codes.shape[1]), zeros

    def output(codes, zeros):
        codes = sum(codes[..., i : i + H] for i in range(0, codes.shape[2], H))
        own = _own_channels(codes.shape, n, period)
        return sum_of_copies(jnp.sum(jnp.where(own, codes + zeros, 0.0), axis=0), period)

    return Values((_words(v), Stored(v.affine, 3)), ((groups, width), (groups, 1)), weigh, output, H)


def _of_rows(affine: jax.Array, rows: int, period: int) -> tuple[jax.Array, jax.Array]:
    """Scales and zeros f32[n', R, s] of [2 * n, s]: copy c of the queries gets group c, and n' * copies are >= n."""
    n, copies = affine.shape[0] // 2, max(SUBLANES // period, 1)
    affine = affine.astype(jnp.float32)
    shape = (rows, affine.shape[1])
    copy = _index(shape, 0, period)

    def of(first):
        found = []
        for i in range(0, n, copies):
            x = jnp.broadcast_to(affine[first + i : first + i + 1], shape)
            for c in range(1, min(copies, n - i)):
                x = jnp.where(copy == c, affine[first + i + c : first + i + c + 1], x)
            found.append(x)
        return jnp.stack(found)

    return of(0), of(n)


def _own_channels(shape, groups: int, period: int) -> jax.Array:
    """bool[n', R, H]: whether a channel is of the group of a row's copy of the queries."""
    copies = max(SUBLANES // period, 1)
    of_row = jax.lax.broadcasted_iota(jnp.int32, shape, 0) * copies
    if copies > 1:
        of_row += _index(shape, 1, period)
    return _index(shape, 2, shape[2] // groups) == of_row


def _one_hot(rows: int, step: int, dtype) -> jax.Array:
    """[rows, rows / step], of which row r has a one at r / step."""
    shape = rows, rows // step
    return (_index(shape, 0, step) == _index(shape, 1, 1)).astype(jnp.float32).astype(dtype)


def _index(shape, axis: int, step: int) -> jax.Array:
    index = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    # `//` asks for the sign, whose lowering asks the device which generation it is: none when compiling ahead.
    return jax.lax.div(index, jnp.int32(step)) if step > 1 else index


def _words(x: Packed) -> Stored:
    return Stored(x.words, 2, WORD_BITS // x.bits * x.in_row)


def cost(x: Packed, q: jax.Array, kv_heads: int) -> Cost:
    """See `Loader`."""
    in_lanes = lambda width: -(-width // LANES) * LANES
    in_row, group = WORD_BITS // x.bits * x.in_row, x.group  # slots of a row of words
    H, scales, width = x.shape[3], x.affine.shape[2], x.affine.dtype.itemsize
    stored, step = 4 * in_lanes(x.words.shape[3]) / in_row, SUBLANES * in_row
    restored = x.axis == "channel" and not _chunk(q, kv_heads, group)[0]
    expanded = in_lanes(H) * (8 if restored else q.dtype.itemsize)  # codes, and what they are
    if x.axis == "token":
        stored += scales * width
        expanded += scales * logits_bytes(q, kv_heads) / 4  # a row for every query and scale
    else:
        stored += in_lanes(x.affine.shape[3]) / group * width
        step = math.lcm(step, SUBLANES * group)
    key = (("", f"int{x.bits}"), ("width", H), ("axis", x.axis), ("group", group), ("scale", x.affine.dtype))
    heads = x.words.shape[1] / kv_heads
    return Cost(stored * heads, expanded, step, key)


def _unsupported(x: Packed, q: jax.Array, kv_heads: int, role: str) -> str | None:
    if x.bits == 3:
        return "takes 2, 4 and 8 bits, got 3"
    if role == "values" and x.axis != "token":
        return "takes values that are packed per token"
    if x.axis == "channel":
        return f"takes groups of a multiple of {SUBLANES} tokens, got {x.group}" if x.group % SUBLANES else None
    groups = x.affine.shape[2] // 2
    if groups > _MOST_GROUPS:
        return f"takes up to {_MOST_GROUPS} groups of channels, got {groups}"
    rows = q.shape[1] * q.shape[2] // kv_heads * groups
    if rows > _MOST_SUMS:
        return f"takes up to {_MOST_SUMS} queries of a KV head times groups of channels, got T * G * {groups} = {rows}"
    return None


def _keys(x: Packed, q: jax.Array, kv_heads: int) -> Keys:
    return (keys_per_channel if x.axis == "channel" else keys_per_token)(x, q, kv_heads)


def _numbers(x: Packed, q: jax.Array) -> Numbers:
    """Numbers with slots along sublanes or, with scales per token, along lanes, where the scales lie."""
    (H, bits), half, dtype = (x.shape[3], x.bits), 2.0 ** (x.bits - 1), q.dtype
    if x.axis == "channel":
        return Numbers(
            (_words(x), Stored(x.affine, 2, x.group)),
            lambda words, affine: _restored(words, affine, H, bits).astype(dtype),
            0,
        )

    def decoded(words, affine):
        n, affine = affine.shape[0] // 2, affine.astype(jnp.float32)
        code = transposed(unpacked(_in_slots(words, H), bits, jnp.bfloat16))  # exact
        scale, zero = affine[:n], affine[n:]
        width = H // n
        parts = [
            code[i * width : (i + 1) * width] * scale[i : i + 1] + (zero + half * scale)[i : i + 1] for i in range(n)
        ]
        return jnp.concatenate(parts, axis=0).astype(dtype)

    return Numbers((_words(x), Stored(x.affine, 3)), decoded, 1)


def _restored(words: jax.Array, affine: jax.Array, H: int, bits: int) -> jax.Array:
    """f32[s, H] of words and of the scales and zeros of n groups of slots."""
    n, affine = affine.shape[0], affine.astype(jnp.float32)
    scale, half = affine[:, :H], 2.0 ** (bits - 1)
    code = unpacked(_in_slots(words, H), bits, jnp.float32)
    x = code.reshape(n, -1, H) * scale[:, None] + (affine[:, H:] + half * scale)[:, None]
    return x.reshape(-1, H)


loader = Loader(_keys, _numbers, values_per_token, cost, _unsupported)
