"""Diffusers' DDIM schedulers with the update in one kernel.

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

from .ddim import FastDDIMScheduler
from .inverse import FastDDIMInverseScheduler
from .parallel import FastDDIMParallelScheduler

__all__ = ["FastDDIMInverseScheduler", "FastDDIMParallelScheduler", "FastDDIMScheduler", "SchedulerMixin"]

for _scheduler in (FastDDIMScheduler, FastDDIMParallelScheduler, FastDDIMInverseScheduler):
    _scheduler.__module__ = __name__  # what a saved pipeline's model_index.json names
