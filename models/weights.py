"""The parameters of a decoder: one declaration of names and shapes, and three ways to fill it.

Axes: V vocabulary, D width, N query heads, K key/value heads, H head dimension, F feed-forward width, E experts; of
multi-head latent attention, R latent rank and the channels of a head that rotate (P), that do not (C), and of its value
(V'). Files store a matrix as [out, in]; parameters are [in, out]:

  {"embed": [V, D], "final_norm": [D], "layers": (layer, ...)}
  layer = {"attn_norm": [D], "wqkv": [D, (N + 2 K) H], "wo": [N H, D],
           "mlp_norm": [D], "w_gate": [D, F], "w_up": [D, F], "w_down": [F, D]}

The columns of wqkv are, KV head after KV head, its N / K query heads, its key and its value, so that a part of the KV
heads is a part of the matrix. Where a config asks for it there are also "head" [V, D] (untied), "positions" [P, D],
"q_norm" and "k_norm" [H], "attn_post_norm" and "mlp_post_norm" [D], no "w_gate" (not gated), "router" [D, E] with the
other feed-forward matrices [E, in, out], "shared_w_gate", "shared_w_up" and "shared_w_down" of the feed-forward beside
the experts, and a NAME_bias beside a matrix or a layer norm. In place of wqkv latent attention has "wq" [D, N (C + P)],
"w_latent" [D, R + P], "latent_norm" [R], "w_uk" [N, C, R] and "w_uv" [N, R, V'].

Loading brings every family to one convention. Norms of files that store `w - 1` hold w. In a partly rotated head the
channels of queries and keys are reordered so that the pairs are `(i, i + H / 2)` (`DecoderConfig.frequencies`), and
`rope_gain` is multiplied into them. The P channels of latent attention, neighbours of which rotate in files, become
pairs `(i, i + P / 2)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.sharding import PartitionSpec as P

from models import leaf as leaf_of
from models.config import DecoderConfig
from models.int8 import Int8Matrix, Weight, quantized
from models.leaf import Index, Leaf, Tensor
from models.names import NAMES

_LONG = 1 << 30  # bytes of params from which loading shows a progress bar

Shardings = Callable[[Any, Any], Any]
"""From the named axes of the params and their shapes to a `jax.sharding.Sharding` for each."""


def _head_channels(config: DecoderConfig) -> np.ndarray | None:
    """i32[H]: which channel of a file's head comes where, in queries and keys; None: each in its place."""
    H, R = config.head_dim, config.rotated
    if R in (0, H):
        return None
    channel, half = np.arange(H), R // 2
    still = (H - R) // 2
    return np.concatenate([channel[:half], channel[R : R + still], channel[half:R], channel[R + still :]])


def _qkv_rows(config: DecoderConfig, heads_apart: bool) -> np.ndarray:
    """i32[(N + 2 K) H]: which row of the file's tensors comes where in wqkv."""
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    channels = _head_channels(config)
    rows = np.arange((N + 2 * K) * H)
    rows = rows.reshape(N, 3, H).swapaxes(0, 1).reshape(-1, H) if heads_apart else rows.reshape(-1, H)
    if channels is not None:
        rows = np.concatenate([rows[: N + K][:, channels], rows[N + K :]])
    queries, key, value = np.split(rows, (N, N + K))
    return np.concatenate([queries.reshape(K, -1), key, value], axis=1).reshape(-1)


