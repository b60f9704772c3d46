"""Progress bars, library logs and native messages held back where nobody reads them."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def native_stderr() -> Iterator[None]:
    """Hold back what native code writes to the process's stderr, and to Python's."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def library_logs() -> Iterator[None]:
    """Hold back the known remarks of exporters and quantizers: of torchvision, of versions, of names of axes, of deprecations."""
    logs = [logging.getLogger(n) for n in ("torch.onnx", "onnxscript", "transformers", None)]
    before = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        # the calibrators print what they do
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.filterwarnings("ignore", message="(?s).*(LeafSpec|The axis name|var_to_val|Mutation on a buffer).*")
            yield
    finally:
        for log, level in zip(logs, before, strict=True):
            log.setLevel(level)


def progress_hidden() -> bool:
    """Whether progress bars are switched off."""
    return os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "0").lower() not in ("", "0", "false", "off", "no")
