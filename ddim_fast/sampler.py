"""The sampler: what is to be computed, and the methods that run it."""

from __future__ import annotations

import inspect
import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn, overload

import torch
from torch import Tensor, nn

from .models.mismatch import warn_of_schedule, warn_of_training
from .models.protocol import Model, check_model
from .plans.choice import TimestepsArgument, choose_timesteps, read_if_file
from .plans.clipping import Clipping
from .plans.eta import PAPER
from .plans.history_weights import HistoryWeights
from .plans.path import NoisePath
from .plans.plan import SamplingPlan
from .plans.rows import check_rows
from .plans.words import EtaScales, PredictionType, Spacing
from .sampling import editing, inversion, parallel, rollout, run
from .sampling.capture import GRAPHS, GraphCache
from .sampling.captured_run import CapturedRun
from .sampling.guidance import GuidanceScale
from .sampling.loop import Trajectory
from .sampling.options import (
    EditKeywords,
    InpaintKeywords,
    InvertKeywords,
    ParallelKeywords,
    ReconstructKeywords,
    RolloutKeywords,
    SampleKeywords,
    options_of,
    shows_keywords,
)
from .sampling.parallel import ParallelStatistics
from .sampling.rollout import Rollout
from .utils.suggestions import suggests_names
from .utils.warn import warn_caller

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from .sampling.optimize import OptimizedModel


