"""The rows of schedulers that hold a list of ``sigmas``: one from each of them to the next."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...kernels.contract import StepCoefficients, StepTable
from ...plans.coefficients import PREDICTION_TYPES, Prediction, ddim_coefficients, ddim_variance, edm_prediction
from ...plans.levels import NoiseLevel
from ..arguments import LeaveToOriginal
from ..original_results import HALF_PRECISION
from .watched import Watched

MAX_KNOWN = 8192  # rows: runs of the same sigmas share them
_AHEAD = 64  # rows of a run that are looked up together


def watched_sigmas(scheduler: Any) -> Tensor:
    """Return a scheduler's ``sigmas``.

    Raises:
        LeaveToOriginal: they are no list of numbers, or have too few digits.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    if not isinstance(sigmas, Tensor) or sigmas.ndim != 1 or sigmas.dtype in HALF_PRECISION:
        raise LeaveToOriginal(f"sigmas must be a list of numbers, at least float32, in a tensor, got {sigmas!r:.80}")
    return sigmas


class SigmaRows(Watched):
    """Rows of a scheduler by the index of the step. They are valid as long as ``is_valid()``.

    Args:
        scheduler: one of ``SigmaSteps``.
    """

    def __init__(self, scheduler: Any):
        watched_sigmas(scheduler)
        names = scheduler._row_attributes
        super().__init__(scheduler, names, [getattr(scheduler, name) for name in names], scheduler._row_fields)
        self.sigmas: list[float] = scheduler._values_on_host("sigmas")
        self.output_is_x0: bool = getattr(scheduler.config, "prediction_type", None) in _PREDICTIONS_OF_X0
        """Whether the model predicts x0, and the original returns its output as it is."""
        self.writes_x0: bool = scheduler._returns_x0 and not self.output_is_x0
        self.plain: dict[int, StepCoefficients] = {}
        """By index: rows of steps that need nothing but their row."""
        self.derivatives: dict[int, StepCoefficients] = {}
        """By index: rows that compute the derivative there, and need nothing but their row."""
        self.index_of_timestep: dict[float, int | None] = {}
        """By value, where a step is looked up by its timestep."""
        self._tables: dict[torch.device, tuple[StepTable, Tensor]] = {}

    def row(self, index: Any) -> StepCoefficients:
        """Return the row of the step at this index.

        Raises:
            LeaveToOriginal: there is no such step, or it has no row.
        """
        if type(index) is not int or not 0 <= index < len(self.sigmas) - 1:
            raise LeaveToOriginal(f"step_index must be 0 to {len(self.sigmas) - 2}, got {index!r:.80}")
        try:
            return self._scheduler._row_between(self.sigmas[index], self.sigmas[index + 1])
        except (TypeError, ValueError, ArithmeticError) as error:
            # A step without a row: the original handles it in its own way.
            raise LeaveToOriginal(str(error)) from None

    def fill_plain(self, index: int) -> None:
        """Put the rows of this step and of those after it into ``plain``: a run takes each once."""
        self.plain = rows_ahead(self, self.sigmas, index)

    def table(self, device: torch.device) -> tuple[StepTable, Tensor]:
        """Return all rows, and their indices, in device memory: copied there once for a run."""
        found = self._tables.get(device)
        if found is None:
            rows = [self.row(index) for index in range(len(self.sigmas) - 1)]
            found = self._tables[device] = (
                StepTable.of(rows, device),
                torch.arange(len(rows), dtype=torch.int64, device=device),
            )
        return found


def rows_ahead(rows: Any, sigmas: list[float], index: int, *options: Any) -> dict[int, StepCoefficients]:
    """Return rows by index: those of this step and of the next ones, among others.

    Runs with the same sigmas share them.

    Args:
        rows: whose ``row(index, *options)`` are asked for.
    """
    try:
        known = _rows_of_runs(rows.kind, tuple(sigmas), rows.fields, options)
    except TypeError:  # a field of the config that cannot be a key
        known = {}
    if index not in known:
        for each in range(index, min(index + _AHEAD, len(sigmas) - 1)):
            with contextlib.suppress(LeaveToOriginal):
                known[each] = rows.row(each, *options)
    return known


@lru_cache(64)
def _rows_of_runs(*what_rows_depend_on: Any) -> dict[int, StepCoefficients]:
    return {}


@lru_cache(MAX_KNOWN)
def flow_row(sigma: float, sigma_next: float, renoised: bool) -> StepCoefficients:
    """Return the row of a step of flow matching (Liu et al. 2022, arXiv 2209.03003).

    Args:
        sigma, sigma_next: a sample there is (1 - sigma) x0 + sigma eps.
        renoised: all of eps is replaced by fresh noise.
    """
    return ddim_coefficients(
        NoiseLevel(1 - sigma, sigma),
        NoiseLevel(1 - sigma_next, sigma_next),
        "flow",
        variance=sigma_next**2 if renoised else 0.0,
        std_dev_added=sigma_next if renoised else 0.0,
    )


