"""Files of samples and pictures that the commands read and write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors.torch import save_file
from torch import Tensor

from ..utils import pictures
from ..utils.atomic_files import whole_file
from ..utils.files import npz_array, reading, safetensors_tensor
from .outputs import NUMBER_SUFFIXES


def save_samples(images: Tensor, labels: list[int] | None, path: Path) -> None:
    with whole_file(path.resolve()) as file:
        if path.suffix.lower() == ".npz":
            arrays: dict[str, Any] = {} if labels is None else {"labels": np.array(labels)}
            np.savez_compressed(file, samples=images.numpy(), **arrays)
        else:
            tensors = {} if labels is None else {"labels": torch.tensor(labels, dtype=torch.int64, device="cpu")}
            save_file({"samples": images.contiguous(), **tensors}, file)


def save_pictures(images: Tensor, directory: Path) -> None:
    """Write each of ``(B, C, H, W)`` as a PNG, named by its number."""
    directory.mkdir(exist_ok=True)
    digits = max(4, len(str(len(images) - 1)))
    for number, picture in enumerate(pictures.to_pil(images)):
        with whole_file((directory / f"{number:0{digits}d}.png").resolve()) as file:
            picture.save(file)


def read_samples(
    paths: tuple[Path, ...],
    sample_shape: tuple[int, ...],
    picture_shape: tuple[int, ...],
    encode: Callable[[Tensor], Tensor] | None,
    device: torch.device,
    note: Callable[[str], None],
) -> tuple[Tensor, list[str]]:
    """Read pictures, and samples that ``--save`` wrote.

    Pictures are resized to the model's size, which ``note`` says, converted to grey for models with
    one channel, and encoded where samples are latents.

    Returns:
        One batch ``(B, *sample_shape)`` on the device, pictures in [-1, 1], and a name for each
        sample.

    Raises:
        ValueError: a file is neither, or its samples have another shape.
    """
    samples, names = [], []
    for path in paths:
        if path.suffix.lower() in NUMBER_SUFFIXES:
            found = _read_numbers(path).to(device)
        else:
            found = read_picture(path, picture_shape, note).to(device)
            found = found if encode is None else encode(found)
        if not len(found):
            raise ValueError(f"a file must hold samples, got none in {path}: save some with --save")
        if tuple(found.shape[1:]) != tuple(sample_shape):
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


def read_picture(path: Path, shape: tuple[int, ...], note: Callable[[str], None]) -> Tensor:
    """Read a picture as ``(1, C, H, W)`` in [-1, 1], resized where it has another size."""
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(
            f"pictures are for models of samples (1 or 3, H, W), got {path} for one of {shape}: pass samples as .npz or .safetensors"
        )
    channels, height, width = shape
    with reading(path, f"a picture ({', '.join(pictures.FORMATS)})") as file:
        try:
            found = Image.open(file, formats=pictures.FORMATS).size
        except UnidentifiedImageError:  # Pillow's message names an object of Python
            raise ValueError("its first bytes are of no such format") from None
    if found != (width, height):
        squashed = "" if found[0] * height == found[1] * width else ", which changes its proportions: crop it first"
        note(f"{path} is resized from {found[0]} x {found[1]} pixels to {width} x {height}{squashed}")
    pixels = pictures.read_picture(path, "L" if channels == 1 else "RGB", (width, height))
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]
