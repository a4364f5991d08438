"""Hugging Face transformers on the weights of one of our models: the peer that speed is compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from experiments.stopwatch import seconds
from models import DecoderConfig, Model
from models.params import split_qkv

_LLAMA_FIELDS = 12  # of a config, before those that make another family


class TransformersPeer:
    """The same weights in transformers' LlamaForCausalLM: SDPA attention, a DynamicCache, greedy.

    Raises:
      ImportError: torch or transformers is not installed.
      ValueError: the model is not a plain Llama.
    """

    def __init__(self, model: Model, threads: int):
        self._model = llama(model)
        import torch
        import transformers

        self._torch, self._new_cache = torch, transformers.DynamicCache
        torch.set_num_threads(threads)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """f32[V] after the prompt."""
        with self._torch.inference_mode():
            return self._model(self._torch.tensor([list(ids)]), logits_to_keep=1).logits[0, -1].numpy()

    def __call__(self, ids: Sequence[int], new_tokens: int) -> tuple[float, float, tuple[int, ...]]:
        """Seconds of a prefill, seconds of the decoding, the tokens."""
        cache, tokens = self._new_cache(), []

        def step(ids):
            out = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return out.logits[:, -1:].argmax(-1)

        def write(token):
            for _ in range(new_tokens):
                tokens.append(int(token))
                token = step(token)

        with self._torch.inference_mode():
            prompt = self._torch.tensor([list(ids)])
            prefill, token = seconds(lambda: step(prompt))
            decode, _ = seconds(lambda: write(token))
        return prefill, decode, tuple(tokens)


def llama(model: Model):
    """Returns transformers' LlamaForCausalLM with the weights of a model, float32.

    Raises:
      ImportError: torch or transformers is not installed.
      ValueError: the model is not a plain Llama.
    """
    config = model.config
    if config != DecoderConfig(*dataclasses.astuple(config)[:_LLAMA_FIELDS]):
        raise ValueError(f"{config.name} is not a plain Llama, the one family that this peer runs.")
    import torch
    import transformers

    peer = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.ffn_width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rope_theta=config.rope_base,
            rms_norm_eps=config.norm_eps,
            max_position_embeddings=config.max_positions,
            tie_word_embeddings=config.tied_embeddings,
            attn_implementation="sdpa",
        )
    ).eval()
    state = {name: torch.from_numpy(np.array(value)) for name, value in huggingface_tensors(model).items()}
    peer.load_state_dict(state)
    return peer


def huggingface_tensors(model: Model) -> dict[str, np.ndarray]:
    """The params under Hugging Face's names, float32 and [out, in]: the way back from `models.weights`."""
    config = model.config
    tensors = {
        "model.embed_tokens": model.params.embed,
        "model.norm": model.params.final_norm,
        "lm_head": model.params.output_head,
    }
    for i, layer in enumerate(model.params.layers):
        q, k, v = (np.asarray(x).reshape(config.width, -1).T for x in split_qkv(config, layer.wqkv))
        parts = {
            "input_layernorm": layer.attn_norm,
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": np.asarray(layer.wo).T,
            "post_attention_layernorm": layer.mlp_norm,
            "mlp.gate_proj": np.asarray(layer.w_gate).T,
            "mlp.up_proj": np.asarray(layer.w_up).T,
            "mlp.down_proj": np.asarray(layer.w_down).T,
        }
        tensors |= {f"model.layers.{i}.{name}": value for name, value in parts.items()}
    return {f"{name}.weight": np.asarray(value, np.float32) for name, value in tensors.items()}
