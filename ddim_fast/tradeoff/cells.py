"""A cell of the table, which is one way to sample, and grids of cells worth comparing."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..plans.eta import ETA_SCALES, PAPER, told_apart
from ..plans.files import TimestepList
from ..plans.history_weights import HistoryWeights, weights_of_rows
from ..plans.path import NoisePath
from ..sampler import DDIMSampler
from ..utils.checks import check_choice

PAPER_STEPS = (10, 20, 50, 100, 1000)
PAPER_ETAS = (0.0, 0.2, 0.5, 1.0)
"""The columns and rows of table 1 of the DDIM paper, whose last row is sigma-hat."""


_LONGEST_NAME = 120


@dataclass(frozen=True)
class Cell:
    """One way to sample: arguments of ``DDIMSampler``, or another library's scheduler.

    Args:
        num_inference_steps: the number of steps, S.
        timestep_spacing: one of the schedule's ``spacings``; with ``timesteps`` or ``scheduler``, a
            name for the list or for the scheduler.
        timesteps, model_timesteps: an explicit list, such as a searched one, and the timesteps
            given to the model if they differ.
        eta, eta_scales, sigma_hat, order: see ``DDIMSampler``.
        count: the number of samples, if it differs from the study's.
        analytic_variance: the mean squared error of eps at each timestep. The cell then adds noise
            of the analytic variance computed from it, instead of eta's.
        history_weights: the weights of earlier predictions, as fitted to a model, in place of the
            textbook's of ``order``.
        scheduler: a scheduler in place of ours, ``module:Class?option=value``, see
            ``others.other_cells``; then eta, order and lists do not apply.
        calls: the predictions that it asks the model for.
        draws_noise: whether it draws random numbers on its way.
    """

    num_inference_steps: int
    timestep_spacing: str = "leading"
    eta: float = 0.0
    eta_scales: str = PAPER
    sigma_hat: bool = False
    order: int = 1
    timesteps: tuple[float, ...] | None = None
    count: int | None = None
    model_timesteps: tuple[float, ...] | None = None
    analytic_variance: tuple[float, ...] | None = None
    history_weights: HistoryWeights | None = None
    scheduler: str | None = None
    calls: int | None = None
    draws_noise: bool = False

    def __post_init__(self) -> None:
        check_choice("eta_scales", self.eta_scales, ETA_SCALES)

    @property
    def key(self) -> str:
        """A readable name, also used for files; unique within a table."""
        spacing = _file_name(self.timestep_spacing)
        if self.scheduler is not None:
            return f"{_file_name(self.scheduler)}-{self.num_inference_steps}"
        eta = "sigma-hat" if self.sigma_hat else f"eta{self.eta:g}"
        scales = "" if self.eta_scales == PAPER else f"-{self.eta_scales}"
        scales += "" if self.analytic_variance is None else "-analytic"
        order = "" if self.order == 1 else f"-order{self.order}"
        if self.history_weights is not None:
            order = "-fitted"
        return f"{spacing}-{self.num_inference_steps}-{eta}{scales}{order}"

    @property
    def deterministic(self) -> bool:
        return self.eta == 0 and not self.draws_noise

    @property
    def predictions(self) -> int:
        """How often the model predicts for a sample: once a step, unless ``calls`` says otherwise."""
        return self.num_inference_steps if self.calls is None else self.calls

    def sampler(self, schedule: NoisePath, options: Mapping[str, Any]) -> DDIMSampler:
        """Return the sampler of this cell.

        Raises:
            ValueError: the cell's options conflict, or do not fit the schedule.
        """
        options = dict(options)
        if self.timesteps is None:
            options["timestep_spacing"] = self.timestep_spacing
        if self.history_weights is not None:
            options["history_weights"] = self.history_weights
        elif self.order != 1:
            options["order"] = self.order
        if self.analytic_variance is not None:
            options["analytic_variance"] = self.analytic_variance
        return DDIMSampler(
            schedule,
            None if self.timesteps is not None else self.num_inference_steps,
            self.eta,
            timesteps=self.timesteps,
            model_timesteps=self.model_timesteps,
            eta_scales=self.eta_scales,  # type: ignore[arg-type]  # it checks
            sigma_hat=self.sigma_hat,
            **options,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the cell as plain data for JSON."""
        return {name: _exchanged(value, tuple, list) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Cell:
        given: dict[str, Any] = {name: _exchanged(value, list, tuple) for name, value in fields.items()}
        return cls(**given)


def _file_name(name: str) -> str:
    """Return a name as a part of a file's: unchanged if it can be one, or else with a digest of it."""
    plain = re.sub(r"[^\w.,+=-]+", "_", name, flags=re.ASCII)
    if plain == name and len(name) <= _LONGEST_NAME:
        return name
    return f"{plain[:_LONGEST_NAME]}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"


def _exchanged(value: Any, old: type[Any], new: type[Any]) -> Any:
    """Return a value with all sequences of one type, nested ones too, in another type."""
    if not isinstance(value, old):
        return value
    items: Iterable[Any] = value
    return new(_exchanged(item, old, new) for item in items)


def grid(
    steps: Sequence[int],
    spacings: Sequence[str] = ("leading",),
    etas: Sequence[float] = (0.0,),
    *,
    eta_scales: Sequence[str] = (PAPER,),
    sigma_hat: bool = False,
    orders: Sequence[int] = (1,),
    searched: Mapping[str, TimestepList] | None = None,
    analytic_variance: bool = False,
    count_at: Mapping[int, int] | None = None,
) -> list[Cell]:
    """Return all valid combinations without duplicates, fewest steps first.

    Args:
        sigma_hat: add cells with the paper's larger DDPM noise.
        orders: orders above 1 apply to deterministic cells only.
        searched: named lists of timesteps, each combined with every eta and order; and where one
            has coefficients and 0 is among the etas, with those.
        analytic_variance: for these lists and eta > 0, add cells with the analytic variance.
        count_at: number of samples by number of steps, if it differs from the study's.

    Raises:
        ValueError: a list lacks the residual that the analytic variance needs.
    """
    # What all cells of one list share, and the residual for the analytic variance.
    lists: list[tuple[Cell, tuple[float, ...] | None]] = [
        (Cell(S, spacing), None) for S in steps for spacing in spacings
    ]
    fitted: list[Cell] = []
    for name, found in (searched or {}).items():
        cell = Cell(len(found.timesteps), name, timesteps=found.timesteps, model_timesteps=found.model_timesteps)
        lists.append((cell, _residual(name, found) if analytic_variance else None))
        if found.coefficients is not None:
            weights = weights_of_rows(found.coefficients)
            fitted.append(
                replace(
                    cell,
                    order=found.order,
                    history_weights=weights,
                    count=(count_at or {}).get(cell.num_inference_steps),
                )
            )
    cells = list(fitted) if 0 in etas else []
    for cell, residual in lists:
        cell = replace(cell, count=(count_at or {}).get(cell.num_inference_steps))
        for eta in etas:
            for scales in _different(eta_scales, eta):
                with_eta = replace(cell, eta=eta, eta_scales=scales)
                several = eta == 0 and cell.num_inference_steps > 1
                cells += [replace(with_eta, order=order) for order in orders if order == 1 or several]
                if residual is not None and eta > 0 and ETA_SCALES[scales].keeps_marginals:
                    cells.append(replace(with_eta, analytic_variance=residual))
        if sigma_hat:
            cells.append(replace(cell, eta=1.0, sigma_hat=True))
    return sorted(dict.fromkeys(cells), key=lambda cell: cell.num_inference_steps)


def _different(eta_scales: Sequence[str], eta: float) -> list[str]:
    """Return the conventions that differ at this eta, the first of those that agree: at 0 all do, at
    1 those of equation 16."""
    found: dict[tuple[str, float], str] = {}
    for name in eta_scales:
        found.setdefault(told_apart(name, eta), name)
    return list(found.values())


def _residual(name: str, found: TimestepList) -> tuple[float, ...]:
    if found.eps_residual is None:
        raise ValueError(
            f"the analytic variance needs the mean squared error of eps, got none in the list {name}: search again, or leave it out"
        )
    return found.eps_residual


def paper_table(count_at_1000: int | None = None, spacing: str = "quad") -> list[Cell]:
    """Return the cells of table 1 of the DDIM paper.

    They are compared with its CIFAR-10 half, which uses quadratic spacing.
    """
    count_at = None if count_at_1000 is None else {1000: count_at_1000}
    return grid(PAPER_STEPS, (spacing,), PAPER_ETAS, sigma_hat=True, count_at=count_at)
