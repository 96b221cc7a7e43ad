"""A diffusion model seen as a flow model samples the same pictures."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import ddim_fast as df

SCHEDULE = df.NoiseSchedule.linear()
KINDS = ["epsilon", "sample", "v_prediction"]
SHAPE = (3, 2, 5, 4)


class Told(nn.Module):
    """A smooth function of its input, the timestep and a label, in float64 inside; it keeps what it was told."""

    def __init__(self, kind):
        super().__init__()
        self.prediction_type, self.schedule, self.told = kind, SCHEDULE, []
        self.sample_shape, self.class_names = SHAPE[1:], ("a", "b")

    def forward(self, x, t, labels=None):
        self.told.append(t.clone())
        shift = 0.0 if labels is None else labels.view(-1, 1, 1, 1).double()
        return torch.tanh(0.8 * x.double() + 1e-3 * t.double().view(-1, 1, 1, 1) + shift).to(x.dtype)

    def unconditional(self, conditioning):
        return {"labels": torch.zeros_like(conditioning["labels"])}


def rescaled(x, t):
    """What is x on the variance-preserving path, on the flow's."""
    return x * math.hypot(1 - t, t)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("eta", "order"), [(0.0, 1), (0.7, 1), (0.0, 2)])
def test_both_sample_the_same_from_the_same_start(kind, eta, order):
    model, x_T = Told(kind), torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    by_diffusion = df.DDIMSampler(SCHEDULE, 20, eta, order=order, timestep_spacing="trailing")
    expected = by_diffusion.sample(model, x_T=x_T, seed=4)
    told = model.told.copy()
    model.told.clear()
    times = df.flow_times(SCHEDULE, by_diffusion.timesteps)
    by_flow = df.DDIMSampler(df.FlowSchedule(), eta=eta, order=order, timesteps=times)
    got = by_flow.sample(df.as_flow(model), x_T=rescaled(x_T, times[0]), seed=4)
    assert [t.tolist() for t in model.told] == [t.tolist() for t in told]  # it is asked the same questions
    assert all(t.dtype == torch.int64 for t in model.told)
    # In float32, over 20 steps; alpha is 0.006 at the first, which magnifies what is rounded there.
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_velocity_is_the_difference_of_what_the_model_means(kind):
    """eps - x0 by the definitions of each kind, in float64, at every 37th timestep."""
    model = Told(kind)
    flow = df.as_flow(model)
    x = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for timestep in range(0, 1000, 37):
        alpha, sigma = math.sqrt(SCHEDULE.alphas_cumprod[timestep]), math.sqrt(1 - SCHEDULE.alphas_cumprod[timestep])
        (time,) = df.flow_times(SCHEDULE, [timestep])
        assert time == pytest.approx(sigma / (alpha + sigma), rel=1e-14)
        wanted = velocity_meant(kind, x, model(x, torch.full((3,), timestep)), alpha, sigma)
        got = flow(rescaled(x, time), torch.full((3,), time, dtype=torch.float64))
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9 / alpha)


def test_times_between_two_timesteps():
    flow = df.as_flow(Told("epsilon"))
    fractional = df.as_flow(Told("epsilon"), fractional_timesteps=True)
    times = torch.tensor(df.flow_times(SCHEDULE), dtype=torch.float64)
    assert flow.timesteps(times).tolist() == list(range(1000))
    assert fractional.timesteps(times.float().double()).tolist() == list(map(float, range(1000)))
    half_log_snr = 0.5 * (SCHEDULE.log_snr[1:] + SCHEDULE.log_snr[:-1]) / 2
    between = torch.tensor(1 / (1 + np.exp(half_log_snr)))
    np.testing.assert_allclose(fractional.timesteps(between).numpy(), np.arange(999) + 0.5, atol=1e-4)
    # Pure noise and clean data are beyond the model's range.
    for view in (flow, fractional):
        assert view.timesteps(torch.tensor([1.0, 0.0, 1e-9], dtype=torch.float64)).tolist() == [999, 0, 0]
    zero_snr = df.as_flow(Told("v_prediction"), SCHEDULE.rescale_zero_terminal_snr())
    assert zero_snr.timesteps(torch.tensor([1.0, 0.5], dtype=torch.float64))[0] == 999


def test_samples_at_different_times_in_one_batch():
    flow = df.as_flow(Told("v_prediction"))
    x, t = torch.randn(SHAPE), torch.tensor([0.2, 0.5, 0.9])
    together = flow(x, t)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], flow(x[i : i + 1], t[i : i + 1]))


