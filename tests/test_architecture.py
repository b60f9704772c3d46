"""The structure of the package: who imports whom, how large a file may be, and which names are taken."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from paths import ROOT

PACKAGE = ROOT / "mmrecipes"
# each imports only those before it; those in one row do not import one another
LAYERS = (
    ("errors", "interrupt", "lazy"),
    ("quiet",),
    ("track",),
    ("families",),
    ("models",),
    ("data", "inference"),
    ("evaluate", "measure"),
    ("quantize",),
    ("prune", "train", "export"),
    ("report",),
    ("distill", "shrink"),
    ("mini", "serve"),
    ("cli",),
)
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}
CORE = ("models", "data", "evaluate", "measure")
EXAMPLES = PACKAGE / "shrink" / "examples"  # copied beside a model, where the package may be missing
FILES = sorted(p for p in PACKAGE.rglob("*.py") if EXAMPLES not in p.parents)
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
READERS = [p for folder in ("benchmarks", "tools", "recipes", "notebooks") for p in (ROOT / folder).glob("*.*")]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """The modules of the package that `path` imports, local and type-checking imports included."""
    known = {module_name(p) for p in FILES}
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "mmrecipes")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mmrecipes":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module


def top(module: str) -> str:
    """The subpackage, or the file beside the subpackages, that a module lies in."""
    return module.split(".")[1] if "." in module else module


def line_count(paths: list[Path]) -> int:
    return sum(len(p.read_text(encoding="utf-8").splitlines()) for p in paths)


def test_every_subpackage_has_a_layer():
    found = {p.stem if p.is_file() else p.name for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert found - {"__init__"} == set(RANK)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_one_way(path):
    own = top(module_name(path))
    if own == "mmrecipes":  # the package's own __init__ imports lazily
        assert set(imports(path)) <= {"mmrecipes.lazy"}
        return
    for module in imports(path):
        other = top(module)
        assert other == own or RANK[other] < RANK[own], f"{module_name(path)} imports {module}"


def test_no_import_circles():
    graph = {module_name(p): set(imports(p)) for p in FILES}
    finished: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module in finished:
            return
        for other in graph.get(module, ()):
            visit(other, (*trail, module))
        finished.add(module)

    for module in graph:
        visit(module, ())


def test_no_import_by_string():
    """An import by name hides an edge of the graph. Two places need one: lazy exports, and a fresh process that unpickles."""
    users = [module_name(p) for p in FILES if "import_module(" in p.read_text(encoding="utf-8")]
    assert set(users) <= {"mmrecipes.lazy", "mmrecipes.measure.memory"}


def test_no_submodule_is_named_like_a_function_of_its_package():
    """After `import mmrecipes.models.loading` the name `models.loading` is the module, whatever the package exports."""
    for package in {p.parent for p in FILES if p.name == "__init__.py"}:
        submodules = {p.stem for p in package.glob("*.py")} | {p.name for p in package.iterdir() if p.is_dir()}
        functions = {
            node.name
            for p in package.glob("*.py")
            for node in TREES.get(p, ast.Module([], [])).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
        assert not submodules & functions, package


def test_inference_needs_no_pytorch():
    code = "import sys; sys.modules.update(torch=None, torchao=None)\nfrom mmrecipes.inference import backends, exported"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, mmrecipes; print(*{'torch', 'transformers', 'numpy', 'PIL', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_sizes():
    """The notebooks are the book; the package behind them stays thin."""
    core = [p for p in FILES if top(module_name(p)) in CORE]
    assert line_count(core) <= 2_500
    # 168 of them for checkpoints in the format of vLLM, 1,060 for serving (20 for its page, 30 to predict it), 320 for GenAI
    assert line_count(sorted(PACKAGE.rglob("*.py"))) <= 16_750
    for path in FILES:
        assert line_count([path]) <= 300, path


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_functions_are_short_and_take_few_arguments(path):
    for node in ast.walk(TREES[path]):
        if not isinstance(node, ast.FunctionDef):
            continue
        assert node.end_lineno - node.lineno < 60, f"{node.name} has more than 60 lines"
        arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        arguments = [a for a in arguments if a not in ("self", "cls")]
        # a command's options, and signatures that a library prescribes, are not ours to choose
        prescribed = path.name == "cli.py" or node.name in ("attend", "scaled_dot_product_attention")
        prescribed |= path.name.startswith("modeling_") and node.name == "forward"
        assert prescribed or len(arguments) <= 6, f"{node.name}{arguments}"


def test_every_public_function_is_used():
    """By another module, a command, a benchmark, a tool or a notebook: what nobody calls does not belong here."""
    texts = {p: p.read_text(encoding="utf-8") for p in (*FILES, *READERS, *EXAMPLES.glob("*.py")) if p.is_file()}
    words = {p: set(re.findall(r"\w+", text)) for p, text in texts.items() if p.name != "__init__.py"}
    unused = []
    for path, tree in TREES.items():
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_") or path.name == "cli.py":
                continue
            elsewhere = any(node.name in found for p, found in words.items() if p != path)
            within = node.name == "lazy_exports" or len(re.findall(rf"\b{node.name}\b", texts[path])) > 1
            if not elsewhere and not within:
                unused.append(f"{module_name(path)}.{node.name}")
    assert not unused


WATCHED = """
import sys, time
said = []
sys.addaudithook(lambda event, args: said.append(event) if event in ("os.fork", "socket.connect") else None)
import mmrecipes
import openvino
time.sleep(1)  # OpenVINO's reports are sent from a thread
print(said, sys.modules['openvino_telemetry'])
"""


def test_openvino_reports_nothing_to_its_maker() -> None:
    env = {k: v for k, v in os.environ.items() if k not in ("CI", "TF_BUILD", "JENKINS_URL")}  # there it is silent by itself
    done = subprocess.run([sys.executable, "-c", WATCHED], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "[] None", done.stdout + done.stderr
