"""Lines as LongBench publishes them: which metric and how many tokens each of its data sets asks for.

A user who has the data has one JSONL file a data set, whose lines hold `input`, `context`, `answers`, `dataset` and
`all_classes`. The instructions that LongBench wraps around them are not part of the data and not repeated here: the
context comes first, then `input` behind an empty line, then the answer on a line of its own; of code, which is to be
continued, the context and `input` follow each other directly.

Source: Bai et al., LongBench (2023), arXiv:2308.14508.
"""

from __future__ import annotations

import reprlib
from typing import Any

DATASETS: dict[str, tuple[str, int]] = {
    "narrativeqa": ("f1", 128),
    "qasper": ("f1", 128),
    "multifieldqa_en": ("f1", 64),
    "hotpotqa": ("f1", 32),
    "2wikimqa": ("f1", 32),
    "musique": ("f1", 32),
    "gov_report": ("rouge_l", 512),
    "qmsum": ("rouge_l", 512),
    "multi_news": ("rouge_l", 512),
    "trec": ("classification", 64),
    "triviaqa": ("f1", 32),
    "samsum": ("rouge_l", 128),
    "passage_count": ("numbers", 32),
    "passage_retrieval_en": ("numbers", 32),
    "lcc": ("edit", 64),
    "repobench-p": ("edit", 64),
}
"""The metric and the most tokens of an answer, of the data sets in English and in code."""

_ONE_LINE = ("trec", "triviaqa", "samsum")  # what follows the first line of an answer does not count
_CODE = ("lcc", "repobench-p")


def is_line(line: dict[str, Any]) -> bool:
    """Returns whether a line is one of LongBench: it names a data set, and no task."""
    return "task" not in line and "dataset" in line and "input" in line


def as_task(line: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns a line of LongBench as a line of a task file.

    Args:
      line: of LongBench or LongBench-E, whose data sets have the suffix `_e`.
      where: it stands, for messages.

    Raises:
      ValueError: the data set is none of `DATASETS`, or `input` is no text.
    """
    name, asked = line["dataset"], line["input"]
    known = name.removesuffix("_e") if isinstance(name, str) else None
    if known not in DATASETS:
        raise ValueError(f"{where}: dataset: got {reprlib.repr(name)}, expected one of {', '.join(DATASETS)}")
    if not isinstance(asked, str):
        raise ValueError(f"{where}: input: got {reprlib.repr(asked)}, expected a string")
    metric, new_tokens = DATASETS[known]
    question = asked if known in _CODE else f"\n\n{asked}\n" if asked else "\n\n"
    task = {"task": name, "context": line.get("context"), "question": question, "answers": line.get("answers")}
    task |= {"metric": metric, "max_new_tokens": new_tokens, "stop": ["\n"] if known in _ONE_LINE else []}
    return task | ({"classes": line.get("all_classes")} if metric == "classification" else {})
