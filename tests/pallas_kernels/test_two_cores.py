"""Every TPU kernel on two simulated cores at once, with detection of races between what they read and write."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_decode_blocks
from pallas_kernels.attention_mass import attention_mass
from pallas_kernels.decode_attention import PageRun
from pallas_kernels.levels import nearest_levels
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.quantize_pack import quantize_pack
from pallas_kernels.shapes import DecodeShape, LowrankShape, QuantizedShape, RaggedQuantizedShape, RaggedShape
from pallas_kernels.slot_write import write_slot
from tests.pallas_kernels.attend import attend
from tests.pallas_kernels.kernel_tolerance import BFLOAT16

ONE = DecodeShape(K=2, G=4, S=512, dtype="bfloat16")  # one row, whose slots the cores share
PACKED = QuantizedShape(ONE, 4)
OVERHANGING = DecodeShape(B=2, K=2, G=4, S=600, dtype="bfloat16")


def _levels():
    q, k, v, *rest = ONE.draw(0)
    table = jnp.linspace(-2.0, 2.0, 8)
    return q, nearest_levels(k, table), nearest_levels(v, table), *rest


def _run_of_pages():
    *args, pages = RaggedShape(DecodeShape(B=2, K=2, G=4, dtype="bfloat16"), P=160).draw(0)
    return *args, pages.replace(run=PageRun(jnp.array([3, 70], jnp.int32), jnp.array([100, 0], jnp.int32)))


def _observed():
    q, k, _, q_pos, k_pos = DecodeShape(B=2, T=16, K=2, G=4, S=512, dtype="bfloat16").draw(0)
    return q, k, q_pos, k_pos, jnp.full(q.shape[:3], 6.0)


def _prompt():
    q, k, v, q_pos, _ = DecodeShape(T=256, K=2, G=2, S=256, dtype="bfloat16").draw(0)
    return q, k, v, jnp.arange(256, dtype=jnp.int32)[None]


CASES = {
    "dense": (attend, ONE.draw(0)),
    "overhang": (attend, OVERHANGING.draw(0)),
    "int4": (attend, PACKED.draw(0)),
    "levels": (attend, _levels()),
    "ragged": (attend, _run_of_pages()),
    "packed pages": (attend, RaggedQuantizedShape(RaggedShape(ONE, 64, page=32), PACKED).draw(0)),
    "rank 16": (attend, LowrankShape(ONE, 16).draw(0)),
    "mass": (attention_mass, _observed()),
    "prefill": (prefill_attention, _prompt()),
    "pack": (
        functools.partial(quantize_pack, bits=4, group=32, axis="channel", scale_dtype="bfloat16"),
        (ONE.draw(0)[1], jnp.ones((1, 2, 512), bool)),
    ),
}


def races_found() -> bool:
    """Whether the last interpreted kernel had one; an interface of jax that is not public."""
    try:
        state = importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call").races
    except (ImportError, AttributeError):
        pytest.skip("this jax does not say whether it found a race")
    assert state is not None, "no detection was on"
    return state.races_found


def both(op, args):
    want = op(*args, implementation="xla")
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(num_cores_or_threads=2, detect_races=True)):
        got = jax.block_until_ready(op(*args, implementation="mosaic_tpu"))
    return got, want


@pytest.mark.parametrize("name", CASES)
def test_two_cores_do_not_race(name, monkeypatch):
    monkeypatch.setattr(tpu_decode_blocks, "_MOST_SLOTS", 256)
    got, want = both(*CASES[name])
    assert not races_found()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.float64(a), np.float64(b), **BFLOAT16)


def test_slots_that_two_cores_write():
    rng = np.random.default_rng(0)
    x, new = jnp.float32(rng.normal(size=(2, 2, 64, 128))), jnp.float32(rng.normal(size=(2, 2, 1, 128)))
    start, on = jnp.array([[0, 31], [32, 63]]), jnp.array([[True, True], [False, True]])
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(num_cores_or_threads=2, detect_races=True)):
        got = np.asarray(jax.block_until_ready(write_slot(x, new, start, on)))
    assert not races_found()
    want = np.array(x)
    for row, head in ((0, 0), (0, 1), (1, 1)):
        want[row, head, start[row, head]] = new[row, head, 0]
    np.testing.assert_array_equal(got, want)
