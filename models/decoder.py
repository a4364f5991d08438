"""A decoder of the Llama family, in one sitting: plain functions over a pytree of weights.

Axes: B batch, T new tokens, D width, F feed-forward width, N query heads, K key/value heads, H head
dimension, V vocabulary. Layers are a Python tuple, unrolled: a scan over stacked layers would copy weights and
caches at every step.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kvjax.cache import Cache, LayerCache, empty_cache
from kvjax.drivers import StepOutput
from kvjax.observation import LayerObservation, Needs, last_queries
from kvjax.rope import Rope, rotate
from kvjax.segments import Queries
from models.config import DecoderConfig
from pallas_kernels.prefill_attention import prefill_attention


def forward(
    params: dict, config: DecoderConfig, tokens: jax.Array, positions: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Runs T new tokens of every row through the decoder.

    Args:
      params: as `models.weights.abstract_params` describes.
      config: the shape of the decoder.
      tokens: i32[B, T].
      positions: i32[B, T], increasing; -1 is padding, which comes last in a row.
      cache: attended to, then appended to. With 0 slots it becomes exactly the T tokens; otherwise it must
        have room for them.

    Returns:
      f32[B, T, V] logits (undefined at padding), and the cache with the tokens in it.
    """
    out = step(params, config, tokens, positions, cache, needs=Needs(), last_only=False)
    return out.logits, out.cache


def step(
    params: dict,
    config: DecoderConfig,
    tokens: jax.Array,
    positions: jax.Array,
    cache: Cache,
    *,
    needs: Needs,
    last_only: bool,
) -> StepOutput:
    """`forward` that also reports what transforms need; bind params and config for `kvjax.drivers.Step`."""
    rope = Rope.from_base(config.rope_base, config.head_dim)
    x = jnp.take(params["embed"], tokens, axis=0)  # [B, T, D]
    layers, seen = [], []
    for index, (weights, layer) in enumerate(zip(params["layers"], cache.layers, strict=True)):
        attended, layer, observed = _attention(
            weights, config, rms_norm(x, weights["attn_norm"], config.norm_eps), positions, rope, layer,
            cache.shared, needs, index,
        )  # fmt: skip
        x = x + attended
        x = x + _feed_forward(weights, rms_norm(x, weights["mlp_norm"], config.norm_eps))
        layers.append(layer)
        seen.append(observed)
    new = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
    cache = cache.replace(layers=tuple(layers), length=cache.length + new)
    if last_only:
        x = jnp.take_along_axis(x, jnp.maximum(new - 1, 0)[:, None, None], axis=1)
    x = rms_norm(x, params["final_norm"], config.norm_eps)
    head = params["embed"] if config.tied_embeddings else params["head"]
    logits = jnp.einsum("btd,vd->btv", x, head, preferred_element_type=jnp.float32)
    return StepOutput(logits, cache, tuple(seen))


def bind(params: dict, config: DecoderConfig):
    """The decoder as a `kvjax.drivers.Step`."""
    return functools.partial(step, params, config)


def prompt_cache(config: DecoderConfig, batch: int, dtype=jnp.float32) -> Cache:
    """A cache without slots, ready for a prefill."""
    return empty_cache(
        batch=batch,
        layers=config.num_layers,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        slots=0,
        dtype=dtype,
    )


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis, in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * weight


def _attention(
    weights: dict,
    config: DecoderConfig,
    x: jax.Array,
    positions: jax.Array,
    rope: Rope,
    layer: LayerCache,
    shared,
    needs: Needs,
    index: int,
) -> tuple[jax.Array, LayerCache, LayerObservation]:
    """Attends to the cache and to the new tokens, then appends these to the cache."""
    B, T, _ = x.shape
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    q, k, v = jnp.split((x @ weights["wqkv"]).reshape(B, T, N + 2 * K, H), (N, N + K), axis=2)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, K, T, H]
    queries = Queries(q, positions, rope, ahead=jnp.arange(T)[None])
    own = prefill_attention(queries.rotated, rotate(k, positions[:, None], rope), v, positions)
    attended = layer.attend(queries, shared=shared, new=own)
    # Written only after it was read: otherwise XLA copies the whole cache to keep the old values readable.
    blocked = jnp.any(attended.lse == jnp.inf)
    k, v, positions = (jnp.where(blocked, 0, x) for x in (k, v, positions))
    layer = layer.append(k, v, positions, rope)
    observed = LayerObservation(*last_queries(queries, attended.lse, needs.queries), layer=index)
    out = attended.out.astype(x.dtype).reshape(B, T, N * H)
    return out @ weights["wo"], layer, observed


def _feed_forward(weights: dict, x: jax.Array) -> jax.Array:
    """`W_down (silu(W_gate x) * W_up x)`."""
    gate, up = jnp.split(x @ weights["w_gate_up"], 2, axis=-1)
    return (jax.nn.silu(gate) * up) @ weights["w_down"]
