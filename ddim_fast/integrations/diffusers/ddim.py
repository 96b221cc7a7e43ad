"""``DDIMScheduler``."""

from __future__ import annotations

from typing import Any

from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

from .config_fields import add_config_fields, check_flags
from .sampling_step import SamplingSteps


class FastDDIMScheduler(SamplingSteps, DDIMScheduler):
    """``diffusers.DDIMScheduler`` with its update in one kernel.

    docs/drop_ins/diffusers.md lists every difference.

    Args:
        explicit_pairs: step from each timestep to the next one of ``timesteps``, and choose exactly
            as many as were asked for. The original steps to ``timestep - num_train_timesteps //
            num_inference_steps``, which under "linspace" and "trailing" spacing is another timestep
            for most numbers of steps.
        philox_noise: where eta > 0, make the noise of each sample in the kernel, from the seed of
            its generator (the noise standard: the same in any batch), instead of drawing it from
            the generator.
        solver: a file that ``ddim-fast search`` wrote, or its content: timesteps, model timesteps
            and coefficients fitted to the model. ``set_timesteps`` takes its number of steps then.
            The config keeps the content.

    All other arguments are the original's.
    """

    _output_kind = DDIMSchedulerOutput

    @add_config_fields(DDIMScheduler)
    def __init__(
        self, *args: Any, explicit_pairs: bool = False, philox_noise: bool = False, solver: Any = None, **kwargs: Any
    ):
        check_flags(explicit_pairs=explicit_pairs, philox_noise=philox_noise)
        super().__init__(*args, **kwargs)
        self._keep_solver(solver)
