"""The Triton kernels' compiled code, executed: the PTX for each GPU, instruction by instruction, on an emulator that checks every access.

The bits are those of the C++ kernel, and float64 agrees within the table of tolerances. What the interpreter shows is in
``interpreted_triton.py``, which runs in a process of its own.
"""

import copy
import functools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
import triton_cases
from covering import covering
from mutants import MUTANTS

from ddim_fast.gpu_lab.emulated_gpu import emulated_gpu
from ddim_fast.gpu_lab.ptx.errors import PtxError
from ddim_fast.kernels import cpu_step, gaussian, noise, triton_step, triton_thresholds
from ddim_fast.kernels.contract import StepCoefficients, StepInputs
from ddim_fast.kernels.dispatch import ddim_step, ddim_step_from_table
from ddim_fast.kernels.thresholding import dynamic_thresholds, quantile_of_magnitude
from ddim_fast.kernels.triton_backend import dynamic_thresholds as thresholds_by_triton
from ddim_fast.kernels.triton_backend import run, unsupported_reasons
from ddim_fast.plans.plan import SamplingPlan
from ddim_fast.plans.schedules import NoiseSchedule

pytestmark = pytest.mark.usefixtures("nan_memory")  # an output that nobody wrote must not look right

TARGETS = ["sm_80", "sm_90", "sm_100"]
per_target = pytest.mark.parametrize("target", TARGETS)
CHOICES = covering(triton_cases.OPTIONS, seed=1)
# Each pair of options meets on one of the targets in the fast tests, and on every target in the slow ones.
SHARED_OUT = [(TARGETS[i % len(TARGETS)], choice) for i, choice in enumerate(CHOICES)]
THE_REST = [(target, choice) for choice in CHOICES for target in TARGETS if (target, choice) not in SHARED_OUT]


def same_bits(a, b):
    kind = {4: torch.int32, 2: torch.int16}[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def twin(inputs):
    """The same inputs in other memory."""
    return copy.deepcopy(inputs)


def check(target, choice):
    case = triton_cases.make(choice)
    inputs, other = case.inputs, twin(case.inputs)
    with emulated_gpu(target) as gpu:
        result = run(inputs)
    several_blocks = math.prod(inputs.x_t.shape[1:]) > gaussian.BLOCK
    assert len(gpu.launches) == (2 if inputs.log_prob_out is not None and several_blocks else 1)
    for launch in gpu.launches:
        assert not launch.execution.contractible  # nothing that the assembler may fuse: the bits are certain
        assert not launch.execution.approximate
    assert result is inputs.x_prev
    case.check(result)
    assert cpu_step.extension is not None, cpu_step.missing_reason
    ddim_step(
        other.x_t,
        other.model_output,
        other.coefficients,
        backend="cpu",
        out=other.x_prev,
        x0_out=other.x0,
        **{
            name: getattr(other, name)
            for name in (
                "model_output_uncond", "guidance_scale", "noise", "seeds", "noise_step", "noise_stream", "thresholds", "mask",
                "known_x0", "known_noise", "history", "history_2", "model_input_out", "log_prob_out", "log_prob_reduction",
                "min_std",
            )
        },
    )  # fmt: skip
    assert same_bits(result, other.x_prev), "x_prev is not what C++ gives"
    for name in ("x0", "history", "model_input_out", "log_prob_out"):
        assert getattr(inputs, name) is None or same_bits(getattr(inputs, name), getattr(other, name)), (
            f"{name} is not what C++ gives"
        )


@pytest.mark.parametrize(
    ("target", "choice"), SHARED_OUT, ids=lambda v: v if isinstance(v, str) else triton_cases.name_of(v)
)
def test_step_is_that_of_cpp_bit_by_bit_and_near_float64(target, choice):
    check(target, choice)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "choice"), THE_REST, ids=lambda v: v if isinstance(v, str) else triton_cases.name_of(v)
)
def test_step_is_that_of_cpp_on_every_target(target, choice):
    check(target, choice)


def test_interpreted_kernels():
    """``interpreted_triton.py``, in a process in which Triton interprets."""
    folder = Path(__file__).parents[1]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder / "interpreted_triton.py")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=folder.parent,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout


