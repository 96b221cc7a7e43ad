"""DDIM of guided-diffusion and improved-diffusion (OpenAI) with the update in one kernel.

``diffusion = FastDiffusion(diffusion)`` is the whole change. It wraps the original object, whose
library is not imported; method names, argument order and random numbers stay the same.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels.contract import StepCoefficients
from ..plans.coefficients import Prediction, check_eta, ddim_coefficients, previous_x_prediction, variance_with_room
from ..utils.checks import check_callable, check_device
from ..utils.progress import tqdm
from .original_results import kinds_of_results, per_sample_coefficient, readable, step_of_kind, step_with_x0
from .outputs import check_output
from .rows_by_timestep import RowsByTimestep, cached_rows

_PREVIOUS_X = "previous_x"
_PREDICTIONS = {"PREVIOUS_X": _PREVIOUS_X, "START_X": "sample", "EPSILON": "epsilon"}
_LEARNS_VARIANCE = {"LEARNED": True, "LEARNED_RANGE": True, "FIXED_SMALL": False, "FIXED_LARGE": False}

_ORIGINALS = ("GaussianDiffusion", "SpacedDiffusion")
_REPLACED = (
    "p_mean_variance",
    "condition_score",
    "_predict_xstart_from_eps",
    "_predict_xstart_from_xprev",
    "_predict_eps_from_xstart",
    "ddim_sample",
    "ddim_reverse_sample",
    "ddim_sample_loop",
    "ddim_sample_loop_progressive",
)
"""Methods of the originals that are not called any more: this class computes the same."""


class FastDiffusion:
    """A ``GaussianDiffusion`` or ``SpacedDiffusion`` whose DDIM runs as fused steps.

    Every other method and attribute is the original's. A step is one kernel pass, which computes
    ``sample`` and ``pred_xstart`` together; a ``denoised_fn`` takes a second one (none for
    START_X), a ``cond_fn`` another. Noise is drawn by ``torch.randn_like`` where the original draws
    it, needed or not, so a seeded run gives the same images and leaves the same random state.

    Args:
        diffusion: an object of guided-diffusion or improved-diffusion, or one with their
            attributes. Its noise levels and types are read at construction: later changes have no
            effect.

    Raises:
        TypeError: ``diffusion`` lacks these attributes, or its methods have other arguments.
        ValueError: DDIM has no formula for its noise levels or types, or it overrides a method that
            is replaced here.
    """

    def __init__(self, diffusion: Any):
        _check_unchanged(diffusion)
        self.diffusion = diffusion
        self._prediction = _choice(diffusion, "model_mean_type", _PREDICTIONS)
        self._learns_variance = _choice(diffusion, "model_var_type", _LEARNS_VARIANCE)
        self._alpha_bars = _levels(diffusion, "alphas_cumprod")
        self._targets = {
            "prev": _levels(diffusion, "alphas_cumprod_prev"),
            "next": _levels(diffusion, "alphas_cumprod_next"),
            "x0": np.ones_like(self._alpha_bars),
            "eps": np.zeros_like(self._alpha_bars),
        }
        self._cached: dict[tuple, RowsByTimestep] = {}
        if not (np.all(np.diff(self._alpha_bars) < 0) and 0 <= self._alpha_bars[-1] <= self._alpha_bars[0] < 1):
            raise ValueError(
                f"alphas_cumprod must decrease strictly from below 1 and not below 0, got {self._alpha_bars}: "
                "make the diffusion from betas between 0 and 1"
            )
        # An error comes here where the noisiest timestep does not determine x0.
        self._steps(self._prediction, "prev").row(len(self._alpha_bars) - 1)

    def __getattr__(self, name: str) -> Any:
        if name == "diffusion":  # not set yet, while this object is copied or unpickled
            raise AttributeError(name)
        return getattr(self.diffusion, name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.diffusion).__name__}, {len(self._alpha_bars)} timesteps)"

    def ddim_sample(
        self,
        model: Callable[..., Tensor],
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """Compute x_{t-1} from x_t (equation 12 of arXiv 2010.02502).

        eps is recomputed from the clipped x0.

        Gradients are recorded in the caller's mode, as in the original; PyTorch then computes the
        step.

        Args:
            model: ``model(x, timesteps, **model_kwargs)`` returns ``(B, C, ...)``, or with a
                learned variance ``(B, 2 C, ...)``, whose second half is not read. Timesteps are
                mapped and scaled as in the original.
            x: ``(B, C, ...)``, of any floating-point dtype.
            t: ``(B,)`` integers, 0 to ``num_timesteps`` - 1: the timestep of each sample.
            clip_denoised: clip x0 to [-1, 1].
            denoised_fn: applied to x0 before it is clipped.
            cond_fn: ``cond_fn(x, timesteps, **model_kwargs)`` returns the gradient of log p(y | x),
                which is added to the score after clipping (algorithm 2 of arXiv 2105.05233). It
                also works for improved-diffusion, which has no such argument.
            eta: 0 is deterministic, 1 adds as much noise as DDPM.

        Returns:
            ``sample`` and ``pred_xstart``, new tensors like ``x``; float32 if ``x`` is in half
            precision, as in the original.

        Raises:
            TypeError, ValueError: an argument is wrong, or what ``model``, ``denoised_fn`` or
                ``cond_fn`` returned.
        """
        at = _timesteps(t, x)
        steps = self._last_pass("prev", clip_denoised, denoised_fn, cond_fn, model_kwargs, eta)
        _compute_rows(steps, at)
        return self._step("prev", steps, model, x, t, at, clip_denoised, denoised_fn, cond_fn, model_kwargs)

    def ddim_reverse_sample(
        self,
        model: Callable[..., Tensor],
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """Compute x_{t+1} from x_t (equation 14 of arXiv 2010.02502).

        The last timestep steps to alpha_bar = 0, where the sample is eps. The arguments, result and
        errors are those of ``ddim_sample``; ``eta`` must be 0.
        """
        at = _timesteps(t, x)
        _check_deterministic(eta)
        steps = self._last_pass("next", clip_denoised, denoised_fn, None, model_kwargs)
        _compute_rows(steps, at)
        return self._step("next", steps, model, x, t, at, clip_denoised, denoised_fn, None, model_kwargs)

    def ddim_sample_loop(
        self,
        model: Callable[..., Tensor],
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: str | torch.device | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Tensor:
        """Sample from noise, without gradients.

        ``ddim_sample`` at every timestep, the noisiest first.

        Args:
            shape: ``(B, C, ...)``, a tuple or a list.
            noise: x_T of that shape, not changed; ``torch.randn(*shape)`` if None.
            device: of the samples; that of the model's parameters if None.
            progress: show a bar.

        The other arguments and the errors are those of ``ddim_sample``.

        Returns:
            ``shape``, the last ``sample``.
        """
        return _last_sample(
            self.ddim_sample_loop_progressive(
                model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress, eta
            )
        )

    def ddim_sample_loop_progressive(
        self,
        model: Callable[..., Tensor],
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: str | torch.device | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Iterator[dict[str, Tensor]]:
        """Run ``ddim_sample_loop``, yielding what ``ddim_sample`` returns at each timestep.

        If the caller replaces ``sample`` in the dict, the next step starts from that.
        """
        device = _check_start(model, shape, noise, device)
        steps = self._last_pass("prev", clip_denoised, denoised_fn, cond_fn, model_kwargs, eta)
        timesteps = range(len(self._alpha_bars))[::-1]
        for i in timesteps:  # all of them now, so that no error comes in the middle of a run
            steps.row(i)
        options = (clip_denoised, denoised_fn, cond_fn, model_kwargs)

        def run() -> Iterator[dict[str, Tensor]]:
            x = torch.randn(*shape, device=device) if noise is None else noise
            yield from self._loop("prev", steps, timesteps, model, x, options, progress)

        return run()

    def ddim_reverse_sample_loop(
        self,
        model: Callable[..., Tensor],
        x: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Tensor:
        """Encode clean samples ``x`` to the noise from which ``ddim_sample_loop`` generates them.

        The originals have no such loop: ``ddim_reverse_sample`` at every timestep but the last, the
        cleanest first. A clean sample counts as one at the first noise level, and the result is at
        the last one, where ``ddim_sample_loop`` begins.

        Args:
            x: ``(B, C, ...)``, not changed.

        The other arguments and the errors are those of ``ddim_reverse_sample``.

        Returns:
            The last ``sample``, for ``noise`` of ``ddim_sample_loop``.
        """
        return _last_sample(
            self.ddim_reverse_sample_loop_progressive(model, x, clip_denoised, denoised_fn, model_kwargs, progress, eta)
        )

    def ddim_reverse_sample_loop_progressive(
        self,
        model: Callable[..., Tensor],
        x: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Iterator[dict[str, Tensor]]:
        """Run ``ddim_reverse_sample_loop``, yielding the dict of each timestep."""
        _check_samples(x)
        check_callable("model", model)
        _check_deterministic(eta)
        steps = self._last_pass("next", clip_denoised, denoised_fn, None, model_kwargs)
        timesteps = range(len(self._alpha_bars) - 1)
        if not timesteps:
            raise ValueError(
                "encoding steps from a timestep to the next, got a diffusion with one timestep: keep at least two"
            )
        options = (clip_denoised, denoised_fn, None, model_kwargs)
        return self._loop("next", steps, timesteps, model, x, options, progress)

    def _loop(
        self,
        target: str,
        steps: RowsByTimestep,
        timesteps: Sequence[int],
        model: Callable[..., Tensor],
        x: Tensor,
        options: tuple,
        progress: bool,
    ) -> Iterator[dict[str, Tensor]]:
        for i in tqdm(timesteps) if progress else timesteps:
            with torch.no_grad():  # ends before the yield: the caller's code runs in its own mode
                # The model reads timesteps on the device, the step reads a row on the host: nothing
                # waits.
                t = torch.full((len(x),), i, device=x.device)
                out = self._step(target, steps, model, x, t, i, *options)
            yield out
            x = out["sample"]

    def _last_pass(
        self,
        target: str,
        clip_denoised: bool,
        denoised_fn: Callable | None,
        cond_fn: Callable | None,
        model_kwargs: Mapping[str, Any] | None,
        eta: float = 0.0,
    ) -> RowsByTimestep:
        """Check these arguments; return the rows of the pass that computes the sample.

        It starts from eps with a ``cond_fn``, from x0 with a ``denoised_fn`` only, else from the
        model's output.
        """
        check_eta(eta)
        _check_callable("denoised_fn", denoised_fn)
        _check_callable("cond_fn", cond_fn)
        if model_kwargs is not None and not isinstance(model_kwargs, Mapping):
            raise TypeError(
                f"model_kwargs must be a dict, got {type(model_kwargs).__name__}: where arguments are given by position, "
                "cond_fn comes before model_kwargs, as in guided-diffusion"
            )
        if cond_fn is not None:
            return self._steps("epsilon", target, float(eta))
        return self._steps(
            self._prediction if denoised_fn is None else "sample", target, float(eta), bool(clip_denoised)
        )

    def _step(
        self,
        target: str,
        steps: RowsByTimestep,
        model: Callable[..., Tensor],
        x: Tensor,
        t: Tensor,
        at: int | Tensor,
        clip_denoised: bool,
        denoised_fn: Callable[[Tensor], Tensor] | None,
        cond_fn: Callable[..., Tensor] | None,
        model_kwargs: Mapping[str, Any] | None,
    ) -> dict[str, Tensor]:
        m, prediction = self._model_output(model, x, t, model_kwargs), self._prediction
        gradient: Tensor | None = None
        if denoised_fn is not None:
            if prediction != "sample":
                (x0_kind,) = kinds_of_results(_originals_x0, x, m, prediction=prediction)
                m = step_of_kind(x0_kind, x, m, at, take=self._steps(prediction, "x0").step)
            m, prediction = check_output("the output of denoised_fn", denoised_fn(m), x), "sample"
        if cond_fn is not None:
            gradient = check_output("the output of cond_fn", self._call(cond_fn, x, t, model_kwargs), x)
        adds_noise, clip = target == "prev", bool(clip_denoised)
        options = {"prediction": prediction, "clip": clip, "adds_noise": adds_noise}
        x0_kind, kind = kinds_of_results(_originals_results, x, m, gradient, **options)
        if prediction == "sample" and not clip and gradient is None:  # the originals return that tensor itself
            noise = torch.randn_like(x) if adds_noise else None
            return {"sample": step_of_kind(kind, x, m, at, noise=noise, take=steps.step), "pred_xstart": m}
        if gradient is not None:
            to_eps = self._steps(prediction, "eps", 0.0, clip)
            m = to_eps.step(x.to(kind.dtype), readable(m, kind.dtype), at, noise=gradient.to(kind.dtype))
        noise = torch.randn_like(x) if adds_noise else None
        sample, pred_xstart = step_with_x0(x0_kind, kind, x, m, at, noise=noise, take=steps.step)
        return {"sample": sample, "pred_xstart": pred_xstart}

    def _model_output(
        self, model: Callable[..., Tensor], x: Tensor, t: Tensor, model_kwargs: Mapping[str, Any] | None
    ) -> Tensor:
        """Return the model's prediction. Learned-variance channels are ignored, without a copy."""
        channels = x.shape[1]
        shape = (len(x), 2 * channels, *x.shape[2:]) if self._learns_variance else x.shape
        remedy = f"it follows from model_var_type {self.diffusion.model_var_type}"
        output = check_output("the output of model", self._call(model, x, t, model_kwargs), x, shape, remedy)
        return output[:, :channels] if self._learns_variance else output

    def _call(
        self, function: Callable[..., Tensor], x: Tensor, t: Tensor, model_kwargs: Mapping[str, Any] | None
    ) -> Any:
        """Call ``function`` at the original's timesteps: respaced by its wrapper, or scaled."""
        wrap = getattr(self.diffusion, "_wrap_model", None)
        scale = getattr(self.diffusion, "_scale_timesteps", None)
        function = function if wrap is None else wrap(function)
        return function(x, t if scale is None else scale(t), **(model_kwargs or {}))

    def _steps(self, prediction: str, target: str, eta: float = 0.0, clip: bool = False) -> RowsByTimestep:
        key = (prediction, target, eta, clip)
        return cached_rows(self._cached, key, len(self._alpha_bars), partial(self._row, *key))

    def _row(self, prediction: str, target: str, eta: float, clip: bool, t: int) -> StepCoefficients:
        """Return the row of the step from ``t`` to the level ``target``.

        "x0" is the level of clean data, "eps" that of pure noise.
        """
        alpha_bar_t, alpha_bar_target = float(self._alpha_bars[t]), float(self._targets[target][t])
        meaning: str | Prediction = prediction
        if prediction == _PREVIOUS_X:
            meaning = previous_x_prediction(alpha_bar_t, float(self._targets["prev"][t]))
        variance = variance_with_room(alpha_bar_t, alpha_bar_target, eta, f"at timestep {t}")
        return ddim_coefficients(
            alpha_bar_t,
            alpha_bar_target,
            meaning,
            variance=variance,
            # There, the gradient of cond_fn is read instead of noise:
            # eps - sqrt(1 - alpha_bar_t) * gradient.
            std_dev_added=-math.sqrt(1 - alpha_bar_t) if target == "eps" else None,
            clip_sample_range=1.0 if clip else None,
            use_clipped_model_output=clip,
        )


