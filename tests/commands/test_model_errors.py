"""What a user's model does wrong is said in one sentence by every command, with its place and no traceback."""

import numpy as np
import pytest
from commands.test_cli import run

MODULE = """
import torch
from torch import nn

class Embeds(nn.Module):
    sample_shape = (1, 4, 4)

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(1000, 1)

    def forward(self, x, t):
        return x * self.embedding(t)[:, :, None, None]

embeds = Embeds()

def loaded():
    model = Embeds()
    model.embedding.weight.data.fill_(0.5)
    return model

def fails(x, t):
    return {}["nothing\\nhere"]

def returns_text(x, t):
    return "text"

fails.sample_shape = returns_text.sample_shape = (1, 4, 4)
"""


@pytest.fixture
def name(tmp_path, monkeypatch):
    module = f"own_failing_{tmp_path.name}"
    (tmp_path / f"{module}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    np.savez("s.npz", samples=np.zeros((2, 1, 4, 4), np.float32))
    return module


COMMANDS = [
    ["sample", "-n", 2, "--steps", 2],
    ["interpolate", "--frames", 2, "--steps", 2],
    ["img2img", "s.npz", "--steps", 2],
    ["reconstruct", "s.npz", "--steps", 2],
    ["generate", "-n", 2, "--steps", 2],
    ["search", "--steps", 2],
    ["tradeoff", "-n", 2, "--steps", 2, "--out", "study"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_an_embedding_of_integers_in_continuous_time_has_a_remedy(name, command):
    output = run(*command, "--quiet", "--model", f"{name}:embeds", "--schedule", "flow", code=1)
    assert f"Error: the model {name}:embeds raised RuntimeError: " in output
    assert f"{name}.py, line 13): in continuous time the model is told floats" in output
    assert "needs a --schedule of discrete ones, for instance linear" in output
    assert "Traceback" not in output
    assert output.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_any_error_of_a_model_is_one_line_with_its_place(name, command):
    output = run(*command, "--quiet", "--model", f"{name}:fails", "--schedule", "linear", code=1)
    assert f"the model {name}:fails raised KeyError: " in output
    assert f"{name}.py, line 23)" in output
    assert output.count("\n") == 1


def test_errors_of_the_library_are_as_they_were(name):
    output = run("sample", "-n", 2, "--quiet", "--model", f"{name}:returns_text", "--schedule", "linear", code=1)
    assert output.startswith("Error: ")
    assert "raised" not in output


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_guidance_of_a_model_without_an_unconditional_output(name, command):
    words = ("--quiet", "--model", f"{name}:embeds", "--schedule", "linear", "--guidance", 3)
    output = run(*command, *words, code=1)
    assert "--guidance is for models with classes" in output
    assert f"got 3.0: leave it out for {name}:embeds" in output


def test_new_random_weights_of_a_class_are_noted(name):
    words = ("sample", "-n", 2, "--steps", 2, "--schedule", "linear", "--quiet", "--model")
    output = run(*words, f"{name}:Embeds")
    assert output.count(f"note: --model {name}:Embeds is a class, so its weights are new random ones in every run") == 1
    assert run(*words, f"{name}:loaded") == run(*words, f"{name}:embeds") == ""