# --- the noise ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def words_kernel(out_ptr, numbers_ptr, BLOCK: tl.constexpr):
    counter = tl.load(numbers_ptr).to(tl.uint32) + tl.arange(0, BLOCK).to(tl.uint32)
    zero = tl.zeros_like(counter)
    step, stream = tl.load(numbers_ptr + 1).to(tl.uint32), tl.load(numbers_ptr + 2).to(tl.uint32)
    key_0, key_1 = tl.load(numbers_ptr + 3).to(tl.uint32), tl.load(numbers_ptr + 4).to(tl.uint32)
    w0, w1, w2, w3 = triton_step.philox4x32(counter, zero + step, zero + stream, zero, key_0, key_1)
    at = out_ptr + tl.arange(0, BLOCK) * 4
    tl.store(at, w0)
    tl.store(at + 1, w1)
    tl.store(at + 2, w2)
    tl.store(at + 3, w3)


@triton.jit
def normals_kernel(a_ptr, b_ptr, z0_ptr, z1_ptr, BLOCK: tl.constexpr, EXACT: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b = tl.load(a_ptr + at).to(tl.uint32, bitcast=True), tl.load(b_ptr + at).to(tl.uint32, bitcast=True)
    if EXACT:
        z0, z1 = triton_step.normals_exact(a, b)
    else:
        z0, z1 = triton_step.normals_fast(a, b)
    tl.store(z0_ptr + at, z0)
    tl.store(z1_ptr + at, z1)


@per_target
@pytest.mark.parametrize("seed", [0, 1, -1, 0x243F6A8885A308D3, -(1 << 63)])
def test_words_are_those_of_the_standard(target, seed):
    key = np.array([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF], np.uint32)
    first, step, stream = (1 << 32) - 100, 0xFEDCBA98, 3
    counter = np.zeros((256, 4), np.uint32)
    counter[:, 0] = (np.arange(256, dtype=np.uint64) + first) & 0xFFFFFFFF
    counter[:, 1], counter[:, 2] = step, stream
    out = torch.zeros((256, 4), dtype=torch.int32)
    numbers = torch.tensor([first, step, stream, int(key[0]), int(key[1])])
    with emulated_gpu(target):
        words_kernel[(1,)](out, numbers, BLOCK=256)
    np.testing.assert_array_equal(out.numpy().view(np.uint32), noise.philox4x32(counter, key))


def _two_words():
    """Every kind of word: the corners of each formula, and many others."""
    rng = np.random.default_rng(0)
    corners = np.array([0, 1, 2, 127, 128, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 31) + 1, (1 << 32) - 1], np.uint32)
    near = (np.float64(2) ** np.arange(1, 32)[:, None] * [np.sqrt(0.5), 1.0]).ravel()  # where the exponent changes
    corners = np.concatenate([corners, np.rint(near).astype(np.uint32), np.rint(near).astype(np.uint32) - 1])
    a, b = (g.ravel() for g in np.meshgrid(corners, corners))
    more = rng.integers(0, 1 << 32, (2, 1 << 15), dtype=np.uint32)
    size = -(len(a) + more.shape[1]) % 1024
    return np.concatenate([a, more[0], more[0][:size]]), np.concatenate([b, more[1], more[1][:size]])


