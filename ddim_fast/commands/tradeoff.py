"""``ddim-fast tradeoff``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .choices import CONTINUOUS_SPACINGS, ETA_SCALES, PAPER, RACED_METRICS, SHIPPED, SPACINGS
from .lists import ListOf
from .options import takes_model

if TYPE_CHECKING:
    from ..tradeoff import Cell, CellResult, Judge, Study, Subject
    from .run import Run

PAPER_COUNT_AT_1000 = 400


@click.command()
@takes_model
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    metavar="DIR",
    help="Output directory. An interrupted run is resumed there.",
)
@click.option("--quick", is_flag=True, help="Measure few cells with few samples, in three minutes.")
@click.option("-n", "--count", type=click.IntRange(2), default=None, help="Samples per cell.  [default: 1000]")
@click.option("--steps", type=ListOf(int), default=None, help="Numbers of steps.  [default: 5,10,20,50]")
@click.option(
    "--spacings",
    type=ListOf(str, sorted({*SPACINGS, *CONTINUOUS_SPACINGS})),
    default=None,
    help=f"Timestep spacings, of {', '.join(SPACINGS)}; in continuous time of {', '.join(CONTINUOUS_SPACINGS)}.  "
    "[default: leading,trailing,log_snr; uniform,beta,log_snr]",
)
@click.option("--etas", type=ListOf(float), default=None, help="Values of eta.  [default: 0,1]")
@click.option(
    "--eta-scales",
    type=ListOf(str, ETA_SCALES),
    default=(PAPER,),
    help=f"What eta means, of {', '.join(ETA_SCALES)}.  [default: {PAPER}, the paper's]",
)
@click.option("--sigma-hat", is_flag=True, help="Also measure the paper's larger DDPM noise.")
@click.option(
    "--orders", type=ListOf(int, ("1", "2")), default=None, help="1 is DDIM, 2 is multistep DDIM.  [default: 1,2]"
)
@click.option(
    "--timesteps",
    "files",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE.json",
    help="Also measure a list or a solver from ddim-fast search, named by its file; may be repeated.",
)
@click.option(
    "--against",
    multiple=True,
    metavar="MODULE:CLASS",
    help="Also measure this scheduler, with as many steps, from the same noise: diffusers:UniPCMultistepScheduler, or with options "
    "'diffusers:DPMSolverMultistepScheduler?use_karras_sigmas=true&solver_order=3'; may be repeated.",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="METRIC=VALUE",
    help=f"The quality to reach in the least time, of {', '.join(RACED_METRICS)}; may be "
    "repeated.  [default: what plain DDIM has in 50 steps, or in the most that are measured]",
)
@click.option(
    "--open", "opens", is_flag=True, help="Open the report in the browser; without a display print its place."
)
@click.option(
    "--analytic-variance", is_flag=True, help="Also measure these lists with Analytic-DPM's noise where eta is not 0."
)
@click.option(
    "--paper-table",
    "paper",
    is_flag=True,
    help="Measure table 1 of the DDIM paper instead: 10 to 1000 steps (400 samples at 1000), eta 0 to 1 and sigma-hat, "
    "with quad spacing as in the paper, or with --spacings.",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Every cell starts from the same noise."
)
@click.option(
    "--features",
    default=None,
    metavar="MODULE:ATTRIBUTE",
    help="A feature extractor: a callable from samples (B, C, H, W) to features (B, D).",
)
@click.option(
    "--real",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=None,
    metavar="FILE.npz",
    help="Real data for --features: an array called samples, in [-1, 1].",
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
    against: tuple[str, ...],
    targets: tuple[str, ...],
    opens: bool,
    analytic_variance: bool,
    paper: bool,
    seed: int,
    features: str | None,
    real: Path | None,
) -> None:
    """Measure quality against time to find how many steps are enough.

    Draws samples with each combination of number of steps, spacing, eta and order (a cell), and
    times them. Measures their distance to converged samples from the same noise and, with a feature
    extractor, to real data. Writes DIR/report.html, plots, a CSV and a JSON file, and recommends a
    cell.

    \b
    Examples:
      ddim-fast tradeoff --quick --out study
      ddim-fast tradeoff --model path/to/pipeline --steps 10,20,30 --orders 1,2 --out study
      ddim-fast tradeoff --timesteps ten.json --steps 10,20,50 --out study
      ddim-fast tradeoff --quick --against diffusers:UniPCMultistepScheduler \
        --against diffusers:DPMSolverMultistepScheduler --open --out race
      ddim-fast tradeoff --target frechet=0.06 --target distance=0.02 --out study
      ddim-fast tradeoff --paper-table -n 2000 --out table1
      ddim-fast tradeoff --model closed-form --out exact
    """
    from ..tradeoff import Cell, ClosedForm, Subject, other_cells, paper_table
    from ..tradeoff.measure import CONVERGED
    from ..tradeoff.race import summary
    from ..tradeoff.report import check_libraries, write_report
    from ..utils.open_page import open_page
    from .run import conditioning_rule

    check_libraries()

    if (real is None) != (features is None):
        raise ValueError(
            "--features and --real must be given together, got only one: give both --features and --real, or neither"
        )
    if paper and analytic_variance:
        raise ValueError("--paper-table must not be combined with --analytic-variance, got both: leave one of them out")
    aims = _targets(targets)
    run.load()
    truth = run.model if isinstance(run.model, ClosedForm) else None
    count = count or (200 if quick else 1000)
    run.check_memory("-n", count, grids=0)
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
        count=count,
        batch_size=run.batch_size,
        device=run.where,
        judge=judge,
        truth=truth,
        reconstructed=0 if quick or paper else 32,
    )
    counts = {cell.num_inference_steps: cell.count for cell in cells if cell.timesteps is None}
    for text in against:
        cells += other_cells(subject, text, sorted(counts), counts)
    converged = None if paper else (Cell(60, "log_snr", order=2) if quick else CONVERGED)
    study = replace(_measure(run, subject, cells, out, converged), targets=aims, notes=_libraries(against))
    written = write_report(study, out)
    for line in summary(study):
        run.say(line)
    run.say(f"{len(study.results)} cells -> {written[0]}, and {len(written) - 1} more files")
    if opens and not open_page(written[0]):
        click.echo(f"no display to open it on: {written[0].resolve()}")


def _libraries(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return a note of the versions of the libraries whose schedulers take part."""
    found = []
    for library in dict.fromkeys(name.partition(":")[0].partition(".")[0] for name in names):
        with suppress(PackageNotFoundError):  # a file of the user's
            found.append(f"{library} {version(library)}")
    return (f"Other libraries' schedulers are those of {', '.join(found)}.",) if found else ()


