"""diffusers' DDIM schedulers with the update in one kernel.

``pipe.scheduler = FastDDIMScheduler.from_config(pipe.scheduler.config)`` is the whole change. Each class extends its original and
takes over ``step`` and what else touches samples; whatever an original does that has no fused form (an argument it would refuse, say)
is left to it, so that results and errors stay its own.
"""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    # SchedulerMixin: loading a saved pipeline, diffusers looks for the loading methods of our classes beside them.
    from diffusers import DDIMInverseScheduler, DDIMParallelScheduler, DDIMScheduler, SchedulerMixin  # noqa: F401
    from diffusers.configuration_utils import register_to_config
    from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
    from diffusers.schedulers.scheduling_ddim_inverse import DDIMSchedulerOutput as DDIMInverseSchedulerOutput
    from diffusers.schedulers.scheduling_ddim_parallel import DDIMParallelSchedulerOutput
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as error:
    raise ImportError(
        f"the drop-ins for diffusers need diffusers 0.30 or newer, got {error}: pip install 'diffusers>=0.30'"
    ) from error

from ..kernels.contract import StepCoefficients
from ..kernels.cpu_step import plain_step
from ..kernels.dispatch import ddim_step
from ..kernels.layout import is_wrapped
from ..kernels.noise import NoiseStream, sample_seeds
from ..kernels.thresholding import dynamic_thresholds
from ..plans.coefficients import (
    PREDICTION_TYPES,
    ddim_coefficients,
    noising_coefficients,
    variance_with_room,
    velocity_coefficients,
)
from ..plans.timesteps import select_timesteps
from .steps_by_timestep import StepsByTimestep


class _LeaveToOriginal(Exception):  # noqa: N818 (no error: a way out of the fast path)
    """There is no fused form of this call: the original class does it, or has the right error for it."""


def _also_takes(original: type) -> Any:
    """Decorator of an ``__init__(self, *args, <fields>, **kwargs)``.

    Its signature, which diffusers reads for the config, is the original's with these fields added.
    """

    def decorate(init):
        added = [p for p in inspect.signature(init).parameters.values() if p.kind is p.KEYWORD_ONLY]
        inherited = list(inspect.signature(original.__init__).parameters.values())
        rest = [inherited.pop()] if inherited[-1].kind is inspect.Parameter.VAR_KEYWORD else []
        init.__signature__ = inspect.Signature([*inherited, *added, *rest])
        return register_to_config(init)

    return decorate


_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_MOST_CACHED = 64
_ROW_FIELDS = ("num_train_timesteps", "prediction_type", "clip_sample", "clip_sample_range", "explicit_pairs")


