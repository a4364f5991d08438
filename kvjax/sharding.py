"""Where the axes of weights, caches and activations lie on a mesh, and attention over what is spread.

A program names the axes of its arrays ("batch", "kv_heads", "slots"); one flat table of rules says which axes of the
mesh each of them may be split over. Inside `use_mesh` every segment attends shard by shard and the parts are merged by
`combine` in its collective form; outside of it nothing here does anything.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32

from kvjax.slots import Slots
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.partial import Partial, combine, combine_shards
from pallas_kernels.prefill_attention import prefill_attention

Rules = tuple[tuple[str, str], ...]
"""Pairs (name of an axis of arrays, axis of the mesh). Earlier ones win; see `layout`."""

DATA: Rules = (("batch", "data"),)
TENSOR: Rules = (
    ("kv_heads", "model"),
    ("slots", "model"),  # where the KV heads cannot be split, their slots are
    ("pages", "model"),
    ("heads", "model"),
    ("ffn", "model"),
    ("vocab", "model"),
)
SEQUENCE: Rules = (("slots", "seq"), ("pages", "seq"), ("tokens", "seq"))
RULES: Rules = DATA + SEQUENCE + TENSOR
"""The product of all three: each does something where the mesh has its axis."""
WEIGHTS_OVER_SEQUENCE: Rules = RULES + (("heads", "seq"), ("ffn", "seq"), ("vocab", "seq"))
"""`RULES`, and the weights split over the sequence axis too: for models that the model axis alone cannot hold."""

_GATHERED = 4096  # tokens of a call whose keys and values every shard can have
_LARGE = 8192  # slots, from which a copy of them is worth some more
_BLOCK = 512  # queries that attend to the keys of another shard at a time

_rules = jax.make_user_context(RULES)
_per_shard = jax.make_user_context(False)


def make_mesh(axes: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh from text such as "seq:64,model:4": named axes and their sizes, the first one outermost.

    Args:
      axes: names are "data", "seq" and "model", or others that rules of your own mention.
      devices: as many as the product of the sizes; None: all there are.

    Raises:
      ValueError: the text does not parse, or the product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes: dict[str, int] = {}
    for part in axes.split(","):
        name, _, size = part.strip().partition(":")
        if not name.isidentifier() or not size.isdecimal() or int(size) < 1 or name in sizes:
            raise ValueError(f"mesh must name axes and their sizes like 'seq:64,model:4', got {axes!r}.")
        sizes[name] = int(size)
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(f"mesh {axes} has {math.prod(sizes.values())} places, but there are {len(devices)} devices.")
    shape = tuple(sizes.values())
    if devices[0].platform == "tpu":  # neighbours on the mesh are neighbours on the chip's network
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        grid = np.array(devices).reshape(shape)
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: Rules = RULES, *, select_per_shard: bool = False) -> Iterator[Mesh]:
    """Inside, programs are traced and run for the mesh; jit keeps what it compiled for each mesh and rules apart.

    Args:
      mesh: from `make_mesh`, or any whose axes the rules name.
      rules: which axes of arrays are split over which axes of the mesh.
      select_per_shard: `evict` gives every shard of the slots an equal part of the budget and keeps the best of each,
        and no slot is sent anywhere. It keeps other tokens than on one device: where the best ones lie on few
        shards, so do the sinks and the newest, some of them are lost.
    """
    with jax.set_mesh(mesh), _rules(rules), _per_shard(select_per_shard):
        yield mesh


def selects_per_shard() -> bool:
    """Whether `use_mesh` asked for it."""
    return _active() is not None and _per_shard.value


def _active():
    """The mesh to split over; None without one, and inside a shard."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return None
    return mesh


def layout(sizes: dict[str, int]) -> dict[str, tuple[str, ...]]:
    """Which axes of the mesh each named axis is split over.

    Rules are tried in order. One holds if the mesh has its axis, no axis of another name is split over that, and the
    size stays divisible. What follows a colon in a name ("slots:0", "slots:1") tells axes of one kind apart, which may
    be split over the same axis of the mesh.

    Args:
      sizes: the size of every named axis; 0: any, it will be made to fit.
    """
    mesh = _active()
    split: dict[str, tuple[str, ...]] = {name: () for name in sizes}
    if mesh is None:
        return split
    taken: dict[str, str] = {}
    for kind, axis in _rules.value:
        count = mesh.shape.get(axis, 1)
        if count == 1 or taken.get(axis, kind) != kind:
            continue
        for name, size in sizes.items():
            if name.partition(":")[0] == kind and axis not in split[name] and size % (shards(split[name]) * count) == 0:
                split[name] += (axis,)
                taken[axis] = kind
    return split


