"""The arguments of ``ddim_log_prob`` and ``ddim_kl``, with their checks and the memory of their
gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..utils.checks import check_choice
from .coefficients import StepCoefficients
from .contract import check_field, check_predictions
from .fields import READ_ONLY, StepInputs, TensorRule
from .gaussian import REDUCTIONS, check_density

_OF_STATE, _OF_OUTPUT = TensorRule(), TensorRule(dtype="model_output")
DIFFERENTIABLE = ("model_output", "model_output_uncond", "x_t")
"""The tensors of ``DensityInputs.step`` that have gradients."""


@dataclass(eq=False)
class DensityInputs:
    """One Gaussian, and what it is compared with: a value, or a second Gaussian of the same width.

    Attributes:
        step: the tensors and the row that give the mean and the standard deviation. Nothing in it
            is written.
        divergence: whether it is compared with a Gaussian.
        x_prev: the value whose density is asked for; None for a divergence.
        reference, reference_uncond: for a divergence, the model's outputs that give the second
            mean.
        mask: elements where it is not 0 do not count.
        reduction: one of ``REDUCTIONS``.
        min_std: see ``gaussian``.
    """

    step: StepInputs
    divergence: bool = False
    x_prev: Tensor | None = None
    reference: Tensor | None = None
    reference_uncond: Tensor | None = None
    mask: Tensor | None = None
    reduction: str = "mean"
    min_std: float | None = None

    @property
    def row(self) -> StepCoefficients:
        assert isinstance(self.step.coefficients, StepCoefficients)  # checked
        return self.step.coefficients

    @property
    def scale(self) -> float:
        return self._scale_and_offset[0]

    @property
    def offset(self) -> float:
        """Of a log-density; 0 for a divergence."""
        return 0.0 if self.divergence else self._scale_and_offset[1]

    @cached_property
    def _scale_and_offset(self) -> tuple[float, float]:
        return self.row.scale_and_offset(self.min_std, exact=self.dtype == torch.float64)

    @property
    def sign(self) -> float:
        """A result is sign * (scale * sum of squares + offset)."""
        return 1.0 if self.divergence else -1.0

    @property
    def n_elements(self) -> int:
        return math.prod(self.step.x_t.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Of the result: float32, or float64 where the samples are."""
        return torch.promote_types(self.step.x_t.dtype, torch.float32)

    @property
    def compared(self) -> dict[str, Tensor]:
        """The tensors beside those of ``step`` that are given, by name."""
        return {name: tensor for name in _COMPARED if (tensor := getattr(self, name)) is not None}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors that are given, by name."""
        return dict(self.step.tensors) | self.compared

    def replaced(self, tensors: Mapping[str, Tensor | None]) -> DensityInputs:
        """Return the same with other tensors, by name."""
        result, step = copy.copy(self), copy.copy(self.step)
        for name, tensor in tensors.items():
            setattr(result if name in _COMPARED else step, name, tensor)
        step.reads = [(name, tensor) for name in READ_ONLY if (tensor := getattr(step, name)) is not None]
        result.step = step
        return result


_COMPARED = ("x_prev", "reference", "reference_uncond", "mask")
_ARGUMENTS = {"reference": "model_output_ref", "reference_uncond": "model_output_ref_uncond"}


def check_density_inputs(inputs: DensityInputs, reduction_argument: str) -> None:
    """Raise TypeError or ValueError with the rule, the value given and the remedy, or return."""
    step = inputs.step
    check_predictions(step)
    required = ("reference",) if inputs.divergence else ("x_prev",)
    for name in _COMPARED:
        value = getattr(inputs, name)
        if value is not None or name in required:
            rule = _OF_OUTPUT if name.startswith("reference") else _OF_STATE
            check_field(_ARGUMENTS.get(name, name), value, step, rule)
    if inputs.reference is not None and (inputs.reference_uncond is None) != (step.model_output_uncond is None):
        raise ValueError(
            "guidance needs both model_output_uncond and model_output_ref_uncond, got only one of them: "
            "pass the other, too, or neither"
        )
    check_choice(reduction_argument, inputs.reduction, REDUCTIONS)
    check_density(inputs.row.prev_noise, inputs.min_std)
    if inputs.row.reads_history or inputs.row.reads_history_2:
        raise ValueError(
            "the density is that of a step from x_t and model_output alone, got a row that reads the x0 of earlier steps "
            f"(prev_history = {inputs.row.prev_history}): use a plan with order=1"
        )
    _check_constants(inputs)


def _check_constants(inputs: DensityInputs) -> None:
    """Raise ValueError where a gradient is asked for that there is none of."""
    if not torch.is_grad_enabled():
        return
    constants = dict(inputs.compared)
    if inputs.divergence:
        constants["x_t"] = inputs.step.x_t
    for name, tensor in constants.items():
        if tensor.requires_grad:
            argument = _ARGUMENTS.get(name, name)
            raise ValueError(
                f"{argument} is a constant of this function, which has no gradient for it, got a tensor that requires one: "
                f"pass {argument}.detach()"
            )


def new_gradients(inputs: DensityInputs, wanted: Sequence[bool]) -> dict[str, Tensor]:
    """Return memory for the gradients of ``DIFFERENTIABLE`` that are wanted, by name, each like its
    tensor."""
    given = dict(inputs.step.tensors)
    names = [name for name, want in zip(DIFFERENTIABLE, wanted, strict=True) if want]
    return {name: torch.empty_like(given[name]) for name in names}
