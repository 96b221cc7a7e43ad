"""The fast scheduler for whatever scheduler a pipeline has."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from diffusers import SchedulerMixin

from ...utils.checks import refuse
from .cogvideox import FastCogVideoXDDIMScheduler
from .cogvideox_dpm import FastCogVideoXDPMScheduler
from .ddim import FastDDIMScheduler
from .ddpm import FastDDPMScheduler
from .dpm_solver_multistep import FastDPMSolverMultistepScheduler, FastEDMDPMSolverMultistepScheduler
from .euler import FastEDMEulerScheduler, FastEulerAncestralDiscreteScheduler, FastEulerDiscreteScheduler
from .flow_match_euler import FastFlowMatchEulerDiscreteScheduler
from .heun import FastHeunDiscreteScheduler
from .inverse import FastDDIMInverseScheduler
from .lcm import FastLCMScheduler
from .parallel import FastDDIMParallelScheduler
from .tcd import FastTCDScheduler
from .unclip import FastUnCLIPScheduler
from .unipc_multistep import FastUniPCMultistepScheduler
from .wuerstchen import FastDDPMWuerstchenScheduler

_FAST: list[Any] = [
    FastCogVideoXDDIMScheduler,
    FastCogVideoXDPMScheduler,
    FastDDIMScheduler,
    FastDDIMInverseScheduler,
    FastDDIMParallelScheduler,
    FastDDPMScheduler,
    FastDDPMWuerstchenScheduler,
    FastDPMSolverMultistepScheduler,
    FastEDMDPMSolverMultistepScheduler,
    FastEDMEulerScheduler,
    FastEulerAncestralDiscreteScheduler,
    FastEulerDiscreteScheduler,
    FastFlowMatchEulerDiscreteScheduler,
    FastHeunDiscreteScheduler,
    FastLCMScheduler,
    FastTCDScheduler,
    FastUnCLIPScheduler,
    FastUniPCMultistepScheduler,
]
NEWER = {
    "FastFlowMapEulerDiscreteScheduler": "flow_map_euler",
    "FastFlowMatchLCMScheduler": "flow_match_lcm",
    "FastLTXEulerAncestralRFScheduler": "ltx_euler_ancestral",
}
"""The modules of drop-ins whose originals are not in old versions of diffusers."""
for _name, _module in NEWER.items():
    with suppress(ImportError):
        _FAST.append(getattr(importlib.import_module(f".{_module}", __package__), _name))

DROP_INS: dict[Any, Any] = {
    next(base for base in fast.__mro__ if base.__module__.startswith("diffusers.")): fast for fast in _FAST
}
"""The drop-in of each class of diffusers that has one."""
for _original, _drop_in in DROP_INS.items():  # diffusers looks for names of its own, so the original's is one
    _drop_in._compatibles = [*_original._compatibles, _original.__name__]


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
        refuse("scheduler must be one of diffusers", scheduler, _remedy(scheduler), TypeError)
    if type(scheduler) not in DROP_INS:
        names = ", ".join(sorted(original.__name__ for original in DROP_INS))
        raise ValueError(
            f"scheduler must be of a class that has a drop-in ({names}), got {type(scheduler).__name__}: keep it, or change to "
            "one of these with from_config"
        )
    original: Any = scheduler
    return DROP_INS[type(scheduler)].from_config(original.config)


def _remedy(given: Any) -> str:
    """Return what helps with what is passed instead of a scheduler."""
    if isinstance(given, type):
        return f"pass an instance, {given.__name__}.from_config(pipe.scheduler.config)"
    if isinstance(given, Mapping):
        return "pass the scheduler that has this config, pipe.scheduler, or one that from_config makes of it"
    if isinstance(given, (str, os.PathLike)):
        return "load it first, for instance DDIMScheduler.from_pretrained(PATH, subfolder='scheduler')"
    if isinstance(getattr(given, "scheduler", None), SchedulerMixin):
        return f"pass its scheduler, fast_scheduler(pipe.scheduler), where pipe is this {type(given).__name__}"
    return "pass pipe.scheduler"
