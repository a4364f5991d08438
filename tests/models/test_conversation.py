"""Conversations answer as a decoder does that reads everything at once, and leave their context alone."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from models import Conversation, Model, Tokenizer, answer
from models.chat_frame import ChatFrame
from models.conversation import padded_length
from models.decoder import forward, prompt_cache
from tests.kvjax import tiny_model
from tests.models.conftest import VOCAB, backend

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
POSITIONS, NEW = 384, 4
CONFIG = dataclasses.replace(tiny_model.CONFIG, vocab_size=len(VOCAB), max_positions=POSITIONS)
CONTEXT = "the cat sat on the mat and the dog on the rug, 12 of them. "
QUESTION, OTHER = "who sat?", "on what did the other one sit?"


def _model(eos_ids=(2,), template=TEMPLATE) -> Model:
    tokenizer = Tokenizer(backend(), chat_template=template, bos_id=None, eos_ids=eos_ids, opening=(0,))
    return Model(CONFIG, tiny_model.params(CONFIG), tokenizer)


MODEL = _model(eos_ids=())


def _greedy(ids: list[int], count: int) -> list[int]:
    """The most likely tokens after some, read all at once for each of them."""
    ids, before = list(ids), len(ids)
    for _ in range(count):
        size = padded_length(len(ids))
        positions = jnp.where(jnp.arange(size) < len(ids), jnp.arange(size), -1)[None]
        tokens = jnp.int32([ids + [0] * (size - len(ids))])
        logits, _ = forward(MODEL.params, CONFIG, tokens, positions, prompt_cache(CONFIG, 1))
        ids.append(int(jnp.argmax(logits[0, len(ids) - 1])))
    return ids[before:]


def _text(ids: list[int]) -> str:
    return MODEL.tokenizer.decode(ids).strip()


def _prompt(question: str) -> list[int]:
    messages = [{"role": "user", "content": f"{CONTEXT}\n\n{question}"}]
    return MODEL.tokenizer.encode(MODEL.tokenizer.chat(messages, add_generation_prompt=True))


def _read(method=kvjax.methods.full(), model=MODEL, **how) -> Conversation:
    conversation = Conversation(model, method, **how)
    conversation.read(CONTEXT)
    return conversation


@pytest.mark.parametrize("question", [QUESTION, OTHER])
def test_with_the_full_cache_an_answer_is_that_of_the_whole_prompt(question):
    expected = _text(_greedy(_prompt(question), NEW))
    assert expected and _read().ask(question, max_new_tokens=NEW) == expected
    assert answer(MODEL, kvjax.methods.full(), CONTEXT, question, max_new_tokens=NEW) == expected


def test_without_a_chat_template_text_is_put_in_paragraphs():
    plain = _model(eos_ids=(), template=None)
    ids = [0, *plain.tokenizer.encode(f"{CONTEXT}\n\n{QUESTION}\n")]
    assert _read(model=plain).ask(QUESTION, max_new_tokens=NEW) == _text(_greedy(ids, NEW))


def test_an_answer_ends_before_its_stop_token():
    drawn = _greedy(_prompt(QUESTION), NEW)
    stop = next(token for token in drawn if token != drawn[0])
    expected = _text(drawn[: drawn.index(stop)])
    assert expected and _read(model=_model(eos_ids=(stop,))).ask(QUESTION, max_new_tokens=NEW) == expected


# Codes that a call passes on as they are, and slots with statistics, which every call changes.
@pytest.mark.parametrize("method", [kvjax.methods.kivi(4, 8, 16), kvjax.methods.h2o(24)], ids=["kivi", "h2o"])
def test_a_question_leaves_the_context_as_it_was(method):
    conversation = _read(method)
    before = jax.tree.map(np.array, conversation._run)
    first = conversation.ask(QUESTION, max_new_tokens=NEW)
    other = conversation.ask(OTHER, max_new_tokens=NEW)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(conversation._run), strict=True):
        np.testing.assert_array_equal(a, b)
    assert conversation.ask(QUESTION, max_new_tokens=NEW) == first != other


def test_what_is_kept_is_followed_by_the_next_question():
    conversation = _read()
    before = conversation.length
    drawn = _greedy(_prompt(QUESTION), NEW)
    assert conversation.ask(QUESTION, max_new_tokens=NEW, keep=True) == _text(drawn)
    asked = len(_prompt(QUESTION)) + NEW
    assert conversation.length == asked > before
    turn = MODEL.tokenizer.encode(f"<|im_end|>\n<|im_start|>user\n{OTHER}<|im_end|>\n<|im_start|>assistant\n")
    expected = _text(_greedy([*_prompt(QUESTION), *drawn, *turn], NEW))
    assert conversation.ask(OTHER, max_new_tokens=NEW) == expected
    assert conversation.length == asked
    conversation.read(CONTEXT)
    assert conversation.length == before


def test_a_second_question_and_a_text_of_the_same_size_compile_nothing():
    compiled = []
    count = lambda name, seconds, **_: compiled.append(name) if name.endswith("backend_compile_duration") else None
    conversation = _read(kvjax.methods.snapkv(24, window=8))
    conversation.ask(QUESTION, max_new_tokens=NEW)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        jax.jit(lambda x: x + 3.25)(jnp.zeros(7))
        assert len(compiled) >= 1  # the listener hears
        compiled.clear()
        conversation.ask(OTHER * 3, max_new_tokens=2 * NEW)
        conversation.read(CONTEXT + "so it was.")
        conversation.ask(OTHER, max_new_tokens=NEW, keep=True)
        conversation.ask(QUESTION, max_new_tokens=NEW)
        assert compiled == []
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


def test_bytes_and_tokens_are_those_of_the_compressed_cache():
    full, quarter = _read(room=64), _read(kvjax.methods.knorm(0.25), room=64)
    assert full.kept == full.length and quarter.kept == full.length // 4 and quarter.length == full.length
    per_token = 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim * 4
    padded = padded_length(full.length)
    assert full.nbytes >= per_token * (padded + 64) and quarter.nbytes < full.nbytes
    assert full.nbytes - quarter.nbytes >= per_token * (padded - padded // 4)


def test_a_method_that_frees_slots_goes_on_beyond_its_room():
    conversation = _read(kvjax.methods.streamingllm(24), room=32)
    held = conversation.nbytes
    for _ in range(3):
        conversation.ask(QUESTION, max_new_tokens=NEW, keep=True)
    assert conversation.kept == 24 and conversation.nbytes == held and conversation.length > 24 + 32


def test_keys_draw_other_answers_and_the_same_key_the_same():
    conversation = _read()
    drawn = lambda seed: conversation.ask(
        QUESTION, max_new_tokens=8, sampler=kvjax.Sample(temperature=3.0), key=jax.random.key(seed)
    )
    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize(
    "run, error, message",
    [
        (lambda: Conversation(MODEL, kvjax.methods.full()).ask("?"), ValueError, "a context must be read first"),
        (lambda: Conversation(MODEL, kvjax.methods.full()).nbytes, ValueError, "a context must be read first"),
        (lambda: Conversation(MODEL, "snapkv"), TypeError, "method must be a CacheTransform"),
        (lambda: Conversation(MODEL, kvjax.methods.full(), room=0), ValueError, "room must be at least 1 token, got 0"),
        (lambda: _read(chunk=0), ValueError, "chunk must be at least 1 token or None, got 0"),
        (lambda: _read().read(" \n"), ValueError, r"context must have some text, got ' \\n'"),
        (lambda: _read().read(None), TypeError, "context must be a text, got NoneType"),
        (lambda: _read().ask(""), ValueError, "question must have some text, got ''"),
        (lambda: _read().ask("?", max_new_tokens=0), ValueError, "max_new_tokens must be at least 1, got 0"),
        (lambda: _read().ask("?", max_new_tokens=1.5), TypeError, "max_new_tokens must be a whole number of tokens"),
        (
            lambda: _read().read(CONTEXT * 6),
            ValueError,
            "context has 2.. tokens, which with room for 256 more is beyond the 384 positions of tiny",
        ),
        (
            lambda: _read(room=24).ask(QUESTION),
            ValueError,
            "question has .. tokens and may get 64 new ones, but there is room for 24 after the context: "
            "make the conversation with room=",
        ),
        (
            lambda: _read(kvjax.methods.streamingllm(24), room=32).ask(QUESTION, max_new_tokens=POSITIONS),
            ValueError,
            "may get 384 new ones after .* tokens, which is beyond the 384 positions of tiny",
        ),
        (lambda: answer(MODEL, kvjax.methods.full(), CONTEXT, ""), ValueError, "question must have some text"),
        (
            lambda: _read(model=_model(template="{{ messages[0].role }}")),
            ValueError,
            "chat_template must write what user and assistant say once and in order, got 'user'",
        ),
    ],
)
def test_what_cannot_be_read_or_asked_is_refused(run, error, message):
    with pytest.raises(error, match=message):
        run()


def test_a_question_that_finds_no_room_leaves_the_conversation_usable():
    conversation = _read(room=64)
    first = conversation.ask(QUESTION, max_new_tokens=NEW, keep=True)
    with pytest.raises(ValueError, match="room for 64 after the context, of which .. are taken"):
        conversation.ask(OTHER, max_new_tokens=NEW)
    assert first and conversation.length < POSITIONS


def test_padded_lengths_are_few_and_waste_at_most_half():
    sizes = [padded_length(n) for n in range(1, 5000)]
    assert sizes[:3] == [64, 64, 64] and sorted(set(sizes))[:6] == [64, 96, 128, 192, 256, 384]
    assert all(n <= size and (size == 64 or size < 1.5 * n) for n, size in enumerate(sizes, 1))


def test_the_frame_of_a_template_is_what_the_template_writes():
    frame = ChatFrame.of(MODEL.tokenizer)
    turns = [("user", "a\n\nb"), ("assistant", "c"), ("user", "d")]
    messages = [{"role": role, "content": content} for role, content in turns]
    written = f"{frame.before}a{frame.within}b{frame.after}c{frame.between}d{frame.after}"
    assert written == MODEL.tokenizer.chat(messages, add_generation_prompt=True) and frame.opening == ()
