"""A decoder in one sitting, for every family: plain functions over a pytree of weights.

Families differ in the fields of their config and in which weights they have. Axes: B batch, T new tokens, D width,
F feed-forward width, E experts, N query heads, K key/value heads, H head dimension, R latent rank, V vocabulary.
Layers are a Python tuple, unrolled: a scan over stacked layers would copy weights and caches at every step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvjax import sharding
from kvjax.cache import Cache, LayerCache, empty_cache
from kvjax.drivers import StepOutput
from kvjax.limits import Limits
from kvjax.observation import ALL, LayerObservation, Needs, observe, take_last
from kvjax.rope import Rope, rotate
from kvjax.segments import Queries
from models.config import DecoderConfig
from models.int8 import grouped_matmul, matmul
from models.weights import split_qkv
from pallas_kernels.logits import Scale, SoftCap


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
    donate: bool = False,
    remat: bool = False,
) -> StepOutput:
    """`forward` that also reports what transforms need.

    Inside a jitted program this is one program. Called as it is, it runs one compiled layer after another:
    compilation takes a thirtieth of the time, a token some milliseconds more.

    Args:
      params: see `forward`.
      config: see `forward`.
      tokens: see `forward`.
      positions: see `forward`.
      cache: see `forward`.
      needs: what to collect from each layer.
      last_only: logits [B, 1, V] of each row's last real token, not of all.
      donate: outside jit, let every layer overwrite its cache; the one passed in is gone then.
      remat: under differentiation, compute a layer again in the backward pass instead of keeping what it computed.
    """
    run_layer = _layer_in_place if donate else _layer_again if remat else _layer
    x = sharding.constrain(_embed_tokens(params, config, tokens, positions), *_STREAM)
    layers, seen = [], []
    last = None
    for index, (weights, layer) in enumerate(zip(params["layers"], cache.layers, strict=True)):
        if last_only and index == config.num_layers - 1:
            last = _tokens_read(layer.inlined(cache.shared), needs, tokens.shape[1])
        how = dict(config=config, kind=_kind(config, index), needs=needs, last=last)
        x, layer, observed = run_layer(weights, x, positions, layer, cache.shared, jnp.int32(index), **how)
        layers.append(layer)
        seen.append(observed)
    new = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
    cache = cache.replace(layers=tuple(layers), length=cache.length + new)
    head = params["embed"] if config.tied_embeddings else params["head"]
    count = new if last is None else jnp.full_like(new, last)
    final = {name: params[name] for name in ("final_norm", "final_norm_bias") if name in params}
    logits = _unembed(final, head, x, count, config=config, last_only=last_only)
    return StepOutput(logits, cache, tuple(seen))


@dataclasses.dataclass(frozen=True, eq=False)
class BoundDecoder:
    """A decoder with its weights: a `kvjax.Step`."""

    params: dict
    config: DecoderConfig
    donate: bool
    limits: Limits

    def __call__(self, tokens, positions, cache, *, needs: Needs, last_only: bool) -> StepOutput:
        """See `step`."""
        how = dict(needs=needs, last_only=last_only, donate=self.donate)
        return step(self.params, self.config, tokens, positions, cache, **how)


def bind(
    params: dict, config: DecoderConfig, *, donate: bool = False, max_positions: int | None = None
) -> BoundDecoder:
    """Makes a `kvjax.Step` of the decoder, which the drivers call with ids and positions that it knows.

    Args:
      params: see `forward`.
      config: see `forward`.
      donate: see `step`.
      max_positions: tokens that a row may have; None: as many as the model was trained for. More is at the caller's
        risk, but where positions are looked up in a table there are no more than its rows.

    Raises:
      ValueError: max_positions is below 1, or more than the table has rows.
    """
    positions = config.max_positions if max_positions is None else max_positions
    rows = config.learned_positions
    if max_positions is not None and not 1 <= max_positions <= (rows or max_positions):
        most = f" to the {rows} rows of the model's table of positions" if rows else ""
        raise ValueError(f"max_positions must be from 1{most}, got {max_positions}.")
    return BoundDecoder(params, config, donate, Limits(config.vocab_size, min(positions, rows or positions)))


def prompt_cache(config: DecoderConfig, batch: int, dtype=jnp.float32) -> Cache:
    """A cache without slots, ready for a prefill."""
    return empty_cache(
        batch=batch,
        layers=config.num_layers,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        slots=0,
        dtype=dtype,
        own_values=not config.latent_rank,
    )


def layer_inputs(params: dict, config: DecoderConfig, tokens: jax.Array) -> list[jax.Array]:
    """[B, T, D] for every layer: what its query, key and value projections read, for i32[B, T] tokens."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    cache = prompt_cache(config, tokens.shape[0], params["embed"].dtype)
    x, inputs = _embed_tokens(params, config, tokens, positions), []
    for index, (weights, layer) in enumerate(zip(params["layers"], cache.layers, strict=True)):
        inputs.append(_normed(x, weights, "attn_norm", config=config))
        how = dict(config=config, kind=_kind(config, index), needs=Needs())
        x, _, _ = _layer(weights, x, positions, layer, None, jnp.int32(index), **how)
    return inputs


