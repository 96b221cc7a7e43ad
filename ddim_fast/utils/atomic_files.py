"""Files that are there wholly or not at all: written under another name, fsynced, renamed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def atomic_file(path: Path, temporary: Path) -> Iterator[BinaryIO]:
    """A new file to write to. It gets its name at the end of the ``with`` block; where that raises, what was there before still is.

    Args:
        temporary: the name until then, in the same file system; there must be no such file.

    Raises:
        OSError: it could not be written, or renamed.
    """
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: it could not be written; what was there before still is.
    """
    path = path.resolve()
    with atomic_file(path, name_beside(path)) as file:
        file.write(content)


def name_beside(path: Path) -> Path:
    """A name in the same folder that no other process takes."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def fsync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
