"""Mistral's tekken.json: byte-level BPE as a list of byte strings in the order of their ranks."""

from __future__ import annotations

import base64
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from models.merges import merges_of


def _letters() -> list[str]:
    """The printable character that stands for each byte, as in GPT-2's vocabulary."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = iter(range(256, 512))
    return [chr(byte) if byte in kept else chr(next(moved)) for byte in range(256)]


def backend(content: dict[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer of a parsed tekken.json.

    Special tokens have the first ids; a piece's id is its rank after them, as many as the file's vocabulary size lets
    in.

    Raises:
      ValueError: a field is missing, or the vocabulary lacks a byte.
    """
    try:
        config = content["config"]
        pattern, count = config["pattern"], int(config["default_vocab_size"])
        reserved = int(config["default_num_special_tokens"])
        ranked = [base64.b64decode(entry["token_bytes"]) for entry in content["vocab"][: count - reserved]]
        specials = {entry["rank"]: entry["token_str"] for entry in content.get("special_tokens") or ()}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"tekken.json is damaged or of another version ({error!r}).") from error
    rank = {piece: i for i, piece in enumerate(ranked)}
    if any(bytes([byte]) not in rank for byte in range(256)):
        raise ValueError("tekken.json has no piece for some byte.")
    letters = _letters()
    spell = lambda piece: "".join(letters[byte] for byte in piece)
    vocab = {spell(piece): reserved + i for piece, i in rank.items()}
    names = [specials.get(i, f"<SPECIAL_{i}>") for i in range(reserved)]
    merges = [(spell(left), spell(right)) for left, right in merges_of(rank)]
    vocab |= {name: i for i, name in enumerate(names)}
    # A word that is a piece is taken as it is: ranks need not be reachable by merges.
    built = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    built.decoder = decoders.ByteLevel()
    built.add_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in names])
    return built
