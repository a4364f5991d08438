"""The calibration program, and calibrations that remember their model."""

import dataclasses
import functools
import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import calibrate as program
from experiments import calibrations, measurements
from experiments.methods import load_method
from models import Model, load_model
from models.decoder import layer_inputs
from models.families import read_config
from models.params import split_qkv
from models.weights import build_params
from tests.experiments import in_process, tiny_checkpoint
from tests.golden.tiny_weights import weights
from tests.models.test_families import CHECKPOINTS

SMALL = measurements.Settings(texts=2, tokens=64)

calibrate = functools.partial(in_process.call, program)


_FAST = ("million", "duoattention")  # how codebooks are learned, and heads chosen


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=() if name in _FAST else pytest.mark.slow) for name in measurements.RECIPES]
)
def test_program_saves_what_its_method_runs_with(recipe, checkpoint, model, tmp_path):
    folder = tmp_path / "made"
    given = (f"--method={recipe}", f"--model={checkpoint}", f"--output_dir={folder}", "--texts=2", "--tokens=64")
    code, out, err = calibrate(*given)
    assert code == 0 and str(folder) in out, err
    data = calibrations.load(folder, recipe, model)
    for name, x in data.items():
        assert f"{name:<14} {x.dtype}{list(x.shape)}" in out and jnp.isfinite(x).all()
    method = load_method(recipe, budget=0.5, calibrate=lambda recipe, path: data)
    assert method.transform.schedule.budget == (0.5 if recipe in ("criticalkv", "d2o", "headkv", "prefixkv") else None)
    code, _, err = calibrate(*given)
    assert code == 2 and "is not empty; pass --replace" in err
    assert calibrate(*given, "--replace")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("recipe", measurements.RECIPES)
def test_a_mesh_of_devices_measures_the_same(recipe, checkpoint, model, tmp_path):
    folder = tmp_path / "made"
    given = (f"--method={recipe}", f"--model={checkpoint}", f"--output_dir={folder}", "--texts=2", "--tokens=64")
    code, out, err = calibrate(*given, "--mesh=data:1,seq:4,model:2")
    assert code == 0, err
    split = calibrations.load(folder, recipe, model)  # on a mesh the model has the same fingerprint
    alone = measurements.measure(recipe, model, SMALL)
    assert split.keys() == alone.keys()
    for name, x in alone.items():
        size = float(jnp.abs(x).max())
        # Directions of equal variance may be any of their span; codebooks start from draws that sums in another order
        # may shift, and end in another optimum close by.
        if name.endswith(("axes", "inverse", "basis", "codebook")) or "_levels" in name:
            assert split[name].shape == x.shape and split[name].dtype == x.dtype
        else:
            np.testing.assert_allclose(split[name], x, rtol=1e-3, atol=1e-4 * size, err_msg=name)


def test_recipes_about_values_refuse_latent_attention():
    config = read_config("latent", CHECKPOINTS["deepseek_v2"]["config"])
    params = build_params(config, weights(CHECKPOINTS["deepseek_v2"]["shapes"]).__getitem__, jnp.float32)
    model = Model(config, params, None)
    assert len(calibrations.fingerprint(model)) == 16
    for recipe in measurements.RECIPES.keys() - measurements.OF_ATTENTION:
        with pytest.raises(ValueError, match=f"{recipe} compresses values apart from keys, .* of latent the keys are"):
            measurements.measure(recipe, model, SMALL)


def test_principal_components_are_those_of_the_cached_keys(model):
    data = measurements.principal_components(model, SMALL)
    axes, power = np.asarray(data["key_axes"]), np.asarray(data["key_power"])
    H = axes.shape[-1]
    np.testing.assert_allclose(axes.swapaxes(2, 3) @ axes, np.broadcast_to(np.eye(H), axes.shape), atol=1e-5)
    np.testing.assert_allclose(np.linalg.det(axes), 1.0, atol=1e-4)
    assert (np.diff(power, axis=-1) <= 0).all()
    keys = np.concatenate(
        [
            np.asarray(measurements._read(model, tokens).cache.layers[1].segments[0].k, np.float64)[0]
            for tokens in measurements._texts(model, SMALL)
        ],
        axis=1,
    )
    for head, x in enumerate(keys):
        expected = np.linalg.eigvalsh(x.T @ x / len(x))[::-1]
        np.testing.assert_allclose(power[1, head], expected, rtol=1e-3, atol=1e-5 * expected[0])


