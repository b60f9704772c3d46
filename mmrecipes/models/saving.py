"""Written aside, then renamed: models, JSON files and single files, all or nothing."""

import contextlib
import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from mmrecipes import track
from mmrecipes.errors import UserError, one_line
from mmrecipes.interrupt import ending_with, temporary_directory
from mmrecipes.models.loading import as_dtype
from mmrecipes.models.preflight import read_json


@contextlib.contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """A name beside `path`, renamed to it when all went well and removed when not. UserError where it cannot be written."""
    path = Path(path)
    aside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with ending_with(lambda: aside.unlink(missing_ok=True)):
            yield aside
            os.replace(aside, path)
    except OSError as e:
        raise UserError(f"cannot write {path} ({e.strerror or one_line(e)}); choose a folder that you can write to") from e


def write_json(path: Path, content: dict[str, Any]) -> Path:
    """Write `content` (dataclasses allowed) to `path`, all or nothing. Returns `path`; UserError where it cannot be written.
    With an "environment" it is a measurement, and goes to the experiment record, too, where that is on.
    >>> write_json(folder / "a.json", {"n": 1}).read_text()
    '{\\n "n": 1\\n}\\n'
    """
    with written_aside(path) as aside:
        aside.write_text(json.dumps(content, indent=1, default=lambda o: vars(o)) + "\n")
    track.log_results(path.stem, content, path)
    return path


def save(
    model: nn.Module, processor: Any, out: str | Path, dtype: torch.dtype | str = torch.bfloat16, extra: dict | None = None
) -> Path:
    """Write model, processor and the text files of `extra` {name: text} to directory `out`, all or nothing. Returns `out`.
    Floating weights are cast to `dtype` ("auto": not), and config.json says so; `model` itself stays as it is. Raises UserError.
    >>> save(model, model.processor, folder / "half", "bfloat16") == folder / "half"
    True
    """
    dtype, own = as_dtype(dtype), getattr(model, "processor", None)
    with directory_aside(out) as part:
        memo = {id(own): own}  # parameters are cast one by one: nothing is ever held twice in the old dtype
        for p in model.parameters():
            same = dtype == "auto" or not p.is_floating_point() or p.element_size() == 1
            memo[id(p)] = p if same else nn.Parameter(p.detach().to(dtype), requires_grad=p.requires_grad)
        copy.deepcopy(model, memo).save_pretrained(part)
        processor.save_pretrained(part)
        for name, text in (extra or {}).items():
            (part / name).write_text(text, encoding="utf-8")
    return Path(out)


@contextlib.contextmanager
def directory_aside(out: str | Path) -> Iterator[Path]:
    """An empty directory beside `out`, which takes the place of an older model there when all went well, and goes when not.
    Raises UserError as `check_replaceable`, and where it cannot be written."""
    out = Path(out).expanduser().resolve()
    check_replaceable(out)
    part = out.with_name(f".{out.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)  # left by a killed run
        with ending_with(lambda: shutil.rmtree(part, ignore_errors=True)):
            part.mkdir(parents=True)
            yield part
            take_place(part, out)
    except (OSError, SafetensorError) as e:  # the latter when the disk is full
        raise UserError(f"{out}: could not be written ({one_line(e)}); nothing was changed: give another directory") from e


def check_replaceable(out: str | Path) -> None:
    """UserError unless a model can be written to `out`: absent, empty or a model directory, below a writable parent.
    >>> check_replaceable(folder / "new")
    """
    out = Path(out).expanduser().resolve()
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a directory that is new, empty or holds an older model")
    if out.is_dir() and any(out.iterdir()):
        is_model = False
        with contextlib.suppress(UserError):  # config.json is a common name: ours says what model it is
            is_model = "model_type" in read_json(out / "config.json") and not (out / ".git").exists()  # no repository with one
        if not is_model:
            raise UserError(f"{out}: holds something else than a model, and is left alone; give a new or an empty directory")
    parent = next(p for p in out.parents if p.exists())
    try:  # asking is not enough: a read-only disk refuses even those who may write
        tempfile.TemporaryDirectory(dir=parent).cleanup()
    except OSError as e:
        raise UserError(f"{out}: cannot be written ({parent}: {e.strerror}); give a directory you may write to") from e


def take_place(part: Path, out: Path) -> None:
    """Rename directory `part` to `out`; what was there goes, but only once the new one stands. Both are on one disk."""
    with temporary_directory(out.parent) as aside:  # on the same disk, so that each move is one step
        old = aside / out.name
        with ending_with(lambda: old.exists() and not out.exists() and old.rename(out)):  # stopped between the two moves
            if out.exists():
                out.rename(old)
            part.rename(out)
