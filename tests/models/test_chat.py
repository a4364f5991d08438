"""What chat gives templates to read, which template it takes, and what it refuses to render."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from models import tokenizer
from models.checkpoint import load_checkpoint, save_checkpoint
from models.huggingface import load_directory

MESSAGES = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "now"}}]
TOKENS = "{{ bos_token }}|{{ eos_token }}|{{ bos_token is defined }}"


def read(tiny, tmp_path, settings: dict, **files: str) -> tokenizer.Tokenizer:
    path = tiny.write_directory(tmp_path / "tiny")
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    for name, text in files.items():
        file = path / name.replace("__", "/")
        file.parent.mkdir(exist_ok=True)
        file.with_suffix(".jinja").write_text(text, encoding="utf-8")
    return load_directory(path, jnp.float32)[2]


# What transformers 5.24 renders with `AutoTokenizer.from_pretrained(...).apply_chat_template`; config.json says that
# token 0, <|endoftext|>, opens a text.
@pytest.mark.parametrize(
    "settings, rendered",
    [
        ({"bos_token": None, "eos_token": "<|im_end|>"}, "|<|im_end|>|False"),
        ({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}, "<|im_start|>|<|im_end|>|True"),
        ({"bos_token": None, "eos_token": None}, "||False"),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}, "|<|im_end|>|False"),
        # Its class has a default, which is what config.json says.
        ({"tokenizer_class": "LlamaTokenizerFast", "eos_token": "<|im_end|>"}, "<|endoftext|>|<|im_end|>|True"),
    ],
)
def test_templates_read_the_special_tokens_of_the_tokenizer(tiny, tmp_path, settings, rendered):
    found = read(tiny, tmp_path, {**settings, "chat_template": TOKENS})
    assert found.chat(MESSAGES) == rendered
    assert found.eos_ids == (0, 2)  # whatever a template calls so


def test_the_template_for_tools_is_taken_where_tools_are_given(tiny, tmp_path):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }} tools"}]
    found = read(tiny, tmp_path, {"chat_template": named})
    assert [found.chat(MESSAGES, tools=tools) for tools in (None, [], TOOLS)] == ["plain", "0 tools", "1 tools"]


def test_templates_in_files_win_and_may_be_named(tiny, tmp_path):
    files = {"chat_template": "\ufefffile", "additional_chat_templates__tool_use": "file of tools"}
    found = read(tiny, tmp_path, {"chat_template": "settings"}, **files)
    assert (found.chat(MESSAGES), found.chat(MESSAGES, tools=TOOLS)) == ("file", "file of tools")


def test_without_a_default_the_names_are_listed(tiny, tmp_path):
    found = read(tiny, tmp_path, {"chat_template": [{"name": "tool_use", "template": "tools"}]})
    assert found.chat(MESSAGES, tools=TOOLS) == "tools"
    with pytest.raises(ValueError, match="no default chat template, only: tool_use"):
        found.chat(MESSAGES)


def test_gguf_files_name_their_templates_in_their_keys(tiny):
    found = tokenizer.from_gguf(tiny.gguf_fields | {"tokenizer.chat_template.tool_use": "tools"})
    assert found.chat(MESSAGES, tools=TOOLS) == "tools"
    assert found.chat(MESSAGES) == "<|im_start|>user\nhi<|im_end|>\n"


def test_checkpoints_keep_named_templates_and_special_tokens(tiny, tmp_path):
    named = [{"name": "default", "template": TOKENS}, {"name": "tool_use", "template": "tools"}]
    path = tiny.write_directory(tmp_path / "tiny")
    settings = {"bos_token": None, "eos_token": "<|im_end|>", "chat_template": named}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    save_checkpoint(tmp_path / "saved", *load_directory(path, jnp.float32))
    found = load_checkpoint(tmp_path / "saved", jnp.float32)[2]
    assert (found.chat(MESSAGES), found.chat(MESSAGES, tools=TOOLS)) == ("|<|im_end|>|False", "tools")


@pytest.mark.parametrize(
    "messages, message",
    [
        ("hi", "messages is 'hi', expected a list of dicts with role and content"),
        ({"role": "user", "content": "hi"}, "messages is {'role': 'user', 'content': 'hi'}, expected a list of dicts"),
        (None, "messages is None, expected a list"),
        (["hi"], r"messages\[0\] is 'hi', expected a list of dicts"),
        ([*MESSAGES, {"content": "hi"}], r"messages\[1\] has the role None, expected a string"),
        ([{"role": "user"}], r"messages\[0\] has no content"),
        ([{"role": "user", "content": 5}], r"messages\[0\] has the content 5, expected a string, a list of parts"),
    ],
)
def test_what_is_no_conversation_is_refused(tiny, messages, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        tokenizer.from_gguf(tiny.gguf_fields).chat(messages)


@pytest.mark.parametrize(
    "tools, message", [("now", "tools is 'now'"), (TOOLS[0], "tools is {"), ([1], r"tools\[0\] is 1")]
)
def test_what_are_no_tools_is_refused(tiny, tools, message):
    with pytest.raises(ValueError, match=f"^{message}.*expected a list of dicts"):
        tokenizer.from_gguf(tiny.gguf_fields).chat(MESSAGES, tools=tools)


def test_a_call_of_a_tool_needs_no_content_and_content_may_be_parts(tiny):
    found = dataclasses.replace(tokenizer.from_gguf(tiny.gguf_fields), chat_template="{{ messages | length }}")
    called = {"role": "assistant", "tool_calls": [{"name": "now"}]}
    assert found.chat([{"role": "user", "content": [{"type": "text", "text": "hi"}]}, called]) == "2"
