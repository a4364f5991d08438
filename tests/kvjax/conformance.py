"""What every method must satisfy, whatever it does: one function a property.

A `Case` says how to build a method and what it promises; a `Harness` compiles its programs once. The checks take a
harness, so that a new method is tested by adding a case to `tests/kvjax/cases.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

import kvjax
from kvjax import sharding
from kvjax.budget import budget_rows
from models.weights import param_axes
from tests.kvjax import tiny_model
from tests.quick_jit import quick_jit

B, T, CHUNK, ROOM = 2, 24, 7, 12
LENGTHS = (24, 13)

# float32 on a model whose logits are of order one: other orders of summation, nothing else.
CLOSE = dict(rtol=1e-4, atol=1e-4)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a documented formula for bytes may refer to."""

    layers: int
    batch: int
    kv_heads: int
    head_dim: int
    prompt: int  # tokens of the longest prompt
    room: int  # tokens that will follow


@dataclasses.dataclass(frozen=True)
class Case:
    """A method at a size that suits 24 tokens, and what it promises.

    Attributes:
      build: returns the transform.
      nbytes: the documented formula: bytes of the cache after a prefill.
      lossless: returns it with a budget that holds everything, where that makes it exact.
      slack: tokens above its budget that it may hold after a step.
      shared_by: who shares the budget: a "head" has its own, the heads of a "layer" or of the whole "cache" divide
        theirs, up to rounding.
      aligned: it needs a token in the same slot in every head, and keeps it so.
      prefix: slots of every head that are no tokens of the prompt.
    """

    name: str
    build: Callable[[], kvjax.CacheTransform]
    nbytes: Callable[[Sizes], int]
    lossless: Callable[[], kvjax.CacheTransform] | None = None
    slack: int = 0
    shared_by: str = "head"
    aligned: bool = False
    prefix: int = 0


class Harness:
    """A case on the tiny model, its programs compiled on first use and kept.

    Args:
      case: the method.
      room: tokens that may follow the prompts.
      call_tokens: the most of them that one call brings.
    """

    def __init__(self, case: Case, room: int = ROOM, call_tokens: int = 1):
        self.case = case
        self.room = dict(room=room, call_tokens=call_tokens)
        self.transform = case.build()
        self.params = tiny_model.params()
        self.tokens = tiny_model.prompt(B, T)
        self.lengths = jnp.array(LENGTHS, jnp.int32)
        self.extend = quick_jit(self._extend)
        self.generate = quick_jit(self._generate, donate_argnums=1)
        self.chunked = quick_jit(functools.partial(self._prefill, chunk=CHUNK))
        self.one_shot = quick_jit(self._prefill)

    def _prefill(self, params, tokens, lengths, cache, chunk=None):
        return kvjax.prefill(
            tiny_model.bind(params), self.transform, tokens, lengths, cache, chunk=chunk, **self.room
        )

    def _extend(self, params, run, tokens, lengths):
        return kvjax.extend(tiny_model.bind(params), self.transform, run, tokens, lengths)[0]

    def _generate(self, params, run):
        return kvjax.generate(
            tiny_model.bind(params),
            self.transform,
            run,
            max_new_tokens=ROOM,
            sampler=kvjax.Greedy(),
            key=jax.random.key(0),
        )

    def prefill(self, how: str, tokens=None, lengths=None, params=None) -> kvjax.Run:
        """The run after the prompts, `how` being "one_shot" or "chunked"."""
        tokens = self.tokens if tokens is None else tokens
        lengths = self.lengths if lengths is None else lengths
        params = self.params if params is None else params
        return getattr(self, how)(params, tokens, lengths, tiny_model.empty(tokens.shape[0]))

    @functools.cached_property
    def run(self) -> kvjax.Run:
        """The run after a one-shot prefill of the standard prompts."""
        return self.prefill("one_shot")

    def decode(self, run: kvjax.Run, tokens: jax.Array, params=None) -> list[kvjax.Run]:
        """The runs after each of the forced tokens i32[B, n]."""
        runs, params = [], self.params if params is None else params
        for t in range(tokens.shape[1]):
            run = self.extend(params, run, tokens[:, t : t + 1], jnp.ones(run.prompt.shape, jnp.int32))
            runs.append(run)
        return runs

    @functools.cached_property
    def greedy(self) -> tuple[np.ndarray, list[kvjax.Run]]:
        """Tokens that a Python loop draws greedily after `run`, and the runs after each."""
        run, tokens, runs = self.run, [], []
        self.programs = []  # counted here: between tests, programs may be freed
        for _ in range(ROOM):
            tokens.append(jnp.argmax(run.logits, axis=-1).astype(jnp.int32))
            (run,) = self.decode(run, tokens[-1][:, None])
            runs.append(run)
            self.programs.append(self.extend._cache_size())
        return np.stack(tokens, axis=1), runs


