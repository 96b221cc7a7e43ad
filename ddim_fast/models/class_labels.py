"""Models whose condition is a class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class ClassConditional:
    """A model of ``class_labels`` ``(B,)`` int64, from 0 to ``num_classes`` - 1; ``num_classes``
    stands for none of them, as no labels do."""

    num_classes: int

    def unconditional(self, conditioning: Mapping[str, Any]) -> dict[str, Any]:
        """Return the same conditioning without classes, for classifier-free guidance."""
        labels = conditioning.get("class_labels")
        return {**conditioning, "class_labels": None if labels is None else torch.full_like(labels, self.num_classes)}
