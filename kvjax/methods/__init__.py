"""Methods: published compression schemes, one paper a file, each a short composition of transforms."""

from kvjax.methods.adakv import adakv_expected, adakv_snapkv
from kvjax.methods.cskv import cskv
from kvjax.methods.duoattention import duoattention
from kvjax.methods.expected_attention import expected_attention
from kvjax.methods.fp8 import fp8
from kvjax.methods.full import full
from kvjax.methods.h2o import h2o
from kvjax.methods.keydiff import keydiff
from kvjax.methods.kivi import kivi
from kvjax.methods.knorm import knorm
from kvjax.methods.lazyeviction import lazyeviction
from kvjax.methods.kqsvd import kqsvd
from kvjax.methods.matryoshka import matryoshka_pca
from kvjax.methods.pyramidkv import pyramidkv
from kvjax.methods.random_eviction import random_eviction
from kvjax.methods.razorattention import razorattention
from kvjax.methods.snapkv import snapkv
from kvjax.methods.streamingllm import streamingllm
from kvjax.methods.think import think
from kvjax.methods.tova import tova

__all__ = [
    "adakv_expected",
    "adakv_snapkv",
    "cskv",
    "duoattention",
    "expected_attention",
    "fp8",
    "full",
    "h2o",
    "keydiff",
    "kivi",
    "knorm",
    "lazyeviction",
    "kqsvd",
    "matryoshka_pca",
    "pyramidkv",
    "random_eviction",
    "razorattention",
    "snapkv",
    "streamingllm",
    "think",
    "tova",
]
