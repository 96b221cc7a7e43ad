"""Ctrl-C and SIGTERM: a command says what it has written and how to go on, and exits with 130."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import click

INTERRUPTED = 130
NOTHING = "nothing was written"


def same_command(*more: str) -> str:
    """Return the command line that was typed, with these words where it lacks them."""
    words = ["ddim-fast", *sys.argv[1:]]
    return shlex.join([*words, *(word for word in more if word not in words)])


@contextlib.contextmanager
def interruption(left: Callable[[], str] = lambda: NOTHING) -> Iterator[None]:
    """End the command with the exit code 130 where it is interrupted.

    SIGTERM, by which torchrun and batch systems end a process, is treated as Ctrl-C.

    Args:
        left: what the command has left behind by then, and how to go on, in words.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main else None
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"\nstopped: {left()}", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
