"""A study on disk. Each cell is written as soon as it is measured, so that runs can be resumed."""

from __future__ import annotations

import glob
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from ..generation.settings import as_json, differences, environment, model_digest
from ..kernels.noise import NOISE_STANDARD_VERSION
from ..utils import pictures
from ..utils.atomic_files import own_directory, write_atomically
from ..utils.files import read_json_object, safetensors_tensor
from .cells import Cell
from .measure import CONVERGED, Batch, Progress, Subject, draw, draw_batch, firsts, judged
from .results import CellResult, Study, now

PICTURES = 30
"""The number of samples in each cell's sample grid."""


def settings_of(subject: Subject, model_id: str | None = None) -> dict[str, Any]:
    """Return everything that a study's numbers depend on except its cells, as JSON.

    Args:
        model_id: identifies a model that is not an ``nn.Module``. None: the digest of its weights.
    """
    schedule = subject.schedule
    return {
        "model": {"id": model_id} if model_id is not None else {"sha256": model_digest(subject.model)},
        "schedule": {"name": schedule.name, "sha256": schedule.digest, **schedule.parameters},
        "shape": list(subject.sample_shape),
        "conditioning": None if subject.conditioning is None else subject.conditioning.settings(),
        "guidance_scale": subject.guidance_scale,
        "sampler_options": {name: subject.sampler_options[name] for name in sorted(subject.sampler_options)},
        "seed": subject.seed,
        "count": subject.count,
        "batch_size": subject.batch_size,
        "judge": None if subject.judge is None else subject.judge.name,
        "reconstructed": subject.reconstructed,
        "noise_standard": NOISE_STANDARD_VERSION,
        "environment": environment(subject.device, torch.float32, None, torch.get_num_threads()),
    }


