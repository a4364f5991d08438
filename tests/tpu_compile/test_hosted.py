"""Pages in host memory stay there on a TPU: a step has them as arguments of the host and updates them in place."""

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

import kvjax
from kvjax import indices
from kvjax.segments import BlockedSegment, Segment
from kvjax.segments.hosted import is_hosted
from kvjax.segments.selected import Reading, SelectedSegment

SLOTS, K, H, PAGE = 32768, 8, 128, 16


def _layer(k, v):
    slots = Segment.of(k, v, jnp.broadcast_to(jnp.arange(SLOTS), (1, K, SLOTS)))
    reading = Reading(PAGE, 4096 // PAGE, hosted=True)
    body = lambda slots: SelectedSegment.of(slots, indices.Bounds(), reading)
    return kvjax.LayerCache((BlockedSegment.from_dense(slots, body, PAGE),))


def _step(layer, k, v, raw, pos):
    rope = kvjax.Rope.from_base(1e4, H)
    layer = layer.append(k, v, pos, rope)
    return layer, layer.attend(kvjax.Queries(raw, pos, rope, ahead=jnp.zeros((1, 1), jnp.int32))).out


def test_a_step_has_chosen_pages_on_the_device_and_the_rest_on_the_host(devices):
    device = devices("v5e:2x2")
    of = lambda *shape, dtype=jnp.bfloat16, kind="device": jax.ShapeDtypeStruct(
        shape, dtype, sharding=SingleDeviceSharding(device, memory_kind=kind)
    )
    place = lambda x, hosted: of(*x.shape, dtype=x.dtype, kind="pinned_host" if hosted else "device")
    layer = jax.eval_shape(_layer, *[jax.ShapeDtypeStruct((1, K, SLOTS, H), jnp.bfloat16)] * 2)
    (segment,) = layer.segments
    stored = jax.tree.map(place, segment.body.stored, is_hosted(segment.body.stored))
    on_device = jax.tree.map(lambda x: place(x, False), segment)
    layer = layer.replace(segments=(on_device.replace(body=on_device.body.replace(stored=stored)),))

    shardings = jax.tree.map(lambda x: x.sharding, layer), SingleDeviceSharding(device)
    args = layer, of(1, K, 1, H), of(1, K, 1, H), of(1, 1, 4 * K, H), of(1, 1, dtype=jnp.int32)
    memory = jax.jit(_step, donate_argnums=0, out_shardings=shardings).lower(*args).compile().memory_analysis()

    on_host = kvjax.bytes_on_host(kvjax.Cache((layer,), length=None))
    assert on_host == 2 * SLOTS * K * H * 2
    assert memory.host_argument_size_in_bytes == memory.host_alias_size_in_bytes == on_host
    assert memory.host_temp_size_in_bytes == 0
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < on_host // 8