@lru_cache(MAX_KNOWN)
def ancestral_flow_row(sigma: float, sigma_next: float, eta: float, s_noise: float) -> StepCoefficients:
    """Return the row of an ancestral step of flow matching: along the velocity to a level with less
    noise than ``sigma_next``, and back by adding noise.

    Args:
        eta: 0 for no noise; 1 for the least noise before some is added.
        s_noise: what the added noise is multiplied by.
    """
    below = sigma_next * (1 + (sigma_next / sigma - 1) * eta)
    row = ddim_coefficients(NoiseLevel(1 - sigma, sigma), NoiseLevel(1 - below, below), "flow")
    if not (eta > 0 and s_noise > 0):
        return row
    kept = (1 - sigma_next) / (1 - below + _DIVISOR)
    added = sigma_next**2 - below**2 * (1 - sigma_next) ** 2 / ((1 - below) ** 2 + _DIVISOR)
    return replace(
        row,
        prev_x0=kept * row.prev_x0,
        prev_eps=kept * row.prev_eps,
        prev_noise=math.sqrt(max(added, 0.0)) * s_noise,
    )


_DIVISOR = 1e-12
"""What diffusers adds to its divisors in an ancestral step of flow matching."""


@lru_cache(MAX_KNOWN)
def exploding_row(
    sigma: float,
    sigma_next: float,
    prediction_type: str,
    sigma_data: float | None = None,
    ancestral: bool = False,
    clip: float | None = None,
) -> StepCoefficients:
    """Return the row of Euler's step on a variance-exploding path (Karras et al. 2022, arXiv
    2206.00364, algorithm 2), and c_in of the model's next input.

    Args:
        sigma, sigma_next: a sample there is x0 + sigma eps.
        prediction_type: diffusers'.
        sigma_data: of EDM's preconditioning, which "epsilon" then means, too.
        ancestral: as much noise is replaced as in a step of DDPM.
        clip: x0 is clipped to [-clip, clip], and eps follows from it; None for no clipping.

    Raises:
        LeaveToOriginal: the step has no values, or there is no such prediction.
    """
    if sigma == 0:
        raise LeaveToOriginal("a step must start at noise, got sigma = 0")
    level, target = NoiseLevel(1.0, sigma), NoiseLevel(1.0, sigma_next)
    variance = ddim_variance(level, target, 1.0) if ancestral else 0.0
    if variance < 0:
        raise LeaveToOriginal(f"an ancestral step must lead to less noise, got sigma = {sigma} before {sigma_next}")
    row = ddim_coefficients(
        level,
        target,
        _prediction(level, prediction_type, sigma_data),
        variance=variance,
        clip_sample_range=clip,
        use_clipped_model_output=clip is not None,
    )
    return replace(row, input_scale=1 / math.hypot(sigma_next, 1.0 if sigma_data is None else sigma_data))


@lru_cache(MAX_KNOWN)
def derivative_row(sigma: float, prediction_type: str, clip: float | None) -> StepCoefficients:
    """Return the row that computes the derivative (x - x0) / sigma, which is eps, in place of x_prev.

    Its arguments and errors are those of ``exploding_row``.
    """
    return replace(exploding_row(sigma, sigma, prediction_type, clip=clip), prev_x0=0.0, prev_eps=1.0)


@lru_cache(MAX_KNOWN)
def heun_row(sigma: float, dt: float, prediction_type: str, clip: float | None) -> StepCoefficients:
    """Return the row of Heun's correction of a step of Euler's (Karras et al. 2022, arXiv 2206.00364,
    algorithm 1): x + dt (d + d') / 2, with the derivative d' at the end of that step.

    A step with this row takes the sample there, and the model's output for it; x, where the step of
    Euler's began, as ``noise``; and d, the derivative there, as ``history``.

    Args:
        sigma: of the end.
        dt: sigma of the end less that of the beginning.

    The other arguments and the errors are those of ``exploding_row``.
    """
    row = derivative_row(sigma, prediction_type, clip)
    return replace(row, prev_eps=dt / 2, prev_noise=1.0, prev_history=dt / 2)


_PREDICTIONS_OF_X0 = ("sample", "original_sample")


def _prediction(level: NoiseLevel, prediction_type: str, sigma_data: float | None) -> Prediction:
    """Return what a model's output means, in diffusers' words.

    Its v is that of the sample scaled to variance 1: the network of EDM for data of standard
    deviation 1, with the other sign.
    """
    if prediction_type == "v_prediction":
        network = edm_prediction(level, 1.0 if sigma_data is None else sigma_data)
        return network._replace(x0_m=-network.x0_m, eps_m=-network.eps_m)
    if prediction_type == "epsilon":
        return PREDICTION_TYPES["epsilon"](level) if sigma_data is None else edm_prediction(level, sigma_data)
    if prediction_type in _PREDICTIONS_OF_X0 and sigma_data is None:
        return PREDICTION_TYPES["sample"](level)
    raise LeaveToOriginal(f"prediction_type must be one that the original knows, got {prediction_type!r:.80}")
