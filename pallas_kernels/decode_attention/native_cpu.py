"""`decode_attention` on CPU in C++: what is stored is read once, codes as codes, by all threads.

Built with the package where there is a C++ compiler; see `setup.py`. The sources are in `native/`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_attention.pages import Pages
from pallas_kernels.decode_attention.rotation import Rotation
from pallas_kernels.dispatch import Kernel, result_like
from pallas_kernels.encoded import Encoded
from pallas_kernels.partial import Partial
from pallas_kernels.quantize_pack import Packed

_TARGET = "kvjax_decode_attention"
_MOST_ROWS = 32  # queries of a KV head: of more, matrix products are the better way
_log = logging.getLogger(__name__)


@functools.cache
def is_built() -> bool:
    """Whether the extension is there; makes it known to XLA, once."""
    here = pathlib.Path(__file__).parent
    built = [here / f"_native_cpu{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    path = next((path for path in built if path.exists()), None)
    if path is None:
        level = logging.WARNING if jax.default_backend() == "cpu" else logging.INFO
        _log.log(level, "decode_attention: the extension for CPU is not built (no C++ compiler?); XLA computes it.")
        return False
    handler = ctypes.cdll.LoadLibrary(str(path)).KvjaxDecodeAttention
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(handler), platform="cpu")
    return True


def attend(
    q: jax.Array,
    k: jax.Array | Packed,
    v: jax.Array | Packed | None,
    q_pos: jax.Array,
    k_pos: jax.Array,
    bias: jax.Array | None = None,
    k_gain: jax.Array | None = None,
    v_gain: jax.Array | None = None,
    rotation: Rotation | None = None,
    pages: Pages | None = None,
    *,
    window: int | None = None,
    scale: float | None = None,
    version: str = "",
) -> Partial:
    """See `pallas_kernels.decode_attention.api.decode_attention`.

    Args:
      version: "avx512", "avx2" or "portable"; "": the first of these that the machine has.
    """
    v = k if v is None else v
    (B, T, N, H), heads = q.shape, [x.shape[1] for x in (k, v, k_pos, bias, k_gain, v_gain) if x is not None]
    nothing = jnp.zeros((1, 1, 0), jnp.float32)
    number = lambda x: nothing if x is None else x.astype(jnp.float32)
    (k_arrays, k_how), (v_arrays, v_how) = (_stored(x, name, nothing) for x, name in ((k, "k"), (v, "v")))
    shapes = (B, T, N, v.shape[3]), (B, T, N)
    arrays = q, q_pos, k_pos, *k_arrays, *v_arrays, number(bias), number(k_gain), number(v_gain)
    results = [result_like(shape, jnp.float32, *arrays) for shape in shapes]
    scale = H**-0.5 if scale is None else scale
    how = dict(kv_heads=np.int64(max(heads)), window=np.int64(window or 0), scale=np.float32(scale), version=version)
    return Partial(*jax.ffi.ffi_call(_TARGET, results, vmap_method="sequential")(*arrays, **k_how, **v_how, **how))


def _stored(x: jax.Array | Packed, name: str, nothing: jax.Array) -> tuple[tuple[jax.Array, jax.Array], dict]:
    """Arrays, and what tells how to read them."""
    if isinstance(x, Packed):
        arrays, how = (x.words, x.affine), (np.int64(x.bits), np.int64(x.group), x.axis == "token")
    else:
        arrays, how = (x, nothing), (np.int64(0), np.int64(1), False)
    return arrays, {f"{name}_{what}": value for what, value in zip(("bits", "group", "per_token"), how)}


def _unsupported(
    q: jax.Array,
    k: jax.Array | Encoded,
    v: jax.Array | Encoded | None,
    q_pos: jax.Array,
    k_pos: jax.Array,
    bias: jax.Array | None = None,
    k_gain: jax.Array | None = None,
    v_gain: jax.Array | None = None,
    rotation: Rotation | None = None,
    pages: Pages | None = None,
    **static,
) -> str | None:
    if not is_built():
        return "is not built"
    if rotation is not None or pages is not None:
        return "takes neither keys from before their rotation nor pages"
    if q.dtype != jnp.float32:
        return f"takes queries in float32, got {q.dtype}"
    for x in (k,) if v is None else (k, v):
        if not isinstance(x, Packed) and (hasattr(x, "decode") or x.dtype not in (jnp.float32, jnp.bfloat16)):
            return f"takes float32, bfloat16 and packed codes, got {getattr(x, 'dtype', type(x).__name__)}"
        if isinstance(x, Packed) and x.bits not in (2, 4, 8):
            return f"takes codes of 2, 4 and 8 bits, got {x.bits}"
        if isinstance(x, Packed) and x.affine.dtype not in (jnp.float32, jnp.bfloat16):
            return f"takes scales in float32 or bfloat16, got {x.affine.dtype}"
    if k_pos.shape[2] == 0:
        return "takes at least one slot"
    heads = max(x.shape[1] for x in (k, v, k_pos, bias, k_gain, v_gain) if x is not None)
    rows = q.shape[1] * q.shape[2] // heads
    return None if rows <= _MOST_ROWS else f"takes up to {_MOST_ROWS} queries a KV head, got T * G = {rows}"


kernel = Kernel(attend, _unsupported)
