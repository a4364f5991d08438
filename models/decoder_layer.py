"""One layer of a decoder, for every family: attention and feed-forward over the weights that the layer has.

Axes: B batch, T new tokens, D width, E experts, N query heads, K key/value heads, H head dimension, R latent rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvjax import sharding
from kvjax.cache import LayerCache
from kvjax.observation import LayerObservation, Needs, observe, take_last
from kvjax.rope import Rope, rotate
from kvjax.segments import Queries
from kvjax.segments.indices import Chosen
from models.config import DecoderConfig
from models.int8 import Weight, grouped_matmul, matmul
from models.params import LayerParams, split_qkv
from pallas_kernels.logits import Scale, SoftCap

STREAM = ("batch", "tokens", None)
"""The named axes of the residual stream [B, T, D], see `kvjax.sharding`."""


class Kind(NamedTuple):
    """What may differ from layer to layer: layers of one kind share a compiled program."""

    window: int | None
    frequencies: tuple[float, ...]  # H / 2 of them
    scale: Scale | None

    @property
    def rope(self) -> Rope:
        return Rope(jnp.float32(self.frequencies))


@functools.cache
def kind_of(config: DecoderConfig, index: int) -> Kind:
    """Returns the kind of a layer."""
    scale = config.query_scale
    if config.attention_cap is not None:
        scale = SoftCap(config.head_dim**-0.5 if scale is None else scale, config.attention_cap)
    return Kind(config.window_of(index), tuple(config.frequencies(index).tolist()), scale)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Computes `x / sqrt(mean(x^2) + eps) * weight` over the last axis, in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * weight


def norm(x: jax.Array, weight: jax.Array, bias: jax.Array | None, config: DecoderConfig) -> jax.Array:
    """Normalises the last axis as the config says: `rms_norm`, or with mean and bias."""
    if config.norm == "rms":
        return rms_norm(x, weight, config.norm_eps)
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + config.norm_eps)
    return (x32 * weight + bias).astype(x.dtype)


def linear(x: jax.Array, weight: Weight, bias: jax.Array | None = None) -> jax.Array:
    """Computes `x @ weight + bias`, [..., in] -> [..., out]."""
    y = matmul(x, weight)
    return y if bias is None else y + bias


def run_layer(
    weights: LayerParams,
    x: jax.Array,
    positions: jax.Array,
    cache: LayerCache,
    shared,
    index: jax.Array,
    chosen: Chosen | None,
    *,
    config: DecoderConfig,
    kind: Kind,
    needs: Needs,
    last: int | None,
) -> tuple[jax.Array, LayerCache, LayerObservation, Chosen | None]:
    """Adds attention and feed-forward, each normalised before, to the residual stream; see `models.decoder.layer`."""
    normed = norm(x, weights.attn_norm, weights.attn_norm_bias, config)
    attended, cache, queries, lse, chosen = _attention(
        weights, normed, positions, cache, shared, index, chosen, config, kind, needs, last
    )
    observed = observe(queries, lse, needs, index, inputs=x, window=kind.window, scale=kind.scale)
    x = x if last is None else take_last(x, positions, last)
    if config.post_norms:
        attended = norm(attended, weights.attn_post_norm, weights.attn_post_norm_bias, config)
    read = x if config.parallel else x + attended
    mixed = _feed_forward(weights, norm(read, weights.mlp_norm, weights.mlp_norm_bias, config), config)
    if config.post_norms:
        mixed = norm(mixed, weights.mlp_post_norm, weights.mlp_post_norm_bias, config)
    return sharding.constrain(x + attended + mixed, *STREAM), cache, observed, chosen


def _attention(
    weights: LayerParams,
    x: jax.Array,
    positions: jax.Array,
    cache: LayerCache,
    shared,
    index: jax.Array,
    chosen: Chosen | None,
    config: DecoderConfig,
    kind: Kind,
    needs: Needs,
    last: int | None,
) -> tuple[jax.Array, LayerCache, Queries, jax.Array, Chosen | None]:
    """Attends to the cache and to the new tokens, then appends these to the cache.

    With `last`, for the last tokens of every row alone, after all tokens were appended.
    """
    rope, how = kind.rope, dict(window=kind.window, scale=kind.scale)
    q, k, v = _latent_qkv(weights, x, config) if config.latent_rank else _qkv(weights, x, config)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, K, T, H]
    T = x.shape[1]
    queries = Queries(q, positions, rope, ahead=jnp.arange(T)[None])
    if last is None:
        rotated = queries.rotated, rotate(k, positions[:, None], rope)
        own = sharding.attend_new(*rotated, v, positions, prompt=needs.prompt_attention, layer=index, **how)
        chosen = cache.choose(queries, window=kind.window, given=chosen)
        attended = cache.attend(queries, shared=shared, new=own, chosen=chosen, **how)
        cache = cache.append(k, v, positions, rope, after=attended)
    else:
        queries = Queries(take_last(q, positions, last), take_last(positions, positions, last, fill=-1), rope)
        cache = cache.append(k, v, positions, rope)
        attended = cache.attend(queries, **how)
    out = attended.out.astype(x.dtype)  # [B, T, N, H]
    if config.latent_rank:
        _, latent = _unmixed(out, config)
        out = _per_head(latent, weights.w_uv)
    out = linear(out.reshape(*out.shape[:2], -1), weights.wo, weights.wo_bias)
    return out, cache, queries, attended.lse, chosen


def _qkv(weights: LayerParams, x: jax.Array, config: DecoderConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Projects to queries [B, T, N, H], keys and values [B, T, K, H]."""
    q, k, v = split_qkv(config, linear(x, weights.wqkv, weights.wqkv_bias))
    if config.qk_norm:
        q, k = rms_norm(q, weights.q_norm, config.norm_eps), rms_norm(k, weights.k_norm, config.norm_eps)
    return q, k, v


