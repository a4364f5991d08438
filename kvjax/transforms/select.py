"""Keeps every slot, and reads few: what a query attends to is chosen page by page, at every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from kvjax.budget import Budget, budget_rows, budget_slots, check_budget
from kvjax.cache import Cache, LayerCache
from kvjax.observation import Observation
from kvjax.rope import Rope
from kvjax.segments import AnySegment, BlockedSegment, LatentSegment, Segment
from kvjax.segments.bases import Matrix
from kvjax.segments.indices import Index
from kvjax.segments.protocol import KeyRope
from kvjax.segments.segment import dense_tail, unrotated
from kvjax.segments.selected import Reading, SelectedSegment
from kvjax.transforms.base import CacheTransform
from kvjax.transforms.order import Order
from kvjax.transforms.project import check_rank
from kvjax.transforms.schedule import Schedule
from kvjax.transforms.share_basis import principal_axes

Indices = Index | Sequence[Index]
"""One for all layers, or one for each."""


def select(
    index: Indices,
    read: Budget,
    *,
    page: int = 16,
    residual: int | None = None,
    sinks: int = 0,
    recent: int = 0,
    dense_layers: Sequence[int] = (0, 1),
    choose_at: Sequence[int] | None = None,
    each: int = 8,
    key_rope: KeyRope = "stored",
    encode: Callable[[Segment], AnySegment] | None = None,
    hosted: bool = False,
) -> CacheTransform:
    """Stores all slots in pages and lets each query read `read` tokens of them, those whose pages an index ranks first.

    New tokens are exact in a tail of `residual` slots, which every query reads, until they fill pages; the tail counts
    as read. What follows (`quantize`, `project`) stores the pages otherwise, under an index of exact keys.

    Args:
      index: scores pages for a query.
      read: tokens per KV head that a query reads; a fraction is one of the longest prompt of a batch, and 1.0 is
        everything, tokens that follow included.
      page: tokens of a page.
      residual: slots of the tail, a multiple of the page; None: a page, or 16 where that is less.
      sinks: the pages of the first so many tokens are always read, within `read`.
      recent: those of the tokens less than this before a query, too.
      dense_layers: layers that read everything, and stay as they are.
      choose_at: layers that choose for those after them, up to the next of these; they themselves read everything.
        Layers before the first stay as they are. None: every layer chooses for itself.
      each: calls of at most so many tokens choose for each; longer ones read everything.
      key_rope: "at_attend" stores un-rotated keys, as low-rank keys need them.
      encode: from dense slots to how pages are stored; None: as they are.
      hosted: pages are kept in host memory (`pinned_host`) and only chosen ones are copied to the device; new tokens,
        summaries and positions stay there. Calls of more than `each` tokens copy a layer's pages whole.

    Raises:
      ValueError: a number is impossible (at build); indices or layers do not fit the cache (at `init`).
    """
    if page < 1 or each < 1:
        raise ValueError(f"page and each must be at least 1, got {page} and {each}.")
    block = max(page, -(-16 // page) * page) if residual is None else residual
    if block < page or block % page:
        raise ValueError(f"residual must be a multiple of the {page} tokens of a page, got {residual}.")
    if sinks < 0 or recent < 0:
        raise ValueError(f"sinks and recent must be at least 0, got {sinks} and {recent}.")
    if key_rope not in ("stored", "at_attend"):
        raise ValueError(f"key_rope must be 'stored' or 'at_attend', got {key_rope!r}.")
    check_read(read)
    if choose_at is not None and (not choose_at or list(choose_at) != sorted(set(choose_at))):
        raise ValueError(f"choose_at must name layers in order, got {list(choose_at)}.")

    def reading(layer: int, tokens: int) -> Reading | None:
        """How a layer is read; None: it stays as it is."""
        of_all = isinstance(read, float) and read == 1
        count = None if of_all else max(1, pages_of(budget_slots(read, tokens)))
        how = Reading(page, count, sinks, recent, each, hosted=hosted)
        if choose_at is not None:
            if layer < min(choose_at):
                return None
            whole = layer in choose_at  # and stays on the device
            return how._replace(source="whole" if whole else "given", hosted=hosted and not whole)
        return None if layer in dense_layers else how

    def pages_of(tokens):
        """The pages beside the tail that make so many tokens."""
        return -(-(tokens - block) // page)

    def compress(
        layer: LayerCache, rope: Rope, index: Index, rows: jax.Array | None, how: Reading
    ) -> LayerCache:
        slots = dense_tail(layer, "select")
        if not slots.layout.grows:  # a ring holds its window, and is read whole
            return layer
        if key_rope == "at_attend":
            slots = unrotated(slots, rope)

        def body(slots: Segment) -> SelectedSegment:
            pages = SelectedSegment.of(slots, index, how, rope=rope if key_rope == "at_attend" else None, rows=rows)
            return pages if encode is None else pages.replace(stored=encode(slots))

        blocks = BlockedSegment.from_dense(slots, body, block)
        return layer.with_tail(blocks.replace(body=blocks.body.placed()))

    compress_jit = jax.jit(compress, static_argnums=4)

    def init(cache: Cache, observation: Observation):
        if hosted and not jax.sharding.get_abstract_mesh().empty:
            raise ValueError("hosted must be False on a mesh: shards of pages in host memory are not supported.")
        if observation.phase == "begin":
            return cache, ()
        indices = index if isinstance(index, (list, tuple)) else [index] * len(cache.layers)
        if len(indices) != len(cache.layers):
            raise ValueError(f"index must be one for each of the {len(cache.layers)} layers, got {len(indices)}.")
        if hosted and choose_at is None and any(x.reads_keys for x in indices):
            raise ValueError("index must not be Exact where hosted is True: at every step it reads all keys.")
        last = max(choose_at or dense_layers or (0,))
        if choose_at is not None and last >= len(cache.layers):
            raise ValueError(f"choose_at must name some of the {len(cache.layers)} layers, got {list(choose_at)}.")

        rows = None
        if isinstance(read, float) and read < 1:  # of each row as much as of its own run
            rows = budget_rows(read, observation.prompt, observation.prompt_slots)
            rows = jnp.maximum(1, pages_of(rows))
        layers = []
        for i, (layer, seen) in enumerate(zip(cache.layers, observation.layers, strict=True)):
            how = reading(i, observation.prompt_slots)
            layers.append(layer if how is None else compress_jit(layer, seen.queries.rope, indices[i], rows, how))
        return cache.replace(layers=tuple(layers)), ()

    needs = "vectors slots room places" + " rotated" * (key_rope == "stored")
    needs += " whole aligned" * (choose_at is not None)
    order = Order.of(needs=needs, loses="slots whole" + " rotated vectors" * (key_rope != "stored"))
    return CacheTransform(init, schedule=Schedule(acts_in=(), name="select", order=order))


def low_rank_keys(rank: int | float) -> Callable[[Segment], LatentSegment]:
    """Returns an encoder that stores keys in the leading axes of each row's and head's own, and values as they are.

    Args:
      rank: coordinates of a key, as a count or as a fraction of the channels of a head.

    Raises:
      ValueError: rank is no count and no fraction (at build), or is more than the channels (where it encodes).
    """
    if rank <= 0 or (isinstance(rank, float) and rank > 1):
        raise ValueError(f"rank must be a count of at least 1 or a fraction in (0, 1], got {rank}.")

    def encode(slots: Segment) -> LatentSegment:
        B, K, S, H = slots.k.shape
        keys = jnp.where((slots.pos >= 0)[..., None], slots.k, 0).astype(jnp.float32)
        axes = principal_axes(keys.reshape(B * K, S, H), check_rank("rank", rank, H))
        return LatentSegment.of(slots, Matrix(axes.reshape(B, K, H, -1).astype(slots.k.dtype)), None)

    return encode


def check_read(read: Budget) -> None:
    """Checks what may be read.

    Raises:
      ValueError: names `read`, what came and what was expected.
    """
    try:
        check_budget(read)
    except ValueError as error:
        raise ValueError(str(error).replace("budget", "read", 1)) from error
