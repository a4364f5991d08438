"""The losses of the recipes, against what they are by definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from experiments import measurements
from experiments.recipes.attention_gate import open_gates, train_attention_gate
from experiments.recipes.cskv import rounded, train_cskv
from experiments.recipes.duoattention import MixedLayer, train_duoattention
from experiments.recipes.lococo import train_lococo
from experiments.recipes.locret import answer_logits
from experiments.recipes.matryoshka import train_matryoshka, turned
from experiments.recipes.prefix import train_prefix
from experiments.recipes.recipe import Frozen, cross_entropy, read_context, read_follow
from experiments.training_text import Batch
from kvjax.scores import retaining_heads, retaining_scores
from models import Model
from tests.kvjax import tiny_model
from tests.quick_jit import quick_jit

CONFIG = tiny_model.CONFIG
L, K, N, H = CONFIG.num_layers, CONFIG.num_kv_heads, CONFIG.num_heads, CONFIG.head_dim
ROPE = kvjax.Rope.from_base(10000.0, H)
CLOSE = dict(rtol=1e-4, atol=1e-5)  # float32, other orders of summation


@pytest.fixture(scope="module")
def batch():
    weight = np.zeros((2, 6), np.float32)
    weight[0, 1:] = 1 / 5
    weight[1, 2:4] = 1 / 2
    context, follow = (np.asarray(tiny_model.prompt(2, n, seed=n % 5)) for n in (12, 6))
    return Batch(context, np.int32([12, 9]), follow, weight)


def normal(seed, *shape):
    return jnp.float32(np.random.default_rng(seed).normal(size=shape))


def segment(seed=0, slots=10, pos=None):
    pos = jnp.broadcast_to(jnp.arange(slots) if pos is None else pos, (1, K, slots))
    return kvjax.Segment.of(normal(seed, 1, K, slots, H), normal(seed + 1, 1, K, slots, H), pos)


def queries(seed, *pos):
    return kvjax.Queries(normal(seed, 1, len(pos), N, H), jnp.int32([pos]), ROPE)


def test_turned_axes_stay_orthogonal_and_are_the_first_ones_without_a_turn():
    axes = jnp.float32(np.linalg.qr(np.random.default_rng(0).normal(size=(2, 64, 64)))[0])
    np.testing.assert_allclose(turned(axes, jnp.zeros_like(axes)), axes, atol=1e-6)
    for size in (0.01, 1.0):
        found = turned(axes, size * normal(1, 2, 64, 64))
        np.testing.assert_allclose(found.mT @ found, np.broadcast_to(np.eye(64), found.shape), atol=1e-5)
        np.testing.assert_allclose(np.linalg.det(found), np.linalg.det(axes), rtol=1e-4)
    # By definition, in float64.
    lower = np.tril(np.asarray(0.1 * normal(2, 64, 64), np.float64), -1)
    half, eye = (lower - lower.T) / 2, np.eye(64)
    want = np.asarray(axes[0]) @ np.linalg.inv(eye - half) @ (eye + half)
    np.testing.assert_allclose(turned(axes[0], 0.1 * normal(2, 64, 64)), want, atol=1e-5)


def test_matryoshka_at_full_rank_is_the_model_itself_and_cut_it_is_not(batch):
    axes = jnp.float32(np.linalg.qr(np.random.default_rng(0).normal(size=(L, 2, K, H, H)))[0])
    frozen = Frozen(tiny_model.params(), {"axes": axes})
    trained = {"turn": 0.1 * normal(1, *axes.shape)}
    whole, found = train_matryoshka(widths=1).loss(CONFIG, trained, frozen, batch, jax.random.key(0))
    np.testing.assert_allclose(found["kl"], 0.0, atol=1e-5)
    np.testing.assert_allclose(whole, 0.75 * found["full_ce"], rtol=1e-4)
    _, cut = train_matryoshka(widths=8).loss(CONFIG, trained, frozen, batch, jax.random.key(0))
    assert cut["kl"] > 1e-3 and cut["full_ce"] == pytest.approx(float(found["full_ce"]), rel=1e-5)
    _, other = train_matryoshka(widths=8).loss(CONFIG, trained, frozen, batch, jax.random.key(1))
    assert other["kl"] != cut["kl"]  # ranks are drawn anew


def test_mixed_attention_is_full_streaming_or_between():
    full, other = segment(), segment().drop(segment().pos % 2 == 0)
    layers = [kvjax.LayerCache((s,)) for s in (full, other)]
    asked = queries(5, 10, 11)
    a, b = (layer.attend(asked).out for layer in layers)
    mixed = lambda *gate: MixedLayer(*layers, jnp.float32(gate)).attend(asked).out
    np.testing.assert_array_equal(mixed(1, 1), a)
    np.testing.assert_array_equal(mixed(0, 0), b)
    group = N // K
    np.testing.assert_allclose(mixed(1, 0.25)[:, :, :group], a[:, :, :group], **CLOSE)
    np.testing.assert_allclose(mixed(1, 0.25)[:, :, group:], (0.25 * a + 0.75 * b)[:, :, group:], **CLOSE)


def test_gates_cost_nothing_where_streaming_sees_everything_and_something_where_it_does_not(batch):
    frozen = Frozen(tiny_model.params(), ())
    closed = {"gates": jnp.zeros((L, K))}
    sees = lambda recent: train_duoattention(sinks=0, recent=recent).loss(CONFIG, closed, frozen, batch, None)
    np.testing.assert_allclose(sees(12)[0], 0.0, atol=1e-10)
    assert sees(3)[1]["moved"] > 1e-4
    recipe = train_duoattention(sinks=0, recent=3, penalty=0.5)
    loss, found = recipe.loss(CONFIG, {"gates": jnp.ones((L, K))}, frozen, batch, None)
    np.testing.assert_allclose(loss, 0.5, atol=1e-6)
    clipped = recipe.constrain({"gates": jnp.float32([-1.0, 0.5, 2.0])})["gates"]
    np.testing.assert_array_equal(clipped, [0.0, 0.5, 1.0])


def test_activations_computed_again_give_the_same_gradients(batch):
    frozen = Frozen(tiny_model.params(), ())

    def gradient(remat):
        recipe = train_duoattention(sinks=0, recent=3, remat=remat)
        loss = lambda trained: recipe.loss(CONFIG, trained, frozen, batch, None)[0]
        return quick_jit(jax.grad(loss))({"gates": jnp.full((L, K), 0.5)})["gates"]

    kept, again = gradient(False), gradient(True)
    assert jnp.all(kept != 0)
    np.testing.assert_allclose(again, kept, **CLOSE)


def test_gates_pass_the_highest_of_a_layer_and_the_gradient_of_all():
    pos = jnp.int32([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, -1, -1]])
    always = ((pos == 0) | (pos == jnp.int32([[5], [3]])))[:, None]
    p = jnp.float32(np.random.default_rng(0).permutation(24).reshape(2, 2, 6) / 24)
    opened, pull = jax.vjp(lambda p: open_gates(p, pos, always, 0.5), p)
    for row, length in enumerate((6, 4)):
        worth = np.where(always[row], 2.0, p[row])[:, :length]
        highest = np.sort(worth.ravel())[::-1][: 2 * (length // 2)]
        np.testing.assert_array_equal(opened[row, :, :length], np.isin(worth, highest))
        np.testing.assert_array_equal(opened[row, :, length:], 0)
    (gradient,) = pull(jnp.ones_like(p))
    np.testing.assert_array_equal(gradient, np.broadcast_to(~always, p.shape))


def method_loss(method, batch, chunk=None):
    """The cross-entropy of what follows the contexts, when a method has compressed them."""
    room = batch.follow.shape[1]

    def run(params):
        step, cache, asked = tiny_model.bind(params), tiny_model.empty(2), jnp.full(2, room)
        how = dict(room=room, call_tokens=room, chunk=chunk)
        run = kvjax.prefill(step, method, batch.context, batch.lengths, cache, **how)
        logits = kvjax.extend(step, method, run, batch.follow, asked)[1]
        return cross_entropy(logits, batch)

    return quick_jit(run)(tiny_model.params())


def test_gates_lose_in_training_what_their_method_loses(batch):
    frozen = Frozen(tiny_model.params(), ())
    recipe = train_attention_gate(rate=0.5, channels=4, sinks=1, recent=2, penalty=0.0)
    trained, _ = recipe.start(Model(CONFIG, frozen.params, None))
    loss = quick_jit(recipe.loss, static_argnums=0)(CONFIG, trained, frozen, batch, None)[0]
    found = method_loss(kvjax.methods.attention_gate(trained, 0.5, sinks=1, recent=2, page=4), batch)
    np.testing.assert_allclose(loss, found, rtol=1e-4)


def test_convolutions_lose_in_training_what_their_method_loses_over_chunks(batch):
    frozen, recipe = Frozen(tiny_model.params(), ()), train_lococo(budget=6, merged=3, chunk=4, width=3, recent=1)
    trained, _ = recipe.start(Model(CONFIG, frozen.params, None))
    loss = quick_jit(recipe.loss, static_argnums=0)(CONFIG, trained, frozen, batch, None)[0]
    method = kvjax.methods.lococo(recipe.finish(None, trained, ()), 6, recent=1)
    np.testing.assert_allclose(loss, method_loss(method, batch, chunk=4), rtol=1e-4)
    clipped = recipe.constrain(trained | {"mix": jnp.float32([-1.0, 2.0])})["mix"]
    np.testing.assert_array_equal(clipped, [0.0, 1.0])


def test_a_prefix_starts_as_a_text_read_before_the_context(model, batch):
    """The loss before training is that of the contexts behind the text's first tokens; keys count positions apart."""
    config, recipe = model.config, train_prefix(slots=8)
    trained, first = recipe.start(model)
    small = batch._replace(context=batch.context % config.vocab_size, follow=batch.follow % config.vocab_size)
    loss = quick_jit(recipe.loss, static_argnums=0)(config, trained, Frozen(model.params, first), small, None)[0]
    (text,) = measurements._texts(model, measurements.Settings(texts=1, tokens=8))
    before = np.concatenate([np.repeat(text, 2, axis=0), small.context], axis=1)
    longer = small._replace(context=before, lengths=batch.lengths + 8)
    follow = lambda params: read_follow(config, params, longer, read_context(config, params, longer).cache).logits
    np.testing.assert_allclose(loss, cross_entropy(quick_jit(follow)(model.params), longer), rtol=1e-4)
    made = recipe.finish(model, jax.tree.map(jnp.ones_like, trained), first)
    unit = np.sqrt(np.mean(np.square(first["key"][1])))
    np.testing.assert_allclose(made["key"][1] - first["key"][1], np.full(first["key"][1].shape, unit), rtol=1e-3)


