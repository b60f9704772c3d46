"""The examples in the docstrings of the core run, and each public function has one."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import inspect
import io
from pathlib import Path

import pytest
import torch

import mmrecipes as mmr
from mmrecipes.data import scenes
from paths import ROOT

WINGS = ("models", "data", "evaluate", "measure")
FILES = [p for wing in WINGS for p in sorted((ROOT / "mmrecipes" / wing).glob("*.py")) if p.stem != "__init__"]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.fixture(scope="module")
def given() -> dict:
    """What examples may use without importing it: said in `mmrecipes.models`."""
    found = {"mmr": mmr, "torch": torch, "nn": torch.nn, "scenes": scenes, "data_dir": mmr.models.data_dir}
    model, rows = mmr.load("mini-vlm"), mmr.data.test_split(4)
    inputs = mmr.models.chat(model, rows[0]["image"], rows[0]["question"])
    return found | {"model": model, "rows": rows, "inputs": inputs, "dual": mmr.load("mini-siglip")}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_examples_run(path, given, tmp_path):
    module = importlib.import_module(name_of(path))
    threads, said = torch.get_num_threads(), io.StringIO()
    for i, example in enumerate(doctest.DocTestFinder().find(module, extraglobs=given)):
        example.globs["folder"] = tmp_path / str(i)
        example.globs["folder"].mkdir()
        with contextlib.redirect_stderr(io.StringIO()):
            doctest.DocTestRunner(verbose=False, optionflags=doctest.IGNORE_EXCEPTION_DETAIL).run(example, out=said.write)
    torch.set_num_threads(threads)
    assert not said.getvalue()


@pytest.mark.parametrize("wing", WINGS)
def test_each_function_that_a_subpackage_exports_has_an_example(wing):
    package = importlib.import_module(f"mmrecipes.{wing}")
    functions = [f for f in (getattr(package, name) for name in package.__all__) if inspect.isfunction(f)]
    assert [f.__name__ for f in functions if ">>> " not in f.__doc__] == []
