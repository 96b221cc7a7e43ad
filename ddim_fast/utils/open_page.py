"""Open a page in the browser of whoever sits before this machine."""

from __future__ import annotations

import os
import sys
import webbrowser
from pathlib import Path

_DISPLAYS = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
"""Variables of which a desktop sets one. Without, a browser would be one of the terminal."""


def open_page(path: Path) -> bool:
    """Open a file in the browser; return False where there is no display, or no browser."""
    if sys.platform.startswith("linux") and not any(os.environ.get(name) for name in _DISPLAYS):
        return False
    try:
        return webbrowser.open(path.resolve().as_uri())
    except webbrowser.Error:
        return False
