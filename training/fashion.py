"""Fashion-MNIST, read from its four original IDX files (MIT licence).

It is needed for training only, never at run time.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DEFAULT_DIRECTORY = Path("/usr/share/datasets/fashion-mnist")  # as installed by Debian's dataset-fashion-mnist
_HINT = "install Debian's dataset-fashion-mnist, or download the four .gz files from github.com/zalandoresearch/fashion-mnist"


def _read_idx(path: Path, magic: int) -> np.ndarray:
    if not path.exists():
        raise FileNotFoundError(f"Fashion-MNIST must be at {path}, got no such file: {_HINT}")
    data = gzip.decompress(path.read_bytes())
    header = np.frombuffer(data, dtype=">u4", count=1 + (magic & 0xFF))
    if header[0] != magic:
        raise ValueError(f"{path} must start with the IDX magic number {magic:#x}, got {int(header[0]):#x}: {_HINT}")
    return np.frombuffer(data, dtype=np.uint8, offset=header.nbytes).reshape([int(n) for n in header[1:]])


def load_split(split: str, directory: Path = DEFAULT_DIRECTORY) -> tuple[Tensor, Tensor]:
    """Load images ``(N, 1, 28, 28)`` float32 in [-1, 1] and labels ``(N,)`` int64.

    ``split`` is "train" (60,000 images) or "test" (10,000).
    """
    prefix = {"train": "train", "test": "t10k"}[split]
    images = _read_idx(Path(directory) / f"{prefix}-images-idx3-ubyte.gz", 0x803)
    labels = _read_idx(Path(directory) / f"{prefix}-labels-idx1-ubyte.gz", 0x801)
    return torch.from_numpy(images.astype(np.float32) / 127.5 - 1).unsqueeze(1), torch.from_numpy(
        labels.astype(np.int64)
    )
