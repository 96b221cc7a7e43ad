"""The examples of docs/PATHS.md run from top to bottom, as written."""

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parent.parent / "docs" / "PATHS.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module")
def names():
    """What the page says that the reader has: ``network``, ``raw_network`` and ``denoiser``."""
    return {
        "network": lambda x, t: 0.3 * x * t.view(-1, 1, 1, 1),
        "raw_network": lambda x, t: torch.tanh(x + t.view(-1, 1, 1, 1)),
        "denoiser": lambda x, sigma: x / (1 + sigma.view(-1, 1, 1, 1) ** 2),
    }


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_block_runs(names, number):
    exec(compile(BLOCKS[number], f"{PAGE.name}, block {number + 1}", "exec"), names)
    assert names["images"].isfinite().all()
    assert len(names["images"]) in (4, 16)


def test_the_page_has_them():
    assert len(BLOCKS) >= 7
