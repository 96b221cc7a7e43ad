"""The rows of multistep schedulers: by the index of the step, and by its order."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...kernels.contract import StepCoefficients, StepTable
from ...plans.coefficients import PREDICTION_TYPES, Prediction, edm_prediction
from ...plans.levels import NoiseLevel
from ...plans.multistep import dpm_solver_coefficients, unipc_weights
from ..arguments import LeaveToOriginal
from .sigma_rows import MAX_KNOWN, rows_ahead, watched_sigmas
from .watched import Watched

_NO_STEP = StepCoefficients(1, 0, 0, 0, 0, 0, 0, 0)


class MultistepRows(Watched):
    """Rows of a scheduler with a history. They are valid as long as ``is_valid()``.

    Args:
        scheduler: one of ``MultistepSteps``.
    """

    def __init__(self, scheduler: Any):
        super().__init__(scheduler, ["sigmas"], [watched_sigmas(scheduler)], scheduler._row_fields)
        self.sigmas: list[float] = scheduler._values_on_host("sigmas")
        self.short: defaultdict[int, dict[int, StepCoefficients]] = defaultdict(dict)
        """By order and index: rows of steps that need nothing but their row and what was remembered."""
        self.remembers_x0 = True
        """Whether such a step remembers its x0, rather than the model's output."""
        self._found: dict[Any, StepCoefficients] = {}
        self._tables: dict[Any, tuple[StepTable, Tensor]] = {}

    def row(self, index: Any, *options: Any) -> StepCoefficients:
        """Return the row of the step at this index.

        Args:
            options: what else it depends on, such as its order.

        Raises:
            LeaveToOriginal: there is no such step, or it has no row.
        """
        if type(index) is not int or not 0 <= index < len(self.sigmas) - 1:
            raise LeaveToOriginal(f"step_index must be 0 to {len(self.sigmas) - 2}, got {index!r:.80}")
        found = self._found.get((index, options))
        if found is not None:
            return found
        try:
            found = self._found[index, options] = self._scheduler._row_at(self.sigmas, index, *options)
            return found
        except (TypeError, ValueError, ArithmeticError, NotImplementedError) as error:
            # A step without a row: the original handles it in its own way.
            raise LeaveToOriginal(str(error)) from None

    def fill_short(self, index: int, order: int, remembers_x0: bool) -> None:
        """Put the rows of this order, of this step and those after it, into ``short``: a run takes each
        once."""
        self.remembers_x0 = remembers_x0
        self.short[order] = rows_ahead(self, self.sigmas, index, order)

    def table(self, device: torch.device, *options: Any) -> tuple[StepTable, Tensor]:
        """Return the rows of all indices, and these, in device memory: copied there once for a run.

        Where there is no such row, the table has one that is never read.
        """
        found = self._tables.get((device, options))
        if found is None:
            rows = []
            for index in range(len(self.sigmas) - 1):
                try:
                    rows.append(self.row(index, *options))
                except LeaveToOriginal:
                    rows.append(_NO_STEP)
            found = self._tables[device, options] = (
                StepTable.of(rows, device),
                torch.arange(len(rows), dtype=torch.int64, device=device),
            )
        return found


def level_of_sigma(sigma: float, of_flow: bool) -> NoiseLevel:
    """Return the level that one of a scheduler's ``sigmas`` stands for.

    Args:
        of_flow: a sample there is (1 - sigma) x0 + sigma eps; otherwise (x0 + sigma eps) / sqrt(1 +
            sigma^2).
    """
    if of_flow:
        return NoiseLevel(1 - sigma, sigma)
    alpha = (1 + sigma**2) ** -0.5
    return NoiseLevel(alpha, sigma * alpha)


def prediction_at_level(level: NoiseLevel, prediction_type: str, of_flow: bool) -> Prediction:
    """Return what a model's output means, in diffusers' words.

    Raises:
        LeaveToOriginal: there is no such prediction on this path.
    """
    kinds = {"epsilon": "epsilon", "sample": "sample"}
    kinds |= {"flow_prediction": "flow"} if of_flow else {"v_prediction": "v_prediction"}
    if prediction_type not in kinds:
        raise LeaveToOriginal(f"prediction_type must be one of {', '.join(kinds)}, got {prediction_type!r:.80}")
    return PREDICTION_TYPES[kinds[prediction_type]](level)


