"""Extracts the recipe cell of each notebook to recipes/NN_name.py; with --check, says which files differ instead."""

from __future__ import annotations

import argparse
import json
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def repository(root: Path = ROOT) -> str:
    """The one repository URL, from pyproject.toml."""
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]["urls"]["Repository"].rstrip("/")


def heading(source: str) -> str:
    """The `# ` title of a notebook's first cell, without markup. ValueError where there is none."""
    found = re.search(r"^# +(.+?) *$", source, re.MULTILINE)
    if not found:
        raise ValueError("no `# ` title in the first cell")
    return found[1].replace("`", "")


def extract(path: Path, url: str) -> str:
    """The text of the recipe file that belongs to the notebook at `path`. ValueError unless it has exactly one recipe cell."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    found = ["".join(c["source"]) for c in cells if "recipe" in c["metadata"].get("tags", []) and c["cell_type"] == "code"]
    if len(found) != 1:
        raise ValueError(f"{path.name}: {len(found)} code cells are tagged recipe; tag exactly one")
    title = heading("".join(cells[0]["source"]))
    return (
        f"# {title}\n"
        f"# The recipe of {url}/blob/main/notebooks/{path.name}\n"
        f"# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.\n\n"
        f"{found[0].strip()}\n"
    )


def expected(root: Path = ROOT) -> dict[Path, str]:
    """Recipe file -> the text it should have, for every notebook."""
    url = repository(root)
    found = sorted((root / "notebooks").glob("*.ipynb"))
    return {root / "recipes" / f"{path.stem}.py": extract(path, url) for path in found}


def stale(root: Path = ROOT) -> list[str]:
    """What is missing, different or left over in recipes/, a line each."""
    want = expected(root)
    have = set((root / "recipes").glob("*.py"))
    wrong = [p for p, text in want.items() if p not in have or p.read_text(encoding="utf-8") != text]
    return [f"recipes/{p.name} is not what its notebook says: run `make recipes`" for p in wrong] + [
        f"recipes/{p.name} has no notebook: run `make recipes`" for p in sorted(have - set(want))
    ]


def write(root: Path = ROOT) -> list[Path]:
    """Write every recipe, remove those whose notebook is gone; returns the files written."""
    want = expected(root)
    (root / "recipes").mkdir(exist_ok=True)
    for path in set((root / "recipes").glob("*.py")) - set(want):
        path.unlink()
    for path, text in want.items():
        path.write_text(text, encoding="utf-8")
    return list(want)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where a file would change")
    if parser.parse_args().check:
        found = stale()
        print("\n".join(found) or "recipes/ is in step with notebooks/")
        return bool(found)
    print(f"wrote {len(write())} recipes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
