"""Write the table of checks in docs/VERIFY.md: ``python tools/list_checks.py``."""

from pathlib import Path

from ddim_fast.verify.checks import CHECKS

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "VERIFY.md"
BEGIN, END = "<!-- checks: begin -->", "<!-- checks: end -->"


def table() -> str:
    """Return the Markdown table: each check's claim, source, tolerance and needed features."""
    lines = ["| check | proves | source | tolerance | applies to |", "|---|---|---|---|---|"]
    for check in CHECKS.values():
        needs = ", ".join(f"`{feature}`" for feature in sorted(check.needs)) or "all"
        name = f"`{check.name}`" + (" (full)" if check.full_only else "")
        cells = (name, check.proves, check.source, check.tolerance, needs)
        escaped = [cell.replace("|", "\\|") for cell in cells]
        lines.append(f"| {' | '.join(escaped)} |")
    return "\n".join(lines)


def rewritten(text: str) -> str:
    """Return the document with its table regenerated."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    DOCUMENT.write_text(rewritten(DOCUMENT.read_text()))