def test_key_means_are_those_of_the_key_projection(model):
    data = measurements.key_means(model, SMALL)
    config = model.config
    K, H = config.num_kv_heads, config.head_dim
    read = [layer_inputs(model.params, config, tokens)[1] for tokens in measurements._texts(model, SMALL)]
    wk = np.asarray(split_qkv(config, model.params.layers[1].wqkv)[1], np.float64).reshape(-1, K * H)
    want = np.mean(np.concatenate(read, axis=1), axis=(0, 1), dtype=np.float64) @ wk
    # Keys are read from the cache and rotated back: two rotations in float32.
    np.testing.assert_allclose(data["key_mean"][1], want.reshape(K, H), rtol=1e-3, atol=1e-4 * np.abs(want).max())


def test_weight_directions_of_all_ranks_span_the_projection(model):
    data = measurements.weight_directions(model, SMALL)
    config = model.config
    K, H = config.num_kv_heads, config.head_dim
    wk = np.asarray(split_qkv(config, model.params.layers[0].wqkv)[1]).reshape(-1, K * H)
    V = np.asarray(data["key_axes"][0]).reshape(K * H, -1)
    np.testing.assert_allclose(wk @ V @ V.T, wk, atol=1e-4 * np.abs(wk).max())
    # Half of the directions explain more of the weighted projection than any other half would: the SVD's promise.
    half = V.shape[1] // 2
    first, last = (np.linalg.norm(wk @ part) for part in (V[:, :half], V[:, half:]))
    assert first > last


def test_ranks_pass_through_their_rates_and_the_method_takes_that_many_bytes(model):
    bases = measurements.principal_components(model, SMALL)
    found = measurements.search_ranks(model, SMALL, bases, fraction=1 / 4)
    H = bases["key_axes"].shape[-1]
    ranks = np.stack([found["key_ranks"], found["value_ranks"]])
    np.testing.assert_allclose(ranks.mean(axis=(0, 2, 3)), H * np.asarray(found["rates"]), atol=H / 4)
    assert (np.diff(ranks, axis=1) <= 0).all() and ranks.min() >= H // 4 and (ranks % (H // 4) == 0).all()


def test_coverage_is_the_share_of_attention_of_the_most_attended_tokens(model):
    data = np.asarray(measurements.layer_coverage(model, SMALL)["coverage"])
    assert data.shape == (model.config.num_layers, 257) and (data[:, 0] == 0).all()
    np.testing.assert_allclose(data[:, -1], 1.0, rtol=1e-5)
    rises = np.diff(data, axis=1)
    assert (rises > 0).all() and (np.diff(rises, axis=1) < 1e-6).all()  # the most attended first: concave


