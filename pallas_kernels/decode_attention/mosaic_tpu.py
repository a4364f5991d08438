"""`decode_attention` on TPU: one skeleton, with a loader for the type of the keys and one for that of the values."""

from __future__ import annotations

import math

import jax

from pallas_kernels import block_sizes
from pallas_kernels.decode_attention.tiles import dense, levels, packed, rotated
from pallas_kernels.decode_attention.tiles.owned import OwnedSlots, head_limit
from pallas_kernels.dispatch import Kernel
from pallas_kernels.encoded import Encoded, is_encoded
from pallas_kernels.levels import Levels
from pallas_kernels.partial import Partial
from pallas_kernels.quantize_pack import Packed
from pallas_kernels.tpu_decode import Loader, attend, logits_bytes, padded_rows, row_limit, with_gain
from pallas_kernels.tpu_decode_blocks import Blocks, blocks

_LOADERS = {Packed: packed.loader, Levels: levels.loader}


def _loader(x: jax.Array | Encoded) -> Loader | None:
    return _LOADERS.get(type(x)) if is_encoded(x) else dense.loader


def _kv_heads(k, v, k_pos, numbers, rotation) -> int:
    """Returns the heads of the grid, where there are no pages."""
    of_slots = [k, v, k_pos, *numbers] + ([] if rotation is None else [rotation.at, rotation.basis])
    of_mean = 1 if rotation is None or rotation.mean is None else rotation.mean.shape[-2]
    return max(of_mean, *(x.shape[1] for x in of_slots if x is not None))


def _owned(k, v, k_pos, pages) -> OwnedSlots | None:
    return None if pages is None else OwnedSlots(pages, k_pos.shape[2], is_encoded(k) or is_encoded(v))


def _sizes(q, k, v, k_pos, numbers=(), rotation=None, pages=None) -> Blocks | None:
    K, S = 1 if pages is not None else _kv_heads(k, v, k_pos, numbers, rotation), k_pos.shape[2]
    owned = _owned(k, v, k_pos, pages)
    costs = {"k": _loader(k).cost(k, q, K), "v": _loader(v).cost(v, q, K)}
    if rotation is not None:
        costs["k"] = rotated.cost(costs["k"], k, q, rotation)
    named = {f"{role}_{name}".rstrip("_"): value for role, x in costs.items() for name, value in x.key}
    unit = {} if owned is None else {"unit": owned.unit}
    key = block_sizes.key(heads=K, rows=padded_rows(q, K), H=q.shape[3], q=q.dtype, **named, **unit)
    found = blocks(
        "decode_attention.mosaic_tpu",
        key,
        K,
        S,
        sum(x.stored for x in costs.values()) + 4 * (1 + sum(x is not None for x in numbers)),
        sum(x.expanded for x in costs.values()) + logits_bytes(q, K) + (owned.expanded_bytes if owned else 0),
        rows=padded_rows(q, K),
        step=math.lcm(owned.step if owned else 1, *(x.step for x in costs.values())),
        most=8 * owned.step if owned else None,
    )
    return owned.whole(found) if owned else found


def _unsupported(q, k, v, q_pos, k_pos, bias, k_gain, v_gain, rotation, pages, *, window, scale) -> str | None:
    v, numbers = k if v is None else v, (bias, k_gain, v_gain)
    for role, x in (("keys", k), ("values", v)):
        if _loader(x) is None:
            return f"reads no {role} of {type(x).__name__}"
    K = 1 if pages is not None else _kv_heads(k, v, k_pos, numbers, rotation)
    limit = row_limit(q, K, k_pos.shape[2]) if pages is None else head_limit(q, pages.kv_heads, k_pos.shape[2])
    if limit:
        return limit
    if rotation is not None and (reason := rotated.unsupported(k, q, pages is not None, rotation)):
        return reason
    for role, x in (("keys", k), ("values", v)):
        if reason := _loader(x).unsupported(x, q, K, role):
            return reason
    if _sizes(q, k, v, k_pos, numbers, rotation, pages) is None:
        groups = [f" in groups of {x.group}" for x in (k,) if isinstance(x, Packed)]
        return f"finds no tile of [K, S, H] = {[K, k_pos.shape[2], k.shape[3]]}{''.join(groups)} that fits"
    return None


def _decode_attention(
    q, k, v, q_pos, k_pos, bias, k_gain, v_gain, rotation, pages, *, window, scale
) -> Partial:
    v, per_slot = k if v is None else v, (bias, k_gain, v_gain)
    K = 1 if pages is not None else _kv_heads(k, v, k_pos, per_slot, rotation)
    owned = _owned(k, v, k_pos, pages)
    if rotation is None:
        keys = with_gain(_loader(k).keys(k, q, K), k_gain)
    elif rotation.mean is None:
        keys = with_gain(rotated.rotated_keys(_loader(k).numbers(k, q), q, rotation), k_gain)
    else:
        keys = rotated.rotated_keys(_loader(k).numbers(k, q), q, rotation, k_gain)
    return attend(
        q,
        owned.owned(keys, q) if owned else keys,
        _loader(v).values(v, q, K),
        q_pos,
        k_pos,
        bias,
        v_gain,
        owned.within if owned else None,
        sizes=_sizes(q, k, v, k_pos, per_slot, rotation, pages),
        window=window,
        scale=scale,
    )


kernel = Kernel(_decode_attention, _unsupported)