@lru_cache(MAX_KNOWN)
def dpm_solver_row(
    sigmas: tuple[float, ...], prediction_type: str, algorithm_type: str, solver_type: str, of_flow: bool
) -> StepCoefficients:
    """Return the row of a step of DPM-Solver, as a step reads it: see ``read_first``.

    Args:
        sigmas: where the step leads, where it starts, and where the steps before it started, the
            last one first.
        prediction_type, algorithm_type, solver_type: diffusers'.
        of_flow: see ``level_of_sigma``.
    """
    levels = [level_of_sigma(sigma, of_flow) for sigma in sigmas]
    prediction = prediction_at_level(levels[1], prediction_type, of_flow)
    return _dpm_solver_row(levels, prediction, algorithm_type, solver_type)


@lru_cache(MAX_KNOWN)
def edm_dpm_solver_row(
    sigmas: tuple[float, ...], prediction_type: str, algorithm_type: str, solver_type: str, sigma_data: float
) -> StepCoefficients:
    """Return the same on EDM's path (Karras et al. 2022, arXiv 2206.00364), x = x0 + sigma eps, with
    its preconditioning."""
    levels = [NoiseLevel(1.0, sigma) for sigma in sigmas]
    network = edm_prediction(levels[1], sigma_data)
    if prediction_type == "v_prediction":
        network = network._replace(x0_m=-network.x0_m, eps_m=-network.eps_m)
    elif prediction_type != "epsilon":
        raise LeaveToOriginal(f"prediction_type must be epsilon or v_prediction, got {prediction_type!r:.80}")
    if algorithm_type.startswith("sde-") and len(sigmas) == 4:
        raise LeaveToOriginal("the original has no third order of the SDE form on this path")
    return _dpm_solver_row(levels, network, algorithm_type, solver_type)


def _dpm_solver_row(
    levels: list[NoiseLevel], prediction: Prediction, algorithm_type: str, solver_type: str
) -> StepCoefficients:
    stochastic = algorithm_type.startswith("sde-")
    row = dpm_solver_coefficients(
        levels,
        prediction,
        predicts_noise=not algorithm_type.endswith("++"),
        stochastic=stochastic,
        solver_type=solver_type,
    )
    return row if stochastic else read_first(row)


def read_first(row: StepCoefficients) -> StepCoefficients:
    """Return a row without noise, whose first history takes the place of the noise.

    A step only reads its noise, but replaces its histories: so the prediction of the step before
    stays as it is, for whoever holds it, and is not copied.
    """
    return replace(row, prev_noise=row.prev_history, prev_history=row.prev_history_2, prev_history_2=0.0)


@lru_cache(MAX_KNOWN)
def unipc_row(
    part: str,
    sigmas: tuple[float, ...],
    sigma: float,
    prediction_type: str,
    predicts_noise: bool,
    solver_type: str,
    of_flow: bool,
) -> StepCoefficients:
    """Return the row of a part of a step of UniPC, with its tensors as a step reads them.

    Args:
        part: "predicts", x_prev from x_t and the model's output, whatever was before; "corrects", the
            sample from these, the sample before as the noise, and one or two predictions as
            histories; the same in two passes: "recalls" what was before, from the sample before and
            up to three predictions, and "adds" it, as the noise; "goes on", the predictor from the
            corrected sample and the prediction.
        sigmas: of the predictor or corrector: where it leads, where it starts, and where the steps
            before it started, the last one first.
        sigma: where the model was called.
        prediction_type, predicts_noise, solver_type: diffusers'.
        of_flow: see ``level_of_sigma``.
    """
    levels = [level_of_sigma(value, of_flow) for value in sigmas]
    corrects = part in UNIPC_CORRECTOR
    kept, weights = unipc_weights(levels, corrects=corrects, predicts_noise=predicts_noise, solver_type=solver_type)
    newest, *others = weights
    if part == "recalls":
        others = [*others, 0.0, 0.0]
        return StepCoefficients(0, 1, 1, 0, 0, others[0], kept, prev_noise=others[1], prev_history=others[2])
    x0_x, x0_m = 0.0, 1.0
    if part != "goes on":
        prediction = prediction_at_level(level_of_sigma(sigma, of_flow), prediction_type, of_flow)
        x0_x, x0_m = prediction[2:] if predicts_noise else prediction[:2]
    others = {"adds": [1.0], "corrects": [kept, *others]}.get(part, others)
    others = [*others, 0.0, 0.0, 0.0]
    return StepCoefficients(
        x0_x,
        x0_m,
        1,
        0,
        0,
        newest,
        0 if corrects else kept,
        others[0],
        prev_history=others[1],
        prev_history_2=others[2],
    )


UNIPC_CORRECTOR = ("corrects", "recalls", "adds")
"""The parts of a step of UniPC that belong to the corrector."""
