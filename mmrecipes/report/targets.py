"""Which formats pay on which hardware: the table of `mmrecipes doctor`, each row with its source. Built up in notebook 61.

A file named in `source` is ours, measured; `tests/report/test_targets.py` holds each such row to it. Where we have no such
machine, the vendor's page is named, and nothing is claimed beyond it.
"""

import platform
from collections.abc import Iterable
from dataclasses import dataclass

from mmrecipes.report import plain


@dataclass(frozen=True)
class Target:
    """Hardware, the instructions that tell it (any of them; none: not told by a CPU's flags), and what pays there."""

    name: str
    instructions: frozenset[str]
    pays: str
    not_so: str
    source: str


TARGETS = (
    Target(
        "x86 with AVX2",
        frozenset({"avx2"}),
        "int8 with int8 activations, of 7 bits where sums saturate: vision, prefill, decode; bf16: decode alone",
        "bf16 for vision and prefill: slower than fp32, as there is no instruction for it",
        "results/int8-speed.json",
    ),
    Target(
        "x86 with VNNI",
        frozenset({"avx_vnni", "avx512_vnni"}),
        "int8: first token and decode; 4 bits: decode, more; bf16, where AVX512-BF16 is there, too",
        "4 bits for the first token: no sooner than int8",
        "results/bench.json",
    ),
    Target(
        "x86 with AMX",
        frozenset({"amx_int8", "amx_bf16"}),
        "int8 and bf16 products in tiles of their own: vision and prefill with many tokens",
        "decode reads weights and is bound by memory: fewer bits, not tiles",
        "Intel, oneDNN documentation, CPU dispatcher; not measured here",
    ),
    Target(
        "ARM with dotprod, i8mm",
        frozenset({"asimddp", "i8mm"}),
        "int8 and 4-bit weights with int8 activations (ExecuTorch's XNNPACK with KleidiAI, ONNX Runtime, llama.cpp)",
        "bf16 without the CPU's own bf16 instructions",
        "Arm, KleidiAI documentation; not measured here",
    ),
    Target(
        "Apple, Core ML",
        frozenset(),
        "4-bit weights in blocks from macOS 15; int8 activations on Neural Engines from A17 Pro and M4 on",
        "int8 activations on older Neural Engines; an export of ours (we write no Core ML)",
        "Apple, Core ML Tools guide, What's New; not measured here",
    ),
    Target(
        "NPU by OpenVINO",
        frozenset(),
        "static shapes in int8 or fp16: a vision encoder at one image size",
        "dynamic shapes, so our language models as exported; `export.onnx.check_static` tells",
        "OpenVINO, Supported Devices; not measured here",
    ),
    Target(
        "NVIDIA tensor cores",
        frozenset(),
        "bf16 products; int8 from Ampere, FP8 from Ada, FP4 from Blackwell on; CUDA graphs for decode",
        "bf16 in eager decode at batch 1: bound by launching kernels, as fp32 is",
        "results/gpu.json (bf16); NVIDIA, Model Optimizer support matrix (int8, FP8, FP4)",
    ),
)
LITERT = (
    "LiteRT: not offered. Its converter (litert-torch 0.10) takes torch 2.13, but through xdsl it needs typing_extensions below "
    "4.13, and with it older pydantic and anyio than all here is tested with: give it an environment of its own."
)


def here(capabilities: Iterable[str], gpu: str | None = None) -> list[str]:
    """The targets that this machine is, by `environment()`'s "capabilities" and "gpu"; of AVX2 and VNNI the better one."""
    found = [t.name for t in TARGETS if t.instructions & set(capabilities)]
    if "x86 with VNNI" in found:
        found.remove("x86 with AVX2")
    if platform.system() == "Darwin":
        found.append("Apple, Core ML")
    return found + (["NVIDIA tensor cores"] if gpu else [])


def target_table(capabilities: Iterable[str], gpu: str | None = None) -> str:
    """All targets as plain text, this machine's marked; NPUs are not looked for."""
    own = here(capabilities, gpu)
    rows = [
        (("> " if t.name in own else "  ") + t.name, f"pays: {t.pays}. Does not: {t.not_so}. Source: {t.source}") for t in TARGETS
    ]
    head = ("target", "what pays (> marks this machine)")
    return plain.table("Which formats pay where", head, rows) + "\n" + plain.paragraph(LITERT)
