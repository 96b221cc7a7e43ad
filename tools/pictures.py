"""Draw the pictures of README.md and docs/METHOD.md from the model that ships, and charts of what was measured.

\b
python tools/pictures.py                # docs/images/*.png and *.svg
"""

import json
from collections.abc import Callable
from pathlib import Path

import click
import torch
from PIL import Image

import ddim_fast as df
from ddim_fast.utils.pictures import grid

ROOT = Path(__file__).resolve().parents[1]
IMAGES, JSON_FILE = ROOT / "docs" / "images", ROOT / "docs" / "benchmarks.json"
ROWS, STEPS = 3, 20
BLUE, GREY = "#2563a8", "#9aa3ad"

# --- The grid ---------------------------------------------------------------------------------------------------------


def picture_grid(rows: int = ROWS) -> Image.Image:
    """Draw the first samples of ``make sample``, a column for each class."""
    model = df.load_model("fashion")
    classes = len(model.class_names)
    sampler = df.DDIMSampler(model.schedule, num_inference_steps=STEPS)
    samples = sampler.sample(
        model,
        (rows * classes, 1, 28, 28),
        seed=0,
        conditioning={"class_labels": torch.arange(rows * classes) % classes},
    )
    return grid(samples, columns=classes, scale=2)


# --- The method -------------------------------------------------------------------------------------------------------


def forward_process() -> Image.Image:
    """One clean picture at timesteps from 0 to 999."""
    model = df.load_model("fashion")
    x0 = _one(model, "Trouser", steps=50)
    timesteps = torch.tensor([0, 50, 100, 200, 300, 450, 650, 999])
    noise = torch.from_numpy(df.standard_normals(df.sample_seeds(1, 1), 28 * 28, 0, 0)).view(1, 1, 28, 28)
    shape = (len(timesteps), -1, -1, -1)
    noisy = model.schedule.add_noise(x0.expand(shape), noise.expand(shape), timesteps)
    return grid(noisy, columns=len(timesteps), scale=2)


def steps() -> Image.Image:
    """Ten steps: the states, and the clean picture that each predicts."""
    model = df.load_model("fashion")
    run = _one(model, "Shirt", steps=10, return_trajectory=True)
    return grid(torch.cat([*run.x_t[:-1], *run.x0]), columns=len(run.x0), scale=2)


def eta() -> Image.Image:
    """The same start with six seeds for the noise: eta = 0, 0.5 of the standard deviation, 0.5 of the variance, 1."""
    model = df.load_model("fashion")
    start = torch.from_numpy(df.standard_normals(df.sample_seeds(3, 1), 28 * 28, 0, 0)).view(1, 1, 28, 28)
    rows = []
    for value, scales in ((0.0, "std_dev"), (0.5, "std_dev"), (0.5, "variance"), (1.0, "std_dev")):
        sampler = df.DDIMSampler(model.schedule, 50, eta=value, eta_scales=scales, timestep_spacing="trailing")
        labels = torch.full((6,), model.class_names.index("Coat"))
        rows.append(
            sampler.sample(
                model, x_T=start.expand(6, -1, -1, -1), seeds=range(6), conditioning={"class_labels": labels}
            )
        )
    return grid(torch.cat(rows), columns=6, scale=2)


def _one(model, label: str, steps: int, **options):
    """Sample one picture of a class."""
    sampler = df.DDIMSampler(model.schedule, steps, timestep_spacing="trailing")
    labels = torch.tensor([model.class_names.index(label)])
    return sampler.sample(model, (1, 1, 28, 28), seed=0, conditioning={"class_labels": labels}, **options)


PICTURES: dict[str, Callable[[], Image.Image]] = {
    "grid": picture_grid,
    "forward": forward_process,
    "steps": steps,
    "eta": eta,
}
"""The pictures, by the names of their files."""

# --- The chart --------------------------------------------------------------------------------------------------------

STEP_CASES = {
    "plain step": "eta0-{}-float32",
    "with guidance": "guidance-{}-float32",
    "clipped": "clip-{}-float32",
    "with noise, eta = 1": "eta1-{}-float32",
}
SHAPES = {"1x4x64x64": BLUE, "64x3x32x32": GREY}
"""The shapes of the chart, and their colours."""


