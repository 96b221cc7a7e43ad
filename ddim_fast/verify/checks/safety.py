"""Side effects, which a sampler must not have: same inputs give the same bits, inputs stay
unchanged, samples do not mix."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..truth.cases import Setting, StepCase, StepResult
from .base import CheckFailedError, Context, check
from .compare import allowed_of, kept, same_bits, same_numbers, same_results
from .judge import judge
from .runs import GaussianModel, float64_run
from .update import SHAPE, random_step, settings_of


def linear_model(x_t: Tensor, t: Tensor) -> Tensor:
    """Return one product for each element: the same bits wherever in memory the element is."""
    return x_t * 0.4


def _at_eta_0(context: Context) -> list[Setting]:
    """Return a setting for each prediction type; in the full set, all that the subject offers."""
    every = list(settings_of(context))
    last = {setting.prediction_type: setting for setting in every}
    return every if context.full else [every[0], *last.values()]


def _some_settings(context: Context) -> list[Setting]:
    """Return the same settings, and one with noise that is given as a tensor."""
    return _at_eta_0(context) + ([context.setting(eta=1.0)] if context.offers("eta", "given_noise") else [])


def _disturbed(seed: int) -> None:
    """Put the global generators into another state. (``verify`` restores them.)"""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (it is the global one that is meant)


# --- No randomness, no state ------------------------------------------------------------------------------------------


@check(
    "deterministic",
    proves="At eta = 0 the same inputs give the same bits, whatever the state of the random generators and whatever ran in between.",
    source="section 4.1 of arXiv 2010.02502: with sigma = 0 the samples are a function of x_T",
    tolerance="none: every bit",
)
def deterministic(context: Context) -> None:
    if context.offers("step"):
        cases = [random_step(context, setting, 4) for setting in _at_eta_0(context)]
        cases = [case.but(source=context.source(SHAPE[0])) for case in cases]
        first = [kept(context.step(case)) for case in cases]
        for seed in (1, 2):
            order = list(enumerate(cases))[:: (-1) ** seed]
            for i, case in order:
                again = case.but(source=context.source(SHAPE[0]))
                _disturbed(seed)
                rule = (
                    "a step at eta = 0 must give the same bits for the same inputs, whatever a random generator's state"
                )
                same_results(context, rule, context.step(again), first[i])
    x_T, setting = context.normal(*SHAPE), context.setting(num_inference_steps=4)
    ends = []
    for seed in (1, 2, 3):
        source = context.source(len(x_T))
        _disturbed(seed)
        ends.append(context.sample(setting, linear_model, x_T.clone(), source).clone())
        rule = "a run at eta = 0 must give the same bits for the same x_T, whatever a random generator's state"
        same_bits(context, rule, ends[-1], ends[0])
        context.sample(setting.but(num_inference_steps=2), linear_model, context.normal(*SHAPE))


@check(
    "draws-nothing",
    proves="At eta = 0 no random number is drawn: not from the generator given, nor from torch's, NumPy's or Python's.",
    source="equation 12 of arXiv 2010.02502: at sigma = 0 it has no noise",
    tolerance="none: every bit of the generators' states",
)
def draws_nothing(context: Context) -> None:
    def hold(what: str, source: Any, call: Any) -> None:
        before = _states(source)
        call()
        context.measured(0.0)
        for name, state in _states(source).items():
            if state != before[name]:
                raise CheckFailedError(
                    f"{what} at eta = 0 must draw no random numbers, got {name} in another state than before: whoever shares it "
                    "gets other numbers from it than beside another sampler"
                )

    if context.offers("step"):
        for setting in _at_eta_0(context):
            for index in (4, 9):
                source = context.source(SHAPE[0])
                case = random_step(context, setting, index).but(source=source)
                hold("a step", source, lambda case=case: context.step(case))
    source, x_T = context.source(SHAPE[0]), context.normal(*SHAPE)
    hold("a run", source, lambda: context.sample(context.setting(num_inference_steps=4), linear_model, x_T, source))


def _states(source: Any) -> dict[str, Any]:
    """Return the state of every generator that a sampler may draw from, in a form that can be
    compared."""
    given = source if isinstance(source, (list, tuple)) else [source]
    generators = [g for g in given if isinstance(g, torch.Generator)]
    states: dict[str, Any] = {
        f"the generator given (number {i})": g.get_state().numpy().tobytes() for i, g in enumerate(generators)
    }
    states["torch's global generator"] = torch.get_rng_state().numpy().tobytes()
    if torch.cuda.is_available():
        states["the CUDA device's generator"] = torch.cuda.get_rng_state().numpy().tobytes()
    of_numpy: Any = np.random.get_state(legacy=True)  # noqa: NPY002 (the global one)
    states["NumPy's global generator"] = (of_numpy[0], of_numpy[1].tobytes(), *of_numpy[2:])
    states["Python's global generator"] = random.getstate()
    return states


def _interleaved(context: Context) -> Iterator[StepCase]:
    """Yield steps that a cache with too narrow a key would confuse: each differs from the first in
    one respect."""
    base = context.setting()
    yield random_step(context, base, 4)
    yield random_step(context, base, 5)
    yield random_step(context, base.but(num_inference_steps=20), 9)  # the same timestep, half as far
    if "cosine" in context.subject.schedules:
        yield random_step(context, base.but(schedule="cosine"), 4)
    for path in context.settings()[1:]:
        yield random_step(context, path, 4)
    yield random_step(context, base, 4, (2, 9))
    yield from (random_step(context, setting, 4) for setting in _some_settings(context) if setting != base)
    if context.offers("levels") and base.path is None and not base.divided:
        yield random_step(context, base.but(alpha_bars=((0.1, 0.5), (0.1, 0.6), (0.2, 0.6))), 0)
        yield random_step(context, base.but(alpha_bars=((0.1, 0.5), (0.1, 0.6), (0.2, 0.6))), 1)
        yield random_step(context, base.but(alpha_bars=((0.1, 0.5), (0.1, 0.6), (0.2, 0.6))), 2)
    if context.offers("half"):
        yield random_step(context, base, 4, dtype=torch.bfloat16)
    if context.offers("float64"):
        yield random_step(context, base, 4, dtype=torch.float64)


@check(
    "no-stale-state",
    proves="Steps of different settings, levels, shapes and types give the same results in any order; so do runs within runs.",
    source="equation 12 of arXiv 2010.02502: a step is a function of its arguments",
    tolerance="that of the update the first time; after that none: every bit",
)
def no_stale_state(context: Context) -> None:
    if context.offers("step"):
        cases = list(_interleaved(context))
        first = [kept(_judged_among_others(context, case)) for case in cases]
        alternating = [i for j in range(1, len(cases)) for i in (0, j)] if context.full else [0]
        for i in [*alternating, *context.rng.permutation(len(cases))]:
            rule = "a step must not depend on the steps made before it"
            same_results(context, rule, context.step(cases[i]), first[i])
    x_T, setting, other = (
        context.normal(*SHAPE),
        context.setting(num_inference_steps=4),
        context.setting(num_inference_steps=2),
    )
    other_x_T = context.normal(2, 9)
    other_alone = context.sample(other, linear_model, other_x_T.clone()).clone()
    alone = context.sample(setting, linear_model, x_T.clone()).clone()
    inner = []

    def model_that_samples(x_t: Tensor, t: Tensor) -> Tensor:
        inner.append(context.sample(other, linear_model, other_x_T.clone()))
        return linear_model(x_t, t)

    within = context.sample(setting, model_that_samples, x_T.clone())
    same_bits(context, "a run must not depend on runs that begin and end between its steps", within, alone)
    for end in inner:
        same_bits(context, "a run must not depend on a run around it", end, other_alone)


def _judged_among_others(context: Context, case: StepCase) -> StepResult:
    """Judge a step without its smallest failing case, since other steps may cause the failure."""
    try:
        return judge(context, case)
    except CheckFailedError as error:
        raise CheckFailedError(
            f"a step must be right whatever steps were made before it, got one that is not: {error}"
        ) from None


# --- Inputs stay unchanged --------------------------------------------------------------------------------------------


def tensors_of(case: StepCase) -> dict[str, Tensor]:
    """Return all tensors that a step is given, by name."""
    named = {
        "x_t": case.x_t,
        "model_output": case.model_output,
        "noise": case.noise,
        "source": case.source,
        **case.more,
    }
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def shares_memory(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same storage."""
    return a.numel() > 0 and b.numel() > 0 and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


