"""The conversion program writes what every program loads by the same flag."""

import functools

import jax
import numpy as np

from experiments import convert as program
from models import load_model
from tests.experiments import in_process, tiny_checkpoint

convert = functools.partial(in_process.call, program)


def test_converted_model_is_the_model(tmp_path):
    source, folder = tiny_checkpoint.write(tmp_path / "tiny"), tmp_path / "made"
    code, out, err = convert(f"--model={source}", f"--output_dir={folder}", "--dtype=bfloat16")
    assert code == 0 and out.startswith("tiny as bfloat16: ") and str(folder) in out, err
    expected, found = load_model(source, "bfloat16"), load_model(folder, "bfloat16")
    assert found.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    code, _, err = convert(f"--model={source}", f"--output_dir={folder}", "--int8")
    assert code == 2 and "is not empty; pass --replace" in err
    code, out, _ = convert(f"--model={source}", f"--output_dir={folder}", "--int8", "--replace")
    assert code == 0 and "float32, matrices in 8 bits" in out
    assert load_model(folder).params.layers[0].wqkv.codes.dtype == np.int8


def test_where_it_goes_must_be_said():
    code, _, err = convert("--model=smollm2")
    assert code == 2 and "--output_dir says where the checkpoint goes" in err
