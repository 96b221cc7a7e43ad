"""The conditioning of sample i: a function of i alone, by a rule or by row i of a file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..utils.checks import check_integer, check_path, check_text, refuse
from ..utils.files import csv_rows, json_lines, parquet_rows
from .settings import file_digest

LABELS = "class_labels"
KEY = "key"
"""The column of a file that names samples in a tar, instead of their numbers."""

_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*(/[A-Za-z0-9_][A-Za-z0-9_-]*)*")
_LONGEST_KEY = 96  # a tar's names have 100 bytes
_ROWS_AT_A_TIME = 1 << 16
_INT64, _FLOAT32_MAX = np.iinfo(np.int64), float(np.finfo(np.float32).max)


class Conditioning(Protocol):
    """The methods of a rule that ``generate`` calls."""

    def settings(self) -> dict[str, Any]:
        """Return what distinguishes this rule from others, as JSON."""
        ...

    def rows(self, first: int, count: int) -> dict[str, Tensor]:
        """Return the conditioning of samples ``first .. first + count - 1``: a tensor ``(count,
        ...)`` for each name."""
        ...


def check_rule(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` has the methods of a ``Conditioning``."""
    methods = ("settings", "rows")
    if isinstance(value, type) or not all(callable(getattr(value, method, None)) for method in methods):
        refuse(
            f"{name} must be a rule with the methods settings() and rows(first, count)",
            value,
            "for instance EveryClass(10), OneClass(3) or Table('rows.csv')",
            TypeError,
        )


class EveryClass:
    """Sample i is of class ``i mod num_classes``."""

    def __init__(self, num_classes: int, name: str = LABELS):
        self.num_classes = check_integer("num_classes", num_classes, at_least=1)
        self.name = check_text("name", name)

    def settings(self) -> dict[str, Any]:
        return {"rule": "every class in turn", "num_classes": self.num_classes, "name": self.name}

    def rows(self, first: int, count: int) -> dict[str, Tensor]:
        return {self.name: torch.arange(first, first + count, dtype=torch.int64, device="cpu") % self.num_classes}


class OneClass:
    """Every sample is of class ``label``."""

    def __init__(self, label: int, name: str = LABELS):
        self.label = check_integer("label", label, at_least=int(_INT64.min), at_most=int(_INT64.max))
        self.name = check_text("name", name)

    def settings(self) -> dict[str, Any]:
        return {"rule": "one class", "label": self.label, "name": self.name}

    def rows(self, first: int, count: int) -> dict[str, Tensor]:
        return {self.name: torch.full((count,), self.label, dtype=torch.int64, device="cpu")}


class Table:
    """Sample i has row i of a file: JSON lines, CSV with a first line of names, or Parquet (which
    needs pyarrow).

    Each column is an argument of the model. Whole numbers become int64, others float32; a list of
    numbers in JSON or Parquet is a row of a matrix. A column called ``key`` names the samples in a
    tar instead. All rows are held in memory: 8 bytes a whole number.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: Parquet needs pyarrow.
        ValueError: the file's rows are not alike, or hold something that is no number; or a key
            could leave the directory, or comes twice.
    """

    def __init__(self, path: str | Path):
        self.path = check_path("path", path)
        if self.path.suffix.lower() not in _READERS:
            raise ValueError(f"a file of conditioning must end in {', '.join(_READERS)}, got {self.path}")
        if not self.path.is_file():
            raise FileNotFoundError(f"a file of conditioning must exist, got none at {self.path}")
        rows = _READERS[self.path.suffix.lower()](self.path)
        self.columns, self.keys = _columns(rows, self.path)
        self._sha256 = file_digest(self.path)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), self.keys or ()))

    def settings(self) -> dict[str, Any]:
        return {"rule": "a row of a file", "sha256": self._sha256, "rows": len(self)}

    def rows(self, first: int, count: int) -> dict[str, Tensor]:
        """Return rows, starting again after the last: a batch may be filled up with samples that
        are dropped."""
        index = np.arange(first, first + count) % len(self)
        return {name: torch.from_numpy(column[index]) for name, column in self.columns.items()}