@check(
    "inputs-untouched",
    proves="Steps and runs write neither to their inputs nor to what a model returns, and their results have memory of their own.",
    source="equation 12 of arXiv 2010.02502: a step is a function of its arguments",
    tolerance="none: every bit",
)
def inputs_untouched(context: Context) -> None:
    if context.offers("step"):
        for setting, index in itertools.product(_some_settings(context), (0, 4, 9) if context.full else (9,)):
            _step_leaves_inputs(context, random_step(context, setting, index))
    _run_leaves_inputs(context)


def _step_leaves_inputs(context: Context, case: StepCase) -> None:
    before = {name: tensor.clone() for name, tensor in tensors_of(case).items()}
    result = context.step(case)
    for name, tensor in tensors_of(case).items():
        same_bits(context, f"a step must leave {name} unchanged", tensor, before[name])
        if shares_memory(result.x_prev, tensor):
            raise CheckFailedError(
                f"x_prev must have memory of its own unless the step is in place, got that of {name}"
            )
    if result.x0 is not None and shares_memory(result.x_prev, result.x0):
        raise CheckFailedError("x_prev and x0 must not share memory, got one tensor for both")
    found = kept(result)
    context.step(case.but(x_t=context.normal(*case.x_t.shape), model_output=context.normal(*case.x_t.shape)))
    same_results(context, "a step must leave the results of earlier steps unchanged", result, found)


