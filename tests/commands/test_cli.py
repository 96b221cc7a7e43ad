"""The command line: what it writes, what it says, and what it refuses before computing anything."""

import importlib
import math
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from ddim_fast import DDIMSampler, FlowSchedule, NoiseSchedule, __version__, as_flow, sample_seeds
from ddim_fast.cli import main
from ddim_fast.kernels import cpu_step
from ddim_fast.models.loading import load_model
from ddim_fast.utils import pictures


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result.output


def load(path):
    with np.load(path) as file:
        return dict(file)


def sample(tmp_path, *arguments, code=0):
    return run("sample", "--steps", 2, "-n", 3, "--out", tmp_path / "grid.png", *arguments, code=code)


def test_sample_writes_grid_animation_and_numbers_that_agree(tmp_path):
    output = sample(tmp_path, "--trajectory", tmp_path / "t.gif", "--save", tmp_path / "s.npz")
    assert "3 pictures" in output
    assert "2 steps" in output
    assert "images/s" in output
    saved = load(tmp_path / "s.npz")
    assert saved["samples"].shape == (3, 1, 28, 28)
    assert saved["labels"].tolist() == [0, 1, 2]
    with Image.open(tmp_path / "grid.png") as grid:
        # The first picture stands at the margin, under the title; three screen pixels a pixel.
        shown = np.asarray(grid)[26 + 6 + 1 :: 3, 6 + 1 :: 3, 0][:28, :28]
    np.testing.assert_array_equal(shown, pictures.to_uint8(torch.from_numpy(saved["samples"]))[0, :, :, 0])
    with Image.open(tmp_path / "t.gif") as animation:
        assert animation.n_frames == 2


def test_same_seed_same_pictures_whatever_the_batch_size_and_threads(tmp_path):
    for name, arguments in {"a": ["--batch-size", 3], "b": ["--batch-size", 2]}.items():
        sample(tmp_path, "--eta", 1, "--save", tmp_path / f"{name}.safetensors", "--threads", 1, *arguments)
    a, b = (load_file(tmp_path / f"{name}.safetensors")["samples"] for name in "ab")
    # The model's convolutions may round differently for other batch sizes; the sampler's own arithmetic does not.
    torch.testing.assert_close(a, b, atol=1e-3, rtol=0)
    sample(tmp_path, "--eta", 1, "--seed", 1, "--save", tmp_path / "c.safetensors")
    assert (a - load_file(tmp_path / "c.safetensors")["samples"]).abs().max() > 0.1


def test_a_list_of_etas_is_one_for_each_step(tmp_path):
    output = run("sample", "--steps", 2, "-n", 1, "--eta", "0.7,0", "--eta-scales", "cps", "--save", tmp_path / "a.npz",
                 "--out", tmp_path / "a.png")  # fmt: skip
    assert "2 steps" in output
    run("sample", "--steps", 2, "-n", 1, "--eta", "0.7", "--eta-scales", "cps", "--save", tmp_path / "b.npz",
        "--out", tmp_path / "b.png")  # fmt: skip
    a, b = (load(tmp_path / name)["samples"] for name in ("a.npz", "b.npz"))
    np.testing.assert_array_equal(a, b)  # the last step has no noise anyway


def test_class_by_name_and_by_number(tmp_path):
    for name in ("sneaker", "7"):
        sample(tmp_path, "--class", name, "--save", tmp_path / "s.npz")
        assert load(tmp_path / "s.npz")["labels"].tolist() == [7, 7, 7]


@pytest.mark.parametrize(("timesteps", "steps"), [("ddim3", 3), ("2,2", 4), ("[900,500,100]", 3)])
def test_timesteps_instead_of_steps(tmp_path, timesteps, steps):
    output = run("sample", "--timesteps", timesteps, "-n", 1, "--out", tmp_path / "g.png")
    assert f"{steps} steps" in output


