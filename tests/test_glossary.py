"""docs/glossary.md is in alphabetical order, and each term is in the text of the notebook that it names."""

from __future__ import annotations

import json
import re

import pytest

from paths import ROOT

PAGE = ROOT / "docs" / "glossary.md"
ROW = re.compile(r"^\| \*\*(?P<term>.+?)\*\* \| (?P<meaning>.+?) \| \[[^\]]+\]\((?P<link>[^)]+)\) \| (?P<notebook>\d\d) \|$")
LINES = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| **")]
ENTRIES = [match.groupdict() for match in map(ROW.match, LINES) if match]


def plain(text: str) -> str:
    """Lower case, without emphasis, hyphens and line ends."""
    return " ".join(text.replace("*", "").replace("-", " ").lower().split())


def forms(entry: dict[str, str]) -> list[str]:
    """The term, and its abbreviation where the meaning begins with one: `GQA: several query heads ...`."""
    short = re.match(r"([A-Z][\w@]+): ", entry["meaning"])
    return [plain(form) for form in (entry["term"], *(short.groups() if short else ()))]


def told(number: str) -> str:
    """The markdown of notebook `number`; without it, nothing."""
    found = []
    for path in (ROOT / "notebooks").glob(f"{number}_*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        found += ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    return plain("\n".join(found))


def test_every_line_has_all_its_columns():
    assert len(ENTRIES) == len(LINES) >= 60
    assert all(entry["link"].startswith("https://") for entry in ENTRIES)


def test_terms_are_in_alphabetical_order():
    terms = [re.sub(r"[^a-z0-9: ]", "", plain(entry["term"])) for entry in ENTRIES]
    assert terms == sorted(set(terms))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e["term"])
def test_the_notebook_has_the_term(entry):
    text = told(entry["notebook"])
    assert any(form in text for form in forms(entry)), f"notebook {entry['notebook']} does not say {entry['term']!r}"


def test_the_readme_links_here():
    assert "](docs/glossary.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_term_that_is_not_there_is_found():
    assert forms({"term": "grouped-query attention", "meaning": "GQA: several heads."}) == ["grouped query attention", "gqa"]
    assert "quantum entanglement" not in told("10")
    assert told("99") == ""
