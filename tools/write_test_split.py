"""Writes the committed test split, data/scenes-test.parquet: `python tools/write_test_split.py [FOLDER]`."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pyarrow.parquet as pq

from mmrecipes.data import datasets
from mmrecipes.models.saving import written_aside
from recipes import ROOT

N = 4200  # 600 of each family


def write_test_split(folder: Path, n: int = N) -> Path:
    """Write `n` questions of the test split, shuffled (any head of the file is a fair sample), as one Parquet file."""
    order = list(range(n))
    random.Random(0).shuffle(order)
    path = folder / datasets.TEST_FILE
    with written_aside(path) as aside:
        pq.write_table(datasets.questions("test", n).with_format("arrow")[order], aside, compression="zstd")
    return path


if __name__ == "__main__":
    print("wrote", write_test_split(Path(sys.argv[1]) if sys.argv[1:] else ROOT / "data"))