def test_a_list_that_lacks_its_brackets_says_how_many_steps_it_runs(tmp_path):
    words = ("sample", "-n", 1, "--out", tmp_path / "g.png", "--quiet", "--timesteps")
    note = "note: --timesteps 0,3,6 is the counts of steps in 3 sections, 9 steps in all: timesteps themselves stand in brackets, "
    assert run(*words, "0,3,6") == f"{note}[6,3,0]\n"
    assert run(*words, "[6,3,0]") == run(*words, "ddim3") == ""


def test_channels_that_are_last_in_a_shape_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "own_model", types.SimpleNamespace(tiny=_Tiny()))
    words = ("sample", "--model", "own_model:tiny", "--steps", 2, "-n", 1, "--out", tmp_path / "g.png", "--quiet")
    hint = "; channels come first: --shape 3,16,16\n"
    assert run(*words, "--shape", "16,16,3", code=1).endswith(hint)
    assert run(*words, "--shape", "16,16,3", "--save", tmp_path / "s.npz").endswith(f"is not written{hint}")
    assert "channels" not in run(*words, "--shape", "16,16,5", code=1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--class", "hat"], ["Ankle boot", "'hat'"]),
        (["--out", "grid.xyz"], [".png", "grid.xyz"]),
        (["--out", "no-such-folder/grid.png"], ["the folder of --out must exist", "no-such-folder", "create it first"]),
        (["--save", "s.csv"], [".npz", "s.csv"]),
        (["--trajectory", "t.mp4"], [".gif", "t.mp4"]),
        (["--steps", "1001"], ["1000", "1001"]),
        (["--timesteps", "[9,x]"], ["list of timesteps", "[9,x]"]),
        (["--timesteps", "ddim3"], ["3 entries", "2"]),
        (["--timesteps", "[0,100,200]"], ["decreasing, from noise to data, got '[0,100,200]': write [200,100,0]"]),
        (["--timesteps", "grid.png"], ["FILE.json, got 'grid.png': name such a file"]),
        (["--timesteps", __file__], ["a file of --timesteps must be one that ddim-fast search writes", "test_cli.py"]),
        (["--eta", "-1"], ["eta", "-1"]),
        (["--eta", "9"], ["eta may be at most", "9"]),
        (["--eta", "0,0.5,0"], ["one for each of the 2 steps", "0.5"]),
        (["--eta", "2,0", "--eta-scales", "cps"], ["eta[0]", "2"]),
        (["--eta", "0.5", "--sigma-hat"], ["sigma_hat", "0.5"]),
        (["--eta", "0.5", "--order", "3"], ["order=3", "eta = 0.5", "use order=2"]),
        (["--guidance", "nan"], ["guidance_scale", "nan"]),
    ],
)
def test_refuses_with_a_message_and_writes_nothing(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    output = run("sample", "--steps", 2, "-n", 1, *arguments, code=1)
    for word in words:
        assert word in output
    assert "Traceback" not in output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--eta", "0,x"], ["numbers separated by commas", "0,x"]),
        (["--eta", ","], ["separated by commas", "','"]),
        (["--eta-scales", "sde"], ["std_dev", "variance", "flow_grpo", "cps", "sde"]),
    ],
)
def test_options_of_noise_say_what_they_take(arguments, words):
    output = run("sample", "--steps", 2, "-n", 1, *arguments, code=2)
    assert all(word in output for word in words)


def test_order_2_is_the_samplers(tmp_path):
    sample(tmp_path, "--steps", 4, "--order", 2, "--save", tmp_path / "s.npz")
    model = load_model("fashion")
    sampler = DDIMSampler(model.schedule, 4, order=2)
    expected = sampler.sample(model, (3, 1, 28, 28), seed=0, conditioning={"class_labels": torch.arange(3)})
    assert np.array_equal(load(tmp_path / "s.npz")["samples"], expected.numpy())


def test_unknown_option_and_names_are_usage_errors(tmp_path):
    assert "karras" in sample(tmp_path, "--spacing", "nope", code=2)
    assert "0" in sample(tmp_path, "--steps", "0", code=2)
    run("sample", "--no-such-option", code=2)


def test_quiet_says_nothing(tmp_path):
    assert sample(tmp_path, "--quiet").strip() == ""


def test_other_schedule_is_noted(tmp_path):
    assert sample(tmp_path, "--schedule", "cosine").count("the one that the model was trained with") == 1


