"""Names of files that commands write, checked before anything is computed; and words for numbers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ..utils.atomic_files import check_writable

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
NUMBER_SUFFIXES = (".npz", ".safetensors")


class OutputFile(click.Path):
    """The name of a file that can be written, with one of these suffixes."""

    def __init__(self, suffixes: Sequence[str]):
        super().__init__(path_type=Path)
        self._suffixes = suffixes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if ctx is None or not ctx.resilient_parsing:
            name = "the file" if param is None else param.opts[0]
            if path.suffix.lower() not in self._suffixes:
                raise ValueError(f"{name} must end in {' or '.join(self._suffixes)}, got {path}")
            check_writable(name, path)
        return path


class OutputDirectory(click.Path):
    """The name of a directory that is new or empty, and can be written to."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if ctx is None or not ctx.resilient_parsing:
            name = "the directory" if param is None else param.opts[0]
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise ValueError(f"{name} must be a new or empty directory, got {path}: name another")
            check_writable(name, path / "0000.png" if path.is_dir() else path)
        return path


def duration(seconds: float) -> str:
    """Return a time in words: "2 seconds", "3 minutes", "1 day"."""
    for unit, length in (("day", 86_400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            return counted(round(seconds / length), unit)
    return counted(max(1, round(seconds)), "second")


def counted(count: int, what: str) -> str:
    """Return "1 picture" or "3 pictures"."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
