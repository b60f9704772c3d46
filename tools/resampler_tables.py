"""The tables of results/README.md on images of any size: results/mini-resampler.json, waterfall.json, training-precision.json."""

from __future__ import annotations

from typing import Any


def sizes(content: dict[str, Any], table) -> str:
    """Accuracy at each size, per family; and the change from one size on the same questions."""
    families, changes = list(content["families"]), {tuple(r["size"]): r["change"] for r in content["changes"]}
    rows = []
    for row in content["sizes"]:
        change, (width, height) = changes.get(tuple(row["size"])), row["size"]
        moved = f"{change['points']:+.1f} [{change['low']:+.1f}, {change['high']:+.1f}]" if change else "-"
        own = [f"{100 * row['families'][f]['value']:.0f}" for f in families]
        rows.append([f"{width} x {height}", f"{_share(row['accuracy'])}, {row['accuracy']['n']}", *own, moved])
    rows.append(
        ["all", f"{_share(content['overall'])}, {content['overall']['n']}", *map(_share, content["families"].values()), "-"]
    )
    width, height = content["reference"]
    paired = next(iter(changes.values()))["n"]
    last = f"change from {width} x {height} on the same {paired} questions, points"
    return table(["image, px", "accuracy, % [95% interval], n", *families, last], rows)


def _share(found: dict[str, Any]) -> str:
    return f"{100 * found['value']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def waterfall(content: dict[str, Any], table) -> str:
    """Each workload's rows, with time and memory as shares of its first row's, and how many answers stay as they were."""
    depth, published = content["depth"], content["published_depth"]
    texts = {"sliced": "Images in slices of about 448 px", "native": "Whole images"}
    shown = []
    for name in (n for n in texts if n in content):
        found = content[name]
        rows = [_step(row) for row in found["rows"]]
        bases = [f"times as fast, share of peak: against {base}" for base in found["rows"][0]["against"]]
        about = f"{texts[name]}: {found['images']} in the batch, {found['patches']:,} patches, {found['padded_patches']:,} padded"
        about += "; " + ", ".join(f"{depth[part]} of {published[part]} {part} layers" for part in depth)
        if found["left_out_gb"]:
            names = ", ".join(f"{n} ({gb:.0f} GB)" for n, gb in found["left_out_gb"].items())
            about += f"; left out, as they take too much memory: {names}"
        head = [name, "TTFT s", "of it vision", "peak MB", *bases, "all layers: TTFT s, peak MB", "logit error"]
        shown.append(f"{about}.\n\n{table(head, rows)}")
    if "agree" in content:
        rows = []
        for name, own in content["agree"]["precisions"].items():
            change = own["change"]
            moved = f"{change['points']:+.1f} [{change['low']:+.1f}, {change['high']:+.1f}]"
            rows.append([name, f"{_share(own['unchanged'])}, {own['unchanged']['n']}", moved])
        shown.append(table(["all steps", "answers unchanged, % [95% interval], n", "accuracy, points"], rows))
    return "\n\n".join(shown)


def _step(row: dict[str, Any]) -> list[str]:
    def ranged(key: str, digits: int) -> str:
        median, low, high = (f"{row[key][which]:,.{digits}f}" for which in ("median", "low", "high"))
        return f"{median} [{low}, {high}]"

    against = [
        f"{a['faster']:.2f}x, {a['peak']:.2f}x (all layers {a['full_faster']:.2f}x, {a['full_peak']:.2f}x)"
        for a in row["against"].values()
    ]
    whole = f"{row['full_ttft_s']['median']:,.1f}, {row['full_peak_mb']['median']:,.0f}"
    error = f"{row['error']:.0e}" if row["error"] else "-"
    return [row["name"], ranged("ttft_s", 2), f"{row['vision_s']['median']:.2f}", ranged("peak_mb", 0), *against, whole, error]


def training(content: dict[str, Any], table) -> str:
    """A training step's time and memory in each precision."""
    rows = []
    for row in content["rows"]:
        cells = [f"{row[k]['median']:,.0f} [{row[k]['low']:,.0f}, {row[k]['high']:,.0f}]" for k in ("step_ms", "peak_mb")]
        checkpointing = "yes" if row["gradient checkpointing"] else "no"
        rows.append([row["precision"], checkpointing, *cells, f"{row['activations_mb']['median']:,.0f}"])
    head = [f"a training step, {content['batch']} images of {content['side']} px", "gradient checkpointing"]
    return table([*head, "ms", "peak MB", "kept for the backward pass, MB"], rows)
