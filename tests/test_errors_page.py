"""docs/errors.md: every block below a heading gives the heading's message, and every cure works."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings

import pytest

from paths import ROOT

PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"(?ms)^### (.+?)$(.+?)(?=^##|\Z)", PAGE))
COLOURS = r"\x1b\[\d*m"


def literal(heading: str) -> str:
    """A heading's text without the backticks around it."""
    return heading.strip("`").strip()


def squeezed(text: str) -> str:
    """On one line, without colours and backticks (a heading in backticks cannot end in one)."""
    return " ".join(re.sub(COLOURS, "", text).replace("`", "").split())


def told(code: str, namespace: dict) -> tuple[str, Exception | None]:
    """What running `code` prints, warns and logs, with the message of the exception that ends it, and that exception."""
    out, failure = io.StringIO(), None
    library, handler = logging.getLogger("transformers"), logging.StreamHandler(out)
    library.addHandler(handler)
    with warnings.catch_warnings(record=True) as remarks, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        warnings.simplefilter("always")
        try:
            exec(code, namespace)
        except Exception as e:
            failure = e
        finally:
            library.removeHandler(handler)
    return "\n".join([out.getvalue(), *(str(r.message) for r in remarks), str(failure or "")]), failure


def test_the_page_has_sections():
    assert len(SECTIONS) >= 14
    assert len(SECTIONS) == PAGE.count("\n### ")


@pytest.mark.parametrize("heading", SECTIONS, ids=literal)
def test_the_block_gives_the_message_and_the_cure_works(heading, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, _, after = SECTIONS[heading].partition("\nCure:")
    assert after, "no cure"
    (block,), cures = (re.findall(r"```python\n(.+?)```", text, re.DOTALL) for text in (before, after))
    namespace: dict = {"__name__": "page"}
    assert squeezed(literal(heading)) in squeezed(told(block, namespace)[0])
    for cure in cures:
        said, failure = told(cure, namespace)
        assert failure is None, failure
        assert squeezed(literal(heading)) not in squeezed(said)
