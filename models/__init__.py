"""Decoders: their configs, weights, tokenizers and loaders."""

from models.assets import FetchError
from models.compiled import keep_compiled
from models.config import DecoderConfig
from models.conversation import Conversation, answer
from models.loader import Model, load_model
from models.tokenizer import Tokenizer
from models.weights import abstract_params, random_params