class DDIMSampler:
    """Sample a diffusion model by DDIM (Song, Meng, Ermon 2020, arXiv 2010.02502): equation 12 over
    a chosen part of the timesteps.

    A sampler is frozen: ``sampler.replace(eta=1.0)`` makes another one. Samplers that compute the
    same are equal. They can be copied and pickled; captured graphs stay behind.

    Args:
        schedule: the noise schedule that the model was trained with: a ``NoiseSchedule``, or one in
            continuous time, such as ``FlowSchedule`` or ``EDMSchedule``.
        num_inference_steps: S, how many timesteps to visit; 50 if neither it nor ``timesteps`` is
            given.
        eta: how much noise steps add: 0 is deterministic DDIM; 1 adds the noise of DDPM. One
            number, or one for each step: 0 for those without noise.
        timesteps: instead of a number: an explicit list; a respacing string such as "ddim50" or
            "10,15,20"; or a file that ``ddim-fast search`` wrote (a path that ends in .json, or a
            ``TimestepList``).
        model_timesteps: the timestep given to the model at each of these, where it is a different
            one (arXiv 2310.09469, 2405.15506). None: what the file of timesteps says, or else the
            timesteps visited.
        timestep_spacing: how S timesteps are chosen, a key of ``plans.timesteps.SPACINGS``, or of
            ``plans.continuous.CONTINUOUS_SPACINGS`` for a schedule in continuous time. None: the
            schedule's own, which is "leading" for a ``NoiseSchedule``. One step of "leading",
            "linspace", "uniform" or "quad" is at the cleanest timestep, which warns.
        steps_offset: added to the timesteps of "leading" spacing.
        prediction_type: "epsilon", "sample", "v_prediction", "flow", "score" or "edm", see
            ``PREDICTION_TYPES``. None: what the model says of itself, or else what the coefficients
            in a file of timesteps are for, with a warning where that is not the schedule's own, or
            else the schedule's own: "epsilon" for a ``NoiseSchedule``, "flow" for a
            ``FlowSchedule``.
        order: 2 for the multistep form of DDIM, of second order (DPM-Solver++(2M), arXiv
            2211.01095): nearer to the result of many steps with the same model calls; with eta it
            is that solver's SDE form. 3 for the third order, which needs eta = 0. None: what the
            file of timesteps was searched for, or else 1.
        analytic_variance: add the noise of Analytic-DPM (arXiv 2201.06503), whose variance follows
            from the mean squared error of the model's eps: one number for each timestep, or True
            for those in the file of timesteps.
        history_weights: the weights of the x0 that earlier steps predicted, a pair for each step,
            in place of those of an order: see ``SamplingPlan``. None: what the file of timesteps
            says, unless ``order`` is given, which asks for the textbook's.
        eta_scales: what eta means: "std_dev", "variance", "flow_grpo" or "cps", see
            ``SamplingPlan``.
        sigma_hat, set_alpha_to_one: see ``SamplingPlan``.
        clip_sample: clip the predicted x0 to [-clip_sample_range, clip_sample_range]. None: if the
            model states a range.
        clip_sample_range: half the width of the range of clean samples. None: the model's, or else
            1.
        use_clipped_model_output: derive eps again from the clipped x0.
        thresholding: dynamic thresholding (arXiv 2205.11487): x0 is scaled by its
            ``dynamic_thresholding_ratio`` quantile, at most ``sample_max_value``, before it is
            clipped.
        graphs: where CUDA graphs are kept; None for one cache that all samplers share.

    Raises:
        TypeError, ValueError: an argument breaks a rule; the message states the rule and the
            remedy.
    """

    schedule: NoisePath
    num_inference_steps: int
    eta: float | tuple[float, ...]
    timesteps: tuple[float, ...]
    model_timesteps: tuple[float, ...]
    timestep_spacing: str
    steps_offset: int
    prediction_type: str | None
    order: int
    analytic_variance: bool | tuple[float, ...]
    history_weights: HistoryWeights | None
    eta_scales: str
    sigma_hat: bool
    set_alpha_to_one: bool
    clip_sample: bool | None
    clip_sample_range: float | None
    use_clipped_model_output: bool
    thresholding: bool
    dynamic_thresholding_ratio: float
    sample_max_value: float
    graphs: GraphCache
    _given: Mapping[str, Any]
    _clipping: Clipping
    _plan: SamplingPlan
    _finished_plan: Callable[..., SamplingPlan]
    _fitted_type: str | None

    @suggests_names
    def __init__(
        self,
        schedule: NoisePath,
        num_inference_steps: int | None = None,
        eta: float | Sequence[float] = 0.0,
        *,
        timesteps: TimestepsArgument = None,
        model_timesteps: Sequence[float] | None = None,
        timestep_spacing: Spacing | None = None,
        steps_offset: int = 0,
        prediction_type: PredictionType | None = None,
        order: int | None = None,
        analytic_variance: bool | Sequence[float] = False,
        history_weights: Sequence[Sequence[float]] | None = None,
        eta_scales: EtaScales = PAPER,
        sigma_hat: bool = False,
        set_alpha_to_one: bool = True,
        clip_sample: bool | None = None,
        clip_sample_range: float | None = None,
        use_clipped_model_output: bool = False,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        graphs: GraphCache | None = None,
    ):
        given = {name: value for name, value in locals().items() if name != "self"}
        if not isinstance(schedule, NoisePath):
            raise TypeError(
                f"schedule must be a NoiseSchedule, or one in continuous time, got {_kind(schedule)}: {_path_meant(schedule)}"
            )
        clipping = Clipping(**{name: given[name] for name in Clipping.__dataclass_fields__})
        name_of_file = os.fspath(timesteps) if isinstance(timesteps, (str, os.PathLike)) else "the list of timesteps"
        given["timesteps"] = read_if_file(timesteps)
        chosen = choose_timesteps(
            timesteps_name=name_of_file,
            **{
                name: given[name]
                for name in (
                    "schedule",
                    "num_inference_steps",
                    "timesteps",
                    "model_timesteps",
                    "timestep_spacing",
                    "steps_offset",
                    "order",
                    "analytic_variance",
                    "history_weights",
                )
            },
        )
        for name in ("timesteps", "model_timesteps", "analytic_variance"):  # a list of the caller's may change
            given[name] = tuple(given[name]) if isinstance(given[name], list) else given[name]
        if history_weights is not None:
            given["history_weights"] = chosen.history_weights
        # All but what a model may decide; checked now, with a prediction type that cannot fail at
        # zero SNR.
        _check_fitted_type(chosen.prediction_type, prediction_type or chosen.prediction_type)
        early_type = prediction_type or chosen.prediction_type or "v_prediction"
        plan = SamplingPlan(
            schedule,
            chosen.timesteps,
            prediction_type=early_type,
            eta=eta,  # type: ignore[arg-type]  # it checks
            eta_scales=eta_scales,
            sigma_hat=sigma_hat,
            set_alpha_to_one=set_alpha_to_one,
            clip_sample_range=_early_range(clipping),
            use_clipped_model_output=use_clipped_model_output,
            order=chosen.order,
            eps_residual=chosen.eps_residual,
            model_timesteps=chosen.model_timesteps,
            thresholding=clipping.threshold,
            history_weights=chosen.history_weights,
        )
        given["eta"] = plan.eta
        if chosen.rows is not None:
            check_rows(chosen.rows, plan, name_of_file)
        self.__dict__.update(
            given,
            num_inference_steps=len(plan.timesteps),
            timesteps=plan.timesteps,
            model_timesteps=plan.model_timesteps,
            order=plan.order,
            history_weights=plan.history_weights,
            timestep_spacing=schedule.default_spacing if timestep_spacing is None else timestep_spacing,
            clip_sample=clipping.asked_for,
            graphs=GRAPHS if graphs is None else graphs,
            _given=given,
            _clipping=clipping,
            _plan=plan,
            _finished_plan=lru_cache(maxsize=16)(partial(replace, plan)),
            _fitted_type=chosen.prediction_type,
        )

    # ---- a value: frozen, equal to others, copied and pickled ---------------------------------------------

    def replace(self, **changes: Any) -> Self:
        """Return this sampler with other values for some of the constructor's arguments.

        >>> sampler.replace(num_inference_steps=20, eta=1.0)

        Raises:
            TypeError, ValueError: as the constructor; a number of steps contradicts an explicit
                list of timesteps unless ``timesteps=None`` is passed with it.
        """
        return type(self)(**{**self._given, **changes})

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(
            f"a DDIMSampler is frozen, got sampler.{name} = {reprlib.repr(value)}: make another with sampler.replace({name}=...)"
        )

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a DDIMSampler is frozen, got del sampler.{name}: make another with sampler.replace(...)")

    def __repr__(self) -> str:
        defaults = inspect.signature(type(self)).parameters
        shown = {
            name: value
            for name, value in self._given.items()
            if name != "schedule" and (name == "num_inference_steps" or value is not defaults[name].default)
        }
        shown["num_inference_steps"] = self.num_inference_steps
        values = [repr(self.schedule), *(f"{name}={reprlib.repr(value)}" for name, value in shown.items())]
        return f"{type(self).__name__}({', '.join(values)})"

    def _identity(self) -> tuple[object, ...]:
        return self._plan, self.prediction_type, self.clip_sample, self.clip_sample_range

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DDIMSampler) or type(other) is not type(self):
            return NotImplemented
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), dict(self._given))

    # ---- what a run computes -----------------------------------------------------------------------------------

    def plan(self, model: Model | None = None) -> SamplingPlan:
        """Return the steps of a run with this model. What the sampler leaves open is taken from the
        model's attributes, then from defaults.

        It warns of a model that was trained with another schedule (its attribute ``schedule``), and
        of a module in training mode with dropout or batch normalization.

        Raises:
            TypeError: the model cannot be called as one.
            ValueError: sampler and model name different prediction types.
        """
        if model is not None:
            check_model(model)
            warn_of_schedule(model, self.schedule)
            warn_of_training(model)
        stated = getattr(model, "prediction_type", None)
        if stated is not None and self.prediction_type not in (None, stated):
            raise ValueError(
                f"prediction_type must be the model's, {stated!r}, or left out, got prediction_type={self.prediction_type!r} in the "
                "sampler: leave it out"
            )
        prediction_type = self.prediction_type or stated or self._fitted_type or self.schedule.default_prediction_type
        _check_fitted_type(self._fitted_type, prediction_type)
        if (
            self._fitted_type not in (None, self.prediction_type, stated, self.schedule.default_prediction_type)
            and model is not None
        ):
            warn_caller(
                f"a model that does not say what it predicts is taken for what the coefficients in timesteps are for, "
                f"{self._fitted_type!r}, got one without prediction_type: pass prediction_type={self._fitted_type!r}, or give a "
                "file that was searched with this model"
            )
        clip_range = self._clipping.half_range(model)
        if (prediction_type, clip_range) == (self._plan.prediction_type, self._plan.clip_sample_range):
            return self._plan
        return self._finished_plan(prediction_type=prediction_type, clip_sample_range=clip_range)

    def last_steps(self, count: int) -> Self:
        """Return this sampler with the last ``count`` of its steps alone."""
        last = self._plan.last_steps(count)
        return self.replace(
            num_inference_steps=None,
            timesteps=last.timesteps,
            eta=last.eta,
            model_timesteps=last.model_timesteps,
            order=self.order if last.history_weights is None else None,
            analytic_variance=last.eps_residual or False,
            history_weights=last.history_weights,
        )

    def _unclipped(self) -> Self:
        """Return this sampler without the clipping that only the model suggests.

        Raises:
            ValueError: the sampler itself was asked to clip.
        """
        self._clipping.check_unclipped()
        return self.replace(clip_sample=False)

    # ---- methods -----------------------------------------------------------------------------------------------

    @overload
    def sample(
        self,
        model: Model,
        shape: Sequence[int] | None = None,
        *,
        return_trajectory: Literal[False] = False,
        **options: Unpack[SampleKeywords],
    ) -> Tensor: ...

    @overload
    def sample(
        self,
        model: Model,
        shape: Sequence[int] | None = None,
        *,
        return_trajectory: Literal[True],
        **options: Unpack[SampleKeywords],
    ) -> Trajectory: ...

    @overload
    def sample(
        self,
        model: Model,
        shape: Sequence[int] | None = None,
        *,
        return_trajectory: bool,
        **options: Unpack[SampleKeywords],
    ) -> Tensor | Trajectory: ...

    @shows_keywords(SampleKeywords)
    def sample(
        self,
        model: Model,
        shape: Sequence[int] | None = None,
        *,
        return_trajectory: bool = False,
        **options: Unpack[SampleKeywords],
    ) -> Tensor | Trajectory:
        """Draw samples: from noise x_T, one model call and one fused update per step.

        Args:
            model: any callable, see ``models.Model``. Called under ``torch.no_grad()``.
            shape: ``(B, C, ...)``. May be left out where ``x_T`` or ``known_x0`` is given, whose
                device and dtype the samples then have; and where the model has a ``sample_shape``,
                ``(C, ...)``: then B is the number of ``seeds``, or else 1.
            seed: one number for the run; sample i gets its own seed from it (``sample_seeds``).
            seeds: instead: one 64-bit seed per sample. A sample depends on its own seed alone.
            generator: instead: noise from this ``torch.Generator``, by torch's own randn. With none
                of the three, a seed is drawn from torch's global generator (``torch.manual_seed``
                fixes it), if noise is needed.
            x_T: start from this noise ``(B, C, ...)`` (it is not changed).
            conditioning: passed to the model by name, for instance ``{"class_labels": labels}``.
            guidance_scale: classifier-free guidance (arXiv 2207.12598), 1 for none: the model is
                called twice per step, the second time with ``unconditional_conditioning``, or with
                what ``model.unconditional(conditioning)`` returns. A number, one number for each
                step in order, or a function of the timestep.
            guidance_rescale: in [0, 1], how far the standard deviation of the guided output over
                each sample is brought back to that of the conditional one (phi of arXiv 2305.08891,
                section 3.4). Guidance then takes a few torch operations before the step.
            cond_fn: classifier guidance (arXiv 2105.05233): ``cond_fn(x_t, t, **conditioning)``
                returns the gradient of log p(y | x_t) by x_t, times a scale if wanted, like x_t.
                Called with gradients enabled, and a copy of x_t::

                    def cond_fn(x_t, t, y):
                        log_p = classifier(x_t.requires_grad_(), t).log_softmax(-1)[range(len(y)), y]
                        return torch.autograd.grad(log_p.sum(), x_t)[0]

            mask, known_x0: with both, inpainting, see ``inpaint``. ``x_T`` is blended with the
                known picture, too.
            device: where samples are drawn.
            dtype: of the samples. Half precision is computed in float32 and stored in half.
            model_dtype: of the model's input, where it differs: a half-precision model beside
                float32 samples.
            progress: show a progress bar.
            callback: called after each step as ``callback(step, t, x_t, x0)``: the number of the
                step, its timestep, the noisy samples that the model saw, and the x0 predicted from
                them. The run stops early if it returns True.
            return_trajectory: return every state as a ``Trajectory`` instead of the samples.
            timing: a ``Timing``, to which the seconds spent in the model and in the update are
                added.
            check_finite: look for NaN and infinity in the samples at the end, and warn; a second run
                from the same noise then finds the step (except where a generator drew it). None:
                where the samples are on the CPU, since the host would wait for a GPU.
            backend: of the update, a name in ``kernels.dispatch.BACKENDS``.
            normals: how seeds become the noise of steps: "exact", the same bits everywhere; or
                "fast" (see ``ddim_step``).
            capture: on a CUDA device, run the steps as CUDA graphs, captured in the first call and
                replayed in later ones (see ``sampling.capture.GraphCache``): "step", one graph that
                is replayed for each step; "loop", all steps and model calls in one; "off"; or
                "auto": "step" for an ``nn.Module`` that can be captured, with one warning where it
                cannot. The model is called a few more times before the first capture. With
                ``cond_fn`` nothing is captured.
            reuse_output: with a captured loop, return its own memory, which the next call
                overwrites, instead of a copy.

        Returns:
            Samples ``shape`` on ``device``, or a ``Trajectory``.

        Raises:
            TypeError, ValueError: an argument breaks a rule, or the model returns the wrong thing.
        """
        keywords = options_of("sample", SampleKeywords, options, return_trajectory)
        return run.sample(self.plan(model), model, shape, keywords, self.graphs)

    @shows_keywords(SampleKeywords)
    def capture(
        self, model: Model, shape: Sequence[int] | None = None, **options: Unpack[SampleKeywords]
    ) -> CapturedRun:
        """Capture a run as a CUDA graph that is yours: ``captured.sample(seeds=...)`` replays it.

        For those who know their model: nothing about it is looked up or checked in a call, so no
        change to it but that of weights in place has an effect. ``close()``, or the end of a
        ``with``, frees its memory; ``graphs`` does not hold it.

        Args:
            options: those of ``sample``, in every call that does not give others.
                ``capture="step"`` ("auto" is the same) or ``"loop"``. With a callback, calls may
                have another.

        Raises:
            CaptureError: the model cannot be captured.
            TypeError, ValueError: as ``sample``.
        """
        keywords = options_of("capture", SampleKeywords, options)
        return CapturedRun(self.plan(model), model, shape, keywords, self.graphs)

    @shows_keywords(RolloutKeywords)
    def rollout(
        self,
        model: Model,
        shape: Sequence[int] | None = None,
        *,
        noisy_steps: Sequence[int] | None = None,
        keep_states: bool = True,
        **options: Unpack[RolloutKeywords],
    ) -> Rollout:
        """Draw samples with all that reinforcement learning on the steps needs: states,
        log-probabilities, and the log-probability of a step under the model being trained.

        The log-probabilities are taken in each step's own pass over memory. Memory beside what
        ``sample`` takes: one state, as large as the samples, where a noisy step starts or ends, so N
        + 1 for N noisy steps in a row; and 4 N B bytes of log-probabilities.

        Args:
            noisy_steps: the numbers of the steps with noise, increasing; the others are
                deterministic. None: every step that adds noise with the sampler's eta: all but the
                last, which leads to clean data.
            keep_states: False keeps no states: ``Rollout.replay`` runs again from the seeds.
            generator: as for ``sample``, where the states are kept.
            log_prob_reduction, min_std: see ``ddim_step``. With ``min_std``, steps that add no noise
                may be among ``noisy_steps``.
            options: those of ``sample``. On a CUDA device a graph of one step is replayed:
                ``capture="loop"`` is refused, since states are copied between steps.

        Returns:
            A ``Rollout``.

        Raises:
            TypeError, ValueError: as ``sample``; or no step adds noise, one of ``noisy_steps`` does
                not, or the sampler has order 2 or dynamic thresholding.
        """
        keywords = options_of("rollout", RolloutKeywords, options)
        return rollout.rollout(
            self.plan(model), model, shape, keywords, self.graphs, noisy_steps=noisy_steps, keep_states=keep_states
        )

    @overload
    def img2img(
        self,
        model: Model,
        x0: Tensor,
        strength: float,
        *,
        return_trajectory: Literal[False] = False,
        **options: Unpack[EditKeywords],
    ) -> Tensor: ...

    @overload
    def img2img(
        self,
        model: Model,
        x0: Tensor,
        strength: float,
        *,
        return_trajectory: Literal[True],
        **options: Unpack[EditKeywords],
    ) -> Trajectory: ...

    @overload
    def img2img(
        self,
        model: Model,
        x0: Tensor,
        strength: float,
        *,
        return_trajectory: bool,
        **options: Unpack[EditKeywords],
    ) -> Tensor | Trajectory: ...

    @shows_keywords(EditKeywords)
    def img2img(
        self,
        model: Model,
        x0: Tensor,
        strength: float,
        *,
        return_trajectory: bool = False,
        **options: Unpack[EditKeywords],
    ) -> Tensor | Trajectory:
        """Regenerate pictures from rough ones (SDEdit, Meng et al. 2021, arXiv 2108.01073): add
        noise, and sample from there.

        The same as ``sample`` with the last ``round(strength * S)`` timesteps, and with x_T made
        from x0 by equation 4 of the DDIM paper and the noise that ``sample`` would start from.
        Steps, and scales given one for each, are counted from the first that is run.

        Args:
            x0: ``(B, C, ...)``, clean. The samples have its device and dtype.
            strength: in (0, 1]. 1 runs all steps; the start still holds what alpha_bar_T leaves of
                x0.
            options: those of ``sample``.

        Raises:
            TypeError, ValueError: as ``sample``; or the strength leaves no step.
        """
        editing.check_left_out("img2img", "x0", options)
        keywords = options_of("img2img", EditKeywords, options, return_trajectory)
        return editing.img2img(self.plan(model), model, x0, strength, keywords, self.graphs)

    @overload
    def inpaint(
        self,
        model: Model,
        x0: Tensor,
        mask: Tensor,
        *,
        strength: float = 1.0,
        return_trajectory: Literal[False] = False,
        **options: Unpack[InpaintKeywords],
    ) -> Tensor: ...

    @overload
    def inpaint(
        self,
        model: Model,
        x0: Tensor,
        mask: Tensor,
        *,
        strength: float = 1.0,
        return_trajectory: Literal[True],
        **options: Unpack[InpaintKeywords],
    ) -> Trajectory: ...

    @overload
    def inpaint(
        self,
        model: Model,
        x0: Tensor,
        mask: Tensor,
        *,
        strength: float = 1.0,
        return_trajectory: bool,
        **options: Unpack[InpaintKeywords],
    ) -> Tensor | Trajectory: ...

    @shows_keywords(InpaintKeywords)
    def inpaint(
        self,
        model: Model,
        x0: Tensor,
        mask: Tensor,
        *,
        strength: float = 1.0,
        return_trajectory: bool = False,
        **options: Unpack[InpaintKeywords],
    ) -> Tensor | Trajectory:
        """Keep the known part of pictures, and draw the other part to fit.

        After each step, and at x_T, the known part is put in at the noise level reached there,
        inside the step's kernel; its noise comes from the stream KNOWN_REGION of each sample's
        seed. In the end it is x0 itself (with ``set_alpha_to_one``). A ``generator`` draws, in this
        order: x_T, the noise of the known part there, and for each step its own noise, where eta >
        0, and that of the known part.

        Args:
            x0: ``(B, C, ...)``, clean. The samples have its device and dtype.
            mask: 1 where x0 is known and kept, 0 where it is drawn (diffusers' masks are the other
                way round), a blend between. Any dtype and device; broadcast to x0: ``(B, 1, H,
                W)``, ``(H, W)``.
            strength: below 1, the unknown part starts from x0, too, as in ``img2img``; at 1 from
                noise alone.
            options: those of ``sample``. The x0 of a trajectory is what the model predicts, in the
                known part, too.

        Raises:
            TypeError, ValueError: as ``sample`` and ``img2img``; or the mask does not fit, or
                leaves [0, 1]; or the sampler has order=2.
        """
        editing.check_left_out("inpaint", "x0", options)
        keywords = options_of("inpaint", InpaintKeywords, options, return_trajectory)
        return editing.inpaint(self.plan(model), model, x0, mask, strength, keywords, self.graphs)

    @overload
    def interpolate(
        self,
        model: Model,
        x_T_first: Tensor,
        x_T_last: Tensor,
        weights: Sequence[float],
        *,
        return_trajectory: Literal[False] = False,
        **options: Unpack[EditKeywords],
    ) -> Tensor: ...

    @overload
    def interpolate(
        self,
        model: Model,
        x_T_first: Tensor,
        x_T_last: Tensor,
        weights: Sequence[float],
        *,
        return_trajectory: Literal[True],
        **options: Unpack[EditKeywords],
    ) -> Trajectory: ...

    @overload
    def interpolate(
        self,
        model: Model,
        x_T_first: Tensor,
        x_T_last: Tensor,
        weights: Sequence[float],
        *,
        return_trajectory: bool,
        **options: Unpack[EditKeywords],
    ) -> Tensor | Trajectory: ...

    @shows_keywords(EditKeywords)
    def interpolate(
        self,
        model: Model,
        x_T_first: Tensor,
        x_T_last: Tensor,
        weights: Sequence[float],
        *,
        return_trajectory: bool = False,
        **options: Unpack[EditKeywords],
    ) -> Tensor | Trajectory:
        """Sample between two starts (section 5.3 of the DDIM paper, and its appendix D.5), all in
        one batch.

        Args:
            x_T_first, x_T_last: ``(B, C, ...)``: B pairs. See ``slerp``.
            weights: K numbers in [0, 1]; 0 is the first start, 1 the last.
            seed, seeds: of the noise of the steps, where eta > 0: one for each pair, the same for
                all of its weights.
            conditioning, unconditional_conditioning: tensors whose first size is B are repeated for
                each weight. The model and callbacks see K * B samples, those of the first weight
                first.
            options: those of ``sample``.

        Returns:
            ``(K, B, C, ...)``, or ``(K, C, ...)`` for one pair; or a ``Trajectory`` of such states.

        Raises:
            TypeError, ValueError: as ``sample`` and ``slerp``; or a weight is not in [0, 1].
        """
        editing.check_left_out("interpolate", "x_T_first and x_T_last", options)
        keywords = options_of("interpolate", EditKeywords, options, return_trajectory)
        return editing.interpolate(self.plan(model), model, x_T_first, x_T_last, weights, keywords, self.graphs)

    @overload
    def invert(
        self,
        model: Model,
        x0: Tensor,
        *,
        iterations: int = 1,
        tolerance: float | None = None,
        return_trajectory: Literal[False] = False,
        **options: Unpack[InvertKeywords],
    ) -> Tensor: ...

    @overload
    def invert(
        self,
        model: Model,
        x0: Tensor,
        *,
        iterations: int = 1,
        tolerance: float | None = None,
        return_trajectory: Literal[True],
        **options: Unpack[InvertKeywords],
    ) -> Trajectory: ...

    @overload
    def invert(
        self,
        model: Model,
        x0: Tensor,
        *,
        iterations: int = 1,
        tolerance: float | None = None,
        return_trajectory: bool,
        **options: Unpack[InvertKeywords],
    ) -> Tensor | Trajectory: ...

    @shows_keywords(InvertKeywords)
    def invert(
        self,
        model: Model,
        x0: Tensor,
        *,
        iterations: int = 1,
        tolerance: float | None = None,
        return_trajectory: bool = False,
        **options: Unpack[InvertKeywords],
    ) -> Tensor | Trajectory:
        """Find the noise x_T from which clean samples are made: the sampler's own steps, each
        solved for where it came from, the last step first.

        The model is called at the timestep of the noisier end of a step, as in sampling, so the
        exact solution is the exact inverse. Nothing is clipped: sample from the result with
        ``clip_sample=False``, or use ``reconstruct``. Needs eta = 0. A clipped step has no inverse:
        a sampler that was asked to clip is refused. The range that a model states of itself is
        ignored.

        Args:
            x0: clean samples ``(B, C, ...)`` (not changed), in whose dtype is computed; float32
                ends at a residual of about 3e-8 in each step.
            iterations: how often the model is called for a step (with guidance, twice as often). 1
                is the plain inversion, with the output at (x_prev, t) for that at (x_t, t); for
                epsilon prediction, that of diffusers' DDIMInverseScheduler. With more, x_t starts
                from equation 14 of the DDIM paper with the last output at t_prev, and an iteration
                is a simplified Newton step. Each is one pass over memory.
            tolerance: end the iterations of a step when no element of the batch changed by more.
                The host waits for each iteration to know.
            conditioning, guidance_scale, unconditional_conditioning, progress: as for ``sample``.
            backend, check_finite: as for ``sample``.
            return_trajectory: return every state as a ``Trajectory`` from x0 to x_T; its ``x0`` are
                predicted from the last guess of x_t.

        Returns:
            x_T, like ``x0``; or a ``Trajectory``.

        Raises:
            TypeError, ValueError: an argument breaks a rule, the sampler has no inverse, or the
                model returns the wrong thing.
        """
        keywords = options_of("invert", InvertKeywords, options, return_trajectory)
        plan = self._unclipped().plan(model)
        return inversion.invert(plan, model, x0, keywords, iterations=iterations, tolerance=tolerance)

    @shows_keywords(ReconstructKeywords)
    def reconstruct(
        self,
        model: Model,
        x0: Tensor,
        *,
        iterations: int = 1,
        tolerance: float | None = None,
        **options: Unpack[ReconstructKeywords],
    ) -> Tensor:
        """Invert clean samples and sample them again by the same steps, without clipping. Arguments
        and errors are those of ``invert``.

        Returns:
            Samples like ``x0``: equal to them but for the error of the inversion. See
            ``sampling.inversion.reconstruction_error``.
        """
        keywords = options_of("reconstruct", ReconstructKeywords, options)
        plan = self._unclipped().plan(model)
        return inversion.reconstruct(plan, model, x0, keywords, self.graphs, iterations=iterations, tolerance=tolerance)

    @overload
    def sample_parallel(
        self,
        model: Model,
        shape: Sequence[int] | None = None,
        *,
        window: int | None = None,
        tolerance: float = 1e-3,
        max_iterations: int | None = None,
        return_statistics: Literal[False] = False,
        **options: Unpack[ParallelKeywords],
    ) -> Tensor: ...

    @overload
    def sample_parallel(
        self,
        model: Model,
        shape: Sequence[int] | None = None,
        *,
        window: int | None = None,
        tolerance: float = 1e-3,
        max_iterations: int | None = None,
        return_statistics: Literal[True],
        **options: Unpack[ParallelKeywords],
    ) -> tuple[Tensor, ParallelStatistics]: ...

    @overload
    def sample_parallel(
        self,
        model: Model,
        shape: Sequence[int] | None = None,
        *,
        window: int | None = None,
        tolerance: float = 1e-3,
        max_iterations: int | None = None,
        return_statistics: bool,
        **options: Unpack[ParallelKeywords],
    ) -> Tensor | tuple[Tensor, ParallelStatistics]: ...

    @shows_keywords(ParallelKeywords)
    def sample_parallel(
        self,
        model: Model,
        shape: Sequence[int] | None = None,
        *,
        window: int | None = None,
        tolerance: float = 1e-3,
        max_iterations: int | None = None,
        return_statistics: bool = False,
        **options: Unpack[ParallelKeywords],
    ) -> Tensor | tuple[Tensor, ParallelStatistics]:
        """Draw what ``sample`` draws, up to ``tolerance``, in fewer model calls of larger batches
        (ParaDiGMS, arXiv 2305.16317).

        Each iteration calls the model once, for a window of W states of every sample: a batch of W
        * B, with timesteps of their own, those of the first state first. Then the steps of the
        window are taken, and it moves on to the first state whose model output may still change: by
        one step at least. Memory: 2 (W + 1) states, and what the model needs for a batch of W * B.

        Any eta will do: the noise of a step depends on the seeds and the step alone, so the
        trajectory is fixed in advance.

        Args:
            window: W, at most S (more is S); None for all S steps.
            tolerance: a state is done when its mean squared change in an iteration is at most
                ``tolerance**2`` times the variance of its noise, 1 - alpha_bar, in every sample. 0:
                the sequential result; bit by bit where a model's output does not depend on what
                else is in the batch. A sample's result otherwise depends on the batch within the
                tolerance.
            max_iterations: stop after so many with the last guess of the clean samples, which a
                window of all steps has.
            conditioning, unconditional_conditioning: tensors whose first size is B are repeated for
                each state of the window; all else is passed on as it is.
            return_statistics: return ``ParallelStatistics``, too.

        The other arguments are those of ``sample``; noise from a generator does not serve steps
        that are taken more than once.

        Returns:
            Samples, or ``(samples, statistics)``.

        Raises:
            TypeError, ValueError: an argument breaks a rule, or the model returns the wrong thing.
        """
        samples, statistics = parallel.sample_parallel(
            self.plan(model),
            model,
            shape,
            options_of("sample_parallel", ParallelKeywords, options),
            self.graphs,
            window=window,
            tolerance=tolerance,
            max_iterations=max_iterations,
        )
        return (samples, statistics) if return_statistics else samples

    def optimize(
        self,
        model: nn.Module,
        shape: Sequence[int] | None = None,
        *,
        conditioning: Mapping[str, Any] | None = None,
        guidance_scale: GuidanceScale | None = None,
        unconditional_conditioning: Mapping[str, Any] | None = None,
        compile: bool = True,
        tolerance: float = 2 / 255,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> OptimizedModel:
        """Return a model that gives the same samples sooner, for batches of this shape.

        Tried are: both halves of guidance in one batch; weights and activations with channels last;
        on a CPU, 3 x 3 convolutions with a quarter of the products (``kernels.convolution``), and
        group normalization and SiLU in one pass (``kernels.normalization``); torch.compile with
        frozen weights (a minute or so, once); and on processors with instructions for it, the
        remaining convolutions in bfloat16 in the noisiest steps, as many as keep the samples tried
        within a third of ``tolerance``, since other samples change more. What does not help on this
        machine is left out. The model itself is not changed: the copy takes its memory again, and
        with these convolutions four times that of their weights on top.

        Args:
            model: a module; see ``models.Model``.
            shape: ``(B, C, ...)`` of the batches to be sampled. Others work, as slowly as before.
                None: one sample of the model's ``sample_shape``.
            conditioning, guidance_scale, unconditional_conditioning: as for ``sample``; their
                values do not matter, their shapes do.
            compile: False leaves torch.compile out.
            tolerance: how far an element of a sample may move; measured on one batch, so no promise
                for each. The default is one of 255 levels, with samples in [-1, 1].
            seed: of the samples that are compared.

        Returns:
            The model to sample with; its ``gain`` holds what was measured.

        Raises:
            TypeError: ``model`` is no ``nn.Module``.
            ValueError: an argument breaks a rule.
        """
        from .sampling.optimize import optimize  # rarely used, and not needed to sample

        keywords: SampleKeywords = {
            "seed": seed,
            "conditioning": conditioning,
            "guidance_scale": guidance_scale,
            "unconditional_conditioning": unconditional_conditioning,
            "device": device,
            "check_finite": False,
        }
        options = options_of("optimize", SampleKeywords, keywords)
        return optimize(self.plan(model), model, shape, options, self.graphs, compile=compile, tolerance=tolerance)


def _kind(schedule: object) -> str:
    return f"the class {schedule.__name__}" if isinstance(schedule, type) else type(schedule).__name__


def _path_meant(schedule: object) -> str:
    """Return how to make a schedule of what was given for one, in words."""
    if isinstance(schedule, type) and issubclass(schedule, NoisePath):
        return f"call it, {schedule.__name__}(...), for instance NoiseSchedule.linear() or FlowSchedule()"
    if callable(schedule) and isinstance(getattr(schedule, "__self__", None), type):
        return f"call it, {getattr(schedule, '__qualname__', 'schedule')}()"
    if isinstance(getattr(schedule, "schedule", None), NoisePath):
        return "use its schedule, model.schedule"
    if getattr(schedule, "alphas_cumprod", None) is not None:
        return "use NoiseSchedule(scheduler.alphas_cumprod)"
    return "for instance NoiseSchedule.linear() or FlowSchedule()"


def _check_fitted_type(fitted: str | None, prediction_type: str | None) -> None:
    if fitted not in (None, prediction_type):
        raise ValueError(
            f"the coefficients in timesteps are for a model with prediction_type {fitted!r}, got {prediction_type!r}: "
            "search again with this model, or pass an order to use the timesteps alone"
        )


def _early_range(clipping: Clipping) -> float | None:
    """Return the range to check a plan with before the model is known."""
    if clipping.asked_for or clipping.use_clipped_model_output:
        return 1.0 if clipping.clip_sample_range is None else clipping.clip_sample_range
    return None


def _rebuild(kind: type[DDIMSampler], given: dict[str, Any]) -> DDIMSampler:
    return kind(**given)
