"""Samples as arrays, images, grids and animations: what a file holds is read back with another reader than the writer."""

import struct
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import ddim_fast as df
from ddim_fast.utils import pictures

# All of these levels are exact in float32: -1, -0.5, 0, 0.5, 1, and beyond.
GREY = torch.tensor([-1.0, 1.0, 0.0, -3.0, 7.0, -0.5]).view(1, 1, 2, 3)
COLOUR = torch.linspace(-1, 1, 2 * 3 * 4 * 5).view(2, 3, 4, 5)


def test_levels_are_rounded_and_clamped():
    assert df.to_uint8(GREY).tolist() == [[[[0], [255], [128]], [[0], [255], [64]]]]
    got, exact = df.to_uint8(COLOUR), (COLOUR.permute(0, 2, 3, 1).double().numpy() + 1) * 127.5
    assert got.dtype == np.uint8
    assert got.shape == (2, 4, 5, 3)
    assert np.abs(got - exact).max() <= 0.5 + 1e-4
    assert np.array_equal(df.to_uint8(COLOUR.half().requires_grad_()), df.to_uint8(COLOUR.half().float()))


@pytest.mark.filterwarnings("error")
def test_nan_is_black_and_infinity_is_clamped_without_a_warning_of_numpy():
    wrong = torch.tensor([torch.nan, torch.inf, -torch.inf]).view(1, 1, 1, 3)
    assert df.to_uint8(wrong).flatten().tolist() == [0, 255, 0]


def test_images_of_pillow():
    grey, *none = df.to_pil(GREY)
    assert (grey.mode, grey.size, none) == ("L", (3, 2), [])
    first, second = df.to_pil(COLOUR)
    assert (first.mode, first.size) == ("RGB", (5, 4))
    assert np.array_equal(np.asarray(second), df.to_uint8(COLOUR)[1])
    assert df.to_pil(COLOUR[:0]) == []


@pytest.mark.parametrize("convert", [df.to_uint8, df.to_pil, lambda x: df.save_grid(x, "never.png")])
@pytest.mark.parametrize(
    ("samples", "error", "said"),
    [
        (torch.zeros(1, 2, 4, 4), ValueError, r"with 1 or 3 channels, got \(1, 2, 4, 4\): a latent is decoded first"),
        (torch.zeros(3, 4, 4), ValueError, r"got \(3, 4, 4\): for one picture use samples\.unsqueeze\(0\)"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), TypeError, r"in \[-1, 1\], got torch\.uint8"),
        (np.zeros((1, 3, 4, 4)), TypeError, r"got ndarray"),
    ],
)
def test_what_is_no_picture_is_refused(convert, samples, error, said):
    with pytest.raises(error, match=rf"^pictures must be .*{said}"):
        convert(samples)


def blocks(sheet, samples, scale, columns, top=0):
    """The pictures in a sheet, each with one pixel of every block of ``scale``; asserts that a block is of one colour."""
    found = []
    for i in range(len(samples)):
        height, width = (size * scale for size in samples.shape[2:])
        x, y = 6 + i % columns * (width + 6), top + 6 + i // columns * (height + 6)
        part = sheet[y : y + height, x : x + width]
        assert np.array_equal(part, part[::scale, ::scale].repeat(scale, 0).repeat(scale, 1))
        found.append(part[::scale, ::scale])
    return np.stack(found)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".bmp", ".tiff", ".PNG"])
def test_a_grid_is_written_without_loss(tmp_path, suffix):
    path = tmp_path / f"grid{suffix}"
    df.save_grid(COLOUR, path, scale=3, columns=2)
    with Image.open(path) as file:
        sheet = np.asarray(file.convert("RGB"))
    assert sheet.shape == (4 * 3 + 12, 2 * (5 * 3 + 6) + 6, 3)
    assert np.array_equal(blocks(sheet, COLOUR, 3, 2), df.to_uint8(COLOUR))
    assert [*tmp_path.iterdir()] == [path]


def test_labels_and_a_title_make_room_and_one_is_needed_for_each_picture(tmp_path):
    df.save_grid(COLOUR, str(tmp_path / "plain.jpg"))
    df.save_grid(COLOUR, tmp_path / "all.png", labels=["a", "b"], title="two", columns=1, scale=8)
    with Image.open(tmp_path / "all.png") as sheet:
        assert sheet.height == 26 + 6 + 2 * (4 * 8 + 16 + 6)
    with pytest.raises(ValueError, match="labels must be one for each of the 2 pictures, or None, got 1"):
        df.save_grid(COLOUR, tmp_path / "never.png", labels=["a"])


