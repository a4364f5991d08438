"""The transform, its composition, and the check that it keeps a cache's shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax

from kvjax.cache import Cache
from kvjax.observation import Needs, Observation
from kvjax.transforms.order import Part, in_sequence
from kvjax.transforms.schedule import Observer, Schedule, State


def leave(cache: Cache, state: State, observation: Observation) -> tuple[Cache, State]:
    """Changes nothing: the `update` of a transform that has none."""
    return cache, state


class CacheTransform(NamedTuple):
    """A pair of pure functions that rewrite a cache, and when they act.

    Attributes:
      init: `(cache, observation) -> (cache, state)`, when the prompt is in. May change the cache's structure: which
        segments there are and how large. Where a prompt arrives in chunks and memory stays bounded
        (`schedule.frees_in_prefill`), it also runs before the first of them, in the phase "begin", on a cache without
        slots; at the end it runs again, on what the chunks left.
      update: `(cache, state, observation) -> (cache, state)`, after a later call of the decoder. Keeps tree, shapes
        and dtypes, so that it lives in `lax.scan` and `lax.while_loop` with a donated cache.
      schedule: read by drivers and by transforms around this one. The default acts after every call, needs nothing of
        the decoder and frees no slot.
    """

    init: Callable[[Cache, Observation], tuple[Cache, State]]
    update: Callable[[Cache, State, Observation], tuple[Cache, State]] = leave
    schedule: Schedule = Schedule()

    def observed(self, cache: Cache, state: State, observation: Observation) -> tuple[Cache, State]:
        """Runs the observer, where the schedule says so."""
        observe = self.schedule.observer.after_call
        if observe is None or observation.phase not in self.schedule.acts_in:
            return cache, state
        return observe(cache, state, observation)

    def updated(self, cache: Cache, state: State, observation: Observation) -> tuple[Cache, State]:
        """Runs `update`, where the schedule says so."""
        return self.update(cache, state, observation) if observation.phase in self.schedule.acts_in else (cache, state)

    def step(self, cache: Cache, state: State, observation: Observation) -> tuple[Cache, State]:
        """What a driver runs after every call of the decoder that follows `init`: the observer, then `update`."""
        cache, state = self.observed(cache, state, observation)
        return self.updated(cache, state, observation)

    def map(self, wrap: Callable[[Callable], Callable]) -> CacheTransform:
        """Returns the transform with `wrap` around every function that is shown an observation.

        Args:
          wrap: takes and returns a function `(cache, ..., observation)`, which returns a cache alone or with a state.
        """
        observer = Observer(*(run and wrap(run) for run in self.schedule.observer))
        return CacheTransform(wrap(self.init), wrap(self.update), self.schedule._replace(observer=observer))


def identity() -> CacheTransform:
    """Leaves the cache as it is."""
    schedule = Schedule(acts_in=(), begins=True, name="identity")
    return CacheTransform(lambda cache, observation: (cache, ()), schedule=schedule)


def chain(*transforms: CacheTransform) -> CacheTransform:
    """Applies transforms in order, in `init` as in `update`.

    The result frees slots as often as the part that does so most often.

    Raises:
      ValueError: a transform cannot work on what the ones before it leave.
    """
    schedules = [t.schedule for t in transforms]
    order = in_sequence(Part(s.name, s.order, acts_later=bool(s.acts_in)) for s in schedules)

    def init(cache, observation):
        states = []
        for t in transforms:
            cache, state = t.init(cache, observation)
            states.append(state)
        return cache, tuple(states)

    def each(run):
        def run_all(cache, states, observation):
            after = []
            for t, state in zip(transforms, states, strict=True):
                cache, state = run(t, cache, state, observation)
                after.append(state)
            return cache, tuple(after)

        return run_all

    def one_by_one(runs):
        """The functions that are there, one after the other; None without any."""
        runs = [run for run in runs if run is not None]

        def run_all(cache, *observation):
            for run in runs:
                cache = run(cache, *observation)
            return cache

        return run_all if runs else None

    needs = Needs()
    for s in schedules:
        needs = needs.union(s.needs)
    # A window of the last queries is not kept beside all of them.
    lost = any(s.needs.queries and s.observer.after_chunk is None for s in schedules)
    observer = Observer(
        after_call=each(CacheTransform.observed) if any(s.observer.after_call for s in schedules) else None,
        after_chunk=None if lost else one_by_one(s.observer.after_chunk for s in schedules),
    )
    soonest = lambda intervals: min((i for i in intervals if i is not None), default=None)
    budgeted = next((s for s in schedules if s.budget is not None), Schedule())
    schedule = Schedule(
        acts_in=tuple(phase for phase in Schedule().acts_in if any(phase in s.acts_in for s in schedules)),
        needs=needs,
        observer=observer,
        before=one_by_one(s.before for s in schedules),
        begins=all(s.begins for s in schedules),
        on_ring=one_by_one(s.on_ring for s in schedules),
        frees_in_prefill=soonest(s.frees_in_prefill for s in schedules),
        frees_in_decode=soonest(s.frees_in_decode for s in schedules),
        budget=budgeted.budget,
        excess=budgeted.excess,
        at_least=budgeted.at_least,
        name=" and ".join(s.name for s in schedules),
        order=order,
    )
    return CacheTransform(init, each(CacheTransform.updated), schedule)


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
