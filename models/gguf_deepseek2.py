"""What GGUF files of DeepSeek-V2 say in their own way: latent attention, shared experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from models.leaf import Index, Tensor

ARCHITECTURE = "deepseek2"

# Names of tensors of a block, beside those that all architectures have.
BLOCK = {
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
# The parts of kv_b_proj in files since 2025.
UP_OF_KEYS, UP_OF_VALUES, UP = "attn_k_b", "attn_v_b", "self_attn.kv_b_proj"

_FIELDS = {
    "attention.kv_lora_rank": "kv_lora_rank",
    "rope.dimension_count": "qk_rope_head_dim",
    "leading_dense_block_count": "first_k_dense_replace",
    "expert_count": "n_routed_experts",
    "expert_shared_count": "n_shared_experts",
}
_OPTIONAL = {"expert_weights_scale": "routed_scaling_factor", "expert_weights_norm": "norm_topk_prob"}
_SIZES = {"attention.key_length_mla", "attention.value_length_mla"}
KEYS = {*_FIELDS, *_OPTIONAL, *_SIZES, "rope.scaling.yarn_log_multiplier"}
# Softmax, and the experts of all groups.
NEUTRAL = {"expert_gating_func": 1, "expert_group_count": 1, "expert_group_used_count": 1}


def fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of config.json that only this architecture has.

    Args:
      given: the metadata, without the architecture before keys.

    Raises:
      ValueError: a key is missing.
    """

    def size(key: str) -> int:
        if not isinstance(given.get(key), int):
            raise ValueError(f"{ARCHITECTURE}.{key} is {given.get(key)!r}, expected an integer.")
        return given[key]

    found = {field: size(key) for key, field in _FIELDS.items()} | {"q_lora_rank": None}
    found |= {field: given[key] for key, field in _OPTIONAL.items() if key in given}
    # Files before 2025 have the sizes of a head under the names that other architectures use.
    of = lambda name: size(f"attention.{name}_mla" if f"attention.{name}_mla" in given else f"attention.{name}")
    return found | {"v_head_dim": of("value_length"), "qk_nope_head_dim": of("key_length") - found["qk_rope_head_dim"]}


def yarn(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of rope_scaling that only this architecture has.

    Raises:
      ValueError: the multiplier is missing, or there is a factor of attention beside it.
    """
    multiplier, factor = given.get("rope.scaling.yarn_log_multiplier"), given.get("rope.scaling.attn_factor", 1.0)
    if "rope.scaling.yarn_attn_factor" in given:
        raise ValueError(f"{ARCHITECTURE}.rope.scaling.yarn_attn_factor is not supported beside yarn_log_multiplier.")
    if not multiplier or factor != 1.0:
        raise ValueError(
            f"{ARCHITECTURE}.rope.scaling.yarn_log_multiplier is {multiplier} and attn_factor {factor}, expected a "
            "positive number and 1.0."
        )
    return {"mscale": 10 * multiplier, "mscale_all_dim": 10 * multiplier}


class UpProjections:
    """kv_b_proj [N (C + V), R], of one tensor for keys [N, R, C] and one for values [N, V, R]."""

    dtype = np.dtype(np.float32)

    def __init__(self, of_keys: Tensor, of_values: Tensor):
        self._of_keys, self._of_values = of_keys, of_values
        self._of_head = of_keys.shape[2] + of_values.shape[1]
        self.shape = (of_keys.shape[0] * self._of_head, of_keys.shape[1])

    def __getitem__(self, index: Index) -> np.ndarray:
        rows, rank = index
        heads = slice(rows.start // self._of_head, -(-rows.stop // self._of_head))
        keys, values = self._of_keys[heads, rank].swapaxes(1, 2), self._of_values[heads, :, rank]
        whole = np.concatenate([keys, values], axis=1).reshape(-1, keys.shape[2])
        first = heads.start * self._of_head
        return whole[rows.start - first : rows.stop - first]
