"""Self-contained pages of HTML: no network, no other files, and no script or style but their own."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

from .extras import missing

# Characters that XML forbids. Text from elsewhere may contain them.
_NOT_TEXT = re.compile("[^\t\n\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def plain_text(text: str) -> str:
    """Replace characters that control a terminal or that text files may not contain."""
    return _NOT_TEXT.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def capital(text: str) -> str:
    """Return the text with its first letter in upper case, the others unchanged."""
    return text[:1].upper() + text[1:]


def render_page(package: str, extra: str, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """Render a package's ``report.html.jinja`` with ``report.css`` as ``style`` and ``report.js``
    as ``script``.

    The template also gets ``allowed`` for its content security policy: only these two, and pictures
    within the page.

    Args:
        extra: the extra of ddim_fast that installs jinja2.
        filters: filters of the template, beside ``plain`` and ``capital``.

    Raises:
        ImportError: jinja2 is missing.
    """
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise ImportError(missing("a page", ["jinja2"], extra)) from error

    def read(name: str) -> str:
        return resources.files(package).joinpath(name).read_text("utf-8")

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"plain": plain_text, "capital": capital, **filters}
    style, script = read("report.css"), read("report.js")
    return environment.from_string(read("report.html.jinja")).render(
        style=Markup(style),
        script=Markup(script),
        allowed=f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'",
        **values,
    )


def _digest(text: str) -> str:
    """Return the digest by which a content security policy names a script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
