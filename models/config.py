"""The shape of a decoder: one frozen, hashable record, the static argument of every jitted program."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and constants of a decoder of the Llama family.

    Letters in brackets are the axes of the legend (README, "Axes").

    Attributes:
      name: what to call the model in tables.
      vocab_size: rows of the embedding.
      num_layers: [L].
      width: [D], the residual stream.
      num_heads: [N] query heads.
      num_kv_heads: [K] key/value heads; divides `num_heads`.
      head_dim: [H].
      ffn_width: [F], the gated feed-forward layer.
      rope_base: theta of the rotary embedding.
      norm_eps: epsilon of every RMS norm.
      max_positions: the context length the model was trained for, in tokens.
      tied_embeddings: whether the output head is the embedding.
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

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads, got {self.num_kv_heads} and {self.num_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}.")
