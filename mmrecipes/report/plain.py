"""Plain text that can be pasted into an issue: tables and paragraphs of at most 100 columns, in which no name is ever cut."""

import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence

WIDTH = 100


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A title, a head and rows below each other. Columns are as wide as their longest cell, but for the last, which wraps."""
    cells = [[str(c) for c in row] for row in (head, *rows)]
    lines = [title, "-" * len(title)]
    numeric = [all(row[i][:1].isdigit() or row[i] == "-" for row in cells[1:]) for i in range(len(head))]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for row in cells:
        padded = [c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric, strict=True)]
        start = "  ".join([*padded[:-1], ""])
        last = padded[-1] if numeric[-1] else row[-1]
        lines += [start + last] if numeric[-1] else paragraph(last, start, " " * len(start)).splitlines() or [start.rstrip()]
    return "\n".join(lines)


def paragraph(text: str, start: str = "", indent: str = "") -> str:
    """`text` in lines of at most `WIDTH` columns, the first behind `start`, the others behind `indent`; long names stay whole."""
    width = min(WIDTH, shutil.get_terminal_size().columns) if sys.stdout.isatty() else WIDTH
    whole = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(text, width, initial_indent=start, subsequent_indent=indent, **whole).rstrip()


def section(title: str, paragraphs: Iterable[str]) -> str:
    """A title, and a list of paragraphs below it."""
    return "\n".join([title, "-" * len(title), *(paragraph(p, "- ", "  ") for p in paragraphs)])


def findings(rows: Iterable[Sequence[str]]) -> str:
    """What stands in the way: technique, where, what and cure of each row of `doctor.finding_rows`."""
    found = [f"{technique}: {where}: {what}. Cure: {cure}" for technique, where, what, cure in rows]
    return section("What stands in the way", found or ["nothing"])
