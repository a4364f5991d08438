"""What config.json of each supported architecture means: one short function a family, from its fields to a config.

Defaults are those of the architecture's configuration class in transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from models.config import DecoderConfig
from models.config_defaults import DEFAULTS
from models.rope_scaling import logit_gain, positive, read_scaling

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_ROPE_FIELDS = {
    "type",
    "rope_type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "short_factor",
    "long_factor",
}
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


class Fields:
    """The fields of a config.json; null is absent, and what a family does not follow must have its neutral value."""

    def __init__(self, fields: Mapping[str, Any]):
        self._fields = fields

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or the default."""
        value = self._fields.get(key)
        return default if value is None else value

    def size(self, key: str, default: int | None = None, *, least: int | None = 1) -> int:
        """An integer that is not below the least."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{key} is {value!r}, expected an integer.")
        if least is not None and value < least:
            raise ValueError(f"{key} is {value}, expected at least {least}.")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        return positive(key, self.get(key, default))

    def window(self) -> int | None:
        """Returns the tokens of a sliding window; none is written as null or as 0."""
        window = self.size("sliding_window", 0, least=None)
        if window < 0:
            raise ValueError(f"sliding_window is {window}, expected at least 1 token, or null or 0 for none.")
        return window or None

    def activation(self, key: str, default: str) -> str:
        """The name that `DecoderConfig.activation` has for a function."""
        value = self.get(key, default)
        if not isinstance(value, str) or value not in _ACTIVATIONS:
            raise ValueError(f"{key} is {value!r}, expected one of {', '.join(_ACTIVATIONS)}.")
        return _ACTIVATIONS[value]

    def expect(self, **neutral: Any) -> None:
        """Refuses fields that ask for something the decoder does not do."""
        for key, value in neutral.items():
            if self.get(key, value) != value:
                raise ValueError(f"{key} is {self._fields[key]!r}, expected {value!r}.")

    def section(self, key: str) -> Mapping[str, Any]:
        """An object; absent: an empty one."""
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            raise ValueError(f"{key} is {value!r}, expected an object.")
        return value

    def layer_types(self, default: Callable[[int], str]) -> tuple[int, ...]:
        """Indices of the local layers, from `layer_types` or from a rule."""
        kinds = self.get("layer_types") or [default(i) for i in range(self.size("num_hidden_layers"))]
        if not isinstance(kinds, list):
            raise ValueError(f"layer_types is {kinds!r}, expected a list.")
        if other := [kind for kind in kinds if kind not in (_LOCAL, _GLOBAL)]:
            raise ValueError(f"layer_types has {other}, expected only {_GLOBAL!r} and {_LOCAL!r}.")
        if len(kinds) != (layers := self.size("num_hidden_layers")):
            raise ValueError(f"layer_types has {len(kinds)} entries, expected num_hidden_layers, {layers}.")
        return tuple(i for i, kind in enumerate(kinds) if kind == _LOCAL)

    def rope(self, kind: str | None = None) -> dict[str, Any]:
        """The fields of rotary positions: transformers 4 keeps them in two places, transformers 5 in one.

        Args:
          kind: of a layer, where every kind has rotary positions of its own.
        """
        found = {"rope_theta": self.get("rope_theta")}
        for key in ("rope_scaling", "rope_parameters"):
            rope = self.section(key)
            if set(rope) <= {_LOCAL, _GLOBAL}:
                rope = rope.get(kind) or {}
                if not isinstance(rope, Mapping):
                    raise ValueError(f"{kind} of {key} is {rope!r}, expected an object.")
            rope = {name: value for name, value in rope.items() if value is not None}
            if other := set(rope) - _ROPE_FIELDS:
                raise ValueError(f"{key} is {self._fields[key]}, of which {sorted(other)} are not supported.")
            found.update(rope)
        return found


def read_config(name: str, fields: Mapping[str, Any], context: int | None = None) -> DecoderConfig:
    """The config that a config.json describes.

    Args:
      name: of the model.
      fields: of the file.
      context: tokens that the caller needs, for models whose rotary frequencies depend on them; None: as many as the
        model takes with those of short contexts.

    Raises:
      ValueError: an unknown architecture, or a field this decoder does not follow.
    """
    text = fields.get("text_config") or {}
    if not isinstance(text, Mapping):
        raise ValueError(f"text_config is {text!r}, expected an object.")
    architecture = architecture_of(fields)
    if architecture in TEXT_TOWERS:
        architecture, fields = TEXT_TOWERS[architecture], {**fields, **text}
    if architecture not in FAMILIES:
        supported = ", ".join([*FAMILIES, *TEXT_TOWERS])
        raise ValueError(f"architectures is {fields.get('architectures')}, supported: {supported}.")
    given = Fields({**DEFAULTS.get(architecture, {}), **fields})
    given.expect(quantization_config=None)
    return DecoderConfig(name=name, **FAMILIES[architecture](given, context))


def architecture_of(fields: Mapping[str, Any]) -> str | None:
    """Returns the first name in `architectures` of a config.json, or None."""
    names = fields.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def _common(f: Fields, context: int | None, *, rope_base: float = 10000.0, tied: bool = False) -> dict[str, Any]:
    """What Llama and all that came after it have in common."""
    heads = f.size("num_attention_heads")
    head_dim = f.size("head_dim", f.size("hidden_size") // heads)
    return {
        "vocab_size": f.size("vocab_size"),
        "num_layers": f.size("num_hidden_layers"),
        "width": f.size("hidden_size"),
        "num_heads": heads,
        "num_kv_heads": f.size("num_key_value_heads", heads),
        "head_dim": head_dim,
        "ffn_width": f.size("intermediate_size"),
        "norm_eps": f.number("rms_norm_eps", 1e-6),
        "activation": f.activation("hidden_act", "silu"),
        "tied_embeddings": bool(f.get("tie_word_embeddings", tied)),
        **_rotary(f, context, head_dim, rope_base),
    }


def _rotary(f: Fields, context: int | None, head_dim: int, base: float, share: float = 1.0) -> dict[str, Any]:
    """Rotary positions of the global layers, of this share of a head's channels where the file does not say it."""
    rope, longest = f.rope(_GLOBAL), f.size("max_position_embeddings")
    base = positive("rope_theta", rope["rope_theta"] or base)
    share = positive("partial_rotary_factor", rope.get("partial_rotary_factor", f.get("partial_rotary_factor", share)))
    channels = int(head_dim * share)
    scaling = read_scaling(
        rope,
        base=base,
        channels=channels,
        trained=f.size("original_max_position_embeddings", longest),
        longest=longest,
        context=context,
    )
    return {
        "rope_base": base,
        "rotary_channels": None if channels == head_dim else channels,
        "rope_divisors": scaling.rope_divisors,
        "rope_gain": scaling.rope_gain,
        "max_positions": scaling.max_positions or longest,
    }


