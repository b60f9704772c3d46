"""The tables of results/README.md on images of any size: results/mini-resampler.json."""

from __future__ import annotations

from typing import Any


def sizes(content: dict[str, Any], table) -> str:
    """Accuracy at each size, per family; and the change from one size on the same questions."""

    def share(found: dict[str, Any]) -> str:
        return f"{100 * found['value']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"

    families, changes = list(content["families"]), {tuple(r["size"]): r["change"] for r in content["changes"]}
    rows = []
    for row in content["sizes"]:
        change, (width, height) = changes.get(tuple(row["size"])), row["size"]
        moved = f"{change['points']:+.1f} [{change['low']:+.1f}, {change['high']:+.1f}]" if change else "-"
        own = [f"{100 * row['families'][f]['value']:.0f}" for f in families]
        rows.append([f"{width} x {height}", f"{share(row['accuracy'])}, {row['accuracy']['n']}", *own, moved])
    rows.append(
        ["all", f"{share(content['overall'])}, {content['overall']['n']}", *map(share, content["families"].values()), "-"]
    )
    width, height = content["reference"]
    paired = next(iter(changes.values()))["n"]
    last = f"change from {width} x {height} on the same {paired} questions, points"
    return table(["image, px", "accuracy, % [95% interval], n", *families, last], rows)
