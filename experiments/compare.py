"""Compares evaluations, line by line: a table, the differences with their standard errors, and a picture.

    python -m experiments.compare out/before out/after
    python -m experiments.compare out/before out/after --output_dir=out/compared

Rows of one method at one budget and length stand below each other. A difference is the mean over examples that both
runs have scored, of the later run minus the first; its standard error is that of the pairs, not of two separate means.
"""

from __future__ import annotations

from experiments import interrupts

if __name__ == "__main__":
    interrupts.quit_in_one_line()  # the imports below take seconds

import os
import pathlib
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from experiments import cli, pictures, report, results, summaries
from experiments.output_folder import output_folder

for _name in ("output_dir", "replace"):
    flags.declare_key_flag(_name)
_FIELDS = ("score", "nll", "kl")


def joined(runs: Mapping[str, Sequence[results.Row]]) -> dict[str, dict[str, Any]]:
    """Summarises several runs as one, for `report.table` and `pictures.plot_pareto`.

    Args:
      runs: lines of results, by the name of the run.

    Returns:
      What `summaries.summarise` returns, with the name of the run as `run` in every entry and before its name; entries
      of one length, method and budget follow each other.
    """
    groups = list(dict.fromkeys(summaries.Group.of(row) for rows in runs.values() for row in rows))
    names = dict(zip(groups, summaries.group_names(groups)))
    both = {
        f"{run}: {names[summaries.Group(*(entry[field] for field in summaries.Group._fields))]}": entry | {"run": run}
        for run, rows in runs.items()
        for entry in summaries.summarise(rows).values()
    }
    settings = [_setting(entry) for entry in both.values()]
    order = {setting: i for i, setting in enumerate(dict.fromkeys(settings))}
    key = lambda item: (item[1]["length"] or 0, order[_setting(item[1])])
    return dict(sorted(both.items(), key=key))


def _setting(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return entry["method"], entry["keep"], entry["budget"]


def differences(
    before: Sequence[results.Row], after: Sequence[results.Row]
) -> dict[summaries.Group, dict[str, tuple[float, float | None, int]]]:
    """Subtracts one run's lines from another's where both have them.

    Returns:
      `{group: {field: (mean difference, its standard error, pairs)}}` for score, nll and KL to the full cache.
    """
    first = {results.Line.of(row): row for row in before}
    pairs: dict[summaries.Group, dict[str, list[float]]] = {}
    for row in after:
        other = first.get(results.Line.of(row))
        for field in _FIELDS:
            if other is not None and row.get(field) is not None and other.get(field) is not None:
                of_group = pairs.setdefault(summaries.Group.of(row), {})
                of_group.setdefault(field, []).append(row[field] - other[field])
    return {
        group: {field: (*summaries.mean_and_error(values), len(values)) for field, values in of.items()}
        for group, of in pairs.items()
    }


def difference_table(changes: Mapping[summaries.Group, Mapping[str, tuple[float, float | None, int]]]) -> str:
    """Tabulates differences, each with its standard error in parentheses and a `!` where it is more than twice that."""
    names = list(summaries.group_names(changes))
    width = max(len("method"), *map(len, names))
    fields = [field for field in _FIELDS if any(field in of for of in changes.values())]
    head = f"{'method':<{width}}" + "".join(f"{field:>20}" for field in fields) + f"{'examples':>10}"
    lines = [head, "-" * len(head)]
    for name, of in zip(names, changes.values()):
        cells = [_difference(of.get(field), 100 if field == "score" else 1) for field in fields]
        lines.append(f"{name:<{width}}" + "".join(cells) + f"{max(pairs for *_, pairs in of.values()):>10}")
    return "\n".join(lines)


def _difference(of: tuple[float, float | None, int] | None, scale: int) -> str:
    if of is None:
        return f"{'-':>19} "
    mean, error, _ = of
    digits, unit = (1, "%") if scale == 100 else (3, "")
    shown = f"{scale * mean:+.{digits}f}{unit}" + ("" if error is None else f" ({scale * error:.{digits}f})")
    clear = error is not None and abs(mean) > 2 * error * (1 + 1e-9)  # not where rounding decides
    return f"{shown:>19}{'!' if clear else ' '}"


def same_examples(first: results.Folder, other: results.Folder) -> list[results.Row]:
    """Returns the lines of the other run that are about examples of the first: the same tokens under the same name."""

    def is_same(line: results.Line) -> bool:
        name = results.example_name(line.task, line.length, line.example)
        contents = [folder.examples.get(name, {}).get("content") for folder in (first, other)]
        return contents[0] is not None and contents[0] == contents[1]

    return [row for row in other.rows if is_same(results.Line.of(row))]


def differing_settings(first: results.Folder, other: results.Folder) -> list[str]:
    """Says which settings two runs do not share, beside their methods and tasks."""
    return [
        f"{name}: {first.settings.get(name)} in {first.path}, {other.settings.get(name)} in {other.path}"
        for name in sorted({*first.settings, *other.settings} - {"tasks"})
        if first.settings.get(name) != other.settings.get(name)
    ]


def run(*paths: str) -> None:
    """The program; `paths` are folders of evaluations."""
    if len(paths) < 2:
        raise ValueError(f"give the folders of two evaluations or more, got {len(paths)}.")
    folders = [results.read_folder(path) for path in paths]
    names = _names(paths)
    notes = [note for other in folders[1:] for note in differing_settings(folders[0], other)]
    target = None if cli.OUTPUT_DIR.value is None else output_folder("comparison")
    runs = {name: folder.rows for name, folder in zip(names, folders)}
    summary, width = joined(runs), shutil.get_terminal_size((120, 24)).columns
    print(report.table(summary))
    for name, folder in zip(names[1:], folders[1:]):
        changes = differences(folders[0].rows, same_examples(folders[0], folder))
        title = f"{name} minus {names[0]}, over the examples that both have"
        print(f"\n{title}:\n{difference_table(changes)}" if changes else f"\n{title}: they share none.")
    about = "Standard errors of paired differences in parentheses; ! marks more than two of them."
    print("\n" + "\n".join(textwrap.wrap(about, width)))
    for note in dict.fromkeys(notes):
        print(f"note: {note}", file=sys.stderr)
    if target is not None:
        target.mkdir(parents=True, exist_ok=True)
        pictures.plot_pareto(summary, target / "pareto.png")
        every = [{"run": name} | row for name, rows in runs.items() for row in rows]
        summaries.write_csv(target / "results.csv", every)
        print(f"\npareto.png, results.csv are in {target}.")


def _names(paths: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [pathlib.Path(os.path.abspath(path)).parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"the folders are the same: {', '.join(paths)}.")


if __name__ == "__main__":
    cli.start(run)