class StudyDirectory:
    """The directory of a study.

    It holds ``settings.json``, ``cells/KEY.json``, ``cells/KEY.png`` and
    ``converged.safetensors``, and until a cell is judged its batches, ``cells/KEY.*.safetensors``.

    Raises:
        ValueError: it holds a study with other settings; the message lists the differences.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self.path, self.settings = path, dict(settings)
        there = path / "settings.json"
        if there.exists():
            found = differences(read_json_object(there), settings, "there", "here")
            if found:
                listed = "\n".join(f"  {line}" for line in found)
                raise ValueError(
                    f"{path} holds a study with other settings: choose another directory, or remove it\n{listed}"
                )
        own_directory(path / "cells")
        write_atomically(there, as_json(settings).encode())

    def result(self, cell: Cell) -> CellResult | None:
        """Return the result of this cell; None if it was not measured."""
        path = self.path / "cells" / f"{cell.key}.json"
        if not path.exists():
            return None
        fields = read_json_object(path)
        try:
            result = CellResult.from_dict(fields)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path} must hold the result of a cell, and does not ({error!r}): remove it, and it is measured again"
            ) from error
        return result if result.cell == cell else None

    def save(self, result: CellResult) -> None:
        content = json.dumps(result.as_dict(), indent=1, allow_nan=False)
        write_atomically(self.path / "cells" / f"{result.cell.key}.json", content.encode())

    def picture_path(self, cell: Cell) -> Path:
        return self.path / "cells" / f"{cell.key}.png"

    # --- Batches of cells that are not judged yet ---

    def _batch_path(self, cell: Cell, first: int) -> Path:
        digest = hashlib.sha256(json.dumps(cell.as_dict(), sort_keys=True).encode()).hexdigest()[:8]
        return self.path / "cells" / f"{cell.key}.{digest}.{first}.safetensors"

    def keep_batch(self, cell: Cell, first: int, batch: Batch) -> None:
        numbers = [batch.calls, batch.model_seconds, batch.update_seconds, batch.peak_megabytes]
        took = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        write_atomically(self._batch_path(cell, first), save({"samples": batch.samples.contiguous(), "took": took}))

    def batch(self, cell: Cell, first: int) -> Batch | None:
        """Return the batch of a cell that begins with sample ``first``; None if it was not drawn."""
        path = self._batch_path(cell, first)
        if not path.exists():
            return None
        took = safetensors_tensor(path, "took").tolist()
        if len(took) != 4:
            raise ValueError(
                f"{path} must say what a batch took in 4 numbers, got {len(took)}: remove it, and it is drawn again"
            )
        return Batch(safetensors_tensor(path, "samples"), int(took[0]), *took[1:])

    def forget_batches(self, cell: Cell) -> None:
        """Remove what was drawn of a cell, once its result is there."""
        for path in (self.path / "cells").glob(
            f"{glob.escape(self._batch_path(cell, 0).name.removesuffix('0.safetensors'))}*.safetensors"
        ):
            path.unlink(missing_ok=True)

    def converged(self, make: Callable[[], Tensor]) -> Tensor:
        """Return the converged samples on disk, or else those of ``make``, and write them."""
        path = self.path / "converged.safetensors"
        if path.exists():
            return safetensors_tensor(path, "samples")
        samples = make()
        write_atomically(path, save({"samples": samples.contiguous()}))
        return samples


def run_study(
    subject: Subject,
    cells: Iterable[Cell],
    directory: StudyDirectory,
    model_name: str,
    *,
    converged_cell: Cell | None = CONVERGED,
    converged_count: int | None = None,
    notes: Sequence[str] = (),
    progress: Progress = lambda calls: None,
    done: Callable[[CellResult], Any] = lambda result: None,
) -> Study:
    """Measure every cell that is not in the directory yet, and return the study.

    Args:
        converged_cell: how to draw the converged samples that distances are measured to. None: no
            distances.
        converged_count: the number of converged samples. None: as many as a cell has.
        done: called with each result, including those of an earlier run.
    """
    cells = list(cells)
    for cell in cells:  # report invalid cells before any work
        subject.check(cell)
    converged = None
    if converged_cell is not None and any(cell.deterministic for cell in cells):
        converged = directory.converged(lambda: draw(subject, converged_cell, converged_count, progress))
    draw_in_turn(subject, [cell for cell in cells if directory.result(cell) is None], directory, progress)
    measured_at = now()
    results = []
    for cell in cells:
        result = directory.result(cell)
        if result is None:
            batches = [directory.batch(cell, first) for first in firsts(subject, cell)]
            result, samples = judged(subject, cell, [batch for batch in batches if batch is not None], converged)
            if (sheet := _sheet(samples)) is not None:
                path = directory.picture_path(cell)
                png = io.BytesIO()
                sheet.save(png, "PNG")
                write_atomically(path, png.getvalue())
                result = replace(result, pictures=str(path.relative_to(directory.path)))
            result = replace(result, measured_at=measured_at)
            directory.save(result)
        directory.forget_batches(cell)
        results.append(result)
        done(result)
    return Study(model_name, directory.settings, tuple(results), tuple(notes))


def draw_in_turn(
    subject: Subject, cells: Sequence[Cell], directory: StudyDirectory, progress: Progress = lambda calls: None
) -> None:
    """Draw the first batch of every cell, then the second, and so on, each kept on disk.

    So a time in which the machine is slower is one for all cells. Each round begins with another
    cell, so that none always comes after the same one.
    """
    rounds = max((len(firsts(subject, cell)) for cell in cells), default=0)
    for number in range(rounds):
        for cell in [*cells[number % len(cells) :], *cells[: number % len(cells)]]:
            beginnings = firsts(subject, cell)
            if number < len(beginnings) and directory.batch(cell, beginnings[number]) is None:
                directory.keep_batch(cell, beginnings[number], draw_batch(subject, cell, beginnings[number], progress))


def calls_to_do(
    subject: Subject,
    cells: Iterable[Cell],
    directory: StudyDirectory,
    converged_cell: Cell | None,
    converged_count: int | None = None,
) -> int:
    """Return the model calls, counted per sample, that ``run_study`` would make."""
    cells = list(cells)
    calls = 0
    for cell in cells:
        if directory.result(cell) is None:
            calls += subject.calls(cell)
            drawn = (directory.batch(cell, first) for first in firsts(subject, cell))
            calls -= sum(len(batch.samples) * batch.calls for batch in drawn if batch is not None)
    there = (directory.path / "converged.safetensors").exists()
    if converged_cell is not None and not there and any(cell.deterministic for cell in cells):
        calls += (converged_count or subject.count) * converged_cell.num_inference_steps * subject.calls_per_step
    return calls


def _sheet(samples: Tensor) -> Image.Image | None:
    """Return the first samples as a grid, ten in a row; None if they are not images."""
    if samples.ndim != 4 or samples.shape[1] not in (1, 3):
        return None
    return pictures.grid(samples[:PICTURES], columns=10, scale=max(1, round(56 / samples.shape[3])))