def test_it_is_a_model_like_another():
    model = Told("v_prediction")
    flow = df.as_flow(model)
    assert flow.prediction_type == "flow"
    assert flow.schedule == df.FlowSchedule()
    assert flow.sample_shape == SHAPE[1:]
    assert flow.class_names == ("a", "b")
    sampler = df.DDIMSampler(df.FlowSchedule(shift=3.0), 4)
    options = dict(seed=1, conditioning={"labels": torch.tensor([0, 1, 1])}, guidance_scale=2.0)
    expected = sampler.sample(flow, SHAPE, **options)
    for again in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert torch.equal(sampler.sample(again, SHAPE, **options), expected)
    assert flow(torch.randn(SHAPE).bfloat16(), torch.full((3,), 0.5)).dtype == torch.bfloat16
    assert flow(torch.randn(0, 2, 5, 4), torch.full((0,), 0.5)).shape == (0, 2, 5, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((lambda x, t: x,), TypeError, "as_flow needs the NoiseSchedule .*, got None: pass schedule="),
        ((lambda x, t: x, df.FlowSchedule()), TypeError, "as_flow needs the NoiseSchedule .*, got FlowSchedule"),
        ((lambda x, t: x, SCHEDULE), ValueError, "prediction_type must be one of .*, got None"),
        ((lambda x, t: x, SCHEDULE, "flow"), ValueError, "prediction_type must be one of .*, got 'flow'"),
    ],
)
def test_what_it_cannot_see_as_a_flow_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        df.as_flow(*arguments)


def test_the_shipped_model_draws_the_same_pictures():
    model = df.load_model("fashion")
    labels, x_T = (
        {"class_labels": torch.arange(4)},
        torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(2)),
    )
    by_diffusion = df.DDIMSampler(model.schedule, 10, timestep_spacing="trailing")
    times = df.flow_times(model.schedule, by_diffusion.timesteps)
    pictures = by_diffusion.sample(model, x_T=x_T, conditioning=labels)
    flow = df.DDIMSampler(df.FlowSchedule(), timesteps=times)
    got = flow.sample(df.as_flow(model), x_T=rescaled(x_T, times[0]), conditioning=labels)
    assert float((got - pictures).abs().max()) < 1 / 255 / 10


def velocity_meant(kind, x, m, alpha, sigma):
    """eps - x0 by the definition of each kind, of x = alpha x0 + sigma eps."""
    if kind == "epsilon":
        return m - (x - sigma * m) / alpha
    if kind == "sample":
        return (x - alpha * m) / sigma - m
    return (sigma * x + alpha * m) - (alpha * x - sigma * m)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", [SCHEDULE, SCHEDULE.rescale_zero_terminal_snr()], ids=["linear", "zero SNR"])
def test_the_ends_of_the_path_are_finite(kind, schedule):
    """At t = 1 eps says nothing about x0, and at t = 0 x0 nothing about eps: the nearest timestep that says both is
    meant, by the definition of each kind."""
    model = Told(kind)
    model.schedule = schedule
    flow, x = df.as_flow(model), torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    last = max(t for t in range(1000) if schedule.alphas_cumprod[t] > 0) if kind == "epsilon" else 999
    near = [(0.9999999, last)] if kind == "epsilon" else []
    for time, timestep in ((1.0, last), *near, (0.0, 0)):
        got = flow(rescaled(x, time), torch.full((3,), time, dtype=torch.float64))
        assert model.told[-1].tolist() == [timestep] * 3
        if kind == "v_prediction" or (kind == "epsilon" and time == 0) or (kind == "sample" and time == 1):
            alpha, sigma = ((1 - time) / math.hypot(1 - time, time), time / math.hypot(1 - time, time))
        else:
            alpha, sigma = (
                math.sqrt(a) for a in (schedule.alphas_cumprod[timestep], 1 - schedule.alphas_cumprod[timestep])
            )
        velocity = velocity_meant(kind, x, model(x, torch.full((3,), timestep)), alpha, sigma)
        wide = 1e-8 * (1 / alpha if kind == "epsilon" else 1 / sigma if kind == "sample" else 1)
        assert velocity.isfinite().all()
        torch.testing.assert_close(got, velocity, rtol=1e-9, atol=wide)


def test_a_model_of_the_noise_is_sampled_from_flow_time_1():
    """The exact model of data N(0, 1/4), from pure noise on both paths: the first steps differ by what alpha_T leaves
    of x0, 0.006."""
    alphas_cumprod = torch.from_numpy(SCHEDULE.alphas_cumprod.copy()).float()

    def exact(x, t):
        a = alphas_cumprod[t].view(-1, 1, 1, 1)
        return (1 - a).sqrt() * x / (a / 4 + 1 - a)

    x_T = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    flow = df.as_flow(exact, SCHEDULE, "epsilon")
    times = (1.0, *df.flow_times(SCHEDULE, [900, 700, 400, 100]))
    got = df.DDIMSampler(df.FlowSchedule(), timesteps=times).sample(flow, x_T=x_T)
    expected = df.DDIMSampler(SCHEDULE, timesteps=[999, 900, 700, 400, 100]).sample(exact, x_T=x_T)
    assert float((got - expected).norm() / expected.norm()) < 0.01


@pytest.mark.parametrize("training", [False, True])
def test_the_view_is_in_the_mode_of_the_model(training):
    model = Told("epsilon").train(training)
    assert df.as_flow(model).training is training
    assert df.as_flow(lambda x, t: x, SCHEDULE, "epsilon").training is False
