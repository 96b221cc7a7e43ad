"""``step`` of the schedulers that sample, from noise to data."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ...kernels.cpu_step import plain_step
from ...plans.files import TimestepList
from ...plans.timesteps import explicit_timesteps
from ..arguments import LeaveToOriginal, check_no_gradients, check_tensors, single_timestep
from .fused_steps import FusedSteps
from .noise import GeneratorSeeds, NoiseArguments, noise_like_the_originals
from .output import step_output
from .solver_file import SolverFile, is_file, solver_of
from .solver_path import SolverPath, path_of_ddim, schedule_of_betas
from .takes_files import TakesFiles

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


class SamplingSteps(TakesFiles, FusedSteps):
    """A scheduler that samples; mixed in before the original class."""

    _output_kind: type
    _row_fields = (*FusedSteps._row_fields, "thresholding")
    _clean_level = "final_alpha_cumprod"
    _generator_seeds: GeneratorSeeds | None = None

    def _path_of_files(self) -> SolverPath:
        return path_of_ddim(self.config, schedule_of_betas(self.config, self.alphas_cumprod))

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | str | os.PathLike[str] | TimestepList | None = None,
    ) -> None:
        """Set the timesteps as the original does, or to a list, as diffusers' other schedulers do,
        or to those of a file.

        Args:
            num_inference_steps: where the config has a ``solver``, that of the solver.
            timesteps: instead of a number: a list, strictly decreasing. Each step then leads to the
                next one of the list, as with ``explicit_pairs``. Or a file that ``ddim-fast
                search`` wrote: its model timesteps become ``timesteps``, and steps are those of the
                file, with its noise levels and coefficients.

        Raises:
            FileNotFoundError: there is no such file.
            TypeError, ValueError: both or neither are given, or the list is none, or leaves the
                range; the file is for another schedule or prediction type; the original's errors.
                The scheduler is as it was.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(
                "set_timesteps takes either num_inference_steps or timesteps, got "
                f"{'neither' if timesteps is None else 'both'}: pass one of them"
            )
        solver = self._asked_for(num_inference_steps, timesteps)
        if solver is not None:
            self._set_timesteps(solver.told, device)
        elif timesteps is not None:
            assert not isinstance(timesteps, (str, os.PathLike, TimestepList))  # which are files
            self._set_timesteps(explicit_timesteps(timesteps, self.config.num_train_timesteps), device)
        else:
            super().set_timesteps(num_inference_steps, device)  # type: ignore[arg-type]  # a number
        self._solver = solver
        custom = timesteps is not None or solver is not None
        if self.custom_timesteps != custom:
            self.custom_timesteps = custom
            self._row_cache = None

    def _set_timesteps(self, timesteps: Sequence[int], device: str | torch.device | None) -> None:
        self.timesteps = torch.tensor(timesteps, device=device)
        self.num_inference_steps = len(timesteps)

    def _asked_for(self, num_inference_steps: int | None, timesteps: Any) -> SolverFile | None:
        """Return the file in ``timesteps``, or for a number that of the config; None for none."""
        if is_file(timesteps):
            return self._solver_file(*solver_of(timesteps))
        return None if timesteps is not None else self._kept_solver(num_inference_steps)

    def _pair(self, t: int) -> tuple[int, int]:
        visited = self._visited()
        if t not in visited:
            return t, t - self._stride()
        return t, (*visited, -1)[visited.index(t) + 1]

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Take the original's ``step`` in one pass (equation 12 of the DDIM paper).

        Raises:
            ValueError: ``eta`` asks for more noise than the step has room for; with
                ``philox_noise``, there is no generator; with ``explicit_pairs``, the timestep is
                not one of ``timesteps``. And the original's errors.
        """
        cache = None if _is_dynamo_compiling() else self._row_cache
        if cache is not None and eta == 0 and use_clipped_model_output is False:
            found = plain_step(sample, model_output, cache.plain, timestep, cache.values, cache.writes)
            if found is not None:
                return step_output(self._output_kind, found) if return_dict else found
        try:
            check_tensors(sample, model_output)
            if self.num_inference_steps is None:
                raise LeaveToOriginal("a step needs timesteps: call set_timesteps first")
            if not isinstance(eta, (int, float)) or not 0 <= eta < math.inf:
                raise LeaveToOriginal(f"eta must be a float, 0 or more and finite, got {eta!r:.80}: pass float(eta)")
            noise = self._noise(model_output, sample, generator, variance_noise) if eta > 0 else None
            t = single_timestep(timestep)
            take = self._between_levels if self._solver is None else self._of_solver
            found = take(model_output, t, sample, float(eta), bool(use_clipped_model_output), noise)
        except LeaveToOriginal as reason:
            draws = variance_noise is None and isinstance(eta, (Real, Tensor)) and eta > 0
            self._refuse_what_the_original_ignores(reason, "explicit_pairs", *(["philox_noise"] if draws else []))
            return super().step(  # type: ignore[misc]  # the original
                model_output, timestep, sample, eta, use_clipped_model_output, generator, variance_noise, return_dict
            )
        if (
            eta == 0
            and use_clipped_model_output is False
            and type(t) is int
            and self._solver is None
            and self._is_plain()
        ):
            self._cache().plain[t] = self._rows(self._sampling_row, 0.0, False).row(t)
        return step_output(self._output_kind, found) if return_dict else found

    def _of_solver(
        self,
        model_output: Tensor,
        t: int | Tensor,
        sample: Tensor,
        eta: float,
        use_clipped_model_output: bool,
        noise: NoiseArguments | None,
    ) -> tuple[Tensor, Tensor]:
        """Return (prev_sample, pred_original_sample) of the step of the file at ``t``."""
        solver = self._solver
        assert solver is not None
        if solver.sampler.order > 1:
            check_no_gradients(sample, model_output)
        number = solver.number_at(t)
        found = self._fused(
            solver.rows(eta, use_clipped_model_output),
            model_output,
            solver.on_device(number, sample.device),
            sample,
            noise,
            histories=solver.histories(number, sample, torch.promote_types(sample.dtype, model_output.dtype)),
            recomputed=use_clipped_model_output,
        )
        solver.took()
        return found

    def _check_visited(self, t: int) -> None:
        if self._solver is None:  # which has checked it
            super()._check_visited(t)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise samples (equation 4 of the DDIM paper) as the original does; with a file, to the
        noise levels that the steps at these timesteps start from."""
        if self._solver is not None and isinstance(timesteps, Tensor):
            timesteps = self._solver.visited_at(timesteps)
        return super().add_noise(original_samples, noise, timesteps)

    def _is_plain(self) -> bool:
        """Return whether a step needs nothing but its row.

        Then the next one at this timestep can take the short path.
        """
        if _is_dynamo_compiling() or not self._cache().allows_short_path:
            return False
        return not self._thresholding() and self.config.prediction_type != "sample"

    def _noise(
        self, model_output: Tensor, sample: Tensor, generator: Any, variance_noise: Tensor | None
    ) -> NoiseArguments:
        if variance_noise is None and self.config.philox_noise:
            if self._generator_seeds is None:
                self._generator_seeds = GeneratorSeeds()
            return self._generator_seeds.arguments(generator, sample)
        return noise_like_the_originals(model_output, sample, generator, variance_noise)
