"""SentencePiece and tekken files give the ids that their own rules give, worked out by hand."""

import base64
import json
import struct

import pytest

from models import sentencepiece, tekken, tokenizer
from models.huggingface import load_directory
from models.merges import merges_of

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["<unk>", "<s>", "</s>", *BYTES, "▁▁", "\n\n", *"▁abcd", "ab", "cd", "▁ab", "abcd", "bc"]
SCORES = [0.0] * (len(PIECES) - 10) + [-10.0, -11.0, -12.0, -13.0, -14.0, -1.0, -2.0, -3.0, -4.0, -0.5]
KINDS = [2, 3, 3, *[6] * 256, 4, 4, *[1] * 10]
ID = {piece: i for i, piece in enumerate(PIECES)}


def gguf(**more):
    fields = {"model": "llama", "tokens": PIECES, "scores": SCORES, "token_type": KINDS, "bos_token_id": 1}
    return {f"tokenizer.ggml.{key}": value for key, value in (fields | {"eos_token_id": 2} | more).items()}


def spelled(read: tokenizer.Tokenizer, text: str) -> list[str]:
    return [PIECES[i] for i in read.encode(text)]


def test_pieces_are_merged_from_the_highest_score_on():
    read = tokenizer.from_gguf(gguf(add_space_prefix=False))
    # "bc" has the highest score of all: it is made first, and "ab", "cd" and "abcd" no longer can be.
    assert spelled(read, "abcd") == ["a", "bc", "d"]
    assert spelled(read, "ab cd") == ["ab", "▁", "cd"]
    assert spelled(read, " ab") == ["▁ab"]


def test_spaces_in_a_row_markup_and_unknown_characters():
    read = tokenizer.from_gguf(gguf(add_space_prefix=False))
    assert spelled(read, "a  b") == ["a", "▁▁", "b"]  # a piece of the user's own, whatever its score
    assert spelled(read, "a\n\nb") == ["a", "\n\n", "b"]
    assert spelled(read, "<s>a</s>") == ["<s>", "a", "</s>"]
    assert spelled(read, "aé") == ["a", "<0xC3>", "<0xA9>"]
    for text in ("a  b\n\nc", " <s>aé 東", "a\tb"):
        assert read.decode(read.encode(text)) == text


def test_a_text_starts_with_a_space_where_the_file_says_so():
    read = tokenizer.from_gguf(gguf())
    assert spelled(read, "ab") == ["▁ab"] and read.decode(read.encode("ab a")) == "ab a"


def test_opening_is_the_bos_token_unless_the_file_says_no():
    assert tokenizer.from_gguf(gguf()).opening == (1,)
    assert tokenizer.from_gguf(gguf(add_bos_token=False)).opening == ()


def varint(value: int) -> bytes:
    more, last = [], value
    while last > 127:
        more.append(last & 127 | 128)
        last >>= 7
    return bytes([*more, last])


def field(number: int, value: int | float | bytes) -> bytes:
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def model_proto(model_type: int = 2, space_first: int = 1, squeezed: int = 0) -> bytes:
    pieces = (
        field(1, piece.encode()) + field(2, score) + field(3, kind) for piece, score, kind in zip(PIECES, SCORES, KINDS)
    )
    trainer, normalizer = field(3, model_type), field(3, space_first) + field(4, squeezed)
    return b"".join(field(1, piece) for piece in pieces) + field(2, trainer) + field(3, normalizer)


def test_tokenizer_model_is_read_as_gguf_metadata_is():
    read = sentencepiece.read_model(model_proto())
    assert read.pieces == PIECES and list(read.kinds) == KINDS and not read.unigram and read.space_first
    built, other = sentencepiece.backend(read), tokenizer.from_gguf(gguf()).backend
    for text in ("abcd ab", "a  b\n\ncé", "<s>ab"):
        assert built.encode(text).ids == other.encode(text).ids
    assert sentencepiece.read_model(model_proto(space_first=0)).space_first is False


def test_spaces_are_squeezed_where_the_model_says_so():
    read = sentencepiece.read_model(model_proto(squeezed=1))
    built = sentencepiece.backend(read._replace(space_after_specials=True))
    assert [PIECES[i] for i in built.encode("  ab   cd ").ids] == ["▁ab", "▁", "cd"]


def test_unigram_vocabulary_takes_the_likeliest_split():
    built = sentencepiece.backend(sentencepiece.read_model(model_proto(model_type=1)))
    # "▁ab" + "cd" scores -5; "▁" + "abcd" -14; "▁" "a" "bc" "d" far less.
    assert [PIECES[i] for i in built.encode("abcd").ids] == ["▁ab", "cd"]


@pytest.mark.parametrize(
    "data, message",
    [
        (model_proto()[:-20], "damaged"),
        (b"\x00" * 20, "holds no pieces|damaged"),
        (b"", "holds no pieces"),
        (model_proto(model_type=3), "model_type is 3, supported: 1"),
    ],
)
def test_damaged_and_unsupported_models_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        sentencepiece.read_model(data)


def test_merges_come_in_the_order_of_what_they_make():
    order = {"a": 0, "b": 1, "c": 2, "bc": 3, "ab": 4, "abc": 5}
    assert merges_of(order) == [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")]


TEKKEN_RANKS = [*(bytes([byte]) for byte in range(256)), b"th", b"the", b" the", "é".encode(), b"never"]


def tekken_json(**more) -> dict:
    config = {"pattern": r" ?\p{L}+|\p{N}|\s+", "default_vocab_size": 2 + 260, "default_num_special_tokens": 2}
    vocab = [{"rank": i, "token_bytes": base64.b64encode(b).decode()} for i, b in enumerate(TEKKEN_RANKS)]
    special = [{"rank": 0, "token_str": "<unk>"}, {"rank": 1, "token_str": "<s>"}]
    return {"config": config, "vocab": vocab, "special_tokens": special} | more


def test_tekken_ids_are_ranks_after_the_special_tokens():
    built = tekken.backend(tekken_json())
    ids = lambda text: built.encode(text).ids
    assert ids("the the") == [2 + 257, 2 + 258]
    assert ids("<s>é") == [1, 2 + 259]
    assert ids("12") == [2 + ord("1"), 2 + ord("2")]
    # The vocabulary size leaves out the last piece of the file.
    assert ids("never") == [2 + ord(c) for c in "never"]
    assert built.decode(ids("the é 12"), skip_special_tokens=False) == "the é 12"


def test_damaged_tekken_file_is_refused():
    with pytest.raises(ValueError, match="tekken.json is damaged or of another version"):
        tekken.backend(tekken_json(config={}))
    with pytest.raises(ValueError, match="no piece for some byte"):
        tekken.backend(tekken_json(vocab=tekken_json()["vocab"][1:]))


@pytest.mark.parametrize("file", ["tekken.json", "tokenizer.model"])
def test_directories_may_bring_either_file(tiny, tmp_path, file):
    path = tiny.write_directory(tmp_path / "tiny")
    (path / "tokenizer.json").unlink()
    if file == "tekken.json":
        (path / file).write_text(json.dumps(tekken_json()))
    else:
        (path / file).write_bytes(model_proto())
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    read = load_directory(path, "float32")[2]
    assert read.decode(read.encode("the ab")) == "the ab"
    assert read.opening == (1,)
