"""Launches of the Triton step that were prepared: each is used for what it was made for alone, and whoever watches sees it."""

import contextlib
import copy
import dataclasses
import inspect
import itertools
import random

import pytest
import torch
import triton
import triton_cases

from ddim_fast.gpu_lab.emulated_gpu import emulated_gpu
from ddim_fast.gpu_lab.fake_cuda import fake_cuda
from ddim_fast.gpu_lab.triton_internals import hook_launches
from ddim_fast.kernels import cpu_step, dispatch, triton_backend, triton_internals, triton_step
from ddim_fast.kernels.coefficients import StepCoefficients
from ddim_fast.kernels.dispatch import ddim_step, ddim_step_from_table
from ddim_fast.kernels.fields import StepInputs
from ddim_fast.kernels.triton_backend import run, run_plain
from ddim_fast.plans.plan import SamplingPlan
from ddim_fast.plans.schedules import NoiseSchedule

PLAN = SamplingPlan(NoiseSchedule.linear(), (900, 500, 100, 0), eta=1.0)
ROW = StepCoefficients(1.1, -0.7, 0.3, 0.9, 0.2, 0.8, 0.6, 0.0)
NAMES = list(inspect.signature(run_plain).parameters)[:18]


def same_bits(a, b):
    kind = {4: torch.int32, 2: torch.int16}[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


@pytest.fixture
def prepared(monkeypatch):
    """The launches that are prepared, none at first."""
    monkeypatch.setattr(triton_step._launches, "_prepared", {})
    return triton_step._launches._prepared


@contextlib.contextmanager
def only_prepared():
    """Let nothing be launched that was not prepared."""

    def describe(*arguments):
        raise AssertionError("a launch was not prepared")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_step._launches, "_describe", describe)
        yield


def arguments(**given):
    """The arguments of a plain step, in order."""
    x = torch.linspace(-2, 2, 1024).view(2, 512)
    values = dict.fromkeys(NAMES) | dict(
        x_t=x,
        model_output=x.flip(0).contiguous(),
        coefficients=ROW,
        noise_step=0,
        noise_stream=0,
        log_prob_reduction="mean",
    )
    values |= {"x_prev": torch.full_like(values["x_t"], torch.nan)} | given
    return [values[name] for name in NAMES]


def by_cpp(values):
    values = [torch.clone(value) if isinstance(value, torch.Tensor) else value for value in values]
    return cpu_step.extension.step(*values)


def at(offset, like):
    """A copy that begins so many elements after a multiple of 64 bytes."""
    memory = torch.empty(like.numel() + 64, dtype=like.dtype)
    begin = -memory.data_ptr() // memory.element_size() % 16 + offset
    return memory[begin : begin + like.numel()].view(like.shape).copy_(like)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["x_t", "model_output", "x_prev", "x0"])
def test_a_launch_for_aligned_memory_is_used_for_no_other(prepared, name, dtype):
    values = [at(0, v.to(dtype)) if isinstance(v, torch.Tensor) else v for v in arguments(x0=torch.empty(2, 512))]
    expected = by_cpp(values)
    with emulated_gpu("sm_90") as gpu:
        assert same_bits(run_plain(*values), expected)
        with only_prepared():
            assert same_bits(run_plain(*values), expected)
        other = [at(1, v) if n == name else v for n, v in zip(NAMES, values, strict=True)]
        with pytest.raises(AssertionError, match="was not prepared"), only_prepared():
            run_plain(*other)
        assert same_bits(run_plain(*other), expected)
        with only_prepared():  # any other address of the same kind
            assert same_bits(
                run_plain(*(at(1, v) if n == name else v for n, v in zip(NAMES, values, strict=True))), expected
            )
            assert same_bits(run_plain(*(at(0, v) if isinstance(v, torch.Tensor) else v for v in values)), expected)
    assert len(prepared) == 2
    vectors = "v4.b32"
    assert [vectors in launch.ptx for launch in gpu.launches[:2]] == [True, True]
    assert len({launch.ptx for launch in gpu.launches}) == 2


