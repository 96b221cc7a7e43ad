"""Triton kernels on the emulated GPU: right where they are right, and refused or wrong where their PTX is broken."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from mutants import MUTANTS, MUTANTS_BY_NAME, NothingToMutateError

from ddim_fast.gpu_lab.emulated_gpu import TARGETS, emulated_gpu
from ddim_fast.gpu_lab.ptx import (
    AddressError,
    LaunchError,
    NotModelledError,
    PtxError,
    RaceError,
    UnwrittenError,
)
from ddim_fast.kernels import noise

on_targets = pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])

pytestmark = pytest.mark.usefixtures("nan_memory")  # an output that nobody wrote must not look right


@triton.jit
def add(x_ptr, y_ptr, out_ptr, n, BLOCK_SIZE: tl.constexpr):
    i = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n) + tl.load(y_ptr + i, mask=i < n), mask=i < n)


@triton.jit
def update(x_ptr, y_ptr, coefficients_ptr, out_ptr, n, BLOCK_SIZE: tl.constexpr):
    i = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    x = tl.load(x_ptr + i, mask=i < n).to(tl.float32)
    y = tl.load(y_ptr + i, mask=i < n).to(tl.float32)
    a, b = tl.load(coefficients_ptr), tl.load(coefficients_ptr + 1)
    tl.store(out_ptr + i, tl.fma(x, tl.zeros_like(x) + a, b * y).to(out_ptr.dtype.element_ty), mask=i < n)


M0 = tl.constexpr(0xD2511F53)
M1 = tl.constexpr(0xCD9E8D57)


@triton.jit
def philox(c0, c1, c2, c3, key_0, key_1, WIDE: tl.constexpr):
    for _ in tl.static_range(10):
        if WIDE:
            first, second = c0.to(tl.uint64) * M0, c2.to(tl.uint64) * M1
            high_0, low_0, high_1, low_1 = first >> 32, first, second >> 32, second
        else:
            high_0, low_0 = tl.umulhi(c0, tl.full(c0.shape, M0, tl.uint32)), c0 * M0
            high_1, low_1 = tl.umulhi(c2, tl.full(c0.shape, M1, tl.uint32)), c2 * M1
        c0, c2 = high_1.to(tl.uint32) ^ c1 ^ key_0, high_0.to(tl.uint32) ^ c3 ^ key_1
        c1, c3 = low_1.to(tl.uint32), low_0.to(tl.uint32)
        key_0 += 0x9E3779B9
        key_1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def words_kernel(out_ptr, seed, step, n, BLOCK_SIZE: tl.constexpr, WIDE: tl.constexpr):
    counter = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    zero = counter.to(tl.uint32) * 0
    key_0, key_1 = seed.to(tl.uint32), (seed.to(tl.uint64) >> 32).to(tl.uint32)
    w0, w1, w2, w3 = philox(counter.to(tl.uint32), zero + step.to(tl.uint32), zero, zero, key_0, key_1, WIDE)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (4 * BLOCK_SIZE,))
    i = tl.program_id(0) * 4 * BLOCK_SIZE + tl.arange(0, 4 * BLOCK_SIZE)
    tl.store(out_ptr + i, words.to(tl.int32, bitcast=True), mask=i < n)


LOG = tl.constexpr(noise.MINUS_TWO_LOG)
SINE = tl.constexpr(noise.SINE)
COSINE = tl.constexpr(noise.COSINE)
LOG_OF_2 = tl.constexpr(noise.MINUS_TWO_LOG_OF_2 * 2.0**-23)


@triton.jit
def horner(coefficients: tl.constexpr, DEGREE: tl.constexpr, x):
    total = tl.full(x.shape, coefficients[DEGREE], tl.float32)
    for i in tl.static_range(DEGREE):
        total = tl.fma(total, x, tl.full(x.shape, coefficients[DEGREE - 1 - i], tl.float32))
    return total


@triton.jit
def normals_of_words(a, b):
    magnitude = (a & 0x7FFFFFFF).to(tl.float32)
    u = tl.fma(magnitude, tl.full(a.shape, 2.0**-31, tl.float32), tl.full(a.shape, 2.0**-32, tl.float32))
    bits = u.to(tl.int32, bitcast=True)
    shifted = (bits - 0x3F3504F3) & -8388608
    f = (bits - shifted).to(tl.float32, bitcast=True) - 1.0
    radius = tl.sqrt_rn(tl.fma(horner(LOG, 7, f), f, shifted.to(tl.float32) * LOG_OF_2))
    t = b.to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-31
    cosine = (horner(COSINE, 4, t * t).to(tl.uint32, bitcast=True) ^ (a & 0x80000000)).to(tl.float32, bitcast=True)
    return radius * cosine, radius * (horner(SINE, 4, t * t) * t)


@triton.jit
def normals_kernel(out_ptr, seeds_ptr, step, n, BLOCK_SIZE: tl.constexpr):
    counter = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    zero = counter.to(tl.uint32) * 0
    seed = tl.load(seeds_ptr + tl.program_id(1)).to(tl.uint64)
    key_0, key_1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    w0, w1, w2, w3 = philox(counter.to(tl.uint32), zero + step.to(tl.uint32), zero, zero, key_0, key_1, True)
    z0, z1 = normals_of_words(w0, w1)
    z2, z3 = normals_of_words(w2, w3)
    z = tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (4 * BLOCK_SIZE,))
    i = tl.program_id(0) * 4 * BLOCK_SIZE + tl.arange(0, 4 * BLOCK_SIZE)
    tl.store(out_ptr + tl.program_id(1).to(tl.int64) * n + i, z, mask=i < n)


@triton.jit
def clamp_kernel(x_ptr, out_ptr, n, BLOCK_SIZE: tl.constexpr, STRICT: tl.constexpr):
    i = tl.arange(0, BLOCK_SIZE)
    x = tl.load(x_ptr + i, mask=i < n).to(tl.float32)
    if STRICT:  # noqa: SIM108 (a condition of the compiler's)
        x = tl.clamp(x, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        x = tl.clamp(x, -1.0, 1.0)
    tl.store(out_ptr + i, x.to(out_ptr.dtype.element_ty), mask=i < n)


@triton.jit
def reduce_kernel(x_ptr, out_ptr, n, BLOCK_SIZE: tl.constexpr):
    i = tl.arange(0, BLOCK_SIZE)
    x = tl.load(x_ptr + tl.program_id(0) * n + i, mask=i < n, other=0.0)
    tl.store(out_ptr + tl.program_id(0) * 2, tl.sum(x))
    tl.store(out_ptr + tl.program_id(0) * 2 + 1, tl.max(tl.abs(x)))


@triton.jit
def histogram_kernel(x_ptr, out_ptr, n, BLOCK_SIZE: tl.constexpr):
    i = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    x = tl.load(x_ptr + i, mask=i < n, other=0)
    tl.atomic_add(out_ptr + tl.arange(0, 64), tl.histogram(x, 64, mask=i < n))
    tl.atomic_max(out_ptr + 64 + x, i, mask=i < n)


@triton.jit
def countdown_kernel(x_ptr, out_ptr, n, BLOCK_SIZE: tl.constexpr):
    i = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    left = tl.load(x_ptr + i, mask=i < n, other=0)
    taken = left * 0
    while tl.max(left) > 0:
        taken += tl.where(left > 0, 1, 0)
        left -= 1
    tl.store(out_ptr + i, taken, mask=i < n)


@triton.jit
def layout_kernel(x_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + i[:, None] * COLUMNS + j[None, :])
    tl.store(out_ptr + j[:, None] * ROWS + i[None, :], tl.permute(x, (1, 0)))
    even, odd = tl.split(tl.reshape(x, (ROWS * COLUMNS // 2, 2)))
    tl.store(out_ptr + ROWS * COLUMNS + tl.arange(0, ROWS * COLUMNS), tl.interleave(odd, even))


@triton.jit
def strided_kernel(x_ptr, out_ptr, n, stride, BLOCK_SIZE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    row = tl.program_id(1).to(tl.int64) * stride
    tl.store(out_ptr + row + i, 2 * tl.load(x_ptr + row + i, mask=i < n), mask=i < n)


@triton.jit
def staged_kernel(x_ptr, out_ptr, STEPS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    total = tl.zeros((BLOCK_SIZE,), tl.float32)
    for k in tl.range(0, STEPS, num_stages=3):
        total += tl.load(x_ptr + k * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE))
    tl.store(out_ptr + tl.arange(0, BLOCK_SIZE), total)


@triton.jit
def scalar_kernel(out_ptr, a, b: tl.float16, c: tl.bfloat16, flag, big):
    tl.store(out_ptr, a)
    tl.store(out_ptr + 1, b)
    tl.store(out_ptr + 2, c)
    tl.store(out_ptr + 3, tl.where(flag, 1.0, 0.0))
    tl.store(out_ptr + 4, (big >> 32).to(tl.float32))


def unfused(x: torch.Tensor, y: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """a x + (b y), the product of b and y rounded and the sum rounded once."""
    with np.errstate(all="ignore"):
        exact = noise.fma(x.float().numpy(), float(coefficients[0]), (y.float() * coefficients[1]).numpy())
    return torch.from_numpy(exact).to(x.dtype)


# --- kernels that are right ---


@on_targets
@pytest.mark.parametrize("n", [1, 127, 128, 129, 1000])
def test_masked_addition(target, n):
    x, y, out = torch.randn(n), torch.randn(n), torch.full((n,), torch.nan)
    with emulated_gpu(target) as gpu:
        add[(triton.cdiv(n, 128),)](x, y, out, n, BLOCK_SIZE=128)
    assert torch.equal(out, x + y)
    (launch,) = gpu.launches
    assert (launch.kernel, launch.grid, launch.num_warps) == ("add", (triton.cdiv(n, 128), 1, 1), 4)
    assert launch.execution.bytes_written == 4 * n
    assert f".target {target}" in launch.ptx


@on_targets
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_update_with_coefficients_from_memory(target, dtype):
    n = 3000
    x, y, out, coefficients = (
        torch.randn(n).to(dtype),
        torch.randn(n).to(dtype),
        torch.empty(n, dtype=dtype),
        torch.tensor([0.7, -1.3]),
    )
    x[:3] = torch.tensor([torch.inf, torch.nan, 3e38 if dtype == torch.float32 else torch.finfo(dtype).max])
    with emulated_gpu(target) as gpu:
        update[(3,)](x, y, coefficients, out, n, BLOCK_SIZE=1024, enable_fp_fusion=False)
    torch.testing.assert_close(out, unfused(x, y, coefficients), rtol=0, atol=0, equal_nan=True)
    assert not gpu.launches[0].execution.contractible


def test_an_unfused_product_may_be_contracted_by_the_assembler():
    x, y, out, coefficients = torch.randn(64), torch.randn(64), torch.empty(64), torch.tensor([0.7, -1.3])
    with emulated_gpu("sm_90") as gpu:
        update[(1,)](x, y, coefficients, out, 64, BLOCK_SIZE=64)
    assert "mul.f32" in gpu.launches[0].execution.contractible


@on_targets
@pytest.mark.parametrize("wide", [False, True])
def test_philox_has_the_bits_of_the_standard(target, wide):
    seed, n = -(2**62) + 12345, 1000
    out = torch.zeros(n, dtype=torch.int32)
    with emulated_gpu(target):
        words_kernel[(2,)](out, seed, 7, n, BLOCK_SIZE=128, WIDE=wide)
    expected = noise.philox_words(seed, n // 4, step=7, stream=0).reshape(-1)
    np.testing.assert_array_equal(out.numpy().view(np.uint32), expected)


@on_targets
def test_normals_have_the_bits_of_the_standard(target):
    seeds = torch.tensor([3, -1, 2**62])
    out = torch.zeros(3, 2001)
    with emulated_gpu(target) as gpu:
        normals_kernel[(4, 3)](out, seeds, 11, 2001, BLOCK_SIZE=128, enable_fp_fusion=False)
    expected = noise.standard_normals([int(s) for s in seeds], 2001, step=11)
    np.testing.assert_array_equal(out.numpy().view(np.uint32), expected.view(np.uint32))
    assert not gpu.launches[0].execution.approximate


@on_targets
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clamp_keeps_nan_where_asked_to(target, dtype):
    x = torch.tensor([-2, -1, -0.5, -0.0, 0, 0.5, 1, 3, torch.nan, torch.inf, -torch.inf], dtype=dtype)
    out, strict = torch.empty_like(x), torch.empty_like(x)
    with emulated_gpu(target):
        clamp_kernel[(1,)](x, out, len(x), BLOCK_SIZE=16, STRICT=False, num_warps=1)
        clamp_kernel[(1,)](x, strict, len(x), BLOCK_SIZE=16, STRICT=True, num_warps=1)
    torch.testing.assert_close(strict, x.clamp(-1, 1), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(strict.signbit()[:8], x.signbit()[:8])
    assert out[8].abs() == 1  # NaN becomes a bound: which one differs between targets
    keep = torch.arange(11) != 8
    assert torch.equal(out[keep], x.clamp(-1, 1)[keep])


@on_targets
@pytest.mark.parametrize("num_warps", [1, 4, 8])
def test_reductions_through_shared_memory(target, num_warps):
    x = torch.randint(-50, 50, (3, 1000)).float()
    out = torch.zeros(3, 2)
    with emulated_gpu(target) as gpu:
        reduce_kernel[(3,)](x, out, 1000, BLOCK_SIZE=1024, num_warps=num_warps)
    assert torch.equal(out, torch.stack([x.sum(1), x.abs().amax(1)], 1))
    assert (gpu.launches[0].execution.barriers > 0) == (num_warps > 1)
    assert (gpu.launches[0].shared_bytes > 0) == (num_warps > 1)


@on_targets
def test_histogram_and_atomics(target):
    x = torch.randint(0, 64, (1500,), dtype=torch.int32)
    out = torch.zeros(128, dtype=torch.int32)
    with emulated_gpu(target):
        histogram_kernel[(2,)](x, out, 1500, BLOCK_SIZE=1024)
    assert torch.equal(out[:64], torch.bincount(x, minlength=64).int())
    last = torch.tensor([int(torch.nonzero(x == v).max()) for v in range(64)], dtype=torch.int32)
    assert torch.equal(out[64:], last)


@on_targets
def test_a_loop_as_long_as_the_data_say(target):
    x = torch.randint(0, 20, (1000,), dtype=torch.int32)
    x[256:512] //= 7
    out = torch.zeros_like(x)
    with emulated_gpu(target):
        countdown_kernel[(4,)](x, out, 1000, BLOCK_SIZE=256)
    assert torch.equal(out, x)


@on_targets
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8, torch.int64])
def test_layouts(target, dtype):
    x = torch.randint(-100, 100, (32, 64)).to(dtype)
    out = torch.empty(2 * 32 * 64, dtype=dtype)
    with emulated_gpu(target):
        layout_kernel[(1,)](x, out, ROWS=32, COLUMNS=64)
    assert torch.equal(out[: 32 * 64].view(64, 32), x.T)
    assert torch.equal(out[32 * 64 :].view(-1, 2), x.view(-1, 2).flip(1))


@on_targets
def test_rows_with_gaps_are_left_alone(target):
    x, out = torch.randn(3, 1024), torch.zeros(3, 1024)
    with emulated_gpu(target):
        strided_kernel[(4, 3)](x[:, :1000], out[:, :1000], 1000, 1024, BLOCK_SIZE=256)
    assert torch.equal(out[:, :1000], 2 * x[:, :1000])
    assert not out[:, 1000:].any()


@on_targets
def test_loads_that_run_ahead(target):
    x, out = torch.randn(8, 512), torch.zeros(512)
    with emulated_gpu(target) as gpu:
        staged_kernel[(1,)](x, out, STEPS=8, BLOCK_SIZE=512)
    total = torch.zeros(512)
    for row in x:
        total = total + row
    assert torch.equal(out, total)
    assert any(name.startswith("cp.async") for name in gpu.launches[0].execution.thread_instructions)


def test_scalars_of_every_type():
    out = torch.zeros(5)
    with emulated_gpu("sm_90"):
        scalar_kernel[(1,)](out, 0.1, 0.1, 0.1, True, 3 << 32)
    expected = [0.1, float(torch.tensor(0.1).half()), float(torch.tensor(0.1).bfloat16()), 1.0, 3.0]
    torch.testing.assert_close(out, torch.tensor(expected), rtol=0, atol=0)


def test_in_place_and_specialised_arguments():
    for n, begin in ((64, 0), (64, 1), (1, 3)):
        memory = torch.randn(96)
        x, expected = memory[begin : begin + n], 2 * memory[begin : begin + n]
        with emulated_gpu("sm_90") as gpu:
            add[(1,)](x, x, x, n, BLOCK_SIZE=64, num_warps=1)
        assert torch.equal(x, expected)
        assert ("v2.b32" in gpu.launches[0].ptx) == (begin == 0)  # 16 bytes of alignment are only then known


def test_threads_without_an_element_of_their_own_race_in_place():
    """Triton gives 128 threads two copies of 64 elements; all load, and only one of each pair stores."""
    x = torch.randn(64)
    with emulated_gpu("sm_90"), pytest.raises(RaceError, match="written by one thread and read by"):
        add[(1,)](x, x, x, 64, BLOCK_SIZE=64, num_warps=4)


def test_every_configuration_of_autotuning_runs():
    configurations = [triton.Config({"BLOCK_SIZE": size}, num_warps=warps) for size, warps in ((64, 1), (128, 4))]
    tuned = triton.autotune(configurations, key=["n"])(add)
    x, out = torch.randn(200), torch.zeros(200)
    with emulated_gpu("sm_90") as gpu:
        tuned[lambda meta: (triton.cdiv(200, meta["BLOCK_SIZE"]),)](x, x, out, 200)
    assert {launch.num_warps for launch in gpu.launches} == {1, 4}
    assert torch.equal(out, 2 * x)


# --- what is refused ---


def test_unknown_targets_are_named():
    with pytest.raises(ValueError, match=r"target must be one of sm_80, .*, got 'sm_70'"), emulated_gpu("sm_70"):
        pass
    assert set(TARGETS) == {"sm_80", "sm_89", "sm_90", "sm_100", "sm_120"}


@pytest.mark.parametrize("target", TARGETS)
def test_the_driver_before_is_active_again(target):
    before = triton.runtime.driver._active
    with emulated_gpu(target) as outer:
        assert triton.runtime.driver.active.get_current_target().arch == TARGETS[target].capability
        with emulated_gpu("sm_80"):
            assert triton.runtime.driver.active.get_current_target().arch == 80
        assert triton.runtime.driver.active.gpu is outer
    assert triton.runtime.driver._active is before


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"), emulated_gpu():
        pass


def test_a_missing_triton_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton.runtime", None)
    with pytest.raises(ImportError, match="pip install triton"), emulated_gpu():
        pass


def test_accesses_outside_the_tensors_name_the_parameter():
    memory = torch.zeros(300)
    x, out = memory[:200], memory[200:]
    with emulated_gpu("sm_90") as gpu, pytest.raises(AddressError, match="of y_ptr, which has 400 bytes"):
        add[(2,)](x, torch.zeros(100), out, 200, BLOCK_SIZE=128)
    assert gpu.launches[0].execution is None


def test_read_only_parameters_are_not_written():
    x = torch.zeros(100)
    with emulated_gpu("sm_90", read_only=["out_ptr"]), pytest.raises(AddressError, match="out_ptr is read-only"):
        add[(1,)](x, x, torch.zeros(100), 100, BLOCK_SIZE=128)


def test_two_programs_may_not_write_one_element():
    x = torch.zeros(128)
    with emulated_gpu("sm_90"), pytest.raises(RaceError, match="of out_ptr"):
        strided_kernel[(1, 2)](torch.zeros(64), x, 64, 0, BLOCK_SIZE=64)


def test_clusters_and_other_devices_are_refused():
    x = torch.zeros(128)
    with emulated_gpu("sm_90"):
        with pytest.raises(NotModelledError, match="clusters"):
            add[(1,)](x, x, x, 128, BLOCK_SIZE=128, num_ctas=2)
        with pytest.raises(LaunchError, match="must be the CPU's"):
            add[(1,)](x.to("meta"), x, x, 128, BLOCK_SIZE=128)


# --- kernels that are broken ---


def caught(mutation, run) -> bool:
    """Whether a check fires or the result is wrong; ``run`` returns whether the result is right."""
    try:
        return not run(mutation)
    except NotModelledError:
        raise
    except PtxError:
        return True


def run_add(mutation) -> bool:
    torch.manual_seed(0)
    x, y, out = torch.randn(304), torch.randn(304), torch.full((304,), torch.nan)
    with emulated_gpu("sm_90", transform=mutation):
        add[(3,)](x, y, out, 304, BLOCK_SIZE=128, num_warps=1)
    return torch.equal(out, x + y)


def run_update(mutation, target: str = "sm_90", dtype: torch.dtype = torch.bfloat16) -> bool:
    torch.manual_seed(0)
    x, y, out, coefficients = (
        torch.randn(2000).to(dtype),
        torch.randn(2000).to(dtype),
        torch.empty(2000, dtype=dtype),
        torch.tensor([0.7, -1.3]),
    )
    with emulated_gpu(target, transform=mutation):
        update[(2,)](x, y, coefficients, out, 2000, BLOCK_SIZE=1024, enable_fp_fusion=False)
    return torch.equal(out, unfused(x, y, coefficients))


def run_normals(mutation) -> bool:
    out = torch.zeros(1, 2048)
    with emulated_gpu("sm_90", transform=mutation):
        normals_kernel[(4, 1)](out, torch.tensor([3]), 11, 2048, BLOCK_SIZE=128, enable_fp_fusion=False)
    return np.array_equal(out.numpy(), noise.standard_normals([3], 2048, step=11))


def run_reduce(mutation) -> bool:
    x = torch.randint(-50, 50, (3, 1000), generator=torch.Generator().manual_seed(0)).float()
    out = torch.zeros(3, 2)
    with emulated_gpu("sm_90", transform=mutation):
        reduce_kernel[(3,)](x, out, 1000, BLOCK_SIZE=1024)
    return torch.equal(out, torch.stack([x.sum(1), x.abs().amax(1)], 1))


def run_histogram(mutation) -> bool:
    x = torch.arange(1500, dtype=torch.int32) * 7 % 64
    out = torch.zeros(128, dtype=torch.int32)
    with emulated_gpu("sm_90", transform=mutation):
        histogram_kernel[(2,)](x, out, 1500, BLOCK_SIZE=1024)
    return torch.equal(out[:64], torch.bincount(x, minlength=64).int())


def run_clamp(mutation) -> bool:
    x = torch.tensor([torch.nan, -torch.inf, -3, 0.5, 3, torch.inf, torch.nan])
    out = torch.empty_like(x)
    with emulated_gpu("sm_80", transform=mutation):
        clamp_kernel[(1,)](x, out, 7, BLOCK_SIZE=16, STRICT=True, num_warps=1)
    return bool(torch.allclose(out, x.clamp(-1, 1), rtol=0, atol=0, equal_nan=True))


RUNS = {
    "add": run_add,
    "update": run_update,
    "normals": run_normals,
    "reduce": run_reduce,
    "histogram": run_histogram,
    "clamp": run_clamp,
}
BROKEN = [
    ("add", "unmasked-load"),
    ("add", "unmasked-store"),
    ("add", "mask-off-by-one"),
    ("add", "short-grid"),
    ("add", "false-alignment"),
    ("update", "truncating-conversion"),
    ("update", "swapped-fma-operands"),
    ("update", "unmasked-load"),
    ("update", "unmasked-store"),
    ("update", "short-grid"),
    ("update", "false-alignment"),
    ("normals", "philox-constant"),
    ("normals", "nine-rounds"),
    ("normals", "swapped-fma-operands"),
    ("normals", "short-grid"),
    ("normals", "swapped-subtraction"),
    ("reduce", "dropped-barrier"),
    ("reduce", "wrong-shuffle"),
    ("reduce", "unmasked-load"),
    ("reduce", "unmasked-store"),
    ("histogram", "dropped-barrier"),
    ("histogram", "plain-addition"),
    ("histogram", "mask-off-by-one"),
    ("clamp", "nan-lost"),
]


@pytest.mark.parametrize("name", RUNS)
def test_unbroken_kernels_pass(name):
    assert RUNS[name](None)


@pytest.mark.parametrize(("kernel", "mutant"), BROKEN)
def test_broken_kernels_are_caught(kernel, mutant):
    assert caught(MUTANTS_BY_NAME[mutant], RUNS[kernel])


def test_separate_rounding_is_caught_in_float32():
    assert caught(MUTANTS_BY_NAME["unfused"], lambda mutation: run_update(mutation, dtype=torch.float32))
    assert caught(MUTANTS_BY_NAME["unfused"], lambda mutation: run_update(mutation, "sm_100", torch.float32))


def test_every_barrier_of_a_reduction_is_needed():
    texts = []
    assert run_reduce(lambda ptx: texts.append(ptx) or ptx)
    sites = MUTANTS_BY_NAME["dropped-barrier"].sites(texts[0])
    assert len(sites) == texts[0].count("bar.sync")
    assert all(caught(lambda ptx, wrong=wrong: wrong, run_reduce) for wrong in sites)


def test_a_loop_without_its_barrier_is_caught():
    def run(mutation) -> bool:
        x = torch.arange(256, dtype=torch.int32) % 9
        out = torch.zeros_like(x)
        with emulated_gpu("sm_90", transform=mutation):
            countdown_kernel[(1,)](x, out, 256, BLOCK_SIZE=256)
        return torch.equal(out, x)

    assert run(None)
    assert caught(MUTANTS_BY_NAME["dropped-barrier"], run)


def test_copies_that_nobody_waits_for_are_caught():
    x, out = torch.randn(8, 512), torch.zeros(512)
    with (
        emulated_gpu("sm_90", transform=MUTANTS_BY_NAME["dropped-wait"]),
        pytest.raises(UnwrittenError, match="shared memory"),
    ):
        staged_kernel[(1,)](x, out, STEPS=8, BLOCK_SIZE=512)


def test_mutants_say_when_there_is_nothing_to_break():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        with pytest.raises(NothingToMutateError, match=mutant.name):
            mutant(".version 8.7\n")
        assert mutant.corrupts
