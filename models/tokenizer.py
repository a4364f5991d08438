"""Text to token ids and back, and the chat template."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from models import byte_level, chat_template, sentencepiece
from models.gguf_lists import read_id

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
      named_templates: further chat templates by name; `tool_use` is taken where tools are given.
      template_tokens: what templates read as `bos_token`, `eos_token` and so on; None: the tokens of `bos_id` and of
        the first of `eos_ids`.
    """

    backend: tokenizers.Tokenizer
    chat_template: str | None
    bos_id: int | None
    eos_ids: tuple[int, ...]
    opening: tuple[int, ...] = ()
    named_templates: Mapping[str, str] = dataclasses.field(default_factory=dict)
    template_tokens: Mapping[str, str] | None = None

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text; special tokens written in it are recognised, none are added.

        Raises:
          ValueError: the text holds half of a surrogate pair, which is no character.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            found = text[error.start]
            raise ValueError(
                f"text has {found!r} at {error.start}, half of a surrogate pair, expected what UTF-8 can write."
            ) from error
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of some ids, special tokens included.

        `decode(encode(text))` is the text, but for what a vocabulary itself does not keep: the composed forms of
        Unicode (Qwen, GPT-NeoX), white space after special tokens (Phi), a space at the start (SentencePiece). Ids
        above the vocabulary, of the rows that pad some embeddings, have no text.

        Raises:
          ValueError: an id is negative, as where `generate` had no logits for a row, or has more than 32 bits.
        """
        ids = [int(i) for i in ids]
        if wrong := [i for i in ids if not 0 <= i < 1 << 32]:
            size = self.backend.get_vocab_size()
            raise ValueError(f"ids has {wrong[0]} at {ids.index(wrong[0])}, expected token ids from 0 to {size - 1}.")
        return self.backend.decode(ids, skip_special_tokens=False)

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
          messages: a list of `{"role": "user", "content": ...}` and so on, in order; a message with `tool_calls` may
            have no content.
          add_generation_prompt: end with the opening of the assistant's turn.
          tools: JSON schemas of the functions that the model may call.
          **variables: more that this model's template reads, such as `enable_thinking=False`.

        Returns:
          The prompt; `encode` it as it is.

        Raises:
          ValueError: there is no chat template, it fails or refuses these messages, or these are no messages or tools.
        """
        template = self.chat_template
        if tools is not None:
            tools = _listed("tools", tools)
            template = self.named_templates.get("tool_use", template)
        if template is None and self.named_templates:
            names = ", ".join(sorted(self.named_templates))
            raise ValueError(f"This model has no default chat template, only: {names}.")
        if template is None:
            raise ValueError("This model has no chat template: encode the text itself.")
        tokens = self.template_tokens
        if tokens is None:
            first_end = self.eos_ids[0] if self.eos_ids else None
            tokens = {"bos_token": self._text_of(self.bos_id), "eos_token": self._text_of(first_end)}
        given = {
            **tokens,
            "tools": tools,
            "documents": None,
            **variables,
            "messages": _checked_messages(messages),
            "add_generation_prompt": add_generation_prompt,
        }
        return chat_template.render(template, given)

    def _text_of(self, token_id: int | None) -> str:
        return "" if token_id is None else self.backend.id_to_token(token_id) or ""


def _listed(name: str, given: Any) -> list[Mapping[str, Any]]:
    """Returns a list of dicts, or refuses what is none."""
    expected = f"expected a list of dicts{' with role and content' if name == 'messages' else ''}"
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
        raise ValueError(f"{name} is {_shown(given)}, {expected}.")
    listed = list(given)
    for i, entry in enumerate(listed):
        if not isinstance(entry, Mapping):
            raise ValueError(f"{name}[{i}] is {_shown(entry)}, {expected}.")
    return listed


def _checked_messages(messages: Any) -> list[Mapping[str, Any]]:
    """Refuses what templates would render as empty turns."""
    messages = _listed("messages", messages)
    for i, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{i}] has the role {_shown(message.get('role'))}, expected a string.")
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            raise ValueError(f"messages[{i}] has no content, expected a dict with role and content.")
        if content is not None and not isinstance(content, (str, list, tuple, Mapping)):
            raise ValueError(
                f"messages[{i}] has the content {_shown(content)}, expected a string, a list of parts or a dict."
            )
    return messages


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Builds the tokenizer that a GGUF file describes: byte-level BPE, or SentencePiece.

    Args:
      metadata: the file's key-value pairs.

    Raises:
      ValueError: another kind of vocabulary or pre-tokenizer, or metadata missing.
    """
    kind = metadata.get("tokenizer.ggml.model")
    builders = {"gpt2": byte_level.from_gguf, "llama": sentencepiece.from_gguf}
    if not isinstance(kind, str) or kind not in builders:
        raise ValueError(
            f"tokenizer.ggml.model is {kind!r}, supported: 'gpt2' (byte-level BPE) and 'llama' (SentencePiece)."
        )
    backend = builders[kind](metadata)
    if metadata.get("general.architecture") == "phi3":
        _strip_beside_specials(backend, metadata)
    size = len(metadata["tokenizer.ggml.tokens"])
    ends = [read_id(metadata, key, size) for key in ("eos", "eot", "eom")]
    bos_id = read_id(metadata, "bos", size)
    named = "tokenizer.chat_template."
    templates = {key.removeprefix(named): value for key, value in metadata.items() if key.startswith(named)}
    templates["default"] = metadata.get("tokenizer.chat_template")
    for name, template in templates.items():
        if template is not None and not isinstance(template, str):
            key = "tokenizer.chat_template" if name == "default" else named + name
            raise ValueError(f"{key} is {_shown(template)}, expected a string.")
    opens = kind == "llama" or byte_level.words_of(metadata).opens
    opens = metadata.get("tokenizer.ggml.add_bos_token", opens) and bos_id is not None
    return Tokenizer(
        backend=backend,
        chat_template=templates.pop("default"),
        bos_id=bos_id,
        eos_ids=stop_ids(backend, ends),
        opening=(int(bos_id),) if opens else (),
        named_templates=templates,
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