def test_one_matrix_in_place_of_two_comes_at_least_as_close():
    maps = {name: normal(i, 2, K, H, 5) for i, name in enumerate(("key_axes", "key_inverse"))}
    maps |= {name.replace("key", "value"): x for name, x in maps.items()}
    (one, _), two = train_cskv().finish(None, maps, ()).values(), list(maps.values())[:2]
    flat = lambda x: np.asarray(x[1], np.float64).reshape(K * H, -1)
    np.testing.assert_allclose(flat(one).T @ flat(one), np.eye(5), atol=1e-6)
    x = np.random.default_rng(2).normal(size=(20, K * H))
    best = x @ np.linalg.pinv(flat(two[1]).T) @ flat(two[1]).T  # least squares in the span of B
    np.testing.assert_allclose(x @ flat(one) @ flat(one).T, best, atol=1e-5)
    assert train_cskv(bits=4).finish(None, maps, ()) is maps


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_rounded_coordinates_are_the_nearest_of_sixteen_and_pass_the_gradient(axis):
    c = normal(0, 2, 24, 16)
    near, pull = jax.vjp(lambda c: rounded(c, 4, 8, axis), c)
    groups = lambda x: np.asarray(x).reshape((2, 3, 8, 16) if axis == "channel" else (2, 24, 2, 8))
    which = 2 if axis == "channel" else 3
    lo, hi = groups(c).min(axis=which, keepdims=True), groups(c).max(axis=which, keepdims=True)
    step = (hi - lo) / 15
    off = np.abs(groups(near) - groups(c))
    # The nearest of sixteen is half a step away at most; scales and zeros are bfloat16, off by up to a 128th. It is
    # further away than where nothing is rounded.
    assert np.all(off <= 0.51 * step + np.abs(lo) / 15 / 128) and np.mean(off / step) > 0.15
    np.testing.assert_array_equal(pull(jnp.ones_like(c))[0], 1.0)


