"""``ddim-fast tradeoff`` with other libraries' schedulers, solver files, targets and a browser."""

import json
import shutil
import webbrowser

import pytest
from click.testing import CliRunner

from ddim_fast.cli import main
from ddim_fast.plans.files import TimestepList
from ddim_fast.utils.open_page import open_page

SMALL = [
    "--model",
    "closed-form",
    "--steps",
    "4,8",
    "--spacings",
    "leading",
    "--etas",
    "0",
    "--orders",
    "1",
    "-n",
    "24",
]
SMALL += ["--batch-size", "8", "--quick"]
UNIPC = "diffusers:UniPCMultistepScheduler?timestep_spacing=leading"
HEUN = "diffusers:HeunDiscreteScheduler?timestep_spacing=trailing"


def run(*words, code=0):
    result = CliRunner().invoke(main, ["tradeoff", *map(str, words)])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def raced(tmp_path_factory):
    """A study with two schedulers and two solver files of one name, and what it said."""
    out = tmp_path_factory.mktemp("race")
    files = [out / "a" / "mine.json", out / "b" / "mine.json"]
    for path, timesteps in zip(files, ((900, 600, 300, 50), (800, 200)), strict=True):
        path.parent.mkdir()
        TimestepList(timesteps, 1000).write(path)
    lists = [word for path in files for word in ("--timesteps", path)]
    said = run(
        *SMALL, *lists, "--against", UNIPC, "--against", HEUN, "--target", "distance=0.5", "--out", out / "study"
    )
    return out / "study", files, said


def test_everybody_is_measured_with_as_many_steps(raced):
    study, files, _ = raced
    results = json.loads((study / "study.json").read_text())["results"]
    theirs = {(r["cell"]["scheduler"], r["cell"]["num_inference_steps"]): r for r in results if r["cell"]["scheduler"]}
    assert {key: r["calls"] for key, r in theirs.items()} == {(UNIPC, 4): 4, (UNIPC, 8): 8, (HEUN, 4): 7, (HEUN, 8): 15}
    assert all(r["quality"].keys() == {"wasserstein", "distance"} for r in theirs.values())
    assert all(len(r["batch_ms"]) == 3 for r in results)
    names = {r["cell"]["timestep_spacing"] for r in results if r["cell"]["timesteps"]}
    assert names == {*map(str, files)}
    assert not list((study / "cells").glob("*.safetensors"))


def test_the_race_is_in_the_terminal_the_page_and_the_json(raced):
    study, _, said = raced
    told = json.loads((study / "study.json").read_text())
    wasserstein = {race["metric"]: race for race in told["time_to_quality"]}["wasserstein"]
    assert wasserstein["baseline"] == "leading-8-eta0"
    assert {race["metric"]: race["target"] for race in told["time_to_quality"]}["distance"] == 0.5
    assert "to the Wasserstein distance of 8 steps with leading spacing, " in said
    assert "a distance to converged of 0.500" in said
    assert "UniPCMultistep (timestep_spacing=leading)" in said
    page = (study / "report.html").read_text()
    assert page.count('data-race="') == 2
    assert "Other libraries&#39; schedulers are those of diffusers " in page


def test_a_study_goes_on_with_more_contenders(raced, tmp_path):
    study, *_ = raced
    shutil.copytree(study, tmp_path / "study")
    before = (tmp_path / "study" / "cells" / "leading-4-eta0.json").stat().st_mtime_ns
    words = ["--against", "diffusers:DDIMScheduler", "--out", tmp_path / "study", "--quiet"]
    assert run(*SMALL, *words) == ""
    assert (tmp_path / "study" / "cells" / "leading-4-eta0.json").stat().st_mtime_ns == before
    assert "The cells were measured in 2 runs" in (tmp_path / "study" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--against", "diffusers:BestScheduler"], "a scheduler to compare with 'diffusers:BestScheduler' cannot be imported"),
        (["--against", "UniPC"], "a scheduler to compare with must be named module:attribute, got 'UniPC'"),
        (["--against", "math:sin"], "a scheduler to compare with must be a class with set_timesteps and step, got <built-in"),
        (["--against", f"{UNIPC}&solver_oder=3"], "got 'solver_oder': leave it out or correct its spelling"),
        (["--against", f"{UNIPC}&solver_order"], "must be name=value, joined by &, got 'solver_order'"),
        (["--against", "diffusers:FlowMatchEulerDiscreteScheduler"], "it takes no trained_betas"),
        (["--against", "diffusers:EulerDiscreteScheduler"], "must tell the model whole timesteps"),
        (["--against", "diffusers:PNDMScheduler", "--steps", "1"], "got diffusers:PNDMScheduler with 1 steps: ValueError"),
        (["--target", "frechet"], "--target must be METRIC=VALUE, with a number, got 'frechet'"),
        (["--target", "precision=0.9"], "the metric of --target must be one of frechet, distance, wasserstein, got 'precision'"),
        (["--target", "distance=-1"], "--target distance must be a finite number, at least 0, got -1.0"),
    ],
)  # fmt: skip
def test_what_cannot_race_is_refused_before_anything_is_drawn_or_written(tmp_path, monkeypatch, words, said):
    monkeypatch.setattr("ddim_fast.tradeoff.study.draw_batch", None)
    assert said in run(*SMALL, *words, "--out", tmp_path / "study", code=1)
    assert not (tmp_path / "study").exists()


# --- The browser ------------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch):
    """What a browser was asked to open."""
    asked = []
    monkeypatch.setattr(webbrowser, "open", lambda url: asked.append(url) or True)
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    return asked


def test_the_report_is_opened_where_there_is_a_display(raced, monkeypatch, opened):
    study, *_ = raced
    page = study / "report.html"
    assert not open_page(page)
    assert opened == []
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    monkeypatch.setattr("ddim_fast.tradeoff.report.write_report", lambda *_: [page])
    assert run(*SMALL, "--out", study, "--quiet", "--open") == ""
    assert opened == [page.as_uri()]
    monkeypatch.delenv("WAYLAND_DISPLAY")
    assert run(*SMALL, "--out", study, "--quiet", "--open") == f"no display to open it on: {page}"
    assert opened == [page.as_uri()]
