"""The shape of a decoder: one frozen, hashable record, the static argument of every jitted program."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

_BIASED = ("wqkv", "wo", "w_gate", "w_up", "w_down")

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and constants of a decoder. The defaults are those of Llama; families differ in these fields only.

    Letters in brackets are the axes of the legend (docs/composing.md, "Axes"). A layer is local, with a sliding window
    and perhaps a rotary base of its own, or global.

    Attributes:
      name: what to call the model in tables.
      vocab_size: rows of the embedding.
      num_layers: [L].
      width: [D], the residual stream.
      num_heads: [N] query heads.
      num_kv_heads: [K] key/value heads; divides `num_heads`.
      head_dim: [H].
      ffn_width: [F], the feed-forward layer, or one expert of it.
      rope_base: theta of the rotary embedding.
      norm_eps: epsilon of every norm.
      max_positions: tokens of the longest context that the model takes with these frequencies: what it was trained on,
        lengthened where its file scales rotary positions; with Phi's frequencies for short contexts, those alone.
      tied_embeddings: whether the output head is the embedding.
      names: key of `models.names.NAMES`, what the tensors of this family's files are called.
      rotary_channels: of a head, the first ones, that rotate; None: all.
      rope_divisors: each frequency is divided by its own (long contexts); empty: by 1.
      rope_gain: rotated channels of queries and of keys are multiplied by it; part of the weights once they are loaded.
      window: tokens that local layers look back over, the query's own included.
      local_layers: their indices.
      local_rope_base: theta of local layers, without divisors; None: as in the others.
      query_scale: multiplies the dot products of attention; None: `H ** -0.5`.
      attention_cap: soft cap of attention's logits.
      output_cap: soft cap of the output logits.
      norm: "rms", or "layer" with mean and bias.
      qk_norm: RMS norm over each head of queries and keys, before their rotation.
      post_norms: RMS norm of what attention and feed-forward add to the stream.
      parallel: attention and feed-forward read the same stream.
      activation: of the feed-forward layer.
      gated: `W_down (f(W_gate x) * W_up x)` instead of `W_down f(W_up x)`.
      biases: which of wqkv, wo, w_gate, w_up, w_down have one.
      embed_scale: multiplies embeddings.
      learned_positions: rows of a table of positions that is added to embeddings; 0: none.
      num_experts: of each feed-forward layer; 0: it is one matrix for all.
      experts_per_token: the likeliest so many are used.
      expert_weights_sum_to_one: their probabilities are divided by their sum.
      expert_scale: multiplies what the experts give.
      shared_ffn_width: of a feed-forward that every token also passes, beside its experts; 0: none.
      dense_layers: first layers, without experts.
      dense_ffn_width: of these.
      latent_rank: [R], a vector of so many channels is what the keys and values of all heads are made of (multi-head
        latent attention); 0: they are made of the residual stream. The one KV head has it and `rotary_channels` beside
        it, and its keys are its values.
      still_channels: [C], of a query head, those that do not rotate and meet the latent vector.
      value_channels: [V], of a head, made of the latent vector.
    """

    name: str
    vocab_size: int
    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_width: int
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    max_positions: int = 2048
    tied_embeddings: bool = True
    names: str = "llama"
    rotary_channels: int | None = None
    rope_divisors: tuple[float, ...] = ()
    rope_gain: float = 1.0
    window: int | None = None
    local_layers: tuple[int, ...] = ()
    local_rope_base: float | None = None
    query_scale: float | None = None
    attention_cap: float | None = None
    output_cap: float | None = None
    norm: Literal["rms", "layer"] = "rms"
    qk_norm: bool = False
    post_norms: bool = False
    parallel: bool = False
    activation: Activation = "silu"
    gated: bool = True
    biases: tuple[str, ...] = ()
    embed_scale: float = 1.0
    learned_positions: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    expert_weights_sum_to_one: bool = True
    expert_scale: float = 1.0
    shared_ffn_width: int = 0
    dense_layers: int = 0
    dense_ffn_width: int = 0
    latent_rank: int = 0
    still_channels: int = 0
    value_channels: int = 0

    def __post_init__(self):
        for size in ("vocab_size", "num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "ffn_width"):
            if getattr(self, size) < 1:
                raise ValueError(f"{size} must be at least 1, got {getattr(self, size)}.")
        if isinstance(self.biases, str) or (unknown := [name for name in self.biases if name not in _BIASED]):
            raise ValueError(
                f"biases must be a tuple of names among {', '.join(_BIASED)}, got "
                f"{self.biases if isinstance(self.biases, str) else unknown[0]!r}."
            )
        absent = {
            "wqkv": "latent attention" if self.latent_rank else "",
            "w_gate": "a feed-forward layer that is not gated" if not self.gated else "",
        }
        if self.num_experts:
            absent |= dict.fromkeys(("w_gate", "w_up", "w_down"), "experts")
        for name in self.biases:
            if absent.get(name):
                raise ValueError(f"biases has {name!r}, which {absent[name]} cannot have.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads, got {self.num_kv_heads} and {self.num_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}.")
        rotated = self.rotated
        if rotated % 2 or not 0 <= rotated <= self.head_dim:
            raise ValueError(f"rotary_channels must be even and at most {self.head_dim}, got {rotated}.")
        if self.rope_divisors and len(self.rope_divisors) != rotated // 2:
            raise ValueError(
                f"rope_divisors must be {rotated // 2}, one for each pair of channels, got {len(self.rope_divisors)}."
            )
        if self.local_layers and (self.window is None or self.window < 1):
            raise ValueError(f"window must be at least 1 token where layers are local, got {self.window}.")
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token must be from 1 to {self.num_experts}, got {self.experts_per_token}."
            )
        if self.latent_rank and (self.num_kv_heads, self.head_dim) != (1, self.latent_rank + rotated):
            raise ValueError(
                f"latent_rank {self.latent_rank} with {rotated} rotary_channels is one KV head of their sum, got "
                f"{self.num_kv_heads} of {self.head_dim}."
            )

    @property
    def rotated(self) -> int:
        """Channels of a head that rotate."""
        return self.head_dim if self.rotary_channels is None else self.rotary_channels

    def window_of(self, layer: int) -> int | None:
        """Tokens that a layer looks back over; None: all."""
        return self.window if layer in self.local_layers else None

    def frequencies(self, layer: int) -> np.ndarray:
        """f32[H / 2], radians per token of each rotary pair of a layer.

        With R rotated channels `base ** (-2 i / R) / divisor[i]` for `i < R / 2`, then zeros. The pair `i` of channels
        is `(i, i + H / 2)`: `models.weights` puts the channels of a partly rotated head in that order.
        """
        own = layer in self.local_layers and self.local_rope_base is not None
        rotated = self.rotated
        found = np.zeros(self.head_dim // 2, np.float32)
        exponent = np.arange(0, rotated, 2, dtype=np.float32) / np.float32(max(rotated, 1))
        found[: rotated // 2] = np.float32(self.local_rope_base if own else self.rope_base) ** -exponent
        if self.rope_divisors and not own:
            found[: rotated // 2] /= np.float32(self.rope_divisors)
        return found