def positions(cache: kvjax.Cache, row: int) -> list[list[list[int]]]:
    """Positions a row holds, sorted, per layer and KV head."""
    return [[head.tolist() for head in layer] for layer in kvjax.inspection.held_positions(cache, row)]


def assert_same_run(a: kvjax.Run, b: kvjax.Run, rows=((0, 0), (1, 1))) -> None:
    """Same next-token logits, same surviving tokens, for the given pairs of rows."""
    for i, j in rows:
        np.testing.assert_allclose(a.logits[i], b.logits[j], **CLOSE)
        assert positions(a.cache, i) == positions(b.cache, j)


def bytes_on_one_device(tree) -> int:
    """Of all arrays, those that the first device holds."""
    first = jax.devices()[0]
    return sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == first)


# --- the checks ---------------------------------------------------------------------------------------------------


def _sizes() -> Sizes:
    config = tiny_model.CONFIG
    return Sizes(config.num_layers, B, config.num_kv_heads, config.head_dim, T, ROOM)


def _describe(run: kvjax.Run):
    return jax.tree.structure(run), [(x.shape, x.dtype) for x in jax.tree.leaves(run)]


def check_promises(h: Harness) -> None:
    """Asked of shapes alone: bytes are those of the documented formula, and steps keep tree, shapes and dtypes.

    `check_step` passes on what a decoder call really reports.
    """
    new, count = h.tokens[:, :1], jnp.ones(B, jnp.int32)
    for how in ("one_shot", "chunked"):
        run = jax.eval_shape(getattr(h, how), h.params, h.tokens, h.lengths, tiny_model.empty(B))
        assert kvjax.nbytes(run.cache) == h.case.nbytes(_sizes())
    assert _describe(jax.eval_shape(h.extend, h.params, run, new, count)) == _describe(run)

    def observed(run):
        out = tiny_model.bind(h.params)(
            new, run.cache.length[:, None], run.cache, needs=h.transform.schedule.needs, last_only=False
        )
        seen = kvjax.Observation(out.layers, new=count, prompt=run.prompt, prompt_slots=T, phase="decode")
        return out.cache, run.state, seen

    kvjax.check_step(h.transform, *jax.eval_shape(observed, run))


def check_bytes(h: Harness) -> None:
    """Real bytes are those of the documented formula."""
    for how in ("one_shot", "chunked"):
        assert kvjax.nbytes(h.prefill(how).cache) == h.case.nbytes(_sizes())


def check_step_keeps_shapes(h: Harness) -> None:
    """A run keeps its tree over steps."""
    runs = h.greedy[1]
    assert _describe(h.run) == _describe(runs[0]) == _describe(runs[-1])


def check_no_recompilation(h: Harness) -> None:
    """One program serves the first token and all later ones."""
    assert len(h.greedy[1]) == ROOM
    assert len(set(h.programs)) == 1


def check_loop_in_jit_equals_python_loop(h: Harness) -> None:
    """`generate` with a donated cache draws what a Python loop draws, and ends in the same state."""
    tokens, runs = h.greedy
    out = h.generate(h.params, jax.tree.map(jnp.copy, h.run))
    np.testing.assert_array_equal(out.tokens, tokens)
    np.testing.assert_array_equal(out.lengths, [ROOM] * B)
    assert_same_run(out.run, runs[-1])
    np.testing.assert_array_equal(out.run.cache.length, np.array(LENGTHS) + ROOM)


def check_rows_do_not_see_each_other(h: Harness) -> None:
    """Exchanging the rows of a padded batch exchanges the results."""
    flip = lambda x: x[::-1]
    forced = tiny_model.prompt(B, 5, seed=3)
    for how in ("one_shot", "chunked"):
        run = h.prefill(how)
        other = h.prefill(how, flip(h.tokens), flip(h.lengths))
        assert_same_run(run, other, rows=((0, 1), (1, 0)))
        assert_same_run(h.decode(run, forced)[-1], h.decode(other, flip(forced))[-1], rows=((0, 1), (1, 0)))


