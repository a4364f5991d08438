"""What a method's config gets from the model that it runs on, and how it is run."""

import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from experiments.methods import load_method
from tests.fake_calibrations import Words, calibrate
from tests.kvjax import tiny_model


class Chat(Words):
    """The same with turns, as a chat template marks them."""

    chat_template = "of this class"

    def chat(self, messages):
        """One turn of the user, and the beginning of the reply."""
        return f"user {messages[0]['content']} END\nassistant :"


def _instruction(**how) -> kvjax.Instruction:
    return load_method("kvzip", budget=0.5, **how).transform.schedule.needs.reread.instruction


def test_kvzips_instruction_is_text_of_the_config_in_the_models_tokens():
    encode = Words().encode
    instruction = _instruction(tokenizer=Words(), bindings=["instruction_tokens.first = 'Say it again.'"])
    assert instruction.first == tuple(encode("Say it again."))
    assert instruction.later == tuple(
        encode("\n\nRepeat the part of the previous context exactly, starting with")
    )
    assert instruction.answer == tuple(encode("\n"))


def test_the_answer_begins_as_the_chat_template_says():
    assert _instruction(tokenizer=Chat()).answer == tuple(Words().encode("END\nassistant :"))


def test_an_instruction_needs_a_tokenizer_and_none_needs_nothing():
    with pytest.raises(ValueError, match="method kvzip: instruction_tokens needs a model's tokenizer"):
        _instruction()
    assert _instruction(bindings=["kvzip.instruction = None"]) == kvjax.Instruction()


_CRITICAL = """
method.transform = @learned()
learned.transform = @at_prefill_end()
learned.layers = @by_layer()
by_layer.arrays = @calibration()
calibration.recipe = 'criticalkv'
at_prefill_end.transform = @evict()
evict.scorer = @scores.output_perturbation()
evict.budget = %budget
evict.recent = 4
scores.output_perturbation.scorer = @scores.window_attention()
scores.window_attention.window = 4
"""
_PREFIX = """
method.transform = @prefix()
prefix.layers = @by_layer()
by_layer.arrays = @calibration()
by_layer.names = ('key', 'value')
calibration.recipe = 'reasoncache'
"""


@pytest.mark.parametrize(
    "text, name, bindings", [(_CRITICAL, "criticalkv", ["criticalkv.window = 4"]), (_PREFIX, "reasoncache", [])]
)
def test_what_was_trained_reaches_transforms_from_a_config(text, name, bindings):
    model = dict(calibrate=calibrate(tiny_model.CONFIG))
    built = [load_method("mine", budget=8, text=text, **model), load_method(name, budget=8, bindings=bindings, **model)]
    step, lengths = tiny_model.bind(tiny_model.params()), jnp.array([24, 13])
    read = lambda transform: kvjax.prefill(
        step, transform, tiny_model.prompt(2, 24), lengths, tiny_model.empty(2), room=2
    )
    runs = [read(method.transform) for method in built]
    np.testing.assert_array_equal(runs[0].logits, runs[1].logits)
    for a, b in zip(runs[0].cache.layers, runs[1].cache.layers):
        np.testing.assert_array_equal(a.segments[-1].pos, b.segments[-1].pos)


def test_arrays_by_layer_are_asked_for_by_name():
    text = _PREFIX.replace("'value'", "'valeu'")
    with pytest.raises(ValueError, match="by_layer.names: there is no 'valeu'; did you mean 'value'?"):
        load_method("mine", budget=8, text=text, calibrate=calibrate(tiny_model.CONFIG))


@pytest.mark.parametrize("name, alone", [("reasoncache", True), ("h2o_chunked", True), ("snapkv", False)])
def test_what_reads_in_chunks_or_behind_a_prefix_reads_a_prompt_by_itself(name, alone):
    assert load_method(name, budget=32, calibrate=calibrate(tiny_model.CONFIG)).reads_alone is alone


def test_one_token_is_a_budget_of_a_program_and_of_a_config_and_a_plain_1_is_refused():
    assert load_method("knorm", budget=1).transform.schedule.budget == 1
    bound = ("knorm.budget = @tokens()", "tokens.count = 1")
    assert isinstance(load_method("knorm", budget=0.5, bindings=bound).transform.schedule.budget, kvjax.Tokens)
    assert isinstance(load_method("knorm", budget=1.0).transform.schedule.budget, float)
    with pytest.raises(ValueError, match=r"^method knorm: budget must be 1.0 for the whole prompt or kvjax.Tokens"):
        load_method("knorm", budget=0.5, bindings=("knorm.budget = 1",))
