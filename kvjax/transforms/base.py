"""The transform, its composition, and the check that it keeps a cache's shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from kvjax.cache import Cache
from kvjax.observation import Needs, Observation

State = Any

SLOTS = {
    "plain": "plain slots, each layer with tokens of its own",
    "by_head": "plain slots, each head with tokens of its own",
    "ring": "a ring that overwrites its oldest",
    "packed": "packed codes",
    "paged": "pages of a pool that heads share",
    "projected": "coordinates of each head",
    "joint": "coordinates that all heads share",
    "pruned": "keys of fewer channels",
    "split": "heads of different kinds",
    "shared": "slots that layers share",
    "tiered": "plain slots in two segments, by their worth",
}
"""What the slots of a cache may be, as far as the order of transforms depends on it."""

PLAIN = ("plain", "by_head")


def keep(cache, state, observation):
    """An `update` or `observe` that does nothing."""
    return cache, state


class CacheTransform(NamedTuple):
    """Pure functions that rewrite a cache, with what a driver must know to run them.

    Attributes:
      init: `(cache, observation) -> (cache, state)`, when the prompt is in. May change the cache's structure:
        which segments there are and how large.
      before: `cache -> cache`, puts into the empty cache, before anything of a prompt is read, what the prompt is to
        see; None: nothing.
      begin: as `init`, before the first chunk of a prefill that stays bounded, on a cache without slots;
        None: `init`. `init` still runs at the end, on what the chunks left.
      update: `(cache, state, observation) -> (cache, state)`, acts after a later call of the decoder. Keeps
        tree, shapes and dtypes, so that it lives in `lax.scan` and `lax.while_loop` with a donated cache.
      observe: as `update`, but only keeps statistics: runs after every call, also when `update` waits.
      collect: `(cache, observation) -> cache`, keeps statistics of a prompt that arrives in chunks, on the full cache,
        where `init` acts only at its end. None: `init` needs none, or cannot have them. Adds what it keeps to a
        cache that lacks it.
      needs: what the decoder must collect for it.
      frees_in_prefill: it frees slots at least every so many tokens while the prompt arrives; None: never.
      frees_in_decode: the same while tokens are generated. None means that the cache grows by one slot a
        token and the driver reserves room for all of them.
      budget: tokens per KV head it keeps, as a count or as a fraction of the prompt; None: no token budget.
      at_least: tokens below which a budget that is a fraction never falls: those that are always kept.
      name: what `chain` calls it when it refuses an order.
      takes: keys of `SLOTS`, what it can work on beside the whole prompt.
      leaves: what it makes of them; None: what they were. "plain" makes nothing plain that was not.
    """

    init: Callable[[Cache, Observation], tuple[Cache, State]]
    before: Callable[[Cache], Cache] | None = None
    begin: Callable[[Cache, Observation], tuple[Cache, State]] | None = None
    update: Callable[[Cache, State, Observation], tuple[Cache, State]] = keep
    observe: Callable[[Cache, State, Observation], tuple[Cache, State]] = keep
    collect: Callable[[Cache, Observation], Cache] | None = None
    needs: Needs = Needs()
    frees_in_prefill: int | None = None
    frees_in_decode: int | None = None
    budget: int | float | None = None
    at_least: int = 1
    name: str = "transform"
    takes: tuple[str, ...] = tuple(SLOTS)
    leaves: str | None = None

    @property
    def described(self) -> str:
        """Its name and its budget: what tells a run which method made it."""
        return self.name if self.budget is None else f"{self.name} with a budget of {self.budget}"

    def step(self, cache: Cache, state: State, observation: Observation) -> tuple[Cache, State]:
        """What a driver runs after every call of the decoder: `observe`, then `update`."""
        cache, state = self.observe(cache, state, observation)
        return self.update(cache, state, observation)


def identity() -> CacheTransform:
    """Leaves the cache as it is."""
    return CacheTransform(init=lambda cache, observation: (cache, ()), name="identity")


def chain(*transforms: CacheTransform) -> CacheTransform:
    """Applies transforms in order, in `init` as in `observe` and `update`.

    The result frees slots as often as the part that does so most often.

    Raises:
      ValueError: a transform cannot work on what the ones before it leave.
    """
    slots, made_by, later_acting = None, "", []
    for t in transforms:
        if slots is not None and slots not in t.takes:
            raise ValueError(f"{t.name} cannot follow {made_by}: it cannot work on {SLOTS[slots]}.")
        if t.leaves is not None:
            for earlier in later_acting:
                if t.leaves not in earlier.takes:
                    raise ValueError(
                        f"{t.name} cannot follow {earlier.name}, which still acts after the prompt: it cannot work on "
                        f"{SLOTS[t.leaves]}. Wrap it in at_prefill_end."
                    )
            if slots is None or t.leaves != "plain":  # heads that differ go on to differ
                slots, made_by = t.leaves, t.name
        if t.update is not keep or t.observe is not keep:
            later_acting.append(t)

    def start(name):
        def run(cache, observation):
            states = []
            for t in transforms:
                cache, state = (getattr(t, name) or t.init)(cache, observation)
                states.append(state)
            return cache, tuple(states)

        return run

    def each(name):
        def run(cache, states, observation):
            after = []
            for t, state in zip(transforms, states, strict=True):
                cache, state = getattr(t, name)(cache, state, observation)
                after.append(state)
            return cache, tuple(after)

        return run

    collecting = [t.collect for t in transforms if t.collect is not None]
    # A window of the last queries is not kept beside all of them.
    if any(t.needs.queries and t.collect is None for t in transforms):
        collecting = []

    def collect(cache, observation):
        for run in collecting:
            cache = run(cache, observation)
        return cache

    putting = [t.before for t in transforms if t.before is not None]

    def before(cache):
        for put in putting:
            cache = put(cache)
        return cache

    needs = Needs()
    for t in transforms:
        needs = needs.union(t.needs)
    soonest = lambda intervals: min((i for i in intervals if i is not None), default=None)
    return CacheTransform(
        init=start("init"),
        before=before if putting else None,
        begin=start("begin"),
        update=each("update") if later_acting else keep,
        observe=each("observe") if later_acting else keep,
        collect=collect if collecting else None,
        needs=needs,
        frees_in_prefill=soonest(t.frees_in_prefill for t in transforms),
        frees_in_decode=soonest(t.frees_in_decode for t in transforms),
        budget=next((t.budget for t in transforms if t.budget is not None), None),
        at_least=next((t.at_least for t in transforms if t.budget is not None), 1),
        name=" and ".join(t.name for t in transforms),
        takes=transforms[0].takes if transforms else tuple(SLOTS),
        leaves=slots,
    )


def check_step(
    transform: CacheTransform, cache: Cache, state: State, observation: Observation
) -> None:
    """Checks that `step` keeps tree, shapes and dtypes, without running it.

    Raises:
      ValueError: names the first leaf that moved, with what it was and what it became.
    """
    before = (cache, state)
    after = jax.eval_shape(transform.step, cache, state, observation)
    old, old_tree = jax.tree_util.tree_flatten_with_path(before)
    new, new_tree = jax.tree_util.tree_flatten_with_path(after)
    if old_tree != new_tree:
        raise ValueError(f"step must keep the cache's tree, got\n{new_tree}\nfrom\n{old_tree}.")
    for (path, a), (_, b) in zip(old, new):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise ValueError(
                f"step must keep shapes and dtypes: leaf {jax.tree_util.keystr(path)} was "
                f"{a.dtype}{list(a.shape)} and became {b.dtype}{list(b.shape)}."
            )
