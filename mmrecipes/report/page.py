"""Self-contained HTML pages from the templates beside this file: every image carries its own bytes."""

import base64
import io
from typing import Any


def render(template: str, **values: Any) -> str:
    """The page of `template` ("tour.html", "shrink.html") filled with `values`, escaped; needs no other file."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("mmrecipes.report")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["inline"] = inline
    return environment.get_template(template).render(**values)


def inline(picture: Any) -> str:
    """A matplotlib figure, or a PIL image at most 512 px a side, as a data URL."""
    buffer = io.BytesIO()
    if hasattr(picture, "savefig"):
        picture.savefig(buffer, format="png", dpi=120)
    else:
        small = picture.convert("RGB")
        small.thumbnail((512, 512))
        small.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def hardware(env: dict[str, Any]) -> str:
    """One line of hardware, date and commit, from `measure.environment()`."""
    commit = (env.get("commit") or "no repository")[:18]
    return f"{env['cpu']}, {env['threads']} threads, torch {env['torch']}, {env['date'][:10]}, commit {commit}"