def test_a_diffusion_model_is_sampled_along_flow_matchings_path(tmp_path):
    output = sample(tmp_path, "--schedule", "flow", "--shift", 3, "--steps", 4, "--save", tmp_path / "s.npz")
    assert "trained with" not in output
    sampler = DDIMSampler(FlowSchedule(shift=3.0), 4)
    labels = {"class_labels": torch.arange(3)}
    expected = sampler.sample(as_flow(load_model("fashion")), (3, 1, 28, 28), seed=0, conditioning=labels)
    assert np.array_equal(load(tmp_path / "s.npz")["samples"], expected.numpy())
    # The arguments of a schedule, its own spacings, and times as a list.
    sample(
        tmp_path,
        "--schedule",
        "flow?shift=3",
        "--timesteps",
        str(list(sampler.timesteps)),
        "--steps",
        4,
        "--save",
        tmp_path / "t.npz",
    )
    assert np.array_equal(load(tmp_path / "t.npz")["samples"], expected.numpy())
    sample(tmp_path, "--schedule", "flow", "--spacing", "exponential", "--steps", 2)


FLOW_MODULE = """
import torch
from torch import nn
from ddim_fast import FlowSchedule

class Model(nn.Module):
    sample_shape, schedule, prediction_type = (1, 4, 4), FlowSchedule(time_scale=1000.0), "flow"

    def forward(self, x, t):
        assert t.dtype == torch.float32 and 0 < t.max() <= 1000
        return x - 0.5 * torch.ones_like(x)
"""


