"""``ddim-fast generate``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .choices import COMPUTE_BATCH_SIZE, FORMATS, SHARD_SIZE, SHIPPED
from .interruption import same_command
from .options import noise_options, takes_run
from .outputs import counted

if TYPE_CHECKING:
    from torch import nn

    from ..generation import Conditioning, Generated
    from .run import Run


@click.command()
@takes_run(
    *noise_options,
    click.option(
        "-n",
        "--count",
        type=click.IntRange(1),
        default=None,
        help="Number of samples.  [default: the rows of --conditioning]",
    ),
    click.option(
        "--out",
        "directory",
        type=click.Path(file_okay=False, path_type=Path),
        default="samples",
        show_default=True,
        metavar="DIR",
        help="A new or empty directory; with --resume, the directory of the set to resume.",
    ),
    click.option(
        "--format",
        type=click.Choice(FORMATS),
        default="safetensors",
        show_default=True,
        help="safetensors: raw samples. npz: uint8 images for FID tools. webdataset: tar files of PNG.",
    ),
    click.option(
        "--conditioning",
        "table",
        type=click.Path(path_type=Path),
        default=None,
        metavar="FILE",
        help="A table with a row for each sample: .jsonl, .csv or .parquet.  [default: each class in turn]",
    ),
    click.option("--resume", is_flag=True, help="Resume or repair the set in --out."),
    click.option(
        "--check",
        "checked",
        type=click.Path(path_type=Path),
        default=None,
        metavar="DIR",
        help="Only verify a finished set against its checksums.",
    ),
    click.option(
        "--join",
        "joined",
        type=click.Path(dir_okay=False, path_type=Path),
        default=None,
        metavar="FILE.npz",
        help="With --check: also join the npz shards into the single file that FID evaluators read.",
    ),
    click.option(
        "--shard-size", type=click.IntRange(1), default=SHARD_SIZE, show_default=True, help="Samples per file."
    ),
    click.option(
        "--compute-batch-size",
        type=click.IntRange(1),
        default=COMPUTE_BATCH_SIZE,
        show_default=True,
        help="Samples per model call; changes the last bits, so it is one of the set's settings.",
    ),
    click.option(
        "--threads",
        "threads_each",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help="Threads per process. For speed, start one process per core instead.",
    ),
    click.option(
        "--patience",
        type=float,
        default=None,
        metavar="SECONDS",
        help="Time after which an idle process redoes another's unfinished slice.  [default: 1.5 times its slowest]",
    ),
    click.option("--no-space-check", is_flag=True, help="Start even if the disk may be too small."),
    without=("out", "save", "threads"),
)
def generate(
    run: Run,
    count: int | None,
    directory: Path,
    format: str,
    table: Path | None,
    resume: bool,
    checked: Path | None,
    joined: Path | None,
    shard_size: int,
    compute_batch_size: int,
    threads_each: int,
    patience: float | None,
    no_space_check: bool,
) -> None:
    """Write any number of samples to files, with one or many processes.

    A run can be resumed after any interruption, and always gives the same bytes.

    \b
    Examples:
      ddim-fast generate -n 50000 --steps 20 --seed 0 --out DIR --format npz
      torchrun --nproc-per-node 8 -m ddim_fast generate -n 1000000 --out DIR
      torchrun --nproc-per-node 4 -m ddim_fast generate -n 1000000 --out DIR --resume
      ddim-fast generate --check DIR --join samples.npz
    """
    from ..generation import GenerationError
    from ..generation import generate as generate_set
    from ..generation.directory import MANIFEST

    if checked is not None:
        _check(checked, joined, run)
        return
    if joined is not None:
        raise ValueError(f"--join needs --check DIR, got --join {joined} alone: add --check DIR")
    run.use(_model(run))
    conditioning, count = _conditioning(run, table, count)
    run.left = f"all shards written so far are complete. {_how_to_resume()}"
    try:
        done = generate_set(
            run.model,
            run.sampler(),
            count,
            directory,
            seed=run.seed,
            conditioning=conditioning,
            guidance_scale=None if run.guidance == 1 else run.guidance,
            format=format,
            shard_size=shard_size,
            batch_size=run.batch_size,
            compute_batch_size=compute_batch_size,
            resume=resume,
            device=run.where,
            backend=run.backend,
            capture=run.capture,
            threads=threads_each,
            model_id=_model_id(run),
            patience=patience,
            check_space=not no_space_check,
            progress=not run.quiet,
        )
    except OSError as error:
        begun = f"\n{_how_to_resume()}" if (directory / MANIFEST).is_file() else ""
        raise click.ClickException(f"{error}{begun}") from error
    except GenerationError as error:
        raise click.ClickException(str(error)) from error
    if done.rank == 0:
        _report(run, done, count)


def _model(run: Run) -> nn.Module:
    import torch

    from ..utils.checks import usable_device

    device = run.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    usable = usable_device(device)
    if usable.type == "cuda":
        torch.cuda.set_device(usable)
    return run.model_on(usable)


def _model_id(run: Run) -> str | None:
    """Return an archive's file digest: its weights alone do not identify its program."""
    from ..generation.settings import file_digest

    return (
        file_digest(Path(run.model_name)) if os.path.isfile(run.model_name) and run.model_name not in SHIPPED else None
    )


def _conditioning(run: Run, table: Path | None, count: int | None) -> tuple[Conditioning | None, int]:
    from ..generation import Table
    from .run import conditioning_rule

    if table is not None:
        if run.class_name is not None:
            raise ValueError(
                f"--class and --conditioning must not be combined, got {run.class_name!r} and {table}: leave one out"
            )
        rows = Table(table)
        return rows, len(rows) if count is None else count
    if count is None:
        raise ValueError("-n, the number of samples, must be given, got none: pass -n, or --conditioning")
    return conditioning_rule(run), count


def _how_to_resume() -> str:
    started = "" if os.environ.get("WORLD_SIZE", "1") == "1" else ", under torchrun with any number of processes"
    return f"Resume with: {same_command('--resume')}{started}"


def _report(run: Run, done: Generated, count: int) -> None:
    found = f", {done.found} already there" if done.found else ""
    run.say(
        f"{counted(count, 'sample')} in {counted(done.shards, 'file')}: {done.made} drawn in {done.seconds:.1f} s "
        f"({done.made / done.seconds:.1f} samples/s){found} -> {done.out}"
    )
    if done.non_finite >= count:
        raise click.ClickException(
            f"samples must be finite, got NaN or infinity in every one of {count} in {done.out}: look at what the model returns, "
            "at its --schedule and at its --prediction-type"
        )
    if done.non_finite:
        click.echo(
            f"warning: {counted(done.non_finite, 'sample')} with NaN or infinity; the manifest lists their files",
            err=True,
        )


def _check(path: Path, joined: Path | None, run: Run) -> None:
    from ..generation import check_set, join_npz
    from ..generation.directory import parts_of, read_manifest
    from ..utils.progress import tqdm

    manifest = read_manifest(path)
    _, slices = parts_of(path, manifest)
    with tqdm(total=slices.count, desc="checking", unit="sample", disable=run.quiet) as bar:
        problems = check_set(path, bar.update)
    if problems:
        raise click.ClickException(f"{path} is not complete:\n  " + "\n  ".join(problems))
    run.say(f"{path} is complete: {counted(slices.count, 'sample')} in {counted(len(manifest['shards']), 'file')}")
    if joined is not None:
        run.say(f"joined into {join_npz(path, joined)}")