class _FastSteps:
    """What the fast schedulers share: rows by timestep, made again when what they depend on is no longer what it was.

    Pipelines write to a scheduler after it was made: to its config, to ``alphas_cumprod``, to ``timesteps``.
    """

    _noisiest_first = True  # the order of timesteps
    _known: _Known | None = None
    _row_fields: tuple[str, ...] = _ROW_FIELDS
    _alpha_bar_outside: str  # the attribute that is alpha_bar of the timestep below 0: of clean data

    def __getstate__(self) -> dict[str, Any]:
        """Without the rows, which are made by this scheduler: a copy makes its own."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_known", "_seeds_of")}

    def _pair(self, t: int) -> tuple[int, int]:
        """The timesteps (from, to) of the step that is taken at ``t``; one below 0 is clean data."""
        raise NotImplementedError

    def _rows(self, kind: Callable[..., StepCoefficients], *options: Any) -> StepsByTimestep:
        """The steps whose rows are ``kind(scheduler, *options, t)``."""
        known = self._known
        if known is None or not known.holds():
            known = self._known = _Known(self)
        found = known.rows.get((kind, options))
        if found is None:
            if len(known.rows) >= _MOST_CACHED:  # somebody sweeps over eta
                known.rows.clear()
            found = known.rows[kind, options] = StepsByTimestep(len(known.alpha_bars), partial(kind, self, *options))
        return found

    def _alpha_bar(self, t: int) -> float:
        return self._known.alpha_bars[t] if t >= 0 else self._known.alpha_bar_outside

    def _visited(self) -> tuple[int, ...]:
        """Timesteps from the noisiest to the cleanest, where pairs are explicit."""
        return self._known.visited if self._internal_dict.explicit_pairs else ()

    def _stride(self) -> int:
        return self._internal_dict.num_train_timesteps // self.num_inference_steps

    def _check_visited(self, t: int) -> None:
        if self._internal_dict.explicit_pairs and t not in self._known.visited:
            raise ValueError(
                f"with explicit_pairs a timestep must be one of scheduler.timesteps, got {t}: set_timesteps sets them"
            )

    def _refuse_what_the_original_ignores(self, *fields: str) -> None:
        for field in fields:
            if getattr(self._internal_dict, field, False) and self.num_inference_steps is not None:
                raise ValueError(
                    f"{field} is only for steps in one kernel, and there is none for this call: pass a timestep that is an int (or an "
                    "int32 or int64 tensor without dimensions), floating-point tensors of one shape, noise of their dtype and eta as a "
                    "float; without thresholding in float64 or sample_max_value below 1, and without epsilon prediction at "
                    f"alpha_bar = 0. Or make the scheduler with {field}=False"
                )

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """As the original's; with ``explicit_pairs``, always exactly ``num_inference_steps`` distinct timesteps of the training's."""
        config = self._internal_dict
        if not config.explicit_pairs:
            return super().set_timesteps(num_inference_steps, device)
        timesteps = select_timesteps(
            num_inference_steps,
            config.num_train_timesteps,
            config.timestep_spacing,
            steps_offset=config.steps_offset,
        )
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.tensor(timesteps if self._noisiest_first else timesteps[::-1], device=device)
        return None

    def _bound(self) -> float | None:
        """What x0 is clipped to. (Dynamic thresholding always scales to [-1, 1].)"""
        config = self._internal_dict
        if getattr(config, "thresholding", False):
            return 1.0
        return float(config.clip_sample_range) if config.clip_sample else None

    def _fused(
        self,
        steps: StepsByTimestep,
        model_output: Tensor,
        t: int | Tensor,
        sample: Tensor,
        noise: Callable[[], dict[str, Any]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(prev_sample, pred_original_sample) in one launch, or with dynamic thresholding in two.

        Args:
            noise: makes the arguments of ``ddim_step`` that say what noise is added. Called last, when nothing can go wrong any more:
                a generator must not be asked twice.
        """
        config, on_host = self._internal_dict, type(t) is int
        predicts_x0 = config.prediction_type == "sample"
        if on_host:
            self._check_visited(t)
            if not 0 <= t < steps.num_timesteps:
                raise _LeaveToOriginal
            row = steps.row(t)
        else:
            row = steps.table(t.device)
        if sample.dtype != model_output.dtype:
            sample = sample.to(torch.promote_types(sample.dtype, model_output.dtype))
        thresholded = getattr(config, "thresholding", False)
        thresholds = _thresholds(config, row, model_output, t, sample) if thresholded else None
        # Where the model predicts x0 and nothing clips it, its output is x0.
        x0_out = None if predicts_x0 and not row.clipped else torch.empty_like(sample)
        arguments = {} if noise is None else noise()
        if on_host:
            prev_sample = ddim_step(
                sample, model_output, row, thresholds=thresholds, noise_step=t, x0_out=x0_out, **arguments
            )
        else:
            prev_sample = steps.step(sample, model_output, t, thresholds=thresholds, x0_out=x0_out, **arguments)
        if x0_out is None:
            return prev_sample, model_output
        return prev_sample, x0_out.to(model_output.dtype) if predicts_x0 else x0_out

    def _between_levels(
        self,
        model_output: Tensor,
        t: int | Tensor,
        sample: Tensor,
        eta: float,
        use_clipped_model_output: bool,
        noise: Callable[[], dict[str, Any]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``_fused`` by the row for this eta. Traced by ``torch.compile``, one operator, which looks the levels up when it runs.

        Where there is no such operator, the graph breaks, or what is differentiated is left to the original.
        """
        config = self._internal_dict
        only_fused = ("explicit_pairs", "philox_noise", "thresholding")
        if not _is_dynamo_compiling() or any(getattr(config, field, False) for field in only_fused):
            return self._fused(self._rows(_sampling_row, eta, use_clipped_model_output), model_output, t, sample, noise)
        if torch.is_grad_enabled() and (sample.requires_grad or model_output.requires_grad):
            raise _LeaveToOriginal
        if (
            type(t) is not int
            or not 0 <= t < config.num_train_timesteps
            or config.prediction_type not in PREDICTION_TYPES
        ):
            raise _LeaveToOriginal
        if sample.dtype != model_output.dtype:
            sample = sample.to(torch.promote_types(sample.dtype, model_output.dtype))
        prev_sample, x0 = _step_between_levels(
            sample,
            model_output,
            None if noise is None else noise()["noise"],
            self.alphas_cumprod,
            getattr(self, self._alpha_bar_outside),
            *self._pair(t),
            config.prediction_type,
            self._bound(),
            eta,
            use_clipped_model_output,
        )
        if config.prediction_type != "sample":
            return prev_sample, x0
        return prev_sample, x0.to(model_output.dtype) if config.clip_sample else model_output

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The forward process (equation 4 of the DDIM paper), as the original's ``add_noise``."""
        try:
            t = _batch_of_timesteps(timesteps, original_samples, noise, len(self.alphas_cumprod))
            dtype = torch.promote_types(original_samples.dtype, noise.dtype)
            x0 = original_samples.to(dtype)
            return self._rows(_noising_row).step(x0, x0, t, noise=noise.to(dtype))
        except _LeaveToOriginal:
            return super().add_noise(original_samples, noise, timesteps)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a model with v-prediction learns (Salimans and Ho 2022), as the original's ``get_velocity``."""
        try:
            t = _batch_of_timesteps(timesteps, sample, noise, len(self.alphas_cumprod))
            dtype = torch.promote_types(sample.dtype, noise.dtype)
            return self._rows(_velocity_row).step(sample.to(dtype), noise.to(dtype), t)
        except _LeaveToOriginal:
            return super().get_velocity(sample, noise, timesteps)


class _Known:
    """Rows of a scheduler, and what they were made of."""

    def __init__(self, scheduler: _FastSteps):
        config, explicit = scheduler._internal_dict, scheduler._internal_dict.explicit_pairs
        levels, outside = scheduler.alphas_cumprod, getattr(scheduler, scheduler._alpha_bar_outside)
        if not isinstance(levels, Tensor):
            raise _LeaveToOriginal
        attributes = ["alphas_cumprod", scheduler._alpha_bar_outside, "num_inference_steps", "_internal_dict"]
        if explicit:
            attributes.append("timesteps")
        self.values = tuple(
            (vars(owner), name, getattr(owner, name))
            for owner, names in ((scheduler, attributes), (config, scheduler._row_fields))
            for name in names
        )
        self.writes = tuple(
            (tensor, tensor._version)
            for tensor in (levels, outside, *([scheduler.timesteps] if explicit else []))
            if isinstance(tensor, Tensor) and not tensor.is_inference()  # whose writes nobody counts
        )
        self.alpha_bars = levels.tolist()
        self.alpha_bar_outside = float(outside)
        self.visited = tuple(sorted(scheduler.timesteps.tolist(), reverse=True)) if explicit else ()
        self.rows: dict[Any, StepsByTimestep] = {}
        self.plain: dict[int, StepCoefficients] = {}  # by timestep: steps that are nothing but their row

    def holds(self) -> bool:
        """As ``plain_step`` looks for itself."""
        return all(found.get(name) is value for found, name, value in self.values) and all(
            tensor._version == count for tensor, count in self.writes
        )


def _check_tensors(sample: Any, model_output: Any) -> None:
    """Leave to the original what is not one floating-point output for each element of a batch."""
    if (
        not isinstance(sample, Tensor)
        or not isinstance(model_output, Tensor)
        or sample.shape != model_output.shape
        or not sample.dtype.is_floating_point
        or not model_output.dtype.is_floating_point
        or sample.device != model_output.device
        or sample.ndim == 0
        or (not _is_dynamo_compiling() and (is_wrapped(sample) or is_wrapped(model_output)))
    ):
        raise _LeaveToOriginal


def _timestep(timestep: Any) -> int | Tensor:
    """A number, or one number in device memory, which nothing waits for."""
    if type(timestep) is int:
        return timestep
    if isinstance(timestep, Tensor):
        if timestep.ndim != 0 or timestep.dtype not in _INTEGERS:
            raise _LeaveToOriginal
        return timestep.item() if timestep.device.type == "cpu" else timestep.to(torch.int64)
    if isinstance(timestep, np.integer):
        return int(timestep)
    raise _LeaveToOriginal


_INTEGERS = (torch.int64, torch.int32)


def _batch_of_timesteps(timesteps: Any, samples: Any, noise: Any, num_timesteps: int) -> Tensor:
    """One timestep, or one for each sample, on the samples' device."""
    _check_tensors(samples, noise)
    if samples.device.type == "meta":  # has no table to look rows up in
        raise _LeaveToOriginal
    if not isinstance(timesteps, Tensor) or timesteps.dtype not in _INTEGERS:
        raise _LeaveToOriginal
    if timesteps.numel() != 1 and timesteps.shape != samples.shape[:1]:
        raise _LeaveToOriginal
    on_host = timesteps.device.type == "cpu"
    if on_host and timesteps.numel() and not 0 <= timesteps.min() <= timesteps.max() < num_timesteps:
        raise _LeaveToOriginal
    return timesteps.to(samples.device, torch.int64)


def _thresholds(config: Any, row: Any, model_output: Tensor, t: int | Tensor, sample: Tensor) -> Tensor:
    ratio, maximum = config.dynamic_thresholding_ratio, config.sample_max_value
    if not (isinstance(ratio, (int, float)) and isinstance(maximum, (int, float))):
        raise _LeaveToOriginal
    # Thresholds are float32. A maximum below 1 would scale x0 up.
    if sample.dtype == torch.float64 or sample.ndim < 2 or not (0 <= ratio <= 1 and 1 <= maximum < math.inf):
        raise _LeaveToOriginal
    index = None if type(t) is int else t.reshape(-1)
    return dynamic_thresholds(sample, model_output, row, ratio, maximum, index=index)


def _sampling_row(scheduler: Any, eta: float, use_clipped_model_output: bool, t: int) -> StepCoefficients:
    """Equation 12 of the DDIM paper, for the step that is taken at ``t``."""
    alpha_bar_t, alpha_bar_prev = map(scheduler._alpha_bar, scheduler._pair(t))
    try:
        variance = variance_with_room(alpha_bar_t, alpha_bar_prev, eta, f"at timestep {t}")
    except ZeroDivisionError:
        raise _LeaveToOriginal from None
    return _row_between(
        scheduler, alpha_bar_t, alpha_bar_prev, variance=variance, use_clipped_model_output=use_clipped_model_output
    )


def _row_between(scheduler: Any, alpha_bar_t: float, alpha_bar_prev: float, **options: Any) -> StepCoefficients:
    try:
        return ddim_coefficients(
            alpha_bar_t,
            alpha_bar_prev,
            PREDICTION_TYPES[scheduler._internal_dict.prediction_type](alpha_bar_t),
            clip_sample_range=scheduler._bound(),
            **options,
        )
    except (KeyError, TypeError, ValueError):  # there is no such prediction here: the original has its own way with it
        raise _LeaveToOriginal from None


@torch.library.custom_op("ddim_fast::step_between_levels", mutates_args=())
def _step_between_levels(
    sample: Tensor,
    model_output: Tensor,
    noise: Tensor | None,
    alphas_cumprod: Tensor,
    alpha_bar_outside: Tensor,
    origin: int,
    target: int,
    prediction_type: str,
    clip_sample_range: float | None,
    eta: float,
    use_clipped_model_output: bool,
) -> tuple[Tensor, Tensor]:
    """(prev_sample, pred_original_sample) of the step from one timestep to another; one below 0 is ``alpha_bar_outside``."""
    levels = [float(alphas_cumprod[t] if t >= 0 else alpha_bar_outside) for t in (origin, target)]
    row = ddim_coefficients(
        *levels,
        prediction_type,
        variance=variance_with_room(*levels, eta, f"at timestep {origin}"),
        clip_sample_range=clip_sample_range,
        use_clipped_model_output=use_clipped_model_output,
    )
    prev_sample, x0 = torch.empty_like(sample), torch.empty_like(sample)
    return ddim_step(sample, model_output, row, noise=noise, out=prev_sample, x0_out=x0), x0


@_step_between_levels.register_fake
def _(sample, *others):
    return torch.empty_like(sample), torch.empty_like(sample)


def _noising_row(scheduler: Any, t: int) -> StepCoefficients:
    return noising_coefficients(scheduler._alpha_bar(t))


def _velocity_row(scheduler: Any, t: int) -> StepCoefficients:
    return velocity_coefficients(scheduler._alpha_bar(t))


def _output(kind: type, found: tuple[Tensor, Tensor]) -> Any:
    """``kind(prev_sample=..., pred_original_sample=...)`` without its checks, which take longer than a small step."""
    if _is_dynamo_compiling():
        return kind(*found)
    prev_sample, pred_original_sample = found
    output = OrderedDict.__new__(kind)
    _set_item(output, "prev_sample", prev_sample)
    _set_item(output, "pred_original_sample", pred_original_sample)
    attributes = output.__dict__
    attributes["prev_sample"], attributes["pred_original_sample"] = prev_sample, pred_original_sample
    return output


_set_item = OrderedDict.__setitem__


class _FastDenoising(_FastSteps):
    """``step`` of the two schedulers that sample."""

    _output_kind: type
    _row_fields = (*_ROW_FIELDS, "thresholding")
    _alpha_bar_outside = "final_alpha_cumprod"

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
        """The original's ``step`` (equation 12 of the DDIM paper) in one pass: to ``prev_sample`` and ``pred_original_sample``.

        Raises:
            ValueError: ``eta`` asks for more noise than the step has room for; with ``philox_noise``, there is no generator; with
                ``explicit_pairs``, the timestep is not one of ``timesteps``. And the original's errors.
        """
        known = None if _is_dynamo_compiling() else self._known
        if known is not None and eta == 0 and use_clipped_model_output is False:
            found = plain_step(sample, model_output, known.plain, timestep, known.values, known.writes)
            if found is not None:
                return _output(self._output_kind, found) if return_dict else found
        try:
            _check_tensors(sample, model_output)
            if not isinstance(eta, (int, float)) or not 0 <= eta < math.inf or self.num_inference_steps is None:
                raise _LeaveToOriginal
            noise = self._noise(model_output, sample, generator, variance_noise) if eta > 0 else None
            t = _timestep(timestep)
            found = self._between_levels(model_output, t, sample, float(eta), bool(use_clipped_model_output), noise)
        except _LeaveToOriginal:
            draws = variance_noise is None and isinstance(eta, (Real, Tensor)) and eta > 0
            self._refuse_what_the_original_ignores("explicit_pairs", *(["philox_noise"] if draws else []))
            return super().step(
                model_output, timestep, sample, eta, use_clipped_model_output, generator, variance_noise, return_dict
            )
        if eta == 0 and use_clipped_model_output is False and type(t) is int and self._is_plain():
            self._known.plain[t] = self._rows(_sampling_row, 0.0, False).row(t)
        return _output(self._output_kind, found) if return_dict else found

    def _is_plain(self) -> bool:
        """Whether a step is nothing but its row: then the next one at the same timestep can take the short way."""
        if _is_dynamo_compiling():
            return False
        return not self._internal_dict.thresholding and self._internal_dict.prediction_type != "sample"

    def _noise(
        self, model_output: Tensor, sample: Tensor, generator: Any, variance_noise: Tensor | None
    ) -> Callable[[], dict[str, Any]]:
        """What makes the step's noise, as the original would."""
        dtype = torch.promote_types(sample.dtype, model_output.dtype)
        if variance_noise is not None:
            if generator is not None or not isinstance(variance_noise, Tensor):
                raise _LeaveToOriginal
            if variance_noise.shape != sample.shape or variance_noise.device != sample.device:
                raise _LeaveToOriginal
            if torch.promote_types(variance_noise.dtype, dtype) != dtype:  # the result is of that dtype
                raise _LeaveToOriginal
            return lambda: {"noise": variance_noise.to(dtype)}
        if self._internal_dict.philox_noise:
            seeds = self._seeds(generator, sample)
            return lambda: {"seeds": seeds, "noise_stream": NoiseStream.STEP}

        def draw() -> dict[str, Any]:
            m = model_output
            return {"noise": randn_tensor(m.shape, generator=generator, device=m.device, dtype=m.dtype).to(dtype)}

        return draw

    def _seeds(self, generator: Any, sample: Tensor) -> Tensor:
        """``(B,)`` int64: the seeds that the generators were given, not what they have got to; one generator's is that of the run."""
        if generator is None:
            raise ValueError(
                "philox_noise makes each sample's noise from the seed of a generator, got none: pass generator=[torch.Generator()"
                ".manual_seed(seed), ...], one for each sample, or one for all"
            )
        several = isinstance(generator, list) and len(generator) > 1
        if several and len(generator) != len(sample):
            raise ValueError(
                f"generator must be one, or one for each of the {len(sample)} samples, got {len(generator)}"
            )
        chosen = (
            tuple(g.initial_seed() for g in generator) if isinstance(generator, list) else (generator.initial_seed(),)
        )
        key = (chosen, len(sample), sample.device)
        if self.__dict__.get("_seeds_of", (None,))[0] != key:
            signed = (
                np.array(chosen, dtype=np.uint64).view(np.int64) if several else sample_seeds(chosen[0], len(sample))
            )
            self._seeds_of = (key, torch.from_numpy(signed).to(sample.device))
        return self._seeds_of[1]


class FastDDIMScheduler(_FastDenoising, DDIMScheduler):
    """``diffusers.DDIMScheduler`` with its update in one kernel; equal to it but for what is listed in docs/drop_ins/diffusers.md.

    Args:
        explicit_pairs: go from each timestep to the next one of ``timesteps``, and choose exactly as many as were asked for. The
            original goes to ``timestep - num_train_timesteps // num_inference_steps``, which under "linspace" and "trailing" spacing
            is another timestep for most numbers of steps.
        philox_noise: where eta > 0, make the noise of each sample in the kernel, from the seed of its generator (the noise standard:
            the same in any batch), instead of drawing it from the generator.

    All other arguments are the original's.
    """

    _output_kind = DDIMSchedulerOutput

    @_also_takes(DDIMScheduler)
    def __init__(self, *args: Any, explicit_pairs: bool = False, philox_noise: bool = False, **kwargs: Any):
        _check_flags(explicit_pairs=explicit_pairs, philox_noise=philox_noise)
        super().__init__(*args, **kwargs)


class FastDDIMParallelScheduler(_FastDenoising, DDIMParallelScheduler):
    """``diffusers.DDIMParallelScheduler`` with its updates in one kernel. Arguments as ``FastDDIMScheduler``."""

    _output_kind = DDIMParallelSchedulerOutput
    _compatibles = [*DDIMParallelScheduler._compatibles, "DDIMParallelScheduler"]  # noqa: RUF012 (as diffusers' classes have it)

    @_also_takes(DDIMParallelScheduler)
    def __init__(self, *args: Any, explicit_pairs: bool = False, philox_noise: bool = False, **kwargs: Any):
        _check_flags(explicit_pairs=explicit_pairs, philox_noise=philox_noise)
        super().__init__(*args, **kwargs)

    def batch_step_no_noise(
        self,
        model_output: Tensor,
        timesteps: Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
    ) -> Tensor:
        """The original's: each sample by the step of its own timestep, without noise. After the last one alpha_bar is always 1."""
        try:
            if eta != 0 or self.num_inference_steps is None or self._internal_dict.thresholding:
                raise _LeaveToOriginal
            t = _batch_of_timesteps(timesteps, sample, model_output, len(self.alphas_cumprod))
            # The original's coefficients are a tensor with dimensions here, which half precision gives way to.
            dtype = torch.promote_types(
                torch.promote_types(sample.dtype, model_output.dtype), self.alphas_cumprod.dtype
            )
            return self._rows(_parallel_row, bool(use_clipped_model_output)).step(sample.to(dtype), model_output, t)
        except _LeaveToOriginal:
            self._refuse_what_the_original_ignores("explicit_pairs")
            return super().batch_step_no_noise(model_output, timesteps, sample, eta, use_clipped_model_output)


def _parallel_row(scheduler: Any, use_clipped_model_output: bool, t: int) -> StepCoefficients:
    origin, target = scheduler._pair(t)
    alpha_bar_prev = scheduler._alpha_bar(target) if target >= 0 else 1.0
    return _row_between(
        scheduler, scheduler._alpha_bar(origin), alpha_bar_prev, use_clipped_model_output=use_clipped_model_output
    )


class FastDDIMInverseScheduler(_FastSteps, DDIMInverseScheduler):
    """``diffusers.DDIMInverseScheduler`` with its update in one kernel: from clean data towards noise (equation 14 of the DDIM paper).

    Args:
        explicit_pairs: come to each timestep from the one before it in ``timesteps``. The original comes from
            ``timestep - num_train_timesteps // num_inference_steps``.

    All other arguments are the original's.
    """

    _noisiest_first = False
    _alpha_bar_outside = "initial_alpha_cumprod"
    _compatibles = ["DDIMInverseScheduler"]  # noqa: RUF012 (as diffusers' classes have it)

    @_also_takes(DDIMInverseScheduler)
    def __init__(self, *args: Any, explicit_pairs: bool = False, **kwargs: Any):
        _check_flags(explicit_pairs=explicit_pairs)
        super().__init__(*args, **kwargs)

    def _pair(self, t: int) -> tuple[int, int]:
        visited = self._visited()
        if t not in visited:
            return t - self._stride(), t
        return (*visited, -1)[visited.index(t) + 1], t

    def step(self, model_output: Tensor, timestep: int, sample: Tensor, return_dict: bool = True) -> Any:
        """The original's ``step``, in one pass: ``sample`` to the noise level of ``timestep``."""
        try:
            _check_tensors(sample, model_output)
            if self.num_inference_steps is None:
                raise _LeaveToOriginal
            found = self._between_levels(model_output, _timestep(timestep), sample, 0.0, False)
        except _LeaveToOriginal:
            self._refuse_what_the_original_ignores("explicit_pairs")
            return super().step(model_output, timestep, sample, return_dict)
        return _output(DDIMInverseSchedulerOutput, found) if return_dict else found


def _check_flags(**flags: Any) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
