"""Slots in host memory: windows of them are copied to the device and back, the rest is not touched."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kvjax.axes import slot_axis

_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


def in_host_memory(x: jax.Array) -> bool:
    """Whether an array, traced or not, is in host memory (`pinned_host`)."""
    return getattr(jax.typeof(x), "memory_space", _DEVICE) == _HOST


def to_host(segment: Any) -> Any:
    """Moves what a segment has of every slot to host memory, except which token a slot holds.

    Positions are i32[B, K, S]: masks and writes look at all of them.
    """
    return jax.tree.map(lambda x, hosted: jax.device_put(x, _HOST) if hosted else x, segment, is_hosted(segment))


def to_device(tree: Any) -> Any:
    """Moves arrays that are in host memory to the device, whole."""
    return jax.tree.map(lambda x: jax.device_put(x, _DEVICE) if in_host_memory(x) else x, tree)


def is_hosted(segment: Any) -> Any:
    """The tree of a segment with True for what `to_host` moves, also of shapes."""
    return jax.tree.map(lambda x, spec: slot_axis(spec) >= 0 and x.ndim > 3, segment, segment.axes())


def taken_windows(x: jax.Array, start: jax.Array, size: int, axis: int) -> jax.Array:
    """Copies windows of every row and head to the device, one after the other: [B, K, ..., n size, ...].

    Args:
      x: [B, K or 1, ...] in host memory, slots along `axis`.
      start: i32[B, K, n], first entries.
      size: entries of a window.
      axis: of the slots.
    """
    B, K, n = start.shape
    shape = (1, 1, *(size if a == axis else x.shape[a] for a in range(2, x.ndim)))

    def one(i):
        row, head = i // (K * n), i // n % K
        at = [row, head if x.shape[1] > 1 else 0, *(0,) * (x.ndim - 2)]
        at[axis] = start.reshape(-1)[i]
        return jax.device_put(jax.lax.dynamic_slice(x, _indices(at), shape), _DEVICE)[0, 0]

    windows = jax.lax.map(one, jnp.arange(B * K * n)).reshape(B, K, n, *shape[2:])
    windows = jnp.moveaxis(windows, 2, axis)  # the windows, then the entries of each
    return windows.reshape(B, K, *(n * size if a == axis else x.shape[a] for a in range(2, x.ndim)))


def write_hosted_windows(old: jax.Array, new: jax.Array, start: jax.Array, on: jax.Array, axis: int) -> jax.Array:
    """`write_windows` where `old` is in host memory: only the windows cross over.

    Args:
      old: [B, K, ...] in host memory.
      new: the same with fewer slots, on the device.
      start: i32[B, K].
      on: bool[B, K]; where false, `old` stays as it is.
      axis: of the slots.
    """
    B, K = start.shape

    def one(i, old):
        row, head = i // K, i % K
        at = [row, head, *(0,) * (old.ndim - 2)]
        at[axis] = start[row, head]
        shape = (1, 1, *new.shape[2:])
        fresh = jax.lax.dynamic_slice(new, (row, head, *(0,) * (new.ndim - 2)), shape)
        held = jax.device_put(jax.lax.dynamic_slice(old, _indices(at), shape), _DEVICE)
        fresh = jax.device_put(jnp.where(on[row, head], fresh, held), _HOST)
        return jax.lax.dynamic_update_slice(old, fresh, _indices(at))

    return jax.lax.fori_loop(0, B * K, one, old)


def _indices(at: list) -> list[jax.Array]:
    return [jnp.asarray(i, jnp.int32) for i in at]
