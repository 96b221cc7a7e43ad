"""Tell the caller of what their own line does, and not of a line of this package: by a warning, or
by a note on an error."""

from __future__ import annotations

import sys
import warnings

_BETWEEN = (__name__.partition(".")[0], "contextlib", "torch")
"""Packages whose lines are not the caller's: ours, and those through which it calls us."""


def warn_caller(message: str) -> None:
    """Issue a UserWarning at the line outside this package, and torch, that led here.

    So Python shows it once for each such line.
    """
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def add_note(error: BaseException, note: str) -> None:
    """Add a line to what Python shows of an error; before Python 3.11, which has no such lines, warn."""
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:
        warn_caller(note)
