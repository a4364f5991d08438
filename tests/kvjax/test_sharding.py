"""Rules, layouts and what becomes of segments on a mesh of eight virtual devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import kvjax
from kvjax import sharding
from kvjax.segments import Segment, moves
from kvjax.segments.heads import HeadsSegment
from kvjax.segments.moves import keep_best
from kvjax.segments.slots import keep_highest, priority
from models.decoder import bind
from models.weights import abstract_params, param_axes
from pallas_kernels.partial import combine, combine_shards
from pallas_kernels.prefill_attention import prefill_attention
from tests.kvjax import tiny_model
from tests.kvjax.conformance import CLOSE, bytes_on_one_device
from tests.quick_jit import quick_jit

mesh_of = lambda text: sharding.make_mesh(text, jax.devices()[:8])


def test_rules_split_heads_first_and_slots_where_heads_do_not_divide():
    sizes = {"batch": 4, "kv_heads": 8, "slots": 1024}
    cases = {
        "seq:2,model:4": {"batch": (), "kv_heads": ("model",), "slots": ("seq",)},
        "data:2,seq:2,model:2": {"batch": ("data",), "kv_heads": ("model",), "slots": ("seq",)},
        "seq:8": {"batch": (), "kv_heads": (), "slots": ("seq",)},
    }
    for text, expected in cases.items():
        with sharding.use_mesh(mesh_of(text)):
            assert sharding.layout(sizes) == expected
    with sharding.use_mesh(mesh_of("seq:2,model:4")):
        # Two heads over four devices: slots take the axis, so nothing is held twice.
        assert sharding.layout(sizes | {"kv_heads": 2}) == {"batch": (), "kv_heads": (), "slots": ("seq", "model")}
        assert sharding.layout({"slots": 6}) == {"slots": ("seq",)}
        assert sharding.layout({"slots": 8, "slots:1": 2}) == {"slots": ("seq", "model"), "slots:1": ("seq",)}
        assert sharding.whole(100, 32, batch=1, kv_heads=2) == 256
        assert sharding.whole(100, 32, batch=1, kv_heads=8) == 128
    assert sharding.layout(sizes) == {"batch": (), "kv_heads": (), "slots": ()}  # no mesh
    assert sharding.whole(100, 32, batch=1, kv_heads=2) == 128
    # Whole tiles where they cost little: 16,400 slots or 256 blocks of 32, but not 8 slots more of 8,000.
    tiled = {(8001, 1): 8001, (16385, 1): 16392, (32767 * 2, 32): 65536, (65537, 32): 65792, (32736, 32): 32736}
    for (slots, block), expected in tiled.items():
        assert sharding.whole(slots, block, batch=1, kv_heads=2, tile=8) == expected
        assert expected - slots < slots / 128 + block


def test_other_rules_compile_another_program():
    x = jnp.zeros((8, 16))
    run = jax.jit(lambda x: sharding.constrain(x + 1, "batch", "tokens"))
    mesh = mesh_of("data:2,seq:4")
    with sharding.use_mesh(mesh):
        assert run(x).sharding.spec == P("data", "seq")
    with sharding.use_mesh(mesh, (("tokens", "data"),)):
        assert run(x).sharding.spec == P(None, "data")
    assert len(run(x).devices()) == 1


@pytest.mark.parametrize(
    "text, what", [("seq=2", "must name axes"), ("seq:3", "3 places, but there are 8"), ("", "must name axes")]
)
def test_a_bad_mesh_says_what_is_wrong(text, what):
    with pytest.raises(ValueError, match=what):
        mesh_of(text)


def test_weights_are_split_and_norms_are_not():
    mesh = mesh_of("seq:2,model:4")
    params = abstract_params(tiny_model.CONFIG, jnp.float32)
    placed = sharding.shardings(param_axes(tiny_model.CONFIG), params, mesh)
    layer = jax.tree.map(lambda s, x: s.shard_shape(x.shape), placed, params).layers[0]
    assert layer.wqkv == (32, 32) and layer.wo == (16, 32)  # (4 + 2 x 2) x 16 columns over 4
    assert layer.w_gate == (32, 12) and layer.w_down == (12, 32) and layer.attn_norm == (32,)
    both = sharding.shardings(param_axes(tiny_model.CONFIG), params, mesh, sharding.WEIGHTS_OVER_SEQUENCE)
    assert both.layers[0].w_gate.shard_shape((32, 48)) == (32, 6)
    whole = param_axes(tiny_model.CONFIG, int8=True).layers[0].w_gate
    assert whole.codes == P(None, "ffn") and whole.scale == P("ffn")


@pytest.mark.parametrize("window", [None, 11])
def test_a_ring_of_shards_attends_as_one(monkeypatch, window):
    monkeypatch.setattr(sharding, "_GATHERED", 0)
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.float32(rng.normal(size=shape))
    q, k, v = draw(2, 32, 4, 8), draw(2, 2, 32, 8), draw(2, 2, 32, 8)
    pos = jnp.where(jnp.arange(32) < jnp.array([[32], [19]]), jnp.arange(32), -1)
    expected = prefill_attention(q, k, v, pos, window=window)
    with sharding.use_mesh(mesh_of("seq:4,model:2")):
        run = jax.jit(functools.partial(sharding.attend_new, window=window))
        text = run.lower(q, k, v, pos).as_text()
        got = run(q, k, v, pos)
    assert "collective_permute" in text and "all_gather" not in text
    jax.tree.map(functools.partial(np.testing.assert_allclose, **CLOSE), got, expected)


@pytest.mark.parametrize("empty", [False, True])
def test_parts_on_shards_merge_as_parts_in_a_list(empty):
    rng = np.random.default_rng(1)
    out = jnp.float32(rng.normal(size=(8, 1, 3, 2, 4)))
    lse = jnp.float32(rng.normal(size=(8, 1, 3, 2)))
    lse = lse.at[:, :, 1].set(-jnp.inf) if empty else lse.at[2].set(-jnp.inf)  # a query that sees nothing, or a shard
    out = jnp.where((lse == -jnp.inf)[..., None], 0.0, out)
    expected = combine([kvjax.Partial(*x) for x in zip(out, lse)])
    merge = lambda out, lse: combine_shards(kvjax.Partial(out[0], lse[0]), ("seq",))
    with sharding.use_mesh(mesh_of("seq:8")):
        got = sharding.over_shards(merge, (P("seq"), P("seq")), kvjax.Partial(P(), P()))(out, lse)
    jax.tree.map(functools.partial(np.testing.assert_allclose, **CLOSE), got, expected)


def _slots(S=32, filled=20, seed=0):
    rng = np.random.default_rng(seed)
    pos = jnp.broadcast_to(jnp.where(jnp.arange(S) < filled, jnp.arange(S), -1), (2, 2, S))
    draw = lambda: jnp.float32(rng.normal(size=(2, 2, S, 4)))
    return Segment.of(draw(), draw(), jnp.int32(pos)).drop(jnp.int32(pos) == 3)


@pytest.mark.parametrize("count", [1, 8])
def test_new_tokens_go_to_the_same_slots(count):
    held, new = _slots(), _slots(count, count, seed=1)
    new = new.with_slots(pos=jnp.where(jnp.arange(count) < max(count - 2, 1), 40 + jnp.arange(count), new.pos * 0 - 1))
    write = lambda a, b: a.write(b)
    expected = jax.jit(write)(held, new)
    with sharding.use_mesh(mesh_of("seq:4,model:2")):
        got = jax.jit(write)(held, new)
    assert got.k.sharding.spec == P(None, "model", "seq")
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("heads", [((0, 1),), ((1,), (0,))])
def test_mass_of_heads_in_parts_is_that_of_one_device(heads):
    held = HeadsSegment.of(_slots(), heads, lambda part, index: part)
    raw = jnp.float32(np.random.default_rng(3).normal(size=(2, 5, 4, 4)))
    pos = jnp.broadcast_to(jnp.arange(15, 20), (2, 5))
    queries = kvjax.Queries(raw, pos, None)
    how = dict(window=None, scale=None)

    def mass(held, queries):
        return sharding.mass(held, queries, sharding.attend(held, queries, **how).lse, **how)

    expected = quick_jit(mass)(held, queries)
    assert jnp.max(jnp.abs(jnp.sum(expected, axis=-1) - 5)) < 1e-4  # of each head, what five queries gave
    with sharding.use_mesh(mesh_of("seq:4,model:2")):
        np.testing.assert_allclose(quick_jit(mass)(held, queries), expected, **CLOSE)


@pytest.mark.parametrize("count, at_a_time", [(8, 8192), (5, 8192), (48, 4), (44, 4)])
def test_slots_are_gathered_across_shards(count, at_a_time, monkeypatch):
    """A part for every shard, all for each of them, a part in three pieces, and slot by slot."""
    monkeypatch.setattr(moves, "_MOST_GATHERED", at_a_time)
    held = _slots()
    index = jnp.int32(np.random.default_rng(2).integers(0, 32, size=(2, 2, count)))
    valid = index % 5 > 0
    expected = held.take(index, valid)
    with sharding.use_mesh(mesh_of("seq:4,model:2")):
        got = jax.jit(lambda s, i, v: s.take(i, v))(held, index, valid)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_selecting_per_shard_keeps_the_best_of_each_and_sends_nothing():
    held = _slots(filled=32)
    scores = jnp.float32(np.random.default_rng(4).normal(size=(2, 2, 32)))
    rows = jnp.int32([12, 9])
    keep = lambda s, x, r: keep_best(s, priority(x, s.pos), 12, r)
    with sharding.use_mesh(mesh_of("seq:4,model:2"), select_per_shard=True):
        compiled = jax.jit(keep).lower(held, scores, rows).compile()
        got = jax.jit(keep)(held, scores, rows)
    for row in range(2):
        for head in range(2):
            expected = []
            for shard in range(4):
                own = [s for s in range(8 * shard, 8 * shard + 8) if s != 3]  # slot 3 is empty
                best = sorted(own, key=lambda s: -scores[row, head, s])
                expected += sorted(best[: 3 if row == 0 else (3, 2, 2, 2)[shard]])
            kept = got.pos[row, head]
            assert kept[kept >= 0].tolist() == expected
    assert not any(name in compiled.as_text() for name in ("all-gather", "all-reduce", "all-to-all", "permute"))
    jax.tree.map(np.testing.assert_array_equal, jax.jit(keep)(held, scores, rows), held.take(*keep_highest(
        priority(scores, held.pos), held.pos, 12, rows
    )))


@pytest.mark.parametrize("axes", ["seq:8", "model:8", "data:2,model:4"])
def test_bytes_of_a_device_fall_as_the_mesh_says(axes):
    transform = kvjax.identity()
    params, tokens = tiny_model.params(), tiny_model.prompt(2, 24)
    lengths = jnp.int32([24, 13])
    with sharding.use_mesh(mesh_of(axes)):
        read = lambda p, t, n: kvjax.prefill(tiny_model.bind(p), transform, t, n, tiny_model.empty(2), room=8)
        run = quick_jit(read)(params, tokens, lengths)
    layers = run.cache.layers
    assert kvjax.nbytes(layers) == 2 * 2 * 2 * 32 * (2 * 16 * 4 + 4)
    assert bytes_on_one_device(layers) == kvjax.nbytes(layers) // 8


def test_memory_of_a_chunked_prefill_does_not_grow_with_the_prompt():
    """A bounded method reads eight times as many tokens: what grows is the prompt's own ids."""
    transform = kvjax.methods.streamingllm(budget=32, sinks=4)
    params = tiny_model.params()

    def memory(T):
        def read(p, tokens, lengths):
            step = bind(p, tiny_model.CONFIG)
            return kvjax.prefill(step, transform, tokens, lengths, tiny_model.empty(1), room=4, chunk=16)

        shapes = jax.ShapeDtypeStruct((1, T), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
        return quick_jit(read).lower(params, *shapes).compile().memory_analysis()

    short, long = memory(1024), memory(8192)
    assert long.output_size_in_bytes == short.output_size_in_bytes
    ids = 4 * (8192 - 1024)
    assert long.temp_size_in_bytes - short.temp_size_in_bytes <= 3 * ids  # the ids, padded, and cut into chunks


def test_runs_come_back_on_another_mesh_and_refuse_another_shape(tmp_path):
    transform = kvjax.chain(kvjax.methods.knorm(16), kvjax.methods.kivi(4, 16, 16))
    params, tokens, lengths = tiny_model.params(), tiny_model.prompt(2, 24), jnp.int32([24, 13])
    read = lambda p, t, n: kvjax.prefill(tiny_model.bind(p), transform, t, n, tiny_model.empty(2), room=8)
    with sharding.use_mesh(mesh_of("data:2,model:4")):
        run = quick_jit(read)(params, tokens, lengths)
        kvjax.save_run(tmp_path / "run", run, {"method": "knorm_int4", "text": "a test"})
    with sharding.use_mesh(mesh_of("data:2,seq:4")):
        like = jax.eval_shape(read, params, tokens, lengths)
        again = kvjax.load_run(tmp_path / "run", like)
        specs = jax.tree.leaves(again.specs())
    for x, y, spec in zip(jax.tree.leaves(run), jax.tree.leaves(again), specs):
        np.testing.assert_array_equal(x, y)
        assert y.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh_of("data:2,seq:4"), spec), y.ndim)
    with pytest.raises(ValueError, match=r"another run \(method knorm_int4, text a test\): .* is .*, expected .*\["):
        kvjax.load_run(tmp_path / "run", like._replace(prompt=jax.ShapeDtypeStruct((3,), jnp.int32)))
    with pytest.raises(ValueError, match="kvjax_run.json cannot be used"):
        kvjax.load_run(tmp_path / "nothing", like)
