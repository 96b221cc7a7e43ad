"""Dynamic thresholding: the quantile against NumPy's in float64, and the bound against Imagen's rule."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddim_fast.kernels import triton_backend
from ddim_fast.kernels.contract import StepCoefficients
from ddim_fast.kernels.thresholding import dynamic_thresholds, quantile_of_magnitude, thresholds_workspace

RATIOS = (0.5, 0.731, 0.9, 0.995, 0.999, 1.0)


def random(*shape, seed=0, scale=1.0):
    return torch.from_numpy(scale * np.random.default_rng(seed).standard_normal(shape)).float()


def row(x0_x, x0_m, clip):
    return StepCoefficients(x0_x, x0_m, 0.0, 1.0, 0.0, 0.9, 0.4, 0.0, clip)


# --- The quantile -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 16, 100, 201, 784, 3072, 12288])
def test_the_quantile_is_numpys(n, ratio):
    x = random(3, n, seed=n)
    got = quantile_of_magnitude(x, ratio)
    assert got.shape == (3,)
    expected = np.quantile(np.abs(x.double().numpy()), ratio, axis=1)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(got.numpy(), torch.quantile(x.double().abs(), ratio, dim=1).numpy(), rtol=1e-6)


@given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=30),
    ratio=st.floats(0.5, 1.0),
)
def test_ties_are_no_trouble(values, ratio):
    x = torch.tensor([values], dtype=torch.float64)
    expected = np.quantile(np.abs(values), ratio)
    assert float(quantile_of_magnitude(x, ratio)) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("n", [5, 101, 1001])
def test_a_rank_that_is_whole_needs_no_neighbour(n):
    """0, 1, ..., n - 1 shuffled: the quantile is ratio (n - 1), whole or not."""
    x = torch.from_numpy(np.random.default_rng(n).permutation(n).astype(float))[None] * torch.tensor([[1.0], [-1.0]])
    for ratio in np.linspace(0.5, 1, 26):
        np.testing.assert_allclose(quantile_of_magnitude(x, float(ratio)).numpy(), ratio * (n - 1), rtol=1e-12)


def test_each_sample_has_its_own_quantile_over_all_its_elements():
    x = random(4, 2, 3, 5)
    x *= torch.tensor([1.0, 10.0, 0.1, 3.0]).view(4, 1, 1, 1)
    got = quantile_of_magnitude(x, 0.9)
    for i in range(4):
        assert float(got[i]) == pytest.approx(np.quantile(np.abs(x[i].double().numpy()), 0.9), rel=1e-6)
    assert torch.equal(quantile_of_magnitude(x.flip(0), 0.9), got.flip(0))
    assert torch.equal(quantile_of_magnitude(x.transpose(1, 3), 0.9), got)


def test_the_largest_is_the_quantile_one():
    x = random(3, 1000)
    assert torch.equal(quantile_of_magnitude(x, 1.0), x.abs().amax(dim=1))


def test_the_input_is_not_changed():
    x = random(2, 100)
    before = x.clone()
    quantile_of_magnitude(x, 0.9)
    assert torch.equal(x, before)


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.5, 0.995, 1.0])
def test_the_quantile_is_exact_beyond_the_size_torch_stops_at(ratio):
    n = 2**24 + 3
    x = torch.from_numpy(np.random.default_rng(0).permutation(n).astype(np.float64))[None]
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(x, ratio)  # the reason for having our own
    assert float(quantile_of_magnitude(x, ratio)) == pytest.approx(ratio * (n - 1), rel=1e-15)
    single = quantile_of_magnitude(x.float() / 4096, ratio)
    assert float(single) == pytest.approx(ratio * (n - 1) / 4096, rel=1e-6)


# --- The thresholds ---------------------------------------------------------------------------------------------------


def imagen(x_t, m, x0_x, x0_m, clip, ratio, maximum):
    """The quantile of |x0|, never below the clip range and never above ``maximum``."""
    x0 = np.abs(x0_x * x_t.double().numpy() + x0_m * m.double().numpy()).reshape(len(x_t), -1)
    return np.minimum(np.maximum(np.quantile(x0, ratio, axis=1), clip), max(maximum, clip))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("clip", "maximum"), [(1.0, 1.0), (1.0, 2.0), (1.0, 100.0), (0.5, 1.0), (2.0, 1.0)])
def test_thresholds_are_imagens(dtype, clip, maximum):
    scales = torch.tensor([0.05, 0.5, 1.0, 3.0, 50.0]).view(5, 1, 1, 1)
    x_t, m = (random(5, 3, 8, 8, seed=1) * scales).to(dtype), (random(5, 3, 8, 8, seed=2) * scales).to(dtype)
    for ratio in RATIOS:
        got = dynamic_thresholds(x_t, m, row(1.7, -1.4, clip), ratio, maximum)
        assert got.dtype == torch.float32
        assert got.shape == (5,)
        np.testing.assert_allclose(got.numpy(), imagen(x_t, m, 1.7, -1.4, clip, ratio, maximum), rtol=1e-5)
    if maximum == 100:
        assert 1 == float(got[0]) < float(got[3]) < float(got[4]) <= 100  # else the cases are one case


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 2.0, 7.5])
def test_thresholds_are_those_of_the_guided_prediction(scale):
    x_t, cond, uncond = (random(3, 2, 6, seed=i, scale=3) for i in range(3))
    got = dynamic_thresholds(x_t, cond, row(1.2, -0.7, 1.0), 0.9, 50.0, uncond, scale)
    guided = uncond.double() + scale * (cond.double() - uncond.double())
    np.testing.assert_allclose(got.numpy(), imagen(x_t, guided, 1.2, -0.7, 1.0, 0.9, 50.0), rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (0, 0)], ids=str)
def test_nothing_has_the_clip_range_as_threshold(shape):
    got = dynamic_thresholds(torch.zeros(shape), torch.zeros(shape), row(1.0, 0.0, 1.5), 0.995, 3.0)
    assert got.dtype == torch.float32
    assert torch.equal(got, torch.full((shape[0],), 1.5))


def test_one_element_is_its_own_quantile():
    got = dynamic_thresholds(torch.tensor([[2.0], [0.1]]), torch.zeros(2, 1), row(1.0, 0.0, 1.0), 0.995, 10.0)
    assert got.tolist() == [2.0, 1.0]


def test_nan_reaches_the_thresholds_or_leaves_them_finite_but_never_below_the_clip_range():
    x_t = random(2, 50, scale=3)
    x_t[0, 3] = math.nan
    got = dynamic_thresholds(x_t, torch.zeros(2, 50), row(1.0, 0.0, 1.0), 0.9, 10.0)
    assert not (got < 1).any()
    clean = dynamic_thresholds(x_t[1:], torch.zeros(1, 50), row(1.0, 0.0, 1.0), 0.9, 10.0)
    assert torch.equal(got[1:], clean)


def outs_that_are_refused(x_t):
    """Each with its error and what it says after the argument's name."""
    return {
        "a list": ([0.0, 0.0], TypeError, "must be a torch.Tensor, got list"),
        "another shape": (
            torch.full((3,), 7.0),
            ValueError,
            r"must have one entry per sample, shape \(2,\), got \(3,\)",
        ),
        "one that broadcasts": (torch.full((5, 2), 7.0), ValueError, r"must have one entry per sample, .*got \(5, 2\)"),
        "another dtype": (torch.full((2,), 7.0).double(), TypeError, "must be torch.float32, got torch.float64"),
        "another device": (torch.zeros(2, device="meta"), ValueError, "must be on the device of x_t, cpu, got meta"),
        "expanded": (
            torch.full((1,), 7.0).expand(2),
            ValueError,
            "is written to, so its elements must not share memory",
        ),
        "memory of x_t": (x_t[0, :2], ValueError, "and x_t must not share memory"),
        "a leaf": (
            torch.full((2,), 7.0, requires_grad=True),
            ValueError,
            "is written to and must not require gradients",
        ),
        "no memory": (torch._efficientzerotensor((2,)), ValueError, "is written to, so it must have memory"),
    }


