"""A set of samples on disk: a manifest, shards, and until it is finished, a record of each shard
that is safe.

    manifest.json               settings; when the set is whole, its state "finished" and every shard's checksum
    samples-000000.npz ...      shards
    .unfinished/                while the set is made: samples-000000.json (a shard's record), lock, files being written

A file gets its name only when all of it is on the disk: it is written under another name, fsynced
and renamed, and the directory is fsynced. A shard's record is written after the shard. So whatever
stops a run, a shard with a record is complete, unless the disk lies; ``verified`` compares the
checksums.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..utils.atomic_files import atomic_file, fsync_directory, own_directory
from ..utils.checks import check_choice, check_integer, check_path, refuse
from ..utils.files import read_json
from .formats import FORMATS
from .settings import LAYOUT_VERSION, as_json, differences, file_digest

MANIFEST = "manifest.json"
UNFINISHED, FINISHED = "unfinished", "finished"
_SCRATCH = ".unfinished"
MOST_SHARDS = 1_000_000  # their names have six digits
_SHARD = re.compile(r"samples-(\d{6})")
_VISIBLE_WITHIN = 60.0  # seconds in which a network file system shows one machine's file to another

AGAIN = "What is written is safe: run the same command with --resume (resume=True), with as many processes as you like"


class GenerationError(RuntimeError):
    """A run cannot go on, whatever is done about the disk or the other processes."""


@dataclass(frozen=True)
class Slice:
    """Which samples make one shard: ``first .. first + count - 1``."""

    index: int
    first: int
    count: int


@dataclass(frozen=True)
class Slices:
    """A run cut into shards of one size; the last may be smaller.

    Raises:
        ValueError: they are no counts, or make more than ``MOST_SHARDS``.
    """

    count: int
    size: int

    def __post_init__(self) -> None:
        for name, value in (("count", self.count), ("shard_size", self.size)):
            check_integer(name, value, at_least=1)
        if self.count > MOST_SHARDS * self.size:
            refuse(
                f"count must make at most {MOST_SHARDS:,} files of {self.size} samples each",
                self.count,
                f"take shard_size={-(-self.count // (MOST_SHARDS * self.size)) * self.size} (--shard-size) or more, or several sets",
            )

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def __getitem__(self, index: int) -> Slice:
        if not 0 <= index < len(self):
            raise IndexError(index)
        first = index * self.size
        return Slice(index, first, min(self.size, self.count - first))

    def __iter__(self) -> Iterator[Slice]:
        return map(self.__getitem__, range(len(self)))


@dataclass
class SetDirectory:
    """The directory of one set.

    Attributes:
        path: where it is.
        suffix: of its shards.
        old_records: what the manifest of a finished set says of its shards.
    """

    path: Path
    suffix: str
    old_records: dict[int, Any] = field(default_factory=dict)
    _lock: Any = None

    @property
    def manifest(self) -> Path:
        return self.path / MANIFEST

    @property
    def scratch(self) -> Path:
        return self.path / _SCRATCH

    def shard_name(self, index: int) -> str:
        return f"samples-{index:06d}{self.suffix}"

    def shard(self, index: int) -> Path:
        return self.path / self.shard_name(index)

    def record_path(self, index: int) -> Path:
        return self.scratch / f"samples-{index:06d}.json"

    def begin(self, settings: Mapping[str, Any], resume: bool, needed: Callable[[], int] | None = None) -> None:
        """Make the directory, or check that it belongs to these settings: called by one process,
        before the others go on.

        Args:
            needed: an upper bound of the bytes to be written. None: it does not matter.

        Raises:
            ValueError: the directory holds something else, or a set of other settings, or there is
                a set and no ``resume``.
            OSError: another run is at work here, or the disk is too small. Nothing is written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"out must be a directory, and {self.path} is a file: name another")
        found = read_manifest(self.path) if self.manifest.is_file() else None
        if found is None:
            _refuse_strangers(self.path)
        elif not resume:
            raise ValueError(
                f"{self.path} holds a set already ({found['state']}): pass --resume (resume=True) to continue or mend it, or name "
                "another directory"
            )
        else:
            _refuse_others(found["settings"], settings, self.path)
        if needed is not None:
            self._check_space(needed())
        own_directory(self.scratch)
        # By its descriptor: whatever the name becomes, no other directory is written to or cleared.
        scratch = os.open(self.scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            self._take_lock(scratch)
            for leftover in os.listdir(scratch):
                if leftover.endswith(".tmp"):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(leftover, dir_fd=scratch)
        finally:
            os.close(scratch)
        if found is None or found["state"] == FINISHED:  # a finished set that is looked at again is not, until it was
            self.write(self.manifest, _manifest(UNFINISHED, settings, None if found is None else found["shards"]))
        self.read_old_records(found or {})

    def join(self, settings: Mapping[str, Any]) -> None:
        """Wait for the directory that another process has begun, and check its settings.

        Raises:
            FileNotFoundError: this process sees another directory.
        """
        give_up = time.monotonic() + _VISIBLE_WITHIN
        while not self.manifest.is_file():
            if time.monotonic() > give_up:
                raise FileNotFoundError(
                    f"every process must see the same directory, and there is no {self.manifest} here: put out on a shared file system"
                )
            time.sleep(0.05)
        found = read_manifest(self.path)
        _refuse_others(found["settings"], settings, self.path)
        self.read_old_records(found)

    def read_old_records(self, found: Mapping[str, Any]) -> None:
        self.old_records = dict(enumerate(found.get("shards", [])))

    def _take_lock(self, scratch: int) -> None:
        """One run at a time, where the file system has locks. The lock ends with the process,
        however that ends."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            self._lock = os.fdopen(os.open("lock", flags, 0o666, dir_fd=scratch), "rb", buffering=0)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise ValueError(f"{self.scratch / 'lock'} must be a file of its own, got a link: remove it") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                self.close()
                raise OSError(
                    f"another run is at work in {self.path}: wait for it, or end it (it may be stopped)"
                ) from error

    def is_finished(self) -> bool:
        try:
            return read_manifest(self.path)["state"] == FINISHED
        except (OSError, ValueError):
            return False

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # --- Files --------------------------------------------------------------------------------------------------------

    def write(self, path: Path, content: bytes) -> None:
        """Write a file completely or not at all, and wait until it is on the disk."""
        temporary = self.scratch / f"{path.name}.{uuid.uuid4().hex}.tmp"
        with atomic_file(path, temporary) as file:
            file.write(content)
        fsync_directory(path.parent)

    def save(self, part: Slice, content: bytes, extra: Mapping[str, Any]) -> dict[str, Any]:
        """Write a shard, then its record, which is returned.

        Raises:
            GenerationError: the shard was there before with other bytes, under the same settings.
        """
        record = {
            "name": self.shard_name(part.index),
            "first": part.first,
            "count": part.count,
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            **extra,
        }
        self._check_same(part, record)
        self.write(self.shard(part.index), content)
        self.write(self.record_path(part.index), as_json(record).encode())
        return record

    def _check_same(self, part: Slice, record: Mapping[str, Any]) -> None:
        """Raise GenerationError unless a shard made again has its recorded bytes, or the record
        alone is damaged."""
        old = self.record(part)
        if old is None or old["sha256"] == record["sha256"] or self._digest(part) == record["sha256"]:
            return
        raise GenerationError(
            f"{self.shard_name(part.index)} must have the SHA-256 that was recorded, {old['sha256']}, and came out with {record['sha256']} "
            "though the settings are the same: the machine, its libraries or the model now compute something else. Generate the set again "
            f"in another directory, or delete {self.manifest} and {self.scratch}"
        )

    def _digest(self, part: Slice) -> str | None:
        shard = self.shard(part.index)  # a pipe in its place would never end
        return file_digest(shard) if shard.is_file() else None

    def record(self, part: Slice) -> dict[str, Any] | None:
        """Return the record of a shard that was written, or None where there is none or it is
        damaged."""
        path = self.record_path(part.index)
        try:
            record = read_json(path) if path.is_file() else self.old_records.get(part.index)
        except (OSError, ValueError):
            record = self.old_records.get(part.index)
        return record if _is_record(record, part, self.shard_name(part.index)) else None

    def verified(self, part: Slice) -> dict[str, Any] | None:
        """Return the record of a shard whose bytes match it, or None."""
        record = self.record(part)
        return record if record is not None and self._digest(part) == record["sha256"] else None

    def finish(self, settings: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
        """Write the manifest of the finished set, and remove the scratch folder. May be called
        twice."""
        self.write(self.manifest, _manifest(FINISHED, settings, records))
        self.close()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def present(self, slices: Slices) -> list[Slice]:
        """Return the slices whose shards are there, whatever is in them: in one look at the
        directory."""
        try:
            names = [entry.name for entry in os.scandir(self.path) if entry.is_file()]
        except FileNotFoundError:
            return []
        found = [(name, _SHARD.match(name)) for name in names]
        indices = sorted(int(match[1]) for name, match in found if match and name == match[0] + self.suffix)
        return [slices[index] for index in indices if index < len(slices)]

    def _check_space(self, needed: int) -> None:
        there = next(path for path in (self.path, *self.path.absolute().parents) if path.is_dir())
        free = shutil.disk_usage(there).free
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"the samples to make may take up to {_gigabytes(needed)} GB, and {_gigabytes(free)} GB are free: make room, name another "
                "directory, or pass --no-space-check (check_space=False)",
                str(self.path),
            )


def _gigabytes(count: int) -> str:
    return f"{count // 10**9:,}.{count % 10**9 // 10**7:02d}"


def _manifest(state: str, settings: Mapping[str, Any], records: Sequence[Mapping[str, Any]] | None = None) -> bytes:
    shards = {} if records is None else {"shards": records}
    return as_json({"layout": LAYOUT_VERSION, "state": state, "settings": settings, **shards}).encode() + b"\n"


def _is_record(record: Any, part: Slice, name: str) -> bool:
    """Return whether a record from a file belongs to this shard: no name in it is ever used as a
    path."""
    wanted = {"name": name, "first": part.first, "count": part.count}
    return (
        isinstance(record, Mapping)
        and all(record.get(key) == value for key, value in wanted.items())
        and isinstance(record.get("sha256"), str)
        and isinstance(record.get("bytes"), int)
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a set.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of another version.
    """
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise FileNotFoundError(f"a set of samples must have a {MANIFEST}, got none in {path}")
    found = read_json(manifest)
    if not isinstance(found, dict) or found.get("layout") != LAYOUT_VERSION:
        raise ValueError(f"{manifest} must be of layout {LAYOUT_VERSION}, which this version of ddim_fast writes")
    shards = found.get("shards", [])
    states = (UNFINISHED, FINISHED)
    if found.get("state") not in states or not isinstance(found.get("settings"), dict) or not isinstance(shards, list):
        raise ValueError(f"{manifest} must hold a state, settings and shards: it is damaged")
    return found


def _refuse_strangers(path: Path) -> None:
    # What is in the scratch folder alone was made before a manifest could be.
    if path.is_dir() and (others := sorted(child.name for child in path.iterdir() if child.name != _SCRATCH)):
        raise ValueError(
            f"out must be a directory that is new, empty or made by this command, and {path} holds {others[0]}: name another"
        )


def _refuse_others(there: Mapping[str, Any], here: Mapping[str, Any], path: Path) -> None:
    if lines := differences(there, here, "there", "here"):
        listed = "\n  ".join(lines)
        raise ValueError(
            f"{path} holds a set of other settings, so its samples would be others:\n  {listed}\n"
            "Run with the settings it was begun with, or name another directory"
        )


# --- Checking ---------------------------------------------------------------------------------------------------------


def parts_of(path: Path, manifest: Mapping[str, Any]) -> tuple[SetDirectory, Slices]:
    """Return the directory of a set, and its shards, as its manifest has them.

    Raises:
        ValueError: it has no such settings.
    """
    settings = manifest["settings"]
    try:
        check_choice("format", settings["format"], FORMATS)
        return SetDirectory(path, FORMATS[settings["format"]].suffix), Slices(settings["count"], settings["shard_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path / MANIFEST} must hold the settings of a run: it is damaged ({error})") from error


def check_set(path: str | os.PathLike[str], progress: Callable[[int], Any] = lambda count: None) -> list[str]:
    """Return what is wrong with a set: nothing if it is finished and every shard has the bytes of
    its manifest.

    Args:
        progress: called with the number of samples of each shard that was read.

    Raises:
        FileNotFoundError, ValueError: there is no set, or its manifest is damaged.
    """
    path = check_path("path", path)
    found = read_manifest(path)
    if found["state"] != FINISHED:
        return [f"the set is not finished. {AGAIN}"]
    directory, slices = parts_of(path, found)
    directory.read_old_records(found)
    problems = []
    if len(directory.old_records) != len(slices):
        problems.append(f"the manifest must list {len(slices)} shards, and lists {len(directory.old_records)}")
    for part in slices:
        name = directory.shard_name(part.index)
        # Of a finished set, the manifest alone counts.
        record = directory.old_records.get(part.index)
        if record is None or not _is_record(record, part, name):
            problems.append(f"{name} has no valid record in the manifest")
        elif not directory.shard(part.index).is_file():
            problems.append(f"{name} is missing")
        elif (size := directory.shard(part.index).stat().st_size) != record["bytes"]:
            problems.append(f"{name} must have {record['bytes']} bytes, and has {size}")
        elif file_digest(directory.shard(part.index)) != record["sha256"]:
            problems.append(f"{name} has the right size, and other bytes than were written")
        progress(part.count)
    wanted = {directory.shard_name(part.index) for part in directory.present(slices)}
    strangers = sorted(child.name for child in path.glob("samples-*") if child.name not in wanted)
    return problems + [f"{name} is not part of the set" for name in strangers]