def _originals_x0(x: Tensor, m: Tensor, *, prediction: str) -> tuple[Tensor]:
    """Run the operations of the originals' predictions of x0."""
    k = per_sample_coefficient(x, torch.float32).expand(x.shape)
    if prediction == "sample":
        return (m,)
    return (k * m - k * x if prediction == _PREVIOUS_X else k * x - k * m,)


def _originals_results(
    x: Tensor, m: Tensor, gradient: Tensor | None, *, prediction: str, clip: bool, adds_noise: bool
) -> tuple[Tensor, Tensor]:
    """Run the operations of the originals' ``ddim_sample``; return x0 and the sample."""
    one_each = per_sample_coefficient(x, torch.float32)
    k = one_each.expand(x.shape)
    (x0,) = _originals_x0(x, m, prediction=prediction)
    x0 = x0.clamp(-1, 1) if clip else x0
    if gradient is not None:
        x0 = k * x - k * ((k * x - x0) / k - (1 - k).sqrt() * gradient)
    sample = x0 * k.sqrt() + (1 - k).sqrt() * ((k * x - x0) / k)
    return x0, sample + one_each * (1 - k) * torch.empty_like(x) if adds_noise else sample


def _attribute(diffusion: Any, name: str) -> Any:
    if not hasattr(diffusion, name):
        raise TypeError(
            f"diffusion must be a GaussianDiffusion or SpacedDiffusion of guided-diffusion or improved-diffusion, "
            f"got {type(diffusion).__name__}, which has no {name}"
        )
    return getattr(diffusion, name)


