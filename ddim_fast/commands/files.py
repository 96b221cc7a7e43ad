"""Files of samples and pictures that the commands read and write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..utils import pictures
from ..utils.files import npz_array, safetensors_tensor

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
NUMBER_SUFFIXES = (".npz", ".safetensors")


def check_output(path: Path | None, suffixes: tuple[str, ...]) -> None:
    """Raise ValueError if a file has an unknown suffix, or its folder does not exist."""
    if path is None:
        return
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"the file name must end in {' or '.join(suffixes)}, got {path}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"the folder of {path} does not exist: create it first")


def save_samples(images: Tensor, labels: list[int] | None, path: Path) -> None:
    if path.suffix.lower() == ".npz":
        arrays: dict[str, Any] = {} if labels is None else {"labels": np.array(labels)}
        np.savez_compressed(path, samples=images.numpy(), **arrays)
    else:
        tensors = {} if labels is None else {"labels": torch.tensor(labels, dtype=torch.int64, device="cpu")}
        save_file({"samples": images.contiguous(), **tensors}, path)


def read_samples(paths: tuple[Path, ...], sample_shape: tuple[int, ...]) -> tuple[Tensor, list[str]]:
    """Read pictures, and samples that ``--save`` wrote.

    Pictures are resized to the model's sample size, and converted to grey for models with one
    channel.

    Returns:
        One batch ``(B, C, H, W)`` in [-1, 1], and a name for each sample.

    Raises:
        ValueError: a file is neither, or its samples have another shape.
    """
    samples, names = [], []
    for path in paths:
        found = _read_numbers(path) if path.suffix.lower() in NUMBER_SUFFIXES else _read_picture(path, sample_shape)
        if found.ndim != 4 or tuple(found.shape[1:]) != tuple(sample_shape):
            raise ValueError(
                f"samples must be (B, {', '.join(map(str, sample_shape))}) for this model, got {tuple(found.shape)} in {path}"
            )
        samples.append(found)
        names += [path.stem if len(found) == 1 else f"{path.stem} {i}" for i in range(len(found))]
    return torch.cat(samples), names


def _read_numbers(path: Path) -> Tensor:
    if path.suffix.lower() == ".npz":
        samples = torch.from_numpy(npz_array(path, "samples").astype(np.float32))
    else:
        samples = safetensors_tensor(path, "samples").float()
    if not bool(samples.isfinite().all()):
        raise ValueError(f"samples must be finite, got NaN or infinity in {path}")
    return samples


def _read_picture(path: Path, sample_shape: tuple[int, ...]) -> Tensor:
    channels, height, width = sample_shape
    if channels not in (1, 3):
        raise ValueError(
            f"pictures need a model with 1 or 3 channels, got one with {channels}: pass samples as .npz or .safetensors"
        )
    pixels = pictures.read_picture(path, "L" if channels == 1 else "RGB", (width, height))
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]
