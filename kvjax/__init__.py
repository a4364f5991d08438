"""kvjax: a small algebra for compressing the KV cache of decoder language models.

`Cache` holds segments, a `CacheTransform` rewrites it, `chain` composes transforms, `methods` are published
papers as short compositions, `prefill`, `extend` and `generate` run a decoder with any of them.
"""

from kvjax import methods, scores
from kvjax.cache import Cache, LayerCache, empty_cache, kept_tokens, nbytes
from kvjax.drivers import Generated, Run, Step, StepOutput, extend, generate, prefill, start
from kvjax.observation import ALL, LayerObservation, Needs, Observation
from kvjax.rope import Rope, re_rotate, rotate
from kvjax.sampling import Greedy, Sample
from kvjax.segments import (
    BufferedSegment,
    CompensatedSegment,
    DenseSegment,
    HeadsSegment,
    LatentSegment,
    QuantizedSegment,
    Queries,
    RaggedSegment,
    Segment,
)
from kvjax.transforms import (
    CacheTransform,
    Scorer,
    adaptive,
    at_prefill_end,
    cast,
    chain,
    check_step,
    every,
    every_chunk,
    every_step,
    evict,
    evict_by_head,
    identity,
    project,
    project_by_head,
    project_jointly,
    prune_channels,
    pyramid,
    quantize,
    ring,
    split_heads,
    when_full,
)
from pallas_kernels.partial import Partial, combine

__version__ = "0.1.0"