def check_row_equals_its_own_run(h: Harness, how: str) -> None:
    """Each row of a padded batch is what it is alone, in a batch of one."""
    forced = tiny_model.prompt(B, 5, seed=3)
    batch = h.decode(h.prefill(how), forced)[-1]
    for row in range(B):
        one = np.s_[row : row + 1]
        alone = h.decode(h.prefill(how, h.tokens[one], h.lengths[one]), forced[one])[-1]
        assert_same_run(batch, alone, rows=((row, 0),))


def check_chunked_equals_one_shot(h: Harness) -> None:
    """A method that acts at the end of the prompt does not care how the prompt came."""
    assert h.transform.schedule.frees_in_prefill is None
    assert_same_run(h.prefill("chunked"), h.run)


def check_chunks_are_calls(h: Harness) -> None:
    """A prompt in chunks leaves what its first chunk leaves, followed by calls of the others."""
    chunked = h.prefill("chunked")
    program = Harness(h.case, room=T + ROOM, call_tokens=CHUNK)
    part = lambda start: (h.tokens[:, start : start + CHUNK], jnp.clip(h.lengths - start, 0, CHUNK))
    run = program.prefill("one_shot", *part(0))
    for start in range(CHUNK, T, CHUNK):
        run = program.extend(h.params, run, *part(start))
    assert_same_run(chunked, run)


def check_lossless(h: Harness) -> None:
    """With room for every token a method changes nothing that the decoder computes."""
    (run, logits), (full_run, full_logits) = _read_and_ask(h.case.lossless()), _full_cache()
    np.testing.assert_allclose(logits[0], full_logits[0], **CLOSE)
    np.testing.assert_allclose(logits[1, :4], full_logits[1, :4], **CLOSE)
    assert_same_run(run, full_run)


@functools.cache
def _full_cache():
    return _read_and_ask(kvjax.methods.full())


def _read_and_ask(transform: kvjax.CacheTransform):
    """A prompt and a question of several tokens, in one program."""

    def program(params, tokens, question, cache):
        step = tiny_model.bind(params)
        run = kvjax.prefill(step, transform, tokens, jnp.array(LENGTHS), cache, room=ROOM, call_tokens=6)
        return kvjax.extend(step, transform, run, question, jnp.array([6, 4]))

    return quick_jit(program)(
        tiny_model.params(), tiny_model.prompt(B, T), tiny_model.prompt(B, 6, seed=4), tiny_model.empty(B)
    )


def check_occupancy(h: Harness) -> None:
    """No row or head ever holds more than its budget, and a step's slack, after a call."""
    budget = h.transform.schedule.budget
    rows = np.asarray(budget_rows(budget, h.lengths, T))
    if h.transform.schedule.frees_in_decode is None:
        runs, slack = [h.run, h.prefill("chunked")], 0
    else:
        runs, slack = [h.run, h.prefill("chunked"), *h.greedy[1]], h.case.slack
    for run in runs:
        for row in range(B):
            held = _held(h.case, run.cache, row)
            rounding = 0 if h.case.shared_by == "head" else 0.5
            assert np.max(held) <= rows[row] + slack + rounding
            if h.case.shared_by != "cache" or LENGTHS[row] == T:  # the longest prompt decides the split
                assert np.min(held) >= min(rows[row], LENGTHS[row]) - rounding


def _held(case: Case, cache: kvjax.Cache, row: int) -> np.ndarray:
    """Tokens a head holds, averaged over those that share a budget."""
    held = np.array([[len(head) for head in layer] for layer in positions(cache, row)])
    return held.mean(axis={"head": (), "layer": 1, "cache": None}[case.shared_by])