def _run_leaves_inputs(context: Context) -> None:
    setting, x_T = context.setting(num_inference_steps=4), context.normal(*SHAPE)
    before, output = x_T.clone(), context.normal(*SHAPE)
    output_before = output.clone()

    def model_with_one_output(x_t: Tensor, t: Tensor) -> Tensor:
        same_bits(context, "a run must leave the tensor that its model returned unchanged", output, output_before)
        return output

    end = _run_of(context, setting, model_with_one_output, x_T)
    same_bits(context, "a run must leave x_T unchanged", x_T, before)
    same_bits(context, "a run must leave the tensor that its model returned unchanged", output, output_before)
    for name, tensor in (("x_T", x_T), ("the model's output", output)):
        if shares_memory(end, tensor):
            raise CheckFailedError(f"the samples must have memory of their own, got that of {name}")
    mirrored = _run_of(context, setting, lambda x_t, t: x_t, x_T)
    apart = context.sample(setting, lambda x_t, t: x_t.clone(), x_T)
    rule = "a model that returns its input must give the same run as one that returns a copy of it"
    same_bits(context, rule, mirrored, apart)
    same_bits(context, "a run must leave x_T unchanged", x_T, before)


def _run_of(context: Context, setting: Setting, model: Any, x_T: Tensor) -> Tensor:
    """Make a run whose model may raise ``CheckFailedError``."""
    try:
        return context.sample(setting, model, x_T)
    except Exception as error:
        if isinstance(error.__cause__, CheckFailedError):
            raise error.__cause__ from None
        raise


# --- Samples do not mix -----------------------------------------------------------------------------------------------

_SPLIT = ((0,), (1, 2), (3, 4, 5))
_PERMUTED = (3, 0, 5, 1, 4, 2)


@check(
    "batch-independence",
    proves="A sample's result does not depend on its batch: not on the batch's size or order, nor on NaN in another sample.",
    source="equation 12 of arXiv 2010.02502 is for one sample",
    tolerance="none where the arithmetic is exact; otherwise twice that of the update",
)
def batch_independence(context: Context) -> None:
    shape = (6, 3, 5, 7)
    groups = [*_SPLIT, _PERMUTED]
    rule = "a sample must not depend on its batch"
    if context.offers("step"):
        settings = _some_settings(context)
        for setting in settings if context.full else settings[:: len(settings) - 1 or 1]:
            case = random_step(context, setting, 4, shape)
            whole, allowed = kept(context.step(case)), allowed_of(context, case)
            for group in map(list, groups):
                part = context.step(_samples_of(case, group))
                same_numbers(context, f"{rule}: x_prev", part.x_prev, whole.x_prev[group], allowed[group])
            _nan_in_one_sample(context, case, whole, allowed)
    setting, x_T = context.setting(num_inference_steps=2), context.normal(*shape)
    levels = context.levels(setting)
    model = GaussianModel(setting, levels)
    allowed = float64_run(context.subject, setting, levels, model, x_T).allowed
    samples = context.sample(setting, model, x_T).clone()
    for group in map(list, groups):
        same_numbers(context, rule, context.sample(setting, model, x_T[group]), samples[group], allowed[group])
    if context.offers("eta", "seeds"):
        _seeds_belong_to_samples(context, x_T, groups)


def _samples_of(case: StepCase, group: list[int]) -> StepCase:
    noise = None if case.noise is None else case.noise[group]
    return case.but(x_t=case.x_t[group], model_output=case.model_output[group], noise=noise)


def _nan_in_one_sample(context: Context, case: StepCase, whole: StepResult, allowed: np.ndarray) -> None:
    x_t, others = case.x_t.clone(), [0, 1, 3, 4, 5]
    x_t[2] = torch.nan
    found = context.step(case.but(x_t=x_t)).x_prev[others]
    rule = "a sample must not depend on NaN in another sample: x_prev"
    same_numbers(context, rule, found, whole.x_prev[others], allowed[others])


def _seeds_belong_to_samples(context: Context, x_T: Tensor, groups: Sequence[Sequence[int]]) -> None:
    setting = context.setting(num_inference_steps=2, eta=1.0)
    seeds = context.source(len(x_T))
    whole = context.sample(setting, linear_model, x_T.clone(), seeds).clone()
    for group in map(list, groups):
        own = seeds[group] if isinstance(seeds, Tensor) else [seeds[i] for i in group]
        part = context.sample(setting, linear_model, x_T[group], own)
        rule = "at eta = 1 a sample with its own seed must not depend on its batch"
        same_numbers(context, rule, part, whole[group], 1e4 * torch.finfo(x_T.dtype).eps)
