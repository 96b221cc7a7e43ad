"""What a call of an original and of its drop-in gives, compared."""

import numpy as np
import torch


def outcome(function):
    """(result, None), or (None, error)."""
    try:
        return function(), None
    except Exception as error:
        return None, error


def same_error(original, fast):
    assert type(fast) is type(original), (original, fast)
    assert str(fast) == str(original)


def half_unit(values, exact):
    """Return what one rounding of the exact result to half precision may cost.

    That is half a unit in the last place of the largest element.
    """
    return (
        float(np.abs(exact).max()) * torch.finfo(values.dtype).eps / 2
        if values.dtype in (torch.float16, torch.bfloat16)
        else 0.0
    )
