"""What ``module:attribute`` names on a command line."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def import_string(name: str, what: str) -> Any:
    """The attribute, from this folder or from what is installed.

    Args:
        name: ``module:attribute``, with dots in either.
        what: it is, in words, for the error.

    Raises:
        ValueError: it cannot be imported.
    """
    module, _, attribute = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        value = importlib.import_module(module)
        for part in attribute.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{what} {name!r} cannot be imported ({type(error).__name__}: {error}): "
            "it is looked for in this folder and in what is installed here"
        ) from error
    return value
