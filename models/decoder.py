"""A decoder of parts, for every family: `embed`, `layer` after `layer`, `unembed`, and one loop over them.

Plain functions over typed weights (`models.params`). Families differ in the fields of their config and in which weights
they have; what a layer computes is in `models.decoder_layer`. Axes: B batch, T new tokens, D width, V vocabulary.
Layers are a Python tuple, unrolled: a scan over stacked layers would copy weights and caches at every step.

Inside a jitted program all of this is part of that program. Called as it is, every part is a compiled program of its
own, which layers of one kind share: compilation takes a thirtieth of the time, a token some milliseconds more.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from kvjax import sharding
from kvjax.cache import Cache, LayerCache, empty_cache
from kvjax.drivers import StepOutput
from kvjax.limits import Limits
from kvjax.observation import ALL, LayerObservation, Needs
from kvjax.rope import Rope
from kvjax.segments.indices import Chosen
from models.config import DecoderConfig
from models.decoder_layer import STREAM, kind_of, norm, run_layer
from models.params import DecoderParams


class LayerOutput(NamedTuple):
    """What a layer returns."""

    x: Float[Array, "B T D"]  # the residual stream after it; of the last tokens alone where only they went on
    cache: LayerCache  # with the new tokens in it
    observed: LayerObservation
    chosen: Chosen | None  # what its queries read of the cache, for the layers after it


def embed(
    params: DecoderParams, config: DecoderConfig, tokens: Int32[Array, "B T"], positions: Int32[Array, "B T"]
) -> jax.Array:
    """Looks tokens up: [B, T, D], the residual stream that the first layer reads.

    Args:
      params: the weights.
      config: the shape of the decoder.
      tokens: i32[B, T]. An id outside of the vocabulary gives NaN; what padding holds does not matter.
      positions: i32[B, T], -1 is padding.
    """
    x = _embed(params.embed, params.positions, tokens, positions, scale=config.embed_scale)
    return sharding.constrain(x, *STREAM)


def layer(
    params: DecoderParams,
    config: DecoderConfig,
    index: int,
    x: Float[Array, "B T D"],
    positions: Int32[Array, "B T"],
    cache: LayerCache,
    shared=None,
    chosen: Chosen | None = None,
    *,
    needs: Needs = Needs(),
    last: int | None = None,
    donate: bool = False,
    remat: bool = False,
) -> LayerOutput:
    """Runs one layer: the new tokens attend to its cache and to each other, and are appended to it.

    Args:
      params: the weights.
      config: the shape of the decoder.
      index: which layer, from 0.
      x: [B, T, D], the residual stream before it.
      positions: i32[B, T], increasing; -1 is padding, which comes last in a row.
      cache: attended to, then appended to. With 0 slots it becomes exactly the T tokens; otherwise it must have room.
      shared: what layers share, `Cache.shared`.
      chosen: what an earlier layer chose to read, for layers that read the same.
      needs: what to collect.
      last: only the last so many tokens of every row attend and go on; all are appended. None: all go on.
      donate: outside jit, overwrite the cache; the one passed in is gone then.
      remat: under differentiation, compute the layer again in the backward pass instead of keeping what it computed.

    Raises:
      ValueError: there is no such layer.
    """
    if not 0 <= index < config.num_layers:
        raise ValueError(f"index must be from 0 to {config.num_layers - 1}, got {index}.")
    run = _layer_in_place if donate else _layer_again if remat else _layer
    static = dict(config=config, kind=kind_of(config, index), needs=needs, last=last)
    return LayerOutput(*run(params.layers[index], x, positions, cache, shared, jnp.int32(index), chosen, **static))


def unembed(
    params: DecoderParams, config: DecoderConfig, x: Float[Array, "B T D"], count: Int32[Array, " B"] | None = None
) -> jax.Array:
    """Turns the residual stream after any layer into logits of the next token, f32[B, T, V].

    Args:
      params: the weights.
      config: the shape of the decoder.
      x: [B, T, D].
      count: i32[B], tokens of each row; the logits are [B, 1, V] of the last one then. None: of all.
    """
    weights = params.final_norm, params.final_norm_bias, params.output_head
    return _unembed(*weights, x, count, config=config)


def run_layers(
    params: DecoderParams,
    config: DecoderConfig,
    x: Float[Array, "B T D"],
    positions: jax.Array,
    caches: Sequence[LayerCache],
    shared=None,
    *,
    indices: Sequence[int] | None = None,
    needs: Needs = Needs(),
    last: int | None = None,
    donate: bool = False,
    remat: bool = False,
) -> Iterator[LayerOutput]:
    """Runs one layer after another, and yields what each returns; who stops early leaves the later ones out.

    Args:
      params: see `layer`.
      config: see `layer`.
      x: [B, T, D], what the first of these layers reads.
      positions: see `layer`.
      caches: one for each of these layers.
      shared: see `layer`.
      indices: which layers, in this order; None: all.
      needs: see `layer`.
      last: of the decoder's last layer, see `layer`.
      donate: see `layer`.
      remat: see `layer`.

    Raises:
      ValueError: there are more or fewer caches than layers.
    """
    indices = range(config.num_layers) if indices is None else indices
    if len(caches) != len(indices):
        raise ValueError(f"caches must be {len(indices)}, one for each layer, got {len(caches)}.")
    chosen = None
    for index, cache in zip(indices, caches):
        of_layer = last if index == config.num_layers - 1 else None
        how = dict(needs=needs, last=of_layer, donate=donate, remat=remat)
        out = layer(params, config, index, x, positions, cache, shared, chosen, **how)
        yield out
        x, chosen = out.x, out.chosen


def step(
    params: DecoderParams,
    config: DecoderConfig,
    tokens: Int32[Array, "B T"],
    positions: Int32[Array, "B T"],
    cache: Cache,
    *,
    needs: Needs,
    last_only: bool,
    donate: bool = False,
    remat: bool = False,
) -> StepOutput:
    """Runs T new tokens of every row through the decoder and reports what transforms need.

    Args:
      params: the weights.
      config: the shape of the decoder.
      tokens: i32[B, T].
      positions: i32[B, T], increasing; -1 is padding, which comes last in a row.
      cache: attended to, then appended to. With 0 slots it becomes exactly the T tokens; otherwise it must
        have room for them.
      needs: what to collect from each layer.
      last_only: logits [B, 1, V] of each row's last real token, not of all.
      donate: see `layer`.
      remat: see `layer`.
    """
    x, count = embed(params, config, tokens, positions), _count(positions)
    last = _tokens_read(cache.layers[-1].inlined(cache.shared), needs, tokens.shape[1]) if last_only else None
    how = dict(needs=needs, last=last, donate=donate, remat=remat)
    layers, seen = [], []
    for out in run_layers(params, config, x, positions, cache.layers, cache.shared, **how):
        x = out.x
        layers.append(out.cache)
        seen.append(out.observed)
    # Tokens may come anywhere: those that are read again, where they were, make no row longer.
    length = jnp.maximum(cache.length, jnp.max(positions, axis=1) + 1)
    cache = cache.replace(layers=tuple(layers), length=length)
    count = count if last is None else jnp.full_like(count, last)
    return StepOutput(unembed(params, config, x, count if last_only else None), cache, tuple(seen))


def forward(
    params: DecoderParams, config: DecoderConfig, tokens: jax.Array, positions: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Computes f32[B, T, V] logits (undefined at padding), and the cache with the tokens in it; see `step`."""
    out = step(params, config, tokens, positions, cache, needs=Needs(), last_only=False)
    return out.logits, out.cache


