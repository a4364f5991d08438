"""Models on a mesh of devices: one way for every program."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

from kvjax import sharding
from models import Model, load_model


@contextlib.contextmanager
def on_mesh(mesh: str | None) -> Iterator[Callable[..., Model]]:
    """Yields `models.load_model` for a mesh, in whose scope all that follows then runs.

    Args:
      mesh: named axes and sizes, see `kvjax.sharding.make_mesh`: weights go straight to their shards. None: one device.
    """
    if mesh is None:
        yield load_model
        return
    devices = sharding.make_mesh(mesh)
    with sharding.use_mesh(devices):
        yield functools.partial(load_model, shardings=functools.partial(sharding.shardings, mesh=devices))