def test_retrieval_scores_count_what_the_most_attended_tokens_of_a_query_hold_of_a_needle():
    """Logits are given: one head looks at the needle, its neighbour of the group does not."""
    import kvjax
    from kvjax.calibration import retrieval_scores

    S, needle = 8, np.array([2, 3])
    logits = np.zeros((2, S))
    logits[0, needle], logits[1, [0, 5]] = 3.0, 3.0
    keys = np.eye(S)[None, None]
    pos = jnp.arange(S)[None]
    segment = kvjax.Segment.of(jnp.float32(keys), jnp.float32(keys), pos[:, None])
    raw = jnp.float32(np.broadcast_to(logits * S**0.5, (1, S, 2, S)))  # the scale divides
    queries = kvjax.Queries(raw, pos, kvjax.Rope(jnp.zeros(S // 2)))
    seen = kvjax.LayerObservation(queries, segment.attend(queries).lse, jnp.int32(0))
    got = retrieval_scores(segment, seen, jnp.array(needle), jnp.array([6, 7]))
    want = [2 * np.exp(3) / (2 * np.exp(3) + n - 2) / 2 for n in (7, 8)]  # of a query that sees n tokens
    np.testing.assert_allclose(got, [np.mean(want) / 2], rtol=1e-5)  # half the group finds it


def test_copying_heads_are_found_by_hand():
    """One layer whose queries equal the keys of the tokens before them: echo or induction by construction."""
    import kvjax
    from kvjax.calibration import copying_scores

    period, repeats, H = 6, 3, 64
    T = period * repeats
    code = np.random.default_rng(0).choice([-1.0, 1.0], size=(period, H)) * 3
    tokens = np.tile(np.arange(period), repeats)
    before = np.roll(tokens, 1)
    k = np.stack([code[tokens], code[before]])[None]  # head 0: own token; head 1: the token before
    k[0, 1, 0] = 0  # nothing comes before the first
    q = code[tokens][None, :, None].repeat(2, axis=2)
    rope = kvjax.Rope(jnp.zeros(H // 2))  # no rotation
    pos = jnp.arange(T)[None]
    keys = kvjax.Segment.of(jnp.float32(k), jnp.float32(k), jnp.tile(pos[:, None], (1, 2, 1)))
    queries = kvjax.Queries(jnp.float32(q), pos, rope)
    lse = keys.attend(queries).lse
    echo, induction = copying_scores(keys, kvjax.LayerObservation(queries, lse, jnp.int32(0)), period)
    # Head 0 looks at all copies of its token, itself included: an earlier one gets 1/2 of its attention, then 1/3.
    np.testing.assert_allclose(echo[0], (1 / 2 + 1 / 3) / 2, atol=0.02)
    assert induction[0] < 0.02
    # Head 1 looks at what follows its token: one slot in the second repetition, two in the third.
    np.testing.assert_allclose(induction[1], (1 + 1 / 2) / 2, atol=0.02)
    assert echo[1] < 0.02


def test_calibrations_are_measured_once_and_kept(model, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(calibrations, "cache_dir", lambda: tmp_path)
    first = calibrations.Calibrations(model, SMALL)("duoattention", None)
    assert "measuring one" in capsys.readouterr().err
    monkeypatch.setitem(measurements.RECIPES, "duoattention", None)
    again = calibrations.Calibrations(model, SMALL)("duoattention", None)
    np.testing.assert_array_equal(first["induction"], again["induction"])


def test_another_model_or_method_is_refused_and_damage_is_named(model, checkpoint, tmp_path):
    folder = tmp_path / "made"
    calibrations.save(folder, "duoattention", model, measurements.head_types(model, SMALL), SMALL)
    with pytest.raises(ValueError, match="was made for duoattention, not for cskv"):
        calibrations.load(folder, "cskv", model)
    other = load_model(tiny_checkpoint.write(tmp_path / "other", seed=1))
    with pytest.raises(ValueError, match="was measured on .* not on this"):
        calibrations.load(folder, "duoattention", other)
    with pytest.raises(ValueError, match="holds no calibration; make one with"):
        calibrations.load(tmp_path / "nothing", "cskv", model)
    with pytest.raises(ValueError, match=r"train --gin_file=configs/runs/train_locret.gin --output_dir=.*/never\."):
        calibrations.load(tmp_path / "never" / "trained", "locret", model)
    with pytest.raises(ValueError, match="calibration.path must name a folder that .*train_cskv.gin .* got None"):
        calibrations.Calibrations(model, SMALL)("cskv_trained", None)
    for path in (folder / "arrays").rglob("*"):
        if path.is_file() and path.stat().st_size:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="is damaged"):
        calibrations.load(folder, "duoattention", model)
    (folder / "calibration.json").write_text("{")
    with pytest.raises(ValueError, match="calibration.json is damaged"):
        calibrations.load(folder, "duoattention", model)


@pytest.mark.parametrize(
    "given, says",
    [
        ([], "--method is required"),
        (["--method=snapkv"], "nothing to calibrate for 'snapkv'"),
        (["--method=cskv"], "--output_dir says where"),
        (["--method=cskv", "--output_dir=OUT", "--keep=0.5"], "--keep means nothing to this program"),
        (["--methods=cskv", "--output_dir=OUT"], "--methods means nothing to this program"),
        (["--method=cskv", "--output_dir=OUT", "--texts=0"], "--texts must be at least 1"),
        (["--method=cskv", "--output_dir=OUT", "--tokens=100000"], "--tokens must be from 8 to the"),
        (["--method=cskv", "--output_dir=OUT", "--tokens=64", "--texts=100000"], "--texts: there is text for"),
    ],
)
def test_bad_flags_give_one_clear_line(given, says, checkpoint, tmp_path):
    given = [flag.replace("OUT", str(tmp_path / "out")) for flag in given]
    code, _, err = calibrate(f"--model={checkpoint}", *given)
    assert code == 2 and says in err and err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_failed_save_leaves_nothing(model, tmp_path, monkeypatch):
    # The arrays are written by then; what says whose they are is not.
    monkeypatch.setattr(calibrations, "fingerprint", mock.Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        calibrations.save(tmp_path / "made", "duoattention", model, {"induction": jnp.zeros((2, 2))}, SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_numbers_that_are_not_finite_are_not_saved(bad, model, tmp_path):
    data = {"induction": jnp.zeros((2, 2)).at[1, 0].set(bad)}
    with pytest.raises(ValueError, match="duoattention: induction holds numbers that are not finite"):
        calibrations.save(tmp_path / "made", "duoattention", model, data, SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_fingerprint_is_of_the_model_and_not_of_its_name_or_layout(model):
    of = calibrations.fingerprint
    config, params = model.config, model.params
    changed = lambda **how: dataclasses.replace(model, config=dataclasses.replace(config, **how))
    assert of(changed(name="another")) == of(model)
    assert len({of(model), of(changed(rope_base=77.0)), of(changed(num_layers=1))}) == 3
    with_params = lambda **how: dataclasses.replace(model, params=params.replace(**how))
    for index, of_layer in enumerate(params.layers):
        for name in ("wqkv", "w_down", "attn_norm"):
            changed_layer = of_layer.replace(**{name: getattr(of_layer, name) * 1.01})
            layers = (*params.layers[:index], changed_layer, *params.layers[index + 1 :])
            assert of(with_params(layers=layers)) != of(model), (index, name)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert of(dataclasses.replace(model, params=rounded)) == of(model)
    assert of(with_params(embed=params.embed + 1.0)) != of(model)


def test_a_fingerprint_sees_every_element_and_its_place_however_the_weights_are_kept(model):
    of = calibrations.fingerprint
    params, first = model.params, model.params.layers[0]
    with_params = lambda **how: dataclasses.replace(model, params=params.replace(**how))
    with_layer = lambda **how: with_params(layers=(first.replace(**how), *params.layers[1:]))
    changed = [
        with_params(embed=params.embed.at[-1, -1].multiply(1.01)),
        with_params(embed=params.embed.at[64:].multiply(3.0)),
        with_layer(w_down=first.w_down.at[64:].multiply(-2.0)),
        with_layer(wqkv=first.wqkv[::-1]),
        with_layer(wqkv=first.wqkv[:, ::-1]),
        with_params(layers=params.layers[::-1]),
    ]
    assert len({of(model), *map(of, changed)}) == 1 + len(changed)


def test_a_checksum_is_the_sum_of_rounded_bits_times_odd_factors_in_any_dtype():
    rng = np.random.default_rng(0)
    # Tiny numbers that are denormal in bfloat16 too, and ties.
    x = np.concatenate([rng.normal(size=300), [1e-39, -3e-40, 1.00390625, 1.01171875, 0.0]]).astype(np.float32)
    x = x.reshape(5, 61)
    place = np.arange(x.size, dtype=np.uint32).reshape(x.shape)
    mixed = place * np.uint32(0x9E3779B1)
    mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(0x85EBCA77)
    odd = (mixed ^ (mixed >> np.uint32(13))) | np.uint32(1)
    rounded = x.astype(jnp.bfloat16)
    wanted = int((rounded.view(np.uint16).astype(np.uint64) * odd).sum() % 2**32)
    for given in (x, rounded, rounded.astype(np.float32)):
        assert int(calibrations._checksum(jnp.asarray(given))) == wanted


@pytest.mark.parametrize(
    "change, wanted",
    [
        (lambda about: [], "it lacks recipe"),
        (lambda about: {}, "it lacks recipe"),
        (lambda about: about | {"fingerprint": None}, "it lacks fingerprint"),
        (lambda about: about | {"shapes": [1]}, "it lacks shapes"),
        (lambda about: about | {"shapes": {"induction": "x"}}, "the shape of induction is none"),
    ],
)
def test_a_calibration_whose_description_is_damaged_is_refused(change, wanted, model, tmp_path):
    folder = tmp_path / "made"
    calibrations.save(folder, "duoattention", model, {"induction": jnp.zeros((2, 2))}, SMALL)
    path = folder / "calibration.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError) as error:
        calibrations.load(folder, "duoattention", model)
    assert str(error.value) == f"calibration.path: {path} is damaged ({wanted})."


def test_layers_with_a_window_are_left_out_of_what_a_method_gets(model, monkeypatch):
    windows = dataclasses.replace(model.config, num_layers=4, window=8, local_layers=(0, 1, 3))
    given = {"x": jnp.arange(4), "rates": jnp.arange(3), "key_ranks": jnp.arange(12).reshape(3, 4)}
    monkeypatch.setattr(calibrations.Calibrations, "_load", lambda self, recipe, path: given)
    of = lambda config: calibrations.Calibrations(dataclasses.replace(model, config=config))("d2o", None)
    found = of(windows)
    assert found["x"].tolist() == [2] and found["rates"].tolist() == [0, 1, 2]
    assert found["key_ranks"].tolist() == [[2], [6], [10]]  # of every rate
    # All layers alike: the method gets them all.
    for local in ((), (0, 1, 2, 3)):
        assert of(dataclasses.replace(windows, local_layers=local)) is given


@pytest.mark.slow
def test_patterns_hold_most_attention_of_those_that_are_cheap_enough(model):
    free, cheap = (measurements.attention_patterns(model, SMALL, share=share) for share in (2.0, 0.6))
    assert free["pattern"].shape == (model.config.num_layers, model.config.num_heads)
    assert jnp.all(free["recall"] >= cheap["recall"]) and jnp.any(free["recall"] > cheap["recall"])
    assert jnp.all(cheap["read"] <= 0.6) and jnp.any(free["read"] > 0.6)
    least = measurements.attention_patterns(model, SMALL, share=0.0)
    assert jnp.all(least["read"] <= cheap["read"])  # where none is cheap enough, the cheapest