def shards(axes: Iterable[str]) -> int:
    """How many parts axes of the active mesh make together."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in axes)


def whole(slots: int, block: int = 1, *, batch: int, kv_heads: int, tile: int = 1) -> int:
    """A number of slots rounded up to whole blocks, on a mesh to as many of them on every shard.

    A TPU holds what blocks have one of in tiles of 8, and copies a cache that ends within a tile before and after it
    decodes. A shard of 64 blocks or more therefore has a multiple of 8; without a mesh a cache of 8,192 slots or more
    has a multiple of `tile` blocks where that adds less than one slot in 128.
    """
    parts = shards(layout({"batch": batch, "kv_heads": kv_heads, "slots": 0})["slots"])
    unit = block * parts
    if parts > 1:
        tile = 8 if slots >= 64 * unit else 1
    elif slots < max(_LARGE, 128 * tile * unit):
        tile = 1
    return -(-slots // (tile * unit)) * tile * unit


def packable(slots: int, *, batch: int, kv_heads: int) -> int:
    """The same for slots that may be packed later, in groups of up to 128: only a mesh makes them more."""
    if shards(layout({"batch": batch, "kv_heads": kv_heads, "slots": 0})["slots"]) == 1:
        return slots
    return whole(slots, 128, batch=batch, kv_heads=kv_heads)


def whole_pages(pages: int, *, batch: int) -> int:
    """A number of pages rounded up to as many on every shard."""
    parts = shards(layout({"batch": batch, "pages": 0})["pages"])
    return -(-pages // parts) * parts


def sizes_of(named: Any, tree: Any) -> dict[str, int]:
    """The sizes of the named axes of a tree; of several that share a name, what divides them all.

    A single row or head of a leaf is on all shards, whatever others have.
    """
    sizes: dict[str, int] = {}

    def visit(spec, x):
        for name, size in zip(spec, x.shape):
            if name is not None and (size != 1 or name not in ("batch", "kv_heads")):
                sizes[name] = math.gcd(sizes.get(name, 0), size)

    jax.tree.map(visit, named, tree)
    return sizes


def specs(named: Any, tree: Any, split: dict[str, tuple[str, ...]] | None = None) -> Any:
    """For every leaf the `PartitionSpec` over axes of the mesh, by a layout or by that of the tree itself."""
    split = layout(sizes_of(named, tree)) if split is None else split

    def spec(of, x):
        return P(*(split.get(name) or None if size != 1 else None for name, size in zip(of, x.shape)))

    return jax.tree.map(spec, named, tree)


def shardings(named: Any, tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """The `NamedSharding` of every leaf, each leaf laid out by itself: for weights."""
    with use_mesh(mesh, rules):
        return jax.tree.map(lambda of, x: NamedSharding(mesh, specs(of, x)), named, tree)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """An activation with its named axes split as the rules say; as it is where there is no mesh."""
    if _active() is None:
        return x
    return jax.lax.with_sharding_constraint(x, specs(P(*axes), x))


def constrain_tree(tree: Any, specs_of: Callable[[Any], Any]) -> Any:
    """The same for every leaf of a tree, by `specs_of(tree)`."""
    if _active() is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, specs_of(tree))


def placed(tree: Any, specs_of: Callable[[Any], Any]) -> Any:
    """Every leaf as a `jax.ShapeDtypeStruct`, on a mesh with the sharding that `specs_of(tree)` gives it."""
    if _active() is None:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    mesh = jax.sharding.get_mesh()
    place = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
    return jax.tree.map(place, tree, specs_of(tree))


def on_every_device(tree: Any) -> Any:
    """The tree with every leaf whole on each device of the mesh; as it is where there is none."""
    return tree if _active() is None else jax.device_put(tree, NamedSharding(jax.sharding.get_mesh(), P()))


def over_shards(run: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`run` on every shard by itself, with collectives of its own; `run` as it is where there is no mesh."""
    if _active() is None:
        return run
    return jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def made_on_shards(make: Callable[[Any], Any], slots: Any, *, split_slots: bool = True) -> Any:
    """`make(slots)`, a segment with the same slots in another representation; on a mesh every shard makes its own.

    Without `split_slots` every shard makes all of them, for the heads that it has.
    """
    if _active() is None:
        return make(slots)
    like = jax.eval_shape(make, slots)
    named = like.axes()
    split = layout(sizes_of(named, like)) | ({} if split_slots else {"slots": ()})
    return over_shards(make, (specs(slots.axes(), slots, split),), specs(named, like, split))(slots)


