"""One view of the model that is shrunk, computed once and handed on: its parts, units and bytes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from mmrecipes.models import modules
from mmrecipes.quantize import mixed_precision


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
    def blocks(self) -> int:
        """Numbered blocks of layers."""
        return len({modules.block_of(name) for name, _ in modules.linears(self.model)})

    @property
    def high(self) -> int:
        """Bits of a unit that does not have 4."""
        return 16 if self.runtime == "torch" else 8

    def plan(self, four: list[str] | set[str] = ()) -> dict[str, int]:
        """The plan {unit: bits} with 4 bits in the units of `four`."""
        return {unit: 4 if unit in four else self.high for unit in self.units}

    def module_bits(self, plan: Mapping[str, int]) -> dict[str, int]:
        """A plan a module instead of a unit."""
        return {name: bits for unit, bits in plan.items() for name in self.units[unit]}
