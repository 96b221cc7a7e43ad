"""The fast scheduler for whatever scheduler a pipeline has."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from diffusers import SchedulerMixin

from ...utils.checks import refuse
from .cogvideox import FastCogVideoXDDIMScheduler
from .ddim import FastDDIMScheduler
from .ddpm import FastDDPMScheduler
from .dpm_solver_multistep import FastDPMSolverMultistepScheduler, FastEDMDPMSolverMultistepScheduler
from .euler import FastEDMEulerScheduler, FastEulerAncestralDiscreteScheduler, FastEulerDiscreteScheduler
from .flow_match_euler import FastFlowMatchEulerDiscreteScheduler
from .inverse import FastDDIMInverseScheduler
from .lcm import FastLCMScheduler
from .parallel import FastDDIMParallelScheduler
from .tcd import FastTCDScheduler
from .unipc_multistep import FastUniPCMultistepScheduler

_FAST: list[Any] = [
    FastCogVideoXDDIMScheduler,
    FastDDIMScheduler,
    FastDDIMInverseScheduler,
    FastDDIMParallelScheduler,
    FastDDPMScheduler,
    FastDPMSolverMultistepScheduler,
    FastEDMDPMSolverMultistepScheduler,
    FastEDMEulerScheduler,
    FastEulerAncestralDiscreteScheduler,
    FastEulerDiscreteScheduler,
    FastFlowMatchEulerDiscreteScheduler,
    FastLCMScheduler,
    FastTCDScheduler,
    FastUniPCMultistepScheduler,
]
with suppress(ImportError):  # not in old versions of diffusers
    from .flow_match_lcm import FastFlowMatchLCMScheduler

    _FAST.append(FastFlowMatchLCMScheduler)

DROP_INS: dict[type, Any] = {
    next(base for base in fast.__mro__ if base.__module__.startswith("diffusers.")): fast for fast in _FAST
}
"""The drop-in of each class of diffusers that has one."""


def fast_scheduler(scheduler: Any) -> Any:
    """Return the drop-in for a scheduler of diffusers, with its config.

    >>> pipe.scheduler = fast_scheduler(pipe.scheduler)

    It is a new one, as ``from_config`` makes it: call ``set_timesteps`` again, as pipelines do. One
    that is a drop-in already is returned as it is.

    Raises:
        TypeError: it is no scheduler of diffusers.
        ValueError: its class has no drop-in. (A subclass of a class that has one may compute
            something else, and has none.)
    """
    if type(scheduler) in DROP_INS.values():
        return scheduler
    if not isinstance(scheduler, SchedulerMixin):
        refuse("scheduler must be one of diffusers", scheduler, "pass pipe.scheduler", TypeError)
    if type(scheduler) not in DROP_INS:
        names = ", ".join(sorted(original.__name__ for original in DROP_INS))
        raise ValueError(
            f"scheduler must be of a class that has a drop-in ({names}), got {type(scheduler).__name__}: keep it, or change to "
            "one of these with from_config"
        )
    original: Any = scheduler
    return DROP_INS[type(scheduler)].from_config(original.config)