def attend(segment: Any, queries: Any, **how: Any) -> Partial:
    """`Segment.attend`; on a mesh every shard attends to the slots it holds, and the parts are merged.

    Slots of b rows are read by B, a multiple of b: row `i` of them by the queries of rows `i B / b ..`, in one product.
    """
    if _active() is None:
        return _attend_in_groups(segment, queries, **how)
    named, ranks, chosen = segment.axes(), _taken(how, "ranks"), _taken(how, "chosen")
    rows = segment.pos.shape[0]  # a single one is on all shards
    split = layout(sizes_of(named, segment) | {"batch": queries.raw.shape[0] if rows == 1 else rows})
    over = _slot_axes(split)
    heads, batch = split.get("kv_heads") or None, split["batch"] or None

    def one_shard(segment, queries, ranks, chosen):
        chosen = {name: segment.chosen_on_shard(x, split.get("slots", ())) for name, x in chosen.items()}
        partial = _attend_in_groups(_local(segment, named, split, over), queries, **ranks, **chosen, **how)
        return combine_shards(partial, over) if over else partial

    of_chosen = {name: x.specs(batch, heads) for name, x in chosen.items()}
    of_queries = _query_specs(queries, batch, heads)
    in_specs = (specs(named, segment, split), of_queries, _rank_specs(ranks, split), of_chosen)
    out_specs = Partial(P(batch, None, heads), P(batch, None, heads))
    return over_shards(one_shard, in_specs, out_specs)(segment, queries, ranks, chosen)


def _attend_in_groups(segment: Any, queries: Any, **how: Any) -> Partial:
    rows, batch = segment.pos.shape[0], queries.raw.shape[0]
    if rows == batch:
        return segment.attend(queries, **how)
    grouped = lambda x: x.reshape(rows, -1, *x.shape[2:])
    raw, pos = grouped(queries.raw), grouped(queries.pos)
    partial = segment.attend(queries._replace(raw=raw, pos=pos, ahead=0), **how)
    return Partial(*(x.reshape(batch, -1, *x.shape[2:]) for x in partial))


def mass(segment: Any, queries: Any, lse: jax.Array, **how: Any) -> jax.Array:
    """`Segment.mass`; on a mesh every shard finds that of the slots it holds."""
    if _active() is None:
        return segment.mass(queries, lse, **how)
    named = segment.axes()
    owners_and_slots = {spec[1:] for spec in _positions(named)}
    if len(owners_and_slots) > 1:  # several parts, which ask for themselves
        return segment.mass(queries, lse, **how)
    ranks = _taken(how, "ranks")
    split = layout(sizes_of(named, segment) | {"batch": queries.raw.shape[0]})
    over = _slot_axes(split)
    heads, batch = split.get("kv_heads") or None, split["batch"] or None

    def one_shard(segment, queries, lse, ranks):
        return _local(segment, named, split, over).mass(queries, lse, **ranks, **how)

    in_specs = (
        specs(named, segment, split),
        _query_specs(queries, batch, heads),
        P(batch, None, heads),
        _rank_specs(ranks, split),
    )
    out_specs = P(batch, *(split.get(name) or None for name in owners_and_slots.pop()))
    return over_shards(one_shard, in_specs, out_specs)(segment, queries, lse, ranks)


def _taken(how: dict[str, Any], name: str) -> dict[str, Any]:
    """Removes an argument, if it is there, and returns it under its name: arrays that a shard gets its part of."""
    return {name: how.pop(name)} if how.get(name) is not None else {}


def first_on_shard(axes: tuple[str, ...], count: int) -> jax.Array | int:
    """Inside a shard that holds `count` of the slots that are split over axes of the mesh: the first of them."""
    return jax.lax.axis_index(axes) * count if axes else 0


