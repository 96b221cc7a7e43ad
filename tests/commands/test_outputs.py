"""What commands write: checked before they compute, whole or not at all, and told where they are interrupted."""

import errno
import os
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from commands.test_cli import load, run
from PIL import Image

import ddim_fast as df
from ddim_fast.cli import main
from ddim_fast.commands.outputs import counted, duration
from ddim_fast.plans.schedules import NoiseSchedule
from ddim_fast.utils.atomic_files import whole_file


class Model:
    """A model that counts its calls, and stops where it is told to."""

    sample_shape, schedule, class_names = (1, 4, 4), NoiseSchedule.linear(), tuple("abc")
    calls, last = 0, None

    def __call__(self, x, t, class_labels=None):
        type(self).calls += 1
        if self.last is not None and type(self).calls > self.last:
            raise KeyboardInterrupt
        return 0.1 * x


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fresh = type("Fresh", (Model,), {})
    monkeypatch.setitem(sys.modules, "own_counted", types.SimpleNamespace(model=fresh, __file__=__file__))
    return fresh


NAME = ("--model", "own_counted:model")
UNWRITABLE = {
    "no-such-folder/NAME": "the folder of OPTION must exist",
    "/proc/NAME": "OPTION must be writable",
    "a-directory": "OPTION must",
}


@pytest.mark.parametrize(
    ("words", "option", "name"),
    [
        (["sample"], "--out", "g.png"),
        (["sample"], "--save", "s.npz"),
        (["sample"], "--trajectory", "t.gif"),
        (["sample"], "--files", "pictures"),
        (["img2img", __file__], "--out", "g.webp"),
        (["inpaint", __file__, "--keep", "left"], "--save", "s.safetensors"),
        (["interpolate"], "--out", "g.jpg"),
        (["reconstruct", __file__], "--out", "g.jpeg"),
        (["search", "--steps", 2], "--out", "x.json"),
    ],
    ids=str,
)
def test_what_cannot_be_written_is_said_before_the_model_is_called(model, words, option, name):
    Path("a-directory").mkdir()
    (Path("a-directory") / "file").touch()
    for place, said in UNWRITABLE.items():
        output = run(*words, *NAME, option, place.replace("NAME", name), code=1)
        assert said.replace("OPTION", option) in output
    assert model.calls == 0
    assert [path.name for path in Path().iterdir()] == ["a-directory"]


@pytest.mark.parametrize("command", [["generate", "-n", 2], ["tradeoff"]], ids=str)
@pytest.mark.parametrize("place", ["/proc/set", "a-file/set"])
def test_a_directory_that_cannot_be_made_is_said_before_the_model_is_called(model, command, place):
    Path("a-file").touch()
    output = run(*command, *NAME, "--out", place, code=1)
    assert place in output
    assert "Traceback" not in output
    assert model.calls == 0


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "grid.png"
    path.write_text("old")

    def fail():
        with whole_file(path) as file:
            assert file.suffix == ".png"
            file.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]
    with whole_file(path) as file:
        file.write_text("new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]


# --- Pictures ---------------------------------------------------------------------------------------------------------


def test_single_files_are_the_pictures_of_the_grid(model):
    run("sample", *NAME, "--steps", 2, "-n", 3, "--files", "each", "--save", "s.npz", "--quiet")
    files = sorted(Path("each").iterdir())
    assert [file.name for file in files] == ["0000.png", "0001.png", "0002.png"]
    samples = load("s.npz")["samples"]
    for file, sample in zip(files, samples, strict=True):
        with Image.open(file) as image:
            expected = ((np.clip(sample[0], -1, 1) + 1) * 127.5).round()
            np.testing.assert_array_equal(np.asarray(image), expected)
    assert "--files must be a new or empty directory" in run("sample", *NAME, "--files", "each", code=1)


@pytest.mark.parametrize("name", ["grid.png", "grid.jpg", "grid.jpeg", "grid.webp"])
def test_a_grid_is_the_file_that_save_grid_writes(model, name):
    model.class_names = None
    run("sample", *NAME, "--steps", 2, "-n", 5, "--out", name, "--save", "s.npz", "--seed", 3, "--quiet")
    samples = torch.from_numpy(load("s.npz")["samples"])
    names = [str(i) for i in range(5)]
    df.save_grid(samples, f"own-{name}", labels=names, title="own_counted:model: 2 steps, eta 0, seed 3")
    assert Path(name).read_bytes() == Path(f"own-{name}").read_bytes()


def test_a_preview_shows_x0_while_sampling(model, monkeypatch):
    shown = []
    actual = os.replace

    def replace(source, target):
        with Image.open(source) as image:
            shown.append(image.size)
        actual(source, target)

    monkeypatch.setattr(os, "replace", replace)
    run("sample", *NAME, "--steps", 6, "-n", 5, "--batch-size", 3, "--preview", 2, "--quiet")
    assert len(shown) == 2 * 2 + 1  # after 2 and 4 steps of both batches, and the result
    assert shown[0][1] < shown[-1][1]  # three of the five pictures


@pytest.mark.parametrize(("classes", "count"), [(None, 64), (1, 64), (3, 63), (6, 60), (10, 60), (100, 64)])
def test_rows_of_the_default_grid_are_full(model, classes, count):
    model.class_names = None if classes is None else tuple(map(str, range(classes)))
    output = run("sample", *NAME, "--steps", 1, "--spacing", "trailing", "--quiet", "--save", "s.npz")
    assert output == ""
    assert len(load("s.npz")["samples"]) == count
    with Image.open("grid.png") as grid:
        pixels = np.asarray(grid.convert("L")).astype(int)
    last_row = pixels[-16 - 84 : -16 - 10, :]
    assert (last_row[:, -6 - 80 : -10] < 255).any()  # the last picture of the last row is there


def test_one_picture_is_one_picture(model):
    assert "1 picture in" in run("sample", *NAME, "-n", 1, "--steps", 1, "--spacing", "trailing")
    assert " 1 step;" in run("sample", *NAME, "-n", 1, "--steps", 1, "--spacing", "trailing")
    assert "1 sample in 1 file:" in run("generate", *NAME, "-n", 1, "--steps", 2, "--out", "set")
    run("sample", *NAME, "-n", 1, "--steps", 2, "--save", "s.npz")
    assert "1 picture:" in run("img2img", "s.npz", *NAME, "--steps", 2)
    assert "1 row of 2 pictures" in run("interpolate", *NAME, "-n", 1, "--frames", 2, "--steps", 2)
    assert [counted(n, "cell") for n in (0, 1, 2)] == ["0 cells", "1 cell", "2 cells"]


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((4, 4), ""),
        ((8, 8), "note: in.png is resized from 8 x 8 pixels to 4 x 4\n"),
        ((8, 6), "note: in.png is resized from 8 x 6 pixels to 4 x 4, which changes its proportions: crop it first\n"),
    ],
)
@pytest.mark.parametrize("command", [["img2img"], ["inpaint", "--keep", "left"], ["reconstruct"]], ids=str)
def test_pictures_of_another_size_are_not_squashed_in_silence(model, command, size, said):
    Image.new("L", size).save("in.png")
    words = (*command, "in.png", *NAME, "--steps", 4)
    assert run(*words).startswith(said)
    assert ("note:" in run(*words)) == bool(said)
    assert run(*words, "--quiet") == said


