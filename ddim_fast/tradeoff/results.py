"""What a study found, as data: one result for each cell, what it was found with, and what follows for the user."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .cells import Cell

STUDY_VERSION = 1
"""Of the JSON's form."""


@dataclass(frozen=True)
class Measure:
    """A number with its standard error; NaN where there is none to give."""

    value: float
    error: float = math.nan


@dataclass(frozen=True)
class Metric:
    """What a quality number is called and means.

    Args:
        better: "lower" or "higher".
    """

    name: str
    title: str
    better: str
    meaning: str

    def is_better(self, a: float, b: float) -> bool:
        return a < b if self.better == "lower" else a > b


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "frechet",
            "Frechet distance",
            "lower",
            "between Gaussians fitted to features of the samples and of real data (squared 2-Wasserstein distance). Not FID unless the "
            "features are Inception's",
        ),
        Metric(
            "distance",
            "distance to converged",
            "lower",
            "root mean square over a sample's elements of its difference to the converged sample from the same noise, mean over samples; "
            "deterministic cells only",
        ),
        Metric(
            "wasserstein",
            "Wasserstein distance",
            "lower",
            "exact 2-Wasserstein distance between the samples and the data distribution, known in closed form",
        ),
        Metric(
            "precision",
            "precision",
            "higher",
            "share of samples within the manifold of real data, estimated by 3 nearest neighbours in feature space (arXiv 1904.06991)",
        ),
        Metric(
            "recall",
            "recall",
            "higher",
            "share of real data within the manifold of the samples, estimated likewise",
        ),
        Metric(
            "class_agreement",
            "class agreement",
            "higher",
            "share of samples to which a classifier gives the class that was asked for",
        ),
        Metric(
            "reconstruction",
            "reconstruction error",
            "lower",
            "mean squared error of samples encoded to noise and decoded again with the same steps, both in [0, 1] (table 2 of the DDIM paper)",
        ),
    )
}
"""Quality numbers by name, those that decide first: the first that a study has is what it recommends by."""


@dataclass(frozen=True)
class CellResult:
    """What was measured in one cell.

    Args:
        count: samples.
        quality: by names of ``METRICS``; those that apply.
        model_ms, update_ms: milliseconds a sample takes in the model and in the update.
        calls: model calls a sample takes, guidance counted.
        peak_megabytes: the most memory in use while sampling, minus what was in use before; NaN where it cannot be told.
        pictures: the first samples as a grid, a PNG file beside the study, or none where samples are no pictures.
    """

    cell: Cell
    count: int
    quality: dict[str, Measure]
    model_ms: float
    update_ms: float
    calls: int
    peak_megabytes: float = math.nan
    pictures: str | None = None

    @property
    def milliseconds(self) -> float:
        return self.model_ms + self.update_ms

    def as_dict(self) -> dict[str, Any]:
        return _plain({**asdict(self), "cell": self.cell.as_dict()})

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> CellResult:
        quality = {name: Measure(m["value"], _number(m["error"])) for name, m in fields["quality"].items()}
        peak = _number(fields["peak_megabytes"])
        return cls(**{**fields, "cell": Cell.from_dict(fields["cell"]), "quality": quality, "peak_megabytes": peak})


@dataclass(frozen=True)
class Study:
    """All cells of a study.

    Args:
        model: what the model is called.
        settings: everything that results are a function of, as JSON.
        notes: what a reader has to know beside the numbers, a sentence each.
    """

    model: str
    settings: dict[str, Any]
    results: tuple[CellResult, ...]
    notes: tuple[str, ...] = ()
    made_at: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"))

    @property
    def metrics(self) -> list[Metric]:
        """Those that some cell has."""
        return [metric for name, metric in METRICS.items() if any(name in result.quality for result in self.results)]

    def with_metric(self, name: str) -> list[CellResult]:
        return [result for result in self.results if name in result.quality]

    def pareto_front(self, name: str) -> list[CellResult]:
        """Cells than which none is both faster and better, fastest first. Of cells equal in both, the first."""
        front: list[CellResult] = []
        for result in sorted(self.with_metric(name), key=lambda r: (r.milliseconds, r.quality[name].value)):
            if not front or METRICS[name].is_better(result.quality[name].value, front[-1].quality[name].value):
                front.append(result)
        return front

    def recommendation(self, name: str | None = None, within: float = 0.05) -> Recommendation | None:
        """The fastest cell whose quality is within a share of the best one's, or no further than chance could put it there.

        Args:
            name: a metric of this study; its first if none.
        """
        metrics = self.metrics
        if not metrics:
            return None
        metric = METRICS[name] if name is not None else metrics[0]
        results = self.with_metric(metric.name)
        values = [result.quality[metric.name] for result in results]
        pick = min if metric.better == "lower" else max
        best = pick(results, key=lambda result: result.quality[metric.name].value)
        best_value = best.quality[metric.name].value

        def is_close(result: CellResult) -> bool:
            gap = abs(result.quality[metric.name].value - best_value)
            return gap <= within * abs(best_value)

        assert values
        chosen = min((r for r in results if is_close(r)), key=lambda r: r.milliseconds)
        return Recommendation(metric, chosen, best, within)

    def as_dict(self) -> dict[str, Any]:
        return _plain(
            {
                "study_version": STUDY_VERSION,
                "model": self.model,
                "made_at": self.made_at,
                "settings": self.settings,
                "notes": list(self.notes),
                "results": [result.as_dict() for result in self.results],
            }
        )

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Study:
        results = tuple(CellResult.from_dict(result) for result in fields["results"])
        return cls(fields["model"], fields["settings"], results, tuple(fields["notes"]), fields["made_at"])


@dataclass(frozen=True)
class Recommendation:
    """The sentence people come for, as data: ``chosen`` is as good as ``best`` but for a small share, and faster."""

    metric: Metric
    chosen: CellResult
    best: CellResult
    within: float

    @property
    def times_less(self) -> float:
        """How many times less time the chosen cell takes than the best."""
        return self.best.milliseconds / self.chosen.milliseconds

    @property
    def share_worse(self) -> float:
        """By what share of the best value the chosen one is worse; 0 where they are the same."""
        best = self.best.quality[self.metric.name].value
        chosen = self.chosen.quality[self.metric.name].value
        return abs(chosen - best) / abs(best) if best else 0.0

    def __str__(self) -> str:
        cell, name = self.chosen.cell, self.metric.title
        how = f"Use {cell.num_inference_steps} steps with {cell.timestep_spacing} spacing"
        how += "" if cell.order == 1 else f" and order={cell.order}"
        how += "" if cell.eta == 0 else (" and sigma-hat" if cell.sigma_hat else f" and eta {cell.eta:g}")
        if self.chosen is self.best:
            return f"{how}: the best {name} of all {cell.num_inference_steps}-step and other cells here."
        return (
            f"{how}: its {name} is within {math.ceil(100 * self.share_worse)} % of the best "
            f"({self.best.cell.num_inference_steps} steps), in {self.times_less:.1f} times less time."
        )


def write_json(study: Study, path: Path) -> None:
    path.write_text(json.dumps(study.as_dict(), indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Study:
    return Study.from_dict(json.loads(path.read_text()))


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _plain(value: Any) -> Any:
    """As JSON has it: no NaN, no infinity."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
