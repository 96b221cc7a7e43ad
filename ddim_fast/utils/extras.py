"""How to install what only some commands need: the extras of ``pyproject.toml``."""

from __future__ import annotations

from collections.abc import Sequence


def missing(purpose: str, libraries: Sequence[str], extra: str) -> str:
    """Return the message that a purpose needs libraries which are not installed, and how to get
    them.

    ddim_fast is on no package index, so extras are installed from its source.
    """
    return (
        f"{purpose} needs {', '.join(libraries)}, not installed: "
        f'pip install ".[{extra}]" in the folder of ddim_fast\'s source'
    )
