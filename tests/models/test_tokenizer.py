"""Token ids are those of Hugging Face, text survives the round trip, and templates render in a sandbox."""

import dataclasses
import pathlib

import numpy as np
import pytest

from models import assets, tokenizer

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"

# From transformers 5.23, AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf").
HUGGING_FACE_IDS = {
    "The pass key is 8314069.": [504, 1301, 1646, 314, 216, 40, 35, 33, 36, 32, 38, 41, 30],
    "I'll say we've, can't and it's.": [57, 3060, 1643, 392, 3543, 28, 416, 982, 284, 357, 506, 30],
    "naïve café — “quoted” 東京": [3546, 46494, 37366, 1841, 619, 385, 5036, 573, 17097, 247, 126, 16736, 122],
    "ok 🙂": [2231, 47526],
    "def f(x):\n    return x  # two": [1604, 275, 24, 104, 727, 472, 1003, 1792, 216, 907, 827],
    "\n\n\tend  ": [1116, 197, 486, 256],
    "<|im_start|>user\nhi<|im_end|>\n": [1, 4093, 198, 6004, 2, 198],
    "½ + x² =": [16738, 1232, 1792, 19133, 446],
}


@pytest.mark.parametrize("text", HUGGING_FACE_IDS)
def test_ids_are_those_of_hugging_face(smollm2, text):
    assert smollm2.tokenizer.encode(text) == HUGGING_FACE_IDS[text]


def test_prose_has_the_ids_of_the_golden_logits(smollm2):
    text = (GOLDEN / "prose.txt").read_text(encoding="utf-8")
    np.testing.assert_array_equal(smollm2.tokenizer.encode(text), np.load(GOLDEN / "smollm2_logits.npz")["ids"])


def test_digits_are_split_before_spaces_are_grouped(smollm2):
    # The smollm pre-tokenizer isolates digits first, so both spaces stay together, as in the model's training.
    # (transformers' GGUF conversion drops that step and gives 216, 216; the ids of the digits are the same.)
    assert smollm2.tokenizer.encode("a  55") == [81, 256, 37, 37]


def test_essays_survive_the_round_trip(smollm2):
    essays = sorted(assets.fetch(assets.ESSAYS).glob("*.txt"))
    assert len(essays) == 48 and "rss.txt" not in {essay.name for essay in essays}
    total = 0
    for essay in essays:
        text = essay.read_text(encoding="utf-8")
        ids = smollm2.tokenizer.encode(text)
        assert smollm2.tokenizer.decode(ids) == text
        total += len(ids)
    assert total == 153_940


def test_decode_takes_arrays_and_keeps_special_tokens(smollm2):
    ids = np.array(smollm2.tokenizer.encode("<|im_start|>hi<|im_end|>"), np.int32)
    assert smollm2.tokenizer.decode(ids) == "<|im_start|>hi<|im_end|>"


def test_generation_stops_at_the_end_of_a_turn_and_of_a_text(smollm2):
    assert smollm2.tokenizer.encode("<|im_end|><|endoftext|>") == list(smollm2.tokenizer.eos_ids) == [2, 0]
    assert smollm2.tokenizer.bos_id == 1


def test_chat_renders_the_template_of_the_model(smollm2):
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    turn = "<|im_start|>user\nWhat is the key?<|im_end|>\n"
    messages = [{"role": "user", "content": "What is the key?"}]
    assert smollm2.tokenizer.chat(messages) == system + turn + "<|im_start|>assistant\n"
    assert smollm2.tokenizer.chat(messages, add_generation_prompt=False) == system + turn


def test_template_sees_special_tokens_json_and_its_own_errors(tiny):
    base = tokenizer.from_gguf(tiny.gguf_fields)

    def chat(template: str) -> str:
        return dataclasses.replace(base, chat_template=template).chat([{"role": "user", "content": "<é>"}])

    assert chat("{{ bos_token }}|{{ eos_token }}") == "<|im_start|>|<|im_end|>"
    assert chat("{{ messages[0] | tojson }}") == '{"role": "user", "content": "<é>"}'
    # As in transformers: a block tag takes its line's indentation and newline with it.
    assert chat("{% for m in messages %}\n  {% if true %}\nx\n  {% endif %}\n{% endfor %}") == "x\n"
    with pytest.raises(ValueError, match="cannot render these messages: roles must alternate"):
        chat("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="cannot render"):
        chat("{% for m in messages %}")


@pytest.mark.parametrize(
    "template", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ messages[0].update(a=1) }}"]
)
def test_template_cannot_leave_the_sandbox(tiny, template):
    unsafe = dataclasses.replace(tokenizer.from_gguf(tiny.gguf_fields), chat_template=template)
    with pytest.raises(ValueError, match="cannot render"):
        unsafe.chat([{"role": "user", "content": "hi"}])


