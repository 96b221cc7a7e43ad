"""Rollouts for reinforcement learning: a run with the states, the log-probabilities and the seeds
that training on its noisy steps needs, and the log-probability of such a step under a model that is
being trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.gaussian import REDUCTIONS, check_min_std
from ..kernels.log_prob import ddim_log_prob
from ..models.protocol import Model
from ..plans.plan import PlannedStep, SamplingPlan
from ..utils.checks import check_choice, check_integer, refuse
from .capture import GraphCache
from .initial_state import part_of_conditioning
from .loop import Loop, begins_steps, model_calls
from .options import ConditioningKeywords, Options, check_keywords, shows_keywords
from .run import check, prepare, take_steps, warn_of_result

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True, eq=False, repr=False)
class Rollout:
    """One run, and what training on its N noisy steps needs. It is equal to itself alone.

    Attributes:
        samples: ``(B, ...)``, the result.
        log_probs: ``(N, B)`` float32: of each noisy step, the log-probability of the x_prev that was
            sampled.
        noisy_steps: the numbers of the noisy steps in ``plan.steps``, increasing.
        states: ``(K, B, ...)``, like ``samples``: x where a noisy step starts or ends, in order, each
            once: K = N + 1 where the noisy steps follow one another, 2 N at most. None where they
            were not kept: see ``replay``.
        seeds: ``(B,)`` int64: of each sample; None where noise came from a generator, or from x_T
            alone.
        plan: the steps, with noise in the noisy ones alone.
        mask: like ``samples``: the known region, whose elements do not count; None without one.
    """

    samples: Tensor
    log_probs: Tensor
    noisy_steps: tuple[int, ...]
    states: Tensor | None
    seeds: Tensor | None
    plan: SamplingPlan
    mask: Tensor | None
    _options: Options
    _graphs: GraphCache

    def __repr__(self) -> str:
        states = "no states" if self.states is None else f"{len(self.states)} states"
        return (
            f"Rollout({len(self.samples)} samples of {tuple(self.samples.shape[1:])}, noisy steps "
            f"{', '.join(map(str, self.noisy_steps))} of {self.plan.num_inference_steps}, {states})"
        )

    def __len__(self) -> int:
        """Return N."""
        return len(self.noisy_steps)

    @property
    def steps(self) -> tuple[PlannedStep, ...]:
        """The noisy steps: their timesteps, levels and rows of coefficients."""
        return tuple(self.plan.steps[number] for number in self.noisy_steps)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The timestep where each noisy step starts."""
        return tuple(step.t for step in self.steps)

    @property
    def model_times(self) -> Tensor:
        """``(N,)``: what the model is told in each noisy step, in the dtype that it gets."""
        return torch.tensor(
            [step.model_time for step in self.steps],
            dtype=self.plan.schedule.time_dtype,
            device=self.samples.device,
        )

    def x_t(self, index: int) -> Tensor:
        """Return the state ``(B, ...)`` where the noisy step ``index`` starts, 0 to N - 1.

        Raises:
            TypeError, ValueError: there is no such step, or the states were not kept.
        """
        return self._state(self._number(index))

    def x_prev(self, index: int) -> Tensor:
        """Return the state where it ends, as ``x_t``."""
        return self._state(self._number(index) + 1)

    @shows_keywords(ConditioningKeywords)
    def log_prob(self, model: Model, index: int, **options: Unpack[ConditioningKeywords]) -> Tensor:
        """Compute the log-probability of a noisy step under a model, with its gradient.

        The model is called at ``x_t(index)`` as it was in the rollout, in the caller's autograd
        mode. Where its outputs have the same bits, the result has those of ``log_probs[index]``, so
        that ``exp(new - old)`` is exactly 1.

        Args:
            model: called as in the rollout: that model with other weights, or another one with the
                same prediction type.
            index: of the noisy step, 0 to N - 1.
            options: conditioning and guidance, where they differ from the rollout's.

        Returns:
            ``(B,)`` float32; float64 for float64 samples. See ``ddim_log_prob``.

        Raises:
            TypeError, ValueError: an argument breaks a rule, the states were not kept, or the model
                returns the wrong thing.
        """
        check_keywords("log_prob", ConditioningKeywords, options)
        step, x_t = self.plan.steps[self._number(index)], self.x_t(index)
        _check_prediction_type(model, self.plan)
        # The states have their device and dtype, and the noise and the known region are in them.
        of_states = self._options.replace(
            x_T=None, generator=None, mask=None, known_x0=None, device=x_t.device, dtype=x_t.dtype, **options
        )
        request = check(self.plan, model, x_t.shape, of_states)
        differs = request.model_dtype != request.dtype or self.plan.scales_input
        loop = Loop(
            x_t=x_t,
            calls=model_calls(model, request.conditionings),
            begin=begins_steps(model),
            guidance_scales=request.scales,
            guidance_rescale=of_states.guidance.guidance_rescale,
            classifier=request.classifier,
            model_input=torch.empty_like(x_t, dtype=request.model_dtype) if differs else None,
        )
        loop.prepare_input(step.input_scale)
        told = torch.full((len(x_t),), step.model_time, dtype=step.time_dtype, device=x_t.device)
        model_output, uncond, scale = loop.steered(step.index, told)
        return ddim_log_prob(
            self.x_prev(index),
            x_t,
            model_output,
            step.coefficients,
            model_output_uncond=uncond,
            guidance_scale=scale,
            mask=self.mask,
            log_prob_reduction=of_states.density.log_prob_reduction,
            min_std=of_states.density.min_std,
            backend=of_states.execution.backend,
        )

    def replay(self, model: Model) -> Rollout:
        """Run it again from its seeds, and keep the states.

        Args:
            model: the one of the rollout, with the weights that it had.

        Returns:
            A rollout with the same bits, and with ``states``.

        Raises:
            ValueError: noise came from a generator; or the samples are not those of this rollout, so
                that the model is not as it was. (The host waits for the device to know.)
        """
        if self._options.noise.generator is not None:
            raise ValueError(
                "a rollout is replayed from its seeds, got one whose noise came from a generator: make it with seed or seeds"
            )
        seeds = None if self.seeds is None else self.seeds.cpu()
        options = self._options.replace(seed=None, seeds=seeds)
        again = _run(self.plan, model, tuple(self.samples.shape), options, self._graphs, self.noisy_steps, True)
        if not torch.allclose(again.samples, self.samples, rtol=0, atol=0, equal_nan=True):
            off = (again.samples - self.samples).abs().max().item()
            raise ValueError(
                f"a replay needs the model as it was in the rollout, got samples that differ by up to {off:.3g}: "
                "replay in the same batch, before training changes the weights, or keep the states"
            )
        return again

    def select(self, samples: slice | Sequence[int] | Tensor) -> Rollout:
        """Return the part of this rollout with some of its samples, for training in smaller batches.

        A model whose output for a sample depends on the size of its batch, as convolutions' last bits
        may, gives ``log_prob`` other bits then.

        Args:
            samples: a slice, which copies nothing; or a list or tensor of their numbers, or a tensor
                of B bools.

        Raises:
            TypeError: it is none of them.
            IndexError: there is no such sample.
        """
        if not isinstance(samples, (slice, Sequence, Tensor)) or isinstance(samples, (str, bytes)):
            refuse("samples must be a slice, or a list of numbers", samples, "for instance slice(0, 4)", TypeError)
        device, count = self.samples.device, len(self.samples)
        chosen = samples if isinstance(samples, slice) else torch.as_tensor(samples, device=device)
        if isinstance(chosen, Tensor) and not len(chosen):
            chosen = chosen.long()

        def part(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[chosen]

        noise, guidance = self._options.noise, self._options.guidance
        options = self._options.replace(
            x_T=part(noise.x_T),
            conditioning=part_of_conditioning(guidance.conditioning, count, chosen),
            unconditional_conditioning=part_of_conditioning(guidance.unconditional_conditioning, count, chosen),
            mask=part(self.mask),
            known_x0=part(self._options.known_region.known_x0),
        )
        return replace(
            self,
            samples=self.samples[chosen],
            log_probs=self.log_probs[:, chosen],
            states=None if self.states is None else self.states[:, chosen],
            seeds=part(self.seeds),
            mask=part(self.mask),
            _options=options,
        )

    def _number(self, index: Any) -> int:
        """Return the number in the plan of a noisy step."""
        return self.noisy_steps[check_integer("index", index, at_least=0, at_most=len(self) - 1)]

    def _state(self, number: int) -> Tensor:
        """Return x after so many steps."""
        if self.states is None:
            raise ValueError("the states of this rollout were not kept, got states = None: use rollout.replay(model)")
        return self.states[_kept(self.noisy_steps).index(number)]


def rollout(
    plan: SamplingPlan,
    model: Model,
    shape: Sequence[int] | None,
    options: Options,
    graphs: GraphCache,
    *,
    noisy_steps: Sequence[int] | None = None,
    keep_states: bool = True,
) -> Rollout:
    """Run a plan and record its noisy steps: see ``DDIMSampler.rollout``."""
    if plan.order != 1:
        raise ValueError(
            f"the log-probability of a step must depend on one state, got order={plan.order}, where it depends on the step before, "
            "too: make a sampler with order=1"
        )
    if plan.thresholding is not None:
        refuse(
            "a rollout's steps must be rows of coefficients, which dynamic thresholding changes with each output",
            plan.thresholding,
            "make a sampler without thresholding",
        )
    check_choice("log_prob_reduction", options.density.log_prob_reduction, REDUCTIONS)
    check_min_std(options.density.min_std)
    if not keep_states and options.noise.generator is not None:
        raise ValueError(
            "keep_states=False is for a replay from seeds, got a generator, whose noise cannot be drawn again: pass seed or "
            "seeds, or keep the states"
        )
    if noisy_steps is not None:
        numbers = _explicit_steps(noisy_steps, plan.num_inference_steps)
        _check_densities(plan, numbers, options.density.min_std)
        plan = plan.with_noise_in(numbers)
    else:
        numbers = tuple(step.index for step in plan.steps if step.coefficients.has_density(None))
        if not numbers:
            raise ValueError(
                f"a rollout needs a step that adds noise, got a sampler with eta={plan.eta} and {plan.num_inference_steps} steps, of "
                "which the last leads to clean data: make one with an eta above 0, or with more steps"
            )
    return _run(plan, model, shape, options, graphs, numbers, keep_states)


def _explicit_steps(steps: Any, count: int) -> tuple[int, ...]:
    """Return the numbers of steps that the caller chose."""
    rule, remedy = (
        f"noisy_steps must be numbers of steps, increasing, from 0 to {count - 1}",
        "for instance range(0, 2)",
    )
    plain = steps.tolist() if hasattr(steps, "tolist") else steps
    if isinstance(plain, (str, bytes)) or not isinstance(plain, Sequence):
        refuse(rule, steps, remedy, TypeError)
    numbers = tuple(
        check_integer(f"noisy_steps[{i}]", number, at_least=0, at_most=count - 1) for i, number in enumerate(plain)
    )
    if not numbers or list(numbers) != sorted(set(numbers)):
        refuse(rule, numbers, remedy)
    return numbers


def _check_densities(plan: SamplingPlan, numbers: Iterable[int], min_std: float | None) -> None:
    """Raise ValueError where a chosen step has no density."""
    for number in numbers:
        step = plan.steps[number]
        if step.coefficients.has_density(min_std):
            continue
        why = f"to t = {step.t_prev:g}, where eta = {plan.etas[number]}"
        remedy = "make a sampler with an eta above 0 there"
        if step.alpha_bar_prev == 1:
            why, remedy = "which leads to clean data and adds no noise", "leave it out"
        raise ValueError(
            f"noisy_steps must be steps that add noise, got step {number} from t = {step.t:g}, {why}: {remedy}, or pass min_std, "
            "the least standard deviation of the densities"
        )


def _check_prediction_type(model: Model, plan: SamplingPlan) -> None:
    stated = getattr(model, "prediction_type", None)
    if stated not in (None, plan.prediction_type):
        raise ValueError(
            f"the model must predict what the rollout's did, {plan.prediction_type!r}, got one with prediction_type {stated!r}: "
            "pass the model that is being trained"
        )


def _kept(noisy_steps: Sequence[int]) -> tuple[int, ...]:
    """Return after how many steps a state is kept: those where noisy steps start or end."""
    return tuple(sorted({number + end for number in noisy_steps for end in (0, 1)}))


def _run(
    plan: SamplingPlan,
    model: Model,
    shape: Sequence[int] | None,
    options: Options,
    graphs: GraphCache,
    noisy_steps: tuple[int, ...],
    keep_states: bool,
) -> Rollout:
    job = prepare(plan, model, shape, options, graphs, recorded_by="a rollout")
    loop, numbers = job.loop, _kept(noisy_steps)
    # Ordinary tensors, which training may use even after a rollout in inference mode.
    with torch.inference_mode(False):
        log_probs = torch.empty((len(noisy_steps), len(loop.x_t)), dtype=torch.float32, device=loop.x_t.device)
        states = loop.x_t.new_empty((len(numbers), *loop.shape)) if keep_states else None

    def record(loop: Loop, taken: int) -> None:
        if states is not None and taken in numbers:
            states[numbers.index(taken)].copy_(loop.x_t)
        if taken - 1 in noisy_steps and loop.log_prob is not None:
            log_probs[noisy_steps.index(taken - 1)].copy_(loop.log_prob)

    using = nullcontext() if job.mode == "off" else graphs.use(job, optional=options.execution.capture == "auto")
    samples = take_steps(job, using, options, record)
    assert isinstance(samples, Tensor)  # no trajectory was asked for
    warn_of_result(samples, job, model, options, graphs)
    seeds, mask = job.seeds, job.loop.mask
    # The caller may change the mappings; the tensors are the caller's.
    given = {name: getattr(options.guidance, name) for name in ("conditioning", "unconditional_conditioning")}
    kept = options.replace(**{name: None if value is None else dict(value) for name, value in given.items()})
    return Rollout(samples, log_probs, noisy_steps, states, seeds, plan, mask, kept, graphs)