def _latent_qkv(weights: LayerParams, x: jax.Array, config: DecoderConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Writes latent attention as attention to one KV head: `<q_n, W_UK_n c> = <W_UK_n^T q_n, c>`.

    All heads read the same latent vector c [R], as key and as value: queries go through W_UK, outputs through W_UV, and
    only c and one rotated key are cached. Source: DeepSeek-V2 (2024), section 2.1.
    """
    q = linear(x, weights.wq).reshape(*x.shape[:2], config.num_heads, -1)
    still, rotated = jnp.split(q, (config.still_channels,), axis=-1)
    c, k = jnp.split(linear(x, weights.w_latent)[:, :, None], (config.latent_rank,), axis=-1)
    k = _mixed(k, rms_norm(c, weights.latent_norm, config.norm_eps))
    return _mixed(rotated, _per_head(still, weights.w_uk)), k, k


def _mixed(rotated: jax.Array, latent: jax.Array) -> jax.Array:
    """Lays [..., P] and [..., R] out as [..., H] channels of which the first P / 2 of each half rotate."""
    (a, b), (c, d) = jnp.split(rotated, 2, axis=-1), jnp.split(latent, 2, axis=-1)
    return jnp.concatenate([a, c, b, d], axis=-1)


def _unmixed(x: jax.Array, config: DecoderConfig) -> tuple[jax.Array, jax.Array]:
    """Inverts `_mixed`."""
    half, rotated = x.shape[-1] // 2, config.rotated // 2
    a, c, b, d = jnp.split(x, (rotated, half, half + rotated), axis=-1)
    return jnp.concatenate([a, b], axis=-1), jnp.concatenate([c, d], axis=-1)


def _per_head(x: jax.Array, weight: Weight) -> jax.Array:
    """Computes [B, T, N, in] @ [N, in, out], head by head."""
    return matmul(x.swapaxes(1, 2), weight).swapaxes(1, 2)


_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def _feed_forward(weights: LayerParams, x: jax.Array, config: DecoderConfig) -> jax.Array:
    """Computes `W_down (f(W_gate x) * W_up x)`, or `W_down f(W_up x)`; with experts the weighted sum of those chosen.

    Where a layer has shared experts, these are one more feed-forward that every token passes.
    """
    w = weights
    if w.router is None:
        each = ((w.w_gate, w.w_gate_bias), (w.w_up, w.w_up_bias), (w.w_down, w.w_down_bias))
        return _gated(x, lambda y, part: linear(y, *part), *each, config)
    tokens = x.reshape(-1, x.shape[-1])
    p = jax.nn.softmax(linear(tokens, w.router).astype(jnp.float32), axis=-1)  # [B T, E]
    p, expert = jax.lax.top_k(p, config.experts_per_token)
    if config.expert_weights_sum_to_one:
        p = p / jnp.sum(p, axis=-1, keepdims=True)
    p = p * config.expert_scale
    # Every token once for each of its experts, in the order of the experts: groups of rows, one product.
    order = jnp.argsort(expert.reshape(-1))
    count = jnp.bincount(expert.reshape(-1), length=config.num_experts)
    token = order // config.experts_per_token
    rows, group = jnp.take(tokens, token, axis=0), jnp.take(expert.reshape(-1), order)
    of_experts = lambda y, weight: grouped_matmul(y, weight, group, count)
    mixed = _gated(rows, of_experts, w.w_gate, w.w_up, w.w_down, config)
    mixed = mixed * jnp.take(p.reshape(-1), order)[:, None].astype(x.dtype)
    mixed = jnp.zeros_like(tokens).at[token].add(mixed).reshape(x.shape)
    if not config.shared_ffn_width:
        return mixed
    return mixed + _gated(x, linear, w.shared_w_gate, w.shared_w_up, w.shared_w_down, config)


def _gated(x: jax.Array, product: Callable, gate, up, down, config: DecoderConfig) -> jax.Array:
    """Computes the feed-forward of one set of matrices, where `product(x, part)` multiplies by one of them."""
    activation = _ACTIVATIONS[config.activation]
    hidden = activation(product(x, gate)) * product(x, up) if config.gated else activation(product(x, up))
    return product(hidden, down)
