"""Options that take several values, separated by commas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click


class ListOf(click.ParamType):
    """A list of values separated by commas."""

    name = "LIST"

    def __init__(self, kind: Callable[[str], Any], choices: Sequence[str] | None = None):
        self._kind, self._choices = kind, choices

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):  # a default
            return value
        words = [word.strip() for word in value.split(",") if word.strip()]
        wrong = [word for word in words if self._choices is not None and word not in self._choices]
        if wrong or not words:
            self.fail(
                f"must be one or more of {', '.join(self._choices or ('...',))}, separated by commas, got {value!r}",
                param,
                ctx,
            )
        try:
            return tuple(self._kind(word) for word in words)
        except ValueError:
            self.fail(f"must be numbers separated by commas, got {value!r}", param, ctx)


class NumberOrList(ListOf):
    """A number, or a list of them."""

    name = "FLOAT"

    def __init__(self) -> None:
        super().__init__(float)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        return found[0] if isinstance(found, tuple) and len(found) == 1 else found
