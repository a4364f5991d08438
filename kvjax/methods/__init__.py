"""Methods: published compression schemes, one paper a file, each a short composition of transforms."""

from kvjax.methods.full import full
from kvjax.methods.h2o import h2o
from kvjax.methods.keydiff import keydiff
from kvjax.methods.kivi import kivi
from kvjax.methods.knorm import knorm
from kvjax.methods.random_eviction import random_eviction
from kvjax.methods.snapkv import snapkv
from kvjax.methods.streamingllm import streamingllm
from kvjax.methods.tova import tova

__all__ = [
    "full",
    "h2o",
    "keydiff",
    "kivi",
    "knorm",
    "random_eviction",
    "snapkv",
    "streamingllm",
    "tova",
]
