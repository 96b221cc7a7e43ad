"""Ctrl-C and SIGTERM: a command says what it has written and how to go on, and exits with 130."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import click

INTERRUPTED = 130
NOTHING = "nothing was written"


def same_command(*more: str) -> str:
    """Return the command line that was typed, with these words where it lacks them."""
    words = ["ddim-fast", *sys.argv[1:]]
    return shlex.join([*words, *(word for word in more if word not in words)])


def name_of(ended: KeyboardInterrupt) -> str:
    """Return what interrupted the command: "Ctrl-C" or "SIGTERM"."""
    return str(ended) or "Ctrl-C"


def _end(number: int, frame: Any) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


@contextlib.contextmanager
def interruption(left: Callable[[], str] = lambda: NOTHING) -> Iterator[None]:
    """End the command with the exit code 130 where it is interrupted.

    SIGTERM, by which torchrun and batch systems end a process, is treated as Ctrl-C.

    Args:
        left: what the command has left behind by then, and how to go on, in words.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _end) if main else None
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"\nstopped: {left()}", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