def png_levels(path):
    """A PNG of 16 bits, read by its specification: no library here reads colours of 16 bits."""
    data, chunks, place = path.read_bytes(), {}, 8
    while place < len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        chunks[kind] = chunks.get(kind, b"") + data[place + 8 : place + 8 + length]
        place += length + 12
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert depth == 16
    channels = {0: 1, 2: 3}[colour]
    raw = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), dtype=np.uint8).reshape(height, 1 + width * channels * 2)
    step, rows, above = channels * 2, [], np.zeros(width * channels * 2, dtype=np.int64)
    for kind, *line in raw.astype(np.int64).tolist():
        row = np.zeros_like(above)
        for i, value in enumerate(line):
            a, b, c = row[i - step] if i >= step else 0, above[i], above[i - step] if i >= step else 0
            nearest = min((a, b, c), key=lambda v, p=a + b - c: abs(p - v))
            row[i] = (value + (0, a, b, (a + b) // 2, nearest)[kind]) % 256
        rows.append(row)
        above = row
    return np.stack(rows).astype(np.uint8).view(">u2").reshape(height, width, channels)


@pytest.mark.parametrize("samples", [COLOUR[:, :1], COLOUR], ids=["grey", "colour"])
def test_16_bits_keep_what_8_lose(tmp_path, samples):
    if samples.shape[1] == 3:
        pytest.importorskip("png", reason="pypng is in the extra pictures")
    path = tmp_path / "deep.png"
    df.save_grid(samples, path, scale=1, columns=2, bits=16)
    exact = (samples.double().permute(0, 2, 3, 1).numpy() + 1) * 32767.5
    assert np.abs(blocks(png_levels(path), samples, 1, 2) - exact).max() <= 0.5
    assert len(np.unique(exact.round())) == exact.size
    with Image.open(path) as sheet:
        assert sheet.size == (2 * 11 + 6, 16)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"path": "a.txt"}, ValueError, r"path of a picture must end in \.png, .*got 'a\.txt'"),
        ({"path": "nowhere/a.png"}, ValueError, "path must be in a folder that exists.*mkdir -p nowhere"),
        ({"path": 3}, TypeError, "path must be a path"),
        ({"bits": 12}, ValueError, "bits must be 8 or 16, got 12"),
        ({"path": "a.webp", "bits": 16}, ValueError, "bits=16 is for a PNG, got 'a.webp'"),
        ({"scale": 0}, ValueError, "scale must be an integer, at least 1, got 0"),
        ({"columns": 0}, ValueError, "columns must be an integer, at least 1, got 0"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(tmp_path, monkeypatch, options, error, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=said):
        df.save_grid(**{"samples": COLOUR, "path": "a.png", **options})
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("module", "distribution", "write"),
    [
        ("png", "pypng", lambda path: df.save_grid(COLOUR, path / "a.png", bits=16)),
        ("imageio_ffmpeg", "imageio-ffmpeg", lambda path: df.save_animation([COLOUR], path / "a.mp4")),
    ],
)
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, module, distribution, write):
    monkeypatch.setitem(sys.modules, module, None)
    said = rf'needs {distribution}, not installed: pip install "\.\[pictures\]" in the folder of ddim_fast\'s source$'
    with pytest.raises(ImportError, match=said):
        write(tmp_path)
    assert [*tmp_path.iterdir()] == []


# --- Animations -------------------------------------------------------------------------------------------------------

FRAMES = [torch.full((1, 3, 4, 4), value) for value in (-1.0, 0.0, 1.0)]


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_an_animation_has_its_frames_and_pauses_on_the_last(tmp_path, suffix):
    path = tmp_path / f"run{suffix}"
    df.save_animation(FRAMES, path, milliseconds=100, last_milliseconds=700)
    with Image.open(path) as file:
        frames = [
            (frame.convert("RGB").getpixel((20, 20))[0], frame.info["duration"])
            for frame in ImageSequence.Iterator(file)
        ]
    assert frames == [(0, 100), (128, 100), (255, 700)]


def test_frames_may_be_images_and_a_trajectory_is_frames(tmp_path):
    sampler = df.DDIMSampler(df.NoiseSchedule.linear(), 3)
    trajectory = sampler.sample(lambda x, t: x * 0.5, (4, 1, 8, 8), seed=0, return_trajectory=True)
    df.save_animation(trajectory.x_t, tmp_path / "x_t.gif")
    df.save_animation([Image.new("L", (5, 5), value) for value in (0, 255)], tmp_path / "images.gif")
    with Image.open(tmp_path / "x_t.gif") as file:
        assert file.n_frames == 4


