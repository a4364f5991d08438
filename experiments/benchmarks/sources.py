"""Where examples come from: generated tasks by name, task files and texts by path, `qa_1=PATH` by both."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

from experiments import synthetic
from experiments.benchmarks import ruler, ruler_qa, task_files, text_windows
from experiments.suggestions import there_are
from experiments.tasks import Example
from models import Model
from models.assets import ESSAYS, fetch

GROUPS: dict[str, tuple[str, ...]] = {"synthetic": synthetic.SYNTHETIC_TASKS, "ruler": ruler.TASKS}
"""Names that stand for several tasks."""
GENERATED: tuple[str, ...] = (*synthetic.EVERY_TASK, *ruler.TASKS)
"""Tasks that are made to any length."""


def split(text: str) -> list[str]:
    """Returns the sources that a flag lists with commas between; a file whose name has a comma is one source."""
    return [text] if os.path.exists(text) else text.split(",")


def check(sources: Sequence[str]) -> None:
    """Refuses sources that are neither a known task nor the path of a task file or a text.

    Raises:
      ValueError: names the source.
    """
    if not sources or not all(sources):
        raise ValueError("--tasks must name tasks or files, got an empty name.")
    for source in sources:
        task, mark, path = source.partition("=")
        if task in ruler_qa.TASKS:
            if not path:
                raise ValueError(f"--tasks: {task} needs data of yours: write {task}=PATH, of SQuAD or HotpotQA.")
            continue
        if source not in GROUPS and source not in GENERATED and not is_file(source):
            known = there_are(source, [*GROUPS, *GENERATED])
            raise ValueError(f"--tasks: unknown task {source!r}, and no path of a .jsonl or .txt file; {known}")


def is_file(source: str) -> bool:
    """Returns whether a source is a path: it ends like a task file or a text."""
    return not _is_qa(source) and pathlib.Path(source).suffix in (".jsonl", ".txt", ".md")


def files(sources: Sequence[str]) -> list[str]:
    """Returns the sources that are paths."""
    return [source for source in sources if is_file(source)]


def takes_length(source: str) -> bool:
    """Returns whether contexts of a source are as long as one asks: of generated tasks and of texts, not of files."""
    return not is_file(source) or _is_text(source)


def load(sources: Sequence[str], model: Model, *, lengths: Sequence[int], count: int, seed: int) -> list[Example]:
    """Makes or reads the examples of all sources.

    Args:
      sources: names of `GROUPS` or `GENERATED`, or paths.
      model: that will answer.
      lengths: tokens of generated contexts, one after the other.
      count: generated examples of each task and length, and windows of each text.
      seed: of generated tasks.

    Returns:
      The examples: source by source, in each length by length.

    Raises:
      ValueError: a source is unknown, a length does not do for its task, or a file has a bad line.
      OSError: a file cannot be read.
    """
    check(sources)
    examples: list[Example] = []
    names = [name for source in sources for name in GROUPS.get(source, (source,))]
    generated = [name for name in dict.fromkeys(names) if not is_file(name)]
    essays = None
    if any(not _is_qa(name) for name in generated):
        essays = [path.read_text(encoding="utf-8") for path in sorted(fetch(ESSAYS).glob("*.txt"))]
    for length in lengths:
        how = dict(length=length, count=count, seed=seed)
        own = [name for name in generated if name in synthetic.EVERY_TASK]
        if own:
            examples += synthetic.synthetic_tasks(model.tokenizer, essays, tasks=own, **how)
        for name in generated:
            if _is_qa(name):
                task, _, path = name.partition("=")
                examples += ruler_qa.examples(task, path, model.tokenizer, **how)
            elif name in ruler.TASKS:
                examples += ruler.examples(name, model.tokenizer, essays, **how)
    for path in dict.fromkeys(files(sources)):
        if _is_text(path):
            for length in lengths:
                examples += text_windows.read_windows(path, model.tokenizer, length=length, count=count)
        else:
            examples += task_files.read_tasks(path, model.tokenizer, vocab_size=model.config.vocab_size)
    return examples


def _is_qa(source: str) -> bool:
    return source.partition("=")[0] in ruler_qa.TASKS


def _is_text(source: str) -> bool:
    return pathlib.Path(source).suffix in (".txt", ".md")
