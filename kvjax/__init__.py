"""kvjax: a small algebra for compressing the KV cache of decoder language models.

`Cache` holds segments, a `CacheTransform` rewrites it, `chain` composes transforms, `methods` are published
papers as short compositions, `bind` joins a decoder and a method: `prefill`, `extend` and `generate` run them.
"""

from kvjax import codecs, inspection, methods, scores, sharding
from kvjax.bound import BoundMethod, bind
from kvjax.cache import Cache, LayerCache, empty_cache, kept_tokens, nbytes
from kvjax.drivers import Generated, Run, Step, StepOutput, extend, generate, prefill, start
from kvjax.limits import Limits, Room
from kvjax.observation import ALL, Instruction, LayerObservation, Needs, Observation, Reread
from kvjax.rope import Rope, re_rotate, rotate
from kvjax.sampling import Greedy, Sample, row_keys
from kvjax.saved_runs import load_run, save_run
from kvjax.segments import (
    AnySegment,
    BlockedSegment,
    CompensatedSegment,
    HeadsSegment,
    LatentSegment,
    Queries,
    RaggedSegment,
    Ring,
    Rows,
    Segment,
    SharedView,
)
from kvjax.slots import Slots
from kvjax.transforms import (
    CacheTransform,
    MergeRule,
    Observer,
    Schedule,
    Scorer,
    adaptive,
    at_prefill_end,
    balance_channels,
    by_coverage,
    by_variance,
    cast,
    chain,
    check_step,
    convolve,
    every,
    every_chunk,
    every_step,
    evict,
    evict_across_layers,
    evict_by_head,
    identity,
    into_nearest,
    into_neighbour,
    into_next,
    into_runs,
    into_similar,
    learned,
    merge,
    merge_layers,
    prefix,
    product_quantize,
    project,
    project_by_head,
    project_jointly,
    protect,
    prune_channels,
    pyramid,
    quantize,
    quantize_corrected,
    quantize_levels,
    reindex,
    respect_windows,
    ring,
    rotate_channels,
    share_basis,
    split_heads,
    split_slots,
    when_full,
    whole_layers,
)
from pallas_kernels.partial import Partial, combine

__version__ = "0.1.0"
