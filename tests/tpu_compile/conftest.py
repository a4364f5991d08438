"""Compile-only TPUs, for every test of the lane."""

import functools

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding


@pytest.fixture(scope="session")
def devices():
    """Compile-only devices by topology name; libtpu reads its settings from the environment when it loads."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }.items():
            patch.setenv(name, value)
        yield functools.cache(
            lambda name: topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]
        )


@pytest.fixture(scope="session")
def compiled(devices):
    """`(function, arguments without numbers, topology)` -> the program, compiled for one such chip."""

    def build(function, args, topology):
        sharding = SingleDeviceSharding(devices(topology))
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return jax.jit(function).lower(*jax.tree.map(place, args)).compile()

    return build
