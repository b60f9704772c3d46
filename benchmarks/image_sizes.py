"""How well `mini-resampler` answers about images of 256 to 1,024 px: `python benchmarks/image_sizes.py [MODEL]`.

Two kinds of images: a scene that fills its image, and a scene of 128 px somewhere on a ground of that size. Two ways: shrunk to
384 px, as its processor does, and whole. The same questions everywhere, half of them about reading: pairs are compared.
Writes results/image-sizes.json. About three minutes on two cores.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from mmrecipes import data, evaluate, measure, models
from mmrecipes.data import scenes
from mmrecipes.mini import resampler

OUT = Path(__file__).resolve().parent.parent / "results" / "image-sizes.json"
SIDES, DETAIL = (256, 512, 768, 1024), 128  # px
WAYS = {"shrunk to 384 px": resampler.LARGEST, "whole": max(SIDES)}  # the processor's longest edge
READING = OTHERS = 24  # questions


def questions() -> dict[str, list]:
    """READING questions about a code, then as many of each other family: question, answer, family, seed."""
    rows = data.test_split(6 * (READING + OTHERS))
    family = np.array(rows["family"][:])
    each = {name: np.flatnonzero(family == name).tolist() for name in sorted({*family})}
    picked = each.pop("reading")[:READING] + [i for indices in each.values() for i in indices[: OTHERS // len(each)]]
    return {name: [rows[i][name] for i in picked] for name in ("question", "answer", "family", "seed")}


def images(seeds: list[int], kind: str, side: int) -> list:
    """The scenes as images of `side` px: filling it, or a detail of it that lies further to the lower right in each."""
    drawn, n = map(scenes.make_scene, seeds), len(seeds)
    if kind == "fills":
        return [scenes.render(scene, side) for scene in drawn]
    return [resampler.placed(scene, DETAIL, (side, side), i / (n - 1)) for i, scene in enumerate(drawn)]


def run(model) -> dict:
    """Shares of right answers at each size, kind and way, and the change from shrunk to whole on the same questions."""
    asked, rows = questions(), []
    reading = np.array([family == "reading" for family in asked["family"]])
    for kind in ("fills", "detail"):
        for side in SIDES:
            own, right = asked | {"image": images(asked["seed"], kind, side)}, {}
            for way, longest in WAYS.items():
                model.processor.image_processor.size = {"shortest_edge": resampler.SMALLEST, "longest_edge": longest}
                right[way] = np.array(evaluate.vqa(model, own, progress=False).right)
            for about, which in (("reading", reading), ("other families", ~reading)):
                row = {"kind": kind, "side": side, "about": about}
                row |= {way: evaluate.wilson(int(found[which].sum()), int(which.sum())) for way, found in right.items()}
                row["change"] = evaluate.paired(*(found[which].tolist() for found in right.values()))
                rows.append(row)
                print(f"{kind:7s}{side:5d} px  {about:15s}", *(row[way] for way in WAYS), row["change"], sep="  ", flush=True)
    return {"n": {"reading": READING, "other families": OTHERS}, "detail": DETAIL, "rows": rows}


if __name__ == "__main__":
    model = models.load(sys.argv[1] if len(sys.argv) > 1 else "mini-resampler", trust_remote_code=True)
    models.write_json(OUT, {"environment": measure.environment(), **run(model)})
