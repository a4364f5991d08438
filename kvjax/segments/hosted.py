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
    heads, entries = x.shape[1], x.shape[axis]
    first = (jnp.arange(B * heads).reshape(B, heads, 1) * entries + start).reshape(-1)
    lines, others = _lines(x, axis)

    def one(at):
        return jax.device_put(jax.lax.dynamic_slice_in_dim(lines, at, size, axis=0), _DEVICE)

    windows = jax.lax.map(one, first).reshape(B, K, n * size, *others)
    return jnp.moveaxis(windows, 2, axis)


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
    size, entries = new.shape[axis], old.shape[axis]
    first = (jnp.arange(B * K).reshape(B, K) * entries + start).reshape(-1)
    (lines, _), (fresh, _) = _lines(old, axis), _lines(new, axis)
    fresh = fresh.reshape(B * K, size, *fresh.shape[1:])

    def one(i, lines):
        held = jax.device_put(jax.lax.dynamic_slice_in_dim(lines, first[i], size, axis=0), _DEVICE)
        window = jax.device_put(jnp.where(on.reshape(-1)[i], fresh[i], held), _HOST)
        return jax.lax.dynamic_update_slice_in_dim(lines, window, first[i], axis=0)

    lines = jax.lax.fori_loop(0, B * K, one, lines)
    moved = jnp.moveaxis(old, axis, 2) if axis != 2 else old
    lines = lines.reshape(moved.shape)
    return jnp.moveaxis(lines, 2, axis) if axis != 2 else lines


def _lines(x: jax.Array, axis: int) -> tuple[jax.Array, tuple[int, ...]]:
    """[B K S, ...], and the shape of what an entry is: XLA:TPU slices host memory along one axis."""
    x = x if axis == 2 else jnp.moveaxis(x, axis, 2)
    return x.reshape(-1, *x.shape[3:]), x.shape[3:]