def _with_window(f: Fields, config: dict[str, Any], layers: tuple[int, ...] | None = None) -> dict[str, Any]:
    """Adds a sliding window, in all layers unless told otherwise; one that no context exceeds is none."""
    window = f.window()
    if window is None or layers == () or window >= max(config["max_positions"], f.size("max_position_embeddings")):
        return config
    return config | {"window": window, "local_layers": tuple(range(config["num_layers"])) if layers is None else layers}


def _llama(f: Fields, context: int | None) -> dict[str, Any]:
    f.expect(partial_rotary_factor=1.0)
    if f.window():
        raise ValueError(f"sliding_window is {f.window()}, expected none.")
    if f.layer_types(lambda i: _GLOBAL):
        raise ValueError(f"layer_types has {_LOCAL!r}, expected only {_GLOBAL!r}.")
    biases = (("wqkv", "wo") if f.get("attention_bias") else ()) + (
        ("w_gate", "w_up", "w_down") if f.get("mlp_bias") else ()
    )
    return _common(f, context) | {"biases": biases}


def _mistral(f: Fields, context: int | None) -> dict[str, Any]:
    f.expect(attention_bias=False, mlp_bias=False)
    return _with_window(f, _common(f, context))


def _qwen2(f: Fields, context: int | None) -> dict[str, Any]:
    return _with_qwen_window(f, _common(f, context)) | {"biases": ("wqkv",)}


