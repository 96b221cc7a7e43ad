"""docs/VERIFY.md names every check, as the checks themselves describe it."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_of_checks_is_that_of_the_checks():
    spec = importlib.util.spec_from_file_location("list_checks", ROOT / "tools" / "list_checks.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    text = tool.DOCUMENT.read_text()
    assert tool.rewritten(text) == text, "run python tools/list_checks.py"
    assert "`previous-timestep`" in tool.table()
