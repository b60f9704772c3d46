"""Benchmarks take hours and are not run here; so it is checked that what they, the tools and the notebooks call is there.

Every name that they take from the package must exist, and every call of one of its functions must fit the signature.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paths import ROOT

FOLDERS = ("benchmarks", "tools", "notebooks")
FILES = sorted(p for folder in FOLDERS for p in (ROOT / folder).iterdir() if p.suffix in (".py", ".ipynb"))


def source(path: Path) -> str:
    """The code of a script, or of all code cells of a notebook; magics become comments."""
    if path.suffix == ".py":
        return path.read_text(encoding="utf-8")
    cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    return re.sub(r"^(\s*)%.*$", r"\1pass", "\n".join("".join(c["source"]) for c in cells), flags=re.MULTILINE)


def bindings(tree: ast.Module) -> tuple[dict[str, Any], list[str]]:
    """Name -> the module or object of the package that an import binds to it; and what could not be imported.

    A name that is bound to something else anywhere in the file is left out: it would take an interpreter to follow it.
    """
    found, missing = {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "mmrecipes":
                    found[alias.asname or "mmrecipes"] = importlib.import_module(alias.name if alias.asname else "mmrecipes")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mmrecipes":
            package = importlib.import_module(node.module)
            for alias in node.names:
                try:
                    inner = getattr(package, alias.name, None) or importlib.import_module(f"{node.module}.{alias.name}")
                    found[alias.asname or alias.name] = inner
                except ImportError:
                    missing.append(f"line {node.lineno}: {node.module} has no {alias.name}")
    stored = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    stored |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    stored |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    return {name: value for name, value in found.items() if name not in stored}, missing


def resolve(node: ast.expr, bound: dict[str, Any]) -> Any:
    """The object of the package that an expression like `mmr.data.questions` names; None for any other. Raises AttributeError."""
    if isinstance(node, ast.Name):
        return bound.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = resolve(node.value, bound)
        return getattr(owner, node.attr) if inspect.ismodule(owner) else None
    return None


def misfits(tree: ast.Module, bound: dict[str, Any]) -> Iterator[str]:
    for node in ast.walk(tree):
        try:
            if isinstance(node, ast.Attribute):
                resolve(node, bound)
            if not isinstance(node, ast.Call) or not callable(function := resolve(node.func, bound)):
                continue
            starred = any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords)
            given = [a for a in node.args if not isinstance(a, ast.Starred)]
            signature = inspect.signature(function)
            bind = signature.bind_partial if starred else signature.bind
            bind(*given, **{k.arg: k.value for k in node.keywords if k.arg})
        except ValueError:  # a class built in C, such as an exception, has no signature to check
            continue
        except (AttributeError, TypeError) as e:
            yield f"line {node.lineno}: {ast.unparse(node)[:80]}: {e}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_what_is_called_is_there(path):
    tree = ast.parse(source(path))
    bound, missing = bindings(tree)
    assert missing + sorted(set(misfits(tree, bound))) == []


def test_a_wrong_name_and_a_wrong_call_are_found():
    tree = ast.parse("from mmrecipes import data\ndata.questions('test', 3, colour=1)\ndata.answers\ndata.questions('test', 3)")
    bound, missing = bindings(tree)
    assert not missing and len(list(misfits(tree, bound))) == 2
    assert bindings(ast.parse("from mmrecipes.data import nothing_such"))[1] == ["line 1: mmrecipes.data has no nothing_such"]