def _targets(texts: tuple[str, ...]) -> dict[str, float]:
    """Return the values of --target by metric."""
    from ..utils.checks import check_choice, check_number, refuse

    found: dict[str, float] = {}
    for text in texts:
        name, _, value = text.partition("=")
        check_choice("the metric of --target", name, RACED_METRICS, "for instance --target frechet=0.06")
        try:
            number = float(value)
        except ValueError:
            refuse("--target must be METRIC=VALUE, with a number", text, "for instance --target frechet=0.06")
        found[name] = check_number(f"--target {name}", number, at_least=0)
    return found


def _measure(run: Run, subject: Subject, cells: list[Cell], out: Path, converged: Cell | None) -> Study:
    """Measure all cells that an earlier run has not measured, with a progress bar."""
    from ..tradeoff import StudyDirectory
    from ..tradeoff.study import calls_to_do, run_study, settings_of
    from ..utils.progress import tqdm

    run.left = f"run the same command again: the cells that were measured are in {out}"
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
    """Return the requested cells; with --quick alone, a small representative grid."""
    from ..plans.continuous import ContinuousSchedule
    from ..plans.files import read_timesteps
    from ..tradeoff import grid

    if analytic_variance and not (files and any(etas or (0.0, 1.0))):
        raise ValueError(
            "--analytic-variance needs a list from ddim-fast search and noise: give --timesteps FILE.json, and an eta above 0"
        )
    usual = ("leading", "trailing", "log_snr")
    if isinstance(run.noise_schedule(), ContinuousSchedule):
        usual = ("uniform", "beta", "log_snr")
    searched = {}
    for name, path in _named(files, run.noise_schedule().spacings).items():
        searched[name] = read_timesteps(path)
        searched[name].for_schedule(run.noise_schedule(), str(path))  # check that it fits the model
    if quick and not any((steps, spacings, etas, orders)):
        cells = grid((5, 10, 20, 50), usual[:1], searched=searched)
        if analytic_variance:
            cells += grid((), (), (1.0,), searched=searched, analytic_variance=True)
        cells += (
            grid((5, 10, 20), usual[1:2])
            + grid((5, 10, 20), ("log_snr",), orders=(2,))
            + grid((10, 20), usual[:1], (1.0,))
        )
        return sorted(dict.fromkeys(cells), key=lambda cell: cell.num_inference_steps)
    return grid(
        steps or (5, 10, 20, 50),
        spacings or usual,
        etas or (0.0, 1.0),
        eta_scales=eta_scales,
        sigma_hat=sigma_hat,
        orders=orders or (1, 2),
        searched=searched,
        analytic_variance=analytic_variance,
    )


def _named(files: tuple[Path, ...], taken: Sequence[str]) -> dict[str, Path]:
    """Return the files by their names without ending; where two share one, or a spacing has it, by
    their paths."""
    stems = [path.stem for path in dict.fromkeys(files)]
    return {
        path.stem if stems.count(path.stem) == 1 and path.stem not in taken else str(path): path
        for path in dict.fromkeys(files)
    }


def _judge(run: Run, features: str | None, real: Path | None) -> Judge | None:
    import numpy as np
    import torch

    from ..tradeoff import judge_of, shipped_judge
    from ..utils.files import npz_array
    from ..utils.import_string import import_string

    if features is not None and real is not None:
        extractor = import_string(features, "the feature extractor")
        if not callable(extractor):
            raise TypeError(
                f"--features module:attribute must be a callable, got {type(extractor).__name__} from {features}"
            )
        samples = torch.from_numpy(npz_array(real, "samples").astype(np.float32))
        return judge_of(extractor, samples, features)
    return shipped_judge(run.model_name) if run.model_name in SHIPPED else None
