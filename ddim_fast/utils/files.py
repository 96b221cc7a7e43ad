"""Read files that others may have written: JSON, CSV, Parquet, NumPy, safetensors.

Whatever is wrong with a file, a ValueError names it, or the OSError of the system does. None of
these readers runs anything that a file contains. Pictures: ``utils/pictures.py``.
"""

from __future__ import annotations

import csv
import errno
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
from safetensors import safe_open
from torch import Tensor

_MOST_LEVELS = 50
_SAFE_PYARROW = (14, 0, 1)  # older ones unpickle what a file's schema holds


@contextmanager
def reading(path: Path, kind: str) -> Iterator[BinaryIO]:
    """Open a file, and turn every error of its contents into a ValueError with its name."""
    with open(path, "rb") as file:
        try:
            yield file
        except _FoundError:
            raise
        except Exception as error:
            # The system's errors, such as a full disk; but a damaged file leads to invalid offsets.
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                raise
            raise ValueError(f"{path} must be {kind}, and is none, or damaged: {first_line(error)}") from error


class _FoundError(ValueError):
    """An error that says what is wrong, and where, already."""


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no JSON, or nested too deeply.
    """
    with open(path, "rb") as file:
        return parse_json(file.read(), str(path))


def parse_json(content: bytes | str, where: str, pairs: Callable[[list[tuple[str, Any]]], Any] = dict) -> Any:
    """Return the value of a JSON text; ``where`` it stands is for the error. ``pairs`` makes an
    object of its names and values."""
    try:
        value = json.loads(content, object_pairs_hook=pairs)
        deep = _is_deeper(value, _MOST_LEVELS)
    except _FoundError as error:
        raise ValueError(f"{where} {error}") from None
    except RecursionError:
        deep = True
    except ValueError as error:
        raise ValueError(f"{where} must be JSON, and is not: {error}") from error
    if deep:
        raise ValueError(f"{where} must be JSON of at most {_MOST_LEVELS} levels, and is nested more deeply")
    return value


def _is_deeper(value: Any, levels: int) -> bool:
    """Return whether lists and objects are nested more deeply: whatever walks them has to return."""
    level = [value]
    for _ in range(levels + 1):
        inner = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list))]
        level = [one for values in inner for one in values]
        if not inner:
            return False
    return True


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the object of each line of a file."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not (line := line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line).strip():
                continue
            row = parse_json(line, f"line {number} of {path}", _unique)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} of {path} must be a JSON object, got {type(row).__name__}")
            yield row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if twice := _second(name for name, _ in pairs):
        raise _FoundError(f"must have each name once, got {twice!r} twice")
    return dict(pairs)


_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def csv_rows(path: Path) -> Iterator[dict[str, str]]:
    """Yield each row of a CSV file, whose first line has the names of its columns."""
    with reading(path, "CSV in UTF-8"), open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        names = next((row for row in rows if row), [])
        if twice := _second(names):
            raise _FoundError(f"each column of {path} must have a name of its own, got {twice!r} twice")
        for row in filter(None, rows):
            if len(row) != len(names):
                raise _FoundError(
                    f"line {rows.line_num} of {path} must have a value for each of the {len(names)} columns, got {len(row)}"
                )
            yield dict(zip(names, row, strict=True))


def parquet_rows(path: Path, at_a_time: int) -> Iterator[dict[str, Any]]:
    """Yield each row of a Parquet file.

    Raises:
        ImportError: pyarrow is missing, or so old that it runs what a file contains.
    """
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError(
            f"a Parquet file is read by pyarrow, which is missing ({error}): pip install pyarrow, or write JSON lines"
        ) from error
    if tuple(int(part) for part in pyarrow.__version__.split(".")[:3] if part.isdigit()) < _SAFE_PYARROW:
        raise ImportError(
            f"a Parquet file needs pyarrow 14.0.1 or newer, got {pyarrow.__version__}, which can run code from a file: "
            "pip install --upgrade pyarrow"
        )
    with reading(path, "Parquet") as source, parquet.ParquetFile(source) as file:
        if twice := _second(file.schema_arrow.names):
            raise _FoundError(f"each column of {path} must have a name of its own, got {twice!r} twice")
        for batch in file.iter_batches(at_a_time):
            yield from batch.to_pylist()


def _second(names: Iterable[str]) -> str | None:
    """Return the first name that comes a second time, or None."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def npz_array(path: Path, name: str) -> np.ndarray:
    """Read one array of numbers from an ``.npz`` file."""
    with reading(path, "a NumPy .npz file") as file:
        if not zipfile.is_zipfile(file):  # NumPy would offer to unpickle it
            file.seek(0)
            begin = file.read(6)
            raise ValueError(
                "it is empty"
                if not begin
                else "it holds a bare array"
                if begin == b"\x93NUMPY"
                else "it is no whole zip archive"
            )
        file.seek(0)
        archive = np.load(file, allow_pickle=False)
        if name not in archive.files:
            raise _FoundError(f"{path} must hold an array called {name}, got {', '.join(archive.files) or 'none'}")
        if (array := _array(archive, name)) is None:
            raise _FoundError(f"{name} in {path} must be numbers, got Python objects, which could run code")
        if array.dtype.kind not in "biuf":
            raise _FoundError(f"{name} in {path} must be numbers, got dtype {array.dtype}")
        return array


def _array(archive: Any, name: str) -> np.ndarray | None:
    """Return an array of an archive; None where it holds Python objects."""
    try:
        return archive[name]
    except ValueError as error:
        if "allow_pickle" in str(error):
            return None
        raise


def safetensors_tensor(path: Path, name: str) -> Tensor:
    """Read one tensor from a ``.safetensors`` file."""
    with reading(path, "a safetensors file") as file:
        tensors = safetensors.torch.load(file.read())
        if name not in tensors:
            raise _FoundError(f"{path} must hold an array called {name}, got {', '.join(tensors) or 'none'}")
        return tensors[name]


def check_safetensors(path: Path) -> None:
    """Raise ValueError unless a file has a whole safetensors header, and the bytes that it tells
    of."""
    with reading(path, "a safetensors file"), safe_open(path, framework="pt") as file:
        file.keys()
