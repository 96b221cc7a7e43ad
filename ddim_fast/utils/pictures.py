"""Samples as pictures: as arrays and images, in labelled grids and animations, on the screen and in
files; and pictures read from files."""

from __future__ import annotations

import importlib
import io
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .atomic_files import whole_file, write_atomically
from .checks import check_integer, check_path, refuse
from .extras import missing
from .files import reading

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What Pillow decodes by itself. It would hand an EPS file to Ghostscript, whatever the file's
name."""
_MARGIN = 6
_BACKGROUND, _INK = (255, 255, 255), (40, 40, 40)


@dataclass(frozen=True)
class _Format:
    """How Pillow writes a format: the options of one picture, and those of an animation."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


_PICTURES = {
    ".png": _Format("PNG"),
    ".webp": _Format("WEBP", {"lossless": True}),
    ".jpg": _Format("JPEG", {"quality": 95}),
    ".jpeg": _Format("JPEG", {"quality": 95}),
    ".bmp": _Format("BMP"),
    ".tif": _Format("TIFF"),
    ".tiff": _Format("TIFF"),
}
_ANIMATIONS = {".gif": _Format("GIF"), ".webp": _Format("WEBP", {"lossless": True}), ".png": _Format("PNG")}
_VIDEO = ".mp4"


def to_uint8(samples: Tensor) -> np.ndarray:
    """Convert samples ``(B, C, H, W)`` in [-1, 1] (others are clamped, NaN is black), C 1 or 3, to
    ``(B, H, W, C)`` uint8.

    Raises:
        TypeError: the samples are no floating-point tensor.
        ValueError: they have another shape.
    """
    return _to_levels(samples, 255).astype(np.uint8)


def _to_levels(samples: Tensor, highest: int) -> np.ndarray:
    """Convert samples to whole numbers from 0 to ``highest``, ``(B, H, W, C)`` float."""
    if not isinstance(samples, Tensor) or not samples.dtype.is_floating_point:
        what = samples.dtype if isinstance(samples, Tensor) else type(samples).__name__
        raise TypeError(f"pictures must be a floating-point tensor (B, C, H, W) in [-1, 1], got {what}: convert it")
    if samples.ndim != 4 or samples.shape[1] not in (1, 3):
        rule = "pictures must be (B, C, H, W) with 1 or 3 channels"
        refuse(rule, tuple(samples.shape), _shape_remedy(samples.shape))
    # On a device without float64 a level of 16 bits may be one off.
    exact = samples.detach().to("cpu", torch.float64 if highest > 255 else torch.float32)
    return ((exact.nan_to_num(nan=-1.0).clamp(-1, 1) + 1) * (highest / 2)).round().permute(0, 2, 3, 1).numpy()


def _shape_remedy(shape: Sequence[int]) -> str:
    """Return what makes ``(B, C, H, W)`` of samples of another shape."""
    if len(shape) == 2:
        return "for one grey picture use samples[None, None]"
    if len(shape) == 3 and shape[0] in (1, 3):
        return "for one picture use samples.unsqueeze(0)"
    if len(shape) == 3 and shape[2] in (1, 3):
        return "for one picture with its channels last use samples.movedim(-1, 0).unsqueeze(0)"
    if len(shape) == 3:
        return "for grey pictures use samples.unsqueeze(1)"
    if len(shape) == 4 and shape[3] in (1, 3):
        return "for pictures with their channels last use samples.movedim(-1, 1)"
    return "a latent is decoded first" if len(shape) == 4 else "pass pictures"


