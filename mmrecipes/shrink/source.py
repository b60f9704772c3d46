"""One view of the model that is shrunk, computed once and handed on; budgets, and the bytes that a plan should take."""

import functools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from mmrecipes.errors import UserError
from mmrecipes.measure import size
from mmrecipes.models import modules
from mmrecipes.quantize import mixed_precision, nf4
from mmrecipes.quantize.groups import grouped_bytes
from mmrecipes.quantize.rounding import packed_weight_bytes

UNITS = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
GRAPH_BYTES = {"openvino": 62_000, "onnx": 12_000}  # what describes the graph itself, a numbered block, as exporters write it


@dataclass(frozen=True)
class Source:
    """The model and the runtime that it is shrunk for, and what every stage asks of them."""

    model: nn.Module = field(repr=False)
    runtime: str

    @functools.cached_property
    def units(self) -> dict[str, list[str]]:
        """Unit -> the names of its modules: one attention, one MLP, or the token embeddings."""
        return mixed_precision.units(self.model)

    @functools.cached_property
    def part(self) -> dict[str, str]:
        """Unit -> "vision", "connector", "language", "head" or "other"."""
        part = modules.part_of(self.model)
        return {unit: part[f"{names[0]}.weight"] for unit, names in self.units.items()}

    @functools.cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The modules of all units, by name."""
        return {name: self.model.get_submodule(name) for names in self.units.values() for name in names}

    @functools.cached_property
    def float_bytes(self) -> int:
        """Bytes of all weights in float32, tied ones once."""
        return 4 * sum(p.numel() for p in self.model.parameters())

    @functools.cached_property
    def own_bytes(self) -> int | None:
        """Bytes of the weight files that the model was loaded from, in whatever dtype; None where there are none."""
        folder = Path(self.model.name_or_path or "?")
        return size.disk_bytes(folder) if folder.is_dir() else None

    @functools.cached_property
    def kept(self) -> dict[str, int]:
        """What has no unit, and stays in float: {module with its class: bytes}; norms and biases are one entry."""
        packed = {id(module.weight) for module in self.modules.values()}
        packed |= {id(m.weight) for m in self.model.modules() if self.runtime == "openvino" and isinstance(m, nn.Conv2d)}
        found, plain = {}, 2 if self.runtime == "torch" else 4
        for name, p in self.model.named_parameters():
            if id(p) not in packed:
                owner = name.rpartition(".")[0] if p.ndim > 1 else "norms and biases"
                found[owner] = found.get(owner, 0) + plain * p.numel()
        return found

    @functools.cached_property
    def blocks(self) -> int:
        """Numbered blocks of layers."""
        return len({modules.block_of(name) for name, _ in modules.linears(self.model)})

    @functools.cached_property
    def passes(self) -> float:
        """Forward passes of all rows that GPTQ makes: one a block, through half of the language model for one of its own."""
        part = modules.part_of(self.model)
        blocks = {modules.block_of(name): part[f"{name}.weight"] for name, _ in modules.linears(self.model)}
        return sum(0.5 if p == "language" else 1 for p in blocks.values())

    @property
    def high(self) -> int:
        """Bits of a unit that does not have 4."""
        return 16 if self.runtime == "torch" else 8

    def plan(self, four: Collection[str] = ()) -> dict[str, int]:
        """The plan {unit: bits} with 4 bits in the units of `four`."""
        return {unit: 4 if unit in four else self.high for unit in self.units}

    def module_bits(self, plan: Mapping[str, int]) -> dict[str, int]:
        """A plan a module instead of a unit."""
        return {name: bits for unit, bits in plan.items() for name in self.units[unit]}


def budget_bytes(text: str, whole: int) -> int:
    """Bytes of "0.25x" (of `whole`), "80MB", "1.5 GiB". UserError for anything else, and for shares of 1 and more."""
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(x|[kmg]?i?b)\s*", text, re.IGNORECASE)
    unit = found[2].lower() if found else ""
    if unit not in {"x", *UNITS} or not float(found[1]):
        raise UserError(f"--budget {text!r}: expected a share of the float32 weights, such as 0.25x, or a size, such as 80MB")
    if unit == "x" and float(found[1]) >= 1:
        raise UserError(f"--budget {text!r}: the original is 1x; give a smaller share, such as 0.25x")
    return int(float(found[1]) * (whole if unit == "x" else UNITS[unit]))


def predicted_bytes(source: Source, plan: Mapping[str, int]) -> int:
    """Bytes of the files in which each unit has the bits of `plan` (4, or `source.high`), before they are written."""
    return weight_bytes(source, plan) + source.blocks * GRAPH_BYTES.get(source.runtime, 0)


def weight_bytes(source: Source, plan: Mapping[str, int]) -> int:
    """As `predicted_bytes`, without what describes the graphs themselves."""
    rest = sum(source.kept.values())
    if source.runtime == "openvino":  # whose 8 bits reach convolutions, too
        rest += sum(m.weight.numel() + 4 * len(m.weight) for m in source.model.modules() if isinstance(m, nn.Conv2d))
    return rest + sum(unit_bytes(source, unit, bits) for unit, bits in plan.items())


def unit_bytes(source: Source, unit: str, bits: int) -> int:
    """Bytes of one unit's weights at `bits`, scales included."""
    return sum(_packed_bytes(source, name, bits) for name in source.units[unit])


def _packed_bytes(source: Source, name: str, bits: int) -> int:
    weight, runtime, embedding = source.modules[name].weight, source.runtime, isinstance(source.modules[name], nn.Embedding)
    if runtime == "torch":
        return nf4.nf4_bytes(weight) if bits == 4 else 2 * weight.numel()
    head = getattr(source.model.get_output_embeddings(), "weight", None)
    copies = 2 if embedding and head is weight else 1  # a tied head is stored a second time, to multiply with
    grouped = grouped_bytes(weight, bits)
    channels = packed_weight_bytes(weight, 8, "channel", scale_bytes=5)  # a float32 scale and a zero point a row
    whole = grouped if bits == 4 else channels
    if runtime == "executorch" and embedding:  # only the head's copy is rounded
        return 4 * weight.numel() + (copies - 1) * whole
    if runtime != "onnx":
        return whole
    if embedding:
        return grouped + (copies - 1) * whole
    return grouped if any(last in name for last in ("down_proj", "fc2", "w2")) and "vision" not in name else whole
