"""Answers questions over documents that were read before, and says what reading them again would have given.

    python -m experiments.reuse --output_dir=out/reuse

Every example has a head, several documents and a question that depends on more than one of them (`documents.py`). It
is answered with all of it read at once (`full`), with documents that were read apart put side by side (`naive`, `ape`),
with some of their tokens read again (`cacheblend`, for every ratio), and from what was read before an edit (`pie`). The
table has the loss of the right answer, the part of the context's keys and values that was computed after the question
was known, the seconds from there to the first token, and the bytes of the cache. docs/reuse.md has a run.
"""

from __future__ import annotations

from experiments import interrupts

if __name__ == "__main__":
    interrupts.quit_in_one_line()  # the imports below take seconds

import csv
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import kvjax
from experiments import cli, pictures, reading
from experiments.documents import DOCUMENT_TASKS, Documents, document_tasks
from experiments.output_folder import output_folder
from experiments.report import human_bytes
from kvjax import methods, reuse
from models import Model, assets, keep_compiled, load_model
from models.decoder import bind, first_layers, layer_rope

for _name in ("model", "tasks", "ratios", "examples", "task_seed", "output_dir", "replace", "dtype"):
    flags.declare_key_flag(_name)
_DOCUMENTS = flags.DEFINE_integer("documents", 4, "Documents of an example.")
_DOCUMENT_TOKENS = flags.DEFINE_integer("document_tokens", 64, "Tokens of a document.")
_MOST = 32  # examples of each task, without --examples

_EVERY_RATIO = (0.05, 0.15, 0.3, 0.5, 1.0)
_CHECKED = 2  # layers that cacheblend runs on all tokens
FIELDS = ("task", "example", "method", "ratio", "nll", "recomputed", "seconds", "cache_bytes")


class Answered(NamedTuple):
    """A question that was answered by one method."""

    nll: float  # nats a token of the right answer
    recomputed: float  # of the context's keys and values, by tokens and layers
    seconds: float  # from the question to the first token
    nbytes: int  # of the cache with the question


