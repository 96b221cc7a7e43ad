"""The results of a study as data: a result for each cell, the settings, and the recommendation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..plans.eta import ETA_SCALES, PAPER, told_apart
from ..utils.files import read_json_object
from .cells import Cell

THEIRS = "theirs"
"""The eta and the order of another library's scheduler, which has its own."""
STUDY_VERSION = 1
"""The version of the JSON format."""


@dataclass(frozen=True)
class Measure:
    """A value with its standard error, which is NaN if unknown."""

    value: float
    error: float = math.nan


@dataclass(frozen=True)
class Metric:
    """A quality metric: its name and meaning.

    Args:
        better: "lower" or "higher".
        enough: the value beyond which better ones are not worth extra time; None if there is none.
        raced: whether the time to reach a value of it is reported.
    """

    name: str
    title: str
    better: str
    meaning: str
    enough: float | None = None
    raced: bool = False

    def is_enough(self, value: float) -> bool:
        return self.enough is not None and self.cost(value) <= self.cost(self.enough)

    def cost(self, value: float) -> float:
        """Return the value, negated if higher is better, so that lower always is."""
        return value if self.better == "lower" else -value


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "frechet",
            "Frechet distance",
            "lower",
            "between Gaussians fitted to features of the samples and of real data (squared 2-Wasserstein distance). Not FID unless the "
            "features are Inception's",
            raced=True,
        ),
        Metric(
            "distance",
            "distance to converged",
            "lower",
            "root-mean-square difference to the converged sample from the same noise, over a sample's elements, mean over samples; "
            "deterministic cells only. For samples in [-1, 1], differences below 0.02 are barely visible",
            enough=0.02,
            raced=True,
        ),
        Metric(
            "wasserstein",
            "Wasserstein distance",
            "lower",
            "exact 2-Wasserstein distance between the samples and the data distribution, which is known in closed form",
            raced=True,
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
            "share of real data within the manifold of the samples, estimated in the same way",
        ),
        Metric(
            "class_agreement",
            "class agreement",
            "higher",
            "share of samples that a classifier assigns to the requested class",
        ),
        Metric(
            "reconstruction",
            "reconstruction error",
            "lower",
            "mean squared error of samples encoded to noise and decoded again with the same steps, both in [0, 1] (table 2 of the DDIM "
            "paper)",
        ),
    )
}
"""Metrics by name, most important first: a recommendation uses the first one that a study has."""


@dataclass(frozen=True)
class CellResult:
    """The measurements of one cell.

    Args:
        count: the number of samples.
        quality: the metrics that apply, by their name in ``METRICS``.
        model_ms, update_ms: milliseconds per sample in the model and in everything else, medians
            over batches.
        calls: model calls per sample, guidance included.
        peak_megabytes: peak memory while sampling, minus the memory in use before; NaN if unknown.
        pictures: a PNG grid of the first samples in the study's directory; None if samples are not
            images.
        batch_ms: milliseconds per sample of each whole batch, in order; empty if unknown.
        measured_at: when the run that measured it began, UTC; cells of one run are timed in turn.
    """

    cell: Cell
    count: int
    quality: dict[str, Measure]
    model_ms: float
    update_ms: float
    calls: int
    peak_megabytes: float = math.nan
    pictures: str | None = None
    batch_ms: tuple[float, ...] = ()
    measured_at: str = ""

    @property
    def milliseconds(self) -> float:
        return self.model_ms + self.update_ms

    def as_dict(self) -> dict[str, Any]:
        return _plain({**asdict(self), "cell": self.cell.as_dict()})

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> CellResult:
        quality = {name: Measure(_number(m["value"]), _number(m["error"])) for name, m in fields["quality"].items()}
        read = {
            "cell": Cell.from_dict(fields["cell"]),
            "quality": quality,
            "peak_megabytes": _number(fields["peak_megabytes"]),
            "batch_ms": tuple(map(float, fields.get("batch_ms", ()))),
        }
        return cls(**{**fields, **read})


