"""KIVI in a running cache: which tokens are quantized when, and to what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import quantize
from tests.kvjax import table_decoder
from tests.pallas_kernels.kivi_numpy import kivi_quantizer
from tests.quick_jit import quick_jit

TABLES = table_decoder.tables()
STEP = table_decoder.decoder(TABLES)
T, LENGTHS, NEW, GROUP, RESIDUAL = 40, (40, 27), 21, 8, 16


def _stored(tokens: np.ndarray, bits: int, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """The paper's cache of one row, [K, n, H]: whole blocks of RESIDUAL tokens quantized, the rest exact."""
    n = len(tokens)
    quantized = n // RESIDUAL * RESIDUAL
    k = table_decoder.turn(TABLES.k[layer, tokens].swapaxes(0, 1).astype(np.float64), np.arange(n))
    v = TABLES.v[layer, tokens].swapaxes(0, 1).astype(np.float64)
    k[:, :quantized] = kivi_quantizer(k[None, :, :quantized], bits, GROUP, axis=2)[1][0]
    v[:, :quantized] = kivi_quantizer(v[None, :, :quantized], bits, GROUP, axis=3)[1][0]
    return k, v


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_cache_holds_what_the_paper_stores_after_the_prompt_and_while_decoding(bits):
    method = quantize(bits, key_group=GROUP, value_group=GROUP, residual=RESIDUAL, scale_dtype="float32")
    tokens = table_decoder.distinct_tokens(2, T + NEW)
    prompt = jnp.int32(tokens[:, :T])
    run = quick_jit(
        lambda prompt, cache: kvjax.prefill(STEP, method, prompt, jnp.array(LENGTHS), cache, room=NEW)
    )(prompt, table_decoder.empty(2))
    extend = quick_jit(
        lambda run, new: kvjax.extend(STEP, method, run, new, jnp.ones(2, jnp.int32))[0]
    )
    rows = [list(tokens[row, :length]) for row, length in enumerate(LENGTHS)]
    for t in range(NEW + 1):
        if t:
            new = tokens[[0, 1], [length + t - 1 for length in LENGTHS]]
            run = extend(run, jnp.int32(new[:, None]))
            for row in range(2):
                rows[row].append(new[row])
        if t not in (0, 7, 8, NEW):  # row 0 fills a block with its 8th token, row 1 with its 5th and 21st
            continue
        for layer in range(table_decoder.LAYERS):
            segment = run.cache.layers[layer].segments[-1]
            dense = segment.dense()
            for row in range(2):
                n = len(rows[row])
                pos = np.asarray(dense.pos[row])
                order = np.argsort(np.where(pos < 0, 10**6, pos), axis=-1)[:, :n]
                assert (np.take_along_axis(pos, order, axis=-1) == np.arange(n)).all()
                assert (np.asarray(segment.tail.pos[row]) >= 0).sum() == 2 * (n % RESIDUAL)
                for got, want in zip((dense.k, dense.v), _stored(np.array(rows[row]), bits, layer)):
                    got = np.take_along_axis(np.asarray(got[row]), order[..., None], axis=1)
                    step = 12 / (2**bits - 1)  # no range is wider than 12
                    # Equal, but for a code in a thousand that sits on a tie and rounds the other way.
                    off = np.abs(got - want) > 1e-4
                    assert off.mean() < 1e-3 and np.abs(got - want).max() <= step


def test_bytes_fall_with_bits():
    sizes = []
    for bits in (2, 4, 8):
        method = kvjax.methods.kivi(bits, group=8, residual=16)
        cache = jax.eval_shape(
            lambda cache: kvjax.prefill(
                STEP, method, jnp.zeros((1, 512), jnp.int32), jnp.array([512]), cache, room=16
            ),
            table_decoder.empty(1),
        ).cache
        sizes.append(kvjax.nbytes(cache))
    # Per slot: 2 H b / 8 of codes; a step of bits doubles them and nothing else. 528 slots, 4 heads over layers.
    per_bit = 4 * 528 * 2 * table_decoder.HEAD_DIM / 8
    assert sizes[1] - sizes[0] == 2 * per_bit and sizes[2] - sizes[1] == 4 * per_bit
