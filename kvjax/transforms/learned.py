"""Hands the arrays that a transform was trained with to it, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvjax.observation import Observation
from kvjax.transforms.base import CacheTransform


def learned(transform: CacheTransform, layers: Sequence[Any]) -> CacheTransform:
    """The transform with `LayerObservation.learned` set in all that it observes.

    Arrays reach it as arguments: in the closure of a scorer, every layer's program would hold those of all layers.

    Args:
      transform: whose scorer reads them.
      layers: a pytree of arrays for each layer.

    Raises:
      ValueError: the cache has another number of layers (when it runs).
    """

    def shown(observation: Observation) -> Observation:
        if len(layers) != len(observation.layers):
            raise ValueError(f"What was trained is of {len(layers)} layers, the cache has {len(observation.layers)}.")
        seen = tuple(layer.replace(learned=arrays) for layer, arrays in zip(observation.layers, layers))
        return observation.replace(layers=seen)

    return transform.map(lambda run: lambda *of: run(*of[:-1], shown(of[-1])))
