"""Every method config and the compositions that stress the algebra, at sizes that suit 24 tokens."""

from __future__ import annotations

from experiments.methods import load_method
from kvjax import every, every_chunk, every_step, evict, scores, when_full
from kvjax.budget import budget_slots
from tests.kvjax.conformance import Case, Sizes

FLOAT, INDEX = 4, 4  # bytes


def _dense(slots: int, sizes: Sizes, stats: int = 0) -> int:
    """`L * B * K * S * (2 * H * itemsize + 4 + 4 * stats)`."""
    heads = sizes.layers * sizes.batch * sizes.kv_heads
    return heads * slots * (2 * sizes.head_dim * FLOAT + INDEX + FLOAT * stats)


def grows(budget=None):
    """A dense segment of the budget (all of the prompt without one) and all the room that was asked for."""

    def nbytes(sizes):
        kept = sizes.prompt if budget is None else budget_slots(budget, sizes.prompt)
        return _dense(kept + sizes.room, sizes) + INDEX * sizes.batch

    return nbytes


def bounded(budget, extra: int, stats: int = 0):
    """A dense segment of the budget and `extra` slots, whatever follows."""
    return lambda sizes: _dense(budget_slots(budget, sizes.prompt) + extra, sizes, stats) + INDEX * sizes.batch


def kivi(bits: int, group: int, residual: int, budget=None):
    """Packed blocks for the prompt (or the budget) and the room, with bfloat16 scales, and an exact tail."""

    def nbytes(sizes):
        H = sizes.head_dim
        kept = sizes.prompt if budget is None else budget_slots(budget, sizes.prompt)
        body = (-(-kept // residual) + -(-sizes.room // residual)) * residual
        # codes, then scale and zero of keys per channel and of values per token, then positions
        token = 2 * H * bits / 8 + 2 * 2 * H / group + 2 * 2 * H / group + INDEX
        packed = sizes.layers * sizes.batch * sizes.kv_heads * body * token
        assert packed == int(packed)
        return int(packed) + _dense(residual, sizes) + INDEX * sizes.batch

    return nbytes


_ALL = 64  # more than any test brings
_window = lambda: scores.window_attention(4, kernel=3)


def _config(name: str, nbytes, *bindings: str, budget: int | float = 12, exact: bool = False, **promises) -> Case:
    """The method of `configs/methods/NAME.gin`, with bindings that make it small; `exact`: given enough budget."""

    def build(budget=budget):
        return load_method(name, budget=budget, bindings=bindings).transform

    lossless = (lambda: build(_ALL)) if exact else None
    return Case(name, build, nbytes, lossless, **promises)


CASES = [
    _config("full", grows(), exact=True),
    _config("int8", kivi(8, 8, 8), "kivi.group = 8", "kivi.residual = 8"),
    _config("int4", kivi(4, 16, 16), "kivi.group = 16", "kivi.residual = 16"),
    _config("int2", kivi(2, 8, 16), "kivi.group = 8", "kivi.residual = 16"),
    _config("streamingllm", bounded(12, 0), "streamingllm.sinks = 2", exact=True),
    _config("streamingllm_orig", bounded(12, 0), "streamingllm.sinks = 2", exact=True),
    _config("snapkv", grows(12), "snapkv.window = 4", "snapkv.kernel = 3", exact=True),
    _config("h2o", bounded(12, 1, stats=1), exact=True),
    _config("h2o_chunked", bounded(0.5, 1, stats=2), "h2o.normalise = True", budget=0.5),
    _config("tova", bounded(12, 1), exact=True, aligned=True),
    _config("knorm", grows(0.5), budget=0.5, exact=True),
    _config("keydiff", grows(12), exact=True),
    _config("random", grows(0.5), budget=0.5, exact=True),
    _config(
        "snapkv_int4",
        kivi(4, 8, 8, budget=16),
        "snapkv.window = 4",
        "snapkv.pooling = 'max'",
        "kivi.group = 8",
        "kivi.residual = 8",
        budget=16,
    ),
    _config("keydiff_int8", kivi(8, 8, 8, budget=0.5), "kivi.group = 8", "kivi.residual = 8", budget=0.5),
    Case(
        "every_4_window_attention",
        lambda: every(4, evict(_window(), 12, recent=4)),
        bounded(12, 4),
        lambda: every(4, evict(_window(), _ALL, recent=4)),
        slack=3,
    ),
    Case(
        "when_full_knorm",
        lambda: when_full(4, evict(scores.negative_key_norm(), 12, recent=2)),
        bounded(12, 4),
        lambda: when_full(4, evict(scores.negative_key_norm(), _ALL, recent=2)),
        slack=3,
    ),
    Case(
        "every_chunk_window_attention",
        lambda: every_chunk(evict(_window(), 12, recent=4)),
        grows(12),
        lambda: every_chunk(evict(_window(), _ALL, recent=4)),
    ),
    Case(
        "every_step_keydiff",
        lambda: every_step(evict(scores.key_difference(), 0.5, recent=2, sinks=1)),
        bounded(0.5, 1),
        lambda: every_step(evict(scores.key_difference(), _ALL, recent=2, sinks=1)),
    ),
]

METHODS = {
    "full": "full",
    "h2o": "h2o",
    "keydiff": "keydiff",
    "kivi": "int8",
    "knorm": "knorm",
    "random_eviction": "random",
    "snapkv": "snapkv",
    "streamingllm": "streamingllm",
    "tova": "tova",
}
"""The case that stands for each public method."""
