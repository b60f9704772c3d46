"""The tables of results/README.md on growth: with prompt and context (results/growth.json), with the image (sizes.json)."""

from __future__ import annotations

from typing import Any


def growth(content: dict[str, Any], table) -> str:
    """A prompt's time, a step's behind it, and the share of the least that the machine allows; peak memory."""
    names, rows = list(content["variants"]), []
    for i, tokens in enumerate(r["tokens"] for r in content["variants"][names[0]]):
        found = [content["variants"][name][i] for name in names]
        cells = []
        for stage in ("prefill_ms", "decode_ms"):
            digits = 0 if stage == "prefill_ms" else 1
            cells += [f"{r[stage]:,.{digits}f} ({r['bound'][stage] / r[stage]:.0%})" for r in found]
        rows.append([f"{tokens:,}", *cells, *(f"{r['peak_mb']:,.0f}" for r in found)])
    stages = ("prompt, ms", "decode, ms a token", "peak MB")
    return table(["tokens", *(f"{name}: {stage}" for stage in stages for name in names)], rows) + _peaks(content)


def sizes(content: dict[str, Any], table) -> str:
    """Time to first token of an image, with the part of the vision encoder, and what the tiles cost together and one by one."""
    rows = []
    for name, points in content["variants"].items():
        for r in points:
            single = r.get("vision one by one ms")
            shown = f"{r['vision_ms']['median']:,.0f}" + (f" (one by one {single['median']:,.0f})" if single else "")
            bound = f"{r['least_ms']:,.0f} ({r['least_ms'] / r['ttft_ms']['median']:.0%})"
            cells = [f"{r['tiles']}", f"{r['prompt_tokens']}", shown, f"{r['ttft_ms']['median']:,.0f}", bound]
            rows.append([name, f"{r['side']:,}", *cells, f"{r['peak_mb']:,.0f}"])
    head = ["", "image, px", "tiles", "prompt tokens", "vision encoder, ms", "TTFT, ms", "estimate, ms", "peak MB"]
    return table(head, rows) + _peaks(content)


def _peaks(content: dict[str, Any]) -> str:
    """What the estimates divide by, probed just before."""
    found = content["peaks"]
    peaks = f"fp32 {found['fp32']:,.0f} GFLOP/s and int8 {found['int8']:,.0f} GOP/s in PyTorch's matrix products"
    return f"\n\nThe estimate divides by what a probe measured just before: {peaks}, {found['bandwidth']:.0f} GB/s."
