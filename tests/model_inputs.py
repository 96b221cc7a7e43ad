"""What a step must write to ``model_input_out``, to the bit."""

import numpy as np
import torch

from ddim_fast.verify.truth import oracle
from ddim_fast.verify.truth.tolerances import ROUND, to_numpy

HALVES = (torch.float16, torch.bfloat16)


def assert_is_scaled(model_input, x_prev, scale):
    """Assert that ``model_input`` is ``scale * x_prev``, in float32, rounded to its own dtype.

    A product of two float32 numbers is exact in float64, so it is rounded here as the definition
    says. (float64 is multiplied in float64; torch rounds it to a half by way of float32.)
    """
    long = x_prev.dtype == torch.float64
    with np.errstate(invalid="ignore", over="ignore"):  # 0 * infinity
        product = to_numpy(x_prev) * (scale if long else np.float64(np.float32(scale)))
    if not long or model_input.dtype in HALVES:
        product = oracle.round_to_float32(product)
    expected = ROUND[model_input.dtype](product).reshape(product.shape)
    np.testing.assert_array_equal(to_numpy(model_input), expected, err_msg=f"not {scale} * x_prev")
