"""When a transform acts in the life of a cache."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kvjax import query_window
from kvjax.observation import ALL
from kvjax.transforms.base import CacheTransform


def at_prefill_end(transform: CacheTransform) -> CacheTransform:
    """Acts once, when the prompt is in. Afterwards the cache grows with every token."""

    def init(cache, observation):
        if observation.phase == "begin":
            return cache, ()
        return transform.init(cache, observation.replace(grows=True))

    never = dict(begins=False, frees_in_prefill=None, frees_in_decode=None, excess=None)
    return transform._replace(init=init, schedule=transform.schedule._replace(acts_in=(), **never))


def from_first_chunk(transform: CacheTransform) -> CacheTransform:
    """Stores tokens as the transform does from the first chunk of a prompt on; a prompt read at once, at its end.

    A prompt in chunks then never has a cache of full precision: memory is the compressed cache and one chunk. Each
    chunk reads those before it as they are stored, so the result is not that of `at_prefill_end`.

    Raises:
      ValueError: how it stores slots depends on the prompt.
    """
    if not transform.schedule.begins:
        raise ValueError(
            f"{transform.schedule.name} decides by the prompt how it stores slots: wrap it in at_prefill_end instead."
        )
    once = at_prefill_end(transform)
    return once._replace(schedule=once.schedule._replace(begins=True))


def every_chunk(transform: CacheTransform) -> CacheTransform:
    """Acts after every chunk of the prompt and not while decoding: constant memory for any prompt length.

    Raises:
      ValueError: it frees no slots while the prompt arrives, and the next chunk would find no room.
    """
    if transform.schedule.frees_in_prefill is None:
        raise ValueError(
            f"{transform.schedule.name} frees no slots while the prompt arrives; it acts at the prompt's end "
            "(at_prefill_end)."
        )
    acts_in = tuple(phase for phase in transform.schedule.acts_in if phase == "prefill")
    schedule = transform.schedule._replace(acts_in=acts_in, frees_in_prefill=1, frees_in_decode=None, excess=None)
    growing = lambda run: lambda *of: run(*of[:-1], of[-1].replace(grows=True))
    return transform._replace(schedule=schedule).map(growing)


def every_step(transform: CacheTransform) -> CacheTransform:
    """Acts after every call of the decoder: each chunk of the prompt and each generated token."""
    return _freeing(1, _remembering(transform))


def every(n: int, transform: CacheTransform) -> CacheTransform:
    """Acts whenever `n` tokens have come since it last did, row by row.

    The cache holds up to `n` tokens more than the transform's budget.

    Args:
      n: tokens between two actions, at least 1.
      transform: what acts. Its statistics are kept at every call.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1 token, got {n}.")
    transform = _remembering(transform)

    def init(cache, observation):
        cache, state = transform.init(cache, observation)
        return cache, (state, jnp.zeros_like(observation.new))

    act = _acting(transform)

    def observe(cache, state, observation):
        inner, since = state
        cache, inner = transform.observed(cache, inner, observation)
        return cache, (inner, since + observation.new)

    def update(cache, state, observation):
        inner, since = state
        due = since >= n
        cache, inner = act(cache, inner, observation, due)
        return cache, (inner, jnp.where(due, 0, since))

    return _freeing(n, _around(transform, init, observe, update))


def when_full(slack: int, transform: CacheTransform) -> CacheTransform:
    """Acts on the rows in which a layer holds `slack` tokens more than its budget.

    Like `every(slack, ...)`, but a row that is still below its budget in all layers is left alone.

    Args:
      slack: slots kept free above the budget, at least 1.
      transform: what acts; it must say how much it holds above its budget, as `evict`, `merge` and `evict_by_head` do.
    """
    if slack < 1:
        raise ValueError(f"slack must be at least 1 slot, got {slack}.")
    excess = transform.schedule.excess
    if excess is None:
        raise ValueError(
            f"when_full needs a transform with a token budget that says what it holds above it, such as evict, got "
            f"{transform.schedule.name}."
        )
    transform = _remembering(transform)
    act = _acting(transform)

    def update(cache, state, observation):
        return act(cache, state, observation, excess(cache, observation) >= slack)

    return _freeing(slack, transform._replace(update=update))


