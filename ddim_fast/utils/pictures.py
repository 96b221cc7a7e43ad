"""Pictures read from files, and labelled grids and animations of samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .files import reading

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What Pillow decodes by itself. It would hand an EPS file to Ghostscript, whatever the file's
name."""
_MARGIN = 6
_BACKGROUND, _INK = (255, 255, 255), (40, 40, 40)


def to_uint8(samples: Tensor) -> np.ndarray:
    """Convert samples ``(B, C, H, W)`` in [-1, 1] (others are clamped), C 1 or 3, to ``(B, H, W,
    C)`` uint8.

    Raises:
        ValueError: the samples have another shape.
    """
    if samples.ndim != 4 or samples.shape[1] not in (1, 3):
        raise ValueError(f"pictures must be (B, C, H, W) with 1 or 3 channels, got {tuple(samples.shape)}")
    pixels = ((samples.float().clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1)
    return pixels.cpu().numpy().astype(np.uint8)


def grid(
    samples: Tensor,
    labels: Sequence[str] | None = None,
    title: str = "",
    scale: int | None = None,
    columns: int | None = None,
) -> Image.Image:
    """Lay samples out in a grid, with a label under each and a title above.

    Args:
        samples: ``(B, C, H, W)`` in [-1, 1].
        labels: one per sample, or none.
        scale: screen pixels per pixel. None: pictures about 84 pixels wide.
        columns: None: an about square grid.
    """
    pictures = to_uint8(samples)
    count, height, width, channels = pictures.shape
    scale = scale or _scale(width)
    columns = columns or max(1, math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    font, title_font = ImageFont.load_default(size=11), ImageFont.load_default(size=14)
    label_height = 16 if labels is not None else 0
    title_height = 26 if title else 0
    cell_width, cell_height = width * scale + _MARGIN, height * scale + label_height + _MARGIN
    sheet_width = columns * cell_width + _MARGIN
    if title:
        sheet_width = max(sheet_width, math.ceil(title_font.getlength(title)) + 2 * _MARGIN)
    sheet = Image.new("RGB", (sheet_width, rows * cell_height + _MARGIN + title_height), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((_MARGIN, _MARGIN), title, fill=_INK, font=title_font)
    for i, picture in enumerate(pictures):
        x = _MARGIN + i % columns * cell_width
        y = _MARGIN + title_height + i // columns * cell_height
        image = Image.fromarray(picture if channels == 3 else picture[:, :, 0])
        sheet.paste(image.resize((width * scale, height * scale), Image.Resampling.NEAREST), (x, y))
        if labels is not None:
            centre = x + width * scale / 2
            draw.text((centre, y + height * scale + 2), labels[i], fill=_INK, font=font, anchor="ma")
    return sheet


def grid_bytes(sample_shape: Sequence[int]) -> int:
    """Return the memory that a grid takes for each of its samples, at least."""
    *_, height, width = (1, 1, *sample_shape)
    scale = _scale(width)
    return 3 * (width * scale + _MARGIN) * (height * scale + _MARGIN)


def _scale(width: int) -> int:
    return max(1, round(84 / max(width, 1)))


def save_animation(
    frames: Sequence[Image.Image], path: str | Path, milliseconds: int = 120, last_milliseconds: int = 1500
) -> None:
    """Write frames of one size as an animated GIF that pauses on its last frame."""
    durations = [milliseconds] * (len(frames) - 1) + [last_milliseconds]
    frames[0].save(path, save_all=True, append_images=list(frames[1:]), duration=durations, loop=0)


def read_picture(path: Path, mode: str, size: tuple[int, int]) -> np.ndarray:
    """Read a picture in a mode of Pillow ("L" or "RGB"), resized to (width, height), as ``(height,
    width, channels)`` float32 from 0 to 255.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no picture, or damaged.
    """
    with reading(path, f"a picture ({', '.join(FORMATS)})") as file:
        with Image.open(file, formats=FORMATS) as image:
            resized = image.convert(mode).resize(size, Image.Resampling.LANCZOS)
        return np.asarray(resized, dtype=np.float32).reshape(size[1], size[0], -1)