def _normals(target, a, b, exact):
    z0, z1 = torch.empty(len(a)), torch.empty(len(a))
    with emulated_gpu(target):
        normals_kernel[(len(a) // 1024,)](
            torch.from_numpy(a.view(np.int32)), torch.from_numpy(b.view(np.int32)), z0, z1, BLOCK=1024, EXACT=exact,
            enable_fp_fusion=False,
        )  # fmt: skip
    return z0.numpy(), z1.numpy()


@per_target
def test_exact_normals_are_those_of_the_standard(target):
    a, b = _two_words()
    expected = noise.words_to_normals(np.stack([a, b, a, b], axis=-1))
    z0, z1 = _normals(target, a, b, exact=True)
    np.testing.assert_array_equal(z0.view(np.int32), np.ascontiguousarray(expected[:, 0]).view(np.int32))
    np.testing.assert_array_equal(z1.view(np.int32), np.ascontiguousarray(expected[:, 1]).view(np.int32))


@per_target
def test_fast_normals_are_box_muller(target):
    """With correctly rounded approximations, as the emulator has them: what is left is float32's rounding of u, radius and angle."""
    a, b = _two_words()
    u, angle = (a.astype(np.float64) + 0.5) * 2.0**-32, b.view(np.int32) * (np.pi * 2.0**-31)
    radius = np.sqrt(-2 * np.log(u))
    z0, z1 = _normals(target, a, b, exact=False)
    eps = np.finfo(np.float32).eps
    allowed = 4 * eps * (radius + 1) + 2 * eps / np.maximum(
        radius, np.sqrt(eps)
    )  # u near 1: its rounding is what counts
    assert np.all(np.abs(z0 - radius * np.cos(angle)) <= allowed)
    assert np.all(np.abs(z1 - radius * np.sin(angle)) <= allowed)


def test_fast_normals_of_a_step_are_normal():
    from scipy import stats

    x = torch.zeros(2, 40_000)
    row = StepCoefficients(0, 0, 0, 0, 0, 0, 0, prev_noise=1)
    with emulated_gpu("sm_90"):
        z = run(StepInputs(x, x, row, seeds=torch.tensor([1, 2]), normals="fast"))
    assert stats.kstest(z.numpy().ravel(), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(z.numpy())[0, 1]) < 0.02


# --- rows in device memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 1.0])
def test_the_step_is_the_row_that_the_index_says(clip):
    plan = SamplingPlan(NoiseSchedule.linear(), (900, 500, 100, 0), eta=1.0, clip_sample_range=clip)
    table, index = plan.table(), torch.zeros(1, dtype=torch.int64)
    torch.manual_seed(0)
    x, m, uncond = torch.randn(3, 2, 515)
    x_t, expected, seeds = x.clone(), x.clone(), torch.tensor([3, -4])
    table = plan.table("cpu", 1.0)
    table.set_guidance_scale(1.5)
    with emulated_gpu("sm_90") as gpu:
        for step in plan.steps:
            run(StepInputs(x_t, m, table, index, model_output_uncond=uncond, seeds=seeds, noise_step=7, x_prev=x_t))
            index.add_(1)
            ddim_step(
                expected, m, step.coefficients, model_output_uncond=uncond, guidance_scale=1.5, seeds=seeds,
                noise_step=7 + step.index, out=expected, backend="cpu",
            )  # fmt: skip
            assert same_bits(x_t, expected), step
    assert len(gpu.launches) == len(plan.steps)


@pytest.mark.parametrize("n_elements", [1, 129, 4000])
@pytest.mark.parametrize("noise", ["none", "given", "seeds"])
def test_each_sample_has_the_row_of_its_own_index(noise, n_elements):
    plan = SamplingPlan(NoiseSchedule.linear(), (900, 500, 100, 0), eta=0.0 if noise == "none" else 1.0)
    table, index = plan.table(), torch.tensor([3, 0, 2, 0, 1])
    torch.manual_seed(0)
    x, m, z = torch.randn(3, 5, n_elements)
    options = {"none": {}, "given": {"noise": z}, "seeds": {"seeds": torch.arange(5), "noise_step": 2**32 - 2}}[noise]
    with emulated_gpu("sm_90") as gpu:
        got = run(StepInputs(x, m, table, index, x_prev=x.clone(), **options))
    assert len(gpu.launches) == 1
    assert same_bits(got, ddim_step_from_table(x, m, table, index, **options))  # on the CPU, a call for each sample
    for i, row in enumerate(index.tolist()):
        own = {name: value if name == "noise_step" else value[i : i + 1] for name, value in options.items()}
        own["noise_step"] = (own.get("noise_step", 0) + row) % 2**32
        expected = ddim_step(x[i : i + 1], m[i : i + 1], plan.steps[row].coefficients, backend="cpu", **own)
        assert same_bits(got[i : i + 1], expected), i


def test_noise_step_and_stream_have_32_bits():
    x = torch.zeros(1, 64)
    row = StepCoefficients(0, 0, 0, 0, 0, 0, 0, prev_noise=1)
    seeds = torch.tensor([9])
    for step, stream in [(2**32 - 1, 0), (2**31, 2**32 - 1), (0, 2**31)]:
        with emulated_gpu("sm_80"):
            z = run(StepInputs(x, x, row, seeds=seeds, noise_step=step, noise_stream=stream))
        np.testing.assert_array_equal(z.numpy(), noise.standard_normals(seeds.numpy(), 64, step, stream))


def test_no_value_makes_triton_compile_again():
    triton_step.ddim_step_kernel.device_caches.clear()
    plan = SamplingPlan(NoiseSchedule.linear(), (900, 500, 100, 0), eta=1.0)
    x, m = torch.randn(2, 2, 64)
    with emulated_gpu("sm_90"):
        for step in plan.steps[:3]:
            for noise_step in (0, 1, 16, 2**32 - 1):
                run(StepInputs(x, m, step.coefficients, seeds=torch.tensor([1, 2]), noise_step=noise_step))
    (caches,) = triton_step.ddim_step_kernel.device_caches.values()
    assert len(caches[0]) == 1


# --- extremes and sizes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [float("inf"), 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_infinities_and_nans_go_where_cpp_sends_them(clip, dtype):
    values = [0.0, -0.0, 1.0, -1e30, 1e38, 1e-40, float("inf"), -float("inf"), float("nan")]
    x, m = (g.reshape(1, -1).contiguous() for g in torch.meshgrid(*[torch.tensor(values).to(dtype)] * 2, indexing="ij"))
    for rest in (0.0, 0.5):
        row = StepCoefficients(1.5, -0.5, rest, 1.0, 0.0, 0.75, 0.5, 0.0, clip)
        x0, other_x0 = torch.empty_like(x), torch.empty_like(x)
        with emulated_gpu("sm_90"):
            got = run(StepInputs(x, m, row, x0=x0))
        expected = ddim_step(x, m, row, backend="cpu", x0_out=other_x0)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(x0, other_x0, rtol=0, atol=0, equal_nan=True)


def test_nothing_is_launched_for_no_elements():
    with emulated_gpu("sm_90") as gpu:
        for shape in [(0,), (0, 4), (3, 0), (0, 2, 8, 8)]:
            x = torch.empty(shape)
            assert run(StepInputs(x, x, StepCoefficients(1, 1, 0, 1, 0, 1, 1, 0))).shape == shape
    assert gpu.launches == []


def test_more_samples_than_the_second_axis_of_a_grid(monkeypatch):
    monkeypatch.setattr(triton_step, "_MOST_BLOCKS_Y", 4)
    x, m = torch.randn(2, 5, 700)
    row, seeds = StepCoefficients(1.5, -0.5, 0.0, 1.0, 0.0, 0.75, 0.5, 0.25), torch.arange(5)
    with emulated_gpu("sm_90") as gpu:
        got = run(StepInputs(x, m, row, seeds=seeds))
    assert gpu.launches[0].grid[:2] == (5, 2)
    assert same_bits(got, ddim_step(x, m, row, seeds=seeds, backend="cpu"))


def test_offsets_of_64_bits(monkeypatch):
    monkeypatch.setattr(triton_step, "_LARGEST_INT32", 100)
    x, m = torch.randn(2, 2, 5000)
    row, seeds = StepCoefficients(1.5, -0.5, 0.0, 1.0, 0.0, 0.75, 0.5, 0.25), torch.arange(2)
    with emulated_gpu("sm_90"):
        got = run(StepInputs(x, m, row, seeds=seeds))
    assert same_bits(got, ddim_step(x, m, row, seeds=seeds, backend="cpu"))


def test_a_large_tensor_takes_the_large_tile():
    x, m = torch.randn(2, 1, 1 << 20)
    row, seeds = StepCoefficients(1.5, -0.5, 0.0, 1.0, 0.0, 0.75, 0.5, 0.25), torch.tensor([5])
    with emulated_gpu("sm_90") as gpu:
        got = run(StepInputs(x, m, row, seeds=seeds))
    assert gpu.launches[0].grid == (512, 1, 1)
    assert same_bits(got, ddim_step(x, m, row, seeds=seeds, backend="cpu"))


def test_reasons_against_the_backend():
    x = torch.zeros(2, 8, dtype=torch.float64)
    reasons = unsupported_reasons(StepInputs(x, x, StepCoefficients(1, 1, 0, 1, 0, 1, 1, 0)))
    assert any("on cpu" in r for r in reasons)
    assert any("float64" in r for r in reasons)


# --- dynamic thresholds -----------------------------------------------------------------------------------------------------------------


QUANTILES = [(0.0, 100.0), (0.5, 100.0), (0.995, 3.0), (1.0, 1e9), (0.995, 100.0)]


@pytest.mark.parametrize(
    ("target", "ratio", "maximum"),
    [
        pytest.param(target, *quantile, marks=[] if (i + j) % len(TARGETS) == 2 else pytest.mark.slow)
        for i, quantile in enumerate(QUANTILES)
        for j, target in enumerate(TARGETS)
    ],
)
def test_thresholds_are_the_exact_quantile(target, ratio, maximum):
    torch.manual_seed(1)
    row = StepCoefficients(2.0, -1.5, 0, 1, 0, 0.5, 0.5, 0, clip=0.25)
    for n in (1, 2, 127, 129, 4097) if (target, ratio, maximum) == ("sm_90", 0.995, 100.0) else (129,):
        x, m, uncond = torch.randn(3, 2, n)
        x[1], m[1], uncond[1] = x[1, 0], 0.0, 0.0  # all the same number
        with emulated_gpu(target) as gpu:
            inputs = StepInputs(x, m, row, model_output_uncond=uncond, guidance_scale=3.0)
            got = thresholds_by_triton(inputs, ratio, maximum)
        expected = dynamic_thresholds(x, m, row, ratio, maximum, uncond, 3.0)
        # x0 is computed with other roundings there; what they may come to is measured by its terms.
        terms = 2.0 * x.abs() + 1.5 * (uncond.abs() + 3.0 * (m.abs() + uncond.abs()))
        assert torch.all((got - expected).abs() <= 8 * torch.finfo(torch.float32).eps * terms.max())
        assert len(gpu.launches) == (1 if n <= 4096 else 5)


@pytest.mark.parametrize(("dtype", "wide"), [(torch.float32, False), (torch.bfloat16, True)])
def test_thresholds_are_the_same_whatever_the_number_of_programs(monkeypatch, dtype, wide):
    """Elements on both sides of every border between blocks and programs, ties, and the next in order in another block."""
    if wide:
        monkeypatch.setattr(triton_thresholds, "_LARGEST_INT32", 100)
    monkeypatch.setattr(triton_thresholds, "_BLOCK_SIZE", 256)
    torch.manual_seed(2)
    n = 2 * 256 + 5
    x, m, uncond = torch.randn(3, 3, n).to(dtype)
    x[1], m[1], uncond[1] = (torch.arange(n) % 7 == 0).to(dtype), 0.0, 0.0
    x[2], m[2], uncond[2] = torch.arange(n).to(dtype).flip(0), 0.0, 0.0
    row = StepCoefficients(1.0, -0.5, 0, 1, 0, 0.5, 0.5, 0, clip=1e-3)
    inputs = StepInputs(x, m, row, model_output_uncond=uncond, guidance_scale=3.0)
    for ratio in (0.0, 0.9995):
        found = {}
        for most in (1, 6, 9):
            monkeypatch.setattr(triton_thresholds, "MOST_PROGRAMS", most)
            with emulated_gpu("sm_90") as gpu:
                found[most] = thresholds_by_triton(inputs, ratio, 1e30)
            assert [launch.grid[0] for launch in gpu.launches] == {1: [3], 6: [2] * 4 + [3], 9: [3] * 4 + [3]}[most]
        assert same_bits(found[1], found[6])
        assert same_bits(found[1], found[9])
        expected = dynamic_thresholds(x[1:], m[1:], row, ratio, 1e30, uncond[1:], 3.0)
        assert torch.equal(found[1][1:], expected)  # no rounding there


def test_a_workspace_is_used_again_whatever_was_left_in_it():
    x, row = torch.randn(2, 5000), StepCoefficients(1.0, 0.0, 0, 1, 0, 1, 0, 0, clip=1e-3)
    workspace = torch.full((triton_thresholds.workspace_size(2, 5000),), -1)
    for ratio in (0.3, 0.9):
        with emulated_gpu("sm_90"):
            got = thresholds_by_triton(StepInputs(x, torch.zeros_like(x), row), ratio, 10.0, workspace=workspace)
        assert torch.equal(got, dynamic_thresholds(x, torch.zeros_like(x), row, ratio, 10.0))


def test_quantiles_without_interpolation_are_elements():
    """Where the quantile falls on an element, it is that element to the bit, also among zeros, infinities and subnormals."""
    x = torch.tensor([[0.0, -0.0, 1e-45, -3e-39, 1.0, -1.0, 1.0, 3.4e38, -float("inf"), 2.0, 7.0]])
    row = StepCoefficients(1.0, 0.0, 0, 1, 0, 1, 0, 0, clip=1e-45)
    for rank in range(x.shape[1] - 1):
        ratio = rank / (x.shape[1] - 1)
        if ratio * (x.shape[1] - 1) != rank:
            continue
        with emulated_gpu("sm_90"):
            got = thresholds_by_triton(StepInputs(x, torch.zeros_like(x), row), ratio, 3.4e38)
        expected = quantile_of_magnitude(x, ratio).clamp(1e-45, 3.4e38)
        assert torch.equal(got, expected), rank


def test_a_tiny_threshold_gives_the_bits_of_cpp():
    row = StepCoefficients(2.0**7, -(2.0**6), 0.5, 1, -0.5, 0.5, 0.5, 0, clip=1.0)
    x, m = (column.repeat(3, 1) for column in torch.cartesian_prod(*[torch.arange(-3.0, 4.0)] * 2).T)
    thresholds, x0 = torch.tensor([1e-45, 1e-37, 3.0]), torch.empty_like(x)
    expected = ddim_step(x, m, row, thresholds=thresholds, backend="cpu")
    with emulated_gpu("sm_90"):
        got = run(StepInputs(x, m, row, thresholds=thresholds, x0=x0))
    assert not got.isnan().any()
    assert not x0.isnan().any()
    assert same_bits(got, expected)


# --- wrong on purpose -------------------------------------------------------------------------------------------------------------------

_NOISY = {
    "types": (torch.float32, torch.float32), "prediction_type": "epsilon", "clip": "clip", "noise": "seeds", "guidance": True,
    "x0": True, "mask": None, "history": None, "model_input": None,
    "learned_variance": False, "shape": (4, 501), "place": "aligned", "in_place": False, "log_prob": None,
}  # fmt: skip
_PLAIN = _NOISY | {"clip": None, "noise": None, "guidance": False, "shape": (1, 600)}
_HALF = _NOISY | {"types": (torch.bfloat16, torch.bfloat16), "noise": None, "shape": (1, 600)}
_MIXED = _PLAIN | {
    "types": (torch.float32, torch.bfloat16),
    "clip": "rederived",
    "shape": (1, 544),
}  # through shared memory
_HARD = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-40, -3e-40, 0.0])
# One rounding more in one place can be the same number, and a clipped sum hides other operands in some places.
_HIDDEN_IN_PLACES = {"unfused", "truncating-conversion", "flushed-subnormals", "swapped-fma-operands"}
_ABSENT_HERE = {"dropped-warp-barrier", "dropped-wait"}  # our kernels have neither


