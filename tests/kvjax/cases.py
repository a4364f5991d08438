"""Every method config and the compositions that stress the algebra, at sizes that suit 24 tokens."""

from __future__ import annotations

from collections.abc import Callable

import kvjax
from experiments.methods import load_method
from kvjax import adaptive, every, every_chunk, every_step, evict, evict_by_head, scores, when_full
from kvjax.budget import budget_slots
from tests.fake_calibrations import Words, calibrate
from tests.kvjax import tiny_model
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


def pages(budget, page: int, tail: int | None = None):
    """Pages for K * budget slots of a layer, what rounding may add, and a dense segment for the room or the tail."""

    def nbytes(sizes):
        K = sizes.kv_heads
        count = -(-(K * budget_slots(budget, sizes.prompt) + K // 2) // page) + K - 1
        pool = sizes.layers * sizes.batch * count * (page * (2 * sizes.head_dim * FLOAT + INDEX) + INDEX)
        return pool + _dense(sizes.room if tail is None else tail, sizes) + INDEX * sizes.batch

    return nbytes


def pool(budget, page: int):
    """Pages for L * K * budget slots of the cache, what rounding may add, where they lie, and room in each layer."""

    def nbytes(sizes):
        heads = sizes.layers * sizes.kv_heads
        count = -(-(heads * budget_slots(budget, sizes.prompt) + heads // 2) // page) + heads - 1
        shared = sizes.batch * count * (page * (2 * sizes.head_dim * FLOAT + INDEX) + INDEX)
        return shared + 2 * INDEX * sizes.layers * sizes.batch + _dense(sizes.room, sizes) + INDEX * sizes.batch

    return nbytes


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


def gear(bits: int, group: int, block: int, rank: int, outliers: int, scale: int = 2):
    """`kivi` with factors of every block and, of every channel and every token, `outliers` values and indices."""

    def nbytes(sizes):
        H, heads = sizes.head_dim, sizes.layers * sizes.batch * sizes.kv_heads
        blocks = -(-sizes.prompt // block) + -(-sizes.room // block)
        token = 2 * H * bits / 8 + 2 * 2 * scale * H / group + INDEX
        factors = 2 * scale * rank * (block + H)
        beside = (scale + 1) * outliers * (H + block)  # of a channel's block of keys, and of a token's value
        whole = heads * blocks * (block * token + factors + beside)
        assert whole == int(whole)
        return int(whole) + _dense(block, sizes) + INDEX * sizes.batch

    return nbytes


def mikv(important_bits: int, bits: int, group: int, residual: int, budget: int):
    """`kivi` for the important tokens, words for the others, and the balancer of every key channel."""

    def nbytes(sizes):
        H, heads, word = sizes.head_dim, sizes.layers * sizes.batch * sizes.kv_heads, 32 // bits
        others = -(-(sizes.prompt - budget) // word) * word
        token = 2 * H * bits / 8 + 2 * 2 * 2 * H / group + INDEX
        return int(heads * (others * token + FLOAT * H)) + kivi(important_bits, group, residual, budget)(sizes)

    return nbytes


def _round(slots: int, granule: int) -> int:
    return -(-slots // granule) * granule


def codes(bits: int, slots: int, group: int = 16, stats: int = 0):
    """Slots that are quantized one by one, with scales and zeros of groups of channels."""

    def nbytes(sizes):
        heads = sizes.layers * sizes.batch * sizes.kv_heads
        token = 2 * sizes.head_dim * bits // 8 + 2 * 2 * 2 * sizes.head_dim // group + INDEX + FLOAT * stats
        return heads * slots * token + INDEX * sizes.batch

    return nbytes


def turboquant(bits: int):
    """Codes and two norms of every slot, in whole words, and the mean key."""

    def nbytes(sizes):
        word = 32 // (1 if bits == 3 else bits)
        slots = _round(_round(sizes.prompt, word) + sizes.room, word)
        token = 2 * sizes.head_dim * bits / 8 + 2 * FLOAT + INDEX
        levels = sizes.layers * 2 * FLOAT * 2**bits
        heads = sizes.layers * sizes.batch * sizes.kv_heads
        mean = heads * sizes.head_dim * FLOAT
        return int(heads * slots * token) + mean + levels + INDEX * sizes.batch

    return nbytes


def staircase(bands, last: int, group: int, residual: int):
    """Packed blocks in bands of `(bits, blocks)`, of the prompt's tokens beyond them and of the room; an exact tail."""

    def nbytes(sizes):
        H, heads = sizes.head_dim, sizes.layers * sizes.batch * sizes.kv_heads
        token = lambda bits: 2 * H * bits / 8 + 2 * 2 * 2 * H / group + INDEX
        packed = sum(residual * blocks * token(bits) for bits, blocks in bands)
        left = max(sizes.prompt - residual * sum(blocks for _, blocks in bands), 0)
        packed += (_round(left, residual) + _round(sizes.room, residual)) * token(last)
        return int(heads * packed) + _dense(residual, sizes) + INDEX * sizes.batch

    return nbytes


def zipcache(salient_bits: int, bits: int, group: int, residual: int, budget: int):
    """Salient tokens in blocks, words for the others, the channels of values in each, and an exact tail."""

    def nbytes(sizes):
        H, heads = sizes.head_dim, sizes.layers * sizes.batch * sizes.kv_heads
        token = lambda b: 2 * H * b / 8 + 2 * 2 * H / group + 2 * 2 + INDEX
        others = _round(sizes.prompt - budget, max(group, 32 // bits))
        body = _round(budget, residual) + _round(sizes.room, residual)
        packed = heads * (others * token(bits) + body * token(salient_bits) + 2 * FLOAT * H)
        return int(packed) + _dense(residual, sizes) + INDEX * sizes.batch

    return nbytes


def slots_of(token, granule: int = 1, row=0):
    """Slots that are stored one by one, of `token(H)` bytes beside the position, and `row(H)` a row and head."""

    def nbytes(sizes):
        heads, H = sizes.layers * sizes.batch * sizes.kv_heads, sizes.head_dim
        slots = _round(_round(sizes.prompt, granule) + sizes.room, granule)
        return int(heads * (slots * (token(H) + INDEX) + (row(H) if row else 0))) + INDEX * sizes.batch

    return nbytes


def blocks_of(token, residual: int, row=0):
    """Blocks of slots of `token(H)` bytes beside the position, an exact tail, and `row(H)` a row and head."""

    def nbytes(sizes):
        heads, H = sizes.layers * sizes.batch * sizes.kv_heads, sizes.head_dim
        slots = _round(sizes.prompt, residual) + _round(sizes.room, residual)
        body = heads * (slots * (token(H) + INDEX) + (row(H) if row else 0))
        return int(body) + _dense(residual, sizes) + INDEX * sizes.batch

    return nbytes


def kivi_mixed(key_bits: int, value_bits: int, group: int, residual: int):
    """`kivi` with bits of their own."""

    def nbytes(sizes):
        both = kivi(key_bits, group, residual)(sizes) + kivi(value_bits, group, residual)(sizes)
        return both // 2  # each has keys and values of one width

    return nbytes


def matryoshka_int4(ranks, group: int, residual: int):
    """Coordinates of each head, packed in groups over tokens, exact ones in the tail; bases and means."""

    def nbytes(sizes):
        total, heads = sum(ranks), sizes.layers * sizes.kv_heads
        body = (_round(sizes.prompt, residual) + _round(sizes.room, residual)) * (
            total // 2 + 2 * 2 * total // group + INDEX * heads
        )
        tail = residual * (FLOAT * total + INDEX * heads)
        bases = FLOAT * sizes.head_dim * (total + 2 * heads)
        return sizes.batch * (body + tail) + bases + INDEX * sizes.batch

    return nbytes


def xkv_int4(key_rank: int, value_rank: int, group: int, residual: int):
    """Packed coordinates that both layers share, with bases of each row; the room in blocks."""

    def nbytes(sizes):
        ranks, width = key_rank + value_rank, sizes.layers * sizes.kv_heads * sizes.head_dim
        slots = _round(sizes.prompt, group)
        packed = slots * (ranks // 2 + INDEX) + 2 * 2 * slots * ranks // group
        bases = FLOAT * ranks * width
        return sizes.batch * (packed + bases) + kivi(4, group, residual, budget=0)(sizes)

    return nbytes


def minicache_int4(retain: int, group: int, residual: int):
    """Packed directions and exact lengths of two layers; what is retained and the room in blocks."""

    def nbytes(sizes):
        H, merged = sizes.head_dim, sizes.prompt - retain
        slots = _round(merged, group)
        packed = slots * (2 * H * 4 // 8 + 2 * 2 * 2 * H // group + INDEX)
        lengths = merged * sizes.layers * 2 * FLOAT
        return sizes.batch * sizes.kv_heads * (packed + lengths) + kivi(4, group, residual, budget=retain)(sizes)

    return nbytes


_ALL = 64  # more than any test brings
_window = lambda: scores.window_attention(4, kernel=3)
_by_head = lambda budget: evict_by_head(_window(), budget, heads=adaptive(), recent=4, page=4)


def _config(
    name: str,
    nbytes,
    *bindings: str,
    budget: int | float = 12,
    read: int | float = 8,
    exact: bool | tuple[str, ...] | Callable[[], kvjax.CacheTransform] = False,
    **promises,
) -> Case:
    """The method of `configs/methods/NAME.gin`, with bindings that make it small.

    `exact`: it is when given enough budget, or with these bindings, or what this builds is.
    """

    def build(budget=budget, read=read, more=()):
        model = dict(calibrate=calibrate(tiny_model.CONFIG), tokenizer=Words())
        return load_method(name, budget=budget, read=read, bindings=(*bindings, *more), **model).transform

    lossless = exact or None
    if exact is True or isinstance(exact, tuple):
        lossless = lambda: build(_ALL, _ALL, () if exact is True else exact)
    return Case(name, build, nbytes, lossless, **promises)


def _full_rank_gear():
    how = dict(key_group=16, value_group=16, block=16, loops=1, scale_dtype="float32")
    return kvjax.at_prefill_end(kvjax.quantize_corrected(2, rank=16, outliers=0.0, **how))


def _calibrated(recipe: str):
    return calibrate(tiny_model.CONFIG)(recipe, None)


def fp8():
    """A byte for each number, beside the position."""

    def nbytes(sizes):
        slots = sizes.layers * sizes.batch * sizes.kv_heads * (sizes.prompt + sizes.room)
        return slots * (2 * sizes.head_dim + INDEX) + INDEX * sizes.batch

    return nbytes


def think(prune: float, window: int):
    """Keys of fewer channels and their index for all but the newest tokens."""

    def nbytes(sizes):
        H, heads = sizes.head_dim, sizes.layers * sizes.batch * sizes.kv_heads
        kept = H - int(prune * H)
        older = (sizes.prompt - window) * (FLOAT * (kept + H) + INDEX) + INDEX * kept
        return heads * older + _dense(window + sizes.room, sizes) + INDEX * sizes.batch

    return nbytes


def projected(*ranks: int, arrays: int = 1, means: int = 1):
    """Coordinates of each token, and bases that the rows share.

    Args:
      ranks: of keys and of values of every head of every layer; one for all.
      arrays: of H x R numbers that a basis has.
      means: of H numbers that it has.
    """

    def nbytes(sizes):
        H, heads = sizes.head_dim, sizes.layers * sizes.kv_heads
        total = 2 * heads * ranks[0] if len(ranks) == 1 else sum(ranks)
        token = FLOAT * total + INDEX * heads
        bases = FLOAT * (arrays * H * total + means * heads * 2 * H)
        return sizes.batch * (sizes.prompt + sizes.room) * token + bases + INDEX * sizes.batch

    return nbytes


def cskv(rank: int, window: int, arrays: int = 1):
    """Joint coordinates in blocks, bases that the rows share, and an exact tail."""

    def nbytes(sizes):
        blocks = -(-sizes.prompt // window) + -(-sizes.room // window)
        token = FLOAT * 2 * rank + INDEX
        bases = FLOAT * arrays * sizes.layers * sizes.kv_heads * sizes.head_dim * 2 * rank
        body = sizes.layers * sizes.batch * blocks * window * token
        return body + bases + _dense(window, sizes) + INDEX * sizes.batch

    return nbytes


def rotatekv(bits: int, residual: int, sinks: int):
    """Sinks, codes and their scales in blocks, an exact tail; an order of the keys' coordinates and its inverse."""

    def nbytes(sizes):
        H, K = sizes.head_dim, sizes.kv_heads
        blocks = -(-sizes.prompt // residual) + -(-sizes.room // residual)
        token = 2 * H * bits // 8 + 2 * 2 * 2 + INDEX  # one bfloat16 scale and zero for all channels of a head
        packed = sizes.layers * sizes.batch * K * blocks * residual * token
        orders = sizes.layers * 2 * INDEX * K * H
        return packed + _dense(residual + sinks, sizes) + orders + INDEX * sizes.batch

    return nbytes


def xkv(key_rank: int, value_rank: int):
    """Coordinates that both layers share, and bases of each row; a dense segment for the room."""

    def nbytes(sizes):
        ranks, width = key_rank + value_rank, sizes.layers * sizes.kv_heads * sizes.head_dim
        group = FLOAT * ranks * (sizes.prompt + width) + INDEX * sizes.prompt
        return sizes.batch * group + _dense(sizes.room, sizes) + INDEX * sizes.batch

    return nbytes


def million(residual: int):
    """A byte for every two channels, in blocks; bfloat16 codebooks that rows and heads share; an exact tail."""

    def nbytes(sizes):
        H = sizes.head_dim
        blocks = -(-sizes.prompt // residual) + -(-sizes.room // residual)
        codes = sizes.layers * sizes.batch * sizes.kv_heads * blocks * residual * (2 * H // 2 + INDEX)
        codebooks = sizes.layers * 2 * 256 * H * 2
        return codes + codebooks + _dense(residual, sizes) + INDEX * sizes.batch

    return nbytes


def minicache(retain: int):
    """Directions that both layers share and two lengths of each; what is retained is dense, as is the room."""

    def nbytes(sizes):
        token = 2 * FLOAT * sizes.head_dim + INDEX + sizes.layers * 2 * FLOAT
        merged = sizes.batch * sizes.kv_heads * (sizes.prompt - retain) * token
        return merged + _dense(retain + sizes.room, sizes) + INDEX * sizes.batch

    return nbytes


def in_pages(page: int, residual: int, summary: int, budget=None, token: int | None = None, given: int = 0):
    """Blocks of `residual` slots for the prompt (or the budget) and the room, and an exact tail; what chooses pages.

    Args:
      page: slots; bounds of positions are stored where they are more than one.
      residual: slots of a block and of the tail.
      summary: bytes of a page, or of a slot where a page is one.
      budget: tokens kept; None: all.
      token: bytes of a stored slot; None: dense.
      given: layers that choose nothing.
    """

    def nbytes(sizes):
        kept = sizes.prompt if budget is None else budget_slots(budget, sizes.prompt)
        slots = (-(-kept // residual) + -(-sizes.room // residual)) * residual
        heads = sizes.batch * sizes.kv_heads
        per_token = 2 * sizes.head_dim * FLOAT + INDEX if token is None else token
        index = (sizes.layers - given) * heads * slots // page * (summary + (2 * INDEX if page > 1 else 0))
        stored = sizes.layers * heads * slots * per_token
        return stored + index + _dense(residual, sizes) + INDEX * sizes.batch

    return nbytes


def plus(nbytes, more):
    """A formula and what it lacks."""
    return lambda sizes: nbytes(sizes) + more(sizes)


_H = tiny_model.CONFIG.head_dim
_ropes = lambda s: s.layers * FLOAT * s.head_dim // 2

CASES = [
    _config("full", grows(), exact=True),
    _config(
        "xattention",
        grows(),
        "xattention.block = 4",
        "xattention.stride = 2",
        "xattention.tau = 0.6",
        exact=("xattention.tau = 1.0",),
    ),
    _config(
        "videoxl2",
        grows(),
        "videoxl2.block = 2",
        "videoxl2.group = 4",
        "videoxl2.first = 2",
        exact=("videoxl2.previous = 16",),
    ),
    _config(
        "minference",
        grows(),
        "minference.block = 4",
        exact=("minference.calibration = None",),
    ),
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
    _config("kivi4", kivi(4, 8, 16), "kivi.group = 8", "kivi.residual = 16"),
    _config("kivi3", kivi(3, 16, 32), "kivi.group = 16", "kivi.residual = 32"),
    _config("kivi2", kivi(2, 16, 16), "kivi.group = 16", "kivi.residual = 16"),
    _config(
        "gear",
        gear(2, 8, 16, 2, 2),
        "gear.group = 8",
        "gear.block = 16",
        "gear.outliers = 0.1",
        exact=_full_rank_gear,
    ),
    _config(
        "mikv",
        mikv(8, 2, 8, 8, 8),
        "mikv.group = 8",
        "mikv.residual = 8",
        budget=8,
    ),
    _config("fp8", fp8()),
    _config(
        "pyramidkv",
        # 8 beside the window: high = min(2 * 8 - 8 // 4, 24 - 4), low = 16 - 14 over two layers; short rows have 8 each
        lambda s: (_dense(4 + 14, s) + _dense(4 + 8, s)) // 2 + _dense(s.room, s) + INDEX * s.batch,
        "pyramidkv.window = 4",
        "pyramidkv.kernel = 3",
        "pyramidkv.beta = 4",
        exact=True,
        shared_by="cache",
    ),
    _config(
        "adakv_snapkv",
        pages(12, 4),
        "adakv_snapkv.window = 4",
        "adakv_snapkv.kernel = 3",
        "adakv_snapkv.page = 4",
        exact=True,
        shared_by="layer",
    ),
    _config("adakv_expected", pages(0.5, 4), "adakv_expected.page = 4", budget=0.5, exact=True, shared_by="layer"),
    _config(
        "cake", pool(12, 4), "cake.window = 4", "cake.kernel = 3", "cake.page = 4", exact=True, shared_by="cache"
    ),
    _config("kvzip", pool(0.5, 4), "kvzip.chunk = 10", "kvzip.page = 4", budget=0.5, exact=True, shared_by="cache"),
    _config(
        "kvzip_int4",
        # 10 pages of 8 for 4 * 12 + 2 slots, packed; where they lie; the room, packed in blocks, and the exact tails
        lambda s: s.batch * (10 * (8 * 36 + INDEX) + 2 * INDEX * s.layers) + kivi(4, 8, 8, budget=0)(s),
        "kvzip.chunk = 10",
        "kvzip.page = 8",
        "kivi.group = 8",
        "kivi.residual = 8",
        shared_by="cache",
    ),
    _config("expected_attention", grows(12), "expected_attention.future = 16", exact=True),
    _config(
        "kvmerger",
        lambda s: _dense(12 + s.room, s, stats=1) + INDEX * s.batch,
        "kvmerger.width = 2.0",
        "kvmerger.threshold = 0.0",
        exact=True,
    ),
    _config(
        "d2o",
        # four sinks; the 8 others of the layers are split by exp(-0.637) and exp(-0.270): 6 (8 of short rows) and 9
        lambda s: (_dense(4 + 8 + 1, s, stats=1) + _dense(4 + 9 + 1, s, stats=1)) // 2 + INDEX * s.batch,
        exact=True,
        shared_by="cache",
    ),
    _config("lazyeviction", bounded(12, 4, stats=2), "lazyeviction.window = 4", exact=True, slack=3),
    _config("think", think(0.4, 4), "think.window = 4", exact=("think.prune = 0.0",)),
    _config(
        "matryoshka_pca",
        projected(4, 8, 12, 4, 8, 4, 4, 12),
        exact=lambda: kvjax.methods.matryoshka_pca(_calibrated("matryoshka_pca"), 16, 16),
    ),
    _config(
        "matryoshka_trained",
        projected(4, 8, 12, 4, 8, 4, 4, 12, means=0),
        exact=lambda: kvjax.methods.matryoshka_trained(_calibrated("matryoshka_trained"), 16, 16),
    ),
    _config(
        "kqsvd",
        projected(8, arrays=2, means=0),
        exact=lambda: kvjax.methods.kqsvd(_calibrated("kqsvd"), 16, 16),
    ),
    _config("cskv", cskv(16, 4), "cskv.window = 4", exact=("cskv.key_density = 1.0", "cskv.value_density = 1.0")),
    _config(
        "duoattention",
        # half of the four heads keep the prompt and the room, half are rings of six
        lambda s: (_dense(s.prompt + s.room, s) + _dense(6, s)) // 2 + INDEX * s.batch,
        "duoattention.sinks = 2",
        "duoattention.recent = 4",
    ),
    _config(
        "cskv_trained",
        cskv(16, 4, arrays=2),
        "cskv_trained.window = 4",
        exact=("cskv_trained.key_density = 1.0", "cskv_trained.value_density = 1.0"),
    ),
    _config(
        "duoattention_trained",
        lambda s: (_dense(s.prompt + s.room, s) + _dense(6, s)) // 2 + INDEX * s.batch,
        "duoattention_trained.sinks = 2",
        "duoattention_trained.recent = 4",
    ),
    _config("locret", lambda s: _dense(12 + s.room, s, stats=1) + INDEX * s.batch, exact=True),
    _config(
        "attention_gate",
        pages(12, 4),
        "attention_gate.sinks = 2",
        "attention_gate.recent = 4",
        "attention_gate.page = 4",
        exact=True,
        shared_by="layer",
    ),
    _config(
        "reasoncache",
        lambda s: grows()(s) + s.layers * s.kv_heads * 3 * (2 * s.head_dim * FLOAT + INDEX),  # once for all rows
        prefix=3,
    ),
    _config("lococo", grows(12), exact=True),
    _config("million", million(8), "million.residual = 8", exact=(f"million.residual = {_ALL}",)),
    _config(
        "rotatekv",
        rotatekv(2, 16, 3),
        "rotatekv.sinks = 3",
        exact=("rotatekv.sinks = 5", f"rotatekv.residual = {_ALL}"),
    ),
    _config("xkv", xkv(8, 12), exact=("xkv.key_rank = 1.0", "xkv.value_rank = 64")),
    _config(
        "minicache",
        minicache(2),  # int(0.1 * 24)
        "minicache.start = 0",
        "minicache.retain = 0.1",
        exact=("minicache.retain = 1.0",),
    ),
    _config(
        "razorattention",
        # half of the four heads keep the prompt and the room; half are rings of eight and a float32 mean with its bias
        lambda s: (_dense(s.prompt + s.room, s) + _dense(8, s) + _dense(1, s, stats=1)) // 2 + INDEX * s.batch,
        "razorattention.induction = 0.5",
        "razorattention.echo = 0",
        "razorattention.sinks = 2",
        "razorattention.recent = 4",
        "razorattention.fraction = 0.25",
    ),
    _config("lagkv", grows(16), "lagkv.lag = 5", "lagkv.sinks = 2", budget=16, exact=True),
    _config(
        "rkv", bounded(12, 4), "rkv.window = 4", "rkv.kernel = 3", "rkv.interval = 4", exact=True, slack=3
    ),
    _config("chunkkv", grows(12), "chunkkv.window = 4", "chunkkv.chunk = 3", "chunkkv.reuse = 2", exact=True),
    _config("keydiff_chunked", grows(12), exact=True),
    _config("criticalkv", grows(12), "criticalkv.window = 4", "criticalkv.kernel = 3", exact=True),
    _config("keyformer", bounded(12, 1, stats=1), exact=True),
    _config(
        "compactor",
        lambda s: _dense(12 + s.room, s, stats=1) + INDEX * s.batch,
        "compactor.chunk = 7",
        "compactor.sketch = 5",
        "compactor.sinks = 3",
        exact=True,
    ),
    _config(
        "prefixkv",
        # two beside; of the 20 others p + p^2 = 20 / 22 gives 12.7 to the first layer; short rows have 10 in the second
        lambda s: (_dense(14, s, stats=1) + _dense(12, s, stats=1)) // 2 + _dense(s.room, s, 1) + INDEX * s.batch,
        exact=True,
        shared_by="cache",
    ),
    _config("windowkv", grows(12), "windowkv.suffix = 4", "windowkv.window = 3", exact=True),
    _config("kvcrush", grows(12), "kvcrush.window = 4", "kvcrush.sinks = 2", exact=True),
    _config("critic", bounded(12, 1, stats=2), exact=True, aligned=True),
    _config("alisa", codes(8, 16), "alisa.window = 3", "alisa.group = 16", exact=("alisa.bits = None",)),
    _config(
        "headkv",
        pool(12, 4),
        "headkv.window = 4",
        "headkv.kernel = 3",
        "headkv.page = 4",
        exact=True,
        shared_by="cache",
    ),
    _config("elasticcache", lambda s: _dense(12 + s.room, s, stats=1) + INDEX * s.batch, exact=True),
    _config("lookm", lambda s: _dense(12 + s.room, s, stats=1) + INDEX * s.batch, exact=True),
    _config("cam", bounded(12, 1, stats=1), "cam.following = 3", exact=True),
    _config("ems", lambda s: _dense(12 + s.room, s, stats=3) + INDEX * s.batch, "ems.window = 4", exact=True),
    _config("mpcache_static", lambda s: _dense(12 + s.room, s, stats=1) + INDEX * s.batch, exact=True),
    _config("turboquant", turboquant(4)),
    _config("qserve", slots_of(lambda H: 2 * (H / 2 + 4), 8, row=lambda H: FLOAT * H)),
    _config(
        "mustafar",
        blocks_of(lambda H: 2 * (H / 8 + FLOAT * H / 2), 8),
        "mustafar.recent = 8",
        exact=("mustafar.key_sparsity = 0.0", "mustafar.value_sparsity = 0.0"),
    ),
    _config("olive", slots_of(lambda H: 2 * (H / 2 + 2))),
    _config(
        "qjl",
        # 2 H + H signs, two norms, two channels of 16 tokens by name; values of 2 bits in one group
        blocks_of(lambda H: 3 * H / 8 + 2 * 2 + 2 / 16 + H / 4 + 2 * 2 * H / 16, 32),
        "qjl.group = 16",
        "qjl.outliers = 2",
        "qjl.value_bits = 2",
        "qjl.residual = 32",
        exact=(f"qjl.residual = {_ALL}",),
    ),
    _config(
        "vidkv",
        # half of the channels with 2 bits and scale and zero, half with a bit and a mean; five trits a byte
        blocks_of(lambda H: H / 2 * (3 / 8 + 3 * 2 / 16) + -(-H // 5) + 2 * H / 16, 32, row=lambda H: INDEX * H),
        "vidkv.group = 16",
        "vidkv.residual = 32",
        exact=(f"vidkv.residual = {_ALL}",),
    ),
    _config(
        "saq",
        # a block of 8 bits, one of 4, and two less of the prompt's in the body of 2, beside the room's
        staircase(((8, 1), (4, 1)), 2, 8, 16),
        "saq.bits = (8, 4, 2)",
        "saq.blocks = (1, 1)",
        "saq.group = 8",
        "saq.residual = 16",
    ),
    _config(
        "zipcache",
        zipcache(4, 2, 8, 8, 8),
        "zipcache.group = 8",
        "zipcache.residual = 8",
        budget=8,
    ),
    _config(
        "zipvl",
        zipcache(4, 2, 8, 8, 8),
        "zipvl.tau = 0.6",
        "zipvl.probes = 6",
        "zipvl.group = 8",
        "zipvl.residual = 8",
        budget=8,
    ),
    _config(
        "fp8_scaled",
        # a scale for every channel of keys and values, which rows share
        lambda s: fp8()(s) + 2 * FLOAT * s.layers * s.kv_heads * s.head_dim,
    ),
    _config(
        "kvquant",
        # two outliers of each vector, ranges of values; levels, factors and means that rows share; a sink
        lambda s: blocks_of(lambda H: 2 * 3 * H / 8 + 2 * 2 * 3 + 4, 32)(s)
        + s.layers * (2 * 8 * FLOAT + 2 * FLOAT * s.kv_heads * s.head_dim)
        + _dense(1, s),
        exact=(f"kvquant.residual = {_ALL}",),
    ),
    _config(
        "palu",
        # coordinates and a position of every pair of heads, and bases that rows share
        lambda s: s.layers * (s.kv_heads // 2) * s.batch * (s.prompt + s.room) * (FLOAT * 2 * s.head_dim + INDEX)
        + FLOAT * s.layers * s.kv_heads * 2 * s.head_dim**2
        + INDEX * s.batch,
        exact=("palu.key_rank = 1.0", "palu.value_rank = 1.0"),
    ),
    _config(
        "kvsharer",
        lambda s: _dense(s.prompt, s) // 2 + _dense(s.room, s) + INDEX * s.batch,  # the prompt of one of two layers
        "kvsharer.shared = 1",
        exact=("kvsharer.shared = 0",),
    ),
    _config("kivi_k4v2", kivi_mixed(4, 2, 16, 16), "kivi.group = 16", "kivi.residual = 16"),
    _config(
        "streamingllm_int4",
        codes(4, 16),
        "streamingllm.sinks = 2",
        "quantize.key_group = 16",
        "quantize.value_group = 16",
    ),
    _config("h2o_int8", codes(8, 16, stats=1), "quantize.key_group = 16", "quantize.value_group = 16"),
    _config("h2o_int4", codes(4, 24, stats=1), "quantize.key_group = 16", "quantize.value_group = 16"),
    _config(
        "tova_int8", codes(8, 16), "quantize.key_group = 16", "quantize.value_group = 16", aligned=True
    ),
    _config(
        "matryoshka_int4",
        matryoshka_int4((4, 8, 12, 4, 8, 4, 4, 12), 8, 8),
        "quantize.key_group = 8",
        "quantize.value_group = 8",
        "quantize.residual = 8",
    ),
    _config(
        "xkv_int4",
        xkv_int4(8, 16, 8, 8),
        "xkv.key_rank = 8",
        "xkv.value_rank = 16",
        "quantize.key_group = 8",
        "quantize.value_group = 8",
        "quantize.residual = 8",
    ),
    _config(
        "duoattention_int4",
        lambda s: (kivi(4, 8, 8)(s) + codes(4, 8, group=8)(s)) // 2,
        "duoattention.sinks = 2",
        "duoattention.recent = 4",
        "quantize.key_group = 8",
        "quantize.value_group = 8",
        "quantize.residual = 8",
    ),
    _config(
        "minicache_int4",
        minicache_int4(2, 8, 8),
        "minicache.start = 0",
        "minicache.retain = 0.1",
        "quantize.key_group = 8",
        "quantize.value_group = 8",
        "quantize.residual = 8",
    ),
    _config("quest", in_pages(4, 4, 2 * FLOAT * _H), "quest.page = 4", "quest.dense_layers = ()", exact=True),
    _config(
        "quest_int4",
        in_pages(8, 8, 2 * FLOAT * _H, token=_H + 2 * 2 * 2 * _H // 8 + INDEX),
        "quest.page = 8",
        "quest.dense_layers = ()",
        "kivi.group = 8",
        "kivi.residual = 8",
        read=16,
    ),
    _config(
        "snapkv_quest",
        in_pages(4, 4, 2 * FLOAT * _H, budget=16),
        "snapkv.window = 4",
        "quest.page = 4",
        budget=16,
        exact=True,
    ),
    _config("mpcache", in_pages(4, 4, 2 * FLOAT * _H, budget=16), "mpcache.page = 4", budget=16, exact=True),
    _config(
        "tidaldecode",
        in_pages(1, 16, 0),
        "tidaldecode.select_at = (0,)",
        read=20,
        exact=True,
    ),
    _config(
        "retrieval_attention",
        in_pages(1, 16, 0),
        "retrieval_attention.sinks = 2",
        "retrieval_attention.recent = 2",
        read=20,
        exact=True,
    ),
    _config(
        "double_sparsity",
        plus(in_pages(1, 16, FLOAT * (_H // 4)), lambda s: s.layers * s.kv_heads * s.head_dim // 4 * INDEX),
        "double_sparsity.dense_layers = ()",
        read=20,
        exact=True,
    ),
    _config("sparq", in_pages(1, 16, FLOAT * _H), "sparq.r = 4", "sparq.recent = 2", read=20, exact=True),
    _config(
        "shadowkv",
        plus(
            in_pages(4, 4, FLOAT * _H + FLOAT, token=FLOAT * (_H // 2 + _H) + INDEX),
            lambda s: s.layers * s.batch * s.kv_heads * FLOAT * s.head_dim**2 // 2 + _ropes(s),
        ),
        "shadowkv.page = 4",
        "shadowkv.outliers = 1",
        "shadowkv.recent = 2",
        exact=("shadowkv.rank = 1.0",),
    ),
    _config(
        "shadowkv_int4",
        plus(
            in_pages(8, 8, FLOAT * _H + FLOAT, token=(_H + _H) // 2 + 2 * 2 * (_H + _H) // 16 + INDEX),
            lambda s: s.layers * s.batch * s.kv_heads * FLOAT * s.head_dim**2 + _ropes(s),
        ),
        "shadowkv.rank = 1.0",
        "shadowkv.outliers = 1",
        "quantize.key_group = 16",
        "quantize.value_group = 16",
        read=16,
    ),
    _config(
        "rekv",
        plus(in_pages(4, 4, FLOAT * _H), _ropes),
        "rekv.page = 4",
        "rekv.sinks = 2",
        "rekv.recent = 2",
        exact=True,
    ),
    Case(
        "adakv_int4",
        lambda: kvjax.chain(
            kvjax.methods.adakv_snapkv(12, window=4, kernel=3, page=8),
            kvjax.quantize(4, key_group=8, value_group=8, residual=8),
        ),
        # 5 pages of 8 for 2 * 12 + 1 slots, packed; then the room, packed in blocks, and the exact tail
        lambda s: s.layers * s.batch * 5 * (8 * 36 + INDEX) + kivi(4, 8, 8, budget=0)(s),
        shared_by="layer",
    ),
    Case(
        "merge_counted_int4",
        lambda: kvjax.chain(
            kvjax.at_prefill_end(kvjax.merge(_window(), 16, kvjax.into_nearest(), recent=4, log_count=True)),
            kvjax.quantize(4, key_group=8, value_group=8, residual=8),
        ),
        # 16 slots for the budget, 16 for the room and a tail of 8, each with its logarithm
        lambda s: kivi(4, 8, 8, budget=16)(s) + s.layers * s.batch * s.kv_heads * FLOAT * (16 + 16 + 8),
    ),
    Case(
        "every_4_window_attention",
        lambda: every(4, evict(_window(), 12, recent=4)),
        bounded(12, 4),
        lambda: every(4, evict(_window(), _ALL, recent=4)),
        slack=3,
    ),
    Case(
        "adakv_every_4",
        lambda: every(4, _by_head(12)),
        pages(12, 4, tail=4),
        lambda: every(4, _by_head(_ALL)),
        slack=3,
        shared_by="layer",
    ),
    Case(
        "every_4_expected_attention",
        lambda: every(4, evict(scores.future_attention(16, 2), 12, sinks=2)),
        bounded(12, 4),
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
    "adakv_expected": "adakv_expected",
    "adakv_snapkv": "adakv_snapkv",
    "alisa": "alisa",
    "attention_gate": "attention_gate",
    "cake": "cake",
    "cam": "cam",
    "chunkkv": "chunkkv",
    "compactor": "compactor",
    "critic": "critic",
    "criticalkv": "criticalkv",
    "cskv": "cskv",
    "cskv_trained": "cskv_trained",
    "d2o": "d2o",
    "double_sparsity": "double_sparsity",
    "duoattention": "duoattention",
    "duoattention_trained": "duoattention_trained",
    "elasticcache": "elasticcache",
    "ems": "ems",
    "expected_attention": "expected_attention",
    "fp8": "fp8",
    "fp8_scaled": "fp8_scaled",
    "full": "full",
    "gear": "gear",
    "h2o": "h2o",
    "headkv": "headkv",
    "keydiff": "keydiff",
    "keyformer": "keyformer",
    "kivi": "int8",
    "knorm": "knorm",
    "kqsvd": "kqsvd",
    "kvcrush": "kvcrush",
    "kvmerger": "kvmerger",
    "kvquant": "kvquant",
    "kvsharer": "kvsharer",
    "kvzip": "kvzip",
    "lagkv": "lagkv",
    "lazyeviction": "lazyeviction",
    "lococo": "lococo",
    "locret": "locret",
    "lookm": "lookm",
    "matryoshka_pca": "matryoshka_pca",
    "matryoshka_trained": "matryoshka_trained",
    "mikv": "mikv",
    "million": "million",
    "minference": "minference",
    "minicache": "minicache",
    "mpcache": "mpcache",
    "mpcache_static": "mpcache_static",
    "mustafar": "mustafar",
    "olive": "olive",
    "palu": "palu",
    "prefixkv": "prefixkv",
    "pyramidkv": "pyramidkv",
    "qjl": "qjl",
    "qserve": "qserve",
    "quest": "quest",
    "random_eviction": "random",
    "razorattention": "razorattention",
    "reasoncache": "reasoncache",
    "rekv": "rekv",
    "retrieval_attention": "retrieval_attention",
    "rkv": "rkv",
    "rotatekv": "rotatekv",
    "saq": "saq",
    "shadowkv": "shadowkv",
    "snapkv": "snapkv",
    "sparq": "sparq",
    "streamingllm": "streamingllm",
    "think": "think",
    "tidaldecode": "tidaldecode",
    "tova": "tova",
    "turboquant": "turboquant",
    "videoxl2": "videoxl2",
    "vidkv": "vidkv",
    "windowkv": "windowkv",
    "xattention": "xattention",
    "xkv": "xkv",
    "zipcache": "zipcache",
    "zipvl": "zipvl",
}
"""The case that stands for each public method."""
