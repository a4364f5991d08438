"""What offline methods measure on a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

import kvjax
from experiments import synthetic
from kvjax.calibration import (
    Moments,
    activation_aware_svd,
    attention_coverage,
    attention_variance,
    copying_scores,
    greedy_ranks,
    product_codebook,
    retrieval_scores,
    weighted_components,
)
from kvjax.methods.minference import pattern
from kvjax.prompt_attention import PromptAttention, attend_blocks, keys_read
from kvjax.rope import re_rotate
from kvjax.segments.segment import unrotated
from models import Model
from models.assets import ESSAYS, fetch
from models.decoder import bind, hidden_states, layer_inputs, layer_rope, prompt_cache
from models.int8 import dense
from models.params import split_qkv

Calibration = Mapping[str, jax.Array]
"""The arrays that a method reads, by name."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What every recipe may use.

    Attributes:
      texts: sequences of natural text.
      tokens: of a sequence.
      seed: of random tokens.
    """

    texts: int = 8
    tokens: int = 1024
    seed: int = 0

    @classmethod
    def of(cls, model: Model) -> Settings:
        """The defaults, or what a model of fewer positions takes."""
        return cls(tokens=min(cls.tokens, model.config.max_positions))


def principal_components(model: Model, settings: Settings) -> Calibration:
    """Axes of rotated keys and of values, and mean squares along them, per layer and KV head."""
    sums = None
    for tokens in _progress(_texts(model, settings)):
        segments = [layer.segments[0] for layer in _read(model, tokens).cache.layers]
        moments = [(Moments.of(segment.k, segment.pos), Moments.of(segment.v, segment.pos)) for segment in segments]
        sums = moments if sums is None else [(k + a, v + b) for (k, v), (a, b) in zip(sums, moments)]
    found = {}
    for index, name in enumerate(("key", "value")):
        parts = zip(*(layer[index].principal_components() for layer in sums))
        for part, x in zip(("axes", "power"), parts):
            found[f"{name}_{part}"] = jnp.stack(x)
    return found


def principal_components_and_ranks(model: Model, settings: Settings) -> Calibration:
    """`principal_components`, and how many of them each head needs at several mean rates."""
    found = principal_components(model, settings)
    return found | search_ranks(model, settings, found)


def search_ranks(
    model: Model,
    settings: Settings,
    bases: Calibration,
    fraction: float = 1 / 4,
    rates: Sequence[float] = (0.75, 0.625, 0.5, 0.375),
) -> Calibration:
    """Ranks of keys and values, per layer and KV head, by MatryoshkaKV's greedy search.

    What an entry costs is how far the last layer's hidden states move, relative to the model with the ranks so far,
    over the tokens that follow a prompt whose keys and values are cut.

    Args:
      model: measured.
      settings: up to four texts, each a prompt of at most 384 tokens and 16 that follow.
      bases: what `principal_components` returns.
      fraction: of H that an entry gives up at a time, and keeps at least.
      rates: mean ranks that are searched, as fractions of H, falling.
    """
    config = model.config
    L, K, H, _ = bases["key_axes"].shape
    text = jnp.concatenate(_texts(model, settings)[:4])
    follow = min(16, text.shape[1] // 4)
    length = min(384, text.shape[1] - follow)
    question = text[:, length : length + follow]
    positions = jnp.broadcast_to(length + jnp.arange(follow), question.shape)
    whole = _read(model, text[:, :length]).cache.reserve(follow).layers

    @jax.jit
    def cut(layer, axes, ranks):
        """The layer's cache with its first R components only; arrays of [2, K, ...], keys and values."""
        slots = layer.segments[0]
        kept = jnp.arange(H) < ranks[:, :, None]
        x = jnp.stack([slots.k, slots.v], axis=1).astype(jnp.float32)  # [B, 2, K, S, H]
        x = (((x @ axes) * kept[:, :, None]) @ axes.mT).astype(slots.k.dtype)
        return layer.with_tail(slots.replace(k=x[:, 0], v=x[:, 1]))

    axes = jnp.stack([bases["key_axes"], bases["value_axes"]], axis=1)  # [L, 2, K, H, H]
    states = lambda start, layers: hidden_states(model.params, config, start, positions, layers)
    step = max(1, int(fraction * H))
    bar = tqdm.tqdm(unit="cut", leave=False)

    def errors(ranks):
        cuts = [cut(whole[layer], axes[layer], ranks[layer]) for layer in range(L)]
        now = states(question, cuts)
        size = jnp.linalg.norm(now[-1])
        cost = np.full(ranks.shape, np.inf, np.float32)
        for layer, which, head in np.argwhere(ranks > step):
            fewer = ranks[layer].copy()
            fewer[which, head] -= step
            start = question if layer == 0 else now[layer - 1]
            then = states(start, [cut(whole[layer], axes[layer], fewer), *cuts[layer + 1 :]])
            cost[layer, which, head] = jnp.linalg.norm(then[-1] - now[-1]) / size
            bar.update()
        return cost

    with bar:
        found = jnp.asarray(greedy_ranks(errors, (L, 2, K), H, rates, step=step))
    found = found.astype(jnp.float32)  # calibrations are stored as one dtype
    return {"rates": jnp.float32(rates), "key_ranks": found[:, :, 0], "value_ranks": found[:, :, 1]}


