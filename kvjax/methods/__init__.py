"""Methods: published compression schemes, one paper a file, each a short composition of transforms."""

from kvjax.methods.adakv import adakv_expected, adakv_snapkv
from kvjax.methods.alisa import alisa
from kvjax.methods.attention_gate import attention_gate
from kvjax.methods.cake import cake
from kvjax.methods.cam import cam
from kvjax.methods.chunkkv import chunkkv
from kvjax.methods.compactor import compactor
from kvjax.methods.critic import critic
from kvjax.methods.criticalkv import criticalkv
from kvjax.methods.cskv import cskv, cskv_trained
from kvjax.methods.d2o import d2o
from kvjax.methods.double_sparsity import double_sparsity
from kvjax.methods.duoattention import duoattention, duoattention_trained
from kvjax.methods.elasticcache import elasticcache
from kvjax.methods.ems import ems
from kvjax.methods.expected_attention import expected_attention
from kvjax.methods.fp8 import fp8
from kvjax.methods.fp8_scaled import fp8_scaled
from kvjax.methods.full import full
from kvjax.methods.gear import gear
from kvjax.methods.h2o import h2o
from kvjax.methods.headkv import headkv
from kvjax.methods.keydiff import keydiff
from kvjax.methods.keyformer import keyformer
from kvjax.methods.kivi import kivi
from kvjax.methods.knorm import knorm
from kvjax.methods.kqsvd import kqsvd
from kvjax.methods.kvcrush import kvcrush
from kvjax.methods.kvmerger import kvmerger
from kvjax.methods.kvquant import kvquant
from kvjax.methods.kvsharer import kvsharer
from kvjax.methods.kvzip import kvzip
from kvjax.methods.lagkv import lagkv
from kvjax.methods.lazyeviction import lazyeviction
from kvjax.methods.lococo import lococo
from kvjax.methods.locret import locret
from kvjax.methods.lookm import lookm
from kvjax.methods.matryoshka import matryoshka_pca, matryoshka_trained
from kvjax.methods.mikv import mikv
from kvjax.methods.million import million
from kvjax.methods.minference import minference
from kvjax.methods.minicache import minicache
from kvjax.methods.mpcache import mpcache
from kvjax.methods.mpcache_static import mpcache_static
from kvjax.methods.mustafar import mustafar
from kvjax.methods.olive import olive
from kvjax.methods.palu import palu
from kvjax.methods.prefixkv import prefixkv
from kvjax.methods.pyramidkv import pyramidkv
from kvjax.methods.qjl import qjl
from kvjax.methods.qserve import qserve
from kvjax.methods.quest import quest
from kvjax.methods.random_eviction import random_eviction
from kvjax.methods.razorattention import razorattention
from kvjax.methods.reasoncache import reasoncache
from kvjax.methods.rekv import rekv
from kvjax.methods.retrieval_attention import retrieval_attention
from kvjax.methods.rkv import rkv
from kvjax.methods.rotatekv import rotatekv
from kvjax.methods.shadowkv import shadowkv
from kvjax.methods.saq import saq
from kvjax.methods.snapkv import snapkv
from kvjax.methods.sparq import sparq
from kvjax.methods.streamingllm import streamingllm
from kvjax.methods.think import think
from kvjax.methods.tidaldecode import tidaldecode
from kvjax.methods.tova import tova
from kvjax.methods.turboquant import turboquant
from kvjax.methods.videoxl2 import videoxl2
from kvjax.methods.vidkv import vidkv
from kvjax.methods.windowkv import windowkv
from kvjax.methods.xattention import xattention
from kvjax.methods.xkv import xkv
from kvjax.methods.zipcache import zipcache
from kvjax.methods.zipvl import zipvl

__all__ = [
    "adakv_expected",
    "adakv_snapkv",
    "alisa",
    "attention_gate",
    "cake",
    "cam",
    "chunkkv",
    "compactor",
    "critic",
    "criticalkv",
    "cskv",
    "cskv_trained",
    "d2o",
    "double_sparsity",
    "duoattention",
    "duoattention_trained",
    "elasticcache",
    "ems",
    "expected_attention",
    "fp8",
    "fp8_scaled",
    "full",
    "gear",
    "h2o",
    "headkv",
    "keydiff",
    "keyformer",
    "kivi",
    "knorm",
    "kvcrush",
    "kvmerger",
    "kvquant",
    "kvsharer",
    "kvzip",
    "lagkv",
    "lazyeviction",
    "lococo",
    "locret",
    "kqsvd",
    "lookm",
    "matryoshka_pca",
    "matryoshka_trained",
    "mikv",
    "million",
    "minference",
    "minicache",
    "mpcache",
    "mpcache_static",
    "mustafar",
    "olive",
    "palu",
    "prefixkv",
    "pyramidkv",
    "qjl",
    "qserve",
    "quest",
    "random_eviction",
    "rekv",
    "retrieval_attention",
    "rkv",
    "rotatekv",
    "razorattention",
    "reasoncache",
    "shadowkv",
    "saq",
    "snapkv",
    "sparq",
    "streamingllm",
    "think",
    "tidaldecode",
    "tova",
    "videoxl2",
    "vidkv",
    "windowkv",
    "xattention",
    "turboquant",
    "xkv",
    "zipcache",
    "zipvl",
]
