"""The Python examples of a page of docs/, to be run as they are written."""

import re
from pathlib import Path
from typing import NamedTuple

import torch

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"(?:<!-- given: (?P<given>\w+) -->\n+)?```python\n(?P<code>.*?)```", re.DOTALL)


class Example(NamedTuple):
    """A block of Python.

    Attributes:
        given: what a comment ``<!-- given: NAME -->`` before the block names: what the reader has. "" for none.
    """

    page: str
    number: int
    given: str
    code: str

    def run(self, names):
        """Run it with these names, which it adds to."""
        exec(compile(self.code, f"{self.page}, block {self.number}", "exec"), names)


def examples(page):
    """Return every example of a page, by its name in docs/."""
    blocks = BLOCK.finditer((DOCS / page).read_text())
    return [Example(page, n, block["given"] or "", block["code"]) for n, block in enumerate(blocks, 1)]


def per_sample(t):
    return t.view(-1, 1, 1, 1)


NETWORKS = {
    "network": lambda x, t: 0.3 * x * per_sample(t),
    "raw_network": lambda x, t: torch.tanh(x + per_sample(t)),
    "denoiser": lambda x, sigma: x / (1 + per_sample(sigma) ** 2),
}
"""Models that pages say the reader has: of flow matching, EDM's raw network, and EDM's denoiser."""
