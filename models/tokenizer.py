"""Text to token ids and back, and the chat template."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from models import byte_level, chat_template, sentencepiece

# Ends of a turn or of a text under the names that the common formats give them: whichever of these a vocabulary has
# stops generation, because files often declare only one of those that a model emits.
_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<|end|>",
    "<|endoftext|>",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
)
# The same, where they are special: in other vocabularies these are markup that a text may contain (Gemma's </s>).
_SPECIAL_ENDS = ("</s>", "<eos>", "<EOT>", "[EOT]", "[EOS]")

# GGUF files do not say that the special tokens of Phi take the white space after them: of these they do not.
_PHI_PLAIN = ("<unk>", "<s>", "<|endoftext|>", "<|endofprompt|>")


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
        """Returns the text of some ids, special tokens included.

        `decode(encode(text))` is the text, but for what a vocabulary itself does not keep: the composed forms of
        Unicode (Qwen, GPT-NeoX), white space after special tokens (Phi), a space at the start (SentencePiece).
        """
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Renders a conversation as the prompt the model was trained on.

        Args:
          messages: `{"role": "user", "content": ...}` and so on, in order.
          add_generation_prompt: end with the opening of the assistant's turn.
          tools: JSON schemas of the functions that the model may call.
          **variables: more that this model's template reads, such as `enable_thinking=False`.

        Returns:
          The prompt; `encode` it as it is.

        Raises:
          ValueError: there is no chat template, or it fails or refuses these messages.
        """
        if self.chat_template is None:
            raise ValueError("This model has no chat template: encode the text itself.")
        given = {
            "bos_token": self._text_of(self.bos_id),
            "eos_token": self._text_of(self.eos_ids[0] if self.eos_ids else None),
            "tools": None if tools is None else list(tools),
            "documents": None,
            **variables,
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
        }
        return chat_template.render(self.chat_template, given)

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
    builders = {"gpt2": byte_level.from_gguf, "llama": sentencepiece.from_gguf}
    if kind not in builders:
        raise ValueError(
            f"tokenizer.ggml.model is {kind!r}, supported: 'gpt2' (byte-level BPE) and 'llama' (SentencePiece)."
        )
    backend = builders[kind](metadata)
    if metadata.get("general.architecture") == "phi3":
        _strip_beside_specials(backend, metadata)
    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    bos_id = metadata.get("tokenizer.ggml.bos_token_id")
    opens = kind == "llama" or byte_level.words_of(metadata).opens
    opens = metadata.get("tokenizer.ggml.add_bos_token", opens) and bos_id is not None
    return Tokenizer(
        backend=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        bos_id=bos_id,
        eos_ids=stop_ids(backend, ends),
        opening=(int(bos_id),) if opens else (),
    )


def _strip_beside_specials(backend: tokenizers.Tokenizer, metadata: Mapping[str, Any]) -> None:
    """Lets special tokens take the white space beside them, as the tokenizer.json of each Phi says."""
    both = metadata.get("tokenizer.ggml.pre") == "dbrx"  # Phi-4 (14B): of all of them, on both sides
    specials = [token for token in backend.get_added_tokens_decoder().values() if token.special]
    backend.add_tokens(
        [
            tokenizers.AddedToken(token.content, special=True, normalized=False, rstrip=True, lstrip=both)
            for token in specials
            if both or token.content not in _PHI_PLAIN
        ]
    )


def stop_ids(backend: tokenizers.Tokenizer, declared: Iterable[int | None]) -> tuple[int, ...]:
    """Returns the declared end tokens, then the known ends that the vocabulary has, each once; None is skipped."""
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    known = [*_ENDS, *(token for token in _SPECIAL_ENDS if token in special)]
    ids = [*declared, *(backend.token_to_id(token) for token in known)]
    return tuple(dict.fromkeys(int(i) for i in ids if i is not None))
