"""What a method's config gets from the model that it runs on, and how it is run."""

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
