"""Pieces of a self-contained HTML page: the page itself, tables, inline images, the line that names the hardware."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:.5rem 0}th,td{padding:.3rem .7rem;border-bottom:1px solid #ccc;text-align:right;"
    "vertical-align:top}th:first-child,td:first-child{text-align:left}.text td,.text th{text-align:left}"
    "figure{display:inline-block;width:12.5rem;margin:0 .8rem 1rem 0;vertical-align:top}figure img{max-width:11rem;"
    "max-height:11rem;border:1px solid #ccc}figcaption{font-size:.85rem;overflow-wrap:anywhere}.differs{color:#a00}"
    ".verdict{font-size:1.15rem;border-left:.3rem solid #2a6;padding:.4rem 1rem;background:#f3f8f5}.wide{max-width:100%}"
    "pre{background:#f5f5f5;padding:.8rem;overflow-x:auto}small{color:#555}"
)


def document(title: str, *body: str) -> str:
    """A whole page that needs no other file."""
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en">{head}{"".join(body)}</html>\n'


def png(figure, kind: str = "") -> str:
    """A matplotlib figure as an HTML image that carries its own bytes; `kind` is its class."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return _inline(buffer, "plot", kind)


def figure_tag(image, lines: Sequence[tuple[str, str, bool]], question: str) -> str:
    """A PIL image, at most 512 px a side, over a question and lines of (label, answer, differs): the latter in red."""
    small, buffer = image.convert("RGB"), io.BytesIO()
    small.thumbnail((512, 512))
    small.save(buffer, "PNG")
    text = [html.escape(question)]
    for label, answer, differs in lines:
        kind = ' class="differs"' if differs else ""
        text.append(f"<span{kind}>{html.escape(label)}: <b>{html.escape(answer)}</b></span>")
    return f"<figure>{_inline(buffer, 'image')}<figcaption>{'<br>'.join(text)}</figcaption></figure>"


def _inline(buffer: io.BytesIO, alt: str, kind: str = "") -> str:
    return f'<img class="{kind}" alt="{alt}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def html_table(head: Sequence[str] | None, rows: Sequence[Sequence[object]], kind: str = "") -> str:
    """Rows of cells under headings; the class "text" aligns all columns to the left."""
    top = "" if head is None else "<tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in head) + "</tr>"
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="{kind}">{top}{body}</table>'


def hardware(env: dict[str, Any]) -> str:
    """One line of hardware, date and commit, from `measure.environment()`."""
    commit = (env.get("commit") or "no repository")[:18]
    return f"{env['cpu']}, {env['threads']} threads, torch {env['torch']}, {env['date'][:10]}, commit {commit}"
