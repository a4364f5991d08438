"""The declaration of one array of the params, and how any part of it is read from the tensors of a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

_PIECE = 8 << 20  # bytes of a leaf that are read at a time
_NEAR = 512  # rows that far apart are read with what lies between them

Axes = tuple[str | None, ...]
Index = tuple[slice, ...]
"""A part of an array: for every axis a slice with a start and a stop."""


class Tensor(Protocol):
    """What a file holds under a name: a NumPy array, or what reads only the part that is asked for."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, index: slice | Index) -> np.ndarray:
        """The part; it may be a view of the file, which is read-only."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Declares an array of the params.

    Attributes:
      names: of the tensors it is made of.
      shapes: theirs.
      shape: its own.
      axes: for every axis the name by which `kvjax.sharding` splits it, or None: whole on every shard.
      read: `(tensors, index) -> part`; the part may be a view of a tensor.
      by: the axis along which it is read piece by piece.
      untrained: what an untrained norm or bias is filled with; None: a matrix.
      multiplied: whether it is a matrix that something is multiplied by, as `x @ leaf`: where 8 bits are asked for, it
        is stored in them; all else has the dtype of the params.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]
    axes: Axes
    read: Callable[[Sequence[Tensor], Index], np.ndarray]
    by: int = 0
    untrained: float | None = None
    multiplied: bool = False

    def pieces(self, index: Index, itemsize: int) -> Iterator[tuple[Index, Index]]:
        """Cuts a part along `by` into pieces of some megabytes: each as a part of the leaf, and of that part."""
        sizes = [along.stop - along.start for along in index]
        row = int(np.prod(sizes[: self.by] + sizes[self.by + 1 :])) * itemsize
        start, stop = index[self.by].start, index[self.by].stop
        step = max(1, _PIECE // max(row, 1))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            place = lambda along: (*index[: self.by], along, *index[self.by + 1 :])
            inside = [slice(0, size) for size in sizes]
            inside[self.by] = slice(first - start, last - start)
            yield place(slice(first, last)), tuple(inside)


def plain(name: str, shape: tuple[int, ...], axes: Axes, *, skipped: int = 0) -> Leaf:
    """Declares a tensor as it is, without its first rows."""

    def read(tensors: Sequence[Tensor], index: Index) -> np.ndarray:
        first, *rest = index
        return tensors[0][(slice(first.start + skipped, first.stop + skipped), *rest)]

    return Leaf((f"{name}.weight",), ((shape[0] + skipped, *shape[1:]),), shape, axes, read)


def matrix(
    names: Iterable[str],
    shapes: Iterable[tuple[int, int]],
    axes: Axes,
    *,
    experts: int = 0,
    rows: np.ndarray | None = None,
    gain: np.ndarray | None = None,
) -> Leaf:
    """Declares tensors [out, in] as one matrix [in, out], or [experts, in, out].

    Args:
      names: of the tensors, which stand one below the other; with `{}` for the expert.
      shapes: theirs.
      axes: names of (in, out).
      experts: how many there are; 0: it is no matter of experts.
      rows: i32[out], which row of the tensors comes where; None: all as they are.
      gain: f32[out], what each is multiplied by then.
    """
    names, shapes = tuple(names), tuple(shapes)
    fan_in, out = shapes[0][1], sum(shape[0] for shape in shapes) if rows is None else len(rows)

    def one(tensors: Sequence[Tensor], over_in: slice, over_out: slice) -> np.ndarray:
        wanted = np.arange(over_out.start, over_out.stop) if rows is None else rows[over_out]
        found = _rows(tensors, wanted, over_in)
        return (found if gain is None else found.astype(np.float32) * gain[over_out, None]).T

    if not experts:
        read = lambda tensors, index: one(tensors, *index)
        return Leaf(names, shapes, (fan_in, out), axes, read, by=1, multiplied=True)
    count = len(names)

    def read_experts(tensors: Sequence[Tensor], index: Index) -> np.ndarray:
        which, *rest = index
        return np.stack([one(tensors[e * count : (e + 1) * count], *rest) for e in range(which.start, which.stop)])

    of_experts = tuple(name.format(e) for e in range(experts) for name in names)
    shape = (experts, fan_in, out)
    return Leaf(of_experts, shapes * experts, shape, (None, *axes), read_experts, multiplied=True)


def vector(
    names: Iterable[str],
    sizes: Iterable[int],
    untrained: float,
    axis: str | None = None,
    *,
    rows: np.ndarray | None = None,
    gain: np.ndarray | None = None,
    offset: float = 0.0,
) -> Leaf:
    """Declares vectors one behind the other, rows and gain as of `matrix`, with `offset` added."""
    sizes = tuple(sizes)

    def read(tensors: Sequence[Tensor], index: Index) -> np.ndarray:
        (over,) = index
        found = _rows(tensors, np.arange(over.start, over.stop) if rows is None else rows[over])
        found = found if gain is None else found.astype(np.float32) * gain[over]
        return found.astype(np.float32) + np.float32(offset) if offset else found

    shape = (sum(sizes) if rows is None else len(rows),)
    return Leaf(tuple(names), tuple((size,) for size in sizes), shape, (axis,), read, untrained=untrained)


def up_projection(name: str, heads: int, channels: slice, rank: int, of_head: int, *, turned: bool) -> Leaf:
    """Declares some channels of every head of a tensor [heads * of_head, rank], split by heads.

    Args:
      name: of the tensor.
      heads: [N].
      channels: of a head, n of them.
      rank: [R].
      of_head: channels that a head has.
      turned: as [N, R, n] instead of [N, n, R].
    """

    def read(tensors: Sequence[Tensor], index: Index) -> np.ndarray:
        over, first, second = index
        over_rank, wanted = (first, second) if turned else (second, first)
        found = tensors[0][slice(over.start * of_head, over.stop * of_head), over_rank]
        found = found.reshape(over.stop - over.start, of_head, -1)[:, channels][:, wanted]
        return found.swapaxes(1, 2) if turned else found

    count = channels.stop - channels.start
    shape = (heads, rank, count) if turned else (heads, count, rank)
    axes = ("heads", None, None)
    return Leaf((f"{name}.weight",), ((heads * of_head, rank),), shape, axes, read, multiplied=True)


def _rows(tensors: Sequence[Tensor], wanted: np.ndarray, *columns: slice) -> np.ndarray:
    """Rows of tensors that stand one below the other, [wanted, ...]: of each only what lies near a wanted one."""
    if len(tensors) == 1:
        return _rows_of_one(tensors[0], wanted, columns)
    parts, first = [], 0
    for tensor in tensors:
        mine = np.flatnonzero((wanted >= first) & (wanted < first + tensor.shape[0]))
        if len(mine):
            parts.append((mine, _rows_of_one(tensor, wanted[mine] - first, columns)))
        first += tensor.shape[0]
    if len(parts) == 1:
        return parts[0][1]
    shape = (len(wanted), *parts[0][1].shape[1:])
    found = np.empty(shape, np.result_type(*(part.dtype for _, part in parts)))
    for mine, part in parts:
        found[mine] = part
    return found


def _rows_of_one(tensor: Tensor, wanted: np.ndarray, columns: tuple[slice, ...]) -> np.ndarray:
    runs = np.split(wanted, np.flatnonzero(np.abs(np.diff(wanted)) > _NEAR) + 1)
    found = []
    for run in runs:
        low, high = int(run.min()), int(run.max()) + 1
        block = tensor[(slice(low, high), *columns)]
        as_it_is = len(run) == high - low and (np.diff(run) == 1).all()
        found.append(block if as_it_is else block[run - low])
    return found[0] if len(found) == 1 else np.concatenate(found)
