"""Steps looked up by timestep: a number, a tensor, a timestep for each sample."""

import numpy as np
import pytest
import torch
from paper import ddim_step_paper

import ddim_fast as df
from ddim_fast.integrations.rows_by_timestep import RowsByTimestep
from ddim_fast.plans.coefficients import ddim_coefficients

ALPHA_BARS = np.linspace(0.999, 0.01, 10)


def steps(**options):
    def coefficients(t):
        return ddim_coefficients(ALPHA_BARS[t], 1.0 if t == 0 else ALPHA_BARS[t - 1], **options)

    return RowsByTimestep(10, coefficients)


@pytest.fixture
def x():
    return torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def m():
    return torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("t", [4, torch.tensor(4), torch.tensor([4]), torch.tensor([4, 4, 4]), np.int64(4)])
def test_one_timestep_for_all(x, m, t):
    x0 = torch.empty_like(x)
    got = steps().step(x, m, t, x0_out=x0)
    assert torch.equal(got, df.ddim_step(x, m, steps().row(4)))
    torch.testing.assert_close(got, ddim_step_paper(x, m, ALPHA_BARS[4], ALPHA_BARS[3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_timestep_for_each_sample(x, m, dtype):
    x, m = x.to(dtype), m.to(dtype)
    t, x0, out = torch.tensor([7, 0, 3]), torch.empty_like(x), torch.empty_like(x)
    assert steps(clip_sample_range=0.5).step(x, m, t, out=out, x0_out=x0) is out
    for i in range(3):
        own_x0 = torch.empty_like(x[:1])
        row = steps(clip_sample_range=0.5).row(int(t[i]))
        assert torch.equal(out[i : i + 1], df.ddim_step(x[i : i + 1], m[i : i + 1], row, x0_out=own_x0))
        assert torch.equal(x0[i : i + 1], own_x0)


@pytest.mark.parametrize("uncond", [False, True])
def test_noise_of_a_timestep_does_not_depend_on_the_others(x, m, uncond):
    options = {"seeds": torch.tensor([5, 6, 7]), "noise_step": 2**32 - 3}
    if uncond:
        options |= {"model_output_uncond": m.flip(0), "guidance_scale": 3.0}
    noisy, t = steps(variance=0.0001), torch.tensor([9, 1, 4])
    together = noisy.step(x, m, t, **options)
    for i in range(3):
        own = {k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        assert torch.equal(together[i : i + 1], noisy.step(x[i : i + 1], m[i : i + 1], int(t[i]), **own))


def test_no_samples():
    empty = torch.empty(0, 2)
    assert steps().step(empty, empty, torch.empty(0, dtype=torch.int64)).shape == (0, 2)


@pytest.mark.parametrize("t", [-1, 10, torch.tensor([0, 1, 10])])
def test_no_such_timestep(x, m, t):
    with pytest.raises(ValueError, match="t must be 0 to 9, got"):
        steps().step(x, m, t)


@pytest.mark.parametrize(
    "t", [torch.tensor([1, 2]), torch.tensor([1, 2, 3, 4]), torch.tensor([[1, 2, 3]])], ids=["2", "4", "1x3"]
)
def test_a_timestep_for_each_sample_no_more_no_less(x, m, t):
    with pytest.raises(ValueError, match="one for each of the 3 samples, got a tensor of shape"):
        steps().step(x, m, t)


def test_derivatives_where_each_sample_has_its_timestep(x, m):
    x, m = x.double().requires_grad_(), m.double().requires_grad_()
    t = torch.tensor([5, 1, 5])
    (got,) = torch.autograd.grad((steps().step(x, m, t) ** 2).sum(), x, retain_graph=True)
    alone = [(steps().step(x[i : i + 1], m[i : i + 1], int(t[i])) ** 2).sum() for i in range(3)]
    (expected,) = torch.autograd.grad(sum(alone), x)
    torch.testing.assert_close(got, expected)


def test_nothing_is_written_before_an_error(x, m):
    before = x.clone()
    with pytest.raises(ValueError, match="adds noise"):
        steps(variance=0.0001).step(x, m, torch.tensor([1, 2, 3]), out=x)
    assert torch.equal(x, before)


def test_a_table_holds_every_timestep():
    table = steps().table(torch.device("cpu"))
    assert table.rows.shape[0] == 10
    assert steps().table(torch.device("cpu"), 2.0).guided
