"""Sampling in parallel over time: solve for many steps of a run at once, to use hardware that a
batch of one leaves idle.

ParaDiGMS (Shih, Belkhale, Ermon, Sadigh, Anari 2023, arXiv 2305.16317) guesses all states of a
window of steps, calls the model for all of them in one batch, and corrects the guesses (Picard
iteration). Here they are corrected by the steps themselves, in order: each starts from the new x_t,
and uses the velocity v that the model's output for the old guess of x_t stands for. Steps are cheap
beside the model, the fixed point is the sequential run, and v changes least with x_t: that takes
fewer iterations than the paper's sums of old steps where eta > 0, or than the output itself with
epsilon prediction (docs/INVERSION.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.protocol import Model
from ..plans.coefficients import noise_variance, weight_at_constant_v
from ..plans.plan import PlannedStep, SamplingPlan
from ..utils.checks import check_dtype, check_integer, check_number
from ..utils.devices import widest_dtype
from ..utils.progress import tqdm
from ..utils.transfer import to_device
from .capture import GraphCache
from .captured_loop import Job
from .guidance import guidance_scales
from .initial_state import conditionings_of, initial_state, place, repeat_conditioning, seeds_of_samples
from .loop import Loop, ModelCall, Timing, begins_steps, input_scales, model_calls
from .model_times import model_times
from .options import Options
from .run import warn_of_result


@dataclass(frozen=True)
class ParallelStatistics:
    """The cost of a run.

    Attributes:
        iterations: consecutive model calls (with guidance, pairs of calls); S for a sequential run.
        model_evaluations: states per sample that the model was called for; S for a sequential run.
        converged: whether all steps were done, rather than ended by ``max_iterations``.
    """

    iterations: int
    model_evaluations: int
    converged: bool


def sample_parallel(
    plan: SamplingPlan,
    model: Model,
    shape: Sequence[int] | None,
    options: Options,
    graphs: GraphCache,
    *,
    window: int | None = None,
    tolerance: float = 1e-3,
    max_iterations: int | None = None,
) -> tuple[Tensor, ParallelStatistics]:
    """Solve for many steps at once: see ``DDIMSampler.sample_parallel``.

    Returns:
        ``(samples, statistics)``.
    """
    noise, guidance, execution = options.noise, options.guidance, options.execution
    if plan.order != 1:
        raise ValueError(
            f"steps that are solved for at once must depend on one state each, got order={plan.order}, where they depend on two: "
            "make a sampler with order=1"
        )
    check_number("tolerance", tolerance, at_least=0, remedy="0 gives the sequential result")
    if window is not None:
        check_integer("window", window, at_least=1)
    if max_iterations is not None:
        check_integer("max_iterations", max_iterations, at_least=1)
    if max_iterations is not None and window is not None and window < len(plan.steps):
        raise ValueError(
            f"max_iterations={max_iterations} may end a run with a guess of the clean samples, which a window of all "
            f"{len(plan.steps)} steps has, got window={window}: leave one of them out"
        )
    shape, device, dtype = place(model, shape, execution.device, execution.dtype, noise.seeds, x_T=noise.x_T)
    check_dtype("dtype", dtype)
    scales = guidance_scales(guidance.guidance_scale, plan.timesteps)
    conditionings = conditionings_of(model, guidance.conditioning, scales, guidance.unconditional_conditioning)
    seeds = seeds_of_samples(noise.seed, noise.seeds, None, shape[0])
    seeds = None if seeds is None else to_device(seeds, device)
    x = initial_state(shape, noise.x_T, seeds, None, device, dtype, plan.initial_std_dev)
    last = len(plan.steps)
    width = last if window is None else min(window, last)
    guesses = x.expand(width + 1, *shape).contiguous()
    loop = Loop(
        x_t=x,
        calls=[],
        begin=begins_steps(model),
        guidance_scales=scales,
        thresholding=plan.thresholding,
        seeds=seeds,
    )

    timesteps = model_times(plan, device, shape[0])
    weights = [weight_at_constant_v(step.level_t, plan.meaning_at(step.level_t)) for step in plan.steps]
    variances = torch.tensor(
        [noise_variance(step.level_prev) for step in plan.steps], dtype=torch.float64, device="cpu"
    )
    limits = to_device((tolerance**2 * math.prod(shape[1:]) * variances[:, None]).to(widest_dtype(device)), device)
    corrected, scales_of_input = torch.empty_like(guesses), input_scales(plan, device)
    run = _Window(plan.steps, weights, loop, timesteps, limits, guesses, corrected, execution.backend, scales_of_input)
    bar = tqdm(total=last, desc="sampling in parallel", unit="step", disable=not options.observation.progress)
    iterations = evaluations = 0
    calls: dict[int, list[ModelCall]] = {}
    with torch.no_grad(), bar:
        while run.first < last and iterations != max_iterations:
            count = min(width, last - run.first)
            if count not in calls:
                calls = {
                    count: model_calls(model, [repeat_conditioning(c, shape[0], count) or {} for c in conditionings])
                }
            bar.update(run.iterate(count, calls[count]))
            iterations, evaluations = iterations + 1, evaluations + count
    samples = guesses[last - run.first].clone()
    warn_of_result(samples, Job("off", model, plan, loop, conditionings, seeds), model, options, graphs)
    statistics = ParallelStatistics(iterations, evaluations, converged=run.first == last)
    return samples, statistics


@dataclass(eq=False)
class _Window:
    """A window of states, starting with the first that is not done.

    Attributes:
        weights: for each step, see ``weight_at_constant_v``.
        loop: takes one step; its model calls are answered from the batched calls of the window.
        timesteps: ``(S, B)``, what the model is told.
        limits: ``(S, 1)``, in the widest dtype of the device: the largest squared change, summed
            over a sample, of a state that is done, after each step.
        guesses: ``(W + 1, B, C, ...)``: states; the first is exact within the tolerance.
        corrected: like ``guesses``: the next ones.
        input_scales: ``(S,)`` float32: what x_t is multiplied by before each model call; None for
            nothing.
        first: the step that starts from ``guesses[0]``.
    """

    steps: Sequence[PlannedStep]
    weights: Sequence[float]
    loop: Loop
    timesteps: Tensor
    limits: Tensor
    guesses: Tensor
    corrected: Tensor
    backend: str | None
    input_scales: Tensor | None = None
    first: int = 0

    def iterate(self, count: int, calls: Sequence[ModelCall]) -> int:
        """Correct the first ``count`` guesses after ``guesses[0]``, and move on by the returned
        number of steps, at least 1."""
        inside, batch_size = slice(self.first, self.first + count), self.guesses.shape[1]
        if self.input_scales is not None:
            scales = self.input_scales[inside].repeat_interleave(batch_size)
            calls = [_scaled(call, scales) for call in calls]
        self.loop.x_t, self.loop.calls = self.guesses[:count].flatten(0, 1), calls
        outputs = [
            None if m is None else m.unflatten(0, (count, batch_size))
            for m in self.loop.predict(self.timesteps[inside].flatten())
        ]
        self._take_steps(inside, outputs)
        # The outputs of the next iteration differ only where the states that the model is called
        # with do.
        change = torch.linalg.vector_norm(
            (self.corrected[1:count] - self.guesses[1:count]).flatten(2), dim=2, dtype=self.limits.dtype
        )
        done = (change.square() <= self.limits[inside][:-1]).all(1)
        moved = 1 + int(done.long().cumprod(0).sum())
        kept = count + 1 - moved
        self.guesses[:kept].copy_(self.corrected[moved : count + 1])
        self.guesses[kept:].copy_(self.corrected[count])
        self.first += moved
        return moved

    def _take_steps(self, inside: slice, outputs: Sequence[Tensor | None]) -> None:
        """Take the steps of the window, each from the result of the one before, with the model's
        outputs for the guesses."""
        loop, timing = self.loop, Timing()
        x = self.guesses[0]
        for j, step in enumerate(self.steps[inside]):
            loop.x_t, loop.x_seen = x, self.corrected[j + 1]
            at_x = [self._output_at(x, m[j], j, self.weights[step.index]) for m in outputs if m is not None]
            loop.calls = [_answer(m) for m in at_x]
            loop.planned_step(step, self.timesteps[step.index], timing, self.backend)
            x = self.corrected[j + 1]

    def _output_at(self, x: Tensor, model_output: Tensor, j: int, weight: float) -> Tensor:
        """Return the output that gives ``x`` the v of the model's output at ``guesses[j]``: the
        same where the two are equal."""
        if j == 0 or weight == 0:
            return model_output
        return torch.add(model_output.to(x.dtype), x - self.guesses[j], alpha=weight)


def _scaled(call: ModelCall, scales: Tensor) -> ModelCall:
    """Return a call that is given each sample times its scale, rounded once to its dtype."""

    def scaled(x: Tensor, t: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return call((x.to(wide) * scales.view(-1, *[1] * (x.ndim - 1))).to(x.dtype), t)

    return scaled


def _answer(model_output: Tensor) -> ModelCall:
    return lambda x, t: model_output