def hidden_states(
    params: dict,
    config: DecoderConfig,
    start: jax.Array,
    positions: jax.Array,
    layers: Sequence[LayerCache],
    *,
    remat: bool = False,
) -> list[jax.Array]:
    """[B, T, D] after each of the decoder's last layers, as many as there are caches; these stay as they are.

    Args:
      params: see `forward`.
      config: see `forward`.
      start: i32[B, T] tokens for all layers; otherwise [B, T, D], what the first of these layers reads.
      positions: i32[B, T].
      layers: caches with room for the tokens.
      remat: see `step`.
    """
    run_layer = _layer_again if remat else _layer
    x = start if start.ndim == 3 else _embed_tokens(params, config, start, positions)
    first, states = config.num_layers - len(layers), []
    for index, (weights, layer) in enumerate(zip(params["layers"][first:], layers, strict=True), start=first):
        how = dict(config=config, kind=_kind(config, index), needs=Needs())
        x, _, _ = run_layer(weights, x, positions, layer, None, jnp.int32(index), **how)
        states.append(x)
    return states


class _Kind(NamedTuple):
    """What may differ from layer to layer: layers of one kind share a compiled program."""

    window: int | None
    frequencies: tuple[float, ...]  # H / 2 of them
    scale: Scale | None

    @property
    def rope(self) -> Rope:
        return Rope(jnp.float32(self.frequencies))


@functools.cache
def _kind(config: DecoderConfig, index: int) -> _Kind:
    scale = config.query_scale
    if config.attention_cap is not None:
        scale = SoftCap(config.head_dim**-0.5 if scale is None else scale, config.attention_cap)
    return _Kind(config.window_of(index), tuple(config.frequencies(index).tolist()), scale)


def layer_rope(config: DecoderConfig, index: int) -> Rope:
    """How a layer rotates its keys."""
    return _kind(config, index).rope


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis, in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * weight


def _norm(x: jax.Array, weights: dict, name: str, config: DecoderConfig) -> jax.Array:
    if config.norm == "rms":
        return rms_norm(x, weights[name], config.norm_eps)
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + config.norm_eps)
    return (x32 * weights[name] + weights[f"{name}_bias"]).astype(x.dtype)


def _linear(x: jax.Array, weights: dict, name: str) -> jax.Array:
    y = matmul(x, weights[name])
    bias = weights.get(f"{name}_bias")
    return y if bias is None else y + bias


_STREAM = ("batch", "tokens", None)  # names of the axes of the residual stream, see `kvjax.sharding`
_normed = jax.jit(_norm, static_argnames=("name", "config"))


@functools.partial(jax.jit, static_argnames="scale")
def _embed(embed: jax.Array, table: jax.Array | None, tokens: jax.Array, positions: jax.Array, *, scale: float):
    # A wrong id gives NaN, not the embedding of another token; what padding holds does not matter.
    tokens = jnp.where(positions < 0, 0, jnp.where(tokens < 0, embed.shape[0], tokens))
    x = jnp.take(embed, tokens, axis=0)  # [B, T, D]
    if scale != 1.0:
        x = x * jnp.asarray(scale, x.dtype)
    return x if table is None else x + jnp.take(table, jnp.maximum(positions, 0), axis=0)