def _freeing(tokens: int, transform: CacheTransform) -> CacheTransform:
    """The same, which frees slots every so many tokens.

    Raises:
      ValueError: it does not act while decoding, and would free none.
    """
    if "decode" not in transform.schedule.acts_in:
        raise ValueError(f"{transform.schedule.name} acts on the prompt alone; it cannot act while decoding.")
    return transform._replace(
        schedule=transform.schedule._replace(frees_in_prefill=tokens, frees_in_decode=tokens)
    )


def _around(transform: CacheTransform, init, observe, update) -> CacheTransform:
    """The functions of a transform around another, whose schedule stays but for what follows every call."""
    observer = transform.schedule.observer._replace(after_call=observe)
    return CacheTransform(init, update, transform.schedule._replace(observer=observer))


def _acting(transform: CacheTransform):
    """`_where_due` of one transform, compiled once where a caller runs it outside jit."""
    return jax.jit(functools.partial(_where_due, transform))


def _where_due(transform, cache, state, observation, due):
    """Runs `update` where a row is due, and skips it altogether when none is."""
    leaves, tree = jax.tree.flatten((cache, state))
    changed: list[int] = []

    def run(leaves):
        after = jax.tree.leaves(transform.updated(*jax.tree.unflatten(tree, leaves), observation))
        changed[:] = [i for i, (a, b) in enumerate(zip(after, leaves)) if a is not b]
        return [after[i] for i in changed]

    jax.eval_shape(run, leaves)  # finds which leaves an update touches: only those cross the branch

    def act(leaves):
        row = lambda x: due.reshape(due.shape + (1,) * (x.ndim - 1))
        return [jnp.where(row(new), new, leaves[i]) for i, new in zip(changed, run(leaves))]

    touched = jax.lax.cond(jnp.any(due), act, lambda leaves: [leaves[i] for i in changed], leaves)
    for i, new in zip(changed, touched):
        leaves[i] = new
    return jax.tree.unflatten(tree, leaves)


def _remembering(transform: CacheTransform) -> CacheTransform:
    """Gives a transform what it needs of the whole sequence while decoding, too.

    A call of the decoder shows only its own tokens: the last W queries, moments of queries and largest inputs of
    earlier calls are kept in the state.
    """
    needs = transform.schedule.needs
    window = needs.queries if needs.queries not in (0, 1, ALL) else 0
    sums = bool(needs.moments_from or needs.largest_inputs)
    if not window and not sums:
        return transform

    def init(cache, observation):
        cache, state = transform.init(cache, observation)
        queries = query_window.start(window, observation) if window else ()
        return cache, (state, queries, tuple(layer.sums for layer in observation.layers) if sums else ())

    def with_sums(observation, earlier):
        layers = tuple(layer.with_sums(*of) for layer, of in zip(observation.layers, earlier, strict=True))
        return observation.replace(layers=layers)

    def observe(cache, state, observation):
        inner, queries, earlier = state
        if sums:
            observation = with_sums(observation, earlier)
            earlier = tuple(layer.sums for layer in observation.layers)
        cache, inner = transform.observed(cache, inner, observation)
        return cache, (inner, query_window.extend(queries, observation) if window else (), earlier)

    def update(cache, state, observation):
        inner, queries, earlier = state
        seen = query_window.observe(queries, cache, observation) if window else observation
        if sums:
            layers = (layer.replace(moments=m, largest=x) for layer, (m, x) in zip(seen.layers, earlier, strict=True))
            seen = seen.replace(layers=tuple(layers))
        cache, inner = transform.updated(cache, inner, seen)
        return cache, (inner, queries, earlier)

    return _around(transform, init, observe, update)
