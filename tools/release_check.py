"""Check that a tag, the version, the changelog and CITATION.cff name one release: ``python tools/release_check.py v0.1.0``."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def problems(tag: str, root: Path = ROOT) -> list[str]:
    """Return what is wrong with releasing a commit under a tag: nothing if all agree."""
    (version,) = re.findall(r'^__version__ = "(.+)"$', (root / "ddim_fast/_version.py").read_text(), re.M)
    (cited,) = re.findall(r"^version: (.+)$", (root / "CITATION.cff").read_text(), re.M)
    changes = (root / "CHANGELOG.md").read_text()
    found = []
    if tag != f"v{version}":
        found.append(f"the tag must be v{version}, as in ddim_fast/_version.py, got {tag}")
    if cited != version:
        found.append(f"CITATION.cff must name version {version}, got {cited}")
    if not re.search(rf"^## {re.escape(version)} \(\d{{4}}-\d\d-\d\d\)$", changes, re.M):
        found.append(f'CHANGELOG.md must have a heading "## {version} (YYYY-MM-DD)"')
    if re.search(r"^## Unreleased$", changes, re.M):
        found.append('CHANGELOG.md must have no heading "## Unreleased": put the version in its place')
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"one tag is needed, got {len(sys.argv) - 1}: python tools/release_check.py v0.1.0")
    if wrong := problems(sys.argv[1]):
        sys.exit("\n".join(wrong))
