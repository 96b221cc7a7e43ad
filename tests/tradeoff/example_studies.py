"""Studies for the tests of what is made of them, without a model: many cells, one, none; metrics with and without errors; hostile names."""

import math
from dataclasses import replace

from PIL import Image

from ddim_fast.tradeoff import METRICS, Cell, CellResult, Measure, Study, grid, paper_table
from ddim_fast.tradeoff.others import short_name
from ddim_fast.tradeoff.paper import PAPER_FIDS

EVIL = "</script><script>document.title = 'broken out'</script>&amp; <b>'\"`{{ 7 * 7 }} $\\frac{ \x00\x1b[31m\ud800 ω"
"""HTML, a template, TeX, control characters, half a surrogate pair."""

SETTINGS = {
    "model": {"sha256": "5f" * 32},
    "shape": [1, 28, 28],
    "conditioning": None,
    "seed": 0,
    "count": 500,
    "judge": "shipped classifier",
    "environment": {"torch": "2.13.0+cpu", "processor": "a processor", "device": "cpu", "threads": 1},
}


def result(cell, frechet=None, error=math.nan, ms=None, **more):
    """A result of a cell; 0.5 ms a step unless ``ms`` says otherwise. Metrics by name: a value, or a value and its error."""
    quality = {} if frechet is None else {"frechet": Measure(frechet, error)}
    for name in METRICS.keys() & more.keys():
        value = more.pop(name)
        quality[name] = Measure(*value) if isinstance(value, tuple) else Measure(value)
    S = cell.num_inference_steps
    ms = 0.5 * S if ms is None else ms
    about = dict(count=500, model_ms=0.99 * ms, update_ms=0.01 * ms, calls=S, peak_megabytes=12.5)
    return CellResult(cell, quality=quality, **about | more)


def study(*results, model="my model", **more):
    return Study(model, **dict(settings=SETTINGS, results=results, made_at="2025-01-02T03:04:05Z") | more)


def _many():
    """Three spacings, three etas, order 2: error falls with steps, and more noise needs more of them."""
    cells = grid((5, 10, 20, 50, 100), ("leading", "quad", "log_snr"), (0.0, 0.5, 1.0), orders=(1, 2))
    for cell in cells:
        S = cell.num_inference_steps
        factor = {"leading": 1.6, "quad": 1.2, "log_snr": 1.0}[cell.timestep_spacing] * (1 + 2 * cell.eta)
        frechet = 4 + factor * (400 if cell.order == 2 else 60) / S**cell.order
        agree = (1 - 0.4 * factor / S, 0.01)
        more = dict(precision=(0.9 - factor / S, 0.013), recall=(0.8 - 2 * factor / S, 0.015), class_agreement=agree)
        if cell.deterministic:
            more["distance"] = (0.4 * factor / S**cell.order, 0.002)
        yield result(cell, frechet, 0.04 * frechet, **more)


def _as_in_the_paper(error=0.1):
    for cell in paper_table():
        row = "sigma-hat" if cell.sigma_hat else cell.eta
        yield result(cell, PAPER_FIDS[row][cell.num_inference_steps], error)


MANY = study(*_many(), notes=("The model was trained for an hour.",))
PAPER = study(*_as_in_the_paper(), model="a model like the paper's")
ONE = study(result(Cell(10), 12.0, 0.5))
FEW = study(result(Cell(10), 12.0), result(Cell(20), 8.0), result(Cell(50), 7.9))
NO_METRICS = study(result(Cell(10)), result(Cell(20)))
NOTHING = study()
DIVERGED = study(result(Cell(1), math.nan), result(Cell(10), math.inf), result(Cell(20), 3.0), result(Cell(50), 2.0))
WASSERSTEIN = study(*(result(Cell(S), wasserstein=1 / S, peak_megabytes=math.nan) for S in (5, 10, 50)))
HOSTILE = study(
    result(Cell(2, EVIL, timesteps=(500, 0)), 12.0, 0.5),
    result(Cell(3, "</title><script>", timesteps=(500, 250, 0)), 7.0, 0.5),
    model=EVIL,
    settings={**SETTINGS, EVIL: {EVIL: EVIL}},
    notes=(EVIL,),
)
SCHEDULERS = (
    "diffusers:UniPCMultistepScheduler",
    "diffusers:DPMSolverMultistepScheduler?use_karras_sigmas=true&solver_order=3",
    "diffusers:EulerAncestralDiscreteScheduler",
    "diffusers:HeunDiscreteScheduler",
)


def _in_a_race():
    """Three ways of ours, a searched list, a fitted solver and four schedulers; a machine that slows each third batch by a half."""
    ours = [*grid((5, 10, 20, 50), ("leading", "trailing")), *grid((5, 10, 20), ("log_snr",), orders=(2,))]
    ours += [Cell(8, "eight", timesteps=tuple(range(8, 0, -1))), Cell(6, "six", timesteps=tuple(range(6, 0, -1)))]
    theirs = [
        Cell(
            S,
            short_name(text),
            scheduler=text,
            calls=2 * S - 1 if "Heun" in text else S,
            draws_noise="Ancestral" in text,
        )
        for text in SCHEDULERS
        for S in (5, 10, 20, 50)
    ]
    for cell in (*ours, *theirs):
        factor = {"leading": 1.6, "trailing": 1.5, "log_snr": 0.5}.get(cell.timestep_spacing, 1.0)
        frechet, distance = 4 + 60 * factor / cell.predictions, (2 * factor / cell.predictions, 0.01)
        ms = 0.5 * cell.predictions * (1.02 if cell.scheduler else 1.0)
        batches = tuple(ms * (1.5 if i % 3 == 2 else 1 + 0.001 * i) for i in range(9))
        more = dict(distance=distance) if cell.deterministic else {}
        yield result(
            cell,
            frechet,
            0.04 * frechet,
            ms=sorted(batches)[4],
            calls=cell.predictions,
            batch_ms=batches,
            measured_at="now",
            **more,
        )


RACE = study(*_in_a_race(), model="a race")
ALL = {
    "race": RACE,
    "many": MANY,
    "paper": PAPER,
    "one": ONE,
    "few": FEW,
    "no metrics": NO_METRICS,
    "nothing": NOTHING,
    "diverged": DIVERGED,
    "wasserstein": WASSERSTEIN,
    "hostile": HOSTILE,
}


def with_pictures(study, directory):
    """The same study, with a picture of each cell in its directory: 3 rows of 10, the more steps the lighter."""
    (directory / "cells").mkdir()
    results = []
    for number, found in enumerate(study.results):
        name = f"cells/{number}.png"
        Image.new("L", (626, 192), min(255, 2 * found.cell.num_inference_steps)).save(directory / name)
        results.append(replace(found, pictures=name))
    return replace(study, results=tuple(results))