def test_a_mask_of_another_shape_is_not_squashed_in_silence(model):
    Image.new("L", (4, 4)).save("in.png")
    Image.new("L", (4, 8)).save("mask.png")
    output = run("inpaint", "in.png", *NAME, "--steps", 4, "--keep", "mask.png")
    assert "note: mask.png is resized from 4 x 8 pixels to 4 x 4, which changes its proportions" in output


# --- Interruption -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said", "left"),
    [
        (["sample"], "nothing was written", []),
        (["sample", "--preview", 1], "grid.png shows the predicted x0 after step 2", ["grid.png"]),
        (["interpolate"], "nothing was written", []),
        (["generate", "-n", 20, "--out", "set"], "Resume with: ddim-fast", ["set"]),
        (["tradeoff", "-n", 4, "--out", "study"], "the cells that were measured are in study", ["study"]),
        (["search"], "nothing was written", []),
    ],
    ids=str,
)
def test_an_interrupted_command_says_what_it_left_and_ends_with_130(model, words, said, left):
    model.last = 2
    output = run(*words, *NAME, "--steps", 5, code=130)
    assert "stopped: " in output
    assert said in output
    assert "Traceback" not in output
    assert sorted(path.name for path in Path().iterdir()) == left


def test_pictures_that_are_changed_are_interrupted_alike(model):
    run("sample", *NAME, "-n", 2, "--steps", 2, "--save", "s.npz", "--quiet")
    Path("grid.png").unlink()
    for command in (["img2img"], ["inpaint", "--keep", "left"], ["reconstruct"]):
        model.calls, model.last = 0, 1
        assert "stopped: nothing was written" in run(*command, "s.npz", *NAME, "--steps", 6, code=130)
    assert [path.name for path in Path().iterdir()] == ["s.npz"]


def test_sigterm_is_an_interruption_and_the_handlers_are_as_before(model, monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    monkeypatch.setattr(model, "__call__", lambda self, x, t, **more: os.kill(os.getpid(), signal.SIGTERM) or x)
    assert "stopped: nothing was written" in run("sample", *NAME, "--steps", 3, code=130)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_an_interruption_while_a_command_is_imported(monkeypatch):
    def interrupted(*given, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("ddim_fast.commands.run.Run", interrupted)
    result = CliRunner().invoke(main, ["sample"])
    assert result.exit_code == 130
    assert "stopped: nothing was written" in result.output


def test_a_reader_that_has_closed_the_output_is_no_error(monkeypatch):
    def closed(*given, **more):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("ddim_fast.commands.info.click.echo", closed)
    result = CliRunner().invoke(main, ["info"])
    assert result.exit_code == 1
    assert "Error" not in result.output


def test_times_are_said_in_words():
    times = {0.01: "1 second", 59: "59 seconds", 61: "1 minute", 7100: "2 hours", 90_000: "1 day", 9e6: "104 days"}
    assert {seconds: duration(seconds) for seconds in times} == times


def test_a_search_says_first_how_long_it_takes(model, monkeypatch):
    def begun(*given):
        raise ValueError("begun")

    monkeypatch.setattr("ddim_fast.search.search_timesteps", begun)
    monkeypatch.setattr("ddim_fast.search.request.Search.calls", lambda self: 3_600_000)
    output = run("search", *NAME, "--steps", 5, "--out", "x.json", code=1)
    assert model.calls == 2
    assert "at most 3,600,000 model calls of one sample, about " in output
    assert "Ctrl-C keeps what is found, in x.json.partial" in output


def test_an_interrupted_search_names_the_file_it_goes_on_from(model, monkeypatch):
    def interrupted(wanted, progress, say, partial):
        partial.write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr("ddim_fast.search.search_timesteps", interrupted)
    output = run("search", *NAME, "--steps", 5, "--out", "x.json", code=130)
    assert "stopped: run the same command again: it goes on from what was found so far, in x.json.partial" in output
