"""The pictures of README.md and docs/ are those that tools/pictures.py draws, and README's numbers those of the measurements."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "tools" / "pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def texts(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def ratios_of(measured, name, ratio):
    """The ratios of all cases whose name begins so."""
    return [
        one["extra_info"]["ratios"][ratio]["ratio"]
        for one in measured["benchmarks"]
        if one["fullname"].startswith(name) and ratio in one["extra_info"]["ratios"]
    ]


@pytest.fixture(scope="module")
def measured():
    return json.loads((ROOT / "docs" / "benchmarks.json").read_text())


@pytest.mark.parametrize("name", ["grid", "forward", "steps", pytest.param("eta", marks=pytest.mark.slow)])
def test_a_picture_is_what_the_model_draws(tool, name):
    with Image.open(tool.IMAGES / f"{name}.png") as picture:
        shown = np.asarray(picture.convert("RGB"), dtype=float)
    few = {"rows": 1} if name == "grid" else {}  # the first row is the same whatever follows
    drawn = np.asarray(tool.PICTURES[name](**few).convert("RGB"), dtype=float)
    assert drawn.shape[1:] == shown.shape[1:]
    assert np.abs(drawn - shown[: len(drawn)]).mean() < 0.5  # of 255: another processor rounds a model otherwise


def test_the_chart_has_the_measured_numbers(tool, measured, tmp_path):
    tool.chart("chart", tmp_path / "chart.svg")
    shown = texts((tool.IMAGES / "chart.svg").read_text())
    assert shown == texts((tmp_path / "chart.svg").read_text())
    for case in tool.STEP_CASES.values():
        for shape in tool.SHAPES:
            (ratio,) = ratios_of(measured, f"bench_step.py::test_step[{case.format(shape)}]", "diffusers / ours out")
            assert f"{ratio:.{0 if ratio >= 10 else 1}f}" in shown


def test_the_chart_of_time_to_quality_has_the_measured_numbers(tool, measured, tmp_path):
    tool.chart("time_to_quality", tmp_path / "chart.svg")
    shown = texts((tool.IMAGES / "time_to_quality.svg").read_text())
    assert shown == texts((tmp_path / "chart.svg").read_text())
    info = tool.quality_of(measured)
    assert info["distances"]["ours"] <= info["target"]
    for name, found in info["ratios"].items():
        calls = info["calls"].get(name.removesuffix(" / ours"), info["calls"]["ours"])
        assert f"{found['ratio']:.1f}  ({calls} calls)" in shown
    pipeline = info["ratios"]["DDIMPipeline / ours"]["ratio"]
    assert f"DDIMPipeline takes {pipeline:.1f} times as long as ours" in README


def test_the_readme_says_what_was_measured(tool, measured):
    steps = [
        ratio
        for case in tool.STEP_CASES.values()
        for shape in tool.SHAPES
        for ratio in ratios_of(measured, f"bench_step.py::test_step[{case.format(shape)}]", "diffusers / ours out")
    ]
    pictures = ratios_of(measured, "bench_sampling.py::test_pictures", "diffusers / ours")
    optimized = ratios_of(measured, "bench_sampling.py::test_pictures", "diffusers / ours, optimized")
    said = " ".join(README.split())
    assert f"{min(steps):.0f} to {max(steps):.0f} times as long as ours" in said
    assert f"({min(pictures):.2f} to {max(pictures):.2f} times)" in said
    assert f"{min(optimized):.1f} to {max(optimized):.1f} times faster" in said
