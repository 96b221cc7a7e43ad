"""Where diffusers takes the square root of a rounding error.

On some processors it is negative, and the result is NaN; on others it is not.
"""

import torch
from diffusers import DDIMScheduler


def radicand(scheduler: DDIMScheduler, t: int, eta: float) -> torch.Tensor:
    """Compute 1 - alpha_bar_prev - std_dev_t^2 in the scheduler's own arithmetic.

    It is the square of the weight of eps.
    """
    before = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    alpha_bar = scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod
    std_dev_t = eta * scheduler._get_variance(t, before) ** 0.5
    return 1 - alpha_bar - std_dev_t**2


def rounds_below_zero() -> bool:
    """Return whether it is negative on this processor in the first step of a run.

    The runs have eta = 1, zero terminal SNR and 1 to 100 steps.
    """
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    for steps in range(1, 101):
        scheduler.set_timesteps(steps)
        if radicand(scheduler, int(scheduler.timesteps[0]), 1.0) < 0:
            return True
    return False