@dataclass(frozen=True)
class Study:
    """All cells of a study.

    Args:
        model: the model's name.
        settings: everything that determines the results, as JSON.
        notes: remarks for the reader, a sentence each.
        targets: values of metrics to reach in the least time, in place of plain DDIM's.
    """

    model: str
    settings: dict[str, Any]
    results: tuple[CellResult, ...]
    notes: tuple[str, ...] = ()
    made_at: str = field(default_factory=lambda: now())
    targets: dict[str, float] = field(default_factory=dict)

    @property
    def metrics(self) -> list[Metric]:
        """The metrics that at least one cell has."""
        return [metric for name, metric in METRICS.items() if self.with_metric(name)]

    def with_metric(self, name: str) -> list[CellResult]:
        """Return the results that have a finite value of a metric.

        The value is not finite where samples diverged.
        """
        return [r for r in self.results if name in r.quality and math.isfinite(r.quality[name].value)]

    def best(self, name: str) -> CellResult | None:
        """Return the best cell by a metric, the fastest of equals; None if no cell has it."""
        return min(self.with_metric(name), key=lambda r: (_cost(r, name), r.milliseconds), default=None)

    def within_error(self, name: str) -> list[CellResult]:
        """Return the cells whose error bar overlaps that of the best, including the best."""
        best = self.best(name)
        return (
            [] if best is None else [r for r in self.with_metric(name) if overlap(r.quality[name], best.quality[name])]
        )

    def pareto_front(self, name: str, by: Callable[[CellResult], float] | None = None) -> list[CellResult]:
        """Return the cells that no other beats in both time and quality, fastest first.

        Of cells equal in both, only the first is kept.

        Args:
            by: what takes the place of time, such as model calls; None for milliseconds.
        """
        by = by or (lambda result: result.milliseconds)
        front: list[CellResult] = []
        for result in sorted(self.with_metric(name), key=lambda r: (by(r), _cost(r, name))):
            if not front or _cost(result, name) < _cost(front[-1], name):
                front.append(result)
        return front

    def recommendation(self, name: str | None = None, within: float = 0.05) -> Recommendation | None:
        """Return the fastest cell that is about as good as the best.

        That is a cell within the relative difference ``within`` of the best, or whose error bar
        overlaps the best one's, or that is good enough (``Metric.enough``).

        Args:
            name: a key of ``METRICS``. None: the first one that this study has.
            within: the largest relative difference to the best value.

        Returns:
            The recommendation; None if no cell has the metric.

        Raises:
            ValueError: there is no such metric.
        """
        if name is None:
            metrics = self.metrics
            if not metrics:
                return None
            name = metrics[0].name
        if name not in METRICS:
            raise ValueError(f"name must be one of the metrics {', '.join(METRICS)}, got {name!r}")
        best = self.best(name)
        if best is None:
            return None
        aim = best.quality[name]

        def is_close(measure: Measure) -> bool:
            near = abs(measure.value - aim.value) <= within * abs(aim.value) or overlap(measure, aim)
            return near or METRICS[name].is_enough(measure.value)

        close = [r for r in self.with_metric(name) if is_close(r.quality[name])]
        chosen = min(close, key=lambda r: (r.milliseconds, _cost(r, name)))
        return Recommendation(METRICS[name], chosen, best, within, len(self.with_metric(name)))

    def as_dict(self) -> dict[str, Any]:
        return _plain(
            {
                "study_version": STUDY_VERSION,
                "model": self.model,
                "made_at": self.made_at,
                "settings": self.settings,
                "notes": list(self.notes),
                "targets": self.targets,
                "results": [result.as_dict() for result in self.results],
            }
        )

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Study:
        results = tuple(CellResult.from_dict(result) for result in fields["results"])
        targets = {METRICS[name].name: float(value) for name, value in fields.get("targets", {}).items()}
        return cls(fields["model"], fields["settings"], results, tuple(fields["notes"]), fields["made_at"], targets)


