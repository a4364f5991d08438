"""When a transform acts, what it needs of the decoder, what it frees and what it keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from kvjax.budget import Budget
from kvjax.cache import Cache, LayerCache
from kvjax.observation import LayerObservation, Needs, Observation, Phase
from kvjax.transforms.order import Order

State = Any


class Observer(NamedTuple):
    """Keeps what a transform must remember of every call of the decoder, also while `update` waits for its turn.

    Attributes:
      after_call: `(cache, state, observation) -> (cache, state)`, after every call that follows `init`, before
        `update`. Keeps tree, shapes and dtypes, as `update` does. None: there is nothing to remember.
      after_chunk: `(cache, observation) -> cache`, before `init`: for a transform that acts only when the whole prompt
        is in, after every chunk of it, on the full cache. Runs once before the first chunk, on an observation of
        nothing, and adds what it keeps to a cache that lacks it. None: `init` needs none of it, or cannot have it.
    """

    after_call: Callable[[Cache, State, Observation], tuple[Cache, State]] | None = None
    after_chunk: Callable[[Cache, Observation], Cache] | None = None


class Schedule(NamedTuple):
    """What a driver, or a transform around another, must know to run it.

    Attributes:
      acts_in: phases of which every call is followed by the observer and by `update`; (): `init` acts alone, once.
      needs: what the decoder must collect.
      observer: what is remembered of every call.
      before: `cache -> cache`, puts into the empty cache, before anything of a prompt is read, what the prompt is to
        see; None: nothing.
      begins: nothing of a prompt decides how it stores slots: where a prompt arrives in chunks, `init` runs before the
        first of them, on a cache without slots, and what comes is stored so at once. `init` does not run again.
      frees_in_prefill: slots are freed at least every so many tokens while the prompt arrives; None: never.
      frees_in_decode: the same while tokens are generated. None means that the cache grows by one slot a token and
        the driver reserves room for all of them.
      budget: tokens per KV head that are kept, as a count or as a fraction of the prompt; None: no token budget.
      excess: `(cache, observation) -> i32[B]`: tokens that a head of each row holds above its budget, in the layer that
        holds most above its own; below 0 where all have room. None: it does not say.
      at_least: tokens below which a budget that is a fraction never falls: those that are always kept.
      name: what errors call the transform.
      on_ring: `(layer cache, layer observation) -> layer cache`, how it stores the slots of a layer that keeps no more
        than its sliding window; None: as they are. See `respect_windows`.
      order: which transforms it may follow, and which may follow it.
    """

    acts_in: tuple[Phase, ...] = ("prefill", "decode")
    needs: Needs = Needs()
    observer: Observer = Observer()
    before: Callable[[Cache], Cache] | None = None
    begins: bool = False
    frees_in_prefill: int | None = None
    frees_in_decode: int | None = None
    budget: Budget | None = None
    excess: Callable[[Cache, Observation], jax.Array] | None = None
    at_least: int = 1
    name: str = "transform"
    on_ring: Callable[[LayerCache, LayerObservation], LayerCache] | None = None
    order: Order = Order()

    @property
    def described(self) -> str:
        """Its name and its budget: what tells a run which method made it."""
        return self.name if self.budget is None else f"{self.name} with a budget of {self.budget}"
