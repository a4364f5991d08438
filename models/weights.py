"""The parameters of a decoder: one declaration of names and shapes, and three ways to fill it.

Axes: V vocabulary, D width, N query heads, K key/value heads, H head dimension, F feed-forward width. Files store a
matrix as [out, in]; parameters are [in, out], and matrices that read the same input stand side by side in one leaf:

  {"embed": [V, D], "final_norm": [D], "head": [V, D] only when untied, "layers": (layer, ...)}
  layer = {"attn_norm": [D], "wqkv": [D, (N + 2 K) H], "wo": [N H, D],
           "mlp_norm": [D], "w_gate_up": [D, 2 F], "w_down": [F, D]}

The columns of wqkv are the query heads, then the key heads, then the value heads; those of w_gate_up the gate, then up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """One array of the params and the file tensors it is made of, by their Hugging Face names."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    matmul: bool  # multiplied as x @ leaf: [out, in] tensors, concatenated over out, then transposed

    @property
    def shape(self) -> tuple[int, ...]:
        if not self.matmul:
            return self.shapes[0]
        return (self.shapes[0][1], sum(out for out, _ in self.shapes))

    @property
    def fan_in(self) -> int:
        return self.shapes[0][-1]

    def fuse(self, tensors: list[np.ndarray]) -> np.ndarray:
        if not self.matmul:
            return tensors[0]
        return np.ascontiguousarray(np.concatenate([tensor.T for tensor in tensors], axis=1))


def _declare(config: DecoderConfig) -> dict[str, Any]:
    width, ffn = config.width, config.ffn_width
    q_out = config.num_heads * config.head_dim
    kv_out = config.num_kv_heads * config.head_dim

    def plain(name: str, *shape: int) -> _Leaf:
        return _Leaf((f"{name}.weight",), (shape,), matmul=False)

    def matrix(fan_in: int, **parts: int) -> _Leaf:
        names = tuple(f"{name}.weight" for name in parts)
        return _Leaf(names, tuple((out, fan_in) for out in parts.values()), matmul=True)

    def layer(i: int) -> dict[str, _Leaf]:
        at = f"model.layers.{i}"
        attn, mlp = f"{at}.self_attn", f"{at}.mlp"
        return {
            "attn_norm": plain(f"{at}.input_layernorm", width),
            "wqkv": matrix(
                width, **{f"{attn}.q_proj": q_out, f"{attn}.k_proj": kv_out, f"{attn}.v_proj": kv_out}
            ),
            "wo": matrix(q_out, **{f"{attn}.o_proj": width}),
            "mlp_norm": plain(f"{at}.post_attention_layernorm", width),
            "w_gate_up": matrix(width, **{f"{mlp}.gate_proj": ffn, f"{mlp}.up_proj": ffn}),
            "w_down": matrix(ffn, **{f"{mlp}.down_proj": width}),
        }

    leaves = {
        "embed": plain("model.embed_tokens", config.vocab_size, width),
        "final_norm": plain("model.norm", width),
        "layers": tuple(layer(i) for i in range(config.num_layers)),
    }
    if not config.tied_embeddings:
        leaves["head"] = plain("lm_head", config.vocab_size, width)
    return leaves


def build_params(config: DecoderConfig, get: Callable[[str], np.ndarray], dtype) -> dict[str, Any]:
    """Assembles the params from tensors found by name, one leaf at a time.

    Args:
      config: the decoder's shape.
      get: returns a tensor by its Hugging Face name (`model.layers.3.self_attn.q_proj.weight`, [out, in]);
        raises KeyError when there is none.
      dtype: of every leaf.

    Returns:
      The params, as the module describes them, on the default device.

    Raises:
      ValueError: a tensor is missing, or has another shape than `config` gives it, or is not floating point.
    """

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        try:
            tensor = get(name)
        except KeyError:
            raise ValueError(f"Tensor {name} is missing, expected one of shape {list(shape)}.") from None
        if tensor.shape != shape:
            raise ValueError(f"Tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}.")
        if not jnp.issubdtype(tensor.dtype, np.floating) or tensor.dtype.itemsize < 2:
            raise ValueError(f"Tensor {name} is {tensor.dtype}, expected floating point of 16 bits or more.")
        return tensor

    def build(leaf: _Leaf) -> jax.Array:
        # A copy, never an alias: the tensor may be a view of a memory-mapped file.
        return jnp.array(leaf.fuse([take(*part) for part in zip(leaf.names, leaf.shapes)]), dtype)

    return jax.tree.map(build, _declare(config))


def check_names(config: DecoderConfig, found: Iterable[str]) -> None:
    """Refuses a file that holds tensors this decoder would not use, such as biases or quantization scales.

    Args:
      config: the decoder's shape.
      found: the names of all tensors of the file, in Hugging Face's naming where they have one.

    Raises:
      ValueError: naming tensors that `build_params` would never ask for.
    """
    known = {name for leaf in jax.tree.leaves(_declare(config)) for name in leaf.names}
    known.add("lm_head.weight")  # a second copy of tied embeddings
    # Old checkpoints store the rotary frequencies, which follow from rope_base.
    unknown = sorted(name for name in set(found) - known if not name.endswith("rotary_emb.inv_freq"))
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise ValueError(f"Tensors this decoder does not use: {', '.join(unknown[:3])}{more}.")


def abstract_params(config: DecoderConfig, dtype) -> dict[str, Any]:
    """Returns the params as `jax.ShapeDtypeStruct`s: nothing is allocated."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), _declare(config))


def random_params(config: DecoderConfig, key: jax.Array, dtype) -> dict[str, Any]:
    """Returns untrained params: norms are one, matrices are normal with variance 1 / fan_in.

    Args:
      config: the decoder's shape.
      key: a PRNG key; the same key gives the same params, rounded, in every dtype.
      dtype: of every leaf.
    """
    leaves, treedef = jax.tree.flatten(_declare(config))

    def draw(i: int, leaf: _Leaf) -> jax.Array:
        if len(leaf.shape) == 1:
            return jnp.ones(leaf.shape, dtype)
        normal = jax.random.normal(jax.random.fold_in(key, i), leaf.shape, jnp.float32)
        return (normal * leaf.fan_in**-0.5).astype(dtype)

    return jax.tree.unflatten(treedef, [draw(i, leaf) for i, leaf in enumerate(leaves)])