def split_qkv(config: DecoderConfig, wqkv: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[..., (N + 2 K) H], the outputs of wqkv -> queries [..., N, H], keys and values [..., K, H]."""
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    by_head = wqkv.reshape(*wqkv.shape[:-1], K, N // K + 2, H)
    return by_head[..., :-2, :].reshape(*wqkv.shape[:-1], N, H), by_head[..., -2, :], by_head[..., -1, :]


def _rotary_gain(config: DecoderConfig) -> np.ndarray | None:
    """f32[H]: what a head of queries or keys is multiplied by, in the order of the params."""
    if config.rope_gain == 1.0:
        return None
    gain = np.where(np.arange(config.head_dim) < config.rotated, config.rope_gain, 1.0).astype(np.float32)
    channels = _head_channels(config)
    return gain if channels is None else gain[channels]


def _latent_rows(config: DecoderConfig, heads: int, before: int) -> dict[str, np.ndarray | None]:
    """Where the rows of heads `[before | P]` come from, and what they are multiplied by: P rotate, as halves."""
    rotated = config.rotated
    order = np.concatenate([np.arange(before), before + np.arange(rotated).reshape(-1, 2).T.reshape(-1)])
    gain = np.concatenate([np.ones(before, np.float32), np.full(rotated, config.rope_gain, np.float32)])
    rows = np.arange(heads * (before + rotated)).reshape(heads, -1)[:, order].reshape(-1)
    return {"rows": rows, "gain": None if config.rope_gain == 1.0 else np.tile(gain, heads)}


def declare(config: DecoderConfig) -> dict[str, Any]:
    """The params as leaves that say what they are made of."""
    names = NAMES[config.names]
    D, N, K, H = config.width, config.num_heads, config.num_kv_heads, config.head_dim

    def norm(key: str, name: str) -> dict[str, Leaf]:
        leaves = {key: leaf_of.vector([f"{name}.weight"], [D], 1.0, offset=names.norm_offset)}
        if config.norm == "layer":
            leaves[f"{key}_bias"] = leaf_of.vector([f"{name}.bias"], [D], 0.0)
        return leaves

    def matrix(
        key: str, parts: Iterable[str], outs: Iterable[int], fan_in: int, *, experts=0, rows=None, gain=None
    ) -> dict[str, Leaf]:
        parts, outs = tuple(parts), tuple(outs)
        outs = outs if len(parts) > 1 else (sum(outs),)
        weights, shapes = [f"{name}.weight" for name in parts], [(out, fan_in) for out in outs]
        leaves = {key: leaf_of.matrix(weights, shapes, experts=experts, rows=rows, gain=gain)}
        if key in config.biases:
            biases = [f"{name}.bias" for name in parts]
            leaves[f"{key}_bias"] = leaf_of.vector(biases, outs, 0.0, rows=rows, gain=gain)
        return leaves

    def qkv(at: str) -> dict[str, Leaf]:
        rows, gain = _qkv_rows(config, names.heads_apart), _rotary_gain(config)
        qkv_gain = None
        if gain is not None and not config.qk_norm:
            of_head = np.concatenate([np.tile(gain, N // K + 1), np.ones(H, np.float32)])
            qkv_gain = np.tile(of_head, K)
        parts = [at + part for part in names.wqkv]
        leaves = matrix("wqkv", parts, (N * H, K * H, K * H), D, rows=rows, gain=qkv_gain)
        if config.qk_norm:
            for key, name in (("q_norm", names.q_norm), ("k_norm", names.k_norm)):
                channels = _head_channels(config)
                channels = np.arange(H) if channels is None and gain is not None else channels
                head = dict(rows=channels, gain=gain, offset=names.norm_offset)
                leaves[key] = leaf_of.vector([f"{at}{name}.weight"], [H], 1.0, **head)
        return leaves | matrix("wo", [at + names.wo], [D], N * H)

    def latent_qkv(at: str) -> dict[str, Leaf]:
        R, C, V = config.latent_rank, config.still_channels, config.value_channels
        of_queries, of_keys = (_latent_rows(config, *sizes) for sizes in ((N, C), (1, R)))
        leaves = matrix("wq", [at + names.wq], [N * (C + config.rotated)], D, **of_queries)
        leaves |= matrix("w_latent", [at + names.w_latent], [R + config.rotated], D, **of_keys)
        leaves["latent_norm"] = leaf_of.vector([f"{at}{names.latent_norm}.weight"], [R], 1.0)
        for key, channels, turned in (("w_uk", slice(0, C), False), ("w_uv", slice(C, C + V), True)):
            leaves[key] = leaf_of.up_projection(at + names.w_ukv, N, channels, R, C + V, turned=turned)
        return leaves | matrix("wo", [at + names.wo], [D], N * V)

    def layer(i: int) -> dict[str, Leaf]:
        at = names.layer.format(i)
        dense = i < config.dense_layers
        E, F = (0, config.dense_ffn_width) if dense else (config.num_experts, config.ffn_width)
        full = lambda parts: [at + (names.expert if E else names.dense) + part for part in parts]
        leaves = norm("attn_norm", at + names.attn_norm) | (latent_qkv if config.latent_rank else qkv)(at)
        leaves |= norm("mlp_norm", at + names.mlp_norm)
        if config.post_norms:
            leaves |= norm("attn_post_norm", at + names.attn_post_norm)
            leaves |= norm("mlp_post_norm", at + names.mlp_post_norm)
        if E:
            leaves |= matrix("router", [at + names.router], [E], D)
        if E and config.shared_ffn_width:
            width, own = config.shared_ffn_width, at + names.shared_expert
            leaves |= matrix("shared_w_gate", [own + names.w_gate], [width], D)
            leaves |= matrix("shared_w_up", [own + names.w_up], [width], D)
            leaves |= matrix("shared_w_down", [own + names.w_down], [D], width)
        if config.gated and names.w_gate == names.w_up:
            for key, rows in (("w_gate", np.arange(F)), ("w_up", np.arange(F, 2 * F))):
                leaves |= matrix(key, full([names.w_up]), [2 * F], D, experts=E, rows=rows)
        else:
            if config.gated:
                leaves |= matrix("w_gate", full([names.w_gate]), [F], D, experts=E)
            leaves |= matrix("w_up", full([names.w_up]), [F], D, experts=E)
        return leaves | matrix("w_down", full([names.w_down]), [D], F, experts=E)

    leaves = {"embed": leaf_of.plain(names.embed, config.vocab_size, D)} | norm("final_norm", names.final_norm)
    if config.learned_positions:
        shape = config.learned_positions, D
        leaves["positions"] = leaf_of.plain(names.positions, *shape, skipped=names.skipped_positions)
    leaves["layers"] = tuple(layer(i) for i in range(config.num_layers))
    if not config.tied_embeddings:
        leaves["head"] = leaf_of.plain(names.head, config.vocab_size, D)
    return leaves


def build_params(
    config: DecoderConfig,
    get: Callable[[str], Tensor],
    dtype,
    *,
    int8: bool = False,
    shardings: Shardings | None = None,
) -> dict[str, Any]:
    """Assembles the params from tensors found by name, one leaf at a time.

    Of a leaf only what this host's devices hold is read, some megabytes at a time. Beside the params never more is held
    than the largest such share and a piece of some tensors.

    Args:
      config: the decoder's shape.
      get: returns a tensor by the name that `NAMES[config.names]` gives it (`model.layers.3.self_attn.q_proj.weight`,
        [out, in]): an array, or what reads the slices asked for; raises KeyError when there is none.
      dtype: of every leaf.
      int8: store the matrices of the layers as `models.int8.Int8Matrix`; embeddings, norms and biases stay as they are.
      shardings: `(named axes, abstract params) -> jax.sharding.Sharding` of every leaf, such as
        `functools.partial(kvjax.sharding.shardings, mesh=mesh)`; None: all on the default device.

    Returns:
      The params, as the module describes them.

    Raises:
      ValueError: a tensor is missing, or has another shape than `config` gives it, or is not floating point.
    """

    def take(name: str, shape: tuple[int, ...]) -> Tensor:
        try:
            tensor = get(name)
        except KeyError:
            raise ValueError(f"Tensor {name} is missing, expected one of shape {list(shape)}.") from None
        if tensor.shape != shape:
            raise ValueError(f"Tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}.")
        if not jnp.issubdtype(tensor.dtype, np.floating) or tensor.dtype.itemsize < 2:
            raise ValueError(f"Tensor {name} is {tensor.dtype}, expected floating point of 16 bits or more.")
        return tensor

    def build(leaf: Leaf, sharding=None) -> Weight:
        tensors = [take(*part) for part in zip(leaf.names, leaf.shapes)]
        if int8 and leaf.multiplied:
            built = _build_int8(leaf, tensors, sharding)
        else:
            built = _put(leaf.shape, sharding, lambda index: _read(leaf, tensors, index, dtype))
        progress.update(size(leaf))
        return jax.block_until_ready(built)  # what it was copied from is free now

    declared = declare(config)
    placed = []
    if shardings is not None:
        placed = [shardings(param_axes(config, int8=int8), abstract_params(config, dtype, int8=int8))]
    size = lambda leaf: math.prod(leaf.shape) * (1 if int8 and leaf.multiplied else jnp.dtype(dtype).itemsize)
    total = sum(map(size, jax.tree.leaves(declared)))
    bar = dict(desc=f"loading {config.name}", total=total, unit="B", unit_scale=True, leave=False)
    with tqdm.tqdm(**bar, disable=None if total >= _LONG else True) as progress:
        return jax.tree.map(build, declared, *placed)


def _read(leaf: Leaf, tensors: Sequence[Tensor], index: Index, dtype) -> np.ndarray:
    """A part of a leaf."""
    part = np.empty([along.stop - along.start for along in index], dtype)
    for of_leaf, of_part in leaf.pieces(index, part.itemsize):
        part[of_part] = leaf.read(tensors, of_leaf)
    return part


def _build_int8(leaf: Leaf, tensors: Sequence[Tensor], sharding: Int8Matrix | None) -> Int8Matrix:
    """Codes and scales of a leaf: a scale is of all inputs, wherever their codes go."""
    scales = {}  # of the outputs whose codes were read

    def codes(index: Index) -> np.ndarray:
        *before, over_in, over_out = index
        every_input = (*before, slice(0, leaf.shape[-2]), over_out)
        part = np.empty([along.stop - along.start for along in index], np.int8)
        scale = np.empty([along.stop - along.start for along in (*before, over_out)], np.float32)
        for of_leaf, of_part in leaf.pieces(every_input, np.dtype(np.float32).itemsize):
            *here, _, outputs = of_part
            found, scale[(*here, outputs)] = quantized(leaf.read(tensors, of_leaf))
            part[(*here, slice(None), outputs)] = found[..., over_in, :]
        scales[str((before, over_out))] = scale
        return part

    def scale(index: Index) -> np.ndarray:
        *before, over_out = index
        if str((before, over_out)) not in scales:
            codes((*before, slice(0, leaf.shape[-2]), over_out))
        return scales[str((before, over_out))]

    of_codes, of_scale = (None, None) if sharding is None else (sharding.codes, sharding.scale)
    built = _put(leaf.shape, of_codes, codes)
    return Int8Matrix(built, _put((*leaf.shape[:-2], leaf.shape[-1]), of_scale, scale))


def _put(shape: tuple[int, ...], sharding, read: Callable[[Index], np.ndarray]) -> jax.Array:
    """An array of what is read for each of this host's devices."""
    whole = lambda index: tuple(slice(*along.indices(size)[:2]) for along, size in zip(index, shape))
    if sharding is None:
        return jnp.asarray(read(whole((slice(None),) * len(shape))))
    return jax.make_array_from_callback(shape, sharding, lambda index: read(whole(index)))


def check_names(config: DecoderConfig, found: Iterable[str]) -> None:
    """Refuses a file that holds tensors this decoder would not use, such as biases or quantization scales.

    Args:
      config: the decoder's shape.
      found: the names of all tensors of the file, in Hugging Face's naming where they have one.

    Raises:
      ValueError: naming tensors that `build_params` would never ask for.
    """
    names = NAMES[config.names]
    known = {name for leaf in jax.tree.leaves(declare(config)) for name in leaf.names}
    known.add(f"{names.head}.weight")  # a second copy of tied embeddings
    unknown = sorted(name for name in set(found) - known if not name.endswith(names.ignored))
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise ValueError(f"Tensors this decoder does not use: {', '.join(unknown[:3])}{more}.")


def abstract_params(config: DecoderConfig, dtype, *, int8: bool = False) -> dict[str, Any]:
    """Returns the params as `jax.ShapeDtypeStruct`s: nothing is allocated. Arguments as `build_params`."""

    def shape(leaf: Leaf):
        if int8 and leaf.multiplied:
            scale = jax.ShapeDtypeStruct((*leaf.shape[:-2], leaf.shape[-1]), jnp.float32)
            return Int8Matrix(jax.ShapeDtypeStruct(leaf.shape, jnp.int8), scale)
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype))

    return jax.tree.map(shape, declare(config))