def _slot_axes(split: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The axes of the mesh that slots of any kind are split over, in the mesh's order."""
    used = {a for name, axes in split.items() if name.partition(":")[0] in ("slots", "pages") for a in axes}
    return tuple(axis for axis in jax.sharding.get_abstract_mesh().axis_names if axis in used)


def _is_slots(x: Any) -> bool:
    return isinstance(x, Slots)


def _positions(named: Any) -> list[P]:
    """The names of the axes of every array that says which tokens slots hold."""
    return [x.pos for x in jax.tree.leaves(named, is_leaf=_is_slots) if _is_slots(x)]


def _local(segment: Any, named: Any, split: dict[str, tuple[str, ...]], over: tuple[str, ...]) -> Any:
    """What a shard attends to: slots that several shards hold count on the first of them only."""
    if "pages" in split and hasattr(segment, "on_shard"):
        segment = segment.on_shard(first_on_shard(split["pages"], segment.owner.shape[1]))

    def once(x, of):
        if not _is_slots(x):
            return x
        mine = {axis for name in of.pos if name is not None for axis in split.get(name, ())}
        same = tuple(axis for axis in over if axis not in mine)
        return x.replace(pos=jnp.where(jax.lax.axis_index(same) == 0, x.pos, -1)) if same else x

    return jax.tree.map(once, segment, named, is_leaf=_is_slots)


def _query_specs(queries: Any, batch, heads) -> Any:
    everywhere = lambda tree: jax.tree.map(lambda _: P(), tree)
    return queries._replace(
        raw=P(batch, None, heads),
        pos=P(batch),
        rope=everywhere(queries.rope),
        ahead=P(batch) if jnp.ndim(queries.ahead) and queries.ahead.shape[0] > 1 else P(),
    )


def _rank_specs(ranks: dict[str, Any], split: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    batch, heads, slots = (split.get(name) or None for name in ("batch", "kv_heads", "slots"))
    return {name: type(x)(P(batch, heads, slots), P(batch, None, heads)) for name, x in ranks.items()}


def attend_new(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    pos: Int32[Array, "B T"],
    *,
    prompt: Any = None,
    layer: jax.Array | None = None,
    **how: Any,
) -> Partial:
    """`prefill_attention`; on a mesh each shard has queries of some of the tokens.

    Keys and values of a chunk are gathered; those of a long prompt go round in a ring, so that no shard has them all.

    Args:
      q: [B, T, N, H] queries, rotated.
      k: [B, K, T, H] keys, rotated.
      v: [B, K, T, H].
      pos: i32[B, T], increasing, -1 = padding, which comes last.
      prompt: attends in place of `prefill_attention`, see `kvjax.PromptAttention`.
      layer: i32[], the index of the layer, for a `prompt` whose heads have patterns.
      **how: window and scale.

    Raises:
      ValueError: a mesh splits the tokens, and `prompt` chooses among all of them.

    Source: Liu et al., Ring Attention with Blockwise Transformers (2023), arXiv:2310.01889.
    """
    attend = prefill_attention if prompt is None else prompt
    patterns = () if getattr(prompt, "patterns", None) is None else (prompt.of_layer(layer, q.shape[2]),)
    if _active() is None:
        return attend(q, k, v, pos, *patterns, **how)
    split = layout({"batch": q.shape[0], "kv_heads": k.shape[1], "tokens": q.shape[1]})
    batch, heads, tokens = (split[name] or None for name in ("batch", "kv_heads", "tokens"))
    parts = shards(split["tokens"])
    if prompt is not None and parts > 1:
        raise ValueError(
            f"a prompt that reads chosen blocks must not be split, but the mesh splits its tokens in {parts}: use "
            "rules that do not split tokens."
        )

    def one_shard(q, k, v, pos, *patterns):
        if parts > 1 and parts * q.shape[1] <= _GATHERED:
            gather = lambda x, axis: jax.lax.all_gather(x, tokens, axis=axis, tiled=True)
            return _attend_blocks(q, gather(k, 2), gather(v, 2), pos, gather(pos, 1), **how)
        merged = attend(q, k, v, pos, *patterns, **how)

        def turn(_, carry):
            merged, (k, v, k_pos) = carry
            ring = [(i, (i + 1) % parts) for i in range(parts)]
            k, v, k_pos = jax.lax.ppermute((k, v, k_pos), tokens, ring)
            return combine([merged, _attend_blocks(q, k, v, pos, k_pos, **how)]), (k, v, k_pos)

        return jax.lax.fori_loop(1, parts, turn, (merged, (k, v, pos)))[0] if parts > 1 else merged

    in_specs = (P(batch, tokens, heads), P(batch, heads, tokens), P(batch, heads, tokens), P(batch, tokens))
    in_specs += (P(heads),) * len(patterns)
    out_specs = Partial(P(batch, tokens, heads), P(batch, tokens, heads))
    return over_shards(one_shard, in_specs, out_specs)(q, k, v, pos, *patterns)


def _attend_blocks(q: jax.Array, k: jax.Array, v: jax.Array, q_pos: jax.Array, k_pos: jax.Array, **how) -> Partial:
    """Attention of many queries over keys [B, K, S, H] at i32[B, S], a block of queries at a time."""
    B, T = q_pos.shape
    slot_pos = jnp.broadcast_to(k_pos[:, None], k.shape[:3])
    size = _BLOCK if T % _BLOCK == 0 else T
    blocks = lambda x: x.reshape(B, T // size, size, *x.shape[2:]).swapaxes(0, 1)
    part = jax.lax.map(lambda of: decode_attention(of[0], k, v, of[1], slot_pos, **how), (blocks(q), blocks(q_pos)))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(B, T, *x.shape[3:]), part)
