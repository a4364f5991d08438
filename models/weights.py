"""What follows from the declaration of a decoder's weights: arrays from files, random ones, shapes and named axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.sharding import PartitionSpec as P

from models.config import DecoderConfig
from models.int8 import Int8Matrix, Weight, quantized
from models.leaf import Index, Leaf, Tensor
from models.names import NAMES
from models.params import DecoderParams, declare

_LONG = 1 << 30  # bytes of params from which loading shows a progress bar

Shardings = Callable[[Any, Any], Any]
"""From the named axes of the params and their shapes to a `jax.sharding.Sharding` for each."""


def build_params(
    config: DecoderConfig,
    get: Callable[[str], Tensor],
    dtype,
    *,
    int8: bool = False,
    shardings: Shardings | None = None,
) -> DecoderParams:
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
      The params, an array in place of each `Leaf` of `models.params.declare`.

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


def abstract_params(config: DecoderConfig, dtype, *, int8: bool = False) -> DecoderParams:
    """Returns the params as `jax.ShapeDtypeStruct`s: nothing is allocated. Arguments as `build_params`."""

    def shape(leaf: Leaf):
        if int8 and leaf.multiplied:
            scale = jax.ShapeDtypeStruct((*leaf.shape[:-2], leaf.shape[-1]), jnp.float32)
            return Int8Matrix(jax.ShapeDtypeStruct(leaf.shape, jnp.int8), scale)
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype))

    return jax.tree.map(shape, declare(config))


def param_axes(config: DecoderConfig, *, int8: bool = False) -> DecoderParams:
    """Returns the named axes of every leaf of the params, for `kvjax.sharding`: what has no name is on every shard.

    Arguments as `build_params`.
    """

    def axes(leaf: Leaf):
        if int8 and leaf.multiplied:
            return Int8Matrix(P(*leaf.axes), P(*leaf.axes[:-2], leaf.axes[-1]))
        return P(*leaf.axes)

    return jax.tree.map(axes, declare(config))


def random_params(config: DecoderConfig, key: jax.Array, dtype) -> DecoderParams:
    """Returns untrained params: norms are one, biases zero, matrices normal with variance 1 / fan_in.

    Args:
      config: the decoder's shape.
      key: a PRNG key; the same key gives the same params, rounded, in every dtype.
      dtype: of every leaf.
    """
    leaves, treedef = jax.tree.flatten(declare(config).to_dict())  # by name: a field that moves changes no number

    def draw(i: int, leaf: Leaf) -> jax.Array:
        if leaf.untrained is not None:
            return jnp.full(leaf.shape, leaf.untrained, dtype)
        normal = jax.random.normal(jax.random.fold_in(key, i), leaf.shape, jnp.float32)
        return (normal * leaf.shapes[0][-1] ** -0.5).astype(dtype)

    drawn = jax.tree.unflatten(treedef, [draw(i, leaf) for i, leaf in enumerate(leaves)])
    return DecoderParams.from_dict(drawn)
