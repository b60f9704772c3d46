"""The tables of results/README.md on techniques together: results/together.json."""

from __future__ import annotations

from typing import Any

FIRST = "whole, PyTorch fp32"


def orders(content: dict[str, Any], table) -> str:
    """Accuracy of each plan, its bytes, and its change against the whole model and against P-D-Q of as many bits."""
    rows, whole = [], content["plans"]["whole"]["mb"]
    for name, row in content["plans"].items():
        found, pair = row["accuracy"], content["against P-D-Q"].get(name)
        share = f"{100 * found['value']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}], {found['n']}"
        size = f"{row['mb']:.2f} ({whole / row['mb']:.1f}x)"
        rows.append([name, share, size, _points(row["change"]), _points(pair) if pair else "-"])
    head = ["plan", "accuracy, % [95% interval], n", "MB (times smaller)", "change, points", "against P-D-Q, points"]
    return table(head, rows)


def deployed(content: dict[str, Any], table) -> str:
    """What each exported model gives against PyTorch fp32: its own answers, its files, its times."""
    speed, peak, rows = content["times"]["speed"], content["times"]["peak_mb"], []
    for name, row in content["deployed"].items():
        mb = row.get("mb", content["plans"]["whole"]["mb"] / (2 if "bf16" in name else 1))
        rows.append([name, f"{_points(row['change'])}, {row['change']['n']}", f"{mb:.2f}", *_speed(speed, peak, name)])
    return table(["deployed", "change, points [95% interval], n", "MB", *_HEAD], rows)


def real(content: dict[str, Any], table) -> str:
    """The same at SmolVLM-256M's size, with random weights."""
    found = content["real"]
    rows = [[name, f"{found['mb'][name]:.0f}", *_speed(found["speed"], found["peak_mb"], name)] for name in found["speed"]]
    return table(["SmolVLM-256M's size, random weights", "MB", *_HEAD], rows)


_HEAD = ["TTFT, ms [quartiles]", "faster", "tokens/s [quartiles]", "faster", "peak, MB", "of fp32"]


def _speed(speed: dict[str, Any], peak: dict[str, float], name: str) -> list[str]:
    ttft, rate, first = speed[name]["ttft_ms"], speed[name]["tokens_per_s"], speed[FIRST]
    return [
        f"{ttft['median']:.1f} [{ttft['low']:.1f}, {ttft['high']:.1f}]",
        f"{first['ttft_ms']['median'] / ttft['median']:.1f}x",
        f"{rate['median']:.0f} [{rate['low']:.0f}, {rate['high']:.0f}]",
        f"{rate['median'] / first['tokens_per_s']['median']:.1f}x",
        f"{peak[name]:.0f}",
        f"{peak[name] / peak[FIRST]:.2f}x",
    ]


def _points(change: dict[str, Any]) -> str:
    return f"{change['points']:+.1f} [{change['low']:+.1f}, {change['high']:+.1f}]"