class Reader:
    """Answers questions over documents by every method.

    Args:
      model: that answers.
      examples: all there are, which decide what rows are padded to.
    """

    def __init__(self, model: Model, examples: Sequence[Documents]):
        self._step = bind(model.params, model.config)
        self._first = first_layers(self._step, min(_CHECKED, model.config.num_layers))
        self._layers = model.config.num_layers
        self._ropes = [layer_rope(model.config, index) for index in range(self._layers)]
        self._question = max(len(example.question) for example in examples)
        self._answer = max(len(example.answer) for example in examples)
        self._context = {task: 0 for task in DOCUMENT_TASKS}
        for example in examples:
            longest = max(len(example.context), len(example.unedited)) + self._question
            self._context[example.task] = max(self._context[example.task], longest)

    def stored(self, example: Documents) -> dict[str, Any]:
        """Reads what was there before the question: the head, every document by itself, and the unedited context."""
        head = self._read([example.head]).cache
        alone = self._read(example.documents).cache
        behind = self._read(example.documents, head).cache
        slots = self._context[example.task]
        old = self._read([example.unedited], slots=slots)
        return jax.block_until_ready({"head": head, "alone": alone, "behind": behind, "old": old})

    def answer(self, example: Documents, stored: dict[str, Any], method: str, ratio: float | None) -> Answered:
        """Answers by one method from what is stored."""
        make: Callable[[], tuple[kvjax.Run, float]] = {
            "full": lambda: self._full(example),
            "naive": lambda: self._asked(example, self._side_by_side(example, stored), 0.0),
            "ape": lambda: self._asked(example, self._in_parallel(example, stored), 0.0),
            "cacheblend": lambda: self._blended(example, stored, ratio),
            "pie": lambda: self._edited(example, stored),
        }[method]
        start = time.perf_counter()
        run, recomputed = jax.block_until_ready(make())
        seconds = time.perf_counter() - start
        return Answered(self._nll(run, example.answer), recomputed, seconds, kvjax.nbytes(run.cache))

    def _read(self, rows, attached=None, *, slots: int | None = None, room: int = 0) -> kvjax.Run:
        method = methods.full() if attached is None else kvjax.chain(kvjax.before(attached), methods.full())
        tokens, lengths = reading.padded(rows, slots), reading.row_lengths(rows)
        empty = self._step.empty_cache(len(rows))
        return kvjax.prefill(self._step, method, tokens, lengths, empty, room=room)

    def _asked(self, example: Documents, cache: kvjax.Cache, recomputed: float) -> tuple[kvjax.Run, float]:
        run = self._read([example.question], cache, slots=self._question, room=self._answer)
        return run, recomputed

    def _full(self, example: Documents) -> tuple[kvjax.Run, float]:
        row = [(*example.context, *example.question)]
        return self._read(row, slots=self._context[example.task], room=self._answer), 1.0

    def _side_by_side(self, example: Documents, stored: dict[str, Any]) -> kvjax.Cache:
        return _placed(stored["head"], stored["alone"], self._ropes)

    def _in_parallel(self, example: Documents, stored: dict[str, Any]) -> kvjax.Cache:
        return _parallel(stored["head"], stored["behind"])

    def _blended(self, example: Documents, stored: dict[str, Any], ratio: float) -> tuple[kvjax.Run, float]:
        tokens = jnp.asarray([example.context], jnp.int32)
        cache = self._side_by_side(example, stored)
        blended = reuse.cacheblend(self._step, self._first, cache, tokens, ratio=ratio, room=0)
        first = len(self._first.params.layers)
        T, again = tokens.shape[1], blended.positions.shape[1]
        part = (first * T + again * (self._layers - first)) / (T * self._layers)
        return self._asked(example, blended.cache, part)

    def _edited(self, example: Documents, stored: dict[str, Any]) -> tuple[kvjax.Run, float]:
        tokens = jnp.asarray([example.context[example.start : example.stop]], jnp.int32)
        run = reuse.pie(self._step, stored["old"], example.start, example.stop, tokens, self._ropes)
        return self._asked(example, run.cache, tokens.shape[1] / len(example.context))

    def _nll(self, run: kvjax.Run, answer: Sequence[int]) -> float:
        """The loss of the answer, in nats a token."""
        tokens, count = reading.padded([answer], self._answer), len(answer)
        index = jnp.arange(self._answer)
        positions = jnp.where(index < count, run.cache.length[:, None] + index, -1)
        out = self._step(tokens, positions, run.cache, needs=kvjax.Needs(), last_only=False)
        logits = jnp.concatenate([run.logits, out.logits[0]])[:count]
        log_probs = np.asarray(jax.nn.log_softmax(logits))
        return float(-np.mean(log_probs[np.arange(count), np.asarray(answer)]))


@jax.jit
def _placed(head: kvjax.Cache, alone: kvjax.Cache, ropes: Sequence[kvjax.Rope]) -> kvjax.Cache:
    """The head, and documents that were read alone moved behind each other."""
    start, (rows, _, tokens) = head.layers[0].segments[0].pos.shape[2], alone.layers[0].segments[0].pos.shape
    each = (reuse.cache_rows(alone, [row]) for row in range(rows))
    return reuse.joined(head, *(reuse.moved(one, start + row * tokens, ropes) for row, one in enumerate(each)))


@jax.jit
def _parallel(head: kvjax.Cache, behind: kvjax.Cache) -> kvjax.Cache:
    """The head, and documents that were read behind it, as APE puts them."""
    rows = behind.length.shape[0]
    own = reuse.detached(behind, head)
    return reuse.ape(head, [reuse.cache_rows(own, [row]) for row in range(rows)])


def variants(ratios: Sequence[float]) -> list[tuple[str, float | None]]:
    """Returns the methods, and the ratio of those that have one."""
    return [("full", None), ("naive", None), ("ape", None), *(("cacheblend", ratio) for ratio in ratios), ("pie", None)]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Tabulates means over the examples, the loss of every task apart."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    head = f"{'method':<17}" + "".join(f"{'nll ' + task:>12}{'lost':>8}" for task in tasks)
    head += f"{'recomputed':>12}{'seconds':>9}{'cache':>10}"
    lines = [head, "-" * len(head)]
    kinds = list(dict.fromkeys((row["method"], row["ratio"]) for row in rows))
    for method, ratio in kinds:
        of = [row for row in rows if (row["method"], row["ratio"]) == (method, ratio)]
        cells = f"{method if ratio is None else f'{method} {ratio:g}':<17}"
        for task in tasks:
            nll = mean(rows, "nll", task, method, ratio)
            cells += f"{nll:>12.3f}{nll - mean(rows, 'nll', task, 'full', None):>8.3f}"
        cells += f"{np.mean([row['recomputed'] for row in of]):>11.0%} "
        cells += f"{np.median([row['seconds'] for row in of]):>9.3f}"
        lines.append(cells + f"{human_bytes(int(np.mean([row['cache_bytes'] for row in of]))):>10}")
    return "\n".join(lines)


