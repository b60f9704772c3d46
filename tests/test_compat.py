"""The matrix of families: what its page says, and that a cell which ends its process costs that cell alone."""

import subprocess
import sys

import compat
import compat_cells


def test_a_refusal_is_a_cell_with_its_sentence_and_no_path():
    cell = compat_cells.cell("ask", compat_cells.Subject("siglip"))
    assert cell["result"] == "refused"
    assert "compares images with texts" in cell["sentence"]
    refused = compat_cells.cell("load", compat_cells.Subject("lfm2_vl"))
    assert refused["sentence"].startswith("lfm2_vl: the processor cannot be made")


def test_a_process_that_ends_early_is_told(tmp_path):
    out = tmp_path / "cells.json"
    out.write_text("{}")
    process = subprocess.Popen([sys.executable, "-c", "import os; os._exit(3)"])
    assert compat._wait(process, out) == "the process ended with code 3"


def test_the_same_sentence_is_a_note_once():
    refused = {"result": "refused", "error": None, "sentence": "no"}
    works = {"result": "works", "error": 1.23e-6, "sentence": None}
    environment = {"cpu": "a CPU", "capabilities": ["avx2"], "threads": 1, "date": "2026-01-01T00:00", "commit": "abc"}
    cells = {"columns": ["load", "onnx"], "families": {"one": {"load": works, "onnx": refused}, "two": {"load": refused}}}
    text = compat.page(cells | {"environment": environment, "versions": {"torch": "2"}})
    assert "| one | yes 1e-06 | refused [1] |\n| two | refused [1] | - |" in text
    assert text.count("1. no") == 1
