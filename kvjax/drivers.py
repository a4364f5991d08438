"""Runs a decoder over a cache that a transform keeps small: prefill, extend, generate.

A decoder is any function `Step`: it reads a cache, appends to it and reports what was asked for. The
functions here are pure; callers jit them (with the cache donated) and see only the arrays they pass.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float32, Int32

from kvjax import query_window, sharding
from kvjax.budget import budget_slots
from kvjax.cache import Cache
from kvjax.limits import Limits, Room, check_positions, check_tokens, check_whole, limits_of, longest_row, readable
from kvjax.observation import ALL, LayerObservation, Needs, Observation
from kvjax.reread import reread
from kvjax.sampling import Sampler, row_keys
from kvjax.transforms.base import CacheTransform


class StepOutput(NamedTuple):
    """What one call of a decoder returns."""

    logits: Float32[Array, "B T V"]  # or f32[B, 1, V] of the last real token
    cache: Cache
    layers: tuple[LayerObservation, ...]


class Step(Protocol):
    """A decoder: the only thing the drivers ask of a model.

    One with an attribute `limits` (`kvjax.Limits`) states which ids and positions it knows, and the drivers refuse
    others; a plain function states none.
    """

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, cache: Cache, *, needs: Needs, last_only: bool
    ) -> StepOutput:
        """Processes T new tokens of every row.

        Args:
          tokens: i32[B, T].
          positions: i32[B, T], increasing; -1 is padding, which comes last.
          cache: attended to, then appended to.
          needs: what to collect in `StepOutput.layers`.
          last_only: logits of each row's last real token only.
        """


class Run(NamedTuple):
    """A sequence in progress: what the next call needs."""

    logits: Float32[Array, "B V"]  # of the next token
    cache: Cache
    state: Any  # of the transform
    prompt: Int32[Array, " B"]  # length of the prompt; fractions of it are budgets
    room: Room  # static: the prompt's slots, and what may follow
    first: Int32[Array, " B"] | None = None  # position of its first token, behind what was attached; None: 0

    def specs(self) -> Run:
        """For every leaf, the `PartitionSpec` over the axes of the mesh in use."""
        rows = lambda x: sharding.specs(P("batch"), x)
        state = jax.tree.map(lambda _: P(), self.state)  # budgets of rows and the like, on every device
        first = None if self.first is None else rows(self.first)
        return Run(rows(self.logits), self.cache.specs(), state, rows(self.prompt), self.room, first)

    def placed(self) -> Run:
        """The shapes of all leaves, on a mesh with where they lie: to compile for, and to restore into."""
        return sharding.placed(self, Run.specs)


# One program each where a caller runs the drivers outside jit, and inside it part of the caller's, as if written there.
_compiled = functools.partial(jax.jit, inline=True)


def next_positions(cache: Cache, lengths: jax.Array, T: int) -> Int32[Array, "B T"]:
    """i32[B, T]: where the next tokens lie, -1 for padding."""
    return _from(cache.length, lengths, T=T)


@functools.partial(_compiled, static_argnames="T")
def _from(first: jax.Array, lengths: jax.Array, *, T: int) -> jax.Array:
    index = jnp.arange(T)[None]
    return jnp.where(index < lengths[:, None], first[:, None] + index, -1)


@_compiled
def going_on(right: jax.Array, lengths: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which rows go on, and with how many tokens: one that was refused once stays so."""
    right = right & ~jnp.any(jnp.isnan(logits), axis=-1)
    return right, jnp.where(right, lengths, 0).astype(jnp.int32)