_AXES = {
    "embed": P("vocab"),
    "head": P("vocab"),
    "wqkv": P(None, "heads"),
    "wqkv_bias": P("heads"),
    "wq": P(None, "heads"),
    "w_uk": P("heads"),
    "w_uv": P("heads"),
    "wo": P("heads"),
    "w_gate": P(None, "ffn"),
    "w_gate_bias": P("ffn"),
    "w_up": P(None, "ffn"),
    "w_up_bias": P("ffn"),
    "w_down": P("ffn"),
}


def param_axes(config: DecoderConfig, *, int8: bool = False) -> dict[str, Any]:
    """The names of the axes of every leaf of the params, for `kvjax.sharding`: what is not named is on every shard.

    Arguments as `build_params`.
    """

    def axes(path, leaf: Leaf):
        name = path[-1].key
        found = _AXES.get(name.removeprefix("shared_"), P())
        of_experts = len(leaf.shape) == 3 and name in ("w_gate", "w_up", "w_down")
        found = P(None, *found) if of_experts else found
        if not (int8 and leaf.multiplied):
            return found
        padded = (*found, *[None] * (len(leaf.shape) - len(found)))
        return Int8Matrix(found, P(*padded[:-2], padded[-1]))

    return jax.tree_util.tree_map_with_path(axes, declare(config))


def random_params(config: DecoderConfig, key: jax.Array, dtype) -> dict[str, Any]:
    """Returns untrained params: norms are one, biases zero, matrices normal with variance 1 / fan_in.

    Args:
      config: the decoder's shape.
      key: a PRNG key; the same key gives the same params, rounded, in every dtype.
      dtype: of every leaf.
    """
    leaves, treedef = jax.tree.flatten(declare(config))

    def draw(i: int, leaf: Leaf) -> jax.Array:
        if leaf.untrained is not None:
            return jnp.full(leaf.shape, leaf.untrained, dtype)
        normal = jax.random.normal(jax.random.fold_in(key, i), leaf.shape, jnp.float32)
        return (normal * leaf.shapes[0][-1] ** -0.5).astype(dtype)

    return jax.tree.unflatten(treedef, [draw(i, leaf) for i, leaf in enumerate(leaves)])
