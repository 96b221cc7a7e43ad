"""Every undocumented name of Triton that the kernels use."""

from __future__ import annotations


def is_amd() -> bool:
    """Return whether kernels are compiled for an AMD GPU.

    Triton has no documented way to ask for its target. Where this one is missing, torch knows which
    kind of GPU it was built for.
    """
    try:
        from triton.runtime import driver

        return driver.active.get_current_target().backend == "hip"
    except (ImportError, AttributeError):
        import torch

        return torch.version.hip is not None
