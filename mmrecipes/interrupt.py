"""Ctrl-C in a command: what is half written goes, and the process ends there.

KeyboardInterrupt would be raised wherever Python happens to be. In the import of a compiled extension it aborts the process, in
a finalizer it is only printed. A signal handler that does not raise has neither problem.
"""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

_UNDO: list[Callable[[], object]] = []


@contextlib.contextmanager
def ending_with(undo: Callable[[], object]) -> Iterator[None]:
    """`undo()` runs at the end of the block, however it ends, with Ctrl-C, too; what the disk refuses then is passed over."""
    _UNDO.append(undo)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            undo()
        _UNDO.remove(undo)


@contextlib.contextmanager
def temporary_directory(near: Path | None = None, prefix: str = "mmrecipes-") -> Iterator[Path]:
    """A directory, in `near` or where the system has them, that goes at the end of the block, and with Ctrl-C."""
    folder = Path(tempfile.mkdtemp(dir=near, prefix=prefix))
    with ending_with(lambda: shutil.rmtree(folder, ignore_errors=True)):
        yield folder


@contextlib.contextmanager
def ends_the_process() -> Iterator[None]:
    """Within, Ctrl-C undoes what `ending_with` was told, stops child processes and ends this one with code 130."""

    def stop(*_: object) -> None:
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
        for undo in reversed(_UNDO):
            with contextlib.suppress(Exception):  # the others are undone all the same
                undo()
        shown = "\x1b[?25h" if sys.stderr.isatty() else ""  # a status line hides the cursor
        os.write(2, f"{shown}interrupted\n".encode())  # Python's own buffers may be in use
        os._exit(130)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored, as in the background of a shell, or handled by somebody else
        yield
        return
    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
