"""A study: the cells it should have, measured, kept, and gone on with."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn

from ddim_fast import NoiseSchedule
from ddim_fast.cli import main
from ddim_fast.generation.conditioning import EveryClass
from ddim_fast.plans.files import TimestepList
from ddim_fast.tradeoff import (
    Cell,
    ClosedForm,
    StudyDirectory,
    Subject,
    grid,
    measure,
    paper_table,
    run_study,
    settings_of,
)
from ddim_fast.tradeoff import study as study_module
from ddim_fast.tradeoff.results import describe, eta_text
from ddim_fast.tradeoff.study import calls_to_do

LINEAR = NoiseSchedule.linear()
CONVERGED = Cell(40, "log_snr", order=2)


def closed_form(**changes):
    truth = ClosedForm(LINEAR)
    options = dict(count=50, batch_size=20, truth=truth)
    return Subject(truth, LINEAR, (1,), **{**options, **changes})


class PowerCut(Exception):  # noqa: N818 (no error, but a stand-in for one)
    pass


class Pictures(nn.Module):
    """A denoiser of flat pictures whose grey is the label's."""

    prediction_type = "sample"

    def __init__(self):
        super().__init__()
        self.grey = nn.Parameter(torch.linspace(-0.5, 0.5, 4))
        self.calls, self.fails_at = 0, None

    def forward(self, x, t, class_labels):
        if self.calls == self.fails_at:
            raise PowerCut
        self.calls += len(x)
        return self.grey[class_labels].view(-1, 1, 1, 1).expand_as(x) + 0 * x


# --- Cells ------------------------------------------------------------------------------------------------------------


def test_a_grid_has_each_combination_once():
    cells = grid(
        (5, 10), ("leading", "quad"), (0.0, 0.5, 1.0), eta_scales=("std_dev", "variance"), sigma_hat=True, orders=(1, 2)
    )
    assert len(set(cells)) == len(cells) == len({cell.key for cell in cells})
    # eta 0 in two orders, 0.5 in two conventions, 1 in one, and sigma-hat; for two counts and two spacings
    assert len(cells) == 2 * 2 * (2 + 2 + 1 + 1)
    assert [cell.num_inference_steps for cell in cells] == sorted(cell.num_inference_steps for cell in cells)
    assert all(cell.eta == 0 for cell in cells if cell.order == 2)
    searched = grid(
        (), (), (0.0, 1.0), searched={"mine": TimestepList((900, 100), 1000, model_timesteps=(800, 90))}, orders=(1, 2)
    )
    own = {(cell.timesteps, cell.model_timesteps, cell.timestep_spacing, cell.num_inference_steps) for cell in searched}
    assert own == {((900, 100), (800, 90), "mine", 2)}
    assert [Cell.from_dict(json.loads(json.dumps(cell.as_dict()))) for cell in searched] == searched
    assert searched[0].sampler(LINEAR, {}).plan().model_timesteps == (800, 90)
    assert len(searched) == 3


def test_conventions_of_eta_are_cells_where_they_differ():
    cells = grid((5,), ("leading",), (0.0, 0.5, 1.0), eta_scales=("cps", "std_dev", "variance", "flow_grpo"))
    assert [(cell.eta, cell.eta_scales) for cell in cells] == [
        (0.0, "cps"),
        *((0.5, name) for name in ("cps", "std_dev", "variance", "flow_grpo")),
        *((1.0, name) for name in ("cps", "std_dev", "flow_grpo")),
    ]
    assert [eta_text(cell) for cell in cells] == [
        "0", "0.5 of coefficients-preserving sampling", "0.5", "0.5 of the variance", "0.5 of Flow-GRPO",
        "1 of coefficients-preserving sampling", "1", "1 of Flow-GRPO",
    ]  # fmt: skip
    assert len({cell.key for cell in cells}) == len(cells)
    assert [Cell.from_dict(json.loads(json.dumps(cell.as_dict()))) for cell in cells] == cells
    residual = {"mine": TimestepList((900, 100), 1000, eps_residual=(0.1, 0.2))}
    analytic = grid((), (), (0.5,), eta_scales=("cps", "flow_grpo"), searched=residual, analytic_variance=True)
    assert [cell.eta_scales for cell in analytic if cell.analytic_variance is not None] == ["cps"]
    with pytest.raises(ValueError, match="eta_scales must be one of std_dev, variance, flow_grpo, cps, got 'sigma'"):
        Cell(5, eta_scales="sigma")


