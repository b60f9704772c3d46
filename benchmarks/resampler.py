"""How well `mini-resampler` answers at each size and shape of an image: `python benchmarks/resampler.py [MODEL]`.

Each size has 525 questions of the test split for itself, so the 4,200 answers are independent; then one set of questions at
every size, paired.
MODEL is a directory, whose own code is run. Writes results/mini-resampler.json. About 25 minutes on two cores.
"""

from __future__ import annotations

import sys
from pathlib import Path

from datasets import Dataset

from mmrecipes import data, evaluate, measure, models
from mmrecipes.mini import resampler

OUT = Path(__file__).resolve().parent.parent / "results" / "mini-resampler.json"
SIZES = ((96, 96), (128, 128), (192, 192), (256, 256), (320, 320), (384, 384), (384, 192), (192, 384))  # width, height in px
PAIRED, REFERENCE = 280, (128, 128)  # questions asked at every size, and the size that the others are compared with


def run(model, rows: Dataset, paired: Dataset) -> dict:
    """Accuracy overall, per family and per size, each with its interval; the change from REFERENCE on the same questions."""
    each, sizes, right, families = len(rows) // len(SIZES), [], [], []
    for i, size in enumerate(SIZES):
        own = resampler.resized(rows.select(range(i * each, (i + 1) * each)), size)
        found = evaluate.vqa(model, own)
        sizes.append({"size": list(size), "accuracy": found.overall, "families": found.families})
        right, families = right + found.right, families + own["family"]
        print(f"{size[0]:3d} x {size[1]:3d}  {found.overall}", flush=True)
    per = {f: [r for r, g in zip(right, families, strict=True) if g == f] for f in sorted(set(families))}
    shares = {f: evaluate.wilson(sum(of), len(of)) for f, of in per.items()}
    same = {size: evaluate.vqa(model, resampler.resized(paired, size)).right for size in SIZES}
    changes = [
        {"size": list(size), "change": evaluate.paired(same[REFERENCE], same[size])} for size in SIZES if size != REFERENCE
    ]
    overall = evaluate.wilson(sum(right), len(right))
    print("overall", overall, {f: str(share) for f, share in shares.items()})
    return {"overall": overall, "families": shares, "sizes": sizes, "reference": list(REFERENCE), "changes": changes}


if __name__ == "__main__":
    model = models.load(sys.argv[1] if len(sys.argv) > 1 else "mini-resampler", trust_remote_code=True)
    found = run(model, data.test_split(), data.questions("test", PAIRED))
    parameters = sum(p.numel() for p in model.parameters())
    models.write_json(OUT, {"environment": measure.environment(), "parameters": parameters, **found})