def _embed_tokens(params: dict, config: DecoderConfig, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    return _embed(params["embed"], params.get("positions"), tokens, positions, scale=config.embed_scale)


@functools.partial(jax.jit, static_argnames=("config", "last_only"))
def _unembed(norm: dict, head, x, new, *, config: DecoderConfig, last_only: bool) -> jax.Array:
    if last_only:
        x = jnp.take_along_axis(x, jnp.maximum(new - 1, 0)[:, None, None], axis=1)
    x = _norm(x, norm, "final_norm", config)
    x = sharding.constrain(x, "batch", None, None)
    logits = jnp.einsum("btd,vd->btv", x, head, preferred_element_type=jnp.float32)
    cap = config.output_cap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def _one_layer(
    weights: dict,
    x: jax.Array,
    positions: jax.Array,
    layer: LayerCache,
    shared,
    index: jax.Array,
    *,
    config: DecoderConfig,
    kind: _Kind,
    needs: Needs,
    last: int | None = None,
) -> tuple[jax.Array, LayerCache, LayerObservation]:
    """Attention and feed-forward, each normalised before and added to the residual stream x [B, T, D].

    With `last`, only the last tokens of every row go on; the cache gets all of them.
    """
    normed = _norm(x, weights, "attn_norm", config)
    attended, layer, queries, lse = _attention(weights, normed, positions, layer, shared, config, kind, last)
    observed = observe(queries, lse, needs, index, inputs=x, window=kind.window, scale=kind.scale)
    x = x if last is None else take_last(x, positions, last)
    if config.post_norms:
        attended = _norm(attended, weights, "attn_post_norm", config)
    read = x if config.parallel else x + attended
    mixed = _feed_forward(weights, _norm(read, weights, "mlp_norm", config), config)
    if config.post_norms:
        mixed = _norm(mixed, weights, "mlp_post_norm", config)
    return sharding.constrain(x + attended + mixed, *_STREAM), layer, observed


_STATIC = ("config", "kind", "needs", "last")
_layer = jax.jit(_one_layer, static_argnames=_STATIC)
_layer_in_place = jax.jit(_one_layer, static_argnames=_STATIC, donate_argnames="layer")


def _layer_again(*arrays, **static):
    """`_layer`, of which a backward pass keeps only what went in."""
    return jax.checkpoint(functools.partial(_layer, **static))(*arrays)


def _tokens_read(layer: LayerCache, needs: Needs, tokens: int) -> int | None:
    """How many of the last tokens anybody reads after the last layer; None: all, or not worth a program of its own.

    From an empty cache the last layer may write all tokens first and attend for these alone: a thirtieth of a prefill.
    """
    count = max(needs.queries, 1)
    held = sum(segment.pos.shape[-1] for segment in layer.segments)
    if held or needs.queries == ALL or needs.moments_from or needs.largest_inputs or 4 * count > tokens:
        return None
    return count


def _attention(
    weights: dict,
    x: jax.Array,
    positions: jax.Array,
    layer: LayerCache,
    shared,
    config: DecoderConfig,
    kind: _Kind,
    last: int | None,
) -> tuple[jax.Array, LayerCache, Queries, jax.Array]:
    """Attends to the cache and to the new tokens, then appends these to the cache; see `_one_layer` for `last`."""
    rope, how = kind.rope, dict(window=kind.window, scale=kind.scale)
    q, k, v = _latent_qkv(weights, x, config) if config.latent_rank else _qkv(weights, x, config)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, K, T, H]
    T = x.shape[1]
    queries = Queries(q, positions, rope, ahead=jnp.arange(T)[None])
    if last is None:
        own = sharding.attend_new(queries.rotated, rotate(k, positions[:, None], rope), v, positions, **how)
        attended = layer.attend(queries, shared=shared, new=own, **how)
        layer = layer.append(k, v, positions, rope, after=attended)
    else:
        queries = Queries(take_last(q, positions, last), take_last(positions, positions, last, fill=-1), rope)
        layer = layer.append(k, v, positions, rope)
        attended = layer.attend(queries, **how)
    out = attended.out.astype(x.dtype)  # [B, T, N, H]
    if config.latent_rank:
        _, latent = _unmixed(out, config)
        out = _per_head(latent, weights, "w_uv")
    return _linear(out.reshape(*out.shape[:2], -1), weights, "wo"), layer, queries, attended.lse


