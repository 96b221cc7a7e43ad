"""A captured run of its owner's: eager's bits, no cache, values of each call, an end."""

import copy
import pickle
import warnings

import pytest
import torch
from graph_models import Logged
from torch import nn

import ddim_fast as df
from ddim_fast.gpu_lab import Replay
from ddim_fast.gpu_lab.fake_cuda import FakeGraphs, fake_cuda
from ddim_fast.sampling.capture import GraphCache
from ddim_fast.sampling.captured_loop import CapturedLoop

SHAPE = (2, 3, 8, 8)


class Net(nn.Module):
    prediction_type = "epsilon"

    def __init__(self):
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.full((), 0.7)), 0

    def forward(self, x, t, scale=1.0):
        self.calls += 1  # "auto" would refuse it
        return torch.tanh(x * self.weight) * scale


@pytest.fixture
def sampler():
    cache = GraphCache(backend=lambda device: Replay(), device_types=("cpu",))
    return df.DDIMSampler(df.NoiseSchedule.linear(), 5, 0.5, graphs=cache)


def scale(value):
    return {"scale": torch.full((1, 1, 1, 1), value)}


@pytest.mark.parametrize("mode", ["auto", "step", "loop"])
def test_replays_give_the_bits_of_eager_with_the_values_of_each_call(sampler, mode):
    model = Net()
    first = dict(conditioning=scale(1.0), unconditional_conditioning=scale(0.0), guidance_scale=2.0)
    with sampler.capture(model, SHAPE, capture=mode, **first) as captured:
        calls = model.calls
        for changes in (
            dict(seed=1),
            dict(seeds=[3, 4]),
            dict(seed=1, conditioning=scale(0.5)),
            dict(seed=1, guidance_scale=[1.0, 2.0, 3.0, 4.0, 5.0]),
            dict(seed=1, x_T=torch.ones(SHAPE)),
        ):
            replayed, calls_before = captured.sample(**changes), model.calls
            assert calls_before == calls
            eager = sampler.sample(model, SHAPE, capture="off", **(first | changes))
            calls = model.calls
            assert torch.equal(replayed, eager), changes
        with torch.no_grad():
            model.weight.mul_(2)
        replayed = captured.sample(seed=1)
        assert torch.equal(replayed, sampler.sample(model, SHAPE, seed=1, capture="off", **first))
    assert len(sampler.graphs) == 0


def test_what_was_given_at_capture_holds_until_a_call_says_otherwise(sampler):
    captured = sampler.capture(Net(), SHAPE, seed=7)
    assert torch.equal(captured.sample(), captured.sample(seed=7))
    assert not torch.equal(captured.sample(seeds=[1, 2]), captured.sample())


def test_capturing_draws_nothing_from_the_callers_generator_and_a_call_without_a_seed_does(sampler):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    captured = sampler.capture(Net(), SHAPE)
    assert torch.equal(torch.get_rng_state(), state)
    got = captured.sample()
    torch.set_rng_state(state)
    assert torch.equal(got, sampler.sample(Net(), SHAPE, capture="off"))


def test_a_result_outlives_the_next_call(sampler):
    captured = sampler.capture(Net(), SHAPE)
    first = captured.sample(seed=0)
    copy = first.clone()
    captured.sample(seed=1)
    assert torch.equal(first, copy)


@pytest.mark.parametrize(
    "changes",
    [
        dict(conditioning={"scale": torch.ones(2, 1, 1, 1)}),
        dict(conditioning={"scale": 1.0}),
        dict(conditioning=None),
        dict(callback=lambda *a: None),
        dict(generator=torch.Generator()),
    ],
)
def test_a_change_that_is_not_one_of_values_is_refused(sampler, changes):
    captured = sampler.capture(Net(), SHAPE, conditioning=scale(1.0))
    with pytest.raises(ValueError, match=rf"takes new values of what it was captured with, .* {next(iter(changes))}"):
        captured.sample(**changes)


def test_it_ends_once_and_for_all(sampler):
    captured = sampler.capture(Net(), SHAPE)
    assert repr(captured) == "CapturedRun(shape=(2, 3, 8, 8), 5 steps, one graph for a step)"
    captured.close()
    captured.close()
    assert repr(captured) == "CapturedRun(shape=(2, 3, 8, 8), 5 steps, closed)"
    with pytest.raises(RuntimeError, match="until it is closed, got one that was: capture it again"):
        captured.sample(seed=0)


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copying_it_is_refused_with_the_remedy(sampler, way):
    said = r"neither copied nor pickled, got CapturedRun\(.*sampler\.capture\("
    with sampler.capture(Net(), SHAPE, seed=0) as captured, pytest.raises(TypeError, match=said):
        way(captured)


def test_nan_is_looked_for_where_that_is_asked_for_alone(sampler):
    given = {"seed": 0, "conditioning": scale(torch.nan)}
    with sampler.capture(Net(), SHAPE, **given) as captured, warnings.catch_warnings():
        warnings.simplefilter("error")
        captured.sample()
    with (
        sampler.capture(Net(), SHAPE, check_finite=True, **given) as captured,
        pytest.warns(UserWarning, match="in 2 of 2, first in the x0 predicted in step 0 of 0 to 4"),
    ):
        captured.sample()


def test_it_is_used_by_one_at_a_time(sampler):
    inner = []

    def callback(step, t, x_t, x0):
        for call in (lambda: captured.sample(seed=1), captured.close):
            with pytest.raises(RuntimeError, match="while"):
                call()
            inner.append(step)

    captured = sampler.capture(Net(), SHAPE, callback=callback)
    captured.sample(seed=0)
    assert len(inner) == 10
    inner.clear()
    captured.sample(seed=0, callback=lambda *a: None)
    assert not inner


def test_names_and_modes_are_checked(sampler):
    captured = sampler.capture(Net(), SHAPE)
    with pytest.raises(TypeError, match=r"a captured run has no keyword 'sead', got sead=1: did you mean seed\?"):
        captured.sample(sead=1)
    with pytest.raises(ValueError, match="got capture='off': use sample"):
        sampler.capture(Net(), SHAPE, capture="off")
    with pytest.raises(ValueError, match="needs a CUDA device, and the samples are on cpu"):
        df.DDIMSampler(df.NoiseSchedule.linear(), 5).capture(Net(), SHAPE)


def test_it_waits_for_nothing_on_a_device():
    with fake_cuda() as device:
        cache = GraphCache(backend=lambda where: FakeGraphs(device))
        model = Net().to("cuda")
        captured = df.DDIMSampler(df.NoiseSchedule.linear(), 3, graphs=cache).capture(model, SHAPE, device="cuda")
        captured.sample(seed=0)
        steady = captured._captured._graph.steady
    assert steady.syncs == steady.copies == steady.others == []
    assert steady.region().own_launches == {"ddim_fast::ddim_step_kernel": 1}


def test_a_call_that_fails_while_its_values_are_loaded_is_waited_for(monkeypatch):
    backend = Logged()
    graphs = GraphCache(backend=lambda device: backend, device_types=("cpu",))
    s = df.DDIMSampler(df.NoiseSchedule.linear(), 3, graphs=graphs)
    with s.capture(Net(), SHAPE) as captured:
        captured.sample(seed=0)
        del backend.log[:]

        def fails(loop, job):
            raise RuntimeError("the copy failed")

        monkeypatch.setattr(CapturedLoop, "_load_plan", fails)
        with pytest.raises(RuntimeError, match="the copy failed"):
            captured.sample(seed=0)
        monkeypatch.undo()
        assert backend.log == ["first waits for first", "fence on first of 8 tensors"]
        captured.sample(seed=0)
