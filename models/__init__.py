"""Decoders: their configs, weights, tokenizers and loaders."""

from kvjax.extras import require

require("models", "models", "tokenizers", "safetensors", "gguf", "jinja2", "tqdm", "huggingface_hub")

from models.assets import FetchError
from models.compiled import keep_compiled
from models.config import DecoderConfig
from models.conversation import Conversation, answer
from models.loader import Model, load_model
from models.tokenizer import Tokenizer
from models.weights import abstract_params, random_params

__all__ = [
    "Conversation",
    "DecoderConfig",
    "FetchError",
    "Model",
    "Tokenizer",
    "abstract_params",
    "answer",
    "keep_compiled",
    "load_model",
    "random_params",
]