def test_launches_of_every_kind_in_any_order_are_those_of_cpp(prepared):
    rng = random.Random(0)
    options = triton_cases.OPTIONS | {"shape": [(1, 1), (2, 127), (3, 128), (2, 129)]}
    small = [{name: rng.choice(values) for name, values in options.items()} for _ in range(8)]
    order = rng.sample([*small, *small], 16)
    with emulated_gpu("sm_90"):
        for choice in order:
            case = triton_cases.make(choice)
            inputs, other = case.inputs, copy.deepcopy(case.inputs)
            given = {field.name: getattr(other, field.name) for field in dataclasses.fields(StepInputs) if field.init}
            given |= {"out": given.pop("x_prev"), "x0_out": given.pop("x0"), "backend": "cpu"}
            del given["index"]
            assert same_bits(run(inputs), ddim_step(**given)), triton_cases.name_of(choice)
    assert 0 < len(prepared) <= len(small)


NUMBERS = {
    "another size": lambda v: [t[:, :511].contiguous() if isinstance(t, torch.Tensor) else t for t in v],
    "another batch": lambda v: [t[:1].contiguous() if isinstance(t, torch.Tensor) else t for t in v],
    "half a tensor": lambda v: [t.half() if n == "model_output" else t for n, t in zip(NAMES, v, strict=True)],
    "an x0": lambda v: [torch.empty_like(v[0]) if n == "x0" else t for n, t in zip(NAMES, v, strict=True)],
    "a clipped row": lambda v: [
        dataclasses.replace(ROW, clip=0.5) if n == "coefficients" else t for n, t in zip(NAMES, v, strict=True)
    ],
    "noise": lambda v: [
        {
            "coefficients": dataclasses.replace(ROW, prev_noise=0.5),
            "seeds": torch.tensor([3, -4]),
            "noise_step": 2**32 - 1,
        }.get(n, t)
        for n, t in zip(NAMES, v, strict=True)
    ],
}


@pytest.mark.parametrize("what", NUMBERS)
def test_a_launch_is_used_for_no_other_numbers(prepared, what):
    first = arguments()
    second = NUMBERS[what](arguments())
    with emulated_gpu("sm_90"):
        for values in (first, second, first, second):
            assert same_bits(run_plain(*values), by_cpp(values))
    assert len(prepared) == 2


def test_steps_and_streams_of_noise_share_a_launch(prepared):
    noisy = dict(coefficients=dataclasses.replace(ROW, prev_noise=0.5), seeds=torch.tensor([3, -4]))
    with emulated_gpu("sm_90"):
        for step, stream in itertools.product((0, 1, 16, 2**31, 2**32 - 1), (0, 1)):
            values = arguments(**noisy, noise_step=step, noise_stream=stream)
            assert same_bits(run_plain(*values), by_cpp(values))
    assert len(prepared) == 1


@pytest.mark.parametrize("n", [512, 2049])  # one block, and two
def test_log_probabilities_have_launches_of_their_own(prepared, n):
    x = torch.linspace(-2, 2, 2 * n).view(2, n)
    row, seeds = dataclasses.replace(ROW, prev_noise=0.5), torch.tensor([3, -4])

    def step(reduction, take):
        out = torch.full_like(x, torch.nan)
        log_prob = None if reduction is None else torch.full((2,), torch.nan)
        inputs = StepInputs(x, x, row, seeds=seeds, x_prev=out, log_prob_out=log_prob)
        take(inputs if reduction is None else dataclasses.replace(inputs, log_prob_reduction=reduction))
        return [out] if log_prob is None else [out, log_prob]

    kinds = (None, "mean", "sum")
    expected = {reduction: step(reduction, cpu_step.run) for reduction in kinds}
    with emulated_gpu("sm_90"):
        for reduction in kinds:
            assert all(map(same_bits, step(reduction, run), expected[reduction]))
        with only_prepared():
            for reduction in reversed(kinds):
                assert all(map(same_bits, step(reduction, run), expected[reduction]))
    assert len(prepared) == len(kinds)


def test_a_step_with_log_probabilities_is_left_to_the_checks(prepared):
    row = dataclasses.replace(ROW, prev_noise=0.5)
    values = arguments(coefficients=row, noise=torch.ones(2, 512), log_prob_out=torch.empty(2))
    assert by_cpp(values) is not None
    assert run_plain(*values) is None
    assert not prepared


