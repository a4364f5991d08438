"""A model comes back from an orbax checkpoint as it was written, or the error says why not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models.checkpoint import FILE, save_checkpoint
from models.huggingface import load_directory


@pytest.mark.parametrize("int8", [False, True])
def test_config_params_and_tokenizer_come_back(tiny, tmp_path, int8):
    written = load_directory(tiny.write_directory(tmp_path / "tiny"), jnp.float32, int8=int8)
    save_checkpoint(tmp_path / "saved", *written)
    read = models.load_model(tmp_path / "saved", int8=int8)
    assert read.config == written[0]
    assert jax.tree.structure(read.params) == jax.tree.structure(written[1])
    jax.tree.map(np.testing.assert_array_equal, read.params, written[1])
    text = "the 12<|im_end|>"
    assert read.tokenizer.encode(text) == written[2].encode(text)
    for field in ("chat_template", "bos_id", "eos_ids", "opening"):
        assert getattr(read.tokenizer, field) == getattr(written[2], field)
    narrow = models.load_model(tmp_path / "saved", dtype="bfloat16")
    assert narrow.params.embed.dtype == jnp.bfloat16


def test_damaged_and_unfit_checkpoints_are_refused(tiny, tmp_path):
    save_checkpoint(tmp_path / "saved", *load_directory(tiny.write_directory(tmp_path / "tiny"), jnp.float32))
    with pytest.raises(ValueError, match="saved: its matrices are not in 8 bits; convert the model with --int8"):
        models.load_model(tmp_path / "saved", int8=True)
    about = (tmp_path / "saved" / FILE).read_text()
    (tmp_path / "saved" / FILE).write_text(about.replace('"version": 1', '"version": 0'))
    with pytest.raises(ValueError, match="of version 0, expected 1: convert the model again"):
        models.load_model(tmp_path / "saved")
    (tmp_path / "saved" / FILE).write_text(about[:100])
    with pytest.raises(ValueError, match=f"{FILE} or tokenizer.json cannot be used"):
        models.load_model(tmp_path / "saved")
    (tmp_path / "saved" / FILE).write_text(about.replace('"num_layers": 2', '"num_layers": 3'))
    with pytest.raises(ValueError, match="saved is damaged"):
        models.load_model(tmp_path / "saved")
