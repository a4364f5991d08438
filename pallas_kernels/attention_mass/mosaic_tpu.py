"""`attention_mass` for TPU: a tile of keys stays in VMEM while all queries pass by."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import block_sizes
from pallas_kernels.dispatch import Kernel, result_like
from pallas_kernels.tpu_decode import product
from pallas_kernels.tpu_tiles import LANES, kv_heads_per_block, slots_minor
from pallas_kernels.visibility import visible

_QUERIES = 256  # of a tile
_SLOTS = 512  # of a tile at most; float32 logits of 256 queries are 512 KB
_KEY_BYTES = 2**21  # of a tile at most; Pallas holds two of them, and 16 MB of VMEM is what every generation has


def _unsupported(q, k, q_pos, k_pos, lse, bias=None, *, window=None, scale=None, reduce="sum") -> str | None:
    """Why the kernel cannot run these arguments, or None if it can."""
    del q_pos, k_pos, lse, bias, window, scale, reduce
    if 0 in q.shape or k.shape[2] < 2:  # for one slot Mosaic has no layout
        return f"takes at least one query and two slots, got q {q.shape} and k {k.shape}"
    if q.dtype not in (jnp.float32, jnp.bfloat16) or k.dtype not in (jnp.float32, jnp.bfloat16):
        return f"takes float32 and bfloat16, got q {q.dtype} and k {k.dtype}"
    if q.shape[-1] not in (64, 128, 256):
        return f"takes heads of 64, 128 or 256, got {q.shape[-1]}"
    heads = kv_heads_per_block(k.shape[1], q.shape[2] // k.shape[1], q.shape[-1])
    if heads * LANES * k.shape[-1] * k.dtype.itemsize > _KEY_BYTES:
        return f"holds {LANES} slots of {heads} of the {k.shape[1]} KV heads at a time, more than {_KEY_BYTES} bytes"
    return None


def _attention_mass(q, k, q_pos, k_pos, lse, bias=None, *, window=None, scale=None, reduce="sum"):
    """See `pallas_kernels.attention_mass.api.attention_mass`.

    The grid is (B, KV heads, tiles of slots, tiles of queries). The last axis runs in order and adds into one block of
    the result; a pair of tiles in which no query sees a slot costs its copy and nothing else. Queries are read as
    [B, T, N * H], the layout a projection wrote them in, a few KV heads at a time so that blocks are whole lanes.
    """
    B, T, N, H = q.shape
    K, S = k.shape[1], k.shape[2]
    G = N // K
    heads = kv_heads_per_block(K, G, H)
    queries, slots = _tile(q, k, heads)
    of_slots = pl.BlockSpec((1, K, slots), lambda b, h, s, t: (b, 0, s))
    specs = [
        pl.BlockSpec((1, queries, heads * G * H), lambda b, h, s, t: (b, t, h)),
        pl.BlockSpec((1, heads, slots, H), lambda b, h, s, t: (b, h, s, 0)),
        pl.BlockSpec((1, 1, queries), lambda b, h, s, t: (b, 0, t)),
        of_slots,
        pl.BlockSpec((1, heads * G, queries), lambda b, h, s, t: (b, h, t)),
    ]
    operands = [q.reshape(B, T, N * H), k, q_pos[:, None], k_pos, lse.astype(jnp.float32).swapaxes(1, 2)]
    slots_last = slots_minor(k)  # what XLA:TPU chooses, and what would be copied if it were read otherwise
    if slots_last:
        specs[1] = pl.BlockSpec((1, heads, H, slots), lambda b, h, s, t: (b, h, 0, s))
        operands[1] = k.swapaxes(2, 3)
    if bias is not None:
        specs.append(of_slots)
        operands.append(bias.astype(jnp.float32))
    body = functools.partial(
        _kernel,
        total=T,
        group=G,
        heads=heads,
        head_dim=H,
        slots_last=slots_last,
        window=window,
        scale=H**-0.5 if scale is None else scale,
        reduce=reduce,
    )
    return pl.pallas_call(
        body,
        grid=(B, K // heads, pl.cdiv(S, slots), pl.cdiv(T, queries)),
        in_specs=specs,
        out_specs=pl.BlockSpec((1, heads * G, slots), lambda b, h, s, t: (b, h, s)),
        out_shape=result_like((B, N, S), jnp.float32, *operands),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
        ),
        name="attention_mass",
    )(*operands)


def _tile(q: jax.Array, k: jax.Array, heads: int) -> tuple[int, int]:
    """Queries and slots of a tile."""
    _, T, N, H = q.shape
    K, S = k.shape[1:3]
    slots = _SLOTS
    while slots > LANES and heads * slots * H * k.dtype.itemsize > _KEY_BYTES:
        slots //= 2
    return block_sizes.choose(
        "attention_mass.mosaic_tpu",
        block_sizes.key(heads=K, group=N // K, H=H, q=q.dtype, k=k.dtype),
        default=dict(queries=_QUERIES, slots=slots),
        candidates=[
            dict(queries=queries, slots=slots)
            for queries in block_sizes.doublings(LANES, 2 * _QUERIES)
            for slots in block_sizes.doublings(LANES, 4 * _SLOTS)
        ],
        fit=lambda sizes: (min(sizes["queries"], T), min(sizes["slots"], S)),
    )


def _kernel(
    q_ref,  # [1, t, heads * G * H]
    k_ref,  # [1, heads, s, H], or [1, heads, H, s]
    q_pos_ref,  # i32[1, 1, t]
    k_pos_ref,  # i32[1, K, s]
    lse_ref,  # f32[1, heads * G, t]
    *refs,  # f32[1, K, s] the bias if there is one; f32[1, heads * G, s] the result
    total: int,
    group: int,
    heads: int,
    head_dim: int,
    slots_last: bool,
    window: int | None,
    scale: float,
    reduce: str,
):
    bias_ref, mass_ref = refs if len(refs) == 2 else (None, *refs)
    tile = pl.program_id(3)
    t = q_pos_ref.shape[-1]

    @pl.when(tile == 0)
    def _():
        mass_ref[...] = jnp.zeros_like(mass_ref)

    q_pos = q_pos_ref[0]  # [1, t]
    if total % t:  # what lies behind the last query is anything
        index = jax.lax.broadcasted_iota(jnp.int32, q_pos.shape, 1)
        q_pos = jnp.where(tile * t + index < total, q_pos, -1)
    newest = jnp.max(q_pos)
    oldest = jnp.min(jnp.where(q_pos < 0, newest, q_pos))
    stacked = min(max(_QUERIES // t, 1), group)  # query heads in one product: few queries fill no matrix unit

    for h in range(heads):
        kv_head = pl.program_id(1) * heads + h
        k_pos = k_pos_ref[0, pl.ds(kv_head, 1)]  # [1, s]
        some = (k_pos >= 0) & (k_pos <= newest)
        if window is not None:
            some &= k_pos > oldest - window

        @pl.when(jnp.max(jnp.where(some, 1, 0)) > 0)
        def _():
            mask = visible(q_pos[0], k_pos[0], window)  # [t, s]
            for first in range(0, group, stacked):
                members = range(h * group + first, h * group + min(first + stacked, group))
                lanes = [slice(n * head_dim, (n + 1) * head_dim) for n in members]
                qs = jnp.concatenate([q_ref[0, :, at] for at in lanes], axis=0)
                qs = (qs * jnp.asarray(scale, qs.dtype)).astype(k_ref.dtype)
                logits = product(qs, k_ref[0, h], (1, 0 if slots_last else 1))
                if bias_ref is not None:
                    logits += bias_ref[0, pl.ds(kv_head, 1)]
                for i, n in enumerate(members):
                    lse = lse_ref[0, pl.ds(n, 1)].reshape(t, 1)
                    lse = jnp.where(lse == -math.inf, 0.0, lse)
                    # Masked before exp: a hidden slot's logit may exceed the lse by enough to overflow.
                    log_p = jnp.where(mask, logits[i * t : (i + 1) * t] - lse, -math.inf)
                    _add(mass_ref.at[0, pl.ds(n, 1)], log_p, mask, reduce)


def _add(mass_ref, log_p: jax.Array, mask: jax.Array, reduce: str) -> None:
    """Adds f32[t, s] log-probabilities to f32[1, s]."""
    p = jnp.exp(log_p)
    if reduce == "max":
        mass_ref[...] = jnp.maximum(mass_ref[...], jnp.max(p, axis=0, keepdims=True))
        return
    if reduce == "squares":
        p = p * p
    elif reduce == "entropy":
        p = jnp.where(mask, -p * log_p, 0.0)
    mass_ref[...] += jnp.sum(p, axis=0, keepdims=True)


kernel = Kernel(_attention_mass, _unsupported)
