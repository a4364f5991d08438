"""Loads, prefills, compresses, decodes, saves and restores on one mesh over all processes: run by test_multihost.

    python -m tests.kvjax.two_processes MODEL FOLDER METHOD [PROCESS PORT]

Without a process it is the same program on one process with all eight devices. Prints the tokens as JSON.
"""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from experiments.methods import load_method
from kvjax import sharding
from models import load_model
from models.decoder import bind
from models.weights import param_axes
from tests.quick_jit import quick_jit

PROMPT, NEW, MESH = 96, 6, "seq:4,model:2"


def main(path: str, folder: pathlib.Path, name: str, process: int | None, port: int | None) -> list[list[int]]:
    """The tokens drawn after the prompt, then those drawn from the restored cache."""
    if process is not None:
        jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)
        assert jax.process_count() == 2 and len(jax.local_devices()) == 4
    assert len(jax.devices()) == 8
    model, method = load_model(path), load_method(name, budget=0.5)
    lm = lambda params: kvjax.bind(bind(params, model.config), method.transform)

    def read(params, tokens, lengths):
        return lm(params).prefill(tokens, lengths, room=2 * NEW)

    def write(params, run):
        drawn = lm(params).generate(run, NEW)
        return jax.lax.with_sharding_constraint(drawn.tokens, jax.sharding.PartitionSpec()), drawn.run

    mesh = sharding.make_mesh(MESH)
    params = jax.device_put(model.params, sharding.shardings(param_axes(model.config), model.params, mesh))
    vocabulary = model.config.vocab_size
    tokens = jnp.int32(np.random.default_rng(0).integers(0, vocabulary, size=(2, PROMPT)))
    lengths = jnp.int32([PROMPT, PROMPT - 11])
    with sharding.use_mesh(mesh):
        run = quick_jit(read)(params, tokens, lengths)
        kvjax.save_run(folder / "run", run, {"method": name})
        like = jax.eval_shape(read, params, tokens, lengths)
        again = kvjax.load_run(folder / "run", like)
        drawn = [quick_jit(write)(params, each)[0] for each in (run, again)]
    return [np.asarray(x.addressable_data(0)).tolist() for x in drawn]


if __name__ == "__main__":
    path, folder, name, *where = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 4 if where else 8)
    print(json.dumps(main(path, pathlib.Path(folder), name, *(map(int, where) if where else (None, None)))))