def _qwen3(f: Fields, context: int | None) -> dict[str, Any]:
    biases = ("wqkv", "wo") if f.get("attention_bias") else ()
    return _with_qwen_window(f, _common(f, context)) | {"qk_norm": True, "biases": biases}


def _with_qwen_window(f: Fields, config: dict[str, Any]) -> dict[str, Any]:
    if not f.get("use_sliding_window", False):
        return config
    first = f.size("max_window_layers", 28, least=0)
    return _with_window(f, config, f.layer_types(lambda i: _LOCAL if i >= first else _GLOBAL))


def _qwen3_moe(f: Fields, context: int | None) -> dict[str, Any]:
    f.expect(decoder_sparse_step=1, mlp_only_layers=[])
    return _qwen3(f, context) | {
        "names": "qwen3_moe",
        "ffn_width": f.size("moe_intermediate_size"),
        "num_experts": f.size("num_experts", f.get("num_local_experts")),  # transformers 5 saves the other name
        "experts_per_token": f.size("num_experts_per_tok"),
        "expert_weights_sum_to_one": bool(f.get("norm_topk_prob", False)),
    }


def _mixtral(f: Fields, context: int | None) -> dict[str, Any]:
    return _with_window(f, _common(f, context, rope_base=1e6)) | {
        "names": "mixtral",
        "num_experts": f.size("num_local_experts"),
        "experts_per_token": f.size("num_experts_per_tok"),
    }


def _gemma(f: Fields, context: int | None, *, rope_base: float) -> dict[str, Any]:
    f.expect(attention_bias=False, use_bidirectional_attention=False)
    return _common(f, context, rope_base=rope_base, tied=True) | {
        "names": "gemma",
        "activation": f.activation("hidden_activation", "gelu_pytorch_tanh"),
        "query_scale": f.number("query_pre_attn_scalar", 256) ** -0.5,
        "embed_scale": float(f.size("hidden_size")) ** 0.5,
        "post_norms": True,
    }


def _gemma2(f: Fields, context: int | None) -> dict[str, Any]:
    local = f.layer_types(lambda i: _GLOBAL if i % 2 else _LOCAL)
    return _with_window(f, _gemma(f, context, rope_base=10000.0), local) | {
        "attention_cap": f.number("attn_logit_softcapping", 50.0),
        "output_cap": f.number("final_logit_softcapping", 30.0),
    }


def _gemma3(f: Fields, context: int | None) -> dict[str, Any]:
    f.expect(attn_logit_softcapping=None)
    every = f.size("sliding_window_pattern", 6)
    local = f.layer_types(lambda i: _LOCAL if (i + 1) % every else _GLOBAL)
    cap = f.get("final_logit_softcapping")
    of_local = f.section("rope_parameters").get(_LOCAL) or {}
    if not isinstance(of_local, dict):
        raise ValueError(f"{_LOCAL} of rope_parameters is {of_local!r}, expected an object.")
    if (kind := of_local.get("rope_type") or "default") != "default":
        raise ValueError(f"rope_type of {_LOCAL} is {kind!r}, expected 'default'.")
    # What its files call max_position_embeddings is the context after its linear scaling.
    longest = {"max_positions": f.size("max_position_embeddings")}
    return _with_window(f, _gemma(f, context, rope_base=1e6) | longest, local) | {
        "qk_norm": True,
        "local_rope_base": positive(
            f"rope_theta of {_LOCAL}", of_local.get("rope_theta") or f.number("rope_local_base_freq", 10000.0)
        ),
        "output_cap": None if cap is None else f.number("final_logit_softcapping"),
    }


def _phi3(f: Fields, context: int | None) -> dict[str, Any]:
    f.expect(attention_bias=False)
    return _with_window(f, _common(f, context)) | {"names": "phi3"}


