"""Cycles of a TPU kernel, read from the schedule that the TPU compiler dumps.

With `DUMP_FLAGS` in LIBTPU_INIT_ARGS libtpu writes, for every operation of a program, the final schedule ("packed
bundles") and how many slots of each unit every bundle uses. A bundle is what a core issues in one cycle. The compiler
leaves empty bundles where it expects to wait for a result; the chip waits there by itself, so they are the compiler's
own model of the latencies.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re

DUMP_FLAGS = (
    "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
    "--xla_jf_dump_llo_pass_label_regex=(pre-delay|packed-bundles-post-ra).*"
)
"""For LIBTPU_INIT_ARGS, before libtpu is loaded."""

_SCHEDULE, _UNITS = "packed-bundles-post-ra.txt", "pre-delay_hlo-static-per-bundle-utilization.txt"
_ANALYSIS = "schedule-analysis_" + _SCHEDULE
_FILE = re.compile(r"\d+-(.+)-\d+-(" + "|".join(map(re.escape, (_ANALYSIS, _SCHEDULE, _UNITS))) + ")")
_DELAY_SLOTS = 4  # bundles behind a branch that are issued whether it is taken or not

_BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0)[ \t]+(?:[A-Z]{2} ?)*[ \t]*:[ \t]*(>*)[ \t]*\{", re.MULTILINE)
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_BRANCH = re.compile(r"sbr\.rel(?:\.\w+)? (?:\(!?%(\w+)\) )?target bundleno = (\d+)")
_EVERY_STEP = re.compile(r"dma\.hbm|vmatmul|vmatpush|vmatprep")
_BOUNDS = re.compile(r"iteration_bounds: \(([\d, ]+)\)")


@dataclasses.dataclass(frozen=True)
class Cycles:
    """Cycles of a core, or sums of them.

    Attributes:
      latency: bundles with the waits that the compiler expects.
      issue: bundles that hold something: one is issued a cycle, so it takes no fewer.
      vector: arithmetic slots of the vector unit over those of a bundle: a bound that no order of bundles beats.
    """

    latency: float
    issue: float
    vector: float

    def __add__(self, other: Cycles) -> Cycles:
        return Cycles(self.latency + other.latency, self.issue + other.issue, self.vector + other.vector)


@dataclasses.dataclass(frozen=True)
class Bundle:
    """Holds what is issued together: the instructions, without comments; empty where the core waits."""

    address: int
    text: str


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The bundles of one kernel.

    Attributes:
      bundles: in order of their addresses, which count from 0.
      units: for every bundle, slots in use by unit.
      capacity: slots of a bundle by unit.
      grid: steps by axis of the grid on one core; empty where there is no pipelined loop.
    """

    bundles: tuple[Bundle, ...]
    units: tuple[dict[str, int], ...]
    capacity: dict[str, int]
    grid: tuple[int, ...]

    @property
    def steps(self) -> int:
        """Steps of the grid on one core."""
        return math.prod(self.grid)

    def cycles(self) -> Cycles:
        """The whole kernel on one core.

        A loop counts as often as it turns. What a branch skips in the kernel's part of a step counts at every step if
        it copies from HBM or multiplies matrices; else it is what only the first or the last tile of a result does.
        """
        turns, slots = self.turns(), self.capacity["VALU"]
        each = zip(turns, self.bundles, self.units, strict=True)
        parts = [Cycles(n, n * bool(bundle.text), n * used["VALU"] / slots) for n, bundle, used in each]
        return sum(parts, Cycles(0, 0, 0))

    def busy(self) -> dict[str, float]:
        """By unit, the cycles of the whole kernel if all its slots were always in use."""
        turns = self.turns()
        return {
            unit: sum(n * used[unit] for n, used in zip(turns, self.units, strict=True)) / slots
            for unit, slots in self.capacity.items()
        }

    def turns(self) -> list[float]:
        """How often every bundle is issued."""
        times = [1.0] * len(self.bundles)
        for first, last, trips in self._loops():
            for i in range(first, last + 1):
                times[i] *= trips
        if self.grid:
            results = math.prod(self.grid[:-1])
            for i in set().union(*(range(first, last + 1) for first, last in self._rare())):
                times[i] *= results / self.steps
        return times

    def _loops(self) -> list[tuple[int, int, int]]:
        """(first bundle, last, turns), the grid's first."""
        found = []
        for i, predicate, target in self._branches():
            if target <= i:
                found.append((target, min(i + _DELAY_SLOTS, len(self.bundles) - 1), predicate, i))
        found.sort(key=lambda x: x[0] - x[1])
        # The loop of a grid turns more often: at first it only reads ahead, at last it only writes back.
        of_grid, loops = (found[:1], found[1:]) if self.grid else ([], found)
        return [(first, last, self.steps) for first, last, *_ in of_grid] + [
            (first, last, self._trips(predicate, i)) for first, last, predicate, i in loops
        ]

    def _rare(self) -> list[tuple[int, int]]:
        """Ranges of bundles of which `cycles` says that they do not run at every step."""
        skipped = [(i + _DELAY_SLOTS + 1, target - 1) for i, _, target in self._branches() if target > i]
        skipped = sorted((x for x in skipped if x[0] <= x[1]), key=lambda x: x[0] - x[1])
        # The longest is the kernel's own part of a step, which the loop's first and last turn have not.
        (begin, end), *others = skipped or [(0, -1)]
        text = lambda x: "".join(bundle.text for bundle in self.bundles[x[0] : x[1] + 1])
        return [x for x in others if begin <= x[0] and x[1] <= end and not _EVERY_STEP.search(text(x))]

    def _branches(self) -> list[tuple[int, str, int]]:
        """(bundle, predicate, target)."""
        return [
            (i, match[1], int(match[2]))
            for i, bundle in enumerate(self.bundles)
            for match in _BRANCH.finditer(bundle.text)
        ]

    def _trips(self, predicate: str, branch: int) -> int:
        """How often a loop turns that is left when a counter reaches a constant.

        Raises:
          ValueError: it is not such a loop.
        """
        text = "\n".join(bundle.text for bundle in self.bundles[: branch + 1])
        name = re.escape(predicate)
        test = re.findall(rf"%{name} = scmp\.ge\.s32\.totalorder (?:\(!?%\w+\), )?%s(\d+)_\w+, (\d+)", text)
        if not test:
            raise ValueError(f"bundle {branch:#x}: the number of turns of its loop is no constant.")
        counter, bound = test[-1]
        step = re.findall(rf"%s{counter}_\w+ = sadd\.s32 (?:\(!?%\w+\), )?(\d+),", text)
        return -(-int(bound) // int(step[-1])) if step else int(bound)


def parse(schedule: str, units: str) -> Schedule:
    """A schedule from the text of its two files.

    Raises:
      ValueError: they are not such files, or not of the same kernel.
    """
    begins = list(_BUNDLE.finditer(schedule))
    ends = [match.start() for match in begins[1:]] + [len(schedule)]
    bundles = tuple(
        Bundle(int(match[1], 16), _COMMENT.sub("", schedule[match.end() : end]).split("}")[0].strip())
        for match, end in zip(begins, ends)
    )
    _, titles, numbers, _, *rows = units.strip().splitlines() if units.count("\n") > 3 else [""] * 4
    names = [name.strip() for name in titles.split(",")]
    capacity = dict(zip(names, map(int, numbers.split())))
    used = tuple(dict(zip(names, map(int, row.split()))) for row in rows)
    if not bundles or [x.address for x in bundles] != list(range(len(bundles))):
        raise ValueError("the schedule is not a list of bundles from address 0 on.")
    if len(used) != len(bundles):
        raise ValueError(f"the schedule has {len(bundles)} bundles, but units of {len(used)} are listed.")
    bounds = _BOUNDS.findall(schedule)
    return Schedule(bundles, used, capacity, tuple(map(int, bounds[0].split(","))) if bounds else ())


@dataclasses.dataclass(frozen=True)
class Program:
    """Holds what the dump of one program says.

    Attributes:
      kernels: the schedules of its Pallas kernels.
      others: names of the operations that XLA made around them.
    """

    kernels: tuple[Schedule, ...]
    others: tuple[str, ...]


def read(folder: pathlib.Path) -> Program:
    """The program that was dumped to a folder."""
    files = {}  # of an operation, by what they hold
    for path in sorted(folder.iterdir()):
        match = _FILE.fullmatch(path.name)
        if match and match[1] != "TLP" and not match[1].startswith("<"):  # the program itself, its begin and its end
            files.setdefault(match[1], {})[match[2]] = path
    text = lambda path: path.read_text(encoding="utf-8", errors="replace")
    kernels, others = [], []
    for name, held in files.items():
        if 'custom_call_target="tpu_custom_call"' in text(held[_ANALYSIS]):
            kernels.append(parse(text(held[_SCHEDULE]), text(held[_UNITS])))
        else:
            others.append(name)
    return Program(tuple(kernels), tuple(others))