@pytest.mark.parametrize("kind", outs_that_are_refused(torch.zeros(2, 5)))
def test_what_the_thresholds_are_written_to_is_checked_first(kind):
    x_t = random(2, 5)
    out, error, said = outs_that_are_refused(x_t)[kind]
    before = x_t.clone()
    with pytest.raises(error, match=f"^out {said}"):
        dynamic_thresholds(x_t, random(2, 5, seed=1), row(1.0, 0.0, 1.0), 0.9, 10.0, out=out)
    assert torch.equal(x_t, before)
    if isinstance(out, torch.Tensor) and out.device.type == "cpu":
        assert not bool((out == 1).any())


def test_a_workspace_for_other_samples_is_refused(monkeypatch):
    x_t = random(2, 5)
    assert thresholds_workspace(x_t) is None
    monkeypatch.setattr(triton_backend, "workspace_size", lambda x: 9)
    for wrong in (torch.zeros(8, dtype=torch.int64), torch.zeros(9), torch.zeros(9, dtype=torch.int64, device="meta")):
        with pytest.raises(
            ValueError, match=r"^workspace must be what thresholds_workspace\(x_t\) returned, 9 numbers of torch.int64"
        ):
            dynamic_thresholds(x_t, x_t, row(1.0, 0.0, 1.0), 0.9, 10.0, workspace=wrong)


def test_thresholds_are_written_to_out():
    x_t, out = random(2, 5, scale=3), torch.zeros(2)
    got = dynamic_thresholds(x_t, torch.zeros(2, 5), row(1.0, 0.0, 1.0), 0.9, 10.0, out=out)
    assert got is out
    assert torch.equal(out, dynamic_thresholds(x_t, torch.zeros(2, 5), row(1.0, 0.0, 1.0), 0.9, 10.0))
