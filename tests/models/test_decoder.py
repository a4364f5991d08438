"""The decoder on the real model, against the reference implementation's numbers."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from models import load_model
from models.decoder import bind, forward, prompt_cache

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "smollm2_logits.npz"


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN)


@pytest.fixture(scope="module")
def logits(smollm2, golden):
    ids = jnp.asarray(golden["ids"])[None]
    positions = jnp.arange(ids.shape[1])[None]
    out, cache = forward(smollm2.params, smollm2.config, ids, positions, prompt_cache(smollm2.config, 1))
    assert int(cache.length[0]) == ids.shape[1]
    return np.asarray(out[0])


def test_logits_of_smollm2_are_those_of_transformers(golden, logits):
    chosen = logits[golden["positions"]][:, golden["vocab_ids"]]
    assert np.abs(chosen - golden["logits"]).max() < 1e-3
    lse = np.logaddexp.reduce(logits.astype(np.float64), axis=-1)
    assert np.abs(lse - golden["lse"]).max() < 1e-3
    assert (logits.argmax(-1) == golden["argmax"]).all()


@pytest.mark.slow
def test_chunks_and_single_tokens_give_the_logits_of_one_shot(smollm2, golden, logits):
    ids = jnp.asarray(golden["ids"])[None, :140]
    cache = prompt_cache(smollm2.config, 1).reserve(140)
    seen = []
    for start, end in [(0, 64), (64, 128), *((i, i + 1) for i in range(128, 140))]:
        positions = jnp.arange(start, end)[None]
        out, cache = forward(smollm2.params, smollm2.config, ids[:, start:end], positions, cache)
        seen.append(np.asarray(out[0]))
    # float32 over 30 layers, summed in another order.
    assert np.abs(np.concatenate(seen) - logits[:140]).max() < 1e-3


@pytest.mark.slow
def test_bfloat16_stays_close(golden, logits):
    model = load_model("smollm2", dtype="bfloat16")
    ids = jnp.asarray(golden["ids"])[None, :64]
    cache = prompt_cache(model.config, 1, jnp.bfloat16)
    out, cache = forward(model.params, model.config, ids, jnp.arange(64)[None], cache)
    assert {x.dtype for x in jax.tree.leaves(cache)} == {jnp.dtype("bfloat16"), jnp.dtype("int32")}
    p = jax.nn.log_softmax(jnp.asarray(logits[:64]))
    q = jax.nn.log_softmax(out[0].astype(jnp.float32))
    # Eight bits of mantissa through 30 layers; float32 against itself gives 1e-9.
    assert float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))) < 0.02


@pytest.mark.slow
def test_generation_continues_the_prompt_and_stops(smollm2):
    chat = smollm2.tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    ids = smollm2.tokenizer.encode(chat)
    step, method = bind(smollm2.params, smollm2.config), kvjax.methods.full()
    run = kvjax.prefill(
        step, method, jnp.asarray([ids]), jnp.array([len(ids)]), prompt_cache(smollm2.config, 1), room=24
    )
    # One compiled layer at a time.
    tokens = []
    while len(tokens) < 24 and (token := int(run.logits[0].argmax())) not in smollm2.tokenizer.eos_ids:
        tokens.append(token)
        run, _ = kvjax.extend(step, method, run, jnp.array([[token]]), jnp.array([1]))
    assert len(tokens) < 24 and "Paris" in smollm2.tokenizer.decode(tokens)
