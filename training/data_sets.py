"""The data sets that models are trained on, by the name of the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import fashion
import scenes
from torch import Tensor


class Dataset(NamedTuple):
    """Where pictures come from, and the U-Net for them.

    Attributes:
        load_split: ("train" or "test", path) -> pictures ``(N, C, H, W)`` float32 in [-1, 1],
            labels ``(N,)`` int64.
        unet: arguments of ``SmallUNet``.
    """

    load_split: Callable[[str, Path], tuple[Tensor, Tensor]]
    path: Path
    unet: dict[str, int]


DATASETS = {
    "fashion": Dataset(fashion.load_split, fashion.DEFAULT_DIRECTORY, {"multiplier": 3}),
    "scenes": Dataset(
        scenes.load_split,
        Path("scenes.npz"),
        {"in_channels": 3, "num_classes": len(scenes.KINDS), "multiplier": 3},
    ),
}
