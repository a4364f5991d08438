"""`decode_attention` for Hopper GPUs. It was lowered for CUDA and has never run on a GPU: ask for it by name."""

from __future__ import annotations

from pallas_kernels.decode_attention import mosaic_gpu_dense, mosaic_gpu_packed, mosaic_gpu_pages
from pallas_kernels.dispatch import Kernel
from pallas_kernels.encoded import is_encoded
from pallas_kernels.partial import Partial
from pallas_kernels.quantize_pack import Packed


def _chosen(k, v, pages) -> tuple[Kernel | None, tuple]:
    """The kernel of a representation, with what it takes beside the others."""
    if isinstance(k, Packed) and isinstance(v, Packed) and pages is None:
        return mosaic_gpu_packed.kernel, ()
    if is_encoded(k) or is_encoded(v):
        return None, ()
    return (mosaic_gpu_dense.kernel, ()) if pages is None else (mosaic_gpu_pages.kernel, (pages,))


def _unsupported(q, k, v, q_pos, k_pos, bias, k_gain, v_gain, rotation, pages, *, window, scale) -> str | None:
    """Why no kernel can run these arguments, or None if one can."""
    if v is None:
        return "takes values of their own"
    given = {"gains": k_gain if v_gain is None else v_gain, "rotation": rotation}
    for name, x in given.items():
        if x is not None:
            return f"takes no {name}"
    kernel, more = _chosen(k, v, pages)
    if kernel is None:
        of_pages = "" if pages is None else " in pages"
        return f"reads no keys of {type(k).__name__} beside values of {type(v).__name__}{of_pages}"
    heads = [x.shape[1] for x in (k, v, k_pos, *([] if bias is None else [bias]))]
    if len(set(heads)) > 1:
        return f"takes keys, values and positions of as many heads each, got {heads}"
    return kernel.unsupported(q, k, v, q_pos, k_pos, bias, *more, window=window, scale=scale)


def _decode_attention(q, k, v, q_pos, k_pos, bias, k_gain, v_gain, rotation, pages, *, window, scale) -> Partial:
    kernel, more = _chosen(k, v, pages)
    return kernel.run(q, k, v, q_pos, k_pos, bias, *more, window=window, scale=scale)


kernel = Kernel(_decode_attention, _unsupported)
