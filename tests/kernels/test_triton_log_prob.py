"""The GPU kernels of log-densities, divergences and their gradients: their PTX, executed, has the bits of C++."""

import math

import pytest
import torch
from density_cases import PAIRS, B, F, H, make, same_bits

import ddim_fast as df
from ddim_fast.gpu_lab.emulated_gpu import emulated_gpu
from ddim_fast.kernels import cpu_step, gaussian, triton_backend
from ddim_fast.kernels.coefficients import StepTable
from ddim_fast.kernels.density import DensityInputs, new_gradients
from ddim_fast.kernels.fields import StepInputs

pytestmark = pytest.mark.usefixtures("nan_memory")  # an output that nobody wrote must not look right

TARGETS = ["sm_80", "sm_90", "sm_100"]
# Together: every pair of dtypes, one block and several, the small tile and the large one, each target.
CASES = [
    ("sm_90", {"shape": (2, 129), "types": (B, B), "clip": 1.0, "guidance": True, "mask": True}, False),
    ("sm_80", {"shape": (2, 2049), "types": (F, F), "reduction": "sum"}, False),
    ("sm_100", {"shape": (1, 2048), "types": (F, B), "clip": 1.0, "rederived": True, "min_std": 0.5}, False),
    ("sm_90", {"shape": (2, 4100), "types": (H, H), "guidance": True, "mask": True, "reduction": "sum"}, True),
    ("sm_80", {"shape": (3, 1), "types": (F, H), "clip": 1.0, "guidance": True}, True),
    ("sm_100", {"shape": (2, 3, 8, 8), "types": (B, B), "layout": "channels last", "mask": True}, True),
]
MORE = [(t, options, not divergence) for t in TARGETS for _, options, divergence in CASES]


def density_inputs(case, divergence):
    names = ("model_output_uncond", "guidance_scale")
    step = StepInputs(case.x_t, case.m, case.coefficients, **{name: case.keywords[name] for name in names})
    compared = {"x_prev": case.x_prev}
    if divergence:
        compared = {"reference": case.reference, "reference_uncond": case.reference_uncond}
    mask, min_std = case.keywords["mask"], case.keywords["min_std"]
    return DensityInputs(step, divergence, mask=mask, reduction=case.reduction, min_std=min_std, **compared)


def evaluate(backend, inputs, factors, wanted):
    counts = None if inputs.mask is None else torch.full((len(factors),), math.nan)
    result, gradients = backend.density(inputs, counts), new_gradients(inputs, wanted)
    backend.density_backward(inputs, factors, gradients)
    return [result, *([] if counts is None else [counts]), *gradients.values()]


def check(target, options, divergence):
    case = make(**options)
    inputs = density_inputs(case, divergence)
    factors = torch.linspace(-2, 0.5, len(case.x_t))
    wanted = (True, case.keywords["model_output_uncond"] is not None, not divergence)
    with emulated_gpu(target) as gpu:
        got = evaluate(triton_backend, inputs, factors, wanted)
    expected = evaluate(cpu_step, inputs, factors, wanted)
    assert len(gpu.launches) == (3 if math.prod(case.x_t.shape[1:]) > gaussian.BLOCK else 2)
    for launch in gpu.launches:
        assert not launch.execution.contractible
        assert not launch.execution.approximate
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(("target", "options", "divergence"), CASES)
def test_bits_are_those_of_cpp(target, options, divergence):
    check(target, options, divergence)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "options", "divergence"), MORE)
def test_bits_are_those_of_cpp_on_every_target(target, options, divergence):
    check(target, options, divergence)


def test_a_row_for_each_sample_of_several_blocks():
    plan = df.SamplingPlan(df.NoiseSchedule.linear(), (900, 500, 100), eta=1.0)
    case, seeds, index = make(shape=(2, 2049)), torch.tensor([1, 2]), torch.tensor([2, 0])
    got, expected = torch.empty(2), torch.empty(2)
    inputs = StepInputs(case.x_t, case.m, plan.table(min_std=0.3), index, seeds=seeds, log_prob_out=got)
    with emulated_gpu("sm_90") as gpu:
        x_prev = triton_backend.run(inputs)
    assert len(gpu.launches) == 2
    table = plan.table(min_std=0.3)
    assert same_bits(
        x_prev, df.ddim_step_from_table(case.x_t, case.m, table, index, seeds=seeds, log_prob_out=expected)
    )
    assert same_bits(got, expected)


def test_a_row_that_its_table_skips():
    """Its log-probability is 0, and x_prev has the bits of a step without one."""
    rows = [step.coefficients for step in df.SamplingPlan(df.NoiseSchedule.linear(), (900, 500), eta=1.0).steps]
    case, seeds, got = make(shape=(2, 130)), torch.tensor([1, 2]), torch.full((2,), 7.0)
    inputs = StepInputs(
        case.x_t, case.m, StepTable.of(rows, skip_quiet=True), torch.tensor([1]), seeds=seeds, log_prob_out=got
    )
    with emulated_gpu("sm_90"):
        x_prev = triton_backend.run(inputs)
    assert torch.equal(got, torch.zeros(2))
    assert same_bits(x_prev, df.ddim_step(case.x_t, case.m, rows[1]))


def test_the_cases_have_every_pair_of_dtypes_and_every_target():
    assert {options["types"] for _, options, _ in CASES} == set(PAIRS)
    assert {target for target, _, _ in CASES} == set(TARGETS)


def test_no_elements_need_no_launch():
    case = make(shape=(2, 0))
    with emulated_gpu("sm_90") as gpu:
        got = evaluate(triton_backend, density_inputs(case, False), torch.ones(2), (True, False, False))
    assert not gpu.launches
    assert torch.equal(got[0], torch.zeros(2))