@pytest.mark.parametrize("each", [False, True])
def test_a_step_by_a_row_of_a_table(prepared, each):
    table, index = PLAN.table("cpu", 1.5), torch.tensor([2, 1] if each else [2])
    seeds = torch.tensor([5, 6])
    values = arguments(coefficients=table, seeds=seeds, guidance_scale=0.0, model_output_uncond=torch.ones(2, 512))
    x, m, uncond = values[0], values[1], values[3]
    expected = ddim_step_from_table(x, m, table, index, model_output_uncond=uncond, seeds=seeds)
    with emulated_gpu("sm_90"):
        for _ in range(2):
            assert same_bits(run_plain(*values, index), expected)
    assert len(prepared) == 1
    declined = cpu_step.extension.plain
    assert declined(*values, torch.tensor([2.0])) is None
    assert declined(*values, torch.tensor([2, 1, 0])) is None
    assert declined(*arguments(coefficients=table, seeds=seeds, guidance_scale=0.0), index) is None  # without guidance
    assert declined(*arguments(coefficients=PLAN.table(), noise_step=-1, seeds=seeds), index) is None
    assert declined(*arguments(coefficients=PLAN.table()), index) is None  # without noise
    assert declined(*arguments(coefficients=table, seeds=seeds, guidance_scale=0.0), None) is None  # a table is no row
    assert declined(*arguments(), index) is None  # nor a row a table
    with pytest.raises(TypeError, match="coefficients must be a StepCoefficients"):
        ddim_step(x, m, table)


X = torch.ones(2, 512)
NOT_PLAIN = {
    "a list": dict(model_output=[1.0]),
    "another shape": dict(model_output=torch.ones(2, 511)),
    "float64": dict(x_t=X.double(), model_output=X.double(), x_prev=X.double()),
    "strides": dict(model_output=torch.ones(512, 2).t()),
    "a subclass": dict(model_output=torch.nn.Parameter(torch.ones(2, 512))),
    "an overlap": dict(x_prev=torch.ones(1537)[1:1025].view(2, 512), x_t=torch.ones(1537)[:1024].view(2, 512)),
    "a history that is written elsewhere": dict(history=X, x0=X),
    "no history": dict(coefficients=dataclasses.replace(ROW, prev_history=0.5)),
    "no noise": dict(coefficients=dataclasses.replace(ROW, prev_noise=0.5)),
    "thresholds without a clip": dict(thresholds=torch.ones(2)),
    "a scale alone": dict(guidance_scale=2.0),
    "an infinite scale": dict(guidance_scale=float("inf"), model_output_uncond=X),
    "no row": dict(coefficients=None),
    "an unknown reduction": dict(log_prob_reduction="most"),
    "a least deviation of nothing": dict(min_std=0.5),
}


@pytest.mark.parametrize("what", NOT_PLAIN)
def test_what_is_not_plain_is_left_to_the_checks(prepared, what):
    values = arguments(**NOT_PLAIN[what])
    if what == "an overlap":
        memory = torch.ones(1537)
        values[NAMES.index("x_t")], values[NAMES.index("x_prev")] = (
            memory[:1024].view(2, 512),
            memory[1:1025].view(2, 512),
        )
    assert cpu_step.extension.step(*values) is None
    assert run_plain(*values) is None
    assert run_plain(*arguments(), normals="quick") is None
    assert not prepared


def test_gradients_and_modes_are_left_to_the_checks():
    values = arguments(model_output=torch.ones(2, 512, requires_grad=True))
    assert run_plain(*values) is None
    with torch.no_grad():
        assert cpu_step.extension.plain(*values, None) == (2, 512)
    values = arguments()
    assert cpu_step.extension.plain(*values, None) == (2, 512)
    from torch.utils._python_dispatch import TorchDispatchMode

    with TorchDispatchMode():
        assert cpu_step.extension.plain(*values, None) is None


def test_each_device_has_launches_of_its_own(prepared):
    values = arguments()
    for target in ("sm_80", "sm_90", "sm_80"):
        with emulated_gpu(target) as gpu:
            assert same_bits(run_plain(*values), by_cpp(values))
        assert f".target {target}" in gpu.launches[0].ptx
    assert len(prepared) == 2


