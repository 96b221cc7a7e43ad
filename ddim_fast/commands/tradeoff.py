"""``ddim-fast tradeoff``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from tqdm.auto import tqdm

from ..models.shipped import SHIPPED
from ..plans.files import read_timesteps
from ..plans.timesteps import SPACINGS
from ..tradeoff import (
    Cell,
    CellResult,
    ClosedForm,
    Judge,
    Study,
    StudyDirectory,
    Subject,
    fashion_judge,
    grid,
    judge_of,
    paper_table,
)
from ..tradeoff.measure import CONVERGED
from ..tradeoff.study import calls_to_do, run_study, settings_of
from ..utils.import_string import import_string
from .options import Run, conditioning_rule, takes_model

PAPER_COUNT_AT_1000 = 400
CLOSED_FORM = "closed-form"
QUICK_CONVERGED = Cell(60, "log_snr", order=2)


class _List(click.ParamType):
    """Values separated by commas."""

    name = "LIST"

    def __init__(self, kind: Callable[[str], Any], choices: Sequence[str] | None = None):
        self._kind, self._choices = kind, choices

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        words = [word.strip() for word in value.split(",") if word.strip()]
        wrong = [word for word in words if self._choices is not None and word not in self._choices]
        if wrong or not words:
            self.fail(
                f"must be one or more of {', '.join(self._choices or ('...',))}, separated by commas, got {value!r}",
                param,
                ctx,
            )
        try:
            return tuple(self._kind(word) for word in words)
        except ValueError:
            self.fail(f"must be numbers separated by commas, got {value!r}", param, ctx)


@click.command()
@takes_model
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    metavar="DIR",
    help="The directory for everything. An interrupted run is resumed there.",
)
@click.option("--quick", is_flag=True, help="A first look, in three minutes: few samples, few cells.")
@click.option("-n", "--count", type=click.IntRange(2), default=None, help="Samples of each cell.  [default: 1000]")
@click.option("--steps", type=_List(int), default=None, help="Step counts.  [default: 5,10,20,50]")
@click.option(
    "--spacings",
    type=_List(str, sorted(SPACINGS)),
    default=None,
    help=f"Of {', '.join(SPACINGS)}.  [default: leading,trailing,log_snr]",
)
@click.option("--etas", type=_List(float), default=None, help="[default: 0,1]")
@click.option(
    "--eta-scales",
    type=_List(str, ("std_dev", "variance")),
    default=("std_dev",),
    help="What eta multiplies: std_dev (the paper), variance, or both.  [default: std_dev]",
)
@click.option("--sigma-hat", is_flag=True, help="The paper's larger DDPM noise, too.")
@click.option(
    "--orders", type=_List(int, ("1", "2")), default=None, help="1 is DDIM, 2 its multistep form.  [default: 1,2]"
)
@click.option(
    "--timesteps",
    "files",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE.json",
    help="A list that ddim-fast search found, as cells of its own; may be given more than once.",
)
@click.option(
    "--analytic-variance", is_flag=True, help="These lists also with the noise of Analytic-DPM, where eta is not 0."
)
@click.option(
    "--paper-table",
    "paper",
    is_flag=True,
    help="Instead: table 1 of the DDIM paper, 10 to 1000 steps (there with 400 samples), eta 0 to 1 and sigma-hat, "
    "with quad spacing as in the paper, or that of --spacings.",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Each cell begins with the same noise."
)
@click.option(
    "--features",
    default=None,
    metavar="MODULE:ATTRIBUTE",
    help="Your feature extractor: a callable from samples (B, C, H, W) to features (B, D).",
)
@click.option(
    "--real",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=None,
    metavar="FILE.npz",
    help="Real data for it: an array called samples, in [-1, 1].",
)
def tradeoff(
    run: Run,
    out: Path,
    quick: bool,
    count: int | None,
    steps: tuple[int, ...] | None,
    spacings: tuple[str, ...] | None,
    etas: tuple[float, ...] | None,
    eta_scales: tuple[str, ...],
    sigma_hat: bool,
    orders: tuple[int, ...] | None,
    files: tuple[Path, ...],
    analytic_variance: bool,
    paper: bool,
    seed: int,
    features: str | None,
    real: Path | None,
) -> None:
    """How many steps are enough? Quality against time, cell by cell, on one page.

    Draws samples with each combination of step count, spacing, eta and order, times them, and
    judges them: by their distance to converged samples from the same noise, and where there is a
    feature extractor, by how near they are to real data. Writes DIR/report.html, plots, a CSV and a
    JSON file, and says which cell to use.

    \b
    Examples:
      ddim-fast tradeoff --quick --out study
      ddim-fast tradeoff --model path/to/pipeline --steps 10,20,30 --orders 1,2 --out study
      ddim-fast tradeoff --timesteps ten.json --steps 10,20,50 --out study
      ddim-fast tradeoff --paper-table -n 2000 --out table1
      ddim-fast tradeoff --model closed-form --out exact
    """
    from ..tradeoff.report import check_libraries, write_report

    check_libraries()

    if (real is None) != (features is None):
        raise ValueError(
            "real data are judged by features, and features need real data: give both --features and --real, or neither"
        )
    if paper and analytic_variance:
        raise ValueError(
            "--paper-table is a table of its own, got --analytic-variance beside it: leave one of them out"
        )
    truth = ClosedForm() if run.model_name == CLOSED_FORM else None
    if truth is not None:
        run.model = truth
    else:
        run.load()
    judge = _judge(run, features, real)
    cells = (
        [cell for spacing in spacings or ("quad",) for cell in paper_table(PAPER_COUNT_AT_1000, spacing)]
        if paper
        else _cells(quick, steps, spacings, etas, eta_scales, sigma_hat, orders, files, analytic_variance, run)
    )
    subject = Subject(
        run.model,
        run.noise_schedule(),
        run.sample_shape,
        conditioning_rule(run),
        None if run.guidance == 1 else run.guidance,
        run.sampler_options(),
        seed=seed,
        count=count or (200 if quick else 1000),
        batch_size=run.batch_size,
        device=run.where,
        judge=judge,
        truth=truth,
        reconstructed=0 if quick or paper else 32,
    )
    converged = None if paper else (QUICK_CONVERGED if quick else CONVERGED)
    study = _measure(run, subject, cells, out, converged)
    written = write_report(study, out)
    if (recommended := study.recommendation()) is not None:
        run.say(str(recommended))
    run.say(f"{len(study.results)} cells -> {written[0]}, and {len(written) - 1} files beside it")


def _measure(run: Run, subject: Subject, cells: list[Cell], out: Path, converged: Cell | None) -> Study:
    """Measure all cells, or those that an earlier run left out, with a progress bar."""
    directory = StudyDirectory(out, settings_of(subject))
    total = calls_to_do(subject, cells, directory, converged)
    with tqdm(total=total, desc="measuring", unit="call", unit_scale=True, disable=run.quiet) as bar:

        def done(result: CellResult) -> None:
            if not run.quiet:
                bar.set_postfix_str(result.cell.key)

        return run_study(
            subject, cells, directory, run.model_name, converged_cell=converged, progress=bar.update, done=done
        )


def _cells(
    quick, steps, spacings, etas, eta_scales, sigma_hat, orders, files, analytic_variance, run: Run
) -> list[Cell]:
    """Return the cells asked for; with --quick alone, a small grid that shows most."""
    if analytic_variance and not (files and any(etas or (0.0, 1.0))):
        raise ValueError(
            "--analytic-variance is about lists that ddim-fast search made, and noise: give --timesteps FILE.json, and an eta above 0"
        )
    searched = {}
    for path in files:
        searched[path.stem] = read_timesteps(path)
        searched[path.stem].for_schedule(run.noise_schedule(), str(path))  # is it one for this model?
    if quick and not any((steps, spacings, etas, orders)):
        cells = grid((5, 10, 20, 50), ("leading",), searched=searched)
        if analytic_variance:
            cells += grid((), (), (1.0,), searched=searched, analytic_variance=True)
        cells += (
            grid((5, 10, 20), ("trailing",))
            + grid((5, 10, 20), ("log_snr",), orders=(2,))
            + grid((10, 20), etas=(1.0,))
        )
        return sorted(dict.fromkeys(cells), key=lambda cell: cell.num_inference_steps)
    return grid(
        steps or (5, 10, 20, 50),
        spacings or ("leading", "trailing", "log_snr"),
        etas or (0.0, 1.0),
        eta_scales=eta_scales,
        sigma_hat=sigma_hat,
        orders=orders or (1, 2),
        searched=searched,
        analytic_variance=analytic_variance,
    )


def _judge(run: Run, features: str | None, real: Path | None) -> Judge | None:
    if features is not None and real is not None:
        extractor = import_string(features, "the feature extractor")
        if not callable(extractor):
            raise TypeError(
                f"--features module:attribute must be a callable, got {type(extractor).__name__} from {features}"
            )
        with np.load(real, allow_pickle=False) as file:
            return judge_of(extractor, torch.from_numpy(file["samples"]).float(), features)
    return fashion_judge() if run.model_name in SHIPPED else None
