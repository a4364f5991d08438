"""What kernels ask of the TPU that a program is traced for: how much VMEM, how many cores share a program."""

from __future__ import annotations

from typing import NamedTuple

from pallas_kernels import block_sizes


class TpuDevice(NamedTuple):
    """A device, as JAX counts them."""

    vmem_bytes: int  # that a kernel may use, stated to the compiler
    cores: int  # that run one program
    widens_e4m3fn: bool = False  # in hardware


_MIB = 1 << 20
# Of VMEM, 128 MiB or 64; the rest is for what XLA brings there ahead of a kernel.
_KNOWN = {
    "TPU v5 lite": TpuDevice(64 * _MIB, 1),
    "TPU v5e": TpuDevice(64 * _MIB, 1),
    "TPU v5": TpuDevice(48 * _MIB, 2),
    "TPU v5p": TpuDevice(48 * _MIB, 2),
    "TPU v6 lite": TpuDevice(64 * _MIB, 1),
    "TPU v6e": TpuDevice(64 * _MIB, 1),
    "TPU7x": TpuDevice(48 * _MIB, 1, widens_e4m3fn=True),
}
_UNKNOWN = TpuDevice(16 * _MIB, 2)  # what compilers grant unasked; a second part of the slots costs one core little


def tpu_device() -> TpuDevice:
    """The device that a program is traced for. One that is not known has what every generation has."""
    return _KNOWN.get(block_sizes.kind_in_use(), _UNKNOWN)