def _choice(diffusion: Any, name: str, choices: Mapping[str, Any]) -> Any:
    kind = _attribute(diffusion, name)
    if getattr(kind, "name", None) not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {kind}")
    return choices[kind.name]


def _levels(diffusion: Any, name: str) -> np.ndarray:
    given = np.asarray(_attribute(diffusion, name))
    if given.dtype == np.float16:  # 1 - alpha_bar has lost its digits
        raise TypeError(f"{name} must be float64 or float32, got {given.dtype}: the originals compute it in float64")
    levels = np.array(given, dtype=np.float64)
    if levels.shape != (_attribute(diffusion, "num_timesteps"),):
        raise ValueError(
            f"{name} must have one level for each of the {diffusion.num_timesteps} timesteps, got shape {levels.shape}"
        )
    return levels


def _check_unchanged(diffusion: Any) -> None:
    """Refuse a diffusion that overrides a method replaced here: its version would be ignored."""
    for name in _REPLACED:
        owner = next((cls.__name__ for cls in type(diffusion).__mro__ if name in vars(cls)), None)
        if owner not in (*_ORIGINALS, None) or name in getattr(diffusion, "__dict__", {}):
            raise ValueError(
                f"{name} is replaced by fused steps and must be the original's, got an override in "
                f"{type(diffusion).__name__}, which would be ignored: wrap a diffusion without it"
            )
    for name in ("ddim_sample", "ddim_sample_loop"):
        if hasattr(diffusion, name):
            expected = list(inspect.signature(getattr(FastDiffusion, name)).parameters)[1:]
            found = list(inspect.signature(getattr(diffusion, name)).parameters)
            if found not in (expected, [p for p in expected if p != "cond_fn"]):
                raise TypeError(
                    f"{name} must have the original's arguments ({', '.join(expected)}; cond_fn may be missing), "
                    f"got {', '.join(found)}: this is another library's"
                )