@dataclass(frozen=True)
class Recommendation:
    """A recommendation: ``chosen`` is about as good as ``best``, and no slower.

    Args:
        within: the requested relative difference. ``chosen`` may be further off if error bars
            overlap or if it is good enough.
        among: the number of cells compared.
    """

    metric: Metric
    chosen: CellResult
    best: CellResult
    within: float
    among: int

    @property
    def times_less(self) -> float:
        """The time of the best cell over that of the chosen one; NaN if no time was measured."""
        return self.best.milliseconds / self.chosen.milliseconds if self.chosen.milliseconds else math.nan

    @property
    def share_worse(self) -> float:
        """The relative difference of the chosen value to the best; 0 if they are equal."""
        best = self.best.quality[self.metric.name].value
        gap = abs(self.chosen.quality[self.metric.name].value - best)
        return (gap / abs(best) if best else math.inf) if gap else 0.0

    def __str__(self) -> str:
        how = f"Use {describe(self.chosen.cell)}: its {self.metric.title}"
        if self.among == 1:
            return f"{how} is the only one measured."
        if self.chosen is self.best:
            return f"{how} is the best of all {self.among} cells."
        best = f"the best ({describe(self.best.cell, beside=self.chosen.cell)})"
        if self.share_worse == 0:
            how += f" is as good as {best}"
        elif self.share_worse > self.within and self.metric.is_enough(self.chosen.quality[self.metric.name].value):
            how += f" is {self.chosen.quality[self.metric.name].value:.2g}, too small to see, as is {best}"
        elif self.share_worse <= self.within:
            how += f" is within {_percent_above(self.share_worse)} % of {best}"
        else:
            how += f" is within error of {best}"
        # A factor that rounds to 1.0 is no gain.
        return (
            f"{how}, at {self.times_less:.1f} times the speed."
            if self.times_less >= 1.05
            else f"{how}, in no more time."
        )


def now() -> str:
    """Return the time, UTC."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def describe(cell: Cell, beside: Cell | None = None) -> str:
    """Describe a cell in words: "20 steps with log_snr spacing, eta 0.5 and order=2".

    Args:
        beside: a cell just described; what both share is not repeated, except the steps.
    """
    steps = "1 step" if cell.num_inference_steps == 1 else f"{cell.num_inference_steps} steps"
    if cell.scheduler is not None:
        return f"{steps} of {cell.timestep_spacing}"
    known = ("eta 0", "order=1") if beside is None else way_of(beside)
    parts = [part for part in way_of(cell) if part not in known]
    listed = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    return f"{steps} with {listed}" if listed else steps


def way_of(cell: Cell) -> tuple[str, ...]:
    """Return everything about a cell except its number of steps, in words."""
    if cell.scheduler is not None:
        return (cell.timestep_spacing,)
    spacing = f"{cell.timestep_spacing} spacing" if cell.timesteps is None else f"the timesteps {cell.timestep_spacing}"
    return spacing, "sigma-hat" if cell.sigma_hat else f"eta {eta_text(cell)}", _order_in_words(cell)


def order_text(cell: Cell) -> str:
    """Return the order of a cell's steps: "1", "2", "3", "fitted", or that of another scheduler."""
    if cell.scheduler is not None:
        return THEIRS
    return str(cell.order) if cell.history_weights is None else "fitted"


def _order_in_words(cell: Cell) -> str:
    return f"order={cell.order}" if cell.history_weights is None else "fitted coefficients"


def eta_text(cell: Cell) -> str:
    """Describe the noise of a cell: "0.5", "0.5 of the variance", "1, analytic variance", or
    "sigma-hat"."""
    if cell.scheduler is not None:
        return THEIRS
    if cell.sigma_hat:
        return "sigma-hat"
    plain = told_apart(cell.eta_scales, cell.eta) == (PAPER, cell.eta)
    scaled = "" if plain else f" {ETA_SCALES[cell.eta_scales].of}"
    analytic = "" if cell.analytic_variance is None else ", analytic variance"
    return f"{cell.eta:g}{scaled}{analytic}"


def overlap(a: Measure, b: Measure) -> bool:
    """Return whether two error bars of one standard error each way overlap.

    An unknown error counts as 0.
    """
    errors = [m.error if math.isfinite(m.error) else 0.0 for m in (a, b)]
    return abs(a.value - b.value) <= sum(errors)


def json_text(study: Study, **more: Any) -> str:
    """Return a study as JSON, with what follows from it in ``more``, which is not read back."""
    return json.dumps(study.as_dict() | _plain(more), indent=1, allow_nan=False) + "\n"


def write_json(study: Study, path: Path) -> None:
    path.write_text(json_text(study))


def read_json(path: Path) -> Study:
    fields = read_json_object(path)
    try:
        return Study.from_dict(fields)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} must hold a study, as ddim-fast tradeoff writes it, and does not ({error!r})"
        ) from error


def _cost(result: CellResult, name: str) -> float:
    return METRICS[name].cost(result.quality[name].value)


def _percent_above(share: float) -> int:
    """Return a share as a whole percentage, rounded up, without float noise adding one."""
    return math.ceil(round(100 * share, 6))


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _plain(value: Any) -> Any:
    """Return the value for JSON, with NaN and infinity as null."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
