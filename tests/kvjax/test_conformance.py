"""Every method passes every check of `conformance.py` on a tiny model."""

import pytest

import kvjax
from experiments.methods import method_names
from tests.kvjax import conformance
from tests.kvjax.cases import CASES, METHODS

BY_NAME = {case.name: case for case in CASES}
TRANSFORMS = {name: case.build() for name, case in BY_NAME.items()}
# int8, int4 and snapkv_int4 with other numbers: their bytes are checked, and what is asked of some cases only.
_TWINS = ("int2", "kivi4", "kivi3", "kivi2", "keydiff_int8")
EVERY = [name for name in BY_NAME if name not in _TWINS]
BUDGETED = [name for name, t in TRANSFORMS.items() if t.schedule.budget is not None]
# A prompt that chooses what it reads may read more in chunks, which see all chunks before them.
_READS_ALL = {name: t.schedule for name, t in TRANSFORMS.items() if t.schedule.needs.prompt_attention is None}
AT_PREFILL_END = [name for name, s in _READS_ALL.items() if s.frees_in_prefill is None and not s.begins]
FROM_FIRST_CHUNK = [name for name, s in _READS_ALL.items() if s.begins]
FREES_IN_DECODE = [name for name, t in TRANSFORMS.items() if t.schedule.frees_in_decode is not None]
# Nothing in their caches is a dense segment of occupied slots.
_NAMED = (
    *("adakv", "alisa", "attention_gate", "cake", "cskv", "duo", "gear", "int", "kivi", "kqsvd", "kvquant", "kvzip"),
    *("matryoshka", "mikv", "million", "mustafar", "olive", "palu", "qjl", "qserve", "razor", "saq", "vidkv", "xkv"),
    *("zipcache", "zipvl"),
)
SELECTING = ["quest", "snapkv_quest", "mpcache", "tidaldecode", "retrieval_attention", "double_sparsity", "sparq"]
SELECTING += ["shadowkv", "rekv"]
STRUCTURED = [name for name in EVERY if name.startswith(_NAMED) or "_int" in name or name in SELECTING]
LOSSLESS = [name for name, case in BY_NAME.items() if case.lossless is not None]
# The others run in `make test-all`. A way to store slots each, and a way and a time to rewrite them.
FAST = [
    "full",  # dense slots, room for all
    "int4",  # packed blocks and an exact tail
    "streamingllm",  # a ring, positions by rank
    "h2o_chunked",  # statistics of slots; at every call
    "adakv_snapkv",  # pages of heads
    "kvzip_int4",  # packed pages that layers share; the prompt is read twice
    "duoattention",  # heads apart
    "xkv",  # a basis that layers share
    "quest",  # pages that queries choose
]
# A batch of one is another program for each: one case of every kind of state.
ALONE = ["int8", "streamingllm", "h2o", "every_4_window_attention"]
# A method of every kind of segment, and of every way to rewrite slots.
SHARDED = [
    *("full", "int4", "gear", "mikv", "rotatekv", "million"),
    *("streamingllm", "h2o", "snapkv_int4", "adakv_snapkv", "cake", "lazyeviction"),
    *("attention_gate", "reasoncache"),  # a scorer that mixes heads and slots; slots that rows share
    *("locret", "lococo"),  # chunk by chunk
    *("kvmerger", "think", "xkv", "minicache", "razorattention"),
    *("chunkkv", "kvcrush", "lagkv", "compactor", "keyformer"),  # scores of neighbours, of the budget, of pairs
    *("elasticcache", "cam"),  # merges by position, into several
    *("matryoshka_pca", "cskv", "duoattention"),  # trained, the same transforms with other arrays
    *("quest", "quest_int4", "tidaldecode", "double_sparsity", "sparq", "shadowkv"),  # chosen from all shards
]
SHARDED_FAST = ["int4", "streamingllm", "xkv"]


@pytest.fixture(scope="module")
def harness(request):
    return conformance.Harness(BY_NAME[request.param])


def for_each(names, fast=FAST):
    params = [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]
    return pytest.mark.parametrize("harness", params, indirect=True, scope="module")


def test_every_public_method_and_every_config_has_a_case():
    assert set(METHODS) == set(kvjax.methods.__all__)
    assert {*METHODS.values(), *method_names()} <= set(BY_NAME)


@for_each(BY_NAME, fast=BY_NAME)
def test_shapes_of_every_method_keep_what_it_promises(harness):
    conformance.check_promises(harness)


@for_each(BY_NAME)
def test_bytes_are_those_of_the_formula(harness):
    conformance.check_bytes(harness)


@for_each(EVERY)
def test_steps_keep_tree_shapes_and_dtypes(harness):
    conformance.check_step_keeps_shapes(harness)


@for_each(EVERY)
def test_the_second_step_does_not_recompile(harness):
    conformance.check_no_recompilation(harness)


@for_each(EVERY)
def test_a_loop_inside_jit_equals_a_python_loop(harness):
    conformance.check_loop_in_jit_equals_python_loop(harness)


@for_each(EVERY)
def test_rows_of_a_padded_batch_do_not_see_each_other(harness):
    conformance.check_rows_do_not_see_each_other(harness)


@for_each(ALONE)
@pytest.mark.parametrize("how", ["one_shot", "chunked"])
def test_a_row_of_a_padded_batch_equals_its_own_run(harness, how):
    conformance.check_row_equals_its_own_run(harness, how)


@for_each(AT_PREFILL_END)
def test_chunked_prefill_equals_one_shot(harness):
    conformance.check_chunked_equals_one_shot(harness)


@for_each(FROM_FIRST_CHUNK)
def test_chunks_of_a_prompt_are_stored_as_calls_that_follow(harness):
    conformance.check_chunks_are_calls(harness)


@for_each(LOSSLESS)
def test_a_budget_for_everything_changes_nothing(harness):
    conformance.check_lossless(harness)


@for_each(BUDGETED)
def test_occupancy_never_exceeds_the_budget(harness):
    conformance.check_occupancy(harness)


@for_each([name for name in EVERY if name not in STRUCTURED])
def test_permuting_dense_slots_changes_nothing(harness):
    conformance.check_slots_may_be_permuted(harness)


@for_each(EVERY)
@pytest.mark.parametrize("kind", ["one token", "fewer tokens than sinks, window or group", "constant", "huge"])
def test_hostile_inputs_give_finite_numbers(harness, kind):
    conformance.check_hostile_inputs(harness, kind)


@for_each(SHARDED, fast=SHARDED_FAST)
def test_a_mesh_of_eight_devices_changes_nothing(harness):
    conformance.check_sharded(harness, "data:2,seq:2,model:2")


@for_each(FREES_IN_DECODE)
def test_bytes_do_not_grow_over_200_tokens(harness):
    conformance.check_bytes_do_not_grow(harness)