def test_a_flow_model_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own_flow.py").write_text(FLOW_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    output = run("sample", "--model", "own_flow:Model", "--steps", 3, "-n", 2, "--shift", 2, "--save", "s.npz")
    assert "3 steps" in output
    assert "trained with" not in output
    sampler = DDIMSampler(FlowSchedule(shift=2.0), 3, prediction_type="flow")
    expected = sampler.sample(lambda x, t: x - 0.5, (2, 1, 4, 4), seed=0)
    assert np.array_equal(load(tmp_path / "s.npz")["samples"], expected.numpy())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shift", 3], ["--shift is for a schedule that has one", "add --schedule flow"]),
        (["--schedule", "flow", "--shift", 0], ["shift must be a finite number, above 0, got 0"]),
        (["--schedule", "flow?shft=3"], ["schedule 'flow' takes shift", "got 'shft'"]),
        (["--schedule", "flow?shift"], ["must be name=value", "got 'shift'"]),
        (["--schedule", "flow?shift=three"], ["must be a number, true or false, got 'shift=three'"]),
        (["--schedule", "flw"], ["name must be one of", "flow", "got 'flw'"]),
        (["--schedule", "flow", "--spacing", "leading"], ["timestep_spacing must be one of uniform", "got 'leading'"]),
        (["--schedule", "flow", "--timesteps", "ddim5"], ["a list of times, or a file of them", "got 'ddim5'"]),
    ],
)
def test_a_path_that_does_not_fit_is_refused(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    given = [] if "--timesteps" in arguments else ["--steps", 2]
    output = run("sample", *given, "-n", 1, *arguments, code=1)
    for word in words:
        assert word in output
    assert "Traceback" not in output
    assert list(tmp_path.iterdir()) == []


def test_info_names_versions_backends_and_instruction_set():
    output = run("info")
    for word in (
        __version__,
        torch.__version__,
        "cpu on cpu: usable",
        "reference on cpu: usable",
        cpu_step.extension.selected(),
    ):
        assert word in output


def test_info_says_why_the_kernel_is_missing(monkeypatch):
    monkeypatch.setattr(cpu_step, "extension", None)
    monkeypatch.setattr(cpu_step, "missing_reason", "no compiler was there", raising=False)
    assert "not usable: no compiler was there" in run("info")


def test_help_teaches():
    assert "ddim-fast sample" in run("--help")
    output = run("sample", "--help")
    for word in (
        "--class",
        "--guidance",
        "--eta",
        "--order",
        "--spacing",
        "--schedule",
        "--trajectory",
        "--save",
        "Sneaker",
        "Examples",
    ):
        assert word in output


def test_pictures_refuse_other_shapes():
    with pytest.raises(ValueError, match=r"\(2, 5, 8, 8\)"):
        pictures.to_uint8(torch.zeros(2, 5, 8, 8))


def test_colour_pictures_keep_their_channels():
    samples = torch.stack([torch.full((3, 4, 4), -1.0), torch.tensor([1.0, -1.0, 0.0])[:, None, None].expand(3, 4, 4)])
    image = np.asarray(pictures.grid(samples, scale=1, columns=2))
    assert image[6, 6].tolist() == [0, 0, 0]
    assert image[6, 6 + 4 + 6].tolist() == [255, 0, 128]


@pytest.mark.parametrize(
    ("name", "message"),
    [("cuda", "it finds no CUDA device, got 'cuda': use cpu"), ("foo", "device must be a torch device such as cpu")],
)
def test_a_device_that_is_not_there_is_refused(name, message, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        DDIMSampler(NoiseSchedule.linear(), 2).sample(lambda x, t: x, (1, 1, 4, 4), seed=0, device=name)
    result = CliRunner().invoke(main, ["sample", "--device", name, "--out", str(tmp_path / "grid.png")])
    assert result.exit_code != 0
    assert message in result.output


class _Tiny(nn.Module):
    """A model of one's own, as ``--model module:attribute`` names it."""

    sample_shape, schedule = (1, 4, 4), NoiseSchedule.linear(20)

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x, t):
        return self.weight * x


@pytest.mark.parametrize("count", ["1000000000000", "9" * 30, "1e12"])
def test_a_set_of_more_samples_than_a_disk_holds_is_refused_at_once_for_any_model(tmp_path, monkeypatch, count):
    monkeypatch.setitem(sys.modules, "own_model", types.SimpleNamespace(tiny=_Tiny))
    model = ("--model", "own_model:tiny", "--steps", 2, "--out", tmp_path / "set")
    output = run("generate", "-n", count, *model, code=2 if "e" in count else 1)
    assert (
        f"'{count}' is not a valid integer" in output or f"1,000,000 files of 512 samples each, got {count}" in output
    )
    assert list(tmp_path.iterdir()) == []


def test_a_set_of_a_model_of_ones_own(tmp_path, monkeypatch):
    tiny = _Tiny().eval()
    monkeypatch.setitem(sys.modules, "own_model", types.SimpleNamespace(tiny=_Tiny))
    run("generate", "-n", 3, "--model", "own_model:tiny", "--steps", 2, "--seed", 4, "--out", tmp_path / "set")
    got = load_file(tmp_path / "set" / "samples-000000.safetensors")["samples"]
    seeds = torch.from_numpy(sample_seeds(4, 16))  # the set's seeds, in its batches of 16
    expected = DDIMSampler(tiny.schedule, 2).sample(tiny, (16, 1, 4, 4), seeds=seeds)[:3]
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["sample", "-n", 10**8], "-n"),
        (["sample", "-n", 10**11], "-n"),
        (["sample", "-n", 10**30, "--out", "x.jpg"], "-n"),
        (["sample", "-n", 200_000, "--trajectory", "x.gif"], "-n"),
        (["interpolate", "--rows", 10**9], "--rows times --frames"),
        (["interpolate", "--frames", 10**12], "--rows times --frames"),
        (["tradeoff", "-n", 10**11, "--out", "study"], "-n"),
        (["sample", "-n", 10**12, "--steps", 2, "--model", "own_model:tiny"], "-n"),
        (["interpolate", "-n", 10**12, "--steps", 2, "--model", "own_model:tiny"], "--rows times --frames"),
    ],
    ids=str,
)
def test_more_samples_than_fit_into_memory_are_refused_at_once(tmp_path, monkeypatch, words, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ddim_fast.utils.checks._memory", lambda: 2 * 10**9)
    importlib.import_module("ddim_fast.tradeoff")  # or it would import, and keep, what is patched here
    for module in ("ddim_fast.kernels.noise", "ddim_fast.commands.run"):
        monkeypatch.setattr(f"{module}.sample_seeds", None)
    monkeypatch.setitem(sys.modules, "own_model", types.SimpleNamespace(tiny=_Tiny))
    output = run(*words, code=1)
    assert f"Error: {name} must fit into memory, of 2 GB, and would take at least" in output
    assert list(tmp_path.iterdir()) == []


def test_one_step_that_leaves_noise_has_a_note(tmp_path):
    arguments = ("sample", "--steps", 1, "-n", 1, "--out", tmp_path / "grid.png")
    note = "note: one step from noise must be taken at the noisiest timestep, got 0"
    assert run(*arguments, "--spacing", "leading").count(note) == 1
    assert run(*arguments, "--spacing", "leading", "--quiet").count("\n") == 1  # the note alone
    assert "note" not in run(*arguments, "--spacing", "trailing")


def test_a_warning_is_a_note_said_once_without_a_line_of_code(tmp_path, monkeypatch):
    class Warns(_Tiny):
        def forward(self, x, t):
            warnings.warn("the model wonders", stacklevel=1)
            return super().forward(x, t)

    monkeypatch.setitem(sys.modules, "own_model", types.SimpleNamespace(tiny=Warns))
    words = ("sample", "--model", "own_model:tiny", "--steps", 3, "-n", 1, "--out", tmp_path / "grid.png")
    shown = warnings.showwarning
    output = run(*words)
    assert output.count("note: the model wonders\n") == 1
    assert "UserWarning" not in output
    assert run(*words, "--quiet") == "note: the model wonders\n"
    assert warnings.showwarning is shown


class _Diverges(nn.Module):
    """Turns the samples of some seeds into NaN."""

    sample_shape, schedule, most = (1, 4, 4), NoiseSchedule.linear(20), -math.inf

    def forward(self, x, t):
        return torch.where(x[:, :, :1, :1] > self.most, torch.nan, x)


@pytest.mark.parametrize("command", [["sample"], ["interpolate", "--frames", 2], ["img2img", "s.npz"]], ids=str)
def test_samples_that_are_all_nan_fail_even_quietly_and_write_nothing(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "own_model", types.SimpleNamespace(diverges=_Diverges()))
    np.savez("s.npz", samples=np.zeros((2, 1, 4, 4), np.float32))
    output = run(*command, "--model", "own_model:diverges", "--steps", 3, "--quiet", "--save", "new.npz", code=1)
    assert "note: samples must be finite, got NaN or infinity in" in output
    assert "Error: samples must be finite, got NaN or infinity in every one of " in output
    assert [path.name for path in tmp_path.iterdir()] == ["s.npz"]


def test_some_samples_with_nan_are_written_with_a_note_of_one_line(tmp_path, monkeypatch):
    model = _Diverges()
    model.most = 0.0
    monkeypatch.setitem(sys.modules, "own_model", types.SimpleNamespace(diverges=model))
    words = ("--model", "own_model:diverges", "--steps", 3, "-n", 16, "--quiet")
    output = run("sample", *words, "--out", tmp_path / "grid.png")
    assert output.startswith("note: samples must be finite, got NaN or infinity in ")
    assert output.count("\n") == 1  # nothing of NumPy, which casts them
    assert (tmp_path / "grid.png").exists()


def test_a_set_that_is_all_nan_fails(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "own_model", types.SimpleNamespace(diverges=_Diverges()))
    words = ("--model", "own_model:diverges", "--steps", 3, "-n", 4, "--quiet", "--out", tmp_path / "set")
    assert "Error: samples must be finite, got NaN or infinity in every one of 4 in" in run("generate", *words, code=1)


def test_quietly_too_samples_of_8_bits_are_noticed(tmp_path):
    levels = np.random.default_rng(0).uniform(0, 255, (1, 1, 28, 28)).astype(np.float32)
    np.savez(tmp_path / "s.npz", samples=levels)
    output = run("img2img", tmp_path / "s.npz", "--steps", 2, "--quiet", "--out", tmp_path / "g.png")
    assert "note: clean samples (x0) must be as the model's are" in output
