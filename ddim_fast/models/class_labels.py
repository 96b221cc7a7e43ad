"""Models whose condition is a class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..utils.checks import refuse


class ClassConditional:
    """A model of ``class_labels`` ``(B,)`` int64, from 0 to ``num_classes`` - 1; ``num_classes``
    stands for none of them, as no labels do."""

    num_classes: int

    def unconditional(self, conditioning: Mapping[str, Any]) -> dict[str, Any]:
        """Return the same conditioning without classes, for classifier-free guidance.

        Raises:
            TypeError: the labels are no tensor of integers.
        """
        labels = conditioning.get("class_labels")
        if labels is None:
            return {**conditioning, "class_labels": None}
        check_kind(labels, self.num_classes)
        return {**conditioning, "class_labels": torch.full_like(labels, self.num_classes)}


def check_kind(labels: object, num_classes: int) -> None:
    """Raise TypeError unless labels are a tensor of int64 or int32."""
    if not isinstance(labels, Tensor):
        refuse(_rule(num_classes), labels, "use torch.tensor([...]) with a class for each sample", TypeError)
    if labels.dtype not in (torch.int64, torch.int32):
        refuse(_rule(num_classes), labels.dtype, "use labels.long()", TypeError)


def check_labels(labels: object, batch_size: int, num_classes: int) -> None:
    """Raise TypeError or ValueError unless labels are ``(batch_size,)`` integers. Their values are
    not looked at."""
    check_kind(labels, num_classes)
    assert isinstance(labels, Tensor)  # for type checkers
    if labels.shape != (batch_size,):
        remedy = f"for one class in all samples use labels.expand({batch_size})" if labels.shape in ((), (1,)) else ""
        refuse(f"{_rule(num_classes)}, one for each of the {batch_size} samples", tuple(labels.shape), remedy)


def check_range(labels: Tensor, num_classes: int) -> None:
    """Raise ValueError where a label is no class. (On the CPU only: elsewhere the host would wait
    for the device.)"""
    if labels.device.type == "cpu" and labels.numel():
        for label in (int(bound) for bound in labels.aminmax()):
            if not 0 <= label <= num_classes:
                refuse(_rule(num_classes), label)


def _rule(num_classes: int) -> str:
    return f"class_labels must be a tensor (B,) int64, from 0 to {num_classes - 1} ({num_classes}: no class)"
