"""--model names a model the same way for every command."""

import warnings

import numpy as np
import pytest
import torch
from commands.test_cli import load, run
from safetensors.torch import load_file

from ddim_fast import DDIMSampler, NoiseSchedule

MODULE = """
import functools
import torch
from torch import nn

def eps(x, t):
    return 0.1 * x

def shaped(x, t):
    return 0.1 * x

shaped.sample_shape = (1, 4, 4)

class Net(nn.Module):
    sample_shape = (1, 4, 4)

    def forward(self, x, t):
        return 0.1 * x

def make():
    return Net()

def make_function():
    return shaped

class Callable:
    sample_shape = (1, 4, 4)

    def __call__(self, x, t):
        return 0.1 * x

instance, an_object = Net(), Callable()
bound = functools.partial(eps)
number = 3
"""
COMMON = ("--steps", 2, "--schedule", "linear")


@pytest.fixture
def name(tmp_path, monkeypatch):
    """The name of a module of one's own, in the current folder."""
    module = f"own_models_{tmp_path.name}"
    (tmp_path / f"{module}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return module


@pytest.mark.parametrize(
    "attribute", ["shaped", "Net", "make", "make_function", "Callable", "instance", "an_object", "eps", "bound"]
)
def test_a_model_of_ones_own_is_a_module_a_function_or_what_returns_one(name, attribute):
    shape = ("--shape", "1,4,4") if attribute in ("eps", "bound") else ()
    run("sample", "--model", f"{name}:{attribute}", *shape, *COMMON, "-n", 2, "--save", "s.npz", "--quiet")
    expected = DDIMSampler(NoiseSchedule.linear(), 2).sample(lambda x, t: 0.1 * x, (2, 1, 4, 4), seed=0)
    assert np.array_equal(load("s.npz")["samples"], expected.numpy())


def test_a_function_makes_a_set_that_is_resumed_with_the_same_function_only(name, tmp_path):
    words = ("generate", "--schedule", "linear", "--steps", 2, "-n", 3, "--out", "set", "--quiet")
    run(*words, "--model", f"{name}:shaped")
    assert load_file("set/samples-000000.safetensors")["samples"].shape == (3, 1, 4, 4)
    run(*words, "--model", f"{name}:shaped", "--resume")
    (tmp_path / f"{name}.py").write_text(MODULE.replace("0.1", "0.2"))
    assert "model" in run(*words, "--model", f"{name}:shaped", "--resume", code=1)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("MODULE:number", ["a function of x and t, or what returns one, got int"]),
        ("MODULE:eps", ["pass --shape 3,32,32", "sample_shape = (3, 32, 32)"]),
        ("MODULE:nothing", ["cannot be imported", "nothing"]),
        ("MODULE.py:shaped", ["must be named module:attribute", "leave .py out, MODULE:shaped"]),
        ("MODULE.py", ["must be module:attribute", "got 'MODULE.py': for instance MODULE:model"]),
        ("MODULE", ["must be module:attribute", "got 'MODULE': for instance MODULE:model"]),
        ("fashon", ["did you mean 'fashion'?"]),
        ("scene", ["did you mean 'scenes'?"]),
        ("nowhere/at/all", ["which does not exist: download a model from a hub first"]),
    ],
)
def test_what_is_no_model_is_said_alike_by_every_command(name, model, words):
    model = model.replace("MODULE", name)
    for command in (
        ["sample"],
        ["interpolate"],
        ["generate", "-n", 2],
        ["search", "--steps", 2],
        ["tradeoff", "--out", "x"],
    ):
        output = run(*command, "--model", model, code=1)
        for word in (word.replace("MODULE", name) for word in words):
            assert word in output
        assert "Traceback" not in output


def test_the_closed_form_is_a_model_of_every_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = run("sample", "--model", "closed-form", "--steps", 2, "-n", 3, "--save", "s.npz")
    assert "note: samples of shape (1,) are no pictures: grid.png is not written" in output
    assert load("s.npz")["samples"].shape == (3, 1)
    run("img2img", "s.npz", "--model", "closed-form", "--steps", 4, "--save", "t.npz", "--quiet")
    assert load("t.npz")["samples"].shape == (3, 1)
    assert not (tmp_path / "grid.png").exists()
    run("generate", "--model", "closed-form", "--steps", 2, "-n", 3, "--out", "set", "--quiet")
    for words, said in {
        (): "samples that are drawn must be pictures, (1 or 3, H, W), got (1,): add --save",
        ("--trajectory", "t.gif", "--save", "x.npz"): "--trajectory is for samples that are pictures",
        ("--files", "one", "--save", "x.npz"): "--files is for samples that are pictures",
    }.items():
        assert said in run("sample", "--model", "closed-form", *words, code=1)
    assert "--keep is for samples (C, H, W)" in run(
        "inpaint", "s.npz", "--model", "closed-form", "--keep", "left", "--save", "x.npz", code=1
    )
    assert not (tmp_path / "x.npz").exists()


def test_an_archive_has_the_shape_and_prediction_type_that_are_given(tmp_path):
    class Scaled(torch.nn.Module):
        def forward(self, x, t):
            return 0.1 * x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(Scaled()), tmp_path / "a.pt")
    model = ("--model", tmp_path / "a.pt", "--trust-pickle", "--shape", "1,4,4", "--prediction-type", "v_prediction")
    run("sample", *model, *COMMON, "-n", 2, "--save", tmp_path / "s.npz", "--out", tmp_path / "g.png", "--quiet")
    sampler = DDIMSampler(NoiseSchedule.linear(), 2, prediction_type="v_prediction")
    expected = sampler.sample(lambda x, t: 0.1 * x, (2, 1, 4, 4), seed=0)
    assert np.array_equal(load(tmp_path / "s.npz")["samples"], expected.numpy())
    output = run("sample", "--model", "closed-form", "--shape", "1,0", code=1)
    assert "--shape[1] must be an integer, at least 1, got 0" in output
