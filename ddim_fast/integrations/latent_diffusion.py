"""The DDIM sampler of latent-diffusion and stable-diffusion with the update in one kernel.

``from ddim_fast.integrations.latent_diffusion import DDIMSampler`` instead of ``from
ldm.models.diffusion.ddim import DDIMSampler`` is the whole change. Interface and behaviour are
those of CompVis/latent-diffusion, CompVis/stable-diffusion and Stability-AI/stablediffusion.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels.contract import StepCoefficients
from ..plans.coefficients import (
    check_eta,
    ddim_coefficients,
    ddim_variance,
    inversion_coefficients,
    noising_coefficients,
    variance_with_room,
)
from ..utils.checks import (
    as_index,
    check_callable,
    check_choice,
    check_device,
    check_integer,
    check_number,
    check_samples,
    refuse,
    shown,
)
from ..utils.progress import tqdm
from .original_results import HALF_PRECISION, kinds_of_results, per_sample_coefficient, step_of_kind, step_with_x0
from .outputs import check_output
from .rows_by_timestep import RowsByTimestep

PARAMETERIZATIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
"""The prediction type of a model's ``parameterization``."""


class DDIMSampler:
    """A DDIM sampler (arXiv 2010.02502) for a ``LatentDiffusion`` model.

    Args:
        model: has ``num_timesteps``, ``betas``, ``alphas_cumprod`` and ``alphas_cumprod_prev``
            ``(T,)``, ``device`` and ``apply_model(x, t, c)``; for inpainting ``q_sample(x0, t)``,
            too, and for ``quantize_x0`` ``first_stage_model.quantize``. Its ``parameterization`` is
            a key of ``PARAMETERIZATIONS``, "eps" if it has none.
        schedule: stored as an attribute; the noise levels are those of the model.
        device: of the buffers that ``make_schedule`` registers; that of the model if None.

    Raises:
        TypeError, ValueError: the model has no such interface, or an unknown parameterization; there
            is no such device.
    """

    ddim_timesteps: np.ndarray
    ddim_sigmas: Tensor

    def __init__(self, model: Any, schedule: str = "linear", device: torch.device | str | None = None, **kwargs: Any):
        _warn_of_unused(kwargs, stacklevel=3)
        missing = [name for name in ("num_timesteps", "apply_model") if not hasattr(model, name)]
        if missing:
            refuse(f"model must have {' and '.join(missing)}", type(model).__name__, "a LatentDiffusion", TypeError)
        _prediction_type(model)
        if device is not None:
            check_device("device", device)
        self.model = model
        self.ddpm_num_timesteps = model.num_timesteps
        self.schedule = schedule
        self.device = device
        self._levels: dict[bool, list[tuple[float, float]]] = {}
        self._rows: dict[tuple[bool, int, float], StepCoefficients] = {}
        self._noising: dict[bool, RowsByTimestep] = {}

    def __repr__(self) -> str:
        chosen = getattr(self, "ddim_timesteps", None)
        steps = "no schedule made" if chosen is None else f"{len(chosen)} steps"
        return f"{type(self).__name__}({type(self.model).__name__}, {self.ddpm_num_timesteps} timesteps, {steps})"

    def register_buffer(self, name: str, attr: Any) -> None:
        """Set an attribute; tensors are moved to ``device``, or that of the model.

        float64 becomes float32 on a device that has no float64, such as Apple's.
        """
        if isinstance(attr, Tensor):
            device = self.model.device if self.device is None else self.device
            try:
                attr = attr.to(device)
            except TypeError:
                if attr.dtype != torch.float64:
                    raise
                attr = attr.to(torch.float32).to(device)
        setattr(self, name, attr)

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        """Choose the timesteps and compute their coefficients.

        Sets ``ddim_timesteps`` (NumPy), ``ddim_alphas``, ``ddim_alphas_prev`` (NumPy float64),
        ``ddim_sigmas`` (float64 where the device has it), ``ddim_sqrt_one_minus_alphas``,
        ``ddim_sigmas_for_original_num_steps``, and ``betas``, ``alphas_cumprod`` and what is
        derived from it, float32. They are for reading: changing them changes no step.

        Raises:
            ValueError: there is no such discretization or there are no such timesteps, see
                ``make_ddim_timesteps``; eta adds more noise than a step has room for; the model's
                noise levels are in half precision, and are not those of its betas.
        """
        self._make_schedule(ddim_num_steps, ddim_discretize, ddim_eta, verbose, "ddim_num_steps", "ddim_eta")

    def _make_schedule(
        self, count: int, method: str, eta: float, verbose: bool, count_name: str, eta_name: str
    ) -> None:
        """Run ``make_schedule``; errors call the number of steps and eta by these names."""
        total = self.ddpm_num_timesteps
        timesteps = _choose_timesteps(method, count, total, verbose, "ddim_discretize", count_name)
        check_eta(eta, eta_name)
        if tuple(self.model.alphas_cumprod.shape) != (total,):
            raise ValueError(
                f"model.alphas_cumprod must have shape ({total},), one entry for each timestep, "
                f"got {tuple(self.model.alphas_cumprod.shape)}"
            )
        alphas_cumprod, alphas_cumprod_prev = _noise_levels(self.model)
        alphas = alphas_cumprod[timesteps].tolist()
        # The step to clean data stops at the first noise level, alpha_bar of timestep 0.
        alphas_prev = [float(alphas_cumprod[0]), *alphas[:-1]]
        levels = {
            False: list(zip(alphas, alphas_prev, strict=True)),
            True: list(zip(alphas_cumprod.tolist(), alphas_cumprod_prev.tolist(), strict=True)),
        }
        # Computed now, so that errors come before anything has changed.
        rows = {
            (False, i, 1.0): _step_row(self.model, *pair, eta, 1.0, eta_name) for i, pair in enumerate(levels[False])
        }
        self._levels, self._rows, self._noising, self._eta = levels, rows, {}, float(eta)
        self.ddim_timesteps = timesteps
        self._register_buffers(alphas_cumprod, alphas_cumprod_prev)
        if verbose:
            print(f"DDIM with eta = {eta}: alphas {alphas}, alphas_prev {alphas_prev}, sigmas {self.ddim_sigmas}")

    def _register_buffers(self, alphas_cumprod: Tensor, alphas_cumprod_prev: Tensor) -> None:
        sigmas = {
            use_original_steps: [math.sqrt(ddim_variance(*pair, self._eta)) for pair in levels]
            for use_original_steps, levels in self._levels.items()
        }
        alphas, alphas_prev = torch.tensor(self._levels[False], dtype=torch.float64, device="cpu").T.contiguous()
        float32 = {
            "betas": self.model.betas.detach(),
            "alphas_cumprod": alphas_cumprod,
            "alphas_cumprod_prev": alphas_cumprod_prev,
            "sqrt_alphas_cumprod": alphas_cumprod.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - alphas_cumprod).sqrt(),
            "log_one_minus_alphas_cumprod": (1 - alphas_cumprod).log(),
            "sqrt_recip_alphas_cumprod": (1 / alphas_cumprod).sqrt(),
            "sqrt_recipm1_alphas_cumprod": (1 / alphas_cumprod - 1).sqrt(),
            "ddim_alphas": alphas,
            "ddim_sqrt_one_minus_alphas": (1 - alphas).sqrt(),
            "ddim_sigmas_for_original_num_steps": torch.tensor(sigmas[True], dtype=torch.float64, device="cpu"),
        }
        for name, attr in float32.items():
            self.register_buffer(name, attr.to(torch.float32, copy=True))
        self.register_buffer("ddim_sigmas", torch.tensor(sigmas[False], dtype=torch.float64, device="cpu"))
        self.register_buffer("ddim_alphas_prev", alphas_prev.numpy())

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Any = None,
        callback: Callable[[int], Any] | None = None,
        normals_sequence: Any = None,
        img_callback: Callable[[Tensor, int], Any] | None = None,
        quantize_x0: bool = False,
        eta: float = 0.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: dict[str, Any] | None = None,
        verbose: bool = True,
        x_T: Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        dynamic_threshold: None = None,
        ucg_schedule: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Run ``make_schedule``, uniform, and ``ddim_sampling``.

        Args:
            S: number of steps. If it does not divide T, another number is run: see
                ``make_ddim_timesteps``.
            shape: ``(C, H, W)`` of a sample.
            conditioning: what ``apply_model`` takes as c: a tensor ``(B, ...)``, a list, or a dict
                of tensors or lists.
            normals_sequence, kwargs: not used, with a warning.
            quantize_x0: pass the predicted x0 through ``first_stage_model.quantize``; a step then
                takes two kernel passes.
            verbose: print the schedule.

        The other arguments, the result and the errors are those of ``ddim_sampling``.
        """
        check_integer("batch_size", batch_size, at_least=0)
        unused = {
            **kwargs,
            **({"normals_sequence": normals_sequence} if normals_sequence is not None else {}),
            **({"x0 (without mask)": x0} if x0 is not None and mask is None else {}),
        }
        if unconditional_conditioning is None and (unconditional_guidance_scale != 1 or ucg_schedule is not None):
            unused["unconditional_guidance_scale or ucg_schedule (without unconditional_conditioning)"] = None
        _warn_of_unused(unused, stacklevel=4)
        _warn_of_batch_size(conditioning, batch_size, stacklevel=4)
        size = (batch_size, *_check_shape(shape))
        if type(self).make_schedule is DDIMSampler.make_schedule:
            self._make_schedule(S, "uniform", eta, verbose, "S", "eta")
        else:
            self.make_schedule(S, ddim_eta=eta, verbose=verbose)
        if verbose:
            print(f"DDIM: samples of shape {size}, {len(self.ddim_timesteps)} steps")
        return self.ddim_sampling(
            conditioning,
            size,
            callback=callback,
            img_callback=img_callback,
            quantize_denoised=quantize_x0,
            mask=mask,
            x0=x0,
            ddim_use_original_steps=False,
            noise_dropout=noise_dropout,
            temperature=temperature,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
            x_T=x_T,
            log_every_t=log_every_t,
            unconditional_guidance_scale=unconditional_guidance_scale,
            unconditional_conditioning=unconditional_conditioning,
            dynamic_threshold=dynamic_threshold,
            ucg_schedule=ucg_schedule,
        )

    @torch.no_grad()
    def ddim_sampling(
        self,
        cond: Any,
        shape: Sequence[int],
        x_T: Tensor | None = None,
        ddim_use_original_steps: bool = False,
        callback: Callable[[int], Any] | None = None,
        timesteps: int | None = None,
        quantize_denoised: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        img_callback: Callable[[Tensor, int], Any] | None = None,
        log_every_t: int = 100,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: dict[str, Any] | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        dynamic_threshold: None = None,
        ucg_schedule: Sequence[float] | None = None,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Run the loop over the steps.

        Args:
            shape: ``(B, C, ...)``.
            x_T: start from this noise; from ``torch.randn`` if None.
            ddim_use_original_steps: visit all timesteps, not those of ``make_schedule``.
            callback: ``callback(i)`` is called after step i.
            img_callback: ``img_callback(pred_x0, i)`` is called after step i.
            timesteps: take only the last ``timesteps`` - 1 steps, as the original counts them
                (with ``ddim_use_original_steps`` exactly ``timesteps``).
            mask, x0: inpainting: before each model call, x_t is ``model.q_sample(x0, t)`` where the
                mask is 1.
            log_every_t: the intermediates hold the first step, and those whose number from the end
                is a multiple of this.
            temperature: multiplies the noise.
            noise_dropout: probability of dropout of the noise, 0 to 1.
            score_corrector: ``score_corrector.modify_score(model, e_t, x, t, c,
                **corrector_kwargs)`` replaces e_t.
            unconditional_guidance_scale, unconditional_conditioning: classifier-free guidance by
                one batched model call, the unconditional half first. A scale of 1 turns it off.
            dynamic_threshold: must be None, as in the original.
            ucg_schedule: a guidance scale for each step.

        Returns:
            The samples, and ``{"x_inter": [...], "pred_x0": [...]}``, each list beginning with x_T.

        Raises:
            TypeError, ValueError: an argument is wrong; the model has not been called.
        """
        self._check_step(noise_dropout, temperature, score_corrector, corrector_kwargs, dynamic_threshold)
        shape = _check_shape(shape)
        if x_T is not None:
            check_samples("x_T", x_T)
        visited = self._visited(ddim_use_original_steps, timesteps)
        _check_callback("callback", callback)
        _check_callback("img_callback", img_callback)
        _check_loop(mask, x0, shape if x_T is None else x_T.shape, log_every_t, ucg_schedule, len(visited))
        device = self.model.betas.device
        img = torch.randn(shape, device=device) if x_T is None else x_T
        intermediates = {"x_inter": [img], "pred_x0": [img]}
        for i, step in enumerate(tqdm(np.flip(visited), desc="DDIM Sampler")):
            index = len(visited) - i - 1
            ts = torch.full((shape[0],), int(step), device=device, dtype=torch.long)
            if mask is not None:
                img = self.model.q_sample(x0, ts) * mask + (1.0 - mask) * img
            img, pred_x0 = self.p_sample_ddim(
                img,
                cond,
                ts,
                index=index,
                use_original_steps=ddim_use_original_steps,
                quantize_denoised=quantize_denoised,
                temperature=temperature,
                noise_dropout=noise_dropout,
                score_corrector=score_corrector,
                corrector_kwargs=corrector_kwargs,
                unconditional_guidance_scale=unconditional_guidance_scale if ucg_schedule is None else ucg_schedule[i],
                unconditional_conditioning=unconditional_conditioning,
            )
            if callback:
                callback(i)
            if img_callback:
                img_callback(pred_x0, i)
            if index % log_every_t == 0 or i == 0:
                intermediates["x_inter"].append(img)
                intermediates["pred_x0"].append(pred_x0)
        return img, intermediates

    @torch.no_grad()
    def p_sample_ddim(
        self,
        x: Tensor,
        c: Any,
        t: Tensor,
        index: int,
        repeat_noise: bool = False,
        use_original_steps: bool = False,
        quantize_denoised: bool = False,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: dict[str, Any] | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        dynamic_threshold: None = None,
    ) -> tuple[Tensor, Tensor]:
        """Take one step: a model call, and one kernel pass (two with ``quantize_denoised``).

        Args:
            x: ``(B, C, ...)``. In half precision, the results are float32.
            t: ``(B,)`` int64, the timestep given to the model.
            index: the number of the step, which alone determines the noise levels.
            repeat_noise: draw one noise for all samples.

        The other arguments and the errors are those of ``ddim_sampling``.

        Returns:
            x_prev and the predicted x0.
        """
        self._check_step(noise_dropout, temperature, score_corrector, corrector_kwargs, dynamic_threshold)
        check_samples("x", x)
        row = self._row(index, use_original_steps, temperature)
        e_t, guidance = self._predict(x, t, c, unconditional_guidance_scale, unconditional_conditioning)
        if score_corrector is not None:
            e_t, guidance = _guided(e_t, **guidance), {}
            e_t = score_corrector.modify_score(self.model, e_t, x, t, c, **(corrector_kwargs or {}))
            e_t = check_output("the output of score_corrector.modify_score", e_t, x)
        operands = (x, *_tensors(e_t, **guidance))
        x0_kind, kind = kinds_of_results(_originals_results, *operands, None, kind=_prediction_type(self.model))
        if not quantize_denoised:
            noise = _draw_noise(x, repeat_noise, noise_dropout)
            return step_with_x0(x0_kind, kind, x, e_t, row, noise=noise, **guidance)
        # One pass computes eps and x0; another takes the step from eps and the quantized x0.
        only_eps = replace(row, prev_x0=0.0, prev_eps=1.0, prev_noise=0.0)
        e_t, pred_x0 = step_with_x0(x0_kind, kind, x, e_t, only_eps, **guidance)
        quantized, _, *_ = self.model.first_stage_model.quantize(pred_x0)
        row = replace(row, x0_x=1.0, x0_m=0.0, eps_x=0.0, eps_m=1.0)
        _, kind = kinds_of_results(_originals_results, *operands, quantized, kind=_prediction_type(self.model))
        noise = _draw_noise(x, repeat_noise, noise_dropout)
        return step_of_kind(kind, quantized, e_t, row, noise=noise), quantized

    @torch.no_grad()
    def encode(
        self,
        x0: Tensor,
        c: Any,
        t_enc: int,
        use_original_steps: bool = False,
        return_intermediates: int | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        callback: Callable[[int], Any] | None = None,
        *,
        model_timesteps: str = "timestep",
    ) -> tuple[Tensor, dict[str, Any]]:
        """Encode clean data to noise, from which ``decode`` nearly reproduces it.

        Takes ``t_enc`` deterministic steps. Each is the first iteration of the inversion of a
        deterministic step: the model is given x_prev, and the timestep of x_t.

        Args:
            x0: ``(B, C, ...)``.
            return_intermediates: about how many intermediate states to return.
            model_timesteps: what the model is given as t: the "timestep" of each step, as in
                ``decode``; or its "index", as Stability-AI's ``encode`` does, to repeat encodings
                made with that.

        Returns:
            The encoded latents, and ``{"x_encoded", "intermediate_steps"}``, with
            ``return_intermediates`` also ``"intermediates"``.

        Raises:
            ValueError: an argument is wrong; the model has not been called.
        """
        check_choice("model_timesteps", model_timesteps, ("timestep", "index"))
        check_samples("x0", x0)
        _check_callback("callback", callback)
        levels = self._levels_of(use_original_steps)
        if not 0 <= check_integer("t_enc", t_enc) <= len(levels):
            raise ValueError(f"t_enc must be 0 to the {len(levels)} steps of the schedule, got {t_enc}")
        if return_intermediates is not None:
            check_integer("return_intermediates", return_intermediates)
        if return_intermediates and t_enc and not 0 < return_intermediates <= t_enc:
            raise ValueError(f"return_intermediates must be at most t_enc, {t_enc}, got {return_intermediates}")
        scale = _guidance_scale(unconditional_guidance_scale)
        if scale != 1 and unconditional_conditioning is None:
            raise ValueError(
                f"unconditional_guidance_scale={unconditional_guidance_scale} needs unconditional_conditioning, "
                "got None: pass it"
            )
        rows = [inversion_coefficients(*pair, _prediction_type(self.model)) for pair in levels[:t_enc]]
        x_next, intermediates, inter_steps = x0, [], []
        for i, step in enumerate(tqdm(self._visited(use_original_steps)[:t_enc], desc="Encoding image")):
            told = i if model_timesteps == "index" else int(step)
            t = torch.full((x0.shape[0],), told, device=self.model.device, dtype=torch.long)
            model_output, guidance = self._predict(
                x_next, t, c, unconditional_guidance_scale, unconditional_conditioning
            )
            (kind,) = kinds_of_results(_originals_encoding, x_next, *_tensors(model_output, **guidance))
            x_next = step_of_kind(kind, x_next, model_output, rows[i], noise=x_next, **guidance)
            if return_intermediates and (i % (t_enc // return_intermediates) == 0 or i >= t_enc - 2):
                intermediates.append(x_next)
                inter_steps.append(i)
            if callback:
                callback(i)
        out = {"x_encoded": x_next, "intermediate_steps": inter_steps}
        return x_next, out | ({"intermediates": intermediates} if return_intermediates else {})

    @torch.no_grad()
    def stochastic_encode(
        self, x0: Tensor, t: Tensor, use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """Noise samples to the level of step ``t``, in one pass (equation 4 of the DDIM paper).

        Args:
            x0: ``(B, C, ...)``. In half precision, the result is float32.
            t: ``(B,)`` or one number, int64: the index of a step, not a timestep. (With
                ``use_original_steps`` they are the same.)
            noise: like ``x0``; drawn from torch's generator if None.

        Raises:
            ValueError: there is no such step.
        """
        check_samples("x0", x0)
        if noise is not None:
            _check_broadcasts("noise", noise, x0.shape)
        if not isinstance(t, Tensor) or t.dtype != torch.int64 or (t.numel() != 1 and t.shape != x0.shape[:1]):
            raise ValueError(f"t must be int64, one number or one for each of the {len(x0)} samples, got {shown(t)}")
        key = bool(use_original_steps)
        levels = self._levels_of(key)
        if key not in self._noising:
            self._noising[key] = RowsByTimestep(
                len(levels),
                partial(_noising_row, levels),
                f"t counts steps from 0, so {len(levels) - 1} is the noisiest; a strength of 1, t = {len(levels)}, keeps "
                "nothing of x0: start from noise, with sample",
            )
        noise = torch.randn_like(x0) if noise is None else noise
        (kind,) = kinds_of_results(_originals_noising, x0, noise)
        x0, out = x0.to(kind.dtype), kind.empty(x0)
        return self._noising[key].step(x0, x0, t, noise=noise.to(kind.dtype).expand(x0.shape), out=out)

    @torch.no_grad()
    def decode(
        self,
        x_latent: Tensor,
        cond: Any,
        t_start: int,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        use_original_steps: bool = False,
        callback: Callable[[int], Any] | None = None,
    ) -> Tensor:
        """Take the last ``t_start`` steps from ``x_latent`` ``(B, C, ...)``.

        eta is that of ``make_schedule``.
        """
        check_samples("x_latent", x_latent)
        _check_callback("callback", callback)
        if t_start is not None:
            check_integer("t_start", t_start)
        visited = self._visited(use_original_steps)[:t_start]
        x_dec = x_latent
        for i, step in enumerate(tqdm(np.flip(visited), desc="Decoding image")):
            ts = torch.full((x_latent.shape[0],), int(step), device=x_latent.device, dtype=torch.long)
            x_dec, _ = self.p_sample_ddim(
                x_dec,
                cond,
                ts,
                index=len(visited) - i - 1,
                use_original_steps=use_original_steps,
                unconditional_guidance_scale=unconditional_guidance_scale,
                unconditional_conditioning=unconditional_conditioning,
            )
            if callback:
                callback(i)
        return x_dec

    def _levels_of(self, use_original_steps: bool) -> list[tuple[float, float]]:
        """Return (alpha_bar_t, alpha_bar_prev) of each step, the least noisy first."""
        if not self._levels:
            raise ValueError(
                "a step needs a schedule, got none yet: call make_schedule first, for instance "
                "sampler.make_schedule(ddim_num_steps=50)"
            )
        return self._levels[bool(use_original_steps)]

    def _visited(self, use_original_steps: bool, timesteps: int | None = None) -> np.ndarray:
        """Return the timesteps, increasing: all, or as many as the original means."""
        count = len(self._levels_of(use_original_steps))
        if timesteps is not None:
            (check_integer if use_original_steps else check_number)("timesteps", timesteps)
        if timesteps is not None and not 1 <= timesteps <= (count if use_original_steps else math.inf):
            raise ValueError(f"timesteps must be 1 to the {count} steps of the schedule, got {timesteps}")
        if use_original_steps:
            return np.arange(count if timesteps is None else timesteps)
        # The original's rounding: one step fewer than asked for.
        return self.ddim_timesteps[: None if timesteps is None else int(min(timesteps / count, 1) * count) - 1]

    def _row(self, index: int, use_original_steps: bool, temperature: float = 1.0) -> StepCoefficients:
        try:
            key = bool(use_original_steps), as_index(index), float(temperature)
        except TypeError:
            refuse("index must be an integer, that of a step of the schedule", index, kind=TypeError)
        if key not in self._rows:
            levels = self._levels_of(use_original_steps)
            if not 0 <= index < len(levels):
                raise ValueError(f"index must be 0 to {len(levels) - 1}, that of a step of the schedule, got {index}")
            self._rows[key] = _step_row(self.model, *levels[index], self._eta, float(temperature))
        return self._rows[key]

    def _predict(
        self, x: Tensor, t: Tensor, c: Any, guidance_scale: float, unconditional_conditioning: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the model's output, and the arguments of ``ddim_step`` for guidance."""
        scale = 1.0 if unconditional_conditioning is None else _guidance_scale(guidance_scale)
        if scale == 1:
            return _checked_output(self.model.apply_model(x, t, c), x), {}
        if not isinstance(t, Tensor) or t.ndim < 1:
            refuse("t must be a tensor (B,)", t, kind=TypeError)
        both = _one_batch(unconditional_conditioning, c)
        output = self.model.apply_model(torch.cat([x] * 2), torch.cat([t] * 2), both)
        uncond, cond = _checked_output(output, x, (2 * len(x), *x.shape[1:])).chunk(2)
        return cond, {"model_output_uncond": uncond, "guidance_scale": scale}

    def _check_step(
        self, noise_dropout: float, temperature: float, score_corrector, corrector_kwargs, dynamic_threshold
    ) -> None:
        check_number("noise_dropout", noise_dropout, at_least=0, at_most=1)
        check_number("temperature", temperature)
        if score_corrector is not None and _prediction_type(self.model) != "epsilon":
            raise ValueError(
                "a score_corrector corrects predicted noise and needs a model with parameterization 'eps', "
                f"got {self.model.parameterization!r}: leave it out"
            )
        if score_corrector is not None:
            check_callable("score_corrector.modify_score", getattr(score_corrector, "modify_score", None))
        if corrector_kwargs is not None and not isinstance(corrector_kwargs, Mapping):
            refuse("corrector_kwargs must be a dict or None", corrector_kwargs, kind=TypeError)
        if dynamic_threshold is not None:
            raise ValueError(f"dynamic_threshold must be None, as in the original, got {shown(dynamic_threshold)}")


def make_ddim_timesteps(
    ddim_discr_method: str, num_ddim_timesteps: int, num_ddpm_timesteps: int, verbose: bool = True
) -> np.ndarray:
    """Choose the timesteps, increasing, each one later than its spacing says.

    "uniform" takes every (T // S)-th, which are S timesteps only if S divides T, and more
    otherwise; "quad" spaces them quadratically up to 0.8 T, and repeats some.

    Raises:
        ValueError: there is no such method; a timestep is T, which does not exist (with "uniform",
            where T // S divides T - 1).
    """
    total = check_integer("num_ddpm_timesteps", num_ddpm_timesteps, at_least=1)
    return _choose_timesteps(
        ddim_discr_method, num_ddim_timesteps, total, verbose, "ddim_discr_method", "num_ddim_timesteps"
    )


def _choose_timesteps(
    method: str, count: int, total: int, verbose: bool, method_name: str, count_name: str
) -> np.ndarray:
    """Run ``make_ddim_timesteps``; errors call the method and the number of steps by these names."""
    check_choice(method_name, method, ("uniform", "quad"))
    if method == "uniform":
        count = check_integer(count_name, count, at_least=1, at_most=total)
        steps = np.arange(0, total, total // count)
    else:
        count = check_integer(count_name, count, at_least=1)
        steps = (np.linspace(0, math.sqrt(total * 0.8), count) ** 2).astype(int)
    steps = steps + 1
    if steps[-1] >= total:
        fewer = next(s for s in range(min(count, total), 0, -1) if s == 1 or (total - 1) % (total // s))
        every = f", or all {total} by ddim_sampling(..., ddim_use_original_steps=True)" if count > total // 2 else ""
        raise ValueError(
            f"{method} timesteps must end at the model's last one, {total - 1}, or before, "
            f"got {steps[-1]} for {count_name}={count}: "
            f"take {fewer} steps{every}"
        )
    if verbose:
        print(f"DDIM timesteps: {steps}")
    return steps


def _tensors(
    model_output: Tensor, model_output_uncond: Tensor | None = None, guidance_scale: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    return model_output, model_output_uncond


def _originals_results(
    x: Tensor, m: Tensor, uncond: Tensor | None, quantized: Tensor | None, *, kind: str
) -> tuple[Tensor, Tensor]:
    """Run the operations of the original's ``p_sample_ddim``; return x0 and x_prev."""
    k = per_sample_coefficient(x)
    m = m if uncond is None else uncond + 1.0 * (m - uncond)
    e_t, x0 = m, (x - k * m) / k
    if kind == "v_prediction":
        e_t, x0 = k * m + k * x, k * x - k * m
    elif kind == "sample":
        e_t, x0 = x0, m * 1
    if quantized is not None:
        x0 = quantized
    noise = torch.empty(x.shape, dtype=torch.get_default_dtype(), device=x.device)
    return x0, k * x0 + k * e_t + k * noise


def _originals_encoding(x: Tensor, m: Tensor, uncond: Tensor | None) -> tuple[Tensor]:
    """Run the operations of a step of the original's ``encode``.

    Its coefficients have no dimensions: unlike in ``p_sample_ddim``, half precision stays.
    """
    k = torch.empty((), device=x.device, dtype=torch.float32)
    return (k * x + k * (m if uncond is None else uncond + 1.0 * (m - uncond)),)


def _originals_noising(x0: Tensor, noise: Tensor) -> tuple[Tensor]:
    """Run the operations of the original's ``stochastic_encode``."""
    k = per_sample_coefficient(x0, torch.float32)
    return (k * x0 + k * noise,)


def _step_row(
    model: Any, alpha_bar_t: float, alpha_bar_prev: float, eta: float, temperature: float, eta_name: str = "eta"
) -> StepCoefficients:
    variance = variance_with_room(alpha_bar_t, alpha_bar_prev, eta, name=eta_name)
    return ddim_coefficients(
        alpha_bar_t,
        alpha_bar_prev,
        _prediction_type(model),
        variance=variance,
        std_dev_added=math.sqrt(variance) * temperature,
    )


def _noising_row(levels: Sequence[tuple[float, float]], index: int) -> StepCoefficients:
    return noising_coefficients(levels[index][0])


def _noise_levels(model: Any) -> tuple[Tensor, Tensor]:
    """Return alpha_bar_t and alpha_bar_prev of every timestep, in float64 on the host.

    In half precision, as after ``model.half()``, 1 - alpha_bar has lost most of its digits; the
    betas, which are small, have not.
    """
    levels = model.alphas_cumprod.detach().cpu()
    if levels.dtype not in HALF_PRECISION and model.alphas_cumprod_prev.dtype not in HALF_PRECISION:
        return levels.double(), model.alphas_cumprod_prev.detach().cpu().double()
    betas = model.betas.detach().cpu()
    found = torch.cumprod(1 - betas.double(), 0)
    allowed = 2 * max(torch.finfo(dtype).eps for dtype in (levels.dtype, betas.dtype))
    if found.shape != levels.shape or not (found - levels.double()).abs().max() <= allowed:
        raise ValueError(
            f"model.alphas_cumprod must be float32 or float64 where it is not the product of 1 - model.betas, "
            f"got {levels.dtype}: convert the network alone (model.model.half()), not the noise levels"
        )
    return found, torch.cat([torch.ones(1, dtype=torch.float64, device=found.device), found[:-1]])


def _prediction_type(model: Any) -> str:
    parameterization = getattr(model, "parameterization", "eps")
    if parameterization not in PARAMETERIZATIONS:
        raise ValueError(
            f"model.parameterization must be one of {', '.join(PARAMETERIZATIONS)}, got {parameterization!r}"
        )
    return PARAMETERIZATIONS[parameterization]


def _check_shape(shape: Any) -> tuple[int, ...]:
    try:
        sizes = tuple(as_index(size) for size in shape)
    except TypeError:
        refuse("shape must be a sequence of integers", shape, kind=TypeError)
    if not sizes or min(sizes) < 0:
        refuse("shape must have sizes of at least 0", sizes)
    return sizes


def _check_callback(name: str, function: object) -> None:
    if function:
        check_callable(name, function, "a function, or None")


def _check_broadcasts(name: str, value: Any, shape: Sequence[int]) -> None:
    """Raise an error unless ``value`` is a tensor of real numbers that broadcasts to ``shape``."""
    rule = f"{name} must be a tensor that broadcasts to the samples, {tuple(shape)}"
    if not isinstance(value, Tensor) or value.is_complex() or value.layout != torch.strided:
        refuse(rule, value, kind=TypeError)
    sizes = value.shape
    if len(sizes) > len(shape) or any(a not in (1, b) for a, b in zip(reversed(sizes), reversed(shape), strict=False)):
        refuse(rule, tuple(sizes))


def _guidance_scale(value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return check_number("unconditional_guidance_scale", value)


def _checked_output(output: object, x: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    remedy = "does the conditioning fit the samples?"
    return check_output("the output of model.apply_model", output, x, shape, remedy)


def _check_loop(mask: Any, x0: Any, shape: Sequence[int], log_every_t: int, ucg_schedule: Any, num_steps: int) -> None:
    """Check what only a loop takes; ``shape`` is that of its samples."""
    if mask is not None and x0 is None:
        raise ValueError("mask needs x0, whose masked region is kept, got None: pass x0")
    if mask is not None:
        if not isinstance(mask, Real):
            _check_broadcasts("mask", mask, shape)
        if isinstance(x0, Tensor):  # what else it may be is for the model's q_sample to say
            _check_broadcasts("x0", x0, shape)
    check_integer("log_every_t", log_every_t, at_least=1)
    if ucg_schedule is not None:
        try:
            num_scales = len(ucg_schedule)
        except TypeError:
            refuse("ucg_schedule must be a sequence of guidance scales", ucg_schedule, kind=TypeError)
        if num_scales != num_steps:
            raise ValueError(f"ucg_schedule must have one scale for each of the {num_steps} steps, got {num_scales}")


def _draw_noise(x: Tensor, repeat_noise: bool, noise_dropout: float) -> Tensor:
    """Draw noise like ``x`` in torch's default dtype.

    It is drawn even where a step adds none, so that the random stream stays the original's.
    """
    if repeat_noise:
        noise = torch.randn((1, *x.shape[1:]), device=x.device).expand(x.shape).contiguous()
    else:
        noise = torch.randn(x.shape, device=x.device)
    return torch.nn.functional.dropout(noise, p=noise_dropout) if noise_dropout > 0 else noise


def _guided(e_t: Tensor, model_output_uncond: Tensor | None = None, guidance_scale: float = 1.0) -> Tensor:
    """Compute the guided output as a tensor, for a score corrector."""
    return e_t if model_output_uncond is None else torch.lerp(model_output_uncond, e_t, guidance_scale)


def _one_batch(uncond: Any, cond: Any) -> Any:
    """Concatenate conditioning (tensors, lists, dicts) along the batch, ``uncond`` first."""
    if isinstance(cond, dict) and isinstance(uncond, dict) and cond.keys() == uncond.keys():
        return {key: _one_batch(uncond[key], cond[key]) for key in cond}
    if isinstance(cond, list) and isinstance(uncond, list) and len(cond) == len(uncond):
        return [_one_batch(u, c) for u, c in zip(uncond, cond, strict=True)]
    if isinstance(cond, Tensor) and isinstance(uncond, Tensor):
        if cond.ndim < 1 or uncond.shape[1:] != cond.shape[1:] or uncond.ndim < 1 or uncond.device != cond.device:
            refuse(
                f"unconditional_conditioning must have the shape of conditioning, {tuple(cond.shape)}, and its device",
                f"{tuple(uncond.shape)} on {uncond.device}",
            )
        return torch.cat([uncond, cond])
    raise ValueError(
        "unconditional_conditioning must have the structure of conditioning: tensors, lists of the same length, "
        f"dicts with the same keys, got {_outline(uncond)} beside {_outline(cond)}"
    )


def _outline(conditioning: Any) -> str:
    if isinstance(conditioning, dict):
        return f"a dict with the keys {list(conditioning)}"
    return f"a list of {len(conditioning)}" if isinstance(conditioning, list) else f"a {type(conditioning).__name__}"


def _batch_sizes(conditioning: Any) -> Iterable[int]:
    if isinstance(conditioning, (dict, list)):
        for part in conditioning.values() if isinstance(conditioning, dict) else conditioning:
            yield from _batch_sizes(part)
    elif isinstance(conditioning, Tensor) and conditioning.ndim:
        yield conditioning.shape[0]


def _warn_of_batch_size(conditioning: Any, batch_size: int, stacklevel: int) -> None:
    if wrong := sorted(set(_batch_sizes(conditioning)) - {batch_size}):
        warnings.warn(f"batch_size is {batch_size}, got conditioning for {wrong[0]} samples", stacklevel=stacklevel)


def _warn_of_unused(arguments: dict[str, Any], stacklevel: int) -> None:
    if arguments:
        warnings.warn(
            f"the sampler ignores {', '.join(arguments)}, as the original does: leave it out",
            stacklevel=stacklevel,
        )
