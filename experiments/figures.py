"""Runs the commands that README and docs mark, and puts what they print and draw where it is shown.

    make figures                          # all that are not finished
    python -m experiments.figures half    # these

A mark is a comment in front of the fenced block of a command; the next fenced block is what it prints:

    <!-- figure half: tables; pareto.png -> docs/half.png -->

`tables` leaves out all paragraphs without a rule of dashes; what follows it are pictures of the command's
--output_dir and where they belong. The mark may hold a command itself, `figure NAME = python -m ...: tables`. What a
command printed stays in out/figures/NAME.txt, and is not run again while the command is the same: remove it to start
anew. A killed run goes on where it stopped, as far as the programs do.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

from experiments import cli

ROOT = pathlib.Path(__file__).parents[1]
_MARK = re.compile(
    r"<!-- figure (?P<name>\w+)(?: = (?P<command>[^:]+?))?(?:: (?P<how>[^>]+(?:-> [^>]+)*?))? -->\n", flags=re.DOTALL
)
_BLOCK = re.compile(r"^```\w*\n(?P<text>.*?)^```$", flags=re.DOTALL | re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Figure:
    """Names the figure that a mark in a page stands for, and how it is made.

    Attributes:
      name: of the mark.
      page: that shows what is printed.
      command: that prints it, in words.
      tables: whether only tables are shown.
      pictures: files of its output folder, and where they belong.
      start, end: of the shown text in the page.
    """

    name: str
    page: pathlib.Path
    command: tuple[str, ...]
    tables: bool
    pictures: tuple[tuple[str, str], ...]
    start: int
    end: int

    @property
    def folder(self) -> pathlib.Path:
        """Returns where the command leaves its pictures.

        Raises:
          ValueError: it has no --output_dir.
        """
        folders = [word.partition("=")[2] for word in self.command if word.startswith("--output_dir=")]
        if len(folders) != 1:
            raise ValueError(f"{self.page}: figure {self.name} has pictures, and its command no --output_dir=.")
        return ROOT / folders[0]


def marked(page: pathlib.Path) -> Iterator[Figure]:
    """Yields the figures of a page.

    Raises:
      ValueError: a mark without the blocks that belong to it, or whose command is no program of experiments.
    """
    text = page.read_text(encoding="utf-8")
    for mark in _MARK.finditer(text):
        blocks = _BLOCK.finditer(text, mark.end())
        block = next(blocks, None)
        command = mark["command"]
        if command is None and block is not None:
            command, block = block["text"], next(blocks, None)
        if block is None:
            raise ValueError(f"{page}: figure {mark['name']} needs a fenced block for what its command prints.")
        words = tuple(shlex.split(command.replace("\\\n", ""), comments=True))
        if words[:2] != ("python", "-m") or not words[2].startswith("experiments."):
            got = shlex.join(words[:3])
            raise ValueError(f"{page}: figure {mark['name']} must be made by python -m experiments..., got {got!r}.")
        how = [part.strip() for part in (mark["how"] or "").split(";") if part.strip()]
        pictures = tuple(tuple(part.strip() for part in each.split("->")) for each in how if "->" in each)
        if unknown := [each for each in how if "->" not in each and each != "tables"]:
            raise ValueError(f"{page}: figure {mark['name']} has {unknown[0]!r}, expected tables or FILE -> PATH.")
        yield Figure(mark["name"], page, words, "tables" in how, pictures, block.start("text"), block.end("text"))


def all_figures() -> list[Figure]:
    """Returns the figures of README and docs.

    Raises:
      ValueError: two of one name.
    """
    pages = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md"))]
    figures = [figure for page in pages for figure in marked(page)]
    for figure in figures:
        if others := [other.page for other in figures if other.name == figure.name and other is not figure]:
            raise ValueError(f"two figures are called {figure.name}, in {figure.page} and {others[0]}.")
    return figures


def printed(figure: Figure, kept: pathlib.Path, execute: Callable[[Sequence[str]], str]) -> str:
    """Returns what a figure's command prints, from `kept` where the same command left it there."""
    path, opening = kept / f"{figure.name}.txt", f"$ {shlex.join(figure.command)}\n"
    if path.exists() and (text := path.read_text(encoding="utf-8")).startswith(opening):
        return text.removeprefix(opening)
    output = execute(figure.command)
    kept.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(opening + output, encoding="utf-8")
    part.replace(path)
    return output


def shown(figure: Figure, output: str) -> str:
    """Returns the part of an output that the page shows."""
    paragraphs = re.split(r"\n\s*\n", output.strip("\n"))
    if figure.tables:
        paragraphs = [each for each in paragraphs if re.search(r"^-{8,}$", each, flags=re.MULTILINE)]
    return "\n\n".join("\n".join(line.rstrip() for line in each.splitlines()) for each in paragraphs) + "\n"


def replace(figure: Figure, output: str) -> None:
    """Puts an output into the page, and pictures where they belong."""
    now = next(each for each in marked(figure.page) if each.name == figure.name)  # others may have moved it
    text = figure.page.read_text(encoding="utf-8")
    figure.page.write_text(text[: now.start] + shown(figure, output) + text[now.end :], encoding="utf-8")
    for name, place in figure.pictures:
        shutil.copy(figure.folder / name, ROOT / place)


def _execute(command: Sequence[str]) -> str:
    """Runs a program; its progress goes on being shown.

    Raises:
      ValueError: it failed.
    """
    done = subprocess.run([sys.executable, *command[1:]], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError(f"{shlex.join(command)} ended with status {done.returncode}; what is finished is kept.")
    return done.stdout


def run(*names: str) -> None:
    """The program."""
    figures = all_figures()
    known = [figure.name for figure in figures]
    for name in names:
        if name not in known:
            raise ValueError(f"no figure is called {name!r}; there are {', '.join(known) or 'none'}.")
    for figure in figures:
        if not names or figure.name in names:
            print(f"{figure.name} ({figure.page.relative_to(ROOT)}): {shlex.join(figure.command)}", flush=True)
            replace(figure, printed(figure, ROOT / "out" / "figures", _execute))


if __name__ == "__main__":
    cli.start(run)
