"""Diffusers' schedulers with the update in one kernel.

``pipe.scheduler = FastDDIMScheduler.from_config(pipe.scheduler.config)`` is the whole change. Each
class extends its original and overrides ``step`` and the other methods that compute on samples. A
call without a fused form (an argument that the original would refuse, say) is passed on to the
original, so results and errors stay the original's.
"""

try:
    # Loading a saved pipeline, diffusers looks for SchedulerMixin in the module of our classes.
    from diffusers import DDIMParallelScheduler, SchedulerMixin  # noqa: F401 (the first: not in old versions)
except ImportError as error:
    raise ImportError(
        f"the drop-ins for diffusers need diffusers 0.30 or newer, got {error}: pip install 'diffusers>=0.30'"
    ) from error

from typing import Any

from .choose import DROP_INS, NEWER, fast_scheduler
from .cogvideox import FastCogVideoXDDIMScheduler
from .cogvideox_dpm import FastCogVideoXDPMScheduler
from .ddim import FastDDIMScheduler
from .ddpm import FastDDPMScheduler
from .dpm_solver_multistep import FastDPMSolverMultistepScheduler, FastEDMDPMSolverMultistepScheduler
from .euler import FastEDMEulerScheduler, FastEulerAncestralDiscreteScheduler, FastEulerDiscreteScheduler
from .flow_match_euler import FastFlowMatchEulerDiscreteScheduler
from .graphed_denoisers import GraphedDenoisers, graph_denoiser
from .heun import FastHeunDiscreteScheduler
from .inverse import FastDDIMInverseScheduler
from .lcm import FastLCMScheduler
from .parallel import FastDDIMParallelScheduler
from .tcd import FastTCDScheduler
from .unclip import FastUnCLIPScheduler
from .unipc_multistep import FastUniPCMultistepScheduler
from .wuerstchen import FastDDPMWuerstchenScheduler

_newer = {fast.__name__: fast for fast in DROP_INS.values() if fast.__name__ in NEWER}
globals().update(_newer)
_missing = {name: name.removeprefix("Fast") for name in NEWER if name not in _newer}
"""By name: drop-ins whose original is not in this version of diffusers."""

__all__ = [
    "FastCogVideoXDDIMScheduler",
    "FastDDIMInverseScheduler", "FastDDIMParallelScheduler", "FastDDIMScheduler", "FastDDPMScheduler",
    "FastDPMSolverMultistepScheduler", "FastEDMDPMSolverMultistepScheduler", "FastEDMEulerScheduler",
    "FastEulerAncestralDiscreteScheduler", "FastEulerDiscreteScheduler", "FastFlowMatchEulerDiscreteScheduler",
    "SchedulerMixin", *_newer,
    "FastCogVideoXDPMScheduler", "FastDDPMWuerstchenScheduler", "FastHeunDiscreteScheduler", "FastUnCLIPScheduler",
    "FastLCMScheduler", "FastTCDScheduler", "FastUniPCMultistepScheduler", "fast_scheduler", "graph_denoiser", "GraphedDenoisers",
]  # fmt: skip

for _name in __all__:
    if _name.startswith("Fast"):
        globals()[_name].__module__ = __name__  # what a saved pipeline's model_index.json names


def __getattr__(name: str) -> Any:
    """Say which drop-ins need a newer version of diffusers."""
    if name in _missing:
        import diffusers

        raise ImportError(
            f"{name} needs a diffusers that has {_missing[name]}, got {diffusers.__version__}: pip install -U diffusers"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
