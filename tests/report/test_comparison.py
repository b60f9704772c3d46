"""Comparison tables: what they hold, how they print, and that broken models get no row."""

import json

import pytest
import torch

from mmrecipes import data, evaluate, models, quantize, report
from mmrecipes.errors import ParityError, UserError


@pytest.fixture(scope="module")
def model():
    return models.load("mini-vlm")


@pytest.fixture(scope="module")
def found(model):
    rows = data.test_split(40)
    return report.compare(rows, fp32=model, same=models.clone(model), two=quantize.simulate(model, 2, "tensor"))


def test_every_variant_has_one_row_with_accuracy_time_and_memory(found):
    assert [r["name"] for r in found.rows] == ["fp32", "same", "two"]
    for row in found.rows:
        assert row["accuracy"].n == 40 and row["ttft_ms"] > 0 and row["tokens_per_s"] > 0
        assert row["peak_mb"] > 100 and row["disk_mb"] > 5
    assert found.rows[1]["change"].points == 0 and found.rows[2]["change"].points < 0


def test_it_prints_as_text_html_and_rich(found):
    from rich.console import Console

    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(found)
    printed = console.export_text()
    for shown in (str(found), found._repr_html_(), printed):
        assert "fp32" in shown and "TTFT" in shown and "n=40" in shown
    lines = [line.split() for line in printed.splitlines()]
    for row in found.rows:  # in 80 columns, no cell is broken
        assert any({row["name"], f"{100 * row['accuracy'].value:.1f}", f"{row['disk_mb']:.1f}"} <= set(line) for line in lines)
    assert found._repr_html_().count("<tr") == 4


def test_the_plot_has_axes_with_units_and_one_point_a_row(found):
    axes = found.plot().axes[0]
    assert axes.get_xlabel().endswith("(ms)") and axes.get_ylabel() == "accuracy (%)"
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["fp32", "same", "two"]


def test_saved_json_reads_back_with_environment(found, tmp_path):
    saved = json.loads(found.save(tmp_path / "sub" / "x.json").read_text())
    assert saved["rows"][0]["accuracy"]["n"] == 40
    assert {"cpu", "threads", "torch", "commit", "date"} <= set(saved["environment"])
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["x.json"]


def test_an_unwritable_place_is_one_line(found, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file"):
        found.save(tmp_path / "file" / "x.json")


def test_without_answers_agreement_stands_for_accuracy(model):
    rows = data.image_rows([(str(i), r["image"]) for i, r in enumerate(data.test_split(6))], "How many objects are there?")
    found = report.compare(rows, timed=False, fp32=model, same=models.clone(model))
    assert found.rows[1]["agreement"].value == 1 and "accuracy" not in found.rows[0]
    assert "agreement [95%]" in str(found)


def test_a_slow_variant_answers_fewer_questions_and_says_so(model):
    found = report.compare(data.test_split(200), timed=False, seconds=0.01, fp32=model)
    assert found.rows[0]["accuracy"].n == 10 and "answered 10 of 200" in found.notes[0]


def test_broken_is_not_lossy(model):
    rows = data.test_split(10)
    broken = models.clone(model)
    with torch.no_grad():
        next(m for _, m in models.linears(broken)).weight[0, 0] = float("inf")
    with pytest.raises(ParityError, match="not finite"):
        report.compare(rows, timed=False, fp32=model, broken=broken)
    # a runtime that computes something else than its simulation: finite, plausible, wrong
    wrong = quantize.dynamic_int8(quantize.simulate(model, 2, "tensor"))
    with pytest.raises(ParityError, match="broken, not lossy"):
        report.compare(rows, timed=False, simulated={"int8": quantize.simulate_dynamic_int8(model)}, fp32=model, int8=wrong)
    lossy = report.compare(rows, timed=False, fp32=model, two=quantize.simulate(model, 2, "tensor"))
    assert isinstance(lossy.rows[1]["accuracy"], evaluate.Share)


def test_compare_needs_a_model():
    with pytest.raises(UserError, match="no model given"):
        report.compare(data.test_split(5))
