"""The one table of seeds: which scenes each split and each training draws."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

SPLITS = {  # the seeds of each split; the test suite proves that they do not overlap
    "train": range(0, 10**9),
    "calibration": range(10**9, 10**9 + 10**6),
    "validation": range(2 * 10**9, 2 * 10**9 + 10**6),
    "test": range(3 * 10**9, 3 * 10**9 + 10**6),
}


STUDENT_FIRST = 40_000  # the first batch of lessons for a student: those of the teacher and of recoveries lie below
