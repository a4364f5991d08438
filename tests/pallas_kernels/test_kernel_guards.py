"""What the TPU decode kernels do where nothing is visible, where a run leaves its pool, and where VMEM ends."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from experiments.tpu_compiler import LIBTPU_ENVIRONMENT, compile_for, compile_only_device
from pallas_kernels import tpu_decode, tpu_device
from pallas_kernels.block_sizes import Table, use
from pallas_kernels.decode_attention import PageRun, decode_attention
from pallas_kernels.shapes import DecodeShape, QuantizedShape, RaggedQuantizedShape, RaggedShape
from tests.pallas_kernels.attend import attend
from tests.pallas_kernels.kernel_tolerance import BFLOAT16

KERNEL = dict(implementation="mosaic_tpu")


def test_the_logarithm_of_zero_is_never_asked_for(monkeypatch):
    """What a chip's would be is its own business; here it is NaN."""
    logarithm = lambda x: jnp.where(x > 0, jnp.log(x), jnp.nan)
    monkeypatch.setattr(tpu_decode, "jnp", SimpleNamespace(**{**vars(jnp), "log": logarithm}))
    q, k, v, q_pos, k_pos = DecodeShape(K=2, G=2, S=128).draw(0)
    k_pos = k_pos.at[:, 1].set(-1)
    with pltpu.force_tpu_interpret_mode():
        got = decode_attention(q, k, v, q_pos, k_pos, **KERNEL)
    assert (got.lse[..., 2:] == -jnp.inf).all() and not got.out[..., 2:, :].any()
    assert jnp.isfinite(got.lse[..., :2]).all()


DECODE = DecodeShape(B=2, K=2, G=4, dtype="bfloat16")
POOLS = {
    "dense": RaggedShape(DECODE, P=160),
    "packed": RaggedQuantizedShape(RaggedShape(DECODE, P=48, page=32), QuantizedShape(DecodeShape(), 4)),
}


@pytest.mark.parametrize("name", POOLS)
def test_a_run_ends_with_its_pool(name):
    """As in the reference: pages that are not there are not attended to, and the last ones count once."""
    shape = POOLS[name]
    pages = getattr(shape, "pages", shape).P
    run = PageRun(jnp.array([pages - 20, pages + 3], jnp.int32), jnp.array([500, 7], jnp.int32))
    *args, owned = shape.draw(0)
    args = *args, owned.replace(run=run)
    with pltpu.force_tpu_interpret_mode():
        got = jax.jit(functools.partial(attend, **KERNEL))(*args)
    want = jax.jit(functools.partial(attend, implementation="xla"))(*args)
    np.testing.assert_allclose(got.out, want.out, **BFLOAT16)
    np.testing.assert_allclose(got.lse, want.lse, **BFLOAT16)
    assert (got.lse[1] == -jnp.inf).all()


def test_devices_have_the_vmem_of_their_generation():
    of = {}
    for kind in ("TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x", "TPU v4", "cpu"):
        with use(Table(kind=kind)):
            of[kind] = tpu_device.tpu_device()
    mebibytes = {kind: device.vmem_bytes >> 20 for kind, device in of.items()}
    physical = {"TPU v5 lite": 128, "TPU v5": 64, "TPU v6 lite": 128, "TPU7x": 64, "TPU v4": 16, "cpu": 16}
    assert all(mebibytes[kind] <= most for kind, most in physical.items())
    assert mebibytes["TPU v6 lite"] > mebibytes["TPU7x"] > mebibytes["cpu"]
    assert {kind for kind, device in of.items() if device.cores == 1} == {"TPU v5 lite", "TPU v6 lite", "TPU7x"}


@pytest.mark.tpu_compile
@pytest.mark.parametrize("topology", ["v5e:2x2", "tpu7x:2x2x1"])
def test_what_exceeds_vmem_is_refused_and_what_is_taken_compiles(topology, monkeypatch):
    for name, value in LIBTPU_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    device = compile_only_device(topology)

    def taken(group: int) -> bool:
        """Keys of which a group of slots, and with it a tile, cannot be parted."""
        shape = QuantizedShape(DecodeShape(G=4, S=2 * group, dtype="bfloat16"), 8, key_group=group)
        op = functools.partial(decode_attention, **KERNEL)
        try:
            compile_for(device, op, *shape.abstract()[:5])
        except NotImplementedError as error:
            assert f"in groups of {group} that fits" in str(error)
            return False
        return True

    found = [taken(group) for group in (2048, 4096, 8192, 16384, 32768)]
    assert found[0] and not found[-1] and found == sorted(found, reverse=True)