def _gpt_neox(f: Fields, context: int | None) -> dict[str, Any]:
    f.expect(attention_bias=True)
    heads, width = f.size("num_attention_heads"), f.size("hidden_size")
    head_dim = width // heads
    return {
        "vocab_size": f.size("vocab_size"),
        "num_layers": f.size("num_hidden_layers"),
        "width": width,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": head_dim,
        "ffn_width": f.size("intermediate_size"),
        "norm": "layer",
        "norm_eps": f.number("layer_norm_eps", 1e-5),
        "activation": f.activation("hidden_act", "gelu"),
        "gated": False,
        "parallel": bool(f.get("use_parallel_residual", True)),
        "biases": ("wqkv", "wo", "w_up", "w_down"),
        "tied_embeddings": bool(f.get("tie_word_embeddings", False)),
        "names": "gpt_neox",
        **_rotary(f, context, head_dim, f.number("rotary_emb_base", 10000.0), f.number("rotary_pct", 0.25)),
    }


def _opt(f: Fields, context: int | None) -> dict[str, Any]:
    width, heads = f.size("hidden_size"), f.size("num_attention_heads")
    f.expect(
        do_layer_norm_before=True,
        _remove_final_layer_norm=False,
        word_embed_proj_dim=width,
        enable_bias=True,
        layer_norm_elementwise_affine=True,
    )
    positions = f.size("max_position_embeddings")
    return {
        "vocab_size": f.size("vocab_size"),
        "num_layers": f.size("num_hidden_layers"),
        "width": width,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": width // heads,
        "ffn_width": f.size("ffn_dim"),
        "norm": "layer",
        "activation": f.activation("activation_function", "relu"),
        "gated": False,
        "biases": ("wqkv", "wo", "w_up", "w_down"),
        "tied_embeddings": bool(f.get("tie_word_embeddings", True)),
        "names": "opt",
        "rotary_channels": 0,
        "learned_positions": positions,
        "max_positions": positions,
    }


def _deepseek_v2(f: Fields, context: int | None) -> dict[str, Any]:
    f.expect(
        attention_bias=False,
        mlp_bias=False,
        q_lora_rank=None,
        topk_method="greedy",
        scoring_func="softmax",
        moe_layer_freq=1,
    )
    rank, rotary, still = f.size("kv_lora_rank", 512), f.size("qk_rope_head_dim", 64), f.size("qk_nope_head_dim", 128)
    rope = f.rope(_GLOBAL)
    normed = bool(f.get("norm_topk_prob", False))
    return _common(f, context) | _rotary(f, context, rotary, 10000.0) | {
        "names": "deepseek_v2",
        "num_kv_heads": 1,
        "head_dim": rank + rotary,
        "rotary_channels": rotary,
        "latent_rank": rank,
        "still_channels": still,
        "value_channels": f.size("v_head_dim", 128),
        "query_scale": (still + rotary) ** -0.5 * logit_gain(rope) ** 2,
        "ffn_width": f.size("moe_intermediate_size", 1407),
        "num_experts": f.size("n_routed_experts", 64),
        "experts_per_token": f.size("num_experts_per_tok"),
        "expert_weights_sum_to_one": normed,
        "expert_scale": 1.0 if normed else f.number("routed_scaling_factor", 1.0),
        "shared_ffn_width": f.size("n_shared_experts", 2, least=0) * f.size("moe_intermediate_size", 1407),
        "dense_layers": f.size("first_k_dense_replace", 0, least=0),
        "dense_ffn_width": f.size("intermediate_size"),
    }


FAMILIES: dict[str, Callable[[Fields, int | None], dict[str, Any]]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Gemma2ForCausalLM": _gemma2,
    "Gemma3ForCausalLM": _gemma3,
    "Phi3ForCausalLM": _phi3,
    "GPTNeoXForCausalLM": _gpt_neox,
    "OPTForCausalLM": _opt,
    "MixtralForCausalLM": _mixtral,
    "Qwen3MoeForCausalLM": _qwen3_moe,
    "DeepseekV2ForCausalLM": _deepseek_v2,
}
"""By the name in `architectures` of config.json."""

TEXT_TOWERS = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}
"""Models of images and text, by the name in `architectures`, of which the language model is read."""