@functools.cache
def _evidence(choice_name):
    """Inputs that show what a kernel does with every kind of number."""
    inputs = triton_cases.make({"noisy": _NOISY, "plain": _PLAIN, "half": _HALF, "mixed": _MIXED}[choice_name]).inputs
    for k, tensor in enumerate((inputs.x_t, inputs.model_output)):
        tensor.view(-1)[8 * k : 8 * k + 6] = _HARD.to(tensor.dtype)
        tensor.view(-1)[100 + 8 * k : 106 + 8 * k] = _HARD.to(tensor.dtype)
    inputs.x_t.view(-1)[200:216] = float("nan")  # for every number that a thread holds
    inputs.model_output.view(-1)[103:105] = 0  # beside subnormal numbers: nothing else
    return inputs


def _launch(choice_name, kernel, transform=None):
    """The kernel's results on the evidence, and the PTX that ran."""
    inputs = twin(_evidence(choice_name))
    with emulated_gpu("sm_90", transform) as gpu:
        if kernel == "thresholds":
            results = [thresholds_by_triton(inputs, 0.75, 100.0)]
        else:
            run(inputs)
            results = [inputs.x_prev, inputs.x0]
    return results, gpu.launches[0].ptx


def _everywhere(mutant, ptx):
    """The text broken in every place at once; None where there is none."""
    for start, end, replacement in (places := sorted(mutant.find(ptx), reverse=True)):
        ptx = ptx[:start] + replacement + ptx[end:]
    return ptx if places else None


_STEPS = [("noisy", "step"), ("plain", "step"), ("half", "step"), ("mixed", "step")]
_KERNELS = [*_STEPS, ("noisy", "thresholds")]


@functools.cache
def _right(choice_name, kernel):
    return _launch(choice_name, kernel)


def _caught(choice_name, kernel, wrong):
    try:
        got, _ = _launch(choice_name, kernel, lambda ptx: wrong)
    except PtxError:
        return True
    return not all(same_bits(a, b) for a, b in zip(_right(choice_name, kernel)[0], got, strict=True))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutants_of_our_kernels_are_caught(mutant):
    """Everywhere at once: the least that a check must see, in a kernel that shows it."""
    broken = [(c, k, text) for c, k in _KERNELS for text in [_everywhere(mutant, _right(c, k)[1])] if text is not None]
    assert bool(broken) == (mutant.name not in _ABSENT_HERE)
    assert not broken or any(_caught(*one) for one in broken)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.name not in _HIDDEN_IN_PLACES], ids=lambda m: m.name)
def test_mutants_of_the_noisy_step_are_caught_in_each_place(mutant):
    """One place at a time."""
    for wrong in mutant.sites(_right("noisy", "step")[1]):
        assert _caught("noisy", "step", wrong), wrong
