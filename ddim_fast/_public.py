"""Everything that ``import ddim_fast as df`` offers, by its name."""

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
    "select_timesteps",
    "slerp",
    "standard_normals",
]