@_compiled
def logits_after(
    logits: jax.Array, before: jax.Array, right: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """f32[B, V] of the next token of every row, and f32[B, T, V] after each token; NaN for rows that were refused."""
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    last = jnp.take_along_axis(logits, last, axis=1)[:, 0]
    last = jnp.where((lengths > 0)[:, None], last, before)
    return jnp.where(right[:, None], last, jnp.nan), jnp.where(right[:, None, None], logits, jnp.nan)


def prefill(
    step: Step,
    transform: CacheTransform,
    tokens: Int32[Array, "B T"],
    lengths: Int32[Array, " B"],
    cache: Cache,
    *,
    room: int,
    call_tokens: int = 1,
    chunk: int | None = None,
) -> Run:
    """Reads the prompts, compresses the cache and makes room for what follows.

    In one shot (`chunk=None`) the prompt attends to itself exactly and `transform.init` compresses the
    result inside the same program, so the compiler frees each layer's keys and values as it goes. In chunks,
    a transform that acts while the prompt arrives (`frees_in_prefill`) keeps memory constant whatever the
    prompt's length; any other acts at the end, on the full cache.

    Args:
      step: the decoder.
      transform: what compresses.
      tokens: i32[B, T], prompts padded at their end with any ids.
      lengths: i32[B], tokens of each prompt, at least 1.
      cache: an empty cache with 0 slots.
      room: tokens that will follow, over all later calls.
      call_tokens: the most tokens a later call brings at once.
      chunk: tokens of a chunk, or None.

    Returns:
      `Run`, whose cache takes `room` more tokens.

    Raises:
      ValueError: tokens, lengths, cache, room or chunk are impossible (what only values can tell: see
        `kvjax.limits`), or the transform wants every query of the prompt, which chunks do not keep, or wants to read
        the prompt again after having dropped parts of it.
    """
    _check_room(room, call_tokens)
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 token or None, got {chunk}.")
    check_tokens(tokens, lengths, cache)
    held = max((s.pos.shape[-1] for layer in cache.inlined().layers for s in layer.segments), default=0)
    if held:
        raise ValueError(f"cache must be one without slots, got {held}: `extend` goes on after what a run has read.")
    limits, T, first = limits_of(step), tokens.shape[1], None
    if (before := transform.schedule.before) is not None:
        seen = before(cache)
        first = None if seen.length is cache.length else seen.length  # learned slots take no positions
        cache, transform = seen, transform._replace(schedule=transform.schedule._replace(before=None))
    attached = 0 if first is None else longest_row(first, 0)
    right = readable(limits, tokens, lengths, cache.length, least=1)
    longest = longest_row(lengths, T)
    behind = f" behind {attached} attached ones" if attached else ""
    said = f"a prompt of {longest} tokens{behind} with room for {room} more"
    check_positions(limits, attached + longest + room, said)
    lengths = jnp.where(right, lengths, 0).astype(jnp.int32)
    run = _prefill(step, transform, tokens, lengths, cache, room, call_tokens, chunk, first)
    return run._replace(logits=jnp.where(right[:, None], run.logits, jnp.nan))


def _check_room(room: int, call_tokens: int) -> None:
    if room < 0:
        raise ValueError(f"room must be at least 0 tokens, got {room}.")
    if call_tokens < 1:
        raise ValueError(f"call_tokens must be at least 1, got {call_tokens}.")


def _prefill(step, transform, tokens, lengths, cache, room, call_tokens, chunk, first) -> Run:
    schedule, T = transform.schedule, tokens.shape[1]
    if chunk is None or chunk >= T:
        out = step(tokens, next_positions(cache, lengths, T), cache, needs=schedule.needs, last_only=True)
        seen = Observation(out.layers, new=lengths, prompt=lengths, prompt_slots=T, room=room, first=first)
        return start(transform, out, seen, room=room, call_tokens=call_tokens, step=step, tokens=tokens)
    slots, left = _reserved(schedule, T, room, call_tokens)
    begins = schedule.begins and schedule.frees_in_prefill is None
    how = dict(room=room, first=first, begins=slots if begins else None)
    logits, cache, state = _prefill_chunks(step, transform, tokens, lengths, cache, chunk, **how)
    cache = cache if begins else cache.reserve(slots)
    return Run(logits[:, -1], cache.constrained(), state, lengths, left, first)


def start(
    transform: CacheTransform,
    prompt: StepOutput,
    observation: Observation,
    *,
    room: int,
    call_tokens: int = 1,
    step: Step | None = None,
    tokens: Int32[Array, "B T"] | None = None,
) -> Run:
    """Compresses a prompt that a decoder has read, and makes room for what follows: the end of `prefill`.

    Args:
      transform: what compresses.
      prompt: the decoder's output for the whole prompt, from a cache with 0 slots.
      observation: what the decoder saw, as `transform.schedule.needs` asks.
      room: tokens that will follow, over all later calls.
      call_tokens: the most tokens a later call brings at once.
      step: the decoder, for a transform that reads the prompt again.
      tokens: i32[B, T], the prompt, for the same.

    Raises:
      ValueError: the transform reads the prompt again, and there is no decoder or no prompt to do so; or the prompt
        should have seen what the transform puts before it; or room is impossible, or more than the decoder's positions.
    """
    schedule = transform.schedule
    if schedule.before is not None:
        raise ValueError(f"{schedule.name} puts something before the prompt, which was read without it: use prefill.")
    _check_room(room, call_tokens)
    slots = observation.prompt_slots
    longest = longest_row(observation.prompt, slots)
    check_positions(limits_of(step), longest + room, f"a prompt of {longest} tokens with room for {room} more")
    how = schedule.needs.reread
    if how is not None:
        _check_nothing_attached(schedule, observation.first)
        if step is None or tokens is None:
            raise ValueError(f"step and tokens are needed by {schedule.name}, which reads the prompt again.")
        observation = reread(step, how, tokens, prompt.cache, observation)
    cache, state = transform.init(prompt.cache, observation.replace(room=room))
    first = observation.first
    more, left = _reserved(schedule, slots, room, call_tokens)
    return Run(prompt.logits[:, -1], cache.reserve(more).constrained(), state, observation.prompt, left, first)


def _check_nothing_attached(schedule, first) -> None:
    if first is not None:
        raise ValueError(f"{schedule.name} reads the prompt again, which it cannot behind what was attached before it.")


def _reserved(schedule, prompt_slots: int, room: int, call_tokens: int) -> tuple[int, Room]:
    """Returns the slots that are reserved behind a prompt, and the room that a run begins with."""
    slots, left = Room.reserved(prompt_slots, schedule.described, room, call_tokens, schedule.frees_in_decode)
    if schedule.budget is not None:
        budget = budget_slots(schedule.budget, prompt_slots, schedule.at_least)
        if budget > prompt_slots + room:  # more would come into fewer slots than the budget asks for
            left = Room(prompt_slots, schedule.described, total=room)
    return slots, left


def _prefill_chunks(step, transform, tokens, lengths, cache, chunk, room, first, begins):
    """Reads a prompt in chunks; with `begins`, slots to reserve behind it, all is stored at once as at the end."""
    (B, T), schedule = tokens.shape, transform.schedule
    bounded = schedule.frees_in_prefill is not None
    window = schedule.needs.queries
    collect = None if bounded else schedule.observer.after_chunk
    if window == ALL and not bounded and collect is None:
        raise ValueError(
            "chunk must be None for a transform that wants every query of the prompt at its end: wrap it in "
            "every_step or every_chunk instead of at_prefill_end."
        )
    needs = schedule.needs if bounded or collect else schedule.needs._replace(queries=min(window, chunk))
    if schedule.needs.reread is not None and bounded:
        raise ValueError(
            f"chunk must be None for {schedule.name}, which reads the whole prompt again but drops parts of it at "
            "every chunk: wrap it in at_prefill_end."
        )
    count = -(-T // chunk)
    prompt = tokens
    tokens = jnp.pad(tokens, ((0, 0), (0, count * chunk - T))).reshape(B, count, chunk)

    def observed(layers, new):
        return Observation(layers, new=new, prompt=lengths, prompt_slots=T, room=room, first=first)

    # One padding token shows what a call reports of each layer; the compiler drops its arithmetic.
    probe = step(
        tokens[:, 0, :1], jnp.full((B, 1), -1), cache, needs=schedule.needs._replace(queries=0), last_only=True
    )
    nothing_seen = observed(probe.layers, jnp.zeros_like(lengths))
    if bounded:
        cache, state = transform.init(cache, nothing_seen.replace(phase="begin"))
        cache = cache.reserve(schedule.frees_in_prefill - 1 + chunk)
    elif begins is not None:
        cache, state = transform.init(cache, nothing_seen)
        cache = cache.reserve(T).reserve(begins)
    else:
        state = ()
        cache = cache.reserve(T)
        if collect:
            cache = collect(cache, nothing_seen)
    keep = window if window not in (0, ALL) else 0
    queries = query_window.start(keep, nothing_seen)
    sums = tuple(layer.sums for layer in probe.layers)  # of padding: nothing yet

    def body(carry, t):
        cache, state, queries, sums, logits = carry
        new = jnp.clip(lengths - t * chunk, 0, chunk)
        out = step(
            jax.lax.dynamic_index_in_dim(tokens, t, axis=1, keepdims=False),
            next_positions(cache, new, chunk),
            cache,
            needs=needs,
            last_only=True,
        )
        seen = observed(out.layers, new)
        cache = out.cache
        if bounded:
            cache, state = transform.step(cache, state, seen)
        elif collect:
            cache = collect(cache, seen)
        cache = cache.constrained()
        if keep:
            queries = query_window.extend(queries, seen)
        sums = tuple(layer.with_sums(*old).sums for old, layer in zip(sums, out.layers))
        logits = jnp.where((new > 0)[:, None, None], out.logits, logits)
        return (cache, state, queries, sums, logits), None

    carry = (cache, state, queries, sums, jnp.zeros_like(probe.logits))
    (cache, state, queries, sums, logits), _ = jax.lax.scan(body, carry, jnp.arange(count))
    if begins is not None:
        return logits, cache, state
    seen = query_window.observe(queries, cache, nothing_seen) if keep else nothing_seen
    whole = lambda layer, moments, largest: layer.replace(moments=moments, largest=largest)
    seen = seen.replace(layers=tuple(whole(layer, *of) for layer, of in zip(seen.layers, sums)))
    if schedule.needs.reread is not None:
        _check_nothing_attached(schedule, first)
        seen = reread(step, schedule.needs.reread, prompt, cache, seen)
    cache, state = transform.init(cache, seen)
    return logits, cache, state


def extend(
    step: Step,
    transform: CacheTransform,
    run: Run,
    tokens: Int32[Array, "B T"],
    lengths: Int32[Array, " B"],
) -> tuple[Run, jax.Array]:
    """Feeds T given tokens in one call: a question, a forced answer.

    Args:
      step: the decoder.
      transform: what compresses.
      run: the sequence so far.
      tokens: i32[B, T], padded at the end with any ids.
      lengths: i32[B], real tokens of each row, 0 for a row that rests.

    Returns:
      The run after them, and f32[B, T, V], the logits after each of them.

    Raises:
      ValueError: tokens or lengths are impossible, or there is no room for them; what only values can tell: see
        `kvjax.limits`.
    """
    check_tokens(tokens, lengths, run.cache)
    run.room.check_method(transform.schedule.described)
    run.room.check_call(longest_row(lengths, tokens.shape[1]))
    return _extend(step, transform, run, tokens, lengths)


def _extend(step, transform, run, tokens, lengths) -> tuple[Run, jax.Array]:
    left = tokens_left(run)
    right = readable(limits_of(step), tokens, lengths, run.cache.length, least=0, left=left)
    right, lengths = going_on(right, lengths, run.logits)
    out = step(
        tokens,
        next_positions(run.cache, lengths, tokens.shape[1]),
        run.cache,
        needs=transform.schedule.needs._replace(prompt_attention=None),
        last_only=False,
    )
    of_prompt = dict(prompt=run.prompt, prompt_slots=run.room.prompt_slots, first=run.first)
    seen = Observation(out.layers, new=lengths, phase="decode", **of_prompt)
    cache, state = transform.step(out.cache, run.state, seen)
    cache = cache.constrained()
    logits, each = logits_after(out.logits, run.logits, right, lengths)
    return run._replace(logits=logits, cache=cache, state=state), each


def tokens_left(run: Run) -> Int32[Array, " B"] | None:
    """i32[B]: tokens that each row still has room for; None: any number."""
    total = run.room.total
    read = run.prompt if run.first is None else run.first + run.prompt
    return None if total is None else total - (run.cache.length - read)


class Generated(NamedTuple):
    """Tokens drawn by `generate`."""

    tokens: Int32[Array, "B max_new_tokens"]  # after a stop token, the stop token again; -1: there were no logits
    lengths: Int32[Array, " B"]  # tokens before and including the stop token
    run: Run


def generate(
    step: Step,
    transform: CacheTransform,
    run: Run,
    *,
    max_new_tokens: int,
    sampler: Sampler,
    key: jax.Array,
    stop_tokens: tuple[int, ...] = (),
) -> Generated:
    """Draws tokens one by one in a `lax.while_loop`, until every row has stopped.

    A row whose logits are NaN draws -1 and stops, the others go on.

    Args:
      step: the decoder.
      transform: what compresses; its `step` runs after every token.
      run: the sequence so far, with room for `max_new_tokens`.
      max_new_tokens: at most this many for each row, at least 0.
      sampler: draws a token from logits.
      key: PRNG key. Each draw has its own, made of it, the row and the position, so a second call goes on with other
        numbers under the same key.
      stop_tokens: a row ends with any of these.

    Raises:
      TypeError: `max_new_tokens` is no whole number.
      ValueError: it is below 0, or more than the cache has room or the decoder positions for; where only values can
        tell that, see `kvjax.limits`.
    """
    check_whole("max_new_tokens", max_new_tokens, 0)
    run.room.check_method(transform.schedule.described)
    run = run._replace(room=run.room.after(max_new_tokens))
    B = run.logits.shape[0]
    nothing = jnp.zeros((B, max_new_tokens), jnp.int32), jnp.zeros((B,), jnp.int32)
    if max_new_tokens == 0:
        return Generated(*nothing, run)
    # Any ids: what they are is not known yet, only how many may come.
    count = jnp.full((B,), max_new_tokens)
    left = tokens_left(run)
    readable(Limits(positions=limits_of(step).positions), nothing[0], count, run.cache.length, least=0, left=left)
    stops = jnp.asarray(stop_tokens, jnp.int32)
    keys = row_keys(key, B)

    def draw(run):
        return sampler(run.logits, jax.vmap(jax.random.fold_in)(keys, run.cache.length))

    def going(carry):
        index, done, _, _, _ = carry
        return (index < max_new_tokens) & ~jnp.all(done)

    def body(carry):
        index, done, tokens, lengths, run = carry
        token = jnp.where(done, tokens[:, jnp.maximum(index - 1, 0)], draw(run))
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], index, axis=1)
        alive = (~done & (token >= 0)).astype(jnp.int32)
        lengths = lengths + alive
        done = done | (token < 0) | jnp.any(token[:, None] == stops, axis=-1)
        run, _ = _extend(step, transform, run, token[:, None], alive)
        return index + 1, done, tokens, lengths, run

    start = (jnp.zeros((), jnp.int32), jnp.zeros((B,), bool), *nothing, run)
    index, _, tokens, lengths, run = jax.lax.while_loop(going, body, start)
    last = tokens[:, jnp.maximum(index - 1, 0)][:, None]  # a row that has stopped repeats its last token
    tokens = jnp.where(jnp.arange(max_new_tokens) < index, tokens, last)
    return Generated(tokens, lengths, run)
