"""``DDIMInverseScheduler``."""

from __future__ import annotations

from typing import Any

from diffusers import DDIMInverseScheduler
from diffusers.schedulers.scheduling_ddim_inverse import DDIMSchedulerOutput
from torch import Tensor

from ..arguments import LeaveToOriginal, check_tensors, single_timestep
from .config_fields import add_config_fields, check_flags
from .fused_steps import FusedSteps
from .output import step_output
from .takes_files import without_files


class FastDDIMInverseScheduler(FusedSteps, DDIMInverseScheduler):
    """``diffusers.DDIMInverseScheduler`` with its update in one kernel.

    It steps from data to noise (equation 14 of the DDIM paper).

    Args:
        explicit_pairs: step to each timestep from the one before it in ``timesteps``. The original
            steps from ``timestep - num_train_timesteps // num_inference_steps``.

    All other arguments are the original's.
    """

    _noisiest_first = False
    _clean_level = "initial_alpha_cumprod"

    @add_config_fields(DDIMInverseScheduler)
    def __init__(self, *args: Any, explicit_pairs: bool = False, **kwargs: Any):
        check_flags(explicit_pairs=explicit_pairs)
        super().__init__(*args, **kwargs)

    set_timesteps = without_files(FusedSteps)

    def _pair(self, t: int) -> tuple[int, int]:
        visited = self._visited()
        if t not in visited:
            return t - self._stride(), t
        return (*visited, -1)[visited.index(t) + 1], t

    def step(self, model_output: Tensor, timestep: int, sample: Tensor, return_dict: bool = True) -> Any:
        """Take the original's ``step``, to the noise level of ``timestep``, in one pass."""
        try:
            check_tensors(sample, model_output)
            if self.num_inference_steps is None:
                raise LeaveToOriginal("a step needs timesteps: call set_timesteps first")
            found = self._between_levels(model_output, single_timestep(timestep), sample, 0.0, False)
        except LeaveToOriginal as reason:
            self._refuse_what_the_original_ignores(reason, "explicit_pairs")
            return super().step(model_output, timestep, sample, return_dict)  # type: ignore[misc]  # the original
        return step_output(DDIMSchedulerOutput, found) if return_dict else found
