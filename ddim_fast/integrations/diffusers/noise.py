"""The noise of a step: drawn as in diffusers, or made in the kernel from seeds of generators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...kernels.noise import NoiseStream, sample_seeds
from ..arguments import LeaveToOriginal

NoiseArguments = Callable[[], dict[str, Any]]
"""Returns the arguments of ``ddim_step`` that say what noise is added.

Called once: it may draw from a generator.
"""


def noise_like_the_originals(
    model_output: Tensor, sample: Tensor, generator: Any, variance_noise: Tensor | None
) -> NoiseArguments:
    """Use ``variance_noise``, or draw noise as the original does."""
    dtype = torch.promote_types(sample.dtype, model_output.dtype)
    if variance_noise is None:
        m = model_output
        return lambda: {"noise": randn_tensor(m.shape, generator=generator, device=m.device, dtype=m.dtype).to(dtype)}
    if generator is not None or not isinstance(variance_noise, Tensor):
        raise LeaveToOriginal("noise comes from one place: pass generator, or variance_noise as a tensor")
    if variance_noise.shape != sample.shape or variance_noise.device != sample.device:
        raise LeaveToOriginal(
            f"variance_noise must have the shape and device of sample, {tuple(sample.shape)} on {sample.device}, got "
            f"{tuple(variance_noise.shape)} on {variance_noise.device}"
        )
    if torch.promote_types(variance_noise.dtype, dtype) != dtype:  # the result is of that dtype
        raise LeaveToOriginal(
            f"variance_noise must be no wider than the samples, {dtype}, got {variance_noise.dtype}: convert it"
        )
    return lambda: {"noise": variance_noise.to(dtype)}


class GeneratorSeeds:
    """The seeds of a run's generators on the device of its samples, kept from step to step."""

    def __init__(self) -> None:
        self._key: Any = None
        self._seeds: Tensor | None = None

    def of(self, generator: Any, sample: Tensor) -> Tensor:
        """Return the seeds that the generators were given, ``(B,)`` int64.

        It is not their current states that count. One generator's seed is that of the run.
        """
        if generator is None:
            raise ValueError(
                "philox_noise makes each sample's noise from the seed of a generator, got none: "
                "pass generator=[torch.Generator().manual_seed(seed), ...], one for each sample, or one for all"
            )
        generators = generator if isinstance(generator, list) else [generator]
        if len(generators) > 1 and len(generators) != len(sample):
            raise ValueError(
                f"generator must be one, or one for each of the {len(sample)} samples, got {len(generators)}"
            )
        chosen = tuple(g.initial_seed() for g in generators)
        key = (chosen, len(sample), sample.device)
        if self._seeds is None or self._key != key:
            several = len(chosen) > 1
            signed = (
                np.array(chosen, dtype=np.uint64).view(np.int64) if several else sample_seeds(chosen[0], len(sample))
            )
            self._key, self._seeds = key, torch.from_numpy(signed).to(sample.device)
        return self._seeds

    def arguments(self, generator: Any, sample: Tensor) -> NoiseArguments:
        """Make the noise in the kernel."""
        seeds = self.of(generator, sample)
        return lambda: {"seeds": seeds, "noise_stream": NoiseStream.STEP}
