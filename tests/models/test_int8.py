"""8-bit weights are within half a step of what was loaded, and the decoder computes with exactly them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.decoder import forward, prompt_cache
from models.families import read_config
from models.int8 import Int8Matrix, dense, matmul
from models.weights import build_params
from tests.golden.tiny_weights import ROWS, weights
from tests.models.test_families import CHECKPOINTS
from tests.quick_jit import quick_jit


def test_codes_are_within_half_a_scale_of_each_output():
    matrix = np.random.default_rng(0).normal(size=(2, 40, 6)).astype(np.float32)
    matrix[0, :, 3] = 0
    packed = Int8Matrix.of(matrix)
    largest = np.abs(matrix).max(axis=1)
    np.testing.assert_allclose(packed.scale, np.where(largest == 0, 1, largest) / 127, rtol=1e-6)
    # Half a step, and the rounding of float32.
    assert (np.abs(dense(packed) - matrix) <= 0.501 * np.asarray(packed.scale)[:, None]).all()
    assert packed.nbytes == 2 * 40 * 6 + 4 * 2 * 6
    x = np.random.default_rng(1).normal(size=(3, 40)).astype(np.float32)
    np.testing.assert_allclose(matmul(x, Int8Matrix.of(matrix[1])), x @ dense(packed)[1], rtol=1e-4, atol=1e-5)


EXPERTS = {"wo", "router", "w_gate", "w_up", "w_down"}


@pytest.mark.parametrize(
    "name, leaves",
    [
        ("mixtral", {"wqkv"}),
        ("deepseek_v2", {"wq", "w_latent", "w_uk", "w_uv", "shared_w_gate", "shared_w_up", "shared_w_down"}),
    ],
)
def test_decoder_with_experts_computes_with_the_rounded_weights(name, leaves):
    config = read_config("tiny", CHECKPOINTS[name]["config"])
    tensors = weights(CHECKPOINTS[name]["shapes"])
    packed = build_params(config, tensors.__getitem__, jnp.float32, int8=True)
    kinds = {name: type(leaf) for name, leaf in packed.to_dict()["layers"][1].items()}
    assert {name for name, kind in kinds.items() if kind is Int8Matrix} == EXPERTS | leaves
    rounded = jax.tree.map(dense, packed, is_leaf=lambda x: isinstance(x, Int8Matrix))
    tokens = jnp.int32([ROWS[0][:12]])
    positions = jnp.arange(12)[None]
    run = quick_jit(forward, static_argnums=1)
    logits = [run(params, config, tokens, positions, prompt_cache(config, 1))[0] for params in (packed, rounded)]
    # float32: scales are multiplied after the sum instead of before.
    np.testing.assert_allclose(*logits, atol=1e-4)
