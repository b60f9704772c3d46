"""The tour goes on with what works: a variant that breaks is refused in one line, and FLOP that cannot be counted are blank."""

import math

import torch
from rich.console import Console
from torch import nn

import tiny
from mmrecipes import measure, models
from mmrecipes.data import scenes
from mmrecipes.report import tour
from mmrecipes.report.comparison import Comparison
from tests import families

SCENE, QUESTION = scenes.render(scenes.make_scene(1)), "How many objects are there?"


class ReadsPast(nn.Module):
    """A connector beside whose output stands a product with a weight that is read past its layer."""

    def __init__(self, inner: nn.Module, width: int):
        super().__init__()
        self.inner, self.side = inner, nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.inner(x)
        return out + nn.functional.linear(out, self.side.weight)


def test_a_variant_that_breaks_is_refused_and_the_others_stay(tmp_path, monkeypatch):
    model = tiny.house()
    model.model.connector = ReadsPast(model.model.connector, 128)
    asked = [models.chat(model, SCENE, QUESTION)]
    variants, refused, notes = tour._variants(model, asked, math.nan, tmp_path / "out")
    assert tour.INT8 in refused and {"fp32", "bf16", tour.TWO_BIT} <= set(variants)
    assert set(variants) | set(refused) == {"fp32", "bf16", tour.INT8, tour.FOUR_BIT, tour.TWO_BIT}
    assert all("\n" not in why for why in refused.values()) and any(tour.TWO_BIT in note for note in notes)


def test_a_refused_variant_has_a_row_without_numbers():
    rows = [{"name": "fp32", "disk_mb": 3.0, "predictions": ["red"]}, {"name": "int8 dynamic: refused", "predictions": []}]
    frame = Comparison(rows, {}).frame()
    assert list(frame["variant"]) == ["fp32", "int8 dynamic: refused"] and list(frame["disk MB"]) == ["3.0", "-"]


def test_flop_are_counted_for_idefics2_and_blank_where_the_counter_fails(monkeypatch):
    model = families.FAMILIES["idefics2"]()
    inputs = models.chat(model, SCENE, QUESTION)
    learning = [p.requires_grad for p in model.parameters()]
    assert all(row["gflop"] > 0 for row in measure.stage_budget(model, inputs, 1))
    assert [p.requires_grad for p in model.parameters()] == learning
    monkeypatch.setattr("mmrecipes.measure.flops.FlopCounterMode", lambda **_: 1 / 0)
    stages = measure.stage_budget(model, inputs, 1)
    assert {"vision", "prefill", "decode"} <= {row["stage"] for row in stages} and all(row["ms"] > 0 for row in stages)
    console = Console(record=True, width=80)
    console.print(tour._stage_table(stages))
    assert "nan" not in console.export_text()
