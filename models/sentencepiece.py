"""SentencePiece vocabularies, from GGUF metadata or from a tokenizer.model, as tokenizers of the `tokenizers` library.

A space is the piece "▁"; characters that no piece has become bytes, `<0x0A>`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from models.gguf_lists import read_id, read_list
from models.merges import check_lengths, merges_of

# Kinds of pieces, the same numbers in llama.cpp and in SentencePiece's protocol buffer.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_UNIGRAM, _BPE = 1, 2
_SPACE = "▁"


class Vocabulary(NamedTuple):
    """Describes a SentencePiece model.

    Attributes:
      pieces: by id.
      scores: of the pieces; the highest is made first.
      kinds: of the pieces.
      unigram: the likeliest split, instead of merges.
      space_first: a text starts with a space, whether it is written or not.
      space_after_specials: so does what follows a special token, as the tokenizers did that transformers calls legacy.
      unknown: the piece for what is unknown; None: the one of that kind.
      squeezed: spaces at the ends are dropped, and several in a row are one.
      charsmap: SentencePiece's compiled table of replaced characters; empty: none are.
    """

    pieces: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]
    unigram: bool = False
    space_first: bool = True
    space_after_specials: bool = False
    unknown: int | None = None
    squeezed: bool = False
    charsmap: bytes = b""


def backend(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    """The tokenizer of a vocabulary.

    Raises:
      ValueError: it has no unknown piece, or lists of different lengths.
    """
    pieces, scores, kinds, unknown = vocabulary.pieces, vocabulary.scores, vocabulary.kinds, vocabulary.unknown
    check_lengths(pieces=pieces, scores=scores, kinds=kinds)
    if unknown is None:
        if _UNKNOWN not in kinds:
            raise ValueError("The vocabulary has no piece for what is unknown.")
        unknown = list(kinds).index(_UNKNOWN)
    if vocabulary.unigram:
        scored = list(zip(pieces, map(float, scores)))
        built = tokenizers.Tokenizer(models.Unigram(scored, unk_id=unknown, byte_fallback=_BYTE in kinds))
    else:
        order = {p: -score for p, score, kind in zip(pieces, scores, kinds) if kind in (_NORMAL, _USER_DEFINED)}
        built = tokenizers.Tokenizer(
            models.BPE(
                vocab={piece: i for i, piece in enumerate(pieces)},
                merges=merges_of(order),
                unk_token=pieces[unknown],
                fuse_unk=True,
                byte_fallback=_BYTE in kinds,
            )
        )
    changes = [normalizers.Precompiled(vocabulary.charsmap)] if vocabulary.charsmap else []
    if vocabulary.squeezed:
        changes += [normalizers.Replace(tokenizers.Regex(r"\A +| +\z"), "")]
        changes += [normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    every = vocabulary.space_first and vocabulary.space_after_specials
    changes += [normalizers.Prepend(_SPACE)] if every else []
    built.normalizer = normalizers.Sequence([*changes, normalizers.Replace(" ", _SPACE)])
    if vocabulary.space_first and not every:
        built.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="first", split=False)
    strip = [decoders.Strip(" ", 1, 0)] if vocabulary.space_first else []
    replace = decoders.Replace(_SPACE, " ")
    built.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), *strip])
    # A piece with spaces is found where spaces have become "▁"; markup is found in the text as it is.
    built.add_tokens(
        [
            tokenizers.AddedToken(piece, special=kind == _CONTROL, normalized=_SPACE in piece)
            for piece, kind in zip(pieces, kinds)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    return built


def from_gguf(metadata: dict[str, Any]) -> tokenizers.Tokenizer:
    """Builds the tokenizer that llama.cpp calls `llama`.

    Files do not say whether a space follows special tokens. As in transformers it does in Phi's files only: llama.cpp
    itself writes one, which the models that have `[INST]` as a token were not trained with.
    """
    lists = [read_list(metadata, *of) for of in (("tokens", str), ("scores", float), ("token_type", int))]
    return backend(
        Vocabulary(
            *lists,
            space_first=metadata.get("tokenizer.ggml.add_space_prefix", True),
            space_after_specials=metadata.get("general.architecture") == "phi3",
            unknown=read_id(metadata, "unknown", len(lists[0])),
        )
    )


def read_model(data: bytes) -> Vocabulary:
    """Reads a tokenizer.model, a `ModelProto` of SentencePiece.

    Raises:
      ValueError: it is no such file, or asks for what is not supported.
    """
    pieces, scores, kinds, unigram, normalizer = [], [], [], True, {}
    try:
        for number, value in _fields(data):
            if number == 1:  # SentencePiece
                piece = {"kind": _NORMAL, "score": 0.0}
                for inner, x in _fields(value):
                    if inner == 1:
                        piece["text"] = x.decode("utf-8")
                    elif inner == 2:
                        piece["score"] = struct.unpack("<f", x)[0]
                    elif inner == 3:
                        piece["kind"] = x
                pieces.append(piece["text"])
                scores.append(piece["score"])
                kinds.append(piece["kind"])
            elif number == 2:  # TrainerSpec
                kind = dict(_fields(value)).get(3, _UNIGRAM)
                if kind not in (_UNIGRAM, _BPE):
                    raise ValueError(f"its model_type is {kind}, supported: 1 (unigram) and 2 (BPE)")
                unigram = kind == _UNIGRAM
            elif number == 3:  # NormalizerSpec
                normalizer = dict(_fields(value))
    except (IndexError, KeyError, TypeError, AttributeError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"tokenizer.model is damaged or no SentencePiece model ({error}).") from error
    except ValueError as error:
        raise ValueError(f"tokenizer.model cannot be used: {error}.") from error
    if not pieces:
        raise ValueError("tokenizer.model holds no pieces: it is no SentencePiece model.")
    if not normalizer.get(5, 1):
        raise ValueError("tokenizer.model keeps spaces as they are (escape_whitespaces), which is not supported.")
    return Vocabulary(
        pieces,
        scores,
        kinds,
        unigram,
        space_first=bool(normalizer.get(3, 1)),
        squeezed=bool(normalizer.get(4, 1)),
        charsmap=normalizer.get(2, b""),
    )


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer: varints as int, everything else as bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        tag = varint()
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            yield number, varint()
            continue
        if kind not in (1, 2, 5):
            raise KeyError(f"wire type {kind}")
        size = {1: 8, 5: 4}.get(kind) or varint()
        if at + size > len(data):
            raise IndexError("it ends in the middle of a field")
        yield number, data[at : at + size]
        at += size
