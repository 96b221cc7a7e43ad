"""``tqdm``, for the terminal, a notebook or a log."""

from __future__ import annotations

import sys
import warnings
from time import monotonic
from typing import Any

from tqdm import TqdmWarning

with warnings.catch_warnings():
    # In a notebook without ipywidgets its bar is one of text, which needs no warning in the first
    # cell that samples.
    warnings.simplefilter("ignore", TqdmWarning)
    from tqdm.auto import tqdm as _auto

__all__ = ["tqdm"]

SECONDS_BETWEEN_LINES = 30.0
"""Where each state of a bar is a line, as in a file or the log of a CI job."""


class tqdm(_auto):  # noqa: N801  # tqdm's own name
    """``tqdm.auto.tqdm``; where its file is neither a terminal nor a notebook's, it writes lines: at
    once, every 30 seconds, and at the end."""

    _writes_lines = False
    _last_line = float("-inf")

    def __init__(self, *args: Any, **options: Any):
        file = options.get("file") or sys.stderr
        self._writes_lines = not (_in_notebook() or _is_terminal(file))
        if self._writes_lines:
            options.setdefault("ascii", True)
        super().__init__(*args, **options)

    def display(self, *args: Any, **options: Any) -> Any:
        """Show the state of the bar as tqdm does; as a line, if the last one is old enough."""
        if not self._writes_lines:
            return super().display(*args, **options)
        now = monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return True

    def clear(self, *args: Any, **options: Any) -> None:
        """Clear the bar as tqdm does; leave lines."""
        if not self._writes_lines:
            super().clear(*args, **options)

    def close(self) -> None:
        """End the bar as tqdm does; or with a line."""
        if self._writes_lines and not self.disable:
            self._last_line = float("-inf")
            self.display()
            self.sp = None  # tqdm has nothing left to show
        super().close()


def _is_terminal(file: Any) -> bool:
    return bool(getattr(file, "isatty", lambda: False)())


def _in_notebook() -> bool:
    """Return whether a notebook's kernel runs this: it has imported IPython."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")
