"""`Op` runs what was asked for, or the kernel of the platform that a program is lowered for."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.dispatch import Kernel, Op, result_like
from pallas_kernels.logits import SoftCap


def _scaled(x, *, by):
    return x * by


def _scaling_kernel(x, *, by):
    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...] * by

    return pl.pallas_call(kernel, out_shape=result_like(x.shape, x.dtype, x))(x)


def _needs_full_tiles(x, *, by):
    return None if x.shape == (8, 128) else f"takes [8, 128], got {list(x.shape)}"


scale = Op("scale", _scaled, mosaic_tpu=Kernel(_scaling_kernel, _needs_full_tiles))
X = jnp.arange(1024, dtype=jnp.float32).reshape(8, 128)

AROUND = {
    "jit": lambda f: jax.jit(f),
    "scan": lambda f: jax.jit(lambda x: jax.lax.scan(lambda x, _: (f(x), None), x, length=1)[0]),
    "while_loop": lambda f: jax.jit(
        lambda x: jax.lax.while_loop(lambda c: c[0] < 1, lambda c: (c[0] + 1, f(c[1])), (0, x))[1]
    ),
    "vmap": lambda f: jax.jit(lambda x: jax.vmap(f)(x[None])[0]),
    "gradient": lambda f: jax.jit(lambda x: x * jax.grad(lambda x: f(x).sum())(x)),
}


@pytest.mark.parametrize("around", AROUND)
def test_the_default_is_the_reference_under_every_transformation(around):
    np.testing.assert_array_equal(AROUND[around](lambda x: scale(None, x, by=3.0))(X), 3 * X)


def test_the_default_is_the_reference_on_shards():
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = PartitionSpec("rows")
    sharded = jax.shard_map(lambda x: scale(None, x, by=3.0), mesh=mesh, in_specs=rows, out_specs=rows)
    np.testing.assert_array_equal(jax.jit(sharded)(X), 3 * X)
    assert "tpu_custom_call" in jax.jit(sharded).trace(X).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("around", [name for name in AROUND if name != "gradient"])
def test_a_program_holds_the_kernel_of_its_platform_alone(around):
    traced = AROUND[around](lambda x: scale(None, x, by=3.0)).trace(X)
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_choosing_costs_nothing_on_cpu():
    compiled = lambda f: jax.jit(f).lower(X).compile().as_text()
    body = lambda text: text[text.index("ENTRY") :].replace("scale", "").splitlines()
    chosen, direct = (body(compiled(f)) for f in (lambda x: scale(None, x, by=3.0), lambda x: _scaled(x, by=3.0)))
    assert [line.split("metadata")[0] for line in chosen] == [line.split("metadata")[0] for line in direct]


def test_an_explicit_kernel_runs():
    with pltpu.force_tpu_interpret_mode():
        np.testing.assert_array_equal(scale("mosaic_tpu", X, by=2.0), 2 * X)


def test_a_kernel_is_differentiated_through_the_reference():
    with pltpu.force_tpu_interpret_mode():
        gradient = jax.grad(lambda x: scale("mosaic_tpu", x, by=2.0).sum())(X)
    np.testing.assert_array_equal(gradient, np.full(X.shape, 2.0))


def test_an_explicit_choice_never_falls_back():
    with pytest.raises(NotImplementedError, match=r"scale: mosaic_tpu takes \[8, 128\], got \[4, 128\]"):
        scale("mosaic_tpu", X[:4], by=2.0)
    with pytest.raises(NotImplementedError, match="mosaic_gpu does not exist"):
        scale("mosaic_gpu", X, by=2.0)
    with pytest.raises(ValueError, match="implementation must be None or one of xla, mosaic_tpu, mosaic_gpu"):
        scale("tpu", X, by=2.0)


def test_the_default_falls_back_with_a_log_line(caplog):
    caplog.set_level(logging.INFO)
    run = jax.jit(functools.partial(scale, None, by=2.0))
    np.testing.assert_array_equal(run(X[:4]), 2 * X[:4])
    assert "scale: mosaic_tpu takes [8, 128], got [4, 128]; XLA computes it." in caplog.text
    assert "tpu_custom_call" not in run.trace(X[:4]).lower(lowering_platforms=("tpu",)).as_text()


def test_kernels_refuse_logits_with_a_soft_cap():
    queries, slots = jnp.zeros((1, 1, 2, 128)), jnp.zeros((1, 1, 128, 128))
    of_queries, of_slots = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1, 128), jnp.int32)
    with pytest.raises(NotImplementedError, match="decode_attention: mosaic_tpu has no soft cap"):
        decode_attention(
            queries, slots, slots, of_queries, of_slots, scale=SoftCap(0.1, 50.0), implementation="mosaic_tpu"
        )