def attention_directions(model: Model, settings: Settings) -> Calibration:
    """Directions of rotated keys in which queries read them, and of values in which attention passes them on."""
    config = model.config
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    sums = None
    for tokens in _progress(_texts(model, settings)):
        out, moments = _read(model, tokens, kvjax.Needs(queries=kvjax.ALL)), []
        for layer, seen in zip(out.cache.layers, out.layers, strict=True):
            of_group = lambda x: x.reshape(1, -1, K, N // K, H).swapaxes(1, 2).reshape(1, K, -1, H)
            seen_by = lambda x: Moments.of(of_group(x), jnp.zeros((1, K, tokens.shape[1] * (N // K)), jnp.int32))
            segment = layer.segments[0]
            outputs = layer.attend(seen.queries, window=seen.window, scale=seen.scale).out
            moments.append((Moments.of(segment.k, segment.pos), seen_by(seen.queries.rotated), seen_by(outputs)))
        sums = moments if sums is None else [[a + b for a, b in zip(*each)] for each in zip(sums, moments)]
    found = {name: [] for name in ("key_axes", "key_inverse", "value_axes", "value_inverse")}
    for weights, (keys, queries, outputs) in zip(model.params.layers, sums, strict=True):
        wo = dense(weights.wo).astype(jnp.float32).reshape(K, N // K, H, -1)
        pairs = {"key": (keys.second, queries.second), "value": (outputs.second, jnp.einsum("kghd,kgid->khi", wo, wo))}
        for name, (second, metric) in pairs.items():
            for part, array in zip(("axes", "inverse"), weighted_components(second, metric)):
                found[f"{name}_{part}"].append(array)
    return {name: jnp.stack(parts) for name, parts in found.items()}


def output_projections(model: Model, settings: Settings) -> Calibration:
    """`output`, f32[L, N, H, D]: the model's own weights, in the order of its query heads."""
    shape = (model.config.num_heads, model.config.head_dim, -1)
    return {"output": jnp.stack([dense(x.wo).astype(jnp.float32).reshape(shape) for x in model.params.layers])}


def weight_directions(model: Model, settings: Settings) -> Calibration:
    """Directions of the key and value projections in the order of an activation-aware SVD, per layer."""
    config = model.config
    K, H = config.num_kv_heads, config.head_dim
    inputs = None
    for tokens in _progress(_texts(model, settings)):
        read = layer_inputs(model.params, config, tokens)
        found = [jnp.mean(jnp.abs(x.astype(jnp.float32)), axis=(0, 1)) for x in read]
        inputs = found if inputs is None else [a + b for a, b in zip(inputs, found)]
    axes = {"key": [], "value": []}
    for weights, mean_abs in zip(model.params.layers, inputs, strict=True):
        _, wk, wv = split_qkv(config, dense(weights.wqkv))
        for name, weight in (("key", wk), ("value", wv)):
            directions, _ = activation_aware_svd(weight.reshape(-1, K * H), mean_abs / settings.texts)
            axes[name].append(directions.reshape(K, H, -1))
    return {f"{name}_axes": jnp.stack(parts) for name, parts in axes.items()}


def head_types(model: Model, settings: Settings, repeats: int = 4) -> Calibration:
    """How much each KV head copies from random tokens that repeat: `echo` and `induction`, f32[L, K]."""
    period = settings.tokens // repeats
    rng = np.random.default_rng(settings.seed)
    scores = []
    for _ in _progress(range(settings.texts)):
        tokens = np.tile(rng.integers(0, model.config.vocab_size, size=period), repeats)
        out = _read(model, jnp.int32(tokens)[None], kvjax.Needs(queries=kvjax.ALL))
        found = [
            copying_scores(layer.segments[0], seen, period) for layer, seen in zip(out.cache.layers, out.layers)
        ]
        scores.append(np.asarray(found))  # [L, 2, K]
    mean = jnp.asarray(np.mean(scores, axis=0))
    return {"echo": mean[:, 0], "induction": mean[:, 1]}


def retrieval_heads(model: Model, settings: Settings) -> Calibration:
    """How much KV heads attend to a needle that is quoted: `retrieval`, f32[L, K].

    The needle is of random tokens, planted in a text at other depths in each, and repeated at its end.
    """
    rng, found, score = np.random.default_rng(settings.seed), [], jax.jit(retrieval_scores)
    size = max(2, min(16, settings.tokens // 8))
    for index, tokens in enumerate(_progress(_texts(model, settings))):
        text = np.asarray(tokens[0, : settings.tokens - 2 * size])
        needle = rng.integers(0, model.config.vocab_size, size=size)
        at = int((index + 0.5) / settings.texts * len(text))
        planted = np.concatenate([text[:at], needle, text[at:], needle])
        out = _read(model, jnp.int32(planted)[None], kvjax.Needs(queries=kvjax.ALL))
        needle_at, query_at = at + jnp.arange(size), len(planted) - size + jnp.arange(size - 1)
        layers = zip(out.cache.layers, out.layers)
        found.append(jnp.stack([score(layer.segments[0], seen, needle_at, query_at) for layer, seen in layers]))
    return {"retrieval": jnp.mean(jnp.stack(found), axis=0)}


def attention_patterns(model: Model, settings: Settings, share: float = 0.4, block: int = 64) -> Calibration:
    """MInference's search: the pattern of each query head that holds most attention among those of equal FLOPs.

    Candidates of each kind are tried at several sizes. Of those that read at most `share` of the keys which the head's
    dense prompt reads (as they cost here, with diagonals in whole blocks), the one with the highest recall is taken:
    the mean over queries of the probability that dense attention gives to what is read. Where none is cheap enough the
    cheapest is.

    Args:
      model: measured.
      settings: up to two texts are read; sizes of candidates follow from their tokens.
      share: of the keys that dense attention reads in whole blocks.
      block: tokens of a block, at most an eighth of a text.

    Returns:
      `candidates` f32[C, 3], see `kvjax.methods.minference`; `pattern` f32[L, N]; `recall` and `read` f32[L, N], of
      the pattern that was taken.
    """
    T, block = settings.tokens, max(1, min(block, settings.tokens // 8))
    parts = lambda *shares: [max(1, round(x * T)) for x in shares]
    shapes = [(0, min(block, T), near) for near in parts(1 / 16, 1 / 8, 3 / 16, 1 / 4)]
    shapes += [(1, max(30, c), max(50, d)) for c in parts(1 / 32, 1 / 8, 1 / 4) for d in parts(1 / 20, 1 / 8, 1 / 4)]
    shapes += [(2, -(-count // block), 0) for count in parts(1 / 8, 3 / 16, 1 / 4, 3 / 8)]
    shapes = list(dict.fromkeys(shapes))

    @jax.jit
    def of_layer(segment, seen):
        q, pos, how = seen.queries.rotated, seen.queries.pos, dict(window=seen.window, scale=seen.scale)
        count = -(-q.shape[1] // block)
        possible = block * count * (count + 1) / 2
        found = []
        for shape in shapes:
            attention = PromptAttention(pattern(*shape), block)
            chosen = attention.blocks(q, segment.k, pos, **how)
            index, columns = chosen.index, chosen.columns
            lse = attend_blocks(q, segment.k, segment.v, pos, index, columns, block=block, **how).lse
            recall = jnp.mean(jnp.exp(jnp.minimum(lse - seen.lse, 0.0)), axis=(0, 1))
            read = jnp.mean(jnp.sum(keys_read(chosen, block), axis=-1), axis=0) / possible
            found.append(jnp.stack([recall, read]))
        return jnp.stack(found)  # [C, 2, N]

    texts, total = _texts(model, settings)[:2], 0.0
    for tokens in _progress(texts):
        out = _read(model, tokens, kvjax.Needs(queries=kvjax.ALL))
        total = total + jnp.stack([of_layer(x.segments[0], seen) for x, seen in zip(out.cache.layers, out.layers)])
    recall, read = jnp.moveaxis(total / len(texts), 2, 0)  # [L, C, N]
    worth = jnp.where(read <= share, recall, -jnp.where(jnp.min(read, axis=1, keepdims=True) == read, 1.0, jnp.inf))
    best = jnp.argmax(worth, axis=1)
    taken = lambda x: jnp.take_along_axis(x, best[:, None], axis=1)[:, 0]
    named = {"candidates": jnp.float32(shapes), "pattern": best.astype(jnp.float32)}
    return named | {"recall": taken(recall), "read": taken(read)}


def layer_variance(model: Model, settings: Settings) -> Calibration:
    """How unevenly the heads of each layer spread their attention over text: `variance`, f32[L]."""
    found, variance = [], jax.jit(attention_variance)
    for tokens in _progress(_texts(model, settings)):
        out = _read(model, tokens, kvjax.Needs(queries=kvjax.ALL))
        found.append([variance(layer.segments[0], seen) for layer, seen in zip(out.cache.layers, out.layers)])
    return {"variance": jnp.mean(jnp.asarray(found), axis=0)}


def layer_coverage(model: Model, settings: Settings) -> Calibration:
    """Which share of the attention the most attended tokens of each layer hold: `coverage`, f32[L, 257]."""
    found, coverage = [], jax.jit(attention_coverage)
    for tokens in _progress(_texts(model, settings)):
        out = _read(model, tokens, kvjax.Needs(queries=kvjax.ALL))
        found.append(jnp.stack([coverage(x.segments[0], seen) for x, seen in zip(out.cache.layers, out.layers)]))
    return {"coverage": jnp.mean(jnp.stack(found), axis=0)}


def channel_strengths(model: Model, settings: Settings) -> Calibration:
    """`strength`, f32[L, K, H]: the mean |q * k| of rotated queries and keys over a text, summed over query heads."""
    total = 0.0

    @jax.jit
    def of_layer(keys, seen):
        (B, K, T, H), size = keys.k.shape, lambda x: jnp.abs(x.astype(jnp.float32))
        q = size(seen.queries.rotated).reshape(B, T, K, -1, H)
        return jnp.einsum("btkgh,bkth->kh", q, size(keys.k)) / (B * T)

    for tokens in _progress(_texts(model, settings)):
        out = _read(model, tokens, kvjax.Needs(queries=kvjax.ALL))
        layers = zip(out.cache.layers, out.layers)
        total = total + jnp.stack([of_layer(layer.segments[0], seen) for layer, seen in layers])
    return {"strength": total / settings.texts}


def grouped_components(model: Model, settings: Settings, most: int = 4) -> Calibration:
    """`key_axes`, `value_axes` f32[L, K, H, g * H]: components of un-rotated keys, and of values, of g heads together.

    g is the largest divisor of the KV heads that is at most `most`; the rows of a head are its part of its group's.
    """
    K, H = model.config.num_kv_heads, model.config.head_dim
    g = max(n for n in range(1, most + 1) if K % n == 0)
    ropes = [layer_rope(model.config, index) for index in range(model.config.num_layers)]
    together = lambda x: x.reshape(1, K // g, g, -1, H).swapaxes(2, 3).reshape(1, K // g, -1, g * H)
    sums = None
    for tokens in _progress(_texts(model, settings)):
        segments = [layer.segments[0] for layer in _read(model, tokens).cache.layers]
        keys = (unrotated(*each) for each in zip(segments, ropes))
        moments = [[Moments.of(together(x), s.pos[:, : K // g]) for x in (k.k, s.v)] for k, s in zip(keys, segments)]
        sums = moments if sums is None else [[a + b for a, b in zip(*each)] for each in zip(sums, moments)]
    axes = [jnp.stack([layer[i].principal_components()[0] for layer in sums]) for i in range(2)]
    return {name: x.reshape(-1, K, H, g * H) for name, x in zip(("key_axes", "value_axes"), axes)}


def layer_sharing(
    model: Model, settings: Settings, most: float = 0.5, similar: float = 0.5, prompt: int = 256
) -> Calibration:
    """Which layers may read another one's prompt: `giver` f32[L], itself for none, and `turn` f32[L], its place.

    Pairs are tried by falling distance of their keys and values; one is kept where the last hidden states of tokens
    that follow a prompt have a mean cosine above `similar` with those of the whole model. Up to four texts are read.

    Args:
      model: measured.
      settings: see there.
      most: fraction of the layers that read others, at which the search ends.
      similar: least cosine.
      prompt: tokens that are shared, at most.
    """
    config = model.config
    L, text = config.num_layers, jnp.concatenate(_texts(model, settings)[:4])
    follow = min(16, text.shape[1] // 4)
    length = min(prompt, text.shape[1] - follow)
    question = text[:, length : length + follow]
    positions = jnp.broadcast_to(length + jnp.arange(follow), question.shape)
    whole = _read(model, text[:, :length]).cache.reserve(follow).layers
    states = lambda layers: hidden_states(model.params, config, question, positions, list(layers))[-1]
    of = lambda x: np.stack([np.asarray(x(layer.segments[0])[:, :, :length], np.float32) for layer in whole])
    apart = np.zeros((L, L))
    for x in (of(lambda s: s.k), of(lambda s: s.v)):
        for layer in range(L):
            apart[layer] += np.sqrt(np.sum((x - x[layer]) ** 2, axis=(2, 3, 4))).mean(axis=1)
    deep, shallow = np.tril_indices(L, -1)
    unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-9)
    exact, giver, turn = unit(states(whole)), np.arange(L), np.full(L, L)
    for i in _progress(np.argsort(-apart[deep, shallow], kind="stable"), unit="pair"):
        reader, source = deep[i], shallow[i]
        if giver[reader] != reader or giver[source] != source or (giver == reader).sum() > 1:
            continue
        tried = giver.copy()
        tried[reader] = source
        if jnp.mean(jnp.sum(unit(states([whole[j] for j in tried])) * exact, axis=-1)) > similar:
            giver, turn[reader] = tried, np.sum(giver != np.arange(L))
        if np.sum(giver != np.arange(L)) >= int(most * L):
            break
    return {"giver": jnp.float32(giver), "turn": jnp.float32(turn)}


def key_means(model: Model, settings: Settings) -> Calibration:
    """`key_mean`, f32[L, K, H]: the mean of un-rotated keys."""
    ropes = [layer_rope(model.config, index) for index in range(model.config.num_layers)]
    total = 0.0
    for tokens in _progress(_texts(model, settings)):
        segments = [layer.segments[0] for layer in _read(model, tokens).cache.layers]
        keys = jnp.stack([unrotated(*each).k for each in zip(segments, ropes)])
        total = total + jnp.mean(keys.astype(jnp.float32), axis=(1, 3))
    return {"key_mean": total / settings.texts}


def channel_peaks(model: Model, settings: Settings) -> Calibration:
    """`key_peak`, `value_peak` f32[L, K, H]: the largest magnitudes of channels of rotated keys and of values."""
    peak = lambda x: jnp.max(jnp.abs(x.astype(jnp.float32)), axis=(0, 2))
    found = None
    for tokens in _progress(_texts(model, settings)):
        segments = [layer.segments[0] for layer in _read(model, tokens).cache.layers]
        each = [jnp.stack([peak(x) for x in of]) for of in zip(*((segment.k, segment.v) for segment in segments))]
        found = each if found is None else [jnp.maximum(a, b) for a, b in zip(found, each)]
    return {"key_peak": found[0], "value_peak": found[1]}


def nonuniform_levels(
    model: Model, settings: Settings, inside: float = 0.99, samples: int = 65536, bits: Sequence[int] = (2, 3, 4)
) -> Calibration:
    """Ranges of un-rotated key channels, and the levels that keys and values within their ranges need.

    `key_low`, `key_high` f32[L, K, H] leave out `(1 - inside) / 2` of the numbers at each end; a value's range is that
    of its own channels, but for the largest and the smallest. `key_levels2`, `value_levels2`, ... f32[2 ** bits] are
    k-means of numbers between -1 and 1, of all layers.
    """
    ropes = [layer_rope(model.config, index) for index in range(model.config.num_layers)]
    read = {"key": [], "value": []}  # of each text: [L, K, T, H]
    for tokens in _progress(_texts(model, settings)):
        segments = [layer.segments[0] for layer in _read(model, tokens).cache.layers]
        keys = [unrotated(*each).k[0] for each in zip(segments, ropes)]
        for name, parts in (("key", keys), ("value", [segment.v[0] for segment in segments])):
            read[name].append(np.stack([np.asarray(x, np.float32) for x in parts]))
    keys, values = (np.concatenate(read[name], axis=2) for name in ("key", "value"))
    low, high = np.quantile(keys, [(1 - inside) / 2, (1 + inside) / 2], axis=2).astype(np.float32)
    ordered = np.sort(values, axis=3)[..., 1:-1]
    ends = {"key": (low[:, :, None], high[:, :, None]), "value": (ordered[..., :1], ordered[..., -1:])}
    found, rng = {"key_low": jnp.asarray(low), "key_high": jnp.asarray(high)}, np.random.default_rng(settings.seed)
    for name, x in (("key", keys), ("value", values)):
        first, last = ends[name]
        unit = (2 * x - first - last) / np.maximum(last - first, 1e-9)
        unit = unit[np.abs(unit) <= 1]
        unit = jnp.asarray(rng.permutation(unit)[:samples, None])
        for b in bits:
            fitted = product_codebook(unit, 1, 2**b, jax.random.key(settings.seed), 50)
            found[f"{name}_levels{b}"] = jnp.sort(fitted[0, :, 0])
    return found


def codebooks(
    model: Model, settings: Settings, width: int = 2, centroids: int = 256, samples: int = 8192
) -> Calibration:
    """Centroids of rotated keys and of values, f32[L, H / width, centroids, width], from a sample of all heads."""
    read = {"key": [], "value": []}  # of each text: [L, vectors, H]
    rng = np.random.default_rng(settings.seed)
    for tokens in _progress(_texts(model, settings)):
        segments = [layer.segments[0] for layer in _read(model, tokens).cache.layers]
        count = segments[0].k.shape[1] * segments[0].k.shape[2]
        chosen = rng.permutation(count)[: -(-samples // settings.texts)]
        for name, part in (("key", "k"), ("value", "v")):
            vectors = (getattr(segment, part).astype(jnp.float32).reshape(count, -1)[chosen] for segment in segments)
            read[name].append(jnp.stack(list(vectors)))
    vectors = {name: jnp.concatenate(parts, axis=1) for name, parts in read.items()}
    if vectors["key"].shape[1] < centroids:
        raise ValueError(f"--texts, --tokens: {vectors['key'].shape[1]} vectors are too few for {centroids} centroids.")
    fit = jax.jit(product_codebook, static_argnums=(1, 2))
    found = {"key_codebook": [], "value_codebook": []}
    for layer in _progress(range(model.config.num_layers), unit="layer"):
        for name in ("key", "value"):
            key = jax.random.key(settings.seed)
            found[f"{name}_codebook"].append(fit(vectors[name][layer], width, centroids, key).block_until_ready())
    return {name: jnp.stack(parts) for name, parts in found.items()}


def demonstration(model: Model, tokens: int) -> Calibration:
    """`key`, `value` f32[L, K, m, H] of the first m tokens of a text, keys rotated as if a prompt came after them."""
    (text,) = _texts(model, Settings(texts=1, tokens=tokens))
    found = {"key": [], "value": []}
    for index, layer in enumerate(_read(model, text).cache.layers):
        slots = layer.segments[0]
        k = re_rotate(slots.k, jnp.int32(-tokens), layer_rope(model.config, index))
        found["key"].append(k[0].astype(jnp.float32))
        found["value"].append(slots.v[0].astype(jnp.float32))
    return {name: jnp.stack(parts) for name, parts in found.items()}


# They measure nothing of values.
OF_ATTENTION = frozenset(
    ("d2o", "double_sparsity", "duoattention", "headkv", "minference", "prefixkv", "razorattention")
)
RECIPES: dict[str, Callable[[Model, Settings], Calibration]] = {
    "criticalkv": output_projections,
    "cskv": weight_directions,
    "d2o": layer_variance,
    "double_sparsity": channel_strengths,
    "duoattention": head_types,
    "fp8_scaled": channel_peaks,
    "headkv": retrieval_heads,
    "kqsvd": attention_directions,
    "kvquant": nonuniform_levels,
    "kvsharer": layer_sharing,
    "matryoshka_pca": principal_components_and_ranks,
    "million": codebooks,
    "minference": attention_patterns,
    "palu": grouped_components,
    "prefixkv": layer_coverage,
    "razorattention": head_types,
    "rotatekv": key_means,
}


def measure(recipe: str, model: Model, settings: Settings = Settings()) -> Calibration:
    """Runs a recipe.

    Raises:
      ValueError: an unknown recipe, or settings that no recipe can use.
    """
    if recipe not in RECIPES:
        raise ValueError(f"--method: nothing to calibrate for {recipe!r}; there are {', '.join(RECIPES)}.")
    for name in ("texts", "tokens"):
        if getattr(settings, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(settings, name)}.")
    if settings.tokens > model.config.max_positions or settings.tokens < 8:
        raise ValueError(
            f"--tokens must be from 8 to the {model.config.max_positions} positions of {model.config.name}, got "
            f"{settings.tokens}."
        )
    if model.config.latent_rank and recipe not in OF_ATTENTION:
        raise ValueError(
            f"--method: {recipe} compresses values apart from keys, and in the multi-head latent attention of "
            f"{model.config.name} the keys are the values."
        )
    return RECIPES[recipe](model, settings)


def _texts(model: Model, settings: Settings) -> list[jax.Array]:
    """i32[1, tokens] pieces of essays that the evaluation does not hold back."""
    essays = [path.read_text(encoding="utf-8") for path in sorted(fetch(ESSAYS).glob("*.txt"))]
    ids = model.tokenizer.encode("\n\n".join(synthetic.split_essays(essays)[1]))
    available = len(ids) // settings.tokens
    if available < settings.texts:
        raise ValueError(f"--texts: there is text for {available} of {settings.tokens} tokens, got {settings.texts}.")
    starts = (index * (available // settings.texts) * settings.tokens for index in range(settings.texts))
    opening = model.tokenizer.opening
    text = lambda start: [*opening, *ids[start : start + settings.tokens - len(opening)]]
    return [jnp.asarray([text(start)], jnp.int32) for start in starts]


def _read(model: Model, tokens: jax.Array, needs: kvjax.Needs = kvjax.Needs()) -> kvjax.StepOutput:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    step = bind(model.params, model.config)
    return step(tokens, positions, prompt_cache(model.config, len(tokens)), needs=needs, last_only=True)


def _progress(items: Sequence, unit: str = "text") -> Iterator:
    return tqdm.tqdm(items, unit=unit, leave=False)