def _qkv(weights: dict, x: jax.Array, config: DecoderConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, T, N, H], keys and values [B, T, K, H]."""
    q, k, v = split_qkv(config, _linear(x, weights, "wqkv"))
    if config.qk_norm:
        q, k = (rms_norm(y, weights[name], config.norm_eps) for y, name in ((q, "q_norm"), (k, "k_norm")))
    return q, k, v


def _latent_qkv(weights: dict, x: jax.Array, config: DecoderConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Multi-head latent attention as attention to one KV head: `<q_n, W_UK_n c> = <W_UK_n^T q_n, c>`.

    All heads read the same latent vector c [R], as key and as value: queries go through W_UK, outputs through W_UV, and
    only c and one rotated key are cached. Source: DeepSeek-V2 (2024), section 2.1.
    """
    q = _linear(x, weights, "wq").reshape(*x.shape[:2], config.num_heads, -1)
    still, rotated = jnp.split(q, (config.still_channels,), axis=-1)
    c, k = jnp.split(_linear(x, weights, "w_latent")[:, :, None], (config.latent_rank,), axis=-1)
    k = _mixed(k, rms_norm(c, weights["latent_norm"], config.norm_eps))
    return _mixed(rotated, _per_head(still, weights, "w_uk")), k, k


def _mixed(rotated: jax.Array, latent: jax.Array) -> jax.Array:
    """[..., P] and [..., R] as [..., H] channels of which the first P / 2 of each half rotate."""
    (a, b), (c, d) = jnp.split(rotated, 2, axis=-1), jnp.split(latent, 2, axis=-1)
    return jnp.concatenate([a, c, b, d], axis=-1)


def _unmixed(x: jax.Array, config: DecoderConfig) -> tuple[jax.Array, jax.Array]:
    """The inverse of `_mixed`."""
    half, rotated = x.shape[-1] // 2, config.rotated // 2
    a, c, b, d = jnp.split(x, (rotated, half, half + rotated), axis=-1)
    return jnp.concatenate([a, b], axis=-1), jnp.concatenate([c, d], axis=-1)


def _per_head(x: jax.Array, weights: dict, name: str) -> jax.Array:
    """[B, T, N, in] @ [N, in, out], head by head."""
    return matmul(x.swapaxes(1, 2), weights[name]).swapaxes(1, 2)


_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def _feed_forward(weights: dict, x: jax.Array, config: DecoderConfig) -> jax.Array:
    """`W_down (f(W_gate x) * W_up x)`, or `W_down f(W_up x)`; with experts the weighted sum of those chosen.

    Where a layer has shared experts, these are one more feed-forward that every token passes.
    """
    activation = _ACTIVATIONS[config.activation]

    def hidden(product):
        if not config.gated:
            return activation(product("w_up"))
        return activation(product("w_gate")) * product("w_up")

    if "router" not in weights:
        return _linear(hidden(lambda name: _linear(x, weights, name)), weights, "w_down")
    tokens = x.reshape(-1, x.shape[-1])
    p = jax.nn.softmax(_linear(tokens, weights, "router").astype(jnp.float32), axis=-1)  # [B T, E]
    p, expert = jax.lax.top_k(p, config.experts_per_token)
    if config.expert_weights_sum_to_one:
        p = p / jnp.sum(p, axis=-1, keepdims=True)
    p = p * config.expert_scale
    # Every token once for each of its experts, in the order of the experts: groups of rows, one product.
    order = jnp.argsort(expert.reshape(-1))
    count = jnp.bincount(expert.reshape(-1), length=config.num_experts)
    token = order // config.experts_per_token
    rows, group = jnp.take(tokens, token, axis=0), jnp.take(expert.reshape(-1), order)
    mixed = hidden(lambda name: grouped_matmul(rows, weights[name], group, count))
    mixed = grouped_matmul(mixed, weights["w_down"], group, count)
    mixed = mixed * jnp.take(p.reshape(-1), order)[:, None].astype(x.dtype)
    mixed = jnp.zeros_like(tokens).at[token].add(mixed).reshape(x.shape)
    if not config.shared_ffn_width:
        return mixed
    return mixed + _linear(hidden(lambda name: _linear(x, weights, f"shared_{name}")), weights, "shared_w_down")