def test_without_template_chat_says_so(tiny):
    del tiny.gguf_fields["tokenizer.chat_template"]
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.from_gguf(tiny.gguf_fields).chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    "pre, pieces",
    [
        ("smollm", ["the", "Ġ", "Ġ", "1", "2", "1"]),
        ("gpt-2", ["the", "Ġ", "Ġ", "12", "1"]),
        ("llama-bpe", ["the", "Ġ", "Ġ", "12", "1"]),
    ],
)
def test_pre_tokenizers_split_numbers_as_named(tiny, pre, pieces):
    tiny.gguf_fields["tokenizer.ggml.pre"] = pre
    built = tokenizer.from_gguf(tiny.gguf_fields)
    ids = built.encode("the  121")
    assert [built.backend.id_to_token(i) for i in ids] == pieces
    assert built.decode(ids) == "the  121"


def test_llama_bpe_groups_at_most_three_digits_and_takes_whole_words(tiny):
    tiny.gguf_fields["tokenizer.ggml.pre"] = "llama-bpe"
    tiny.gguf_fields["tokenizer.ggml.tokens"] = [*tiny.gguf_fields["tokenizer.ggml.tokens"], "345", "zq"]
    tiny.gguf_fields["tokenizer.ggml.token_type"] = [*tiny.gguf_fields["tokenizer.ggml.token_type"], 1, 1]
    built = tokenizer.from_gguf(tiny.gguf_fields)
    pieces = [built.backend.id_to_token(i) for i in built.encode("012345 zq")]
    # "012" has no entry and falls to merges; "345" has one, though no merge makes it; " zq" has none.
    assert pieces == ["0", "12", "345", "Ġ", "z", "q"]
    assert built.encode("zq") == [built.backend.token_to_id("zq")]


def test_user_defined_tokens_are_matched_whole(tiny):
    tiny.gguf_fields["tokenizer.ggml.tokens"] = [*tiny.gguf_fields["tokenizer.ggml.tokens"], "<think>"]
    tiny.gguf_fields["tokenizer.ggml.token_type"] = [*tiny.gguf_fields["tokenizer.ggml.token_type"], 4]
    built = tokenizer.from_gguf(tiny.gguf_fields)
    assert built.encode("<think>") == [len(tiny.gguf_fields["tokenizer.ggml.tokens"]) - 1]


@pytest.mark.parametrize("key", ["tokens", "merges", "token_type", "pre", "model"])
def test_missing_metadata_is_named(tiny, key):
    del tiny.gguf_fields[f"tokenizer.ggml.{key}"]
    with pytest.raises(ValueError, match=rf"tokenizer\.ggml\.{key} is (missing|None)"):
        tokenizer.from_gguf(tiny.gguf_fields)


def test_unknown_pre_tokenizer_lists_the_supported(tiny):
    tiny.gguf_fields["tokenizer.ggml.pre"] = "falcon"
    with pytest.raises(ValueError, match="'falcon', supported: 'a.x-4.0', 'dbrx', .*'smollm', .*'tekken'"):
        tokenizer.from_gguf(tiny.gguf_fields)


@pytest.mark.parametrize(
    "name, words",
    [
        ("llama-bpe", ["Hello", " World", "It", "'s", " ", "123", "4", ".\n", " x"]),
        ("qwen2", ["Hello", " World", "It", "'s", " ", "1", "2", "3", "4", ".\n", " x"]),
        # A capital after a small letter opens a word.
        ("tekken", ["Hello", " World", "It", "'s", " ", "1", "2", "3", "4", ".\n", " x"]),
        ("deepseek-llm", ["Hello", " World", "It", "'", "s", " ", "1", "2", "3", "4", ".", "\n", " x"]),
    ],
)
def test_pre_tokenizers_cut_as_their_models_were_trained(tiny, name, words):
    tiny.gguf_fields["tokenizer.ggml.pre"] = name
    split = tokenizer.from_gguf(tiny.gguf_fields).backend.pre_tokenizer
    text = "Hello WorldIt's 1234.\n x"
    cut = [text[a:b] for _, (a, b) in split.pre_tokenize_str(text)]
    if name != "tekken":
        words = ["Hello", " WorldIt", *words[3:]]
    assert cut == words
