"""Every method computes and keeps what it did when `tests/golden/make_method_records.py` recorded it."""

import numpy as np
import pytest

from tests.golden import make_method_records as records
from tests.kvjax.cases import CASES

RECORDED = records.load()


def test_every_case_is_recorded_and_nothing_else():
    assert set(RECORDED) == {case.name for case in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_method_computes_and_keeps_what_was_recorded(case):
    assert records.differences(records.record(case), RECORDED[case.name]) == []


def test_logits_positions_and_bytes_that_differ_are_found():
    old = RECORDED["h2o"]
    assert records.differences(old, old) == []

    logits = old.logits.copy()
    logits[4, 1, 3] += 3e-4
    (found,) = records.differences(old._replace(logits=logits), old)
    assert found == "logits differ by up to 3.0e-04, first after token 2"
    logits[4, 1, 3] = np.nan
    assert len(records.differences(old._replace(logits=logits), old)) == 1

    kept = old.kept.copy()
    kept[2, 1, 0, 1, 0] += 1
    kept = np.pad(kept, [(0, 0)] * 4 + [(0, 2)], constant_values=-1)  # of a set of methods that keep more
    (found,) = records.differences(old._replace(kept=kept), old)
    assert found.startswith("kept positions differ in 1 lists of 24, first after end in layer 1, row 0, head 1: [")

    assert records.differences(old._replace(nbytes=old.nbytes - 4), old) == []
    assert records.differences(old._replace(nbytes=old.nbytes + 4), old) == [
        f"{old.nbytes + 4} bytes, before {old.nbytes}"
    ]