def to_pil(samples: Tensor) -> list[Image.Image]:
    """Convert samples ``(B, C, H, W)`` in [-1, 1] (others are clamped), C 1 or 3, to B images of
    Pillow.

    Raises:
        TypeError, ValueError: as ``to_uint8``.
    """
    return [Image.fromarray(picture if picture.shape[2] == 3 else picture[:, :, 0]) for picture in to_uint8(samples)]


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

    Raises:
        TypeError, ValueError: an argument breaks a rule.
    """
    pictures = to_pil(samples)
    layout = _Layout.of(samples, labels, title, scale, columns)
    font, title_font = ImageFont.load_default(size=11), ImageFont.load_default(size=14)
    sheet_width, sheet_height = layout.size
    if title:
        sheet_width = max(sheet_width, math.ceil(title_font.getlength(title)) + 2 * _MARGIN)
    sheet = Image.new("RGB", (sheet_width, sheet_height), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((_MARGIN, _MARGIN), title, fill=_INK, font=title_font)
    for i, picture in enumerate(pictures):
        x, y = layout.corner(i)
        sheet.paste(picture.resize((layout.width, layout.height), Image.Resampling.NEAREST), (x, y))
        if labels is not None:
            draw.text((x + layout.width / 2, y + layout.height + 2), labels[i], fill=_INK, font=font, anchor="ma")
    return sheet


@dataclass(frozen=True)
class _Layout:
    """Where the pictures of a grid are, in pixels of the sheet.

    Attributes:
        width, height: of a picture as it is drawn.
    """

    count: int
    columns: int
    scale: int
    width: int
    height: int
    label_height: int
    title_height: int

    @classmethod
    def of(
        cls, samples: Tensor, labels: Sequence[str] | None, title: str, scale: int | None, columns: int | None
    ) -> _Layout:
        count, _, height, width = samples.shape
        if labels is not None and len(labels) != count:
            raise ValueError(f"labels must be one for each of the {count} pictures, or None, got {len(labels)}")
        scale = _scale(width) if scale is None else check_integer("scale", scale, at_least=1)
        if columns is None:
            columns = max(1, math.ceil(math.sqrt(count)))
        check_integer("columns", columns, at_least=1)
        label_height, title_height = 16 if labels is not None else 0, 26 if title else 0
        return cls(count, columns, scale, width * scale, height * scale, label_height, title_height)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the sheet, where the title is no wider."""
        rows = math.ceil(self.count / self.columns)
        across, down = self.width + _MARGIN, self.height + self.label_height + _MARGIN
        return self.columns * across + _MARGIN, rows * down + _MARGIN + self.title_height

    def corner(self, i: int) -> tuple[int, int]:
        """The left upper corner of picture i: x and y."""
        across, down = self.width + _MARGIN, self.height + self.label_height + _MARGIN
        return _MARGIN + i % self.columns * across, _MARGIN + self.title_height + i // self.columns * down


def save_grid(
    samples: Tensor,
    path: str | Path,
    *,
    labels: Sequence[str] | None = None,
    title: str = "",
    scale: int | None = None,
    columns: int | None = None,
    bits: int = 8,
) -> None:
    """Write samples as one picture, a labelled grid, completely or not at all.

    >>> df.save_grid(images, "images.png", labels=["shirt", "boot"])

    Args:
        samples: ``(B, C, H, W)`` in [-1, 1] (others are clamped), C 1 or 3.
        path: its suffix is the format: .png, .webp (lossless), .jpg, .bmp or .tiff.
        labels, title, scale, columns: as for ``grid``.
        bits: 16 writes a PNG with 65536 levels; in colour that needs pypng.

    Raises:
        TypeError, ValueError: an argument breaks a rule.
        ImportError: a package is missing.
        OSError: the file cannot be written; an old one is unchanged.
    """
    path = _writable(path, _PICTURES, "a picture")
    if bits not in (8, 16) or isinstance(bits, bool):
        refuse("bits must be 8 or 16", bits)
    sheet = grid(samples, labels, title, scale, columns)
    if bits == 8:
        write_atomically(path, _encoded(sheet, _PICTURES[path.suffix.lower()]))
        return
    if path.suffix.lower() != ".png":
        refuse("bits=16 is for a PNG", str(path), "choose a name that ends in .png")
    layout = _Layout.of(samples, labels, title, scale, columns)
    deep = np.asarray(sheet, dtype=np.uint16) * 257
    for i, picture in enumerate(_to_levels(samples, 65535).astype(np.uint16)):
        x, y = layout.corner(i)
        larger = picture.repeat(layout.scale, 0).repeat(layout.scale, 1)
        deep[y : y + layout.height, x : x + layout.width] = larger
    write_atomically(path, _png_of_16_bits(deep, is_grey=samples.shape[1] == 1))


def _png_of_16_bits(sheet: np.ndarray, is_grey: bool) -> bytes:
    if is_grey:
        return _encoded(Image.fromarray(sheet[:, :, 0]), _PICTURES[".png"])
    png = _extra("png", "pypng", "a PNG of 16 bits in colour")
    file = io.BytesIO()
    height, width, _ = sheet.shape
    rows = [row.tobytes() for row in sheet.astype(">u2")]
    png.Writer(width, height, greyscale=False, bitdepth=16).write_packed(file, rows)
    return file.getvalue()


def show(
    samples: Tensor,
    labels: Sequence[str] | None = None,
    title: str = "",
    scale: int | None = None,
    columns: int | None = None,
) -> None:
    """Show samples as a labelled grid: in the cell of a notebook, or else in the desktop's viewer.

    Arguments and errors are those of ``grid``.
    """
    sheet = grid(samples, labels, title, scale, columns)
    # A notebook's kernel has imported IPython.
    ipython = sys.modules.get("IPython")
    if ipython is not None and hasattr(ipython.get_ipython(), "kernel"):
        importlib.import_module("IPython.display").display(sheet)
    else:
        sheet.show(title=title or None)


