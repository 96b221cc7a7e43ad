"""The commands that change pictures: what they keep, what they write, and what they refuse before computing anything."""

import numpy as np
import pytest
import torch
from commands.test_cli import load, run
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from PIL import Image
from safetensors.numpy import save_file
from safetensors.torch import load_file

from ddim_fast import DDIMSampler, load_model

FEW = ("--steps", 3, "--threads", 1)


@pytest.fixture(scope="module")
def sneakers(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "sneakers.npz"
    run("sample", *FEW, "-n", 3, "--class", "sneaker", "--save", path, "--out", path.with_suffix(".png"), "--quiet")
    return path


def test_img2img_is_the_samplers(sneakers, tmp_path):
    output = run(
        "img2img", sneakers, *FEW, "--strength", 0.7, "--class", 9, "--seed", 5, "--eta", 0.5, "--guidance", 1.5,
        "--out", tmp_path / "g.png", "--save", tmp_path / "s.safetensors",
    )  # fmt: skip
    assert "3 pictures" in output
    model = load_model("fashion")
    expected = DDIMSampler(model.schedule, 3, 0.5).img2img(
        model,
        torch.from_numpy(load(sneakers)["samples"]),
        0.7,
        seed=5,
        conditioning={"class_labels": torch.tensor([9] * 3)},
        guidance_scale=1.5,
    )
    saved = load_file(tmp_path / "s.safetensors")
    torch.testing.assert_close(saved["samples"], expected, atol=1e-4, rtol=0)
    assert saved["labels"].tolist() == [9, 9, 9]
    with Image.open(tmp_path / "g.png") as grid:
        assert grid.width > 4 * 28 * 3


@pytest.mark.parametrize("keep", ["left", "right", "top", "bottom", "border", "centre", "file"])
def test_inpaint_keeps_what_it_is_told_to_keep(sneakers, tmp_path, keep):
    mask = np.zeros((28, 28), dtype=bool)
    half, quarter = slice(None, 14), slice(7, 21)
    {
        "left": lambda: mask.__setitem__((slice(None), half), True),
        "right": lambda: mask.__setitem__((slice(None), slice(14, None)), True),
        "top": lambda: mask.__setitem__(half, True),
        "bottom": lambda: mask.__setitem__(slice(14, None), True),
        "border": lambda: (mask.fill(True), mask.__setitem__((quarter, quarter), False)),
        "centre": lambda: mask.__setitem__((quarter, quarter), True),
        "file": lambda: mask.__setitem__((slice(3, 9), slice(5, 25)), True),
    }[keep]()
    if keep == "file":
        keep = tmp_path / "keep.png"
        Image.fromarray(mask.astype(np.uint8) * 255).save(keep)
    run("inpaint", sneakers, *FEW, "--keep", keep, "--save", tmp_path / "s.npz", "--out", tmp_path / "g.png", "--quiet")
    before, after = load(sneakers)["samples"], load(tmp_path / "s.npz")["samples"]
    np.testing.assert_allclose(after[:, :, mask], before[:, :, mask], atol=1e-6)
    assert np.abs(after - before)[:, :, ~mask].mean() > 0.01


def test_interpolate_ends_in_the_samples_of_its_seeds(tmp_path):
    run(
        "interpolate", *FEW, "--from-seed", 4, "--to-seed", 9, "--frames", 3, "-n", 2, "--class", "bag",
        "--save", tmp_path / "s.npz", "--out", tmp_path / "g.png",
    )  # fmt: skip
    found = load(tmp_path / "s.npz")["samples"].reshape(2, 3, 1, 28, 28)
    for frame, seed in ((0, 4), (2, 9)):
        run(
            "sample",
            *FEW,
            "-n",
            2,
            "--class",
            "bag",
            "--seed",
            seed,
            "--save",
            tmp_path / "t.npz",
            "--out",
            tmp_path / "t.png",
        )
        np.testing.assert_allclose(found[:, frame], load(tmp_path / "t.npz")["samples"], atol=1e-4)
    assert np.abs(found[:, 1] - found[:, 0]).max() > 0.01


def test_reconstruct_says_the_error_of_what_it_wrote(sneakers, tmp_path):
    errors = {}
    for iterations in (1, 4):
        output = run(
            "reconstruct", sneakers, "--steps", 10, "--class", "sneaker", "--iterations", iterations,
            "--save", tmp_path / "s.npz", "--out", tmp_path / "g.png",
        )  # fmt: skip
        found = ((load(tmp_path / "s.npz")["samples"] - load(sneakers)["samples"]) / 2) ** 2
        errors[iterations] = found.mean()
        assert f"{found.mean():.2e}" in output.split("mean squared error ")[1]
    assert errors[4] < errors[1] / 5


def test_pictures_are_read_in_the_models_size_and_colours(tmp_path):
    Image.fromarray(np.full((50, 70, 3), 255, dtype=np.uint8)).save(tmp_path / "white.jpg")
    Image.fromarray(np.zeros((10, 10), dtype=np.uint8)).save(tmp_path / "black.png")
    run(
        "inpaint", tmp_path / "white.jpg", tmp_path / "black.png", *FEW, "--keep", "left", "--save", tmp_path / "s.npz",
        "--out", tmp_path / "g.png", "--quiet",
    )  # fmt: skip
    left = load(tmp_path / "s.npz")["samples"][:, :, :, :14]
    np.testing.assert_allclose(left[0], 1, atol=0.02)
    np.testing.assert_allclose(left[1], -1, atol=1e-6)


def test_a_model_of_ones_own(tmp_path):
    """A diffusers directory: its schedule, prediction type and spacing are used, and there are no classes."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = UNet2DModel(sample_size=8, layers_per_block=1, norm_num_groups=4, **blocks)
    DDIMPipeline(unet, DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")).save_pretrained(
        tmp_path / "mine"
    )
    path = tmp_path / "mine"
    run("sample", "--model", path, *FEW, "-n", 2, "--save", tmp_path / "s.npz", "--out", tmp_path / "g.png", "--quiet")
    assert load(tmp_path / "s.npz")["samples"].shape == (2, 3, 8, 8)
    assert "labels" not in load(tmp_path / "s.npz")
    output = run("sample", "--model", path, "--class", "bag", "--out", tmp_path / "g.png", code=1)
    assert "--class is for models with named classes" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["img2img", "PICTURES", "--strength", 0], "strength must be in (0, 1]"),
        (["img2img", "PICTURES", "--strength", 0.1], "strength must leave a step"),
        (["img2img", "PICTURES", "--out", "x.bmp"], "--out must end in .png"),
        (["inpaint", "PICTURES", "--keep", "middle"], "--keep must be one of left, right"),
        (["reconstruct", "PICTURES", "--save", "x.txt"], "--save must end in .npz or .safetensors"),
        (["img2img", "PICTURES", "--model", "nowhere"], "got 'nowhere', which does not exist"),
        (["interpolate", "--schedule", "cosine", "--steps", 5000], "num_inference_steps"),
        (["img2img", "PICTURES", "--class", "hat"], "--class must be one of T-shirt/top"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_errors_are_one_line_and_nothing_is_written(sneakers, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    arguments = [sneakers if a == "PICTURES" else a for a in arguments]
    output = run(*arguments, "--threads", 1, *(() if "--steps" in arguments else ("--steps", 3)), code=1)
    assert words in output
    assert "Traceback" not in output
    assert list(tmp_path.iterdir()) == []


def test_files_that_hold_no_pictures(sneakers, tmp_path):
    np.savez(tmp_path / "other.npz", pictures=np.zeros(3))
    assert "must hold an array called samples" in run("img2img", tmp_path / "other.npz", code=1)
    np.savez(tmp_path / "small.npz", samples=np.zeros((1, 1, 8, 8)))
    assert "samples must be (B, 1, 28, 28) for this model, got (1, 1, 8, 8)" in run(
        "img2img", tmp_path / "small.npz", code=1
    )
    for text in ("", "no picture"):
        (tmp_path / "text.png").write_text(text)
        output = run("img2img", tmp_path / "text.png", code=1)
        assert "must be a picture (PNG, " in output
        assert "and is none, or damaged: its first bytes are of no such format" in output
    np.savez(tmp_path / "none.npz", samples=np.zeros((0, 1, 28, 28)))
    assert "a file must hold samples, got none in" in run("img2img", tmp_path / "none.npz", code=1)
    np.savez(tmp_path / "objects.npz", samples=np.array([{}], dtype=object))
    assert "must be numbers, got Python objects" in run("img2img", tmp_path / "objects.npz", code=1)
    for content, said in {b"": "it is empty", b"\x89PNG\r\n": "it is no whole zip archive"}.items():
        (tmp_path / "wrong.npz").write_bytes(content)
        output = run("img2img", tmp_path / "wrong.npz", code=1)
        assert f"must be a NumPy .npz file, and is none, or damaged: {said}" in output
    assert "does not exist" in run("img2img", tmp_path / "missing.png", code=2)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("command", ["img2img", "inpaint", "reconstruct"])
def test_files_of_samples_that_are_damaged(tmp_path, suffix, command):
    path, words = tmp_path / f"samples{suffix}", ["--keep", "left"] if command == "inpaint" else []
    arrays = {"samples": np.zeros((1, 1, 28, 28), dtype=np.float32)}
    np.savez(path, **arrays) if suffix == ".npz" else save_file(arrays, path)
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[: len(whole) // 2], whole[:-20]):
        path.write_bytes(content)
        output = run(command, path, *words, "--out", tmp_path / "g.png", code=1)
        assert output.startswith("Error: ")
        assert f"{path.name} must be a" in output
    arrays["samples"][0, 0, 3, 3] = np.nan
    np.savez(path, **arrays) if suffix == ".npz" else save_file(arrays, path)
    assert "samples must be finite, got NaN" in run(command, path, *words, "--out", tmp_path / "g.png", code=1)
    assert not (tmp_path / "g.png").exists()


@pytest.mark.parametrize("text", ["def f(:", "import sys\nsys.exit(0)", "import sys\ndef Net(): sys.exit(0)"])
def test_a_module_that_cannot_be_a_model(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    name = f"own_broken_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(text)
    output = run("sample", "--model", f"{name}:Net", code=1)
    assert output.startswith("Error: the model")
    assert "SyntaxError" in output or "SystemExit" in output
