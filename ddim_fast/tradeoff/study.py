"""A study on disk. Each cell is written as soon as it is measured, so that runs can be resumed."""

from __future__ import annotations

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
from .measure import CONVERGED, Progress, Subject, draw, measure
from .results import CellResult, Study

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
        "shape": list(subject.shape),
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
    ``converged.safetensors``.

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
        subject.sampler(cell).plan(subject.model)
    converged = None
    if converged_cell is not None and any(cell.deterministic for cell in cells):
        converged = directory.converged(lambda: draw(subject, converged_cell, converged_count, progress).samples)
    results = []
    for cell in cells:
        result = directory.result(cell)
        if result is None:
            result, samples = measure(subject, cell, converged, progress)
            if (sheet := _sheet(samples)) is not None:
                path = directory.picture_path(cell)
                png = io.BytesIO()
                sheet.save(png, "PNG")
                write_atomically(path, png.getvalue())
                result = replace(result, pictures=str(path.relative_to(directory.path)))
            directory.save(result)
        results.append(result)
        done(result)
    return Study(model_name, directory.settings, tuple(results), tuple(notes))


def calls_to_do(
    subject: Subject,
    cells: Iterable[Cell],
    directory: StudyDirectory,
    converged_cell: Cell | None,
    converged_count: int | None = None,
) -> int:
    """Return the model calls, counted per sample, that ``run_study`` would make."""
    cells = list(cells)
    calls = sum(subject.calls(cell) for cell in cells if directory.result(cell) is None)
    there = (directory.path / "converged.safetensors").exists()
    if converged_cell is not None and not there and any(cell.deterministic for cell in cells):
        calls += (converged_count or subject.count) * converged_cell.num_inference_steps * subject.calls_per_step
    return calls


def _sheet(samples: Tensor) -> Image.Image | None:
    """Return the first samples as a grid, ten in a row; None if they are not images."""
    if samples.ndim != 4 or samples.shape[1] not in (1, 3):
        return None
    return pictures.grid(samples[:PICTURES], columns=10, scale=max(1, round(56 / samples.shape[3])))