def test_nothing_is_launched_for_nothing(prepared):
    empty = torch.empty(0, 512)
    values = arguments(x_t=empty, model_output=empty, x_prev=empty)
    assert run_plain(*values) is empty
    assert run_plain(*arguments(x_t=empty, model_output=empty, x_prev=None)).shape == (0, 512)


def test_whoever_watches_sees_every_launch(prepared):
    values = arguments()
    expected = by_cpp(values)
    seen = []
    with emulated_gpu("sm_90") as gpu:
        for _ in range(2):
            run_plain(*values)
        assert len(prepared) == 1
        with contextlib.ExitStack() as stack:
            hook_launches(stack, lambda kernel, run, args, options: seen.append((kernel, run, args, options)))
            run_plain(*values)
        kernel, again, args, options = seen.pop()
        assert kernel is triton_step.ddim_step_kernel
        assert len(gpu.launches) == 2
        values[NAMES.index("x_prev")].fill_(torch.nan)
        again(*args, **options)
        assert same_bits(values[NAMES.index("x_prev")], expected)
        for chain in (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook):
            chain.add(seen.append)
            try:
                run_plain(*values)
            finally:
                chain.remove(seen.append)
            assert seen.pop() is not None
        triton_step.ddim_step_kernel.add_pre_run_hook(lambda *args, **options: seen.append(args))
        try:
            run_plain(*values)
        finally:
            triton_step.ddim_step_kernel.pre_run_hooks.clear()
        assert len(seen) == 1
        with only_prepared():
            run_plain(*values)


def test_a_triton_that_is_not_known_is_asked_as_users_ask_it(prepared, monkeypatch):
    monkeypatch.setattr(triton_internals, "_KNOWN_LAUNCHES", ())
    values = arguments()
    expected = by_cpp(values)
    with emulated_gpu("sm_90"):
        run_plain(*values)
        values[NAMES.index("x_prev")].fill_(torch.nan)
        with only_prepared():
            assert same_bits(run_plain(*values), expected)


def test_this_triton_is_known():
    assert ".".join(triton.__version__.split(".")[:2]) in triton_internals._KNOWN_LAUNCHES
    assert not triton_internals.is_watched(triton_step.ddim_step_kernel)


def test_on_amd_nothing_is_prepared(prepared, monkeypatch):
    monkeypatch.setattr(triton_internals, "is_amd", lambda: True)
    with emulated_gpu("sm_90"):
        run_plain(*arguments())
    assert not prepared


def test_so_many_launches_are_kept(prepared, monkeypatch):
    monkeypatch.setattr(triton_internals, "_MOST_PREPARED", 2)
    with emulated_gpu("sm_90"):
        for size in (1, 2, 3, 1):
            values = arguments()
            values = [v[:, :size].contiguous() if isinstance(v, torch.Tensor) else v for v in values]
            assert same_bits(run_plain(*values), by_cpp(values))
            assert len(prepared) <= 2


def test_public_steps_on_a_device_hand_over_what_they_were_given(monkeypatch):
    taken = []

    def spy(*args, **options):
        taken.append(inspect.signature(run_plain).bind(*args, **options).arguments)
        return args[NAMES.index("x_prev")]

    monkeypatch.setattr(triton_backend, "run_plain", spy)
    with fake_cuda():
        tensors = {
            name: torch.ones(2, 3, device="cuda") for name in NAMES if name not in ("coefficients", "guidance_scale")
        }
        tensors |= dict(noise_step=3, noise_stream=4)
        public = {"x_prev": "out", "x0": "x0_out"}
        call = {public.get(name, name): value for name, value in tensors.items()}
        result = ddim_step(**call, coefficients=ROW, guidance_scale=2.0)
        by_row = taken.pop()
        assert result is tensors["x_prev"]
        assert by_row == tensors | dict(coefficients=ROW, guidance_scale=2.0)
        table, index = PLAN.table("cuda", 2.0), torch.zeros(1, dtype=torch.int64, device="cuda")
        del call["min_std"]  # the table's
        ddim_step_from_table(**call, table=table, index=index, normals="fast")
        by_table = taken.pop()
        expected = dict(coefficients=table, guidance_scale=0.0, min_std=None, index=index, normals="fast")
        assert by_table == tensors | expected
        assert dispatch.triton_backend.run_plain is spy
