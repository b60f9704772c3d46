"""Errors that a user can act on."""

import importlib.util


class UserError(Exception):
    """One line: what was given, what was expected, what to do. The command line prints it and exits with 1."""


class ParityError(UserError):
    """A result that is broken, not lossy: outputs that are not finite, or that disagree with the same arithmetic elsewhere."""


def unsupported(architecture: str, stage: str, e: BaseException) -> UserError:
    """The error to raise in the place of one that nobody foresaw, with what it was tried on and where."""
    why = f"{type(e).__name__}: {one_line(e, 120)}"
    return UserError(f"not supported yet: {architecture}, {stage} ({why}); --debug shows the traceback")


def one_line(e: BaseException, most: int = 200) -> str:
    """The message of `e` on one line of at most `most` characters."""
    text = " ".join(str(e).split()) or type(e).__name__
    return text if len(text) <= most else text[: most - 1] + "…"


def require(*names: str, extra: str = "deploy") -> None:
    """ImportError that names the extra where one of these packages is missing."""
    if missing := [n for n in names if importlib.util.find_spec(n) is None]:
        raise ImportError(f"{missing[0]} is not installed; get it with: pip install 'mmrecipes[{extra}]'")
