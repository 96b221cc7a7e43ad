"""Everything that ``import ddim_fast as df`` offers, by its name."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .kernels.contract import StepCoefficients, StepTable
from .kernels.dispatch import ddim_step, ddim_step_from_table
from .kernels.log_prob import ddim_kl, ddim_log_prob
from .kernels.noise import NoiseStream, sample_seeds, standard_normals
from .models.flow_view import as_flow, flow_times
from .models.loading import LoadedModel, load_model, load_model_from
from .plans.continuous import (
    ContinuousSchedule,
    CosineSchedule,
    EDMSchedule,
    FlowSchedule,
    VESchedule,
    VPSchedule,
)
from .plans.levels import NoiseLevel
from .plans.named import make_schedule
from .plans.plan import PlannedStep, SamplingPlan
from .plans.schedules import NoiseSchedule
from .plans.timesteps import explicit_timesteps, respaced_timesteps, select_timesteps
from .sampler import DDIMSampler
from .sampling.editing import slerp
from .sampling.loop import Timing, Trajectory
from .sampling.rollout import Rollout

if TYPE_CHECKING:
    from .utils.pictures import save_animation, save_grid, show, to_pil, to_uint8
else:

    def __getattr__(name: str) -> Any:
        if name not in LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(".utils.pictures", __package__), name)


LATER = ("save_animation", "save_grid", "show", "to_pil", "to_uint8")
"""What is imported when it is first used: Pillow takes a while, and sampling needs none."""

__all__ = [
    "ContinuousSchedule",
    "CosineSchedule",
    "DDIMSampler",
    "EDMSchedule",
    "FlowSchedule",
    "LoadedModel",
    "NoiseLevel",
    "NoiseSchedule",
    "NoiseStream",
    "PlannedStep",
    "Rollout",
    "SamplingPlan",
    "StepCoefficients",
    "StepTable",
    "Timing",
    "Trajectory",
    "VESchedule",
    "VPSchedule",
    "__version__",
    "as_flow",
    "ddim_kl",
    "ddim_log_prob",
    "ddim_step",
    "ddim_step_from_table",
    "explicit_timesteps",
    "flow_times",
    "load_model",
    "load_model_from",
    "make_schedule",
    "respaced_timesteps",
    "sample_seeds",
    "save_animation",
    "save_grid",
    "select_timesteps",
    "show",
    "slerp",
    "standard_normals",
    "to_pil",
    "to_uint8",
]