# --- Files ------------------------------------------------------------------------------------------------------------


def _csv_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    for row in csv_rows(path):
        yield {name: value if name == KEY else _number(value) for name, value in row.items()}


def _number(text: str) -> Any:
    for kind in (int, float) if "_" not in text else ():  # Python's 1_000 is no number in CSV
        try:
            return kind(text)
        except ValueError:
            pass
    return text


_READERS: dict[str, Callable[[Path], Iterator[Mapping[str, Any]]]] = {
    ".jsonl": json_lines,
    ".csv": _csv_rows,
    ".parquet": lambda path: parquet_rows(path, _ROWS_AT_A_TIME),
}


def _columns(rows: Iterator[Mapping[str, Any]], path: Path) -> tuple[dict[str, np.ndarray], list[str] | None]:
    """Columns of numbers, and the keys, or None; a bounded number of rows as Python objects at a
    time."""
    names: list[str] | None = None
    parts: dict[str, list[np.ndarray]] = {}
    keys: list[str] = []
    start = 1
    while some := list(islice(rows, _ROWS_AT_A_TIME)):
        names = names or list(some[0])
        if not all(names):
            raise ValueError(f"each column of {path} must have a name, got one without: {', '.join(map(repr, names))}")
        for number, row in enumerate(some, start):
            if row.keys() != set(names):
                raise ValueError(
                    f"row {number} of {path} must have the columns of the first, {', '.join(map(str, names))}, got "
                    f"{', '.join(map(str, row))}"
                )
        for name in names:
            values = [row[name] for row in some]
            if name == KEY:
                keys += values
            else:
                parts.setdefault(name, []).append(_numbers(values, name, start, path))
        start += len(some)
    if names is None:
        raise ValueError(f"a file of conditioning must have a row for each sample, got none in {path}")
    if KEY in names:
        _check_keys(keys, path)
    return {name: _joined(arrays, name, path) for name, arrays in parts.items()}, keys if KEY in names else None


def _numbers(values: Sequence[Any], name: str, start: int, path: Path) -> np.ndarray:
    bad = next((i for i, value in enumerate(values) if not _is_number(value)), None)
    if bad is None:
        try:
            return np.asarray(values, dtype=None if values else np.float32)
        except ValueError:  # lists of several lengths
            bad = 0
    raise ValueError(
        f"column {name!r} of {path} must hold finite numbers (or lists of them, of one length) within int64 if they are whole, "
        f"else float32, got {values[bad]!r:.200} in row {start + bad}"
    )


def _is_number(value: Any, levels: int = 8) -> bool:
    if isinstance(value, list):
        return levels > 0 and all(_is_number(one, levels - 1) for one in value)
    if isinstance(value, int):
        return not isinstance(value, bool) and _INT64.min <= value <= _INT64.max
    return isinstance(value, float) and abs(value) <= _FLOAT32_MAX


def _joined(arrays: Sequence[np.ndarray], name: str, path: Path) -> np.ndarray:
    if len({array.shape[1:] for array in arrays}) > 1:
        raise ValueError(f"column {name!r} of {path} must hold lists of one length")
    whole = all(array.dtype == np.int64 for array in arrays)
    return np.concatenate([array.astype(np.int64 if whole else np.float32) for array in arrays])


def _check_keys(keys: Sequence[Any], path: Path) -> None:
    seen = set()
    for number, key in enumerate(keys, 1):
        if not isinstance(key, str) or not _KEY.fullmatch(key) or len(key) > _LONGEST_KEY:
            raise ValueError(
                f"a key must be a relative name of at most {_LONGEST_KEY} letters, digits, _ and -, with / between folders, so that it "
                f"stays within its directory, got {key!r} in row {number} of {path}"
            )
        if key in seen:
            raise ValueError(f"a key must name one sample, got {key!r} a second time in row {number} of {path}")
        seen.add(key)
