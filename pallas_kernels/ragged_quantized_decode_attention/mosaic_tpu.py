"""`ragged_quantized_decode_attention` on TPU: words unpacked in VMEM, over the one list of slots of all heads."""

from __future__ import annotations

from pallas_kernels.dispatch import Kernel
from pallas_kernels.partial import Partial
from pallas_kernels.quantized_decode_attention import mosaic_tpu as quantized
from pallas_kernels.ragged_decode_attention.mosaic_tpu import Pages, head_limit
from pallas_kernels.tpu_decode import attend

_UNIT = 4  # slots that one entry of the owners stands for, at most: a tile of twice as many is too large unpacked


def _sizes(q, k, v, pages, bits, key_axis):
    name = "ragged_quantized_decode_attention.mosaic_tpu"
    how = dict(name=name, unit=pages.unit, step=pages.step, expanded=pages.expanded_bytes)
    return pages.whole(quantized.sizes(q, k, v, pages.slots, bits, key_axis, **how))


def _unsupported(
    q, k, v, owner, q_pos, k_pos, bias=None, run=None, *, kv_heads, bits, key_axis, window, scale
) -> str | None:
    pages = Pages(owner, k_pos.shape[1], kv_heads, _UNIT)
    if limit := head_limit(q, kv_heads, pages.slots):
        return limit
    if reason := quantized.unsupported_groups(q, k, v, pages.slots, key_axis):
        return reason
    if _sizes(q, k, v, pages, bits, key_axis) is None:
        return f"finds no tile of [S, H] = {[pages.slots, q.shape[3]]} that fits"
    return None


def _ragged_quantized_decode_attention(
    q, k, v, owner, q_pos, k_pos, bias=None, run=None, *, kv_heads, bits, key_axis, window, scale
) -> Partial:
    pages = Pages(owner, k_pos.shape[1], kv_heads, _UNIT)
    keys = quantized.keys_per_channel if key_axis == "channel" else quantized.keys_per_token
    return attend(
        q,
        pages.owned(keys(k, bits, pages.slots, q, 1), q),
        quantized.values_per_token(v, bits, pages.slots, q, 1),
        q_pos,
        k_pos[:, None],
        None if bias is None else bias[:, None],
        pages.within(run),
        sizes=_sizes(q, k, v, pages, bits, key_axis),
        window=window,
        scale=scale,
    )


kernel = Kernel(_ragged_quantized_decode_attention, _unsupported)
