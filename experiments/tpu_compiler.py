"""The TPU compilers, on a machine without a TPU."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_kernels import block_sizes


@dataclasses.dataclass(frozen=True)
class Generation:
    """One TPU generation, with figures of one chip as published.

    Attributes:
      name: as Google Cloud calls it.
      topology: the smallest that can be compiled for.
      gigabytes_per_second: of HBM.
      hbm_gibibytes: capacity.
      teraflops: peak of bfloat16 products.
      gigahertz: clock of its cores: the peak over what their matrix units do in a cycle.
      devices: that JAX sees in a chip: cores that share its memory without being one device.
    """

    name: str
    topology: str
    gigabytes_per_second: float
    hbm_gibibytes: float
    teraflops: float
    gigahertz: float
    devices: int = 1

    @property
    def device_gigabytes_per_second(self) -> float:
        """Bandwidth of one JAX device: its share of the chip's."""
        return self.gigabytes_per_second / self.devices


# Google Cloud's pages "TPU v5e", "TPU v6e", "TPU v5p", "TPU7x (Ironwood)" and "TPU v4", system architecture.
GENERATIONS = (
    Generation("v5e", "v5e:2x2", 819.0, 16, 197.0, 1.5),
    Generation("v6e", "v6e:2x2", 1640.0, 32, 918.0, 1.75),
    Generation("v5p", "v5p:2x2x1", 2765.0, 95, 459.0, 1.75),
    Generation("tpu7x", "tpu7x:2x2x1", 7370.0, 192, 2307.0, 2.2, devices=2),
)
V4 = Generation("v4", "v4:2x2x1", 1228.0, 32, 275.0, 1.05)

# libtpu asks the machine what it is, unless told.
LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def compile_only_device(topology: str) -> jax.Device:
    """The first of `compile_only_devices`."""
    return compile_only_devices(topology)[0]


def compile_only_devices(topology: str) -> list[jax.Device]:
    """Devices to compile for and not to run on; sets the variables that libtpu reads when it loads.

    Raises:
      ValueError: there is no TPU compiler here, with the command that installs it; or another `topology`.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("no TPU compiler: install it with `pip install 'jax[tpu]'` (Linux on x86-64).")
    for name, value in LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return _devices(topology)


@functools.cache
def _devices(topology: str) -> list[jax.Device]:
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # jaxlib raises several types of its own
        raise ValueError(f"no TPU topology {topology!r}: {error}") from error


def compile_for(device: jax.Device, function: Callable, *arguments, **options) -> jax.stages.Compiled:
    """Compiles for one device, with the block sizes of its kind.

    Args:
      device: what `compile_only_device` gave.
      function: to be compiled.
      *arguments: pytrees of `jax.ShapeDtypeStruct` or arrays.
      **options: of `jax.jit`.
    """
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device))
    with block_sizes.use(block_sizes.read(device.device_kind)):
        return jax.jit(function, **options).lower(*jax.tree.map(place, arguments)).compile()
