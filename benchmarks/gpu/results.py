"""What the sections found: JSON and a Markdown page, written as each of them ends."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


class Results:
    """Results by section, kept in a folder: a later run goes on where this one ended.

    Args:
        folder: receives ``gpu.json`` and ``gpu.md``.
    """

    def __init__(self, folder: Path, provenance: Mapping[str, Any]):
        self._json, self._page = folder / "gpu.json", folder / "gpu.md"
        folder.mkdir(parents=True, exist_ok=True)
        self.sections: dict[str, Any] = {}
        if self._json.exists():
            self.sections = json.loads(self._json.read_text())["sections"]
        self.provenance = dict(provenance)

    def run(self, name: str, section: Callable[[], list[Row]]) -> bool:
        """Run a section and write what it found, or how it failed; return whether it passed."""
        started = time.perf_counter()
        try:
            found: dict[str, Any] = {"rows": section()}
        except Exception as error:  # whatever it is, the sections after it are worth having
            found = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        self.sections[name] = {"seconds": round(time.perf_counter() - started, 2), **found}
        self._write()
        return "error" not in found

    def _write(self) -> None:
        content = json.dumps({"machine": self.provenance, "sections": self.sections}, indent=1) + "\n"
        part = self._json.with_suffix(".part")
        with open(part, "w") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._json)
        self._page.write_text(page(self.provenance, self.sections))


def page(provenance: Mapping[str, Any], sections: Mapping[str, Any]) -> str:
    """Return the results as Markdown: a table for each section."""
    lines = ["# Measured on a GPU", "", *(f"- {name}: {value}" for name, value in provenance.items())]
    for name, found in sections.items():
        lines += ["", f"## {name}", "", f"{found['seconds']} s"]
        if "error" in found:
            lines += ["", f"**Failed**: {found['error'].splitlines()[0]}"]
        else:
            lines += ["", *_table(found["rows"])]
    return "\n".join(lines) + "\n"


def _table(rows: list[Row]) -> list[str]:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    body = ["| " + " | ".join(_text(row.get(column, "")) for column in columns) + " |" for row in rows]
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *body]


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")
