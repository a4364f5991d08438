"""Block sizes: which table is asked, what a kernel makes of its entries, and what is said of a damaged one."""

import configparser
import dataclasses
import functools
import glob
import json
import re

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from experiments import kernel_tuning
from experiments.kernel_cases import CASES
from experiments.tpu_compiler import LIBTPU_ENVIRONMENT, compile_only_device
from pallas_kernels import block_sizes
from pallas_kernels.block_sizes import Table
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.shapes import LLAMA_8B, SMOLLM2, DecodeShape
from tests.pallas_kernels.kernel_tolerance import FLOAT32
from tests.quick_jit import quick_jit

KERNEL = "decode_attention.mosaic_tpu"
SHAPE = DecodeShape(K=2, G=2, S=1024)
KEY = "heads=2 rows=8 H=128 q=float32 k=float32 k_width=128 v=float32 v_width=128"
op = functools.partial(decode_attention, implementation="mosaic_tpu")


def entry(**sizes) -> Table:
    return Table({(KERNEL, KEY): sizes}, "some.json")


def grid(table: Table) -> tuple[int, ...]:
    with block_sizes.use(table):
        text = str(jax.make_jaxpr(op)(*SHAPE.abstract()[:5]))
    return tuple(map(int, re.search(r"grid=\(([\d, ]+)\)", text)[1].split(",")))


def test_a_kernel_takes_the_sizes_of_its_entry():
    """The same function, traced for the same shapes: what jit keeps of one table is not taken for another."""
    assert grid(Table()) == (1, 1, 1, 1)
    assert grid(entry(heads=2, slots=256, splits=1)) == (1, 1, 1, 4)
    assert grid(entry(heads=2, slots=256, splits=2)) == (1, 1, 2, 2)
    assert grid(Table({(KERNEL, "another"): dict(heads=2, slots=256, splits=2)})) == (1, 1, 1, 1)


def test_what_it_computes_stays_the_same():
    args = dataclasses.replace(SHAPE, S=500).draw(0)  # four tiles, of which the last reaches over the end
    with block_sizes.use(entry(heads=2, slots=128, splits=2)), pltpu.force_tpu_interpret_mode():
        got = quick_jit(op)(*args)
    np.testing.assert_allclose(got.out, decode_attention(*args, implementation="xla").out, **FLOAT32)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_entry_holds_for_every_batch_and_number_of_slots(case):
    shapes = [LLAMA_8B, dataclasses.replace(LLAMA_8B, B=3, S=4096), SMOLLM2]
    one, other, small = (kernel_tuning.left_open(case, shape, "mosaic_tpu") for shape in shapes)
    assert (one.kernel, one.key, one.candidates) == (other.kernel, other.key, other.candidates)
    assert small.key != one.key
    assert set(one.default) == set(one.candidates[0])


def test_sizes_that_a_kernel_cannot_take_are_named_with_their_file():
    with pytest.raises(ValueError, match=f"some.json: {KERNEL}, '{KEY}': .*'slots': 100.* is none of the sizes"):
        grid(entry(heads=2, slots=100, splits=1))


@pytest.mark.tpu_compile
def test_the_file_of_the_device_is_read(tmp_path, monkeypatch):
    for name, value in LIBTPU_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(block_sizes, "FOLDER", tmp_path)
    assert block_sizes.read("TPU v5 lite").sizes == {}
    entries = {KEY: {"sizes": {"heads": 2, "slots": 512, "splits": 1}}, "the heuristic is best": {"sizes": None}}
    (tmp_path / "tpu_v5_lite.json").write_text(json.dumps({"block_sizes": {KERNEL: entries}}))
    assert block_sizes.read("TPU v5 lite").sizes == {(KERNEL, KEY): {"heads": 2, "slots": 512, "splits": 1}}
    assert block_sizes.device_kind() == "cpu"
    with jax.set_mesh(jax.sharding.Mesh([compile_only_device("v5e:2x2")], ("x",))):
        assert block_sizes.device_kind() == "TPU v5 lite"
        assert "grid=(1, 1, 1, 2)" in str(jax.make_jaxpr(op)(*SHAPE.abstract()[:5]))
    with jax.default_device(jax.devices("cpu")[-1]):
        assert block_sizes.device_kind() == "cpu"


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "f.json: not JSON: Expecting property name"),
        ("[1]", r"f.json: must be an object, got \[1\]"),
        ("{}", "f.json: block_sizes: must be an object, got null"),
        ('{"block_sizes": {"op": 3}}', "f.json: op: must be an object, got 3"),
        ('{"block_sizes": {"op": {"K8": {}}}}', "f.json: op, 'K8': no sizes"),
        ('{"block_sizes": {"op": {"K8": {"sizes": {}}}}}', "f.json: op, 'K8': sizes must be .*, got none"),
        ('{"block_sizes": {"op": {"K8": {"sizes": {"slots": 0}}}}}', "'K8': sizes must be .*, got slots=0"),
        ('{"block_sizes": {"op": {"K8": {"sizes": {"slots": true}}}}}', "'K8': sizes must be .*, got slots=True"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        block_sizes.parse(text, "f.json")


def test_wheels_carry_the_files(tmp_path, request):
    config = configparser.ConfigParser()
    config.read(request.config.rootpath / "setup.cfg")
    (tmp_path / block_sizes.FOLDER.name).mkdir()
    (tmp_path / block_sizes.FOLDER.name / "tpu_v5_lite.json").touch()
    patterns = config["options.package_data"]["pallas_kernels"].split()
    found = [path for pattern in patterns for path in glob.glob(pattern, root_dir=tmp_path, recursive=True)]
    assert found == ["tuned/tpu_v5_lite.json"]
