"""Import what ``module:attribute`` names on a command line."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def import_string(name: str, what: str) -> Any:
    """Import an attribute of a module in the current folder, or of one that is installed.

    The current folder comes first on ``sys.path`` during the import, as for a script, and last
    afterwards: the module can still import its neighbours inside functions, and no installed
    package is shadowed. This is the one thing that stays changed, in a process that a command line
    started; after a failed import nothing is.

    Args:
        name: ``module:attribute``, with dots in either.
        what: what the name stands for, in words, for the error.

    Raises:
        ValueError: the name has another form, or cannot be imported.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"{what} must be named module:attribute, got {name!r}: for instance my_file:my_attribute")
    try:
        with _current_folder_on_path():
            value = importlib.import_module(module)
            for part in attribute.split("."):
                value = getattr(value, part)
    except (Exception, SystemExit) as error:  # whatever the module does; Ctrl-C is the user's
        if module.endswith(".py"):
            remedy = f"leave .py out, {module.removesuffix('.py').replace('/', '.')}:{attribute}"
            raise ValueError(f"{what} must be named module:attribute, got {name!r}: {remedy}") from error
        raise ValueError(
            f"{what} {name!r} cannot be imported ({type(error).__name__}: {error}{_place(error)}): "
            "it is looked for in the current folder and in what is installed"
        ) from error
    return value


@contextmanager
def exits_refused(name: str, what: str) -> Iterator[None]:
    """Make a ValueError of ``sys.exit`` in what was imported: the command has not done its work."""
    try:
        yield
    except SystemExit as error:
        raise ValueError(
            f"{what} {name!r} must not end the program, got SystemExit({error.code!r}){_place(error)}"
        ) from error


def _place(error: BaseException) -> str:
    """Return where in a file an error was raised, for those that do not say it themselves."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, (ImportError, AttributeError, SyntaxError)) or not frames:
        return ""
    return f", {frames[-1].filename}, line {frames[-1].lineno}"


@contextmanager
def _current_folder_on_path() -> Iterator[None]:
    """Put the current folder first on ``sys.path``, and last after success; leave it alone where it
    is on it already."""
    here = str(Path.cwd())
    if here in sys.path:
        yield
        return
    importlib.invalidate_caches()  # the folder may have changed since it was last searched
    sys.path.insert(0, here)
    try:
        yield
    except BaseException:
        sys.path.remove(here)
        raise
    sys.path.remove(here)
    sys.path.append(here)
