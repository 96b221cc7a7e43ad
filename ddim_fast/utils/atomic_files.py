"""Files that exist complete or not at all: written under another name, fsynced, renamed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def atomic_file(path: Path, temporary: Path) -> Iterator[BinaryIO]:
    """Open a new file that gets its name at the end of the ``with`` block. If the block raises, an
    old file stays.

    Args:
        temporary: the name until then, in the same file system; no such file may exist.

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
        with contextlib.suppress(OSError):  # the first error is the one to report
            temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file completely or not at all. A link of that name is replaced, not followed.

    Raises:
        OSError: it could not be written; an old file is unchanged.
    """
    with atomic_file(path, name_beside(path)) as file:
        file.write(content)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a file by its name and suffix under the name that is given out; it gets its own at the
    end of the ``with`` block. If the block raises, an old file stays, and no other. A link of that
    name is replaced, not followed."""
    beside = name_beside(path)
    temporary = beside.with_name(beside.name + path.suffix)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_writable(what: str, path: Path) -> None:
    """Raise ValueError if a file with this name could not be written. No file remains.

    Args:
        what: what the file is, in words, for the error.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise ValueError(f"{what} must be a file, got {path}: choose another name")
    if not path.parent.is_dir():
        raise ValueError(f"the folder of {what} must exist, got {path}: create it first")
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"{what} must be writable, got {path}, which is read-only: choose another name")
    beside = name_beside(path)
    try:
        beside.open("x").close()
        beside.unlink()
    except OSError as error:
        raise ValueError(f"{what} must be writable, got {path} ({error.strerror}): choose another folder") from error


def name_beside(path: Path) -> Path:
    """Return a name in the same folder that no process uses, nor has left behind: another each
    time, since in containers every process may have the same number."""
    return path.with_name(f".{path.name}.{os.urandom(8).hex()}.part")


def own_directory(path: Path) -> None:
    """Make a directory, or take the one that is there.

    Raises:
        ValueError: its name is a link, so that files would be written, or removed, elsewhere.
    """
    if path.is_symlink():
        raise ValueError(f"{path} must be a directory of its own, got a link to {os.readlink(path)}: remove the link")
    path.mkdir(parents=True, exist_ok=True)


def fsync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