def check_slots_may_be_permuted(h: Harness) -> None:
    """Neither attention nor the next eviction depends on where in a dense segment a token lies."""
    rng = np.random.default_rng(0)

    def shuffle(segment):
        if not isinstance(segment, kvjax.Segment):
            return segment  # blocks, pages and parts of heads have an order of their own
        B, K, S = segment.pos.shape
        order = np.argsort(rng.random((B, 1 if h.case.aligned else K, S)), axis=-1)
        order = jnp.asarray(np.broadcast_to(order, segment.pos.shape))
        move = lambda x: jnp.take_along_axis(x, order[(...,) + (None,) * (x.ndim - 3)], axis=2)
        return jax.tree.map(move, segment)

    shuffled = h.run.cache.map_layers(lambda layer: layer.replace(segments=tuple(map(shuffle, layer.segments))))
    forced = tiny_model.prompt(B, 6, seed=5)
    for a, b in zip(h.decode(h.run._replace(cache=shuffled), forced), h.decode(h.run, forced)):
        assert_same_run(a, b)


def check_hostile_inputs(h: Harness, kind: str) -> None:
    """No NaN or infinity, in a prefill of either kind and six steps after it."""
    tokens, lengths, params = h.tokens, h.lengths, h.params
    if kind == "one token":
        lengths = jnp.array([1, 24], jnp.int32)
    elif kind == "fewer tokens than sinks, window or group":
        lengths = jnp.array([2, 3], jnp.int32)
    elif kind == "constant":
        tokens = jnp.full_like(tokens, 7)
    elif kind == "huge":
        large = lambda layer: layer.replace(wqkv=layer.wqkv * 1e4)
        params = params.replace(layers=tuple(map(large, params.layers)))
    for how in ("one_shot", "chunked"):
        run = h.prefill(how, tokens, lengths, params)
        last = h.decode(run, tiny_model.prompt(B, 6, seed=6), params)[-1]
        for leaf in jax.tree.leaves((run.logits, run.cache, last.logits, last.cache)):
            assert jnp.isfinite(leaf).all()
        for row in range(B):
            for head in (head[h.case.prefix :] for layer in positions(last.cache, row) for head in layer):
                assert head and len(set(head)) == len(head) and head[-1] <= lengths[row] + 5


def check_bytes_do_not_grow(h: Harness) -> None:
    """Room for 200 tokens costs what room for 20 costs, and 200 tokens fit into it."""

    def prefilled(room):
        return jax.eval_shape(
            lambda cache: kvjax.prefill(
                tiny_model.bind(h.params), h.transform, h.tokens, h.lengths, cache, room=room
            ),
            tiny_model.empty(B),
        ).cache

    assert kvjax.nbytes(prefilled(200)) == kvjax.nbytes(prefilled(20)) == kvjax.nbytes(h.run.cache)
    tokens = jnp.concatenate([tiny_model.prompt(B, 100, seed=6), tiny_model.prompt(B, 100, seed=7)], axis=1)
    run = h.decode(h.run, tokens)[-1]
    assert kvjax.nbytes(run.cache) == kvjax.nbytes(h.run.cache)
    rows = np.asarray(budget_rows(h.transform.schedule.budget, h.lengths, T))
    for row in range(B):
        held, rounding = _held(h.case, run.cache, row), 0 if h.case.shared_by == "head" else 0.5
        assert rows[row] - rounding <= np.min(held) <= np.max(held) <= rows[row] + h.case.slack + rounding
        for head in (head for layer in positions(run.cache, row) for head in layer):
            assert len(set(head)) == len(head) and head[-1] <= LENGTHS[row] + 199


def check_sharded(harness: Harness, axes: str) -> None:
    """On a mesh: the same logits and the same tokens after prompt and decoding, from a part of the bytes."""
    mesh = sharding.make_mesh(axes, jax.devices()[:8])
    tokens = tiny_model.prompt(B, 2, seed=3)
    expected = [harness.run, *harness.decode(harness.run, tokens)]
    with sharding.use_mesh(mesh):
        there = Harness(harness.case)
        there.params = jax.device_put(
            there.params, sharding.shardings(param_axes(tiny_model.CONFIG), there.params, mesh)
        )
        runs = [there.run, *there.decode(there.run, tokens)]
        # What specs promise is what the program made, and what a loop would carry.
        for run in runs:
            placed = jax.tree.map(lambda x, spec: NamedSharding(mesh, spec), run.cache, run.cache.specs())
            jax.tree.map(lambda x, s: np.testing.assert_(x.sharding.is_equivalent_to(s, x.ndim)), run.cache, placed)
    for one, other in zip(expected, runs):
        assert_same_run(one, other)
    return bytes_on_one_device(runs[-1].cache)
