"""The weights of a decoder: their types, and one declaration of each.

Axes: V vocabulary, D width, N query heads, K key/value heads, H head dimension, F feed-forward width, E experts; of
multi-head latent attention, R latent rank and the channels of a head that rotate (P), that do not (C), and of its value
(V'). Files store a matrix as [out, in]; here it is [in, out].

`declare` says of each weight which tensors of a file it is made of and how, its shape, the named axes it is split over,
what it is before training, and whether it may be stored in 8 bits (`models.leaf.Leaf`). All else follows from that, see
`models.weights`.

The columns of wqkv are, KV head after KV head, its N / K query heads, its key and its value, so that a part of the KV
heads is a part of the matrix.

Loading brings every family to one convention. Norms of files that store `w - 1` hold w. In a partly rotated head the
channels of queries and keys are reordered so that the pairs are `(i, i + H / 2)` (`DecoderConfig.frequencies`), and
`rope_gain` is multiplied into them. The P channels of latent attention, neighbours of which rotate in files, become
pairs `(i, i + P / 2)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from flax import struct

from models import leaf as leaf_of
from models.config import DecoderConfig
from models.int8 import Weight
from models.leaf import Axes, Leaf
from models.names import NAMES


@struct.dataclass
class LayerParams:
    """The weights of a layer; None: its family has none."""

    attn_norm: jax.Array  # [D]
    wo: Weight  # [N H, D], of latent attention [N V', D]
    mlp_norm: jax.Array  # [D]
    w_up: Weight  # [D, F], with experts [E, D, F]
    w_down: Weight  # [F, D], with experts [E, F, D]
    w_gate: Weight | None = None  # as w_up
    wqkv: Weight | None = None  # [D, (N + 2 K) H]
    # Of latent attention, in place of wqkv.
    wq: Weight | None = None  # [D, N (C + P)]
    w_latent: Weight | None = None  # [D, R + P]
    latent_norm: jax.Array | None = None  # [R]
    w_uk: Weight | None = None  # [N, C, R]
    w_uv: Weight | None = None  # [N, R, V']
    # Of experts, and of the feed-forward beside them.
    router: Weight | None = None  # [D, E]
    shared_w_gate: Weight | None = None  # [D, F']
    shared_w_up: Weight | None = None  # [D, F']
    shared_w_down: Weight | None = None  # [F', D]
    # Norms that few families have.
    q_norm: jax.Array | None = None  # [H]
    k_norm: jax.Array | None = None  # [H]
    attn_post_norm: jax.Array | None = None  # [D]
    mlp_post_norm: jax.Array | None = None  # [D]
    # Biases, as long as the last axis of what they belong to.
    attn_norm_bias: jax.Array | None = None
    wqkv_bias: jax.Array | None = None
    wo_bias: jax.Array | None = None
    attn_post_norm_bias: jax.Array | None = None
    mlp_norm_bias: jax.Array | None = None
    w_gate_bias: jax.Array | None = None
    w_up_bias: jax.Array | None = None
    w_down_bias: jax.Array | None = None
    mlp_post_norm_bias: jax.Array | None = None


@struct.dataclass
class DecoderParams:
    """All weights of a decoder; None: its family has none."""

    embed: jax.Array  # [V, D]
    layers: tuple[LayerParams, ...]
    final_norm: jax.Array  # [D]
    final_norm_bias: jax.Array | None = None  # [D]
    positions: jax.Array | None = None  # [positions, D], added to embeddings
    head: jax.Array | None = None  # [V, D]; None: it is the embedding

    @property
    def output_head(self) -> jax.Array:
        """[V, D], what logits are products with."""
        return self.embed if self.head is None else self.head

    def to_dict(self) -> dict[str, Any]:
        """Returns nested dicts of what is there, by name: `{"embed": ..., "layers": ({"attn_norm": ...}, ...)}`."""
        return _present(self) | {"layers": tuple(map(_present, self.layers))}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> DecoderParams:
        """Inverts `to_dict`."""
        return cls(**found | {"layers": tuple(LayerParams(**layer) for layer in found["layers"])})


def _present(weights: LayerParams | DecoderParams) -> dict[str, Any]:
    named = {field.name: getattr(weights, field.name) for field in dataclasses.fields(weights)}
    return {name: value for name, value in named.items() if value is not None}


def declare(config: DecoderConfig) -> DecoderParams:
    """Declares every weight: returns the params with a `Leaf` in place of each array."""
    names = NAMES[config.names]
    D, N, K, H = config.width, config.num_heads, config.num_kv_heads, config.head_dim

    def norm(key: str, name: str) -> dict[str, Leaf]:
        leaves = {key: leaf_of.vector([f"{name}.weight"], [D], 1.0, offset=names.norm_offset)}
        if config.norm == "layer":
            leaves[f"{key}_bias"] = leaf_of.vector([f"{name}.bias"], [D], 0.0)
        return leaves

    def matrix(
        key: str,
        parts: Iterable[str],
        outs: Iterable[int],
        fan_in: int,
        axes: Axes,
        *,
        experts: int = 0,
        rows: np.ndarray | None = None,
        gain: np.ndarray | None = None,
    ) -> dict[str, Leaf]:
        parts, outs = tuple(parts), tuple(outs)
        outs = outs if len(parts) > 1 else (sum(outs),)
        weights, shapes = [f"{name}.weight" for name in parts], [(out, fan_in) for out in outs]
        leaves = {key: leaf_of.matrix(weights, shapes, axes, experts=experts, rows=rows, gain=gain)}
        if key in config.biases:
            biases = [f"{name}.bias" for name in parts]
            leaves[f"{key}_bias"] = leaf_of.vector(biases, outs, 0.0, axes[1], rows=rows, gain=gain)
        return leaves

    def qkv(at: str) -> dict[str, Leaf]:
        rows, gain = _qkv_rows(config, names.heads_apart), _rotary_gain(config)
        qkv_gain = None
        if gain is not None and not config.qk_norm:
            of_head = np.concatenate([np.tile(gain, N // K + 1), np.ones(H, np.float32)])
            qkv_gain = np.tile(of_head, K)
        parts = [at + part for part in names.wqkv]
        leaves = matrix("wqkv", parts, (N * H, K * H, K * H), D, (None, "heads"), rows=rows, gain=qkv_gain)
        if config.qk_norm:
            for key, name in (("q_norm", names.q_norm), ("k_norm", names.k_norm)):
                channels = _head_channels(config)
                channels = np.arange(H) if channels is None and gain is not None else channels
                head = dict(rows=channels, gain=gain, offset=names.norm_offset)
                leaves[key] = leaf_of.vector([f"{at}{name}.weight"], [H], 1.0, **head)
        return leaves | matrix("wo", [at + names.wo], [D], N * H, ("heads", None))

    def latent_qkv(at: str) -> dict[str, Leaf]:
        R, C, V = config.latent_rank, config.still_channels, config.value_channels
        of_queries, of_keys = (_latent_rows(config, *sizes) for sizes in ((N, C), (1, R)))
        leaves = matrix("wq", [at + names.wq], [N * (C + config.rotated)], D, (None, "heads"), **of_queries)
        leaves |= matrix("w_latent", [at + names.w_latent], [R + config.rotated], D, (None, None), **of_keys)
        leaves["latent_norm"] = leaf_of.vector([f"{at}{names.latent_norm}.weight"], [R], 1.0)
        for key, channels, turned in (("w_uk", slice(0, C), False), ("w_uv", slice(C, C + V), True)):
            leaves[key] = leaf_of.up_projection(at + names.w_ukv, N, channels, R, C + V, turned=turned)
        return leaves | matrix("wo", [at + names.wo], [D], N * V, ("heads", None))

    def feed_forward(key: str, own: str, width: int, experts: int = 0) -> dict[str, Leaf]:
        up, down, leaves = (None, "ffn"), ("ffn", None), {}
        if config.gated and names.w_gate == names.w_up:
            for part, rows in (("w_gate", np.arange(width)), ("w_up", np.arange(width, 2 * width))):
                leaves |= matrix(key + part, [own + names.w_up], [2 * width], D, up, experts=experts, rows=rows)
        else:
            if config.gated:
                leaves |= matrix(f"{key}w_gate", [own + names.w_gate], [width], D, up, experts=experts)
            leaves |= matrix(f"{key}w_up", [own + names.w_up], [width], D, up, experts=experts)
        return leaves | matrix(f"{key}w_down", [own + names.w_down], [D], width, down, experts=experts)

    def layer(i: int) -> LayerParams:
        at = names.layer.format(i)
        dense = i < config.dense_layers
        E, F = (0, config.dense_ffn_width) if dense else (config.num_experts, config.ffn_width)
        leaves = norm("attn_norm", at + names.attn_norm) | (latent_qkv if config.latent_rank else qkv)(at)
        leaves |= norm("mlp_norm", at + names.mlp_norm)
        if config.post_norms:
            leaves |= norm("attn_post_norm", at + names.attn_post_norm)
            leaves |= norm("mlp_post_norm", at + names.mlp_post_norm)
        if E:
            leaves |= matrix("router", [at + names.router], [E], D, (None, None))
        if E and config.shared_ffn_width:
            leaves |= feed_forward("shared_", at + names.shared_expert, config.shared_ffn_width)
        return LayerParams(**leaves | feed_forward("", at + (names.expert if E else names.dense), F, E))

    leaves = {"embed": leaf_of.plain(names.embed, (config.vocab_size, D), ("vocab", None))}
    if config.learned_positions:
        shape, skipped = (config.learned_positions, D), names.skipped_positions
        leaves["positions"] = leaf_of.plain(names.positions, shape, (None, None), skipped=skipped)
    if not config.tied_embeddings:
        leaves["head"] = leaf_of.plain(names.head, (config.vocab_size, D), ("vocab", None))
    layers = tuple(layer(i) for i in range(config.num_layers))
    return DecoderParams(layers=layers, **leaves, **norm("final_norm", names.final_norm))


def split_qkv(config: DecoderConfig, wqkv: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Splits [..., (N + 2 K) H], the outputs of wqkv, into queries [..., N, H], keys and values [..., K, H]."""
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    by_head = wqkv.reshape(*wqkv.shape[:-1], K, N // K + 2, H)
    return by_head[..., :-2, :].reshape(*wqkv.shape[:-1], N, H), by_head[..., -2, :], by_head[..., -1, :]


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