def test_labels_are_the_largest_logits_of_what_predicts_the_answer():
    keys, asked = segment(slots=7), queries(3, 7, 8, 9, 10)
    weight = jnp.float32([[0, 0, 0.5, 0.5]])  # tokens 2 and 3, predicted by queries 1 and 2
    seen = kvjax.LayerObservation(asked, jnp.zeros((1, 4, N)), jnp.int32(0))
    q = np.asarray(asked.rotated)[0, 1:3].reshape(2, K, N // K, H)
    want = np.einsum("tkgh,kph->tgkp", q, np.asarray(keys.k)[0]).max(axis=(0, 1)) * H**-0.5
    np.testing.assert_allclose(answer_logits(keys, seen, weight)[0], want, **CLOSE)


@pytest.mark.parametrize("key_rope", ["stored", "rank"])
def test_retaining_scores_stay_with_their_tokens(key_rope):
    """Two chunks of tokens, the second padded, into slots that differ by head."""
    head = {"hidden": normal(0, (N + 2 * K) * H, 5), "out": normal(1, 5, K)}
    scorer = retaining_heads()
    asked, k, v = queries(2, 0, 1, 2, 3, 4), normal(3, 1, K, 5, H), normal(4, 1, K, 5, H)
    want = np.asarray(retaining_scores(head, asked.raw, k, v))[0]
    slots = kvjax.Segment.empty(1, K, 0, H, jnp.float32, stats={"retaining": jnp.zeros((1, K, 0))})
    slots = slots.replace(key_rope=key_rope).resize(8)
    for start, end in ((0, 3), (3, 5)):
        missing = [(0, 0), (0, 3 - end + start)]
        pad = lambda x, fill=0: jnp.pad(x, missing + [(0, 0)] * (x.ndim - 2), constant_values=fill)
        part = kvjax.Queries(pad(asked.raw[:, start:end]), pad(asked.pos[:, start:end], -1), ROPE)
        new = lambda x: jnp.swapaxes(pad(jnp.swapaxes(x[:, :, start:end], 1, 2)), 1, 2)
        slots = slots.append(new(k), new(v), part.pos, ROPE)
        seen = kvjax.LayerObservation(part, jnp.zeros((1, 3, N)), jnp.int32(0), learned=head)
        slots = scorer.observe(slots, seen)
        if start == 0:  # one head loses token 0, the other token 1
            slots = slots.drop((slots.pos == jnp.arange(K)[None, :, None]) & (slots.pos >= 0))
    for k_head in range(K):
        pos = np.asarray(slots.pos)[0, k_head]
        held = pos >= 0
        assert sorted(pos[held]) == [t for t in range(5) if t != k_head]
        np.testing.assert_allclose(slots.stats["retaining"][0, k_head][held], want[k_head, pos[held]], **CLOSE)


def test_heads_of_a_model_with_other_layers_are_refused():
    heads = {"hidden": jnp.zeros((L + 1, (N + 2 * K) * H, 5)), "out": jnp.zeros((L + 1, 5, K))}
    step = tiny_model.bind(tiny_model.params())
    with pytest.raises(ValueError, match="What was trained is of 3 layers, the cache has 2"):
        jax.eval_shape(
            lambda tokens: kvjax.prefill(
                step, kvjax.methods.locret(heads, 4), tokens, jnp.int32([9]), tiny_model.empty(1), room=1
            ),
            jnp.zeros((1, 9), jnp.int32),
        )
