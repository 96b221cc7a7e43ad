"""The step of libraries whose coefficients are float32 tensors: half precision in, float32 out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.contract import StepCoefficients
from ..kernels.dispatch import ddim_step


def promoted_dtype(x_t: Tensor, model_output: Tensor) -> torch.dtype:
    """Return the dtype of PyTorch's own arithmetic on both and a float32 tensor."""
    return torch.promote_types(torch.promote_types(x_t.dtype, model_output.dtype), torch.float32)


def promoted_step(
    x_t: Tensor, model_output: Tensor, coefficients: StepCoefficients, noise: Tensor | None, **guidance: Any
) -> tuple[Tensor, Tensor]:
    """Take a step in the promoted dtype; return x_prev and the predicted x0.

    Args:
        noise: of any floating-point dtype; may be None where the row adds none.
        guidance: ``model_output_uncond`` and ``guidance_scale``, or neither.
    """
    dtype = promoted_dtype(x_t, model_output)
    x_t, noise = x_t.to(dtype), None if noise is None else noise.to(dtype)
    x0 = torch.empty_like(x_t)
    return ddim_step(x_t, model_output, coefficients, noise=noise, x0_out=x0, **guidance), x0