def hidden_states(
    params: DecoderParams,
    config: DecoderConfig,
    start: Int32[Array, "B T"],
    positions: Int32[Array, "B T"],
    layers: Sequence[LayerCache],
    *,
    remat: bool = False,
) -> list[jax.Array]:
    """Computes [B, T, D] after each of the decoder's last layers, as many as there are caches; these stay as they are.

    Args:
      params: see `step`.
      config: see `step`.
      start: i32[B, T] tokens for all layers; otherwise [B, T, D], what the first of these layers reads.
      positions: i32[B, T].
      layers: caches with room for the tokens.
      remat: see `layer`.
    """
    x = start if start.ndim == 3 else embed(params, config, start, positions)
    indices = range(config.num_layers - len(layers), config.num_layers)
    return [out.x for out in run_layers(params, config, x, positions, layers, indices=indices, remat=remat)]


def layer_inputs(params: DecoderParams, config: DecoderConfig, tokens: jax.Array) -> list[jax.Array]:
    """Computes [B, T, D] for every layer: what its query, key and value projections read, for i32[B, T] tokens."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    cache = prompt_cache(config, tokens.shape[0], params.embed.dtype)
    x = embed(params, config, tokens, positions)
    before_last = range(config.num_layers - 1)
    outs = run_layers(params, config, x, positions, cache.layers[:-1], indices=before_last)
    streams = [x, *(out.x for out in outs)]
    return [_norm(x, of.attn_norm, of.attn_norm_bias, config=config) for x, of in zip(streams, params.layers)]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["config", "donate", "limits"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class BoundDecoder:
    """A decoder with its weights: a `kvjax.Step`, and a pytree of the weights."""

    params: DecoderParams
    config: DecoderConfig
    donate: bool
    limits: Limits

    def __call__(self, tokens, positions, cache, *, needs: Needs, last_only: bool) -> StepOutput:
        """See `step`."""
        how = dict(needs=needs, last_only=last_only, donate=self.donate)
        return step(self.params, self.config, tokens, positions, cache, **how)

    def empty_cache(self, batch: int) -> Cache:
        """Makes a cache without slots, in the dtype of the embedding; see `prompt_cache`."""
        return prompt_cache(self.config, batch, self.params.embed.dtype)


def bind(
    params: DecoderParams, config: DecoderConfig, *, donate: bool = False, max_positions: int | None = None
) -> BoundDecoder:
    """Makes a `kvjax.Step` of the decoder, which the drivers call with ids and positions that it knows.

    Args:
      params: see `step`.
      config: see `step`.
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


