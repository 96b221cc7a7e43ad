"""The command and the line of Python of a cell sample as the cell does."""

import shlex
from pathlib import Path

import pytest

import ddim_fast as df
from ddim_fast.cli import main
from ddim_fast.plans.files import read_timesteps
from ddim_fast.tradeoff import Cell, grid
from ddim_fast.tradeoff.apply import command_of, python_of

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
NAMES = ("fashion-8", "fashion-10-order-2", "fashion-10-one-list")


def searched(name, etas=(0.0,), **options):
    path = str(EXAMPLES / f"{name}.json")
    return grid((), (), etas, searched={path: read_timesteps(path)}, **options)


CELLS = [
    Cell(20, "log_snr", order=2),
    Cell(7, "trailing"),
    Cell(9, "leading", eta=0.5),
    Cell(9, "leading", eta=0.5, eta_scales="variance"),
    Cell(9, "quad", eta=1.0, sigma_hat=True),
    *[cell for name in NAMES for cell in searched(name)],
    *searched("fashion-8", (1.0,), analytic_variance=True),
]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: Path(cell.key).name[-40:])
def test_python_and_command_are_the_sampler_of_the_cell(cell, monkeypatch):
    model = df.load_model("fashion")
    expected = cell.sampler(model.schedule, getattr(model, "sampler_options", {})).plan(model)
    assert eval(python_of(cell), {"df": df, "model": model}).plan(model) == expected
    made = []
    monkeypatch.setattr("ddim_fast.commands.run.Run.check_memory", lambda run, *more: made.append(run.sampler()))
    monkeypatch.setattr("ddim_fast.commands.run.Run.write", lambda *a, **k: [])
    words = shlex.split(command_of(cell, "fashion"))
    assert words[0] == "ddim-fast"
    main([*words[1:], "-n", "1", "--quiet"], standalone_mode=False)
    assert made[0].plan(model) == expected


def test_another_model_is_named_and_anothers_scheduler_has_no_command():
    assert (
        command_of(CELLS[0], "my model") == "ddim-fast sample --model 'my model' --steps 20 --spacing log_snr --order 2"
    )
    theirs = Cell(10, "UniPC", scheduler="diffusers:UniPCMultistepScheduler")
    assert command_of(theirs, "fashion") == python_of(theirs) == ""
