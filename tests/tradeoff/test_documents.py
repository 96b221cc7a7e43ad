"""The page on trade-offs says what was measured."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tables():
    spec = importlib.util.spec_from_file_location("tradeoff_tables", ROOT / "tools/tradeoff_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_tables_are_those_of_the_studies(tables):
    text = tables.PAGE.read_text()
    assert tables.page_text(text) == text
    for name in tables.TABLES:
        changed = text.replace(f"<!-- {name}: begin -->\n", f"<!-- {name}: begin -->\nx", 1)
        assert changed != text
        assert tables.page_text(changed) == text
        with pytest.raises(ValueError, match=f"one pair of markers for {name}, got 0"):
            tables.page_text(text.replace(f"<!-- {name}: begin -->", ""))
