"""The experiment record: runs that trackio keeps in a SQLite file, where `--track` or MMRECIPES_TRACK=1 asks for it.

Rows go to trackio's storage itself, not through its background thread: what was logged survives a kill, and nothing connects to
anywhere. The file lies in TRACKIO_DIR, by default where trackio puts it. `mmrecipes runs` lists it, `trackio show` draws it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrecipes.errors import one_line, require

VARIABLE, PROJECT = "MMRECIPES_TRACK", "mmrecipes"
OLDEST = (0, 43)  # with Pillow 13 pip takes 0.0.6, which has another storage, instead of saying that they do not go together
Config = Callable[[], Mapping[str, Any]]  # only called where something is tracked: hashes and the commit take time


@dataclass(frozen=True)
class Run:
    """One run of the record; `config` is what it was started with."""

    name: str
    id: str
    config: dict[str, Any]


_CURRENT: ContextVar[Run | None] = ContextVar("run", default=None)


def wanted() -> bool:
    """Whether the record is switched on."""
    return os.environ.get(VARIABLE, "0").lower() not in ("", "0", "false", "off", "no")


def storage():  # -> type[trackio.SQLiteStorage]
    """trackio's storage. ImportError that names the extra where trackio is missing or too old."""
    require("trackio", extra="track")
    found = importlib.metadata.version("trackio")
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        raise ImportError(f"trackio {found} is too old; get a newer one with: pip install 'mmrecipes[track]'")
    from trackio import SQLiteStorage

    return SQLiteStorage


def open_run(name: str, config: Config, folder: Path | None = None, resumed: bool = False) -> Run | None:
    """A new run, or None where nothing is tracked. With a `folder` its id is kept there, and one that is `resumed` goes on."""
    if not wanted():
        return None
    storage()
    file = None if folder is None else folder / "run_id"
    run_id = file.read_text() if file and resumed and file.exists() else uuid.uuid4().hex
    if file:
        file.write_text(run_id)
    return Run(name, run_id, _plain(config()))


@contextlib.contextmanager
def running(name: str, config: Config) -> Iterator[Run | None]:
    """What is logged inside belongs to one run, with the error that ends it, if one does."""
    run = open_run(name, config)
    token = _CURRENT.set(run)
    try:
        yield run
    except Exception as e:
        log({"failed": one_line(e)})
        raise
    finally:
        _CURRENT.reset(token)


def log(row: Mapping[str, Any], step: int | None = None, run: Run | None = None, images: Mapping[str, Any] | None = None) -> None:
    """Add a row to `run`, or to the one that is open, and `images` {caption: PIL image}. A step is logged once: what a resumed
    run computes again is left out. Does nothing where there is no run."""
    run = run or _CURRENT.get()
    if run is None:
        return
    cells = _plain(row)
    for i, (caption, image) in enumerate((images or {}).items()):
        from trackio import Image

        shown = Image(image, caption)
        shown._save(PROJECT, run.id, step or 0)
        cells[f"image {i}"] = shown._to_dict()
    _write(run, [cells], [step], [None if step is None else f"{run.id}-{step}"])


def log_past(rows: Sequence[Mapping[str, Any]], run: Run | None) -> None:
    """Add rows with a "step" each that are not in the record yet: those that were logged elsewhere while it was off."""
    if run is not None and rows:
        cells = [{k: v for k, v in row.items() if k != "step"} for row in rows]
        _write(run, cells, [row["step"] for row in rows], [f"{run.id}-{row['step']}" for row in rows])


def log_results(name: str, content: Mapping[str, Any], path: Path | None = None) -> None:
    """The numbers of measured results, which say so by an "environment": to the run that is open, or to one of their own.
    A file at `path` that is written again by the same commit goes on with its run; rows that did not change are left out."""
    if not wanted() or "environment" not in content:
        return
    whole = _plain(content)
    environment = whole.pop("environment")
    run = _CURRENT.get() or open_run(name, lambda: environment)
    if path is not None and run is not _CURRENT.get():
        run = Run(name, data_hash(str(path.resolve()), str(environment.get("commit"))), environment)
    rows = list(number_rows(whole))
    _write(run, rows, [None] * len(rows), [f"{run.id}-{data_hash(row)}" for row in rows])


def number_rows(content: Any, name: str = "") -> Iterator[dict[str, Any]]:
    """Each dict in nested results that holds numbers, flat, with its place as its name; a share with its interval is three."""
    if isinstance(content, list):
        content = {str(i): value for i, value in enumerate(content)}
    if not isinstance(content, dict):
        return
    name, row = content["name"] if isinstance(content.get("name"), str) else name, {}
    for key, value in content.items():
        if isinstance(value, int | float):
            row[key] = value
        elif isinstance(value, dict) and isinstance(value.get("value"), int | float):
            row |= {key: value["value"]} | {f"{key} {end}": value[end] for end in ("low", "high", "n") if end in value}
        else:
            yield from number_rows(value, f"{name}/{key}".lstrip("/"))
    if row:
        yield {"name": name} | row


def data_hash(*values: Any) -> str:
    """The first 16 digits of a SHA-256 over strings, numbers, images, tensors and what holds them, in order."""
    found = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, Mapping):
            feed(list(value.items()))
        elif hasattr(value, "detach"):  # a tensor; NumPy has no bf16
            feed((str(value.dtype), tuple(value.shape), value.detach().cpu().double().numpy().tobytes()))
        elif hasattr(value, "tobytes"):
            feed((str(getattr(value, "size", "")), value.tobytes()))
        elif isinstance(value, str | bytes | int | float | None):
            found.update(repr(value).encode() + b"\n")
        else:
            for each in value:
                feed(each)

    feed(values)
    return found.hexdigest()[:16]


def _write(run: Run, rows: list[dict[str, Any]], steps: list[int | None], keys: list[str | None]) -> None:
    storage().bulk_log(PROJECT, run.name, rows, steps, config=run.config, log_ids=keys, run_id=run.id)


def _plain(content: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(content, default=lambda o: vars(o) if hasattr(o, "__dict__") else str(o)))
