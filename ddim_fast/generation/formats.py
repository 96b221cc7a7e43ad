"""Shards: some samples as the bytes of one file. Equal samples give equal bytes: no file contains a
time or a user."""

from __future__ import annotations

import io
import math
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from ..utils.pictures import to_uint8

ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip can hold
_TAR_BLOCK = 512
_PNG_OVERHEAD = 256  # signature, chunks, and what deflate adds to what it cannot compress


@dataclass(frozen=True, eq=False)
class Shard:
    """Consecutive samples of a run.

    Attributes:
        first: the number of the first.
        samples: ``(n, C, ...)`` floating point, on the CPU.
        labels: ``(n,)`` int64, or None.
        keys: a name for each in a tar, or None: its number.
    """

    first: int
    samples: Tensor
    labels: Tensor | None = None
    keys: Sequence[str] | None = None


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        encode: a shard as bytes.
        largest: an upper bound of the bytes of a sample ``(C, ...)`` of that dtype.
        pictures: samples must be ``(1 or 3, H, W)`` and are clamped to [-1, 1].
    """

    suffix: str
    encode: Callable[[Shard], bytes]
    largest: Callable[[Sequence[int], torch.dtype], int]
    pictures: bool


def _encode_safetensors(shard: Shard) -> bytes:
    labels = {} if shard.labels is None else {"labels": shard.labels}
    return save({"samples": shard.samples.contiguous(), **labels})


def _encode_npz(shard: Shard) -> bytes:
    """Encode ``arr_0`` ``(n, H, W, 3)`` uint8, and with labels ``arr_1`` ``(n,)`` int64:
    guided-diffusion's layout.

    Grey pictures are written as three equal channels, since its evaluator's network takes colours.
    """
    pixels = _pixels(shard.samples)
    arrays = {"arr_0": np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:3], 3)))}
    if shard.labels is not None:
        arrays["arr_1"] = shard.labels.numpy()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy", ZIP_EPOCH), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _encode_webdataset(shard: Shard) -> bytes:
    """Encode each sample as ``KEY.png`` and, with labels, its class in decimal as ``KEY.cls``."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for i, picture in enumerate(_pixels(shard.samples)):
            key = f"{shard.first + i:09d}" if shard.keys is None else shard.keys[i]
            _add(archive, f"{key}.png", _png(picture))
            if shard.labels is not None:
                _add(archive, f"{key}.cls", b"%d" % int(shard.labels[i]))
    return buffer.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # owner 0, time 0, mode 644
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture if picture.shape[2] == 3 else picture[:, :, 0]).save(buffer, "png", compress_level=3)
    return buffer.getvalue()


def _pixels(samples: Tensor) -> np.ndarray:
    """Convert samples to ``(n, H, W, C)`` uint8; NaN becomes grey. One by one, so that
    intermediates fit the caches."""
    pixels = np.empty((len(samples), *samples.shape[2:], samples.shape[1]), np.uint8)
    for picture, sample in zip(pixels, samples, strict=True):
        picture[:] = to_uint8(torch.nan_to_num(sample[None].float(), nan=0.0, posinf=1.0, neginf=-1.0))[0]
    return pixels


def _in_tar(shape: Sequence[int], dtype: torch.dtype) -> int:
    png = math.prod(shape) * 33 // 32 + shape[-2] + _PNG_OVERHEAD
    return -(-png // _TAR_BLOCK) * _TAR_BLOCK + 3 * _TAR_BLOCK


FORMATS = {
    "safetensors": Format(
        ".safetensors", _encode_safetensors, lambda shape, dtype: math.prod(shape) * dtype.itemsize + 8, pictures=False
    ),
    "npz": Format(".npz", _encode_npz, lambda shape, dtype: 3 * math.prod(shape[-2:]) + 8, pictures=True),
    "webdataset": Format(".tar", _encode_webdataset, _in_tar, pictures=True),
}
PER_SHARD = 1 << 14
"""An upper bound of a shard's bytes beside its samples: a header, the end of a tar."""