def grid_bytes(sample_shape: Sequence[int]) -> int:
    """Return the memory that a grid takes for each of its samples, at least."""
    *_, height, width = (1, 1, *sample_shape)
    scale = _scale(width)
    return 3 * (width * scale + _MARGIN) * (height * scale + _MARGIN)


def _scale(width: int) -> int:
    return max(1, round(84 / max(width, 1)))


def save_animation(
    frames: Sequence[Image.Image | Tensor],
    path: str | Path,
    milliseconds: int = 120,
    last_milliseconds: int = 1500,
) -> None:
    """Write an animation that pauses on its last frame, completely or not at all.

    >>> trajectory = sampler.sample(model, shape, seed=0, return_trajectory=True)
    >>> df.save_animation(trajectory.x0, "sampling.gif")

    Args:
        frames: images; or samples ``(B, C, H, W)`` in [-1, 1], each drawn as a grid. Smaller ones
            stand on a white sheet of the largest size.
        path: its suffix is the format: .gif, .webp (lossless), .png (APNG), or .mp4, which needs
            imageio-ffmpeg.
        milliseconds: of each frame, at least 1; the last one is shown for ``last_milliseconds``.

    Raises:
        TypeError, ValueError: an argument breaks a rule.
        ImportError: a package is missing.
        OSError: the file cannot be written; an old one is unchanged.
    """
    path = _writable(path, {**_ANIMATIONS, _VIDEO: None}, "an animation")
    check_integer("milliseconds", milliseconds, at_least=1)
    check_integer("last_milliseconds", last_milliseconds, at_least=1)
    drawn = [grid(frame) if isinstance(frame, Tensor) else frame for frame in frames]
    if not drawn:
        refuse("frames must be at least one image", frames)
    for i, image in enumerate(drawn):
        if not isinstance(image, Image.Image):
            refuse(f"frames[{i}] must be an image of Pillow, or samples", type(image).__name__, kind=TypeError)
    size = (max(image.width for image in drawn), max(image.height for image in drawn))
    drawn = [image if image.size == size else _on_sheet(image, size) for image in drawn]
    if path.suffix.lower() == _VIDEO:
        _write_video(drawn, path, milliseconds, last_milliseconds)
        return
    durations = [milliseconds] * (len(drawn) - 1) + [last_milliseconds]
    kind = _ANIMATIONS[path.suffix.lower()]
    content = _encoded(drawn[0], kind, save_all=True, append_images=drawn[1:], duration=durations, loop=0)
    write_atomically(path, content)


def _write_video(frames: Sequence[Image.Image], path: Path, milliseconds: int, last_milliseconds: int) -> None:
    """Write H.264, whose sizes are even, at a constant rate: the last frame is repeated."""
    ffmpeg = _extra("imageio_ffmpeg", "imageio-ffmpeg", "an MP4")
    width, height = frames[0].size
    size = (width + width % 2, height + height % 2)
    with whole_file(path) as file:
        writer = ffmpeg.write_frames(str(file), size, fps=1000 / milliseconds, macro_block_size=2, quality=8)
        try:
            writer.send(None)
            for frame in [*frames, *[frames[-1]] * (round(last_milliseconds / milliseconds) - 1)]:
                writer.send(_on_sheet(frame, size).tobytes())
        finally:
            writer.close()


def _on_sheet(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return the image at the left upper corner of a white sheet."""
    sheet = Image.new("RGB", size, _BACKGROUND)
    sheet.paste(image)
    return sheet


def _writable(path: str | Path, formats: Mapping[str, Any], what: str) -> Path:
    """Return the path of a file that can be written.

    Raises:
        TypeError, ValueError: its suffix is none of the formats, or its folder does not exist.
    """
    path = check_path("path", path)
    if path.suffix.lower() not in formats:
        refuse(f"path of {what} must end in {', '.join(formats)}", str(path))
    if not path.parent.is_dir():
        refuse("path must be in a folder that exists", str(path), f"make it first: mkdir -p {path.parent}")
    return path


def _encoded(image: Image.Image, kind: _Format, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind.name, **kind.options, **options)
    return file.getvalue()


def _extra(module: str, distribution: str, what: str) -> Any:
    """Import a package that is not installed with this one."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(missing(what, [distribution], "pictures")) from error


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
