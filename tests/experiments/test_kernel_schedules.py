"""The reader of the TPU compiler's schedules, on the dump of a small kernel whose bundles are counted by hand.

The kernel in `schedule_dump` is the running maximum of three rows, for two results over four tiles each: its grid is
(2, 4), a result begins as zeros, and a loop over the rows adds one to the maximum. Comments and layouts are cut out.
"""

import pathlib

import pytest

from experiments import kernel_schedules
from experiments.kernel_schedules import Cycles

DUMP = pathlib.Path(__file__).parent / "schedule_dump"


@pytest.fixture
def schedule():
    (kernel,) = kernel_schedules.read(DUMP).kernels
    return kernel


def test_bundles_count_as_often_as_they_are_issued(schedule):
    assert schedule.grid == (2, 4) and len(schedule.bundles) == 0x5F
    turns = schedule.turns()
    # The grid's loop is 0x09 to 0x5a, with the 4 bundles behind its branch at 0x56.
    assert turns[0x08] == 1 and turns[0x09] == 8 and turns[0x5A] == 8 and turns[0x5B] == 1
    # The rows' is 0x38 to 0x42, left when its counter reaches 3.
    assert turns[0x37] == 8 and turns[0x38] == 24 and turns[0x42] == 24 and turns[0x43] == 8
    # A branch at 0x30 skips the zeros at 0x35 and 0x36 but for the first of four tiles; that at 0x28 skips all work,
    # where the loop has no tile left.
    assert turns[0x34] == 8 and turns[0x35] == turns[0x36] == 2


def test_cycles_by_hand(schedule):
    # 13 bundles outside, 82 in the grid's loop, of which 2 for zeros and 11 for a row.
    latency = 13 + 8 * (82 - 2 - 11) + 2 * 2 + 24 * 11
    empty = 8 * 14
    # A maximum and an addition for every row, and the zero.
    vector = (24 * 2 + 2 * 1) / 4
    assert schedule.cycles() == Cycles(latency, latency - empty, vector)


def test_units_are_busy_for_their_slots(schedule):
    busy = schedule.busy()
    assert busy["VALU"] == schedule.cycles().vector
    assert busy["VSTORE"] == 24 + 2  # the maximum so far, and the zeros
    assert busy["MXU"] == 0


def test_xla_operations_are_told_from_kernels(tmp_path):
    for path in DUMP.iterdir():
        (tmp_path / path.name).write_text(path.read_text())
        plain = path.read_text().replace("tpu_custom_call", "another")
        (tmp_path / path.name.replace("1-largest", "2-copy")).write_text(plain)
        (tmp_path / path.name.replace("1-largest.1", "3-TLP")).write_text(plain)
    program = kernel_schedules.read(tmp_path)
    assert len(program.kernels) == 1 and program.others == ("copy.1",)


def test_what_is_no_schedule_is_refused(schedule):
    names = "1-01-packed-bundles-post-ra.txt", "utilization.txt"
    bundles, units = (next(DUMP.glob(f"*{name}")).read_text() for name in names)
    with pytest.raises(ValueError, match="not a list of bundles from address 0"):
        kernel_schedules.parse("", units)
    with pytest.raises(ValueError, match="not a list of bundles from address 0"):
        kernel_schedules.parse(bundles.replace("  0x5 ", "  0x7 "), units)
    with pytest.raises(ValueError, match="has 95 bundles, but units of 94 are listed"):
        kernel_schedules.parse(bundles, units.rstrip().rpartition("\n")[0])
    data = bundles.replace("totalorder %s166_s15, 3", "totalorder %s166_s15, %s3")
    with pytest.raises(ValueError, match="0x3e: the number of turns of its loop is no constant"):
        kernel_schedules.parse(data, units).cycles()
    two = bundles.replace("%s166_s15 = sadd.s32 1,", "%s166_s15 = sadd.s32 2,")
    assert kernel_schedules.parse(two, units).turns()[0x38] == 16  # 3 rows in steps of 2