def _check_samples(x: Any, name: str = "x") -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(
            f"{name} must be a floating-point torch.Tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}"
        )
    if x.ndim < 2:
        raise ValueError(f"{name} must have a batch and a channel dimension, (B, C, ...), got shape {tuple(x.shape)}")


def _timesteps(t: Any, x: Any) -> Tensor:
    """Check ``t`` and return it as int64."""
    _check_samples(x)
    if not isinstance(t, Tensor) or t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
        raise TypeError(
            f"t must be a torch.Tensor of integers, got {t.dtype if isinstance(t, Tensor) else type(t).__name__}: "
            "for instance torch.full((B,), 7)"
        )
    if t.shape != x.shape[:1]:
        raise ValueError(f"t must have one timestep per sample, shape {tuple(x.shape[:1])}, got {tuple(t.shape)}")
    return t.long()


def _compute_rows(steps: RowsByTimestep, at: Tensor) -> None:
    """Compute the rows of these timesteps, so that an error comes before the model is called."""
    if at.device.type != "cpu":
        steps.table(at.device)
        return
    for t in set(at.tolist()):
        steps.row(t)


def _check_deterministic(eta: float) -> None:
    check_eta(eta)
    if eta != 0:
        raise ValueError(f"eta must be 0 in the reverse process, which is deterministic, got {eta}")


