"""What the files of each family call their tensors."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Names:
    """What the files of a family call their tensors, without `.weight` or `.bias`; those of a layer follow `layer`.

    Attributes:
      layer: what names of the i-th layer open with.
      wqkv: one tensor, or query, key and value.
      w_gate: empty where the feed-forward layer is not gated.
      w_up: that of w_gate where one tensor is both, gate first.
      expert: what the names of expert e open with, in place of the layer's feed-forward.
      shared_expert: the same of the feed-forward beside the experts.
      dense: the same in layers without experts, where others have them.
      norm_offset: added to the weights of norms.
      heads_apart: the rows of the one wqkv tensor are, head after head, its query, key and value.
      skipped_positions: first rows of the table of positions that no token uses.
      ignored: ends of other tensors' names, that follow from the config.
    """

    embed: str = "model.embed_tokens"
    positions: str = ""
    final_norm: str = "model.norm"
    head: str = "lm_head"
    layer: str = "model.layers.{}."
    attn_norm: str = "input_layernorm"
    wqkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    wq: str = "self_attn.q_proj"
    w_latent: str = "self_attn.kv_a_proj_with_mqa"
    latent_norm: str = "self_attn.kv_a_layernorm"
    w_ukv: str = "self_attn.kv_b_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    wo: str = "self_attn.o_proj"
    attn_post_norm: str = "post_attention_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    w_gate: str = "mlp.gate_proj"
    w_up: str = "mlp.up_proj"
    w_down: str = "mlp.down_proj"
    mlp_post_norm: str = "post_feedforward_layernorm"
    router: str = "mlp.gate"
    expert: str = "mlp.experts.{}."
    shared_expert: str = "mlp.shared_experts."
    dense: str = ""
    norm_offset: float = 0.0
    heads_apart: bool = False
    skipped_positions: int = 0
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)


NAMES = {
    "llama": Names(),
    "qwen3_moe": Names(w_gate="gate_proj", w_up="up_proj", w_down="down_proj"),
    "mixtral": Names(
        router="block_sparse_moe.gate",
        expert="block_sparse_moe.experts.{}.",
        w_gate="w1",
        w_up="w3",
        w_down="w2",
    ),
    "deepseek_v2": Names(w_gate="gate_proj", w_up="up_proj", w_down="down_proj", dense="mlp."),
    "gemma": Names(mlp_norm="pre_feedforward_layernorm", norm_offset=1.0),
    "phi3": Names(wqkv=("self_attn.qkv_proj",), w_gate="mlp.gate_up_proj", w_up="mlp.gate_up_proj"),
    "gpt_neox": Names(
        embed="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        head="embed_out",
        layer="gpt_neox.layers.{}.",
        wqkv=("attention.query_key_value",),
        heads_apart=True,
        wo="attention.dense",
        w_gate="",
        w_up="mlp.dense_h_to_4h",
        w_down="mlp.dense_4h_to_h",
        # The causal mask, and what it writes where nothing is seen.
        ignored=("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"),
    ),
    "opt": Names(
        embed="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
        skipped_positions=2,
        final_norm="model.decoder.final_layer_norm",
        layer="model.decoder.layers.{}.",
        attn_norm="self_attn_layer_norm",
        wo="self_attn.out_proj",
        mlp_norm="final_layer_norm",
        w_gate="",
        w_up="fc1",
        w_down="fc2",
    ),
}
"""By `DecoderConfig.names`."""
