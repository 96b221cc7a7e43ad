"""What runs on a device without float64, such as Apple's: nothing makes float64 of what is there."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ddim_fast as df
from ddim_fast.models.metrics import sample_distances
from ddim_fast.sampling.inversion import reconstruction_error
from ddim_fast.search import Search, search_timesteps
from ddim_fast.search.analytic import measure_eps_residual
from ddim_fast.search.runs import Runs
from ddim_fast.tradeoff.quality import mean, share
from ddim_fast.utils import devices

LINEAR = df.NoiseSchedule.linear(100)
SHAPE = (2, 2, 4, 4)


class WithoutFloat64(TorchDispatchMode):
    """A mode that refuses to make float64 of other numbers, as a device without it does. What is float64 from the beginning is on
    the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if any(t.dtype == torch.float64 for t in made) and given and all(t.dtype != torch.float64 for t in given):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return result


class Net(nn.Module):
    prediction_type, schedule = "epsilon", LINEAR

    def forward(self, x, t):
        return torch.sin(x + t.view(-1, 1, 1, 1) / 100)


def calls():
    plain = df.DDIMSampler(LINEAR, 3)
    x0, other = torch.linspace(-1, 1, 64).view(SHAPE), torch.linspace(1, 2, 64).view(SHAPE).cos()
    flow = df.DDIMSampler(df.FlowSchedule(), timesteps=df.flow_times(LINEAR, [90, 50, 10]))
    effort = {"num_inference_steps": 2, "count": 2, "refine_count": 2, "refine_runs": 2, "held_out": 2, "candidates": 4}
    return {
        "slerp": lambda: df.slerp(x0, other, 0.3),
        "interpolate": lambda: plain.interpolate(Net(), x0, other, [0.0, 0.5]),
        "reconstruct": lambda: reconstruction_error(x0, plain.reconstruct(Net(), x0)),
        "sample": lambda: plain.replace(eta=1.0, thresholding=True).sample(Net(), SHAPE, seed=0),
        "sample_parallel": lambda: plain.sample_parallel(Net(), SHAPE, seed=0),
        "as_flow": lambda: flow.sample(df.as_flow(Net()).to("cpu"), SHAPE, seed=0),
        "sample_distances": lambda: sample_distances(x0, other),
        "share and mean": lambda: torch.tensor([share(x0 > 0).value, mean(x0.flatten()).value]),
        "residual": lambda: torch.tensor(measure_eps_residual(Runs(Net(), other), plain.plan(), x0)),
        "search": lambda: torch.tensor(search_timesteps(Search(Net(), LINEAR, SHAPE[1:], **effort)).timesteps),
    }


@pytest.fixture
def without_float64(monkeypatch):
    monkeypatch.setattr(devices, "has_float64", lambda device: False)


@pytest.mark.parametrize("name", calls())
def test_nothing_is_widened_to_float64_where_there_is_none(request, name):
    expected = calls()[name]()
    request.getfixturevalue("without_float64")
    with WithoutFloat64():
        got = calls()[name]()
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4, check_dtype=False)


def test_the_mode_can_fail():
    with WithoutFloat64(), pytest.raises(TypeError, match="float64"):
        torch.ones(3).double()
    with WithoutFloat64():
        torch.ones(3, dtype=torch.float64).float()


def test_a_device_is_asked():
    devices.has_float64.cache_clear()
    assert devices.has_float64(torch.device("cpu"))
    assert devices.has_float64(torch.device("cuda"))
    assert devices.has_float64(torch.device("meta"))
    assert devices.widest_dtype(torch.device("cpu")) == torch.float64
    devices.has_float64.cache_clear()


@pytest.mark.parametrize("error", [TypeError, RuntimeError])
def test_a_device_that_refuses_has_none(monkeypatch, error):
    def refuses(*size, device=None, **options):
        raise error("Required aspect fp64 is not supported on the device")

    devices.has_float64.cache_clear()
    monkeypatch.setattr(torch, "zeros", refuses)
    assert not devices.has_float64(torch.device("xpu"))
    devices.has_float64.cache_clear()