def _check_callable(name: str, function: object) -> None:
    if function is not None and not callable(function):
        raise TypeError(
            f"{name} must be a function or None, got {type(function).__name__}: where arguments are given by position, "
            "cond_fn comes before model_kwargs, as in guided-diffusion"
        )


def _check_start(model: Any, shape: Any, noise: Any, device: str | torch.device | None) -> torch.device:
    """Check what a loop starts from; return the device to sample on."""
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"shape must be a tuple or a list, (B, C, ...), got {type(shape).__name__}")
    if len(shape) < 2:
        raise ValueError(f"shape must have a batch and a channel dimension, (B, C, ...), got {tuple(shape)}")
    if device is None:
        parameter = next(iter(model.parameters()), None) if hasattr(model, "parameters") else None
        if parameter is None:
            raise ValueError("device must be given for a model without parameters, got None: pass device")
        device = parameter.device
    device = check_device("device", device)
    if noise is not None:
        _check_samples(noise, "noise")
        if noise.shape != tuple(shape):
            raise ValueError(f"noise must have the given shape, {tuple(shape)}, got {tuple(noise.shape)}")
        if noise.device.type != device.type:
            raise ValueError(f"noise must be on the device of the samples, {device}, got {noise.device}: move it")
    return device


def _last_sample(steps: Iterable[dict[str, Tensor]]) -> Tensor:
    for out in steps:
        last = out["sample"]
    return last