def first_layers(decoder: BoundDecoder, count: int) -> BoundDecoder:
    """Returns a decoder of the first layers of another, over the same weights; its caches have as many.

    Raises:
      ValueError: there are fewer.
    """
    if not 1 <= count <= decoder.config.num_layers:
        raise ValueError(f"count must be from 1 to the decoder's {decoder.config.num_layers} layers, got {count}.")
    config = dataclasses.replace(decoder.config, num_layers=count)
    params = decoder.params.replace(layers=decoder.params.layers[:count])
    return BoundDecoder(params, config, decoder.donate, decoder.limits)


def prompt_cache(config: DecoderConfig, batch: int, dtype=jnp.float32) -> Cache:
    """Makes a cache without slots, ready for a prefill."""
    return empty_cache(
        batch=batch,
        layers=config.num_layers,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        slots=0,
        dtype=dtype,
        own_values=not config.latent_rank,
    )


def layer_rope(config: DecoderConfig, index: int) -> Rope:
    """Returns how a layer rotates its keys."""
    return kind_of(config, index).rope


_norm = jax.jit(norm, static_argnames="config")
_STATIC = ("config", "kind", "needs", "last")
_layer = jax.jit(run_layer, static_argnames=_STATIC)
_layer_in_place = jax.jit(run_layer, static_argnames=_STATIC, donate_argnames="cache")


def _layer_again(*arrays, **static):
    """Runs `_layer` so that a backward pass keeps only what went in."""
    return jax.checkpoint(functools.partial(_layer, **static))(*arrays)


def _tokens_read(cache: LayerCache, needs: Needs, tokens: int) -> int | None:
    """Returns how many of the last tokens anybody reads after the last layer; None: all, or a program does not pay.

    From an empty cache the last layer may write all tokens first and attend for these alone: a thirtieth of a prefill.
    """
    count = max(needs.queries, 1)
    held = sum(segment.pos.shape[-1] for segment in cache.segments)
    if held or needs.queries == ALL or needs.moments_from or needs.largest_inputs or 4 * count > tokens:
        return None
    return count


@functools.partial(jax.jit, inline=True)
def _count(positions: jax.Array) -> jax.Array:
    return jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)


@functools.partial(jax.jit, static_argnames="scale")
def _embed(embed: jax.Array, table: jax.Array | None, tokens: jax.Array, positions: jax.Array, *, scale: float):
    # A wrong id gives NaN, not the embedding of another token; what padding holds does not matter.
    tokens = jnp.where(positions < 0, 0, jnp.where(tokens < 0, embed.shape[0], tokens))
    x = jnp.take(embed, tokens, axis=0)  # [B, T, D]
    if scale != 1.0:
        x = x * jnp.asarray(scale, x.dtype)
    return x if table is None else x + jnp.take(table, jnp.maximum(positions, 0), axis=0)


@functools.partial(jax.jit, static_argnames="config")
def _unembed(weight, bias, head, x, count, *, config: DecoderConfig) -> jax.Array:
    if count is not None:
        x = jnp.take_along_axis(x, jnp.maximum(count - 1, 0)[:, None, None], axis=1)
    x = norm(x, weight, bias, config)
    x = sharding.constrain(x, "batch", None, None)
    logits = jnp.einsum("btd,vd->btv", x, head, preferred_element_type=jnp.float32)
    cap = config.output_cap
    return logits if cap is None else cap * jnp.tanh(logits / cap)
