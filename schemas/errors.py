"""Errors that their message explains: the command line shows it without a traceback, and ends with their exit code."""


class UserError(ValueError):
    """What was asked for, or is given, cannot be used: what, where, and the remedy."""

    exit_code = 2


class RunError(RuntimeError):
    """A run that cannot go on. What is recorded stays."""

    exit_code = 1


class TableError(UserError):
    """A place is not the table that was asked for, and why."""
