"""Loads tiny models for four CPU devices and compares them with what one device gets: a process of its own.

    python tests/models/four_devices.py FOLDER

JAX makes its devices once, so pytest's own process cannot have four.
"""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import sharding
from models import load_model
from models.checkpoint import save_checkpoint
from models.decoder import forward, prompt_cache
from tests.golden.tiny_weights import ROWS
from tests.models.test_families import write
from tests.models.test_gguf_families import write_gguf
from tests.quick_jit import quick_jit


def main(folder: pathlib.Path) -> None:
    jax.config.update("jax_num_cpu_devices", 4)
    mesh = sharding.make_mesh("model:4")
    shardings = functools.partial(sharding.shardings, mesh=mesh)
    write_gguf("qwen3_moe", folder / "qwen3_moe.gguf")
    sources = {
        "a directory": (write("deepseek_v2", folder / "deepseek_v2"), {}),
        "in 8 bits": (write("gpt_neox", folder / "gpt_neox"), {"int8": True}),
        "a GGUF file": (folder / "qwen3_moe.gguf", {}),
    }
    for kind, (path, how) in sources.items():
        one, four = load_model(path, **how), load_model(path, **how, shardings=shardings)
        check(kind, one.params, four.params)
        if kind == "a directory":
            save_checkpoint(folder / "orbax", one.config, one.params, one.tokenizer)
            check("a checkpoint", one.params, load_model(folder / "orbax", shardings=shardings).params)
            check_logits(mesh, one, four)


def check(kind: str, one, four) -> None:
    """The same numbers, and a quarter of all large matrices on every device."""
    jax.tree.map(np.testing.assert_array_equal, one, four)
    split = 0
    for leaf in jax.tree.leaves(four):
        parts = {shard.device: shard.data.size for shard in leaf.addressable_shards}
        assert set(parts) == set(jax.devices()), kind
        assert set(parts.values()) in ({leaf.size}, {leaf.size // 4}), kind
        split += leaf.nbytes * (set(parts.values()) != {leaf.size})
    share = split / sum(leaf.nbytes for leaf in jax.tree.leaves(four))
    assert share > 0.8, (kind, share)


def check_logits(mesh, one, four) -> None:
    """A prompt and the token after it, from a cache whose one KV head is split over slots."""
    ids = jnp.int32([ROWS[0][:16]])
    positions = jnp.arange(16)[None]

    def logits(model):
        run = functools.partial(quick_jit(forward, static_argnums=1), model.params, model.config)
        first, cache = run(ids[:, :15], positions[:, :15], prompt_cache(model.config, 1).reserve(32))
        last, _ = run(ids[:, 15:], positions[:, 15:], cache)
        return np.concatenate([first, last], axis=1)

    expected = logits(one)
    with sharding.use_mesh(mesh):
        found = logits(four)
    # float32, summed in another order.
    np.testing.assert_allclose(found, expected, atol=5e-5)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
    print("as on one device")
