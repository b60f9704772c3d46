"""Errors that a user can act on."""


class UserError(Exception):
    """One line: what was given, what was expected, what to do. The command line prints it and exits with 1."""


class ParityError(UserError):
    """A result that is broken, not lossy: outputs that are not finite, or that disagree with the same arithmetic elsewhere."""
