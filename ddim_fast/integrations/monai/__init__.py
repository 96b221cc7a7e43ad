"""MONAI's schedulers with the update in one kernel.

``inferer.scheduler = fast_scheduler(inferer.scheduler)`` is the whole change; or construct
``FastDDIMScheduler``, ``FastDDPMScheduler`` or ``FastRFlowScheduler`` instead of the original. Each
extends its original and overrides ``step``. A call without a fused form is passed on to the
original, so results and errors stay the original's.
"""

from __future__ import annotations

from typing import Any

try:
    from monai.networks.schedulers import DDIMScheduler, DDPMScheduler, RFlowScheduler
except ImportError as error:
    raise ImportError(f"the drop-ins for MONAI need MONAI 1.6 or newer, got {error}: pip install monai") from error

from ...utils.checks import refuse
from .fused_steps import checked_flag
from .schedulers import FastDDIMScheduler, FastDDPMScheduler, FastRFlowScheduler

__all__ = ["FastDDIMScheduler", "FastDDPMScheduler", "FastRFlowScheduler", "fast_scheduler"]

_DROP_INS: dict[type, Any] = {
    DDIMScheduler: FastDDIMScheduler,
    DDPMScheduler: FastDDPMScheduler,
    RFlowScheduler: FastRFlowScheduler,
}


def fast_scheduler(scheduler: Any, explicit_pairs: bool = False) -> Any:
    """Return the drop-in for a scheduler of MONAI: a new one, with its noise levels and timesteps.

    >>> inferer.scheduler = fast_scheduler(inferer.scheduler)

    Args:
        explicit_pairs: as of ``FastDDIMScheduler`` and ``FastDDPMScheduler``. (The steps of
            ``RFlowScheduler`` are told where they lead.)

    Raises:
        TypeError: it is no scheduler of MONAI that has a drop-in. (A subclass may compute something
            else, and has none.)
        ValueError: ``explicit_pairs`` is on for ``RFlowScheduler``.
    """
    kind = next((kind for original, kind in _DROP_INS.items() if type(scheduler) in (original, kind)), None)
    if kind is None:
        names = ", ".join(original.__name__ for original in _DROP_INS)
        remedy = "pass its scheduler, inferer.scheduler" if hasattr(scheduler, "scheduler") else "keep it"
        refuse(f"scheduler must be one of MONAI's {names}", type(scheduler).__name__, remedy, TypeError)
    if checked_flag(explicit_pairs) and kind is FastRFlowScheduler:
        refuse("explicit_pairs must be False for RFlowScheduler, whose steps are told where they lead", explicit_pairs)
    fast = kind.__new__(kind)
    fast.__dict__.update(scheduler.__dict__)
    if explicit_pairs:
        fast.explicit_pairs = True
    return fast
