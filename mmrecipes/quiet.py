"""Progress bars, library logs and native messages held back where nobody reads them."""

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator

from mmrecipes.interrupt import ending_with


@contextlib.contextmanager
def native_stderr() -> Iterator[None]:
    """Hold back what native code writes to the process's stderr, and to Python's; an interrupt is still told there."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere, ending_with(lambda: os.dup2(kept, 2)), contextlib.redirect_stderr(io.StringIO()):
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.close(kept)


@contextlib.contextmanager
def library_logs() -> Iterator[None]:
    """Hold back the known remarks of exporters and quantizers: of torchvision, of versions, of names of axes, of deprecations."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:  # the calibrators print what they do
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.filterwarnings("ignore", message="(?s).*(LeafSpec|The axis name|var_to_val|Mutation on a buffer).*")
            yield
    finally:
        logging.disable(before)


def progress_hidden() -> bool:
    """Whether progress bars are switched off."""
    return os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "0").lower() not in ("", "0", "false", "off", "no")