def test_an_analytic_variance_is_a_cell_beside_etas_own():
    found = TimestepList((900, 100), 1000, eps_residual=(0.1, 0.2))
    cells = grid((), (), (0.0, 1.0), searched={"mine": found}, analytic_variance=True)
    assert [cell.key for cell in cells] == ["mine-2-eta0", "mine-2-eta1", "mine-2-eta1-analytic"]
    cells = cells[::-1]
    assert describe(cells[0]) == "2 steps with the timesteps mine and eta 1, analytic variance"
    plan = cells[0].sampler(LINEAR, {}).plan()
    assert plan.eps_residual == (0.1, 0.2)
    assert plan.steps[0].std_dev_t != cells[1].sampler(LINEAR, {}).plan().steps[0].std_dev_t
    assert Cell.from_dict(json.loads(json.dumps(cells[0].as_dict()))) == cells[0]
    few = grid(
        (), (), (0.5,), eta_scales=("variance",), searched={"mine": found}, analytic_variance=True, count_at={2: 7}
    )
    assert [(cell.count, cell.eta_scales) for cell in few] == [(7, "variance")] * 2
    with pytest.raises(ValueError, match="got none in the list mine: search again, or leave it out"):
        grid((), (), (1.0,), searched={"mine": TimestepList((900, 100), 1000)}, analytic_variance=True)


@pytest.mark.parametrize("arguments", [[], ["--timesteps", "list.json", "--etas", "0"], ["--paper-table"]])
def test_an_analytic_variance_needs_a_list_and_noise(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    TimestepList((900, 100), 1000, eps_residual=(0.1, 0.2)).write("list.json")
    done = CliRunner().invoke(
        main, ["tradeoff", "--model", "closed-form", "--analytic-variance", "--out", "study", *arguments]
    )
    assert done.exit_code != 0
    said = "leave one of them out" if "--paper-table" in arguments else "give --timesteps FILE.json, and an eta above 0"
    assert said in str(done.output) + str(done.exception)


def test_the_papers_table():
    cells = paper_table(128)
    assert len(cells) == 5 * 5
    assert {cell.count for cell in cells if cell.num_inference_steps == 1000} == {128}
    assert {cell.count for cell in cells if cell.num_inference_steps < 1000} == {None}
    assert sum(cell.sigma_hat for cell in cells) == 5


@pytest.mark.parametrize(
    "cell", [Cell(5), Cell(2, "mine", timesteps=(9, 1)), Cell(10, "quad", 1.0, sigma_hat=True, count=7)]
)
def test_a_cell_is_data(cell):
    assert Cell.from_dict(json.loads(json.dumps(cell.as_dict()))) == cell


# --- Measuring --------------------------------------------------------------------------------------------------------


def test_what_is_measured_where_the_data_are_known():
    subject = closed_form(count=400)
    results = {S: measure(subject, Cell(S, "trailing"))[0] for S in (5, 50)}
    assert results[50].quality["wasserstein"].value < results[5].quality["wasserstein"].value / 3
    assert results[50].calls == 50
    assert results[50].count == 400
    assert results[5].model_ms > 0
    assert "distance" not in results[5].quality


def test_distances_shrink_and_are_of_deterministic_cells_only():
    subject = closed_form(reconstructed=8)
    converged = measure(subject, CONVERGED)[1]
    few, many = (measure(subject, Cell(S, "trailing"), converged)[0].quality for S in (5, 40))
    assert many["distance"].value < few["distance"].value / 3
    assert many["distance"].error > 0
    assert many["reconstruction"].value < few["reconstruction"].value
    assert "distance" not in measure(subject, Cell(5, "trailing", 1.0), converged)[0].quality
    assert "reconstruction" not in measure(subject, Cell(5, "trailing", order=2), converged)[0].quality


def test_the_same_noise_in_every_cell_whatever_the_batch():
    a = measure(closed_form(truth=None), Cell(5))[1]
    b = measure(closed_form(truth=None, batch_size=7), Cell(5))[1]
    torch.testing.assert_close(a, b, rtol=0, atol=0)


# --- On disk ----------------------------------------------------------------------------------------------------------


def study(path, cells, model=None, **options):
    model = Pictures() if model is None else model
    subject = Subject(model, LINEAR, (1, 6, 6), EveryClass(4), count=10, batch_size=4, seed=options.pop("seed", 0))
    directory = StudyDirectory(path, settings_of(subject))
    told = []
    due = calls_to_do(subject, cells, directory, CONVERGED)
    found = run_study(subject, cells, directory, "pictures", converged_cell=CONVERGED, progress=told.append, **options)
    assert sum(told) == due
    return found, model


CELLS = [Cell(2), Cell(4), Cell(3, "trailing", 1.0)]


def test_no_link_in_a_prepared_directory_leads_out_of_it(tmp_path):
    precious, out = tmp_path / "precious", tmp_path / "study"
    (out / "cells").mkdir(parents=True)
    for name in (f"cells/{CELLS[0].key}.png", f"cells/{CELLS[0].key}.json", "settings.json", "converged.safetensors"):
        (out / name).symlink_to(precious)  # which does not exist yet
    study(out, CELLS[:1])
    assert not precious.exists()
    for name in (f"cells/{CELLS[0].key}.png",):
        (out / name).unlink()
        precious.write_text("precious")
        (out / name).symlink_to(precious)
        (out / f"cells/{CELLS[0].key}.json").unlink()
        study(out, CELLS[:1])
    assert precious.read_text() == "precious"
    shutil.move(out / "cells", tmp_path / "elsewhere")
    (out / "cells").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="cells must be a directory of its own"):
        study(out, CELLS[:1])


