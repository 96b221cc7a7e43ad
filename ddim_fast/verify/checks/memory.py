"""What a step reads and writes: in place, in any layout, every element and nothing else, without
waiting or allocating."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..truth.cases import StepCase
from .base import CheckFailedError, CheckSkippedError, Context, check
from .compare import allowed_of, kept, same_bits, same_numbers, same_results
from .judge import judge
from .new_memory import nan_memory
from .runs import GaussianModel, float64_run
from .update import random_step

# --- In place ---------------------------------------------------------------------------------------------------------

SIZES_IN_PLACE = (0, 1, 127, 128, 129, 4097)


@check(
    "in-place",
    proves="A step that writes over x_t gives the same bits as one that does not, at every size.",
    source="equation 12 of arXiv 2010.02502, element for element",
    tolerance="none: every bit",
    needs="step in_place",
)
def in_place(context: Context) -> None:
    settings = [context.setting()]
    settings += [context.setting(clip_sample_range=1.0)] if context.offers("clip") else []
    settings += [context.setting(eta=1.0)] if context.offers("eta", "given_noise") else []
    for setting in settings:
        for size in SIZES_IN_PLACE if context.full or setting == settings[0] else SIZES_IN_PLACE[-2:]:
            case = random_step(context, setting, 4, (1, size))
            expected = kept(context.step(case))
            over = case.but(x_t=case.x_t.clone(), in_place=True)
            result = context.step(over)
            rule = f"a step in place must give the same bits as one that is not, for {size} elements"
            same_results(context, rule, result, expected)
            same_bits(context, f"{rule}: x_t after the step", over.x_t, expected.x_prev)


# --- Layout -----------------------------------------------------------------------------------------------------------

IMAGES = (2, 4, 6, 5)


class Place(NamedTuple):
    """Memory, and the tensor that is a part of it."""

    memory: Tensor
    part: Tensor


def _of_twice(shape: tuple[int, ...], dtype: torch.dtype, dim: int) -> Tensor:
    return torch.full([n * 2 if i == dim else n for i, n in enumerate(shape)], 7.5, dtype=dtype, device="cpu")


def _place(memory: Tensor, view: Callable[[Tensor], Tensor]) -> Place:
    return Place(memory, view(memory))


LAYOUTS: dict[str, Callable[[tuple[int, ...], torch.dtype], Place]] = {
    "the first half of twice the channels": lambda s, d: _place(_of_twice(s, d, 1), lambda t: t[:, : s[1]]),
    "the second half of twice the channels": lambda s, d: _place(_of_twice(s, d, 1), lambda t: t[:, s[1] :]),
    "every other element of its rows": lambda s, d: _place(_of_twice(s, d, 3), lambda t: t[..., ::2]),
    "every other sample of a batch": lambda s, d: _place(_of_twice(s, d, 0), lambda t: t[1::2]),
    "transposed": lambda s, d: _place(
        torch.full((s[0], s[3], s[2], s[1]), 7.5, dtype=d, device="cpu"), lambda t: t.transpose(1, 3)
    ),
    "channels_last": lambda s, d: _place(
        torch.full(s, 7.5, dtype=d, device="cpu").contiguous(memory_format=torch.channels_last), lambda t: t
    ),
    "one element past an aligned address": lambda s, d: _place(
        torch.full((math.prod(s) + 1,), 7.5, dtype=d, device="cpu"), lambda t: t[1:].view(s)
    ),
}


def _laid_out(name: str, values: Tensor) -> Place:
    """Return the same values in another layout, on the same device."""
    place = LAYOUTS[name](values.shape, values.dtype)
    if values.device.type != "cpu":
        offset, strides = place.part.storage_offset(), place.part.stride()
        memory = torch.empty_strided(
            place.memory.shape, place.memory.stride(), dtype=values.dtype, device=values.device
        )
        place = Place(memory.fill_(7.5), memory.as_strided(values.shape, strides, offset))
    place.part.copy_(values)
    return place


@check(
    "layout",
    proves="The result does not depend on the layout of tensors in memory: sliced, transposed, expanded, unaligned, channels_last.",
    source="equation 12 of arXiv 2010.02502, element for element; torch's tensors are views of memory",
    tolerance="none where the arithmetic is exact; otherwise that of the update",
)
def layout(context: Context) -> None:
    if context.offers("step"):
        noisy = [context.setting(eta=1.0)] if context.offers("eta", "given_noise") and context.full else []
        for setting in [context.setting(), *noisy]:
            _steps_by_layout(context, random_step(context, setting, 4, IMAGES))
    _runs_by_layout(context)


def _steps_by_layout(context: Context, case: StepCase) -> None:
    expected, allowed = kept(judge(context, case)), allowed_of(context, case)
    names = ["x_t", "model_output"] + (["noise"] if case.noise is not None else [])
    groups = [[name] for name in names] + [names]
    for number, layout_name in enumerate(LAYOUTS):
        for group in groups if context.full else [groups[number % len(groups)]]:
            changed = {name: _laid_out(layout_name, getattr(case, name)).part for name in group}
            found = context.step(case.but(**changed)).x_prev
            rule = f"x_prev must not depend on the layout of {' and '.join(group)} ({layout_name})"
            same_numbers(context, rule, found, expected.x_prev, allowed)
        if context.offers("in_place"):
            _in_place_by_layout(context, case, layout_name, expected.x_prev)
    _expanded(context, case)


def _in_place_by_layout(context: Context, case: StepCase, layout_name: str, expected: Tensor) -> None:
    place = _laid_out(layout_name, case.x_t)
    inside = _laid_out(layout_name, torch.full_like(case.x_t, 1.0)).memory == 1.0
    before = place.memory.clone()
    context.step(case.but(x_t=place.part, in_place=True))
    rule = f"a step in place must give the same bits as one that is not ({layout_name})"
    same_numbers(context, rule, place.part, expected, allowed_of(context, case))
    rule = f"a step in place must write to x_t only, not to the memory around it ({layout_name})"
    same_bits(context, rule, place.memory[~inside], before[~inside])


def _expanded(context: Context, case: StepCase) -> None:
    """Check inputs in which one sample or one channel is expanded to all, without memory for each."""
    for name in ("x_t", "model_output"):
        for dim in (0, 1):
            one = getattr(case, name).narrow(dim, 0, 1)
            given = case.but(**{name: one.expand(case.x_t.shape)})
            copied = case.but(**{name: one.expand(case.x_t.shape).contiguous()})
            found, expected = context.step(given).x_prev, context.step(copied).x_prev
            rule = f"x_prev must not depend on whether {name} is expanded over dimension {dim}"
            same_numbers(context, rule, found, expected, allowed_of(context, copied))


def _runs_by_layout(context: Context) -> None:
    setting, x_T = context.setting(num_inference_steps=2 if context.full else 1), context.normal(*IMAGES)
    levels = context.levels(setting)
    model = GaussianModel(setting, levels)
    expected = context.sample(setting, model, x_T).clone()
    allowed = float64_run(context.subject, setting, levels, model, x_T).allowed
    for name in LAYOUTS:
        found = context.sample(setting, model, _laid_out(name, x_T).part)
        same_numbers(context, f"the samples must not depend on the layout of x_T ({name})", found, expected, allowed)

        def laid_out_model(x_t: Tensor, t: Tensor, name: str = name) -> Tensor:
            return _laid_out(name, model(x_t, t)).part

        found = context.sample(setting, laid_out_model, x_T)
        rule = f"the samples must not depend on the layout of the model's output ({name})"
        same_numbers(context, rule, found, expected, allowed)


# --- Every element ----------------------------------------------------------------------------------------------------

SIZES = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025, 4097)
FEW_SIZES = (1, 3, 8, 17, 33, 127, 257, 1025, 4097)


@check(
    "every-element",
    proves="Every element of a result is written, at every size: no tail is forgotten.",
    source="equation 12 of arXiv 2010.02502, for each element; new memory is filled with NaN for this check",
    tolerance="none: no NaN",
)
def every_element(context: Context) -> None:
    dtypes = [torch.float32] + ([torch.float16, torch.bfloat16] if context.offers("half") and context.full else [])
    sizes = SIZES if context.full or context.subject.on_gpu() is context.subject else FEW_SIZES
    setting = context.setting(num_inference_steps=2)
    with nan_memory("warn"):
        for dtype in dtypes:
            for size in sizes:
                if context.offers("step"):
                    result = context.step(random_step(context, setting, 0, (1, size), dtype))
                    _no_nan(context, f"x_prev of {size} elements in {dtype}", result.x_prev)
                    if result.x0 is not None:
                        _no_nan(context, f"x0 of {size} elements in {dtype}", result.x0)
                else:
                    end = context.sample(setting, lambda x_t, t: x_t * 0.4, context.normal(1, size, dtype=dtype))
                    _no_nan(context, f"a run's samples of {size} elements in {dtype}", end)


def _no_nan(context: Context, what: str, tensor: Tensor) -> None:
    missing = tensor.isnan().reshape(-1).nonzero().reshape(-1).tolist()
    context.measured(0.0)
    if missing:
        raise CheckFailedError(
            f"every element of {what} must be written, got NaN in {len(missing)} of them, from element {missing[0]} to {missing[-1]}: "
            "new memory was filled with NaN for this check"
        )


# --- Claims about speed -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _fake_gpu() -> Iterator[Any]:
    with contextlib.ExitStack() as stack:
        try:
            from ...gpu_lab.fake_cuda import fake_cuda

            device = stack.enter_context(fake_cuda())
        except (ImportError, RuntimeError) as error:
            raise CheckSkippedError(f"the fake GPU does not work on this machine: {error}") from error
        yield device


def _on_gpu(context: Context, in_place: bool) -> tuple[Context, list[StepCase]]:
    """Return a context for the subject on the fake GPU, and steps there; to be called inside
    ``_fake_gpu``."""
    eta = 1.0 if context.offers("eta", "given_noise") else 0.0
    subject = context.subject.on_gpu()
    there = Context(subject, context.rng, context.full, torch.device("cuda"))
    cases = []
    for setting in (context.setting(), context.setting(eta=eta)):
        x_t, m, z = (torch.empty(IMAGES, dtype=torch.float32, device="cuda") for _ in range(3))
        cases += [StepCase(setting, i, x_t, m, z if setting.eta else None, in_place=in_place) for i in (0, 4)]
    return there, cases


@check(
    "no-waiting",
    proves="A step on a GPU neither waits for the GPU nor copies anything between host and device.",
    source="CUDA C++ programming guide, stream capture: what waits or copies from the host cannot be captured. This concerns speed only",
    tolerance="none: no wait, no copy",
    needs="step no_waiting",
)
def no_waiting(context: Context) -> None:
    _rehearse(context)
    with _fake_gpu() as device:
        there, cases = _on_gpu(context, in_place=False)
        for case in cases:
            with device.steady_state(refuse=False):
                there.step(case)  # what is made only once, such as a table of coefficients on the device, is made here
            with device.steady_state(refuse=False) as steady:
                there.step(case)
            context.measured(0.0)
            if found := [*steady.syncs, *steady.copies]:
                raise CheckFailedError(
                    f"a step on a GPU must not wait for it or copy between host and device, got {len(found)} such operations, the "
                    f"first: {found[0]}"
                )


def _rehearse(context: Context) -> None:
    """Make the same steps on the host: here a subject can read what it reads once from its tables,
    which have no values on a fake GPU."""
    eta = 1.0 if context.offers("eta", "given_noise") else 0.0
    for setting in (context.setting(), context.setting(eta=eta)):
        context.levels(setting)
        for index in (0, 4):
            context.step(random_step(context, setting, index, IMAGES))


_WRAPPED_NUMBER = 64  # bytes at most: torch makes tensors of Python numbers for its operators


@check(
    "no-allocation",
    proves="A step in place allocates no tensor.",
    source="the subject's own claim. This concerns speed only",
    tolerance=f"none; on a CPU, allocations of up to {_WRAPPED_NUMBER} bytes are not counted: torch wraps Python numbers in them",
    needs="step in_place no_allocation",
)
def no_allocation(context: Context) -> None:
    _rehearse(context)
    if context.subject.on_gpu() is not context.subject:
        with _fake_gpu() as device:
            there, cases = _on_gpu(context, in_place=True)
            for case in cases:
                with device.steady_state(refuse=False):
                    there.step(case)
                with device.steady_state(refuse=False) as steady:
                    there.step(case)
                _allocated_nothing(
                    context, {name: n for r in steady.regions.values() for name, n in r.allocations.items()}
                )
        return
    for index in (0, 4):
        case = random_step(context, context.setting(), index, IMAGES).but(in_place=True)
        context.step(case)
        _allocated_nothing(context, _allocations(partial(context.step, case), context.device))


def _allocations(call: Callable[[], object], device: torch.device) -> dict[str, int]:
    """Return the bytes that torch allocates during a call, by the operator that asked for them."""
    if device.type == "cuda":
        before = torch.cuda.memory_stats(device)["allocated_bytes.all.allocated"]
        call()
        more = torch.cuda.memory_stats(device)["allocated_bytes.all.allocated"] - before
        return {"the CUDA allocator": more} if more else {}
    try:
        from torch.autograd import profiler_legacy
    except ImportError as error:
        raise CheckSkippedError(f"this torch does not report what it allocates on a CPU: {error}") from error
    # torch.profiler would write lines of its own to the terminal.
    with profiler_legacy.profile(profile_memory=True) as profiler:
        call()
    found: dict[str, int] = {}
    for event in profiler.function_events:
        if event.cpu_memory_usage > _WRAPPED_NUMBER:
            found[event.name] = found.get(event.name, 0) + event.cpu_memory_usage
    return found


def _allocated_nothing(context: Context, found: dict[str, int]) -> None:
    context.measured(0.0)
    if found:
        listed = ", ".join(f"{name} ({count})" for name, count in found.items())
        raise CheckFailedError(f"a step in place must allocate no tensor, got {listed}")


__all__ = ["every_element", "in_place", "layout", "no_allocation", "no_waiting"]
