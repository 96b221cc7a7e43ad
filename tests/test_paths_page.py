"""The examples of docs/PATHS.md run from top to bottom, as written."""

import pytest
from page_examples import NETWORKS, examples

EXAMPLES = examples("PATHS.md")


@pytest.fixture(scope="module")
def names():
    return {**NETWORKS}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: str(example.number))
def test_every_block_runs(names, example):
    example.run(names)
    assert names["images"].isfinite().all()
    assert len(names["images"]) in (4, 16)


def test_the_page_has_them():
    assert len(EXAMPLES) >= 7