def test_smaller_frames_stand_on_a_white_sheet_of_the_largest_size(tmp_path):
    """The titles of a run's frames are not of one width."""
    df.save_animation([Image.new("RGB", (5, 9)), Image.new("RGB", (8, 4))], tmp_path / "a.webp")
    with Image.open(tmp_path / "a.webp") as file:
        frames = [np.asarray(frame.convert("RGB"))[:, :, 0] for frame in ImageSequence.Iterator(file)]
    for frame, (width, height) in zip(frames, [(5, 9), (8, 4)], strict=True):
        expected = np.full((9, 8), 255)
        expected[:height, :width] = 0
        assert np.array_equal(frame, expected)


@pytest.mark.filterwarnings("ignore:Exception ignored")  # the reader of imageio-ffmpeg leaves a pipe open
def test_a_video_has_the_rate_the_sizes_and_the_pause(tmp_path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg is in the extra pictures")
    path = tmp_path / "run.mp4"
    odd = [Image.new("RGB", (33, 17), (value, value, value)) for value in (0, 128, 255)]
    df.save_animation(odd, path, milliseconds=100, last_milliseconds=400)
    frames = ffmpeg.read_frames(str(path))
    about = next(frames)
    assert (about["size"], about["fps"], about["codec"]) == ((34, 18), 10.0, "h264")
    levels = [np.frombuffer(frame, dtype=np.uint8).reshape(18, 34, 3)[8, 16].mean() for frame in frames]
    assert np.abs(np.array(levels) - [0, 128, 255, 255, 255, 255]).max() < 6
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"frames": []}, ValueError, "frames must be at least one image"),
        ({"frames": ["a.png"]}, TypeError, r"frames\[0\] must be an image of Pillow, or samples, got 'str'"),
        ({"path": "a.avi"}, ValueError, r"path of an animation must end in \.gif, .*\.mp4, got 'a\.avi'"),
        ({"milliseconds": 0}, ValueError, "milliseconds must be an integer, at least 1, got 0"),
        ({"last_milliseconds": 0.5}, TypeError, "last_milliseconds must be an integer"),
    ],
)
def test_mistakes_in_an_animation_are_refused(tmp_path, monkeypatch, options, error, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=said):
        df.save_animation(**{"frames": FRAMES, "path": "a.gif", **options})
    assert [*tmp_path.iterdir()] == []


# --- On the screen ----------------------------------------------------------------------------------------------------


def test_a_notebook_shows_the_grid_in_its_cell(monkeypatch):
    shown = []
    display = SimpleNamespace(display=shown.append)
    notebook = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object()), display=display)
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(Image.Image, "show", lambda *_, **__: pytest.fail("a viewer was opened"))
    assert df.show(COLOUR, title="two") is None
    (sheet,) = shown
    assert sheet.size == pictures.grid(COLOUR, title="two").size


@pytest.mark.parametrize("shell", [None, SimpleNamespace()], ids=["imported", "a terminal"])
def test_elsewhere_a_viewer_does(monkeypatch, shell):
    shown = []
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(Image.Image, "show", lambda self, title=None: shown.append((self.size, title)))
    df.show(COLOUR)
    assert shown == [(pictures.grid(COLOUR).size, None)]


def test_the_package_lists_them_and_no_other_name():
    assert {"save_animation", "save_grid", "show", "to_pil", "to_uint8"} <= {*dir(df)} & {*df.__all__}
    assert df.to_pil is pictures.to_pil
    with pytest.raises(AttributeError, match="module 'ddim_fast' has no attribute 'nothing'"):
        df.nothing  # noqa: B018  (looking it up is the test)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    monkeypatch.setattr(Image.Image, "save", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        df.save_grid(COLOUR, path)
    assert path.read_bytes() == b"old"
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(
    ("shape", "remedy"),
    [
        ((8, 9), "samples[None, None]"),
        ((3, 8, 9), "samples.unsqueeze(0)"),
        ((8, 9, 3), "samples.movedim(-1, 0).unsqueeze(0)"),
        ((5, 8, 9), "samples.unsqueeze(1)"),
        ((5, 8, 9, 1), "samples.movedim(-1, 1)"),
    ],
)
def test_a_wrong_shape_of_pictures_has_a_remedy_that_works(shape, remedy, tmp_path):
    samples = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"must be \(B, C, H, W\) with 1 or 3 channels, got") as caught:
        df.save_grid(samples, tmp_path / "grid.png")
    assert str(caught.value).endswith(remedy)
    assert df.to_uint8(eval(remedy)).shape[1:3] == (8, 9)


def test_a_latent_is_decoded_first(tmp_path):
    with pytest.raises(ValueError, match="a latent is decoded first"):
        df.save_grid(torch.zeros(2, 4, 8, 8), tmp_path / "grid.png")
