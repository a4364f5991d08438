"""Vocabularies give the ids of transformers: `tests/golden/make_tokenizer_ids.py` computed them."""

import base64
import functools
import json
import pathlib

import pytest

from models import byte_level, sentencepiece, tokenizer
from models.huggingface import load_directory

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
BYTE_LEVEL_SPECIALS = ("<|endoftext|>", "<|end|>")
SPECIALS = ("[INST]", "[/INST]", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>")


@functools.cache
def golden():
    return json.loads((GOLDEN / "tokenizers.json").read_text())


def byte_level_gguf(pre: str, **more):
    vocabulary = golden()["byte_level"]
    kinds = [3 if t in BYTE_LEVEL_SPECIALS else 4 if t == "<think>" else 1 for t in vocabulary["tokens"]]
    fields = {"model": "gpt2", "pre": pre, "token_type": kinds, **vocabulary, **more}
    return tokenizer.from_gguf({f"tokenizer.ggml.{key}": value for key, value in fields.items()})


def sentencepiece_gguf(architecture: str, **more):
    read = sentencepiece.read_model(base64.b64decode(golden()["sentencepiece"]["model"]))
    fields = {
        "model": "llama",
        "tokens": [*read.pieces, *SPECIALS],
        "scores": [*read.scores, *[-1000.0] * len(SPECIALS)],
        "token_type": [*read.kinds, *[3] * len(SPECIALS)],
    }
    metadata = {f"tokenizer.ggml.{key}": value for key, value in (fields | more).items()}
    return tokenizer.from_gguf(metadata | {"general.architecture": architecture})


def assert_same(read: tokenizer.Tokenizer, case: str, but: tuple[str, ...] = ()) -> None:
    ids, decoded = golden()["ids"][case], golden()["decoded"][case]
    for text in set(ids) - set(but):
        assert read.encode(text) == ids[text], text
        assert read.decode(ids[text]) == decoded[text], text


@pytest.mark.parametrize(
    "pre, case, but",
    [
        # transformers reads "zq" of a GGUF file by merges, of Llama 3's and Mistral's own files as the piece it is.
        ("llama-bpe", "gguf/llama-bpe", ("zq 345",)),
        ("tekken", "gguf/tekken", ("zq 345",)),
        ("smaug-bpe", "gguf/smaug-bpe", ()),
        ("dbrx", "gguf/dbrx", ()),
        ("gpt-4o", "gguf/gpt-4o", ()),
        ("megrez", "gguf/megrez", ()),
        ("gpt-2", "gguf/gpt-2", ()),
        ("qwen2", "directory/Qwen2Tokenizer", ()),
        ("deepseek-r1-qwen", "directory/Qwen2Tokenizer", ()),
        ("olmo", "directory/GPTNeoXTokenizer", ()),
    ],
)
def test_byte_level_ids(pre, case, but):
    assert_same(byte_level_gguf(pre), case, but)


def test_the_oracle_tells_pre_tokenizers_apart():
    of = lambda pre: [byte_level_gguf(pre).encode(text) for text in golden()["ids"]["gguf/gpt-2"]]
    every = {pre: of(pre) for pre in ("llama-bpe", "dbrx", "gpt-4o", "tekken", "qwen2", "megrez", "gpt-2", "olmo")}
    assert len({json.dumps(ids) for ids in every.values()}) == len(every)


@pytest.mark.parametrize("pre", ["llama-bpe", "tekken"])
def test_whole_words_are_taken_as_they_are(pre):
    read = byte_level_gguf(pre)
    assert read.backend.id_to_token(read.encode("zq 345")[0]) == "zq"


@pytest.mark.parametrize(
    "pre, words",
    [
        ("seed-coder", ["It", "'s", " ", "1", "2", " a", ".(", "\n\n", " x", " y"]),
        ("deepseek-coder", ["It", "'", "s", " ", "1", "2", " a", ".(", "\n", "\n", " x", " y"]),
        ("viking", ["It's", " ", "1", "2", " a", ".(\n\n", " x", " y"]),
        ("starcoder", ["It", "'s", " ", "1", "2", " a", ".(", "\n\n", " x", " y"]),
    ],
)
def test_pre_tokenizers_without_a_class_of_their_own_cut_as_their_patterns_say(pre, words):
    text = "It's 12 a.(\n\n x y"
    split = byte_level_gguf(pre).backend.pre_tokenizer
    assert [text[a:b] for _, (a, b) in split.pre_tokenize_str(text)] == words


@pytest.mark.parametrize("pre", sorted(byte_level.PRE_TOKENIZERS))
def test_every_pre_tokenizer_keeps_the_text(pre):
    read = byte_level_gguf(pre)
    text = "I'LL say  12345 résumé 東京!\r\n\n  <think>the<|end|> "
    assert read.decode(read.encode(text)) == text


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_sentencepiece_ids_of_gguf_files(architecture):
    # The cases after markup of Phi-3 have their own test: transformers does not strip spaces in its GGUF files.
    but = ("[INST] Hi [/INST]", "[INST]Hi[/INST] there") if architecture == "phi3" else ()
    assert_same(sentencepiece_gguf(architecture), f"gguf/{architecture}", but)


def test_text_after_markup_comes_back_as_it_was():
    read = sentencepiece_gguf("llama")
    for text in ("<s>Hi", "<s> Hi", "[INST] Hi [/INST]", "Hi</s>there", "Hi  there"):
        assert read.decode(read.encode(text)) == text
    assert [read.backend.id_to_token(i) for i in read.encode("[INST] Hi")][1] == "▁H"


def test_phi3_gguf_strips_after_special_tokens_as_its_directory_does():
    assert_same(sentencepiece_gguf("phi3"), "directory/phi3")
    read = sentencepiece_gguf("phi3")
    assert read.encode("<|end|>\n\n <|user|>") == read.encode("<|end|><|user|>")
    assert read.encode("<|endoftext|>\n") != read.encode("<|endoftext|>")


def test_phi4_strips_on_both_sides_and_phi4_mini_after():
    # As their tokenizer.json says: Phi-4 (14B) has lstrip and rstrip for all, Phi-4-mini rstrip for those of turns.
    def read(pre):
        built = byte_level_gguf(pre)
        metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "general.architecture": "phi3"}
        vocabulary = golden()["byte_level"]
        kinds = [3 if t in BYTE_LEVEL_SPECIALS else 1 for t in vocabulary["tokens"]]
        fields = {"token_type": kinds, **vocabulary}
        metadata |= {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
        return tokenizer.from_gguf(metadata), built.backend.token_to_id("<|end|>")

    phi4, end = read("dbrx")
    assert phi4.encode("  <|end|>\n\n<|endoftext|> ") == [end, phi4.backend.token_to_id("<|endoftext|>")]
    mini, end = read("gpt-4o")
    assert mini.encode("<|end|>\n\n") == [end] and mini.encode(" <|end|>") != [end]
    assert len(mini.encode("<|endoftext|> ")) == 2


def write_directory(tiny, path, settings):
    tiny.write_directory(path)
    (path / "tokenizer.json").unlink()
    (path / "tokenizer.model").write_bytes(base64.b64decode(golden()["sentencepiece"]["model"]))
    size = len(sentencepiece.read_model((path / "tokenizer.model").read_bytes()).pieces)
    added = {str(size + i): {"content": token, "special": True} for i, token in enumerate(SPECIALS)}
    settings = {"bos_token": "<s>", "eos_token": "</s>", "added_tokens_decoder": added} | settings
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize(
    "case, architecture, settings, but",
    [
        ("llama", "LlamaForCausalLM", {}, ()),
        # Here transformers 5 drops a space that follows the prefix, which SentencePiece and Mistral's case keep.
        (
            "llama_legacy",
            "LlamaForCausalLM",
            {"legacy": True},
            (" Hi", "  Hi", "<s> Hi", "[INST] Hi [/INST]", "[INST]Hi[/INST] there"),
        ),
        ("mistral", "MistralForCausalLM", {}, ()),
        ("mistral_new", "MistralForCausalLM", {"legacy": False}, ()),
    ],
)
def test_sentencepiece_ids_of_directories(tiny, tmp_path, case, architecture, settings, but):
    tiny.hf_config["architectures"] = [architecture]
    read = load_directory(write_directory(tiny, tmp_path / "tiny", settings), "float32")[2]
    assert_same(read, f"directory/{case}", but)
    assert read.opening == (1,) and read.eos_ids[0] == 2


def test_a_prefix_may_be_switched_off(tiny, tmp_path):
    path = write_directory(tiny, tmp_path / "tiny", {"add_prefix_space": False})
    read = load_directory(path, "float32")[2]
    assert read.decode(read.encode("Hi there")) == "Hi there"
    assert read.encode("Hi") == sentencepiece_gguf("llama", add_space_prefix=False).encode("Hi") != [264, 313]


def test_an_added_token_under_another_id_is_refused(tiny, tmp_path):
    path = write_directory(tiny, tmp_path / "tiny", {"added_tokens_decoder": {"7": {"content": "<|user|>"}}})
    with pytest.raises(ValueError, match=r"added_tokens_decoder gives '<\|user\|>' the id 7, tokenizer.model \d+"):
        load_directory(path, "float32")


@pytest.mark.parametrize("pre, opens", [("llama-bpe", True), ("tekken", True), ("qwen2", False), ("dbrx", False)])
def test_files_that_do_not_say_it_open_with_bos_where_their_models_do(pre, opens):
    bos = golden()["byte_level"]["tokens"].index("<|endoftext|>")
    assert byte_level_gguf(pre, bos_token_id=bos).opening == ((bos,) if opens else ())
    assert byte_level_gguf(pre, bos_token_id=bos, add_bos_token=not opens).opening == (() if opens else (bos,))


def byte_level_with(*specials: str, kind: int = 3, **more):
    vocabulary = golden()["byte_level"]
    tokens = [token for token in vocabulary["tokens"] if token not in BYTE_LEVEL_SPECIALS]
    kinds = [1] * len(tokens) + [kind] * len(specials)
    more = {f"{key}_token_id": len(tokens) + specials.index(token) for key, token in more.items()}
    read = byte_level_gguf("llama-bpe", tokens=[*tokens, *specials], token_type=kinds, **more)
    return [read.backend.id_to_token(i) for i in read.eos_ids]


def test_stop_tokens_of_llama_3_1_are_those_of_its_generation_config():
    # eos_token_id of its generation_config.json: 128001, 128008, 128009, which are these; the file declares one.
    specials = ("<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|start_header_id|>")
    found = byte_level_with(*specials, eos="<|eot_id|>", bos="<|begin_of_text|>")
    assert found[0] == "<|eot_id|>" and set(found) == {"<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"}


@pytest.mark.parametrize(
    "specials",
    [
        ("<|im_end|>", "<|endoftext|>"),  # Qwen, SmolLM
        ("<end_of_turn>", "<eos>"),  # Gemma
        ("<|end|>", "<|endoftext|>"),  # Phi
        ("<｜end▁of▁sentence｜>",),  # DeepSeek
        ("<|im_end|>", "</s>"),  # finetuned Llama 2 and Mistral
    ],
)
def test_every_end_that_a_family_knows_stops(specials):
    assert set(byte_level_with(*specials)) == set(specials)


def test_declared_ends_stop_under_any_name():
    assert byte_level_with("<a>", "<b>", "<c>", eos="<a>", eot="<b>", eom="<c>") == ["<a>", "<b>", "<c>"]


def test_markup_that_is_no_special_token_does_not_stop():
    assert byte_level_with("</s>", "<eos>", kind=4) == []  # Gemma has </s> for crossed out text