def mean(rows: Sequence[dict[str, Any]], field: str, task: str, method: str, ratio: float | None) -> float:
    """Averages a field over the examples of a task that one method answered."""
    asked = (task, method, ratio)
    return float(np.mean([row[field] for row in rows if (row["task"], row["method"], row["ratio"]) == asked]))


def check_flags() -> tuple[float, ...]:
    """Returns the ratios; refuses flags that make no sense.

    Raises:
      ValueError: names the flag.
    """
    ratios = tuple(dict.fromkeys(cli.RATIOS.value or _EVERY_RATIO))
    for ratio in ratios:
        if not 0 <= ratio <= 1:
            raise ValueError(f"--ratios must be from 0 to 1, got {ratio:g}.")
    for flag, least in ((_DOCUMENTS, 2), (_DOCUMENT_TOKENS, 16), (cli.EXAMPLES, 1)):
        if flag.value is not None and flag.value < least:
            raise ValueError(f"--{flag.name} must be at least {least}, got {flag.value}.")
    return ratios


def _tasks() -> tuple[str, ...]:
    names = tuple(dict.fromkeys(cli.TASKS.value.split(","))) if cli.TASKS.value else DOCUMENT_TASKS
    unknown = [name for name in names if name not in DOCUMENT_TASKS]
    if unknown:
        raise ValueError(f"--tasks must be among {', '.join(DOCUMENT_TASKS)}, got {unknown[0]!r}.")
    return names


def run() -> None:
    """The program."""
    ratios, tasks = check_flags(), _tasks()
    folder = output_folder("comparison")
    keep_compiled()
    model = load_model(cli.MODEL.value or "smollm2", cli.DTYPE.value or "float32")
    essays = [path.read_text(encoding="utf-8") for path in sorted(assets.fetch(assets.ESSAYS).glob("*.txt"))]
    sizes = dict(documents=_DOCUMENTS.value, tokens=_DOCUMENT_TOKENS.value, count=cli.EXAMPLES.value or _MOST)
    examples = document_tasks(model.tokenizer, essays, seed=cli.TASK_SEED.value, tasks=tasks, **sizes)
    longest = max(len(example.context) + len(example.question) + len(example.answer) for example in examples)
    if longest > model.config.max_positions:
        raise ValueError(
            f"--documents and --document_tokens make {longest} tokens, and {model.config.name} was trained for "
            f"{model.config.max_positions}."
        )
    if model.config.local_layers:
        raise ValueError(f"--model: {model.config.name} has layers with a sliding window; they keep no documents.")
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    with open(folder / "results.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        try:
            for row in answers(model, examples, ratios):
                rows.append(row)
                writer.writerow(row)
                file.flush()
        except KeyboardInterrupt:
            cli.interrupted(f"{len(rows)} lines are in {file.name}")
    pictures.plot_reuse(rows, folder / "reuse.png")
    print(table(rows))
    print(f"\nresults.csv and reuse.png are in {folder}.")


def answers(model: Model, examples: Sequence[Documents], ratios: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Answers every example by every method; what is compiled for the first example of a task is not timed."""
    reader, warm = Reader(model, examples), set()
    for number, example in enumerate(examples):
        cli.show_progress(f"example {number + 1} of {len(examples)}")
        stored = reader.stored(example)
        for method, ratio in variants(ratios):
            shape = example.task, method, ratio, example.stop - example.start
            if shape not in warm:
                reader.answer(example, stored, method, ratio)
                warm.add(shape)
            answered = reader.answer(example, stored, method, ratio)
            if not np.isfinite(answered.nll):
                raise ValueError(f"method {method}: the loss of example {number} ({example.task}) is not a number.")
            index = number % (len(examples) // len({e.task for e in examples}))
            yield dict(zip(FIELDS, (example.task, index, method, ratio, *answered)))
    cli.show_progress("")


if __name__ == "__main__":
    cli.start(run)
