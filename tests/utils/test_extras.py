"""Messages that name an extra: one wording, of extras that exist, with libraries that they install."""

import ast
import re
from pathlib import Path

from ddim_fast.utils.extras import missing

ROOT = Path(__file__).parents[2]
SOURCES = [*(ROOT / "ddim_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), ROOT / "pytest_ddim_fast.py"]


def extras() -> dict[str, str]:
    text = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    return dict(re.findall(r"^(\w+) = \[(.*?)\]", text, re.MULTILINE | re.DOTALL))


def test_the_message_names_what_can_be_typed():
    assert missing("verify", ["scipy", "rich"], "verify") == (
        'verify needs scipy, rich, not installed: pip install ".[verify]" in the folder of ddim_fast\'s source'
    )


def test_every_extra_that_is_named_installs_the_libraries_named_with_it():
    calls = [
        node
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "missing"
    ]
    assert len(calls) >= 5
    for call in calls:
        _, libraries, extra = call.args
        if isinstance(extra, ast.Constant):
            assert extra.value in extras()
            for name in ast.walk(libraries):
                assert not isinstance(name, ast.Constant) or name.value in extras()[extra.value]


def test_no_message_names_a_package_that_no_index_has():
    found = [path.name for path in SOURCES if re.search(r"pip install ['\"\\]*ddim[-_]fast", path.read_text())]
    assert not found
