"""Errors of a user's model, as one sentence instead of a traceback."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from ..plans.continuous import ContinuousSchedule

if TYPE_CHECKING:
    from .run import Run

_OURS = __name__.partition(".")[0]
_LONGEST = 300


@contextmanager
def model_errors_said(run: Run) -> Iterator[None]:
    """Make a message of what the model of a command raises: its error, its place and what may help.

    Errors of this library, which say what to do, are left as they are; so is what no model raised.
    """
    try:
        yield
    except click.ClickException:
        raise
    except Exception as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        model = getattr(run, "model", None)
        if model is None or not any(frame.f_locals.get("self") is model for frame in frames):
            raise
        if isinstance(error, (ValueError, TypeError)) and _package(frames[-1].f_globals) == _OURS:
            raise
        raise click.ClickException(_sentence(run, error)) from error


def _sentence(run: Run, error: Exception) -> str:
    text = " ".join(str(error).split())
    text = text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
    notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
    return f"the model {run.model_name} raised {type(error).__name__}: {text}{_place(error)}{_advice(run, text)}{notes}"


def _place(error: Exception) -> str:
    """Return where the error was raised: the innermost line that is neither torch's nor ours."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if _package(frame.f_globals) not in (_OURS, "torch", "click"):
            return f" ({frame.f_code.co_filename}, line {line})"
    return ""


def _advice(run: Run, text: str) -> str:
    if isinstance(run.path, ContinuousSchedule) and ("indices" in text or "Long" in text or "integer" in text):
        return (
            ": in continuous time the model is told floats, and one that embeds integer timesteps needs a --schedule of discrete "
            "ones, for instance linear or scaled_linear"
        )
    if "out of memory" in text:
        return ": pass a smaller --batch-size"
    return ""


def _package(names: dict[str, object]) -> str:
    return str(names.get("__name__", "")).partition(".")[0]
