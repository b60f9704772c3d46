"""What every notebook must be, each rule a small function: `python tools/hygiene.py notebooks/*.ipynb`.

A rule takes the notebook and its path and yields what is wrong, in words an author can act on; nothing means fine.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4.rwbase import rejoin_lines

MAX_BYTES = 3_000_000
MAX_LINES, MAX_RECIPE_LINES, MEDIAN_LINES = 40, 80, 12  # a recipe is a program: knobs, functions, main
MIN_SOLUTIONS = 2
TAGS = {"recipe", "solution", "nbval-ignore-output"}
# a slash before the folder's name and nothing that would make it part of a web address or of a word
LOCAL_PATH = re.compile(r"(?<![\w.])/(?:home|root|work|tmp|Users|private|mnt|opt|usr)/|\b[A-Za-z]:\\")
BINARY = ("image/png", "image/jpeg", "application/pdf")  # base64: any short word may occur in it by chance


def read(path: Path) -> NotebookNode:
    """The notebook as it is in the file: nbformat.read would quietly add what is missing. ValueError if it is none."""
    content = json.loads(path.read_text(encoding="utf-8"))
    cells = content.get("cells") if isinstance(content, dict) else None
    if not isinstance(cells, list) or not all(isinstance(cell, dict) and "cell_type" in cell for cell in cells):
        raise ValueError("it has no list of cells")
    return rejoin_lines(nbformat.from_dict(content))


def code_cells(nb: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def tagged(nb: NotebookNode, tag: str) -> list[NotebookNode]:
    """The code cells with this tag."""
    return [cell for cell in code_cells(nb) if tag in cell.metadata.get("tags", [])]


def name(nb: NotebookNode, path: Path) -> Iterator[str]:
    if not re.fullmatch(r"\d\d_[a-z0-9_]+\.ipynb", path.name):
        yield "the file's name is not NN_name.ipynb, lower case"


def size(nb: NotebookNode, path: Path) -> Iterator[str]:
    if (found := path.stat().st_size) > MAX_BYTES:
        yield f"the file has {found / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:.0f}: show fewer or smaller pictures"


def file_format(nb: NotebookNode, path: Path) -> Iterator[str]:
    if (nb.get("nbformat"), nb.get("nbformat_minor")) != (4, 5):
        yield f"nbformat is {nb.get('nbformat')}.{nb.get('nbformat_minor')}, not 4.5"
    ids = [cell.get("id") for cell in nb.cells]
    if None in ids or len(set(ids)) != len(ids):
        yield "a cell has no id, or two cells share one"


def kernel(nb: NotebookNode, path: Path) -> Iterator[str]:
    if (found := nb.metadata.get("kernelspec", {}).get("name")) != "python3":
        yield f"the kernel is {found!r}, not 'python3'"


def metadata(nb: NotebookNode, path: Path) -> Iterator[str]:
    if extra := set(nb.metadata) - {"kernelspec", "language_info"}:
        yield f"notebook metadata holds {', '.join(sorted(extra))} (saved widget state?): run `make notebooks`"
    for i, cell in enumerate(nb.cells):
        if extra := set(cell.metadata) - {"tags", "jupyter"}:
            yield f"cell {i}: metadata holds {', '.join(sorted(extra))}: run `make notebooks`"


def tags(nb: NotebookNode, path: Path) -> Iterator[str]:
    found = {tag for cell in nb.cells for tag in cell.metadata.get("tags", [])}
    if extra := found - TAGS:
        yield f"tags {', '.join(sorted(extra))}: only {', '.join(sorted(TAGS))} are used, and nothing is skipped"
    if any(re.search(r"#\s*(NBVAL_|PYTEST_VALIDATE_)", cell.source) for cell in code_cells(nb)):
        yield "a cell has an NBVAL comment: use the tag nbval-ignore-output, which is counted"


def counts(nb: NotebookNode, path: Path) -> Iterator[str]:
    """A stripped or half-executed notebook would pass under nbval without testing anything."""
    cells = code_cells(nb)
    if not cells:
        yield "it has no code cell"
    if [cell.get("execution_count") for cell in cells] != list(range(1, len(cells) + 1)):
        yield "execution counts are not 1, 2, 3, ...: run `make notebooks`"
    for cell in cells:
        for output in cell.get("outputs", []):
            if output.output_type == "execute_result" and output.execution_count != cell.execution_count:
                yield f"an output of cell [{cell.execution_count}] says [{output.execution_count}]: run `make notebooks`"


def outputs(nb: NotebookNode, path: Path) -> Iterator[str]:
    if not any(cell.get("outputs") for cell in code_cells(nb)):
        yield "it has no output at all: run `make notebooks`"
    for cell in code_cells(nb):
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                yield f"cell [{cell.execution_count}] ends with {output.ename}: {output.evalue}"
            if output.get("name") == "stderr":
                yield f"cell [{cell.execution_count}] writes to stderr: {output.text.strip()[:80]!r}"


def local_paths(nb: NotebookNode, path: Path) -> Iterator[str]:
    for cell in code_cells(nb):
        for output in cell.get("outputs", []):
            data = {k: v for k, v in output.get("data", {}).items() if k not in BINARY}
            text = "\n".join(str(v) for v in (output.get("text", ""), output.get("traceback", ""), *data.values()))
            if hit := LOCAL_PATH.search(text):
                near = text[max(0, hit.start() - 10) : hit.end() + 30]
                yield f"cell [{cell.execution_count}] shows a path of the author's machine: {near!r}"


def lengths(nb: NotebookNode, path: Path) -> Iterator[str]:
    lines = [len(cell.source.splitlines()) for cell in code_cells(nb)]
    for cell, n in zip(code_cells(nb), lines, strict=True):
        limit = MAX_RECIPE_LINES if cell in tagged(nb, "recipe") else MAX_LINES
        if n > limit:
            yield f"cell [{cell.execution_count}] has {n} lines, more than {limit}: split it"
    if lines and statistics.median(lines) > MEDIAN_LINES:
        yield f"code cells have {statistics.median(lines):.0f} lines in the median, more than {MEDIAN_LINES}: one idea a cell"


def ignored(nb: NotebookNode, path: Path) -> Iterator[str]:
    n, of = len(tagged(nb, "nbval-ignore-output")), len(code_cells(nb))
    if 5 * n > of:
        yield f"{n} of {of} code cells are tagged nbval-ignore-output, more than a fifth: print what does not change"


def title(nb: NotebookNode, path: Path) -> Iterator[str]:
    first = nb.cells[0] if nb.cells else None
    if first is None or first.cell_type != "markdown" or not re.search(r"^# \S", first.source, re.MULTILINE):
        yield "the first cell is not markdown with a `# ` title"
    elif not all(f"({link}" in first.source for link in ("https://mybinder.org/v2/", "https://colab.research.google.com/")):
        yield "the first cell has no badges: put `<!-- begin:badges -->` and `<!-- end:badges -->` there and run `make notebooks`"


def exercises(nb: NotebookNode, path: Path) -> Iterator[str]:
    found = [i for i, c in enumerate(nb.cells) if c.cell_type == "markdown" and re.search(r"^## Exercises\b", c.source, re.M)]
    if not found:
        yield "it has no `## Exercises` heading"
        return
    solutions = [c for c in nb.cells[found[0] :] if c.cell_type == "code" and "solution" in c.metadata.get("tags", [])]
    if len(solutions) < MIN_SOLUTIONS:
        yield f"{len(solutions)} cells after `## Exercises` are tagged solution, fewer than {MIN_SOLUTIONS}"
    for cell in solutions:
        if not cell.get("execution_count"):
            yield "a solution is not executed: run `make notebooks`"
        if not cell.metadata.get("jupyter", {}).get("source_hidden"):
            yield f"solution [{cell.execution_count}] is not collapsed: run `make notebooks`"


def recipe(nb: NotebookNode, path: Path) -> Iterator[str]:
    found = tagged(nb, "recipe")
    if len(found) != 1:
        yield f"{len(found)} cells are tagged recipe; every notebook has exactly one"
        return
    lines = found[0].source.splitlines()
    if len(lines) > MAX_RECIPE_LINES:
        yield f"the recipe has {len(lines)} lines, more than {MAX_RECIPE_LINES}"
    try:
        body = ast.parse(found[0].source).body
    except SyntaxError as e:
        yield f"the recipe is not plain Python: {e.msg}, line {e.lineno}"
        return
    if not lines or lines[0].strip() != "import os":
        yield "the recipe does not start with `import os`"
    first = next((s for s in body if not isinstance(s, ast.Import | ast.ImportFrom)), None)
    if first is None or not re.match(r"MODEL = os\.environ\.get\('MODEL', '[^']+'\)$", ast.unparse(first)):
        yield 'the recipe\'s first statement after its imports is not MODEL = os.environ.get("MODEL", "...")'
    public = {*sys.stdlib_module_names, *importlib.metadata.packages_distributions()} - {"mmrecipes", "tests", "tools"}
    for node in (n for s in body for n in ast.walk(s)):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield "the recipe has a relative import"
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for module in names:
            if module.split(".")[0] not in public:
                yield f"the recipe imports {module}: it must run where only public libraries are installed"


def statements(nb: NotebookNode, path: Path) -> Iterator[str]:
    """One statement a line in the recipe: people copy it, read it and change it."""
    for cell in tagged(nb, "recipe"):
        try:
            nodes = list(ast.walk(ast.parse(cell.source)))
        except SyntaxError:  # `recipe` says so
            continue
        starts = [node.lineno for node in nodes if isinstance(node, ast.stmt)]
        for line in sorted({line for line in starts if starts.count(line) > 1}):
            yield f"line {line} of the recipe holds several statements: put each on its own line"
        for node in nodes:
            if isinstance(node, ast.NamedExpr):
                yield f"line {node.lineno} of the recipe assigns with `:=`: assign on a line of its own"
            pairs = [t for t in node.targets if isinstance(t, ast.Tuple)] if isinstance(node, ast.Assign) else []
            if pairs and isinstance(node.value, ast.Tuple):
                yield f"line {node.lineno} of the recipe assigns several values at once: one a line"


Check = Callable[[NotebookNode, Path], Iterable[str]]
CHECKS: tuple[Check, ...] = (
    name,
    size,
    file_format,
    kernel,
    metadata,
    tags,
    counts,
    outputs,
    local_paths,
    lengths,
    ignored,
    title,
    exercises,
    recipe,
    statements,
)


def problems(path: Path, checks: Iterable[Check] = CHECKS) -> list[str]:
    """Everything that is wrong with the notebook at `path`, a line each."""
    try:
        nb = read(path)
    except ValueError as e:
        return [f"{path.name}: not a notebook: {e}"]
    return [f"{path.name}: {problem}" for check in checks for problem in check(nb, path)]


def main(paths: list[str]) -> int:
    if not paths:
        print("usage: python tools/hygiene.py notebooks/*.ipynb", file=sys.stderr)
        return 2
    found = [problem for path in paths for problem in problems(Path(path))]
    print("\n".join(found) if found else f"{len(paths)} notebooks are clean")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
