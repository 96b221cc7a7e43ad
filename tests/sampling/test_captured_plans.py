"""What a call costs the host whose graph is there: nothing that is on the device comes from the host again, and no call waits."""

import pytest
import torch
from torch import nn

import ddim_fast as df
from ddim_fast.gpu_lab import Replay
from ddim_fast.gpu_lab.fake_cuda import FakeGraphs, fake_cuda
from ddim_fast.sampling import captured_loop, loop, model_times
from ddim_fast.sampling.capture import GraphCache
from ddim_fast.utils.transfer import to_device

SHAPE = (2, 3, 4, 4)


class Net(nn.Module):
    prediction_type = "epsilon"
    batches_guidance = False

    def forward(self, x, t, scale=1.0):
        return x * (t.view(-1, 1, 1, 1) / 1000 + 0.1) * scale

    def unconditional(self, conditioning):
        return {}


@pytest.fixture
def cache():
    return GraphCache(backend=lambda device: Replay(), device_types=("cpu",))


def samplers(cache, count):
    return [df.DDIMSampler(df.NoiseSchedule.linear(), steps, graphs=cache) for steps in range(3, 3 + count)]


@pytest.mark.parametrize("kept", [0, 1, 8])
def test_any_turn_of_plans_gives_what_each_gives_alone(cache, monkeypatch, kept):
    monkeypatch.setattr(captured_loop, "_PLANS", kept)
    model = Net()
    calls = [(s, scale) for s in samplers(cache, 3) for scale in (None, 2.0, [3.0] * s.num_inference_steps)]

    def sample(s, scale, capture):
        conditioning = {"scale": torch.full((2, 1, 1, 1), 0.5)}  # without it, 1: guidance counts
        return s.sample(model, SHAPE, seed=1, guidance_scale=scale, conditioning=conditioning, capture=capture)

    expected = [sample(*call, "off") for call in calls]
    for order in (range(9), range(8, -1, -1), (0, 0, 3, 3, 1, 4, 1, 1, 7)):
        for i in order:
            assert torch.equal(sample(*calls[i], "step"), expected[i]), i
    assert len(cache) == 2  # with guidance and without
    captured = [loop for _, loop in cache._captured.values()]
    assert all(len(loop._plans) <= kept + 1 for loop in captured)
    assert cache.stats().nbytes >= sum(t.nbytes for loop in captured for plan in loop._plans.values() for t in plan)


def test_a_plan_is_made_for_the_device_once(cache, monkeypatch):
    made = []
    of = model_times.model_times
    monkeypatch.setattr(captured_loop, "model_times", lambda *arguments: made.append(arguments[0]) or of(*arguments))
    (first, second), model = samplers(cache, 2), Net()
    for s in (first, first, second, first, second, second):
        s.sample(model, SHAPE, seed=1, capture="step")
    assert made == [first.plan(model), second.plan(model)]


@pytest.mark.parametrize("mode", ["step", "loop"])
def test_a_warm_call_copies_its_seeds_from_the_host_and_nothing_else(mode):
    with fake_cuda() as device:
        cache = GraphCache(backend=lambda where: FakeGraphs(device))
        s, model = df.DDIMSampler(df.NoiseSchedule.linear(), 3, 1.0, graphs=cache), Net().to("cuda")

        def call(seed):
            return s.sample(model, SHAPE, seed=seed, device="cuda", capture=mode)

        call(0)
        for seed in (1, 2):  # the first of them makes the row by which x_T is drawn
            with device.steady_state(refuse=False) as steady:
                call(seed)
    copied = [finding for finding in steady.copies if "lift_fresh" not in finding]  # which takes host memory as it is
    assert len(copied) == 1, steady
    assert steady.syncs == []


@pytest.mark.filterwarnings("ignore:guidance needs what the model is guided to")  # it is to two calls, or one, here
def test_guidance_by_one_call_is_not_taken_for_no_guidance(cache):
    model = Net()
    model.batches_guidance = True
    (s,) = samplers(cache, 1)
    for scale in (None, 2.0, None, 2.0):
        call = dict(seed=1, guidance_scale=scale)
        assert torch.equal(
            s.sample(model, SHAPE, capture="step", **call), s.sample(model, SHAPE, capture="off", **call)
        )
    assert len(cache) == 2


def test_steps_are_counted_whoever_watches(cache):
    (s,), model = samplers(cache, 1), Net()
    for options in (
        {},
        {"progress": True},
        {"callback": lambda *state: None},
        {"generator": torch.Generator().manual_seed(0)},
    ):
        timing = loop.Timing()
        s.sample(model, SHAPE, capture="step", timing=timing, **options)
        assert timing.steps == 3
        assert timing.captured_seconds > 0


def test_what_is_on_the_host_already_is_not_copied():
    tensor = torch.arange(3)
    assert to_device(tensor, "cpu") is tensor
    with fake_cuda():
        assert to_device(torch.arange(3), "cuda").device.type == "cuda"