@pytest.mark.parametrize("name", ["settings.json", "cells", "converged.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"{}", b"[]", bytes(200)])
def test_damaged_files_are_named(tmp_path, name, content):
    study(tmp_path, CELLS[:1])
    path = tmp_path / name if name != "cells" else next((tmp_path / "cells").glob("*.json"))
    path.write_bytes(content)
    if name == "converged.safetensors":  # which is read where a cell is not
        next((tmp_path / "cells").glob("*.json")).unlink()
    with pytest.raises(ValueError, match=str(tmp_path) if name == "settings.json" else path.name):
        study(tmp_path, CELLS[:1])


def test_it_goes_on_where_it_was(tmp_path):
    whole, model = study(tmp_path / "whole", CELLS)
    assert model.calls == 10 * (2 + 4 + 3 + 40)
    # The converged samples, the first round of batches of 4, and of the second that of the second cell.
    kept = 10 * 40 + 4 * (2 + 4 + 3) + 4 * 4

    model = Pictures()
    model.fails_at = kept
    with pytest.raises(PowerCut):
        study(tmp_path / "parts", CELLS, model=model)
    rest, model = study(tmp_path / "parts", CELLS)
    assert model.calls == 10 * (2 + 4 + 3 + 40) - kept
    assert [r.quality for r in rest.results] == [r.quality for r in whole.results]
    assert not list((tmp_path / "parts" / "cells").glob("*.safetensors"))
    again, model = study(tmp_path / "parts", CELLS)
    assert model.calls == 0
    assert [r.as_dict() for r in again.results] == [r.as_dict() for r in rest.results]
    more, model = study(tmp_path / "parts", [*CELLS, Cell(5)])
    assert model.calls == 50
    assert len(more.results) == 4


def test_cells_are_drawn_in_turn_and_each_whole_batch_is_timed(tmp_path, monkeypatch):
    order, real = [], study_module.draw_batch
    monkeypatch.setattr(
        study_module,
        "draw_batch",
        lambda s, cell, *rest: order.append((CELLS.index(cell), rest[0])) or real(s, cell, *rest),
    )
    found, _ = study(tmp_path, CELLS)
    assert order == [(0, 0), (1, 0), (2, 0), (1, 4), (2, 4), (0, 4), (2, 8), (0, 8), (1, 8)]
    for result in found.results:
        assert len(result.batch_ms) == 2  # the third is of two samples
        assert result.milliseconds > 0
        assert min(result.batch_ms) - 1e-9 <= result.milliseconds <= max(result.batch_ms) + 1e-9
    assert len({result.measured_at for result in found.results}) == 1


def test_pictures_are_kept(tmp_path):
    found, _ = study(tmp_path, CELLS)
    for result in found.results:
        with Image.open(tmp_path / result.pictures) as sheet:
            assert sheet.width > 10 * 6
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


def test_other_settings_are_refused_with_a_difference(tmp_path):
    study(tmp_path, CELLS)
    with pytest.raises(ValueError, match=r"holds a study with other settings(.|\n)*seed: 0 there, 1 here"):
        study(tmp_path, CELLS, seed=1)
    other = Pictures()
    with torch.no_grad():
        other.grey[0] = 0.3
    with pytest.raises(ValueError, match=r"model\.sha256: "):
        study(tmp_path, CELLS, model=other)


def test_a_contradiction_comes_before_any_work(tmp_path):
    model = Pictures()
    with pytest.raises(ValueError, match="eta"):
        study(tmp_path, [Cell(2), Cell(2, eta=50.0)], model=model)
    assert model.calls == 0


# --- The command ------------------------------------------------------------------------------------------------------


def run(*words, code=0):
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result.output


def test_the_command_on_a_closed_form(tmp_path):
    words = [
        "tradeoff",
        "--model",
        "closed-form",
        "--steps",
        "5,20",
        "--spacings",
        "trailing",
        "-n",
        "64",
        "--out",
        tmp_path,
        "--quiet",
    ]
    run(*words)
    found = json.loads((tmp_path / "study.json").read_text())
    keys = {
        r["cell"]["num_inference_steps"]: r
        for r in found["results"]
        if r["cell"]["eta"] == 0 and r["cell"]["order"] == 1
    }
    assert keys[20]["quality"]["wasserstein"]["value"] < keys[5]["quality"]["wasserstein"]["value"]
    assert (tmp_path / "report.html").exists()
    assert (tmp_path / "cells.csv").exists()
    before = (tmp_path / "cells" / "trailing-5-eta0.json").stat().st_mtime_ns
    run(*words)
    assert (tmp_path / "cells" / "trailing-5-eta0.json").stat().st_mtime_ns == before
    assert "other settings" in run(*words, "--seed", 3, code=1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "ten"], "must be numbers separated by commas, got 'ten'"),
        (["--spacings", "leading,best"], "separated by commas, got 'leading,best'"),
        (["--orders", "3"], "must be one or more of 1, 2, separated by commas, got '3'"),
        (["--features", "os:path"], "give both --features and --real, or neither"),
        (["--steps", ","], "separated by commas, got ','"),
    ],
)
def test_wrong_words(tmp_path, words, said):
    output = run(
        "tradeoff", "--model", "closed-form", "--out", tmp_path / "x", *words, code=2 if "commas" in said else 1
    )
    assert said in " ".join(output.split())
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("library", ["jinja2", "matplotlib"])
def test_a_missing_library_is_told_before_any_work(tmp_path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    output = run("tradeoff", "--model", "closed-form", "--out", tmp_path / "x", code=1)
    assert f'needs {library}, not installed: pip install ".[tradeoff]"' in output
    assert not (tmp_path / "x").exists()


def test_a_search_that_could_not_be_written_does_not_begin(tmp_path):
    assert "the folder of" in run("search", "--steps", 2, "--out", tmp_path / "no" / "x.json", code=1)
    assert "must end in .json" in run("search", "--steps", 2, "--out", tmp_path / "x.txt", code=1)


OWN_MODEL = """
import torch
from ddim_fast import NoiseSchedule

class Grey(torch.nn.Module):
    prediction_type, sample_shape, schedule = "sample", (1, 4, 4), NoiseSchedule.linear()

    def __init__(self):
        super().__init__()
        self.grey = torch.nn.Parameter(torch.tensor(0.25))

    def forward(self, x, t):
        return self.grey.expand_as(x)

nothing = 3
"""
OWN_FEATURES = """
def halves(samples):
    return samples.flatten(1)[:, :8]

number = 3
"""


def test_a_model_and_features_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "own_grey_model_too.py").write_text(OWN_MODEL)
    (tmp_path / "own_features.py").write_text(OWN_FEATURES)
    np.savez(tmp_path / "real.npz", samples=np.random.default_rng(0).uniform(-1, 1, (60, 1, 4, 4)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = [
        "tradeoff",
        "--steps",
        "2",
        "--spacings",
        "trailing",
        "--etas",
        "0",
        "--orders",
        "1",
        "-n",
        "48",
        "--quiet",
    ]
    words += ["--model", "own_grey_model_too:Grey", "--real", "real.npz", "--out", "out", "--features"]
    for name, said in {
        "own_features:absent": "the feature extractor 'own_features:absent' cannot be imported",
        "own_features": "the feature extractor must be named module:attribute, got 'own_features'",
        "own_features:number": "must be a callable, got int from own_features:number",
    }.items():
        assert said in " ".join(run(*words, name, code=1).split())
        assert not (tmp_path / "out").exists()
    run(*words, "own_features:halves")
    (result,) = json.loads((tmp_path / "out" / "study.json").read_text())["results"]
    assert {"frechet", "precision", "recall"} <= result["quality"].keys()


def test_a_model_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own_grey_model.py").write_text(OWN_MODEL)
    monkeypatch.chdir(tmp_path)
    words = ["--steps", "2,4", "--spacings", "trailing", "-n", "8", "--out", tmp_path / "out", "--quiet"]
    run("tradeoff", "--model", "own_grey_model:Grey", *words)
    found = json.loads((tmp_path / "out" / "study.json").read_text())
    assert {r["quality"]["distance"]["value"] < 1e-6 for r in found["results"] if r["cell"]["eta"] == 0} == {True}
    run("search", "--model", "own_grey_model:Grey", "--steps", 3, "--effort", "quick", "--out", "three.json", "--quiet")
    run(
        "sample", "--model", "own_grey_model:Grey", "--timesteps", "three.json", "-n", 2, "--out", "grid.png", "--quiet"
    )
    assert "a function of x and t, or what returns one, got int" in run(
        "search", "--model", "own_grey_model:nothing", "--steps", 3, code=1
    )
    assert "cannot be imported" in run("search", "--model", "own_grey_model:Other", "--steps", 3, code=1)
