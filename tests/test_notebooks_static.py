"""Every notebook keeps the rules of tools/hygiene.py, and every rule catches a notebook that was broken on purpose."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import hygiene
import run_notebooks
from mmrecipes import measure
from paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BADGES = (
    "<!-- begin:badges -->\n[![b](x.svg)](https://mybinder.org/v2/gh/a/b/main)\n"
    "[![c](y.svg)](https://colab.research.google.com/github/a/b)\n<!-- end:badges -->"
)
RECIPE = 'import os\n\nimport torch\n\nMODEL = os.environ.get("MODEL", "data/models/mini-vlm")\nprint(torch.ones(1))'


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("check", hygiene.CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path, check):
    assert hygiene.problems(path, [check]) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_was_measured(path):
    rows = {row["name"]: row for row in json.loads(run_notebooks.RESULT.read_text())["rows"]}
    row = rows[path.stem]
    assert 1 < row["seconds"] < 180
    assert 50 < row["kernel_mb"] <= row["peak_mb"] < 1800
    assert row["environment"]["cpu"]


# ---- each rule catches what it is for


def good() -> nbformat.NotebookNode:
    """A small notebook without a fault."""

    def code(n: int, source: str, *tags: str) -> nbformat.NotebookNode:
        cell = new_code_cell(source, execution_count=n, outputs=[new_output("stream", text=f"value {n}\n")])
        cell.metadata = {"tags": list(tags)} if tags else {}
        if "solution" in tags:
            cell.metadata["jupyter"] = {"source_hidden": True}
        return cell

    cells = [new_markdown_cell(f"# Is this one fine?\n\n{BADGES}")]
    cells += [code(i, f"print('value {i}')") for i in range(1, 5)]
    cells += [code(5, "import time\nprint(time.time())", "nbval-ignore-output"), code(6, RECIPE, "recipe")]
    cells += [new_markdown_cell("## Exercises\n\n1. One.\n2. Two."), code(7, "1 + 1", "solution"), code(8, "2 + 2", "solution")]
    result = new_output("execute_result", {"text/plain": "2", "image/png": "aa/tmp/bb"}, execution_count=7)
    cells[-2].outputs = [result]
    spec = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nb = new_notebook(cells=cells, metadata=spec)
    nb.nbformat_minor = 5
    return nb


def written(nb: nbformat.NotebookNode, folder: Path, name: str = "10_fine.ipynb") -> Path:
    """As it is: nbformat.write would mend it."""
    path = folder / name
    path.write_text(json.dumps(nb), encoding="utf-8")
    return path


def test_a_good_notebook_has_no_problem(tmp_path):
    assert hygiene.problems(written(good(), tmp_path)) == []


def code(nb, i: int):
    return hygiene.code_cells(nb)[i]


def out(nb, i: int, text: str) -> None:
    code(nb, i).outputs = [new_output("stream", text=text)]


def tag(nb, i: int, *tags: str) -> None:
    code(nb, i).metadata["tags"] = list(tags)


def retitle(nb, source: str) -> None:
    nb.cells[0].source = source


def recipe_line(nb, old: str, new: str) -> None:
    cell = hygiene.tagged(nb, "recipe")[0]
    assert old in cell.source
    cell.source = cell.source.replace(old, new)


BROKEN = {  # what is broken -> (the rule that must catch it, how to break the good notebook)
    "too large": (hygiene.size, lambda nb: out(nb, 0, "x" * 3_000_001)),
    "nbformat 4.4": (hygiene.file_format, lambda nb: nb.update(nbformat_minor=4)),
    "a cell without id": (hygiene.file_format, lambda nb: nb.cells[1].pop("id")),
    "two cells with one id": (hygiene.file_format, lambda nb: nb.cells[1].update(id=nb.cells[2].id)),
    "another kernel": (hygiene.kernel, lambda nb: nb.metadata.kernelspec.update(name="my-env")),
    "no kernel": (hygiene.kernel, lambda nb: nb.metadata.pop("kernelspec")),
    "widget state": (hygiene.metadata, lambda nb: nb.metadata.update(widgets={"state": {}})),
    "cell metadata": (hygiene.metadata, lambda nb: code(nb, 0).metadata.update(execution={"iopub.status.busy": "now"})),
    "a skipped cell": (hygiene.tags, lambda nb: tag(nb, 0, "nbval-skip")),
    "an expected exception": (hygiene.tags, lambda nb: tag(nb, 0, "nbval-raises-exception")),
    "a comment that ignores": (hygiene.tags, lambda nb: code(nb, 0).update(source="# NBVAL_IGNORE_OUTPUT\nprint(1)")),
    "stripped": (hygiene.counts, lambda nb: [cell.update(execution_count=None) for cell in hygiene.code_cells(nb)]),
    "executed twice": (hygiene.counts, lambda nb: code(nb, 3).update(execution_count=9)),
    "out of order": (hygiene.counts, lambda nb: (code(nb, 0).update(execution_count=2), code(nb, 1).update(execution_count=1))),
    "an output of another run": (hygiene.counts, lambda nb: code(nb, 6).outputs[0].update(execution_count=3)),
    "no code": (hygiene.counts, lambda nb: nb.update(cells=nb.cells[:1])),
    "no outputs": (hygiene.outputs, lambda nb: [cell.update(outputs=[]) for cell in hygiene.code_cells(nb)]),
    "an error": (
        hygiene.outputs,
        lambda nb: code(nb, 0).outputs.append(new_output("error", ename="ValueError", evalue="no", traceback=["no"])),
    ),
    "stderr": (hygiene.outputs, lambda nb: code(nb, 0).outputs.append(new_output("stream", name="stderr", text="Warning"))),
    "a home path": (hygiene.local_paths, lambda nb: out(nb, 0, "saved to /home/ann/model")),
    "a path in quotes": (hygiene.local_paths, lambda nb: out(nb, 0, "PosixPath('/tmp/x')")),
    "a file url": (hygiene.local_paths, lambda nb: out(nb, 0, "file:///Users/ann/x")),
    "a Windows path": (hygiene.local_paths, lambda nb: out(nb, 0, "C:\\Users\\ann")),
    "a path in html": (
        hygiene.local_paths,
        lambda nb: code(nb, 0).update(outputs=[new_output("display_data", {"text/html": "<b>/root/x</b>"})]),
    ),
    "a long cell": (hygiene.lengths, lambda nb: code(nb, 0).update(source="a = 1\n" * 41)),
    "long cells": (hygiene.lengths, lambda nb: [cell.update(source="a = 1\n" * 13) for cell in hygiene.code_cells(nb)]),
    "a fifth ignored": (hygiene.ignored, lambda nb: tag(nb, 0, "nbval-ignore-output")),
    "no title": (hygiene.title, lambda nb: retitle(nb, f"## Small\n\n{BADGES}")),
    "no badges": (hygiene.title, lambda nb: retitle(nb, "# A title")),
    "code first": (hygiene.title, lambda nb: nb.cells.pop(0)),
    "no exercises": (hygiene.exercises, lambda nb: nb.cells[7].update(source="## Questions")),
    "no solutions": (hygiene.exercises, lambda nb: (tag(nb, 6), tag(nb, 7))),
    "solutions before the exercises": (hygiene.exercises, lambda nb: nb.cells.append(nb.cells.pop(7))),
    "a solution not executed": (hygiene.exercises, lambda nb: code(nb, 7).update(execution_count=None)),
    "a solution in the open": (hygiene.exercises, lambda nb: code(nb, 7).metadata.pop("jupyter")),
    "no recipe": (hygiene.recipe, lambda nb: tag(nb, 5)),
    "two recipes": (hygiene.recipe, lambda nb: tag(nb, 0, "recipe")),
    "a long recipe": (hygiene.recipe, lambda nb: recipe_line(nb, RECIPE, RECIPE + "\nprint(1)" * 75)),
    "a recipe that imports us": (hygiene.recipe, lambda nb: recipe_line(nb, "import torch", "import mmrecipes as mmr")),
    "a recipe that imports a room": (hygiene.recipe, lambda nb: recipe_line(nb, "import torch", "from mmrecipes.data import x")),
    "a recipe that imports us late": (
        hygiene.recipe,
        lambda nb: recipe_line(nb, "print(", "def f():\n    import mmrecipes\nprint("),
    ),
    "a recipe that imports a neighbour": (
        hygiene.recipe,
        lambda nb: recipe_line(nb, "import torch", "import helpers_nobody_has"),
    ),
    "a relative import": (hygiene.recipe, lambda nb: recipe_line(nb, "import torch", "from . import models")),
    "a recipe with a fixed model": (
        hygiene.recipe,
        lambda nb: recipe_line(nb, 'os.environ.get("MODEL", "data/models/mini-vlm")', '"x"'),
    ),
    "a recipe that starts otherwise": (hygiene.recipe, lambda nb: recipe_line(nb, "import os\n", "import json\nimport os\n")),
    "two statements on a line": (hygiene.statements, lambda nb: recipe_line(nb, "print(", "a = 1; print(")),
    "a body behind its colon": (hygiene.statements, lambda nb: recipe_line(nb, "print(", "if torch: print(")),
    "a walrus": (hygiene.statements, lambda nb: recipe_line(nb, "torch.ones(1)", "(x := torch.ones(1))")),
    "several values at once": (hygiene.statements, lambda nb: recipe_line(nb, "print(", "a, b = 1, 2\nprint(")),
    "a long recipe cell": (hygiene.lengths, lambda nb: recipe_line(nb, RECIPE, RECIPE + "\nprint(1)" * 75)),
    "a recipe with a magic": (hygiene.recipe, lambda nb: recipe_line(nb, "import torch", "%matplotlib inline")),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_notebook_is_caught(tmp_path, fault):
    check, breaks = BROKEN[fault]
    nb = copy.deepcopy(good())
    assert list(check(nb, written(nb, tmp_path))) == []
    breaks(nb)
    assert list(check(nb, written(nb, tmp_path)))  # not through problems(), where an unreadable file is a problem too


def test_a_recipe_may_be_longer_than_other_cells_and_unpack_a_result(tmp_path):
    nb = good()
    recipe_line(nb, "print(", "a, b = torch.ones(2)\n" + "print(1)\n" * 73 + "print(")
    assert len(hygiene.tagged(nb, "recipe")[0].source.splitlines()) == hygiene.MAX_RECIPE_LINES
    assert hygiene.problems(written(nb, tmp_path)) == []


@pytest.mark.parametrize("name", ["fine.ipynb", "1_fine.ipynb", "10-fine.ipynb", "10_Fine.ipynb"])
def test_a_wrong_name_is_caught(tmp_path, name):
    assert hygiene.problems(written(good(), tmp_path, name), [hygiene.name])


def test_every_rule_has_a_broken_notebook():
    assert {check for check, _ in BROKEN.values()} | {hygiene.name} == set(hygiene.CHECKS)


@pytest.mark.parametrize("text", ["", "not json", "[]", '{"nbformat": 4}'])
def test_what_is_no_notebook_is_one_problem(tmp_path, text):
    path = tmp_path / "10_fine.ipynb"
    path.write_text(text)
    (problem,) = hygiene.problems(path)
    assert problem.startswith("10_fine.ipynb: not a notebook")


def test_web_addresses_and_words_are_no_local_paths(tmp_path):
    nb = good()
    out(nb, 0, "https://example.org/home/x and and/or a/tmp/b, 10:\\ratio")
    assert hygiene.problems(written(nb, tmp_path), [hygiene.local_paths]) == []


def test_main_says_what_is_wrong_and_exits_with_1(tmp_path, capsys):
    nb = good()
    out(nb, 0, "/tmp/x")
    assert hygiene.main([str(written(nb, tmp_path))]) == 1
    assert "10_fine.ipynb: cell [1] shows a path" in capsys.readouterr().out
    assert hygiene.main([str(written(good(), tmp_path))]) == 0
    assert hygiene.main([]) == 2


# ---- executing notebooks


def test_the_kernel_is_this_environment():
    from jupyter_client import KernelManager

    command = KernelManager(kernel_name="python3").format_kernel_cmd()
    assert Path(command[0]).parent == Path(sys.executable).parent
    assert "ipykernel_launcher" in command


def test_execute_in_place(tmp_path):
    nb = good()
    for cell in hygiene.code_cells(nb):
        cell.update(execution_count=None, outputs=[])
        cell.metadata.pop("jupyter", None)
        cell.metadata["collapsed"] = False
    nb.metadata["widgets"] = {"state": {}}
    code(nb, 0).source = "block = bytearray(150_000_000)\nblock[::4096] = bytes(len(block[::4096]))\nprint(len(block))\ndel block"
    code(nb, 1).source = (
        "import subprocess, sys\n"
        # three seconds are long enough to be seen by the poll of 0.1 s, on a busy machine, too
        "hold = 'import time; x = bytearray(300_000_000); x[::4096] = bytes(len(x[::4096])); time.sleep(3)'\n"
        "print(subprocess.run([sys.executable, '-c', hold]).returncode)"
    )
    code(nb, 5).source = RECIPE.replace("torch", "json").replace("json.ones(1)", "json.dumps(1)")
    row = run_notebooks.execute(path := written(nb, tmp_path))
    assert hygiene.problems(path) == []
    done = hygiene.read(path)
    assert code(done, 0).outputs[0].text == "150000000\n"
    assert code(done, 1).outputs[0].text == "0\n"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert row["name"] == "10_fine"
    assert row["seconds"] > 1
    assert row["kernel_mb"] > 150
    assert row["peak_mb"] > 300  # the child's memory counts while it lives
    assert row["peak_mb"] > row["kernel_mb"]


def test_a_notebook_that_fails_is_left_as_it_was(tmp_path):
    nb = good()
    code(nb, 2).source = "raise ValueError('broken here')"
    before = (path := written(nb, tmp_path)).read_bytes()
    with pytest.raises(CellExecutionError, match="broken here"):
        run_notebooks.execute(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_record_replaces_only_its_own_row(tmp_path):
    path = tmp_path / "results" / "notebooks.json"
    for name, seconds in (("11_b", 1.0), ("10_a", 2.0), ("11_b", 3.0)):
        run_notebooks.record({"name": name, "seconds": seconds}, measure.environment(), path)
    rows = json.loads(path.read_text())["rows"]
    assert [(r["name"], r["seconds"]) for r in rows] == [("10_a", 2.0), ("11_b", 3.0)]
    assert all(r["environment"]["cpu"] and r["environment"]["date"] for r in rows)
