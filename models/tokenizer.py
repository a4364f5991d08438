"""Text to token ids and back, and the chat template."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from models import deepseek_words, sentencepiece

# Ends of a turn under the names that the common chat formats give them: whichever of these a vocabulary has stops
# generation, because files often declare only one of the two that a model emits.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>")

# llama.cpp's token types (gguf.TokenType) that are matched in text before BPE runs.
_CONTROL, _USER_DEFINED = 3, 4

_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_PATTERN = _LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A vocabulary with its special tokens and chat template.

    Attributes:
      backend: the `tokenizers.Tokenizer` that does the work.
      chat_template: jinja2 source, or None for a model without one.
      bos_id: the token that opens a text, or None.
      eos_ids: every token that ends a turn; the first is the one the model's files declare.
      opening: what every text must open with, where a model asks for it; a chat template writes it by itself.
    """

    backend: tokenizers.Tokenizer
    chat_template: str | None
    bos_id: int | None
    eos_ids: tuple[int, ...]
    opening: tuple[int, ...] = ()

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text; special tokens written in it are recognised, none are added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of some ids, special tokens included: `decode(encode(text)) == text`."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Renders a conversation as the prompt the model was trained on.

        Args:
          messages: `{"role": "user", "content": ...}` and so on, in order.
          add_generation_prompt: end with the opening of the assistant's turn.

        Returns:
          The prompt; `encode` it as it is.

        Raises:
          ValueError: there is no chat template, or it refuses these messages.
        """
        if self.chat_template is None:
            raise ValueError("This model has no chat template: encode the text itself.")
        try:
            return _chat_environment().from_string(self.chat_template).render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                bos_token=self._text_of(self.bos_id),
                eos_token=self._text_of(self.eos_ids[0] if self.eos_ids else None),
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"The chat template cannot render these messages: {error}") from error

    def _text_of(self, token_id: int | None) -> str:
        return "" if token_id is None else self.backend.id_to_token(token_id) or ""


def from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Builds the tokenizer that a GGUF file describes: byte-level BPE, or SentencePiece.

    Args:
      metadata: the file's key-value pairs.

    Raises:
      ValueError: another kind of vocabulary or pre-tokenizer, or metadata missing.
    """
    kind = metadata.get("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level_bpe, "llama": sentencepiece.from_gguf}
    if kind not in builders:
        raise ValueError(
            f"tokenizer.ggml.model is {kind!r}, supported: 'gpt2' (byte-level BPE) and 'llama' (SentencePiece)."
        )
    backend = builders[kind](metadata)
    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
    bos_id = metadata.get("tokenizer.ggml.bos_token_id")
    opens = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama") and bos_id is not None
    return Tokenizer(
        backend=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        bos_id=bos_id,
        eos_ids=stop_ids(backend, ends),
        opening=(int(bos_id),) if opens else (),
    )


def _byte_level_bpe(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    def pattern(*regexes: str, digits: bool = False) -> list[pre_tokenizers.PreTokenizer]:
        cuts = [pre_tokenizers.Split(tokenizers.Regex(regex), "isolated") for regex in regexes]
        return [*cuts, *[pre_tokenizers.Digits(individual_digits=True)] * digits, _byte_level(pattern=False)]

    split = {
        # llama.cpp isolates every \p{N}, then applies GPT-2's pattern; `Digits` tests the same Unicode class.
        "smollm": lambda: [pre_tokenizers.Digits(individual_digits=True), _byte_level(pattern=True)],
        "gpt-2": lambda: [_byte_level(pattern=True)],
        "llama-bpe": lambda: pattern(_LLAMA3_PATTERN),
        "qwen2": lambda: pattern(_QWEN2_PATTERN),
        "tekken": lambda: pattern(_TEKKEN_PATTERN),
        "deepseek-llm": lambda: pattern(*deepseek_words.PATTERNS, digits=True),
    }
    name = metadata.get("tokenizer.ggml.pre")
    if name not in split:
        raise ValueError(f"tokenizer.ggml.pre is {name!r}, supported: {', '.join(map(repr, split))}.")
    missing = [key for key in ("tokens", "merges", "token_type") if f"tokenizer.ggml.{key}" not in metadata]
    if missing:
        raise ValueError(f"tokenizer.ggml.{missing[0]} is missing, expected a list.")

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    # These take a whole word that is in the vocabulary as it is, whatever the merges say.
    whole_words = name in ("llama-bpe", "tekken")
    try:
        bpe = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, ignore_merges=whole_words)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"tokenizer.ggml.merges do not fit tokenizer.ggml.tokens: {error}.") from error
    backend = tokenizers.Tokenizer(bpe)
    if name == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(split[name]())
    backend.decoder = decoders.ByteLevel()
    for token, token_type in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True):
        if token_type in (_CONTROL, _USER_DEFINED):
            special = token_type == _CONTROL
            backend.add_tokens([tokenizers.AddedToken(token, special=special, normalized=False)])
    return backend


def stop_ids(backend: tokenizers.Tokenizer, declared: Iterable[int | None]) -> tuple[int, ...]:
    """Returns the declared end tokens, then the turn ends that the vocabulary has, each once; None is skipped."""
    ids = [*declared, *(backend.token_to_id(token) for token in _TURN_ENDS)]
    return tuple(dict.fromkeys(int(i) for i in ids if i is not None))


def _byte_level(pattern: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern)


def _chat_environment() -> jinja2.Environment:
    """Templates come from downloaded files: the sandbox lets them format text and nothing else."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    # Templates write JSON for the model, not for a web page: no HTML escapes.
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
