"""Takes rows of what was read: forks, and documents of a batch one by one."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import Cache, LayerCache
from kvjax.drivers import Run
from kvjax.limits import can_be_seen


def cache_rows(cache: Cache, rows: jax.Array | Sequence[int]) -> Cache:
    """Takes rows of a cache, any of them any number of times.

    What all rows share (a single row of slots) stays shared and is not copied; what groups of rows share is copied for
    each row.

    Args:
      cache: of B rows.
      rows: i32[n], from 0 to B - 1.

    Raises:
      ValueError: rows are not a list of integers of these rows.
    """
    B = cache.length.shape[0]
    rows = jnp.asarray(rows, jnp.int32)
    if rows.ndim != 1 or not rows.shape[0]:
        raise ValueError(f"rows must be at least one index in a list, got shape {list(rows.shape)}.")
    if can_be_seen(rows) and (int(rows.min()) < 0 or int(rows.max()) >= B):
        raise ValueError(f"rows must be from 0 to {B - 1}, got {np.asarray(rows).tolist()}.")

    def of_segment(segment, whole):
        count = whole.pos.shape[0]
        index = rows if count == B else rows // (B // count)
        leaf = lambda x, spec: x if x.shape[0] == 1 < B or not _by_row(spec) else jnp.take(x, index, axis=0)
        return jax.tree.map(leaf, segment, segment.axes())

    pairs = zip(cache.layers, cache.inlined().layers)
    layers = tuple(LayerCache(tuple(map(of_segment, layer.segments, of.segments))) for layer, of in pairs)
    shared = {name: of_segment(segment, segment) for name, segment in cache.shared.items()}
    return cache.replace(layers=layers, shared=shared, length=jnp.take(cache.length, rows))


def taken_rows(run: Run, rows: jax.Array | Sequence[int]) -> Run:
    """Takes rows of a run: forks that do not touch each other; see `cache_rows`.

    To share all that was read so far instead of copying it, attach it: `kvjax.before`.

    Raises:
      ValueError: rows are wrong, or a method's state cannot be told apart by row.
    """
    B, index = run.logits.shape[0], jnp.asarray(rows, jnp.int32)
    cache = cache_rows(run.cache, rows)
    for x in jax.tree.leaves(run.state):
        if x.ndim and x.shape[0] != B:
            raise ValueError(f"taken_rows cannot tell the rows of a method's state apart, got shape {list(x.shape)}.")
    take = lambda x: jnp.take(x, index, axis=0) if x.ndim else x
    logits, state, prompt, first = jax.tree.map(take, (run.logits, run.state, run.prompt, run.first))
    return run._replace(logits=logits, cache=cache, state=state, prompt=prompt, first=first)


def _by_row(spec) -> bool:
    return len(spec) > 0 and spec[0] == "batch"
