"""How long the first answer takes, from the start of Python on: import, load, read and compress, ask, ask again.

    python -m experiments.first_answer --methods=snapkv --keep=0.25
    python -m experiments.first_answer --methods=snapkv --keep=0.25 --cold

Reads the opening of an essay into a model with one method, and asks two questions about it, the second of which finds
everything compiled. Compiled programs are kept for the next run, which reads them; --cold does without those of earlier
runs. About 15 seconds on 2 cores, and more with --cold.
"""

from __future__ import annotations

import time

_START = time.perf_counter(), time.process_time()  # before the imports below, which take seconds

from experiments import interrupts

if __name__ == "__main__":
    interrupts.quit_in_one_line()

import contextlib
import tempfile
from collections.abc import Iterator

import jax
from absl import flags

from experiments import cli
from experiments.methods import check_method_names, load_method
from experiments.report import human_bytes
from models import Conversation, assets, keep_compiled, load_model

_COLD = flags.DEFINE_bool("cold", False, "Compile everything, whatever earlier runs kept.")
for _name in ("gin_file", "gin_bindings", "model", "methods", "keep", "context", "cold"):
    flags.declare_key_flag(_name)

_ESSAY, _TOKENS, _KEEP = "worked.txt", 1500, 0.25
_QUESTIONS = ("What computer did he use first?", "What did he work on before college?")
_NEW_TOKENS, _ROOM = 32, 128


class Stages:
    """Prints how long each stage took, and how many programs were compiled for it."""

    def __init__(self):
        self._last, self._compiled = _START, 0
        jax.monitoring.register_event_listener(self._count)
        print(f"{'':<16}{'seconds':>9}{'so far':>9}{'CPU':>9}{'compiled':>10}", flush=True)

    def _count(self, event: str, **_) -> None:
        self._compiled += event == "/jax/compilation_cache/cache_misses"

    def done(self, stage: str) -> None:
        """Prints the line of a stage."""
        now = time.perf_counter(), time.process_time()
        wall, cpu = (a - b for a, b in zip(now, self._last))
        print(f"{stage:<16}{wall:>9.2f}{now[0] - _START[0]:>9.2f}{cpu:>9.2f}{self._compiled:>10}", flush=True)
        self._last, self._compiled = now, 0

    def close(self) -> None:
        """Stops counting."""
        jax.monitoring.unregister_event_listener(self._count)


@contextlib.contextmanager
def _compiled_programs() -> Iterator[None]:
    """Keeps what is compiled; with --cold, in a folder that is empty and goes away."""
    before = jax.config.jax_compilation_cache_dir
    with contextlib.ExitStack() as stack:
        keep_compiled(stack.enter_context(tempfile.TemporaryDirectory()) if _COLD.value else None)
        stack.callback(jax.config.update, "jax_compilation_cache_dir", before)
        yield


def run() -> None:
    """The program."""
    names = list(cli.METHODS.value or ["snapkv"])
    check_method_names(names)
    if len(names) > 1:
        raise ValueError(f"--methods must be one here, got {', '.join(names)}.")
    tokens = cli.only(cli.CONTEXT, _TOKENS)
    if tokens < 1:
        raise ValueError(f"--context must be at least 1 token, got {tokens}.")
    with _compiled_programs():
        stages = Stages()
        try:
            _answer(stages, names[0], tokens)
        finally:
            stages.close()


def _answer(stages: Stages, name: str, tokens: int) -> None:
    stages.done("import")
    model = load_model(cli.MODEL.value or "smollm2")
    stages.done("load")
    method = load_method(name, budget=cli.only(cli.KEEP, _KEEP), tokenizer=model.tokenizer, **cli.configs())
    cli.check_reached([method.config])
    essay = (assets.fetch(assets.ESSAYS) / _ESSAY).read_text(encoding="utf-8")
    text = model.tokenizer.decode(model.tokenizer.encode(essay)[:tokens])
    conversation = Conversation(model, method.transform, room=_ROOM, chunk=method.prefill_chunk)
    conversation.read(text)
    held = human_bytes(conversation.nbytes)
    stages.done("read")
    answers = []
    for stage, question in zip(("first answer", "second answer"), _QUESTIONS):
        answers.append(conversation.ask(question, max_new_tokens=_NEW_TOKENS))
        stages.done(stage)
    length = conversation.length
    print(f"\n{model.config.name}, {name}: {conversation.kept:.0f} of {length} tokens kept in {held}\n")
    for question, answer in zip(_QUESTIONS, answers):
        print(f"> {question}\n{answer}\n")


if __name__ == "__main__":
    cli.start(run)
