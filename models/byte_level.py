"""Byte-level BPE vocabularies of GGUF files: where each named pre-tokenizer cuts a text into words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from models import deepseek_words
from models.gguf_lists import read_list
from models.merges import check_lengths

# llama.cpp's token types (gguf.TokenType) that are matched in text before BPE runs.
_CONTROL, _USER_DEFINED = 3, 4

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_SEED_CODER = (
    rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_VIKING = r" ?[^(\s|.,!?\x{2026}\x{3002}\x{FF0C}\x{3001}\x{0964}\x{06D4}\x{060C})]+"


def _cased(ending: str, digits: str) -> str:
    """The pattern of vocabularies in which a capital after a small letter opens a word."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    word = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{word}{upper}*{lower}+{ending}|{word}{upper}+{lower}*{ending}|{digits}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


class Words(NamedTuple):
    """Where a text is cut, and how its words are looked up.

    Attributes:
      cuts: regular expressions, one after the other: each isolates what it finds in what those before it left.
      digits: every digit stands alone.
      gpt2: GPT-2's pattern comes last.
      whole: a word of the vocabulary is taken as it is, whatever the merges say.
      opens: a text opens with the BOS token, where the file does not say otherwise.
      nfc: a text is put into Unicode's composed form first.
    """

    cuts: tuple[str, ...] = ()
    digits: bool = False
    gpt2: bool = False
    whole: bool = False
    opens: bool = False
    nfc: bool = False


_GPT2 = Words(gpt2=True)
_DIGITS_GPT2 = Words(digits=True, gpt2=True)
_LLAMA3_WORDS = Words((_LLAMA3,), whole=True, opens=True)
_CJK = r"[\x{4E00}-\x{9FA5}\x{0800}-\x{4E00}\x{AC00}-\x{D7FF}]+"

PRE_TOKENIZERS = {
    # Llama 3 and models with its pattern: Falcon 3, Pixtral's text model, Mi:dm 2.
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0"), _LLAMA3_WORDS),
    "smaug-bpe": Words((_LLAMA3,)),
    "dbrx": Words((_LLAMA3,)),  # Phi-4 (14B)
    "gpt-4o": Words((_cased(rf"{_ENDINGS}?", r"\p{N}{1,3}"),)),  # Phi-4-mini
    "tekken": Words((_cased("", r"\p{N}"),), whole=True, opens=True),  # Mistral Nemo and later
    # Qwen 2 to 3, and models distilled into them or derived from them.
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "f2llmv2"), Words((_QWEN2,), nfc=True)),
    **dict.fromkeys(("megrez", "kormo"), Words((_QWEN2,))),
    "seed-coder": Words((_SEED_CODER,)),
    # OLMo's name is given to GPT-NeoX and Pythia, too: it is the same vocabulary.
    **dict.fromkeys(("olmo", "mpt"), _GPT2._replace(nfc=True)),
    **dict.fromkeys(("gpt-2", "a.x-4.0", "mellum", "trillion", "granite-docling"), _GPT2),
    # SmolLM, StarCoder's vocabulary, Granite's code models, Minerva.
    **dict.fromkeys(("smollm", "starcoder", "refact", "minerva-7b"), _DIGITS_GPT2),
    "viking": Words((_VIKING,), digits=True),
    "deepseek-llm": Words(deepseek_words.PATTERNS, digits=True),
    "deepseek-coder": Words((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK), digits=True),
}
"""By the name in `tokenizer.ggml.pre` that llama.cpp's converter writes for checkpoints of the supported families."""


def words_of(metadata: Mapping[str, Any]) -> Words:
    """Returns where a GGUF file's vocabulary cuts.

    Raises:
      ValueError: the file names no pre-tokenizer, or another.
    """
    name = metadata.get("tokenizer.ggml.pre")
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise ValueError(
            f"tokenizer.ggml.pre is {name!r}, supported: {', '.join(map(repr, sorted(PRE_TOKENIZERS)))}."
        )
    return PRE_TOKENIZERS[name]


def from_gguf(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Builds the tokenizer that llama.cpp calls `gpt2`.

    Raises:
      ValueError: another pre-tokenizer, metadata missing, or merges of pieces that are not in the vocabulary.
    """
    words = words_of(metadata)
    tokens, written = read_list(metadata, "tokens", str), read_list(metadata, "merges", str)
    kinds = read_list(metadata, "token_type", int)
    check_lengths(tokens=tokens, token_type=kinds)
    merges = [tuple(merge.split(" ", 1)) for merge in written]
    if alone := [merge for merge in written if " " not in merge]:
        raise ValueError(f"tokenizer.ggml.merges has {alone[0]!r}, expected two pieces with a space between them.")
    try:
        vocab = {token: i for i, token in enumerate(tokens)}
        built = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=words.whole))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"tokenizer.ggml.merges do not fit tokenizer.ggml.tokens: {error}.") from error
    if words.nfc:
        built.normalizer = normalizers.NFC()
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(tokenizers.Regex(cut), "isolated") for cut in words.cuts),
            *[pre_tokenizers.Digits(individual_digits=True)] * words.digits,
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words.gpt2),
        ]
    )
    built.decoder = decoders.ByteLevel()
    built.add_tokens(
        [
            tokenizers.AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens, kinds)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    return built