def against_diffusers(data: dict, figure) -> None:
    """Bars: how many times longer diffusers' step takes than ours."""
    ratios = {one["fullname"]: one["extra_info"].get("ratios", {}) for one in data["benchmarks"]}
    axes = figure.add_subplot()
    height = 0.8 / len(SHAPES)
    for n, (shape, colour) in enumerate(SHAPES.items()):
        for row, case in enumerate(STEP_CASES.values()):
            ratio = ratios[f"bench_step.py::test_step[{case.format(shape)}]"]["diffusers / ours out"]["ratio"]
            y = row + (n - (len(SHAPES) - 1) / 2) * height
            axes.barh(y, ratio, 0.9 * height, color=colour, label=shape if row == 0 else None)
            axes.text(ratio + 0.3, y, f"{ratio:.{0 if ratio >= 10 else 1}f}", va="center", fontsize=9)
    axes.axvline(1, color="#444444", linewidth=0.8)
    axes.set_yticks(range(len(STEP_CASES)), STEP_CASES)
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    version = data["machine_info"]["ddim_fast"]["diffusers"]
    axes.set_xlabel(f"diffusers {version} takes so many times longer (1: the same)", fontsize=9)
    axes.set_title(f"One DDIM step, float32, {_machine(data)}", fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=9, loc="lower right")


PICTURES_AT_ONCE = 8
"""Of the chart of time to quality."""


def quality_of(data: dict) -> dict:
    """Return what was measured for the chart of time to quality."""
    name = f"bench_time_to_quality.py::test_time_to_quality[{PICTURES_AT_ONCE}]"
    return next(one["extra_info"] for one in data["benchmarks"] if one["fullname"] == name)


def time_to_quality(data: dict, figure) -> None:
    """Bars: how many times longer others take for pictures as good as those of DDIMPipeline in 50 steps."""
    info = quality_of(data)
    ratios = {name.removesuffix(" / ours"): found["ratio"] for name, found in info["ratios"].items()}
    axes = figure.add_subplot()
    for row, (name, ratio) in enumerate(sorted([*ratios.items(), ("ours", 1.0)], key=lambda one: one[1])):
        calls = info["calls"].get(name, info["calls"]["ours"])
        axes.barh(row, ratio, 0.7, color=BLUE if name.startswith("ours") else GREY)
        axes.text(ratio + 0.1, row, f"{ratio:.1f}  ({calls} calls)", va="center", fontsize=9)
        axes.text(-0.1, row, {"ours": "ours, optimized model"}.get(name, name), va="center", ha="right", fontsize=9)
    axes.invert_yaxis()
    axes.set_yticks([])
    axes.set_xlim(0, 1.15 * max(ratios.values()))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("time, as a multiple of ours", fontsize=9)
    axes.set_title(f"As good as DDIMPipeline in 50 steps, {_machine(data)}", fontsize=10, loc="left")


def _machine(data: dict) -> str:
    info = data["machine_info"]["ddim_fast"]
    return f"one thread of an {info['cpu_model']}, {info['instruction_set'].upper().replace('AVX512', 'AVX-512')}"


CHARTS: dict[str, Callable] = {"chart": against_diffusers, "time_to_quality": time_to_quality}
"""The charts, by the names of their files: functions of the data and an empty figure."""


def chart(name: str, path: Path) -> None:
    """Draw a chart to an SVG file, with its text as text."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure = Figure(figsize=(7, 3), layout="constrained", facecolor="white")
        CHARTS[name](json.loads(JSON_FILE.read_text()), figure)
        figure.savefig(path, metadata={"Date": None, "Creator": None})


@click.command(help=__doc__)
def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    for file, draw in PICTURES.items():
        draw().save(IMAGES / f"{file}.png", optimize=True)
    for name in CHARTS:
        chart(name, IMAGES / f"{name}.svg")
    click.echo(f"wrote {', '.join([*PICTURES, *CHARTS])} to {IMAGES}")


if __name__ == "__main__":
    main()
