"""Names with options on a command line: ``edm?sigma_max=50&rho=5``."""

from __future__ import annotations

import json
from typing import Any


def split_options(text: str, what: str, example: str, *, words: bool = False) -> tuple[str, dict[str, Any]]:
    """Return the name and the options of ``name?option=value&option=value``.

    Args:
        what: what has the options, in words, for the error: "a schedule".
        example: such a text that is right.
        words: take what is no number, true, false or null as text, instead of refusing it.

    Raises:
        ValueError: an option is not written as name=value, is given twice, or has no such value.
    """
    name, _, query = text.partition("?")
    options: dict[str, Any] = {}
    for pair in query.split("&") if query else ():
        key, found, value = pair.partition("=")
        if not found or not key:
            raise ValueError(
                f"the arguments of {what} must be name=value, joined by &, got {pair!r}: for instance {example}"
            )
        if key in options:
            raise ValueError(f"an argument of {what} must be given once, got {key!r} twice: leave one out")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            if not words or not value:
                kinds = "a number, true, false or a word" if words else "a number, true or false"
                raise ValueError(f"an argument of {what} must be {kinds}, got {pair!r}") from None
            options[key] = value
    return name, options
