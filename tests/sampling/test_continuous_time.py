"""The sampler on paths in continuous time: what the model is told and given, where runs start, and every way to run."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import ddim_fast as df
from ddim_fast.gpu_lab.replay import RecordedGraphs
from ddim_fast.sampling.capture import GraphCache

SHAPE = (2, 3, 6, 5)
MEAN, SPREAD = 0.7, 0.4
EPS64 = torch.finfo(torch.float64).eps
SCHEDULES = {
    "flow": df.FlowSchedule(shift=3.0, time_scale=1000.0),
    "edm": df.EDMSchedule(),
    "edm-preconditioned": df.EDMSchedule(preconditioned=True),
    "ve": df.VESchedule(),
    "vp": df.VPSchedule(),
    "trigonometric": df.CosineSchedule(),
}
PATHS = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


class Gaussian(nn.Module):
    """The exact model of data N(MEAN, SPREAD^2), and of a class of its own per sample if labels are given; it keeps what it was told."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule, self.prediction_type = schedule, schedule.default_prediction_type
        self.told, self.given = [], []

    def forward(self, x, t, shift=None):
        self.told.append(t.clone())
        self.given.append(x.clone())
        x, told = x.double(), t.double().view(-1, *[1] * (x.ndim - 1))
        alpha, sigma, x = self.levels(x, told)
        mean = MEAN if shift is None else MEAN + shift.double().view(-1, 1, 1, 1)
        x0 = mean + alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2) * (x - alpha * mean)
        eps = (x - alpha * x0) / sigma
        return {
            "flow": lambda: eps - x0,
            "sample": lambda: x0,
            "epsilon": lambda: eps,
            "score": lambda: -eps / sigma,
            "v_prediction": lambda: alpha * eps - sigma * x0,
            "edm": lambda: (x0 - x * 0.25 / (sigma**2 + 0.25)) * (sigma**2 + 0.25).sqrt() / (0.5 * sigma),
        }[self.prediction_type]().to(self.given[-1].dtype)

    def levels(self, x, told):
        """(alpha, sigma, x_t) from what the model is told and given, by each path's own formula."""
        if isinstance(self.schedule, df.FlowSchedule):
            return 1 - told / 1000, told / 1000, x
        if isinstance(self.schedule, df.EDMSchedule) and not self.schedule.preconditioned:
            sigma = torch.exp(4 * told)
            return torch.ones_like(sigma), sigma, x * (sigma**2 + 0.25).sqrt()
        if isinstance(self.schedule, (df.EDMSchedule, df.VESchedule)):
            return torch.ones_like(told), told, x
        if isinstance(self.schedule, df.VPSchedule):
            log_alpha_bar = -(0.1 * told + 9.95 * told**2)
            return torch.exp(log_alpha_bar / 2), (-torch.expm1(log_alpha_bar)).sqrt(), x
        return torch.cos(math.pi / 2 * told), torch.sin(math.pi / 2 * told), x

    def unconditional(self, conditioning):
        return {"shift": torch.zeros_like(conditioning["shift"])}


@PATHS
@pytest.mark.parametrize(("order", "eta"), [(1, 0.0), (1, 0.6), (2, 0.0), (2, 0.6), (3, 0.0)])
def test_samples_are_the_datas(schedule, order, eta):
    model = Gaussian(schedule)
    sampler = df.DDIMSampler(schedule, 60, eta, order=order, timestep_spacing="log_snr")
    samples = sampler.sample(model, (400, 1, 8, 8), seed=3)
    # 25,600 values: a standard error of 0.0025 of the mean, and 0.0018 of the spread.
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert samples.std().item() == pytest.approx(SPREAD, abs=0.03)
    assert len(model.told) == 60


@PATHS
def test_what_the_model_is_told_and_given(schedule):
    model = Gaussian(schedule)
    sampler = df.DDIMSampler(schedule, 5)
    run = sampler.sample(model, SHAPE, seed=0, return_trajectory=True)
    assert run.timesteps == list(sampler.timesteps)
    for t, x_t, told, given in zip(sampler.timesteps, run.x_t, model.told, model.given, strict=False):
        assert told.dtype == torch.float32
        assert told.shape == (2,)
        assert torch.equal(told, torch.full((2,), schedule.model_time(t), dtype=torch.float32))
        scaled = (x_t.double() * schedule.input_scale(t)).float()
        torch.testing.assert_close(given, scaled, rtol=2**-23, atol=0)
    x_T = run.x_t[0]
    again = (
        df.DDIMSampler(df.NoiseSchedule.linear(), 5)
        .sample(lambda x, t: x, SHAPE, seed=0, return_trajectory=True)
        .x_t[0]
    )
    torch.testing.assert_close(x_T, again * schedule.initial_std_dev(sampler.timesteps[0]))


@PATHS
def test_a_model_in_half_precision_gets_its_input_rounded_once(schedule):
    model = Gaussian(schedule)
    sampler = df.DDIMSampler(schedule, 4)
    run = sampler.sample(model, SHAPE, seed=0, model_dtype=torch.bfloat16, return_trajectory=True)
    for t, x_t, given in zip(sampler.timesteps, run.x_t, model.given, strict=False):
        assert given.dtype == torch.bfloat16
        assert torch.equal(given, (x_t * torch.tensor(schedule.input_scale(t), dtype=torch.float32)).bfloat16())


@PATHS
@pytest.mark.parametrize("mode", ["step", "loop"])
@pytest.mark.parametrize(("order", "eta"), [(1, 0.0), (1, 0.7), (2, 0.7), (3, 0.0)])
def test_captured_runs_are_the_same(schedule, mode, order, eta):
    cache = GraphCache(maxsize=4, backend=lambda device: RecordedGraphs(), device_types=("cpu",))
    sampler = df.DDIMSampler(schedule, 6, eta, order=order, graphs=cache)

    def model(x, t):
        return torch.tanh(x * 0.7 + t.view(-1, 1, 1, 1).to(x.dtype) / 50)

    for seed in (1, 2):
        captured = sampler.sample(model, SHAPE, seed=seed, capture=mode)
        assert torch.equal(captured, sampler.sample(model, SHAPE, seed=seed, capture="off"))
    other = sampler.replace(timesteps=None, num_inference_steps=6, timestep_spacing="linspace")
    assert torch.equal(
        other.sample(model, SHAPE, seed=1, capture=mode), other.sample(model, SHAPE, seed=1, capture="off")
    )


@PATHS
def test_inversion_finds_the_start(schedule):
    model = Gaussian(schedule)
    sampler = df.DDIMSampler(schedule, 12, timestep_spacing="log_snr")
    # Between two noise levels that are neither pure noise nor clean data.
    x_T = sampler.sample(model, SHAPE, seed=0, dtype=torch.float64, return_trajectory=True).x_t[1]
    later = sampler.replace(timesteps=sampler.timesteps[1:], num_inference_steps=None)
    x0 = later.sample(model, x_T=x_T)
    back = later.invert(model, x0, iterations=60, tolerance=1e-13)
    torch.testing.assert_close(back, x_T, rtol=1e-7, atol=1e-7 * float(x_T.abs().max()))  # told is float32
    again = later.reconstruct(model, x0, iterations=60, tolerance=1e-13)
    torch.testing.assert_close(again, x0, rtol=1e-7, atol=1e-7)


@PATHS
def test_in_parallel_as_one_after_the_other(schedule):
    for eta in (0.0, 0.5):
        sampler = df.DDIMSampler(schedule, 10, eta)
        one = sampler.sample(Gaussian(schedule), SHAPE, seed=4, dtype=torch.float64)
        many, statistics = sampler.sample_parallel(
            Gaussian(schedule), SHAPE, seed=4, dtype=torch.float64, tolerance=0, return_statistics=True
        )
        assert statistics.converged
        torch.testing.assert_close(many, one, rtol=1e-12, atol=1e-12)


@PATHS
def test_image_to_image_starts_at_the_level_of_its_first_time(schedule):
    model = Gaussian(schedule)
    sampler = df.DDIMSampler(schedule, 10, timestep_spacing="log_snr")
    x0 = torch.full(SHAPE, 0.3)
    run = sampler.img2img(model, x0, strength=0.4, seed=5, return_trajectory=True)
    alpha, sigma = schedule.level(run.timesteps[0])
    assert run.timesteps == list(sampler.timesteps[-4:])
    z = df.DDIMSampler(df.NoiseSchedule.linear(), 1, timestep_spacing="trailing").sample(
        lambda x, t: x, SHAPE, seed=5, return_trajectory=True
    )
    torch.testing.assert_close(run.x_t[0], alpha * x0 + sigma * z.x_t[0], rtol=1e-5, atol=1e-6)


@PATHS
def test_a_known_region_is_kept_at_every_level(schedule):
    mask = torch.zeros(SHAPE)
    mask[..., :2] = 1
    x0 = torch.full(SHAPE, 0.25)
    run = df.DDIMSampler(schedule, 8).inpaint(Gaussian(schedule), x0, mask, seed=6, return_trajectory=True)
    torch.testing.assert_close(run.samples[..., :2], x0[..., :2])
    for t, x_t in zip(run.timesteps, run.x_t, strict=False):
        alpha, sigma = df.NoiseLevel(*schedule.level(t))
        noise = (x_t[..., :2] - alpha * 0.25) / sigma  # 24 normals
        assert 0.4 < noise.std() < 1.7


@PATHS
def test_guidance_and_interpolation(schedule):
    sampler, model = df.DDIMSampler(schedule, 6), Gaussian(schedule)
    shift = torch.tensor([0.5, -0.5])
    guided = sampler.sample(model, SHAPE, seed=1, guidance_scale=1.5, conditioning={"shift": shift})
    assert guided.isfinite().all()
    cond = sampler.sample(model, SHAPE, seed=1, conditioning={"shift": shift})
    # The exact model is affine in its class: guidance moves the mean on by half the difference.
    torch.testing.assert_close(guided - cond, (cond - sampler.sample(model, SHAPE, seed=1)) / 2, rtol=1e-2, atol=2e-2)
    ends = torch.randn((2, *SHAPE), generator=torch.Generator().manual_seed(0)) * schedule.initial_std_dev(
        schedule.first
    )
    between = sampler.interpolate(model, ends[0], ends[1], [0.0, 1.0])
    torch.testing.assert_close(between[0], sampler.sample(model, x_T=ends[0]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(between[1], sampler.sample(model, x_T=ends[1]), rtol=1e-5, atol=1e-5)


@PATHS
def test_a_classifier_moves_the_noise(schedule):
    """A gradient g of log p(y | x_t) moves eps by -sigma_t g: seen in the first x0, which moves by sigma_t^2 / alpha_t g."""
    timesteps = [t for t in schedule.select(8, "log_snr") if schedule.level(t).alpha > 0][:3]
    sampler, told = df.DDIMSampler(schedule, timesteps=timesteps), []

    def cond_fn(x, t):
        told.append(t)
        return torch.full_like(x, 1e-3)

    def run(**options):
        return sampler.sample(Gaussian(schedule), SHAPE, seed=2, dtype=torch.float64, return_trajectory=True, **options)

    plain, moved = run(), run(cond_fn=cond_fn)
    alpha, sigma = schedule.level(timesteps[0])
    torch.testing.assert_close(
        moved.x0[0] - plain.x0[0], torch.full(SHAPE, 1e-3 * sigma**2 / alpha, dtype=torch.float64), rtol=1e-6, atol=1e-9
    )
    assert torch.equal(told[0], torch.full((2,), schedule.model_time(timesteps[0]), dtype=torch.float32))


@PATHS
def test_samplers_are_values(schedule):
    sampler = df.DDIMSampler(schedule, 7, 0.5)
    for again in (pickle.loads(pickle.dumps(sampler)), copy.deepcopy(sampler), df.DDIMSampler(schedule, 7, 0.5)):
        assert again == sampler
        assert hash(again) == hash(sampler)
    assert sampler != df.DDIMSampler(schedule, 8, 0.5)
    assert sampler.timestep_spacing == schedule.default_spacing
    assert sampler.plan().prediction_type == schedule.default_prediction_type
    assert repr(schedule) in repr(sampler)
    assert sampler.last_steps(3).timesteps == sampler.timesteps[-3:]


def test_the_model_may_be_told_other_times():
    schedule = df.FlowSchedule(time_scale=1000.0)
    told = []
    sampler = df.DDIMSampler(schedule, timesteps=[1.0, 0.5], model_timesteps=[0.95, 0.625])
    sampler.sample(lambda x, t: told.append(t[0].item()) or x, SHAPE, seed=0)
    assert told == [950.0, 625.0]
    assert sampler.timesteps == (1.0, 0.5)


REFUSALS = [
    (dict(schedule="flow"), TypeError, "schedule must be a NoiseSchedule, or one in continuous time, got str"),
    (dict(steps_offset=1), ValueError, "steps_offset belongs to the discrete timesteps of a NoiseSchedule, got 1"),
    (dict(timestep_spacing="leading"), ValueError, "timestep_spacing must be one of uniform, .*, got 'leading'"),
    (dict(timesteps="ddim50", num_inference_steps=None), ValueError, "a list of times, or a file of them, .*got 'ddim50'"),
    (dict(timesteps=[999, 500], num_inference_steps=None), ValueError, r"timesteps must lie in \(0, 1\]"),
    (dict(timesteps=[1.0, 0.5]), ValueError, "timesteps has 2 entries, so num_inference_steps must be that .*, got 5"),
    (dict(prediction_type="epsilon"), ValueError, "epsilon prediction needs alpha > 0, got alpha = 0"),
    (dict(set_alpha_to_one=False), ValueError, "set_alpha_to_one=False ends at alpha_bar_0"),
    (dict(model_timesteps=[0.5]), ValueError, "model_timesteps must be 5 numbers"),
    (dict(model_timesteps="0.5"), TypeError, "model_timesteps must be a list of numbers, got '0.5'"),
    (dict(eta=3.0), ValueError, "eta may be at most .*, got 3.0"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSALS, ids=[str(r[0])[:40] for r in REFUSALS])
def test_every_refusal_says_what_was_received(arguments, error, message):
    with pytest.raises(error, match=message):
        df.DDIMSampler(**{"schedule": df.FlowSchedule(), "num_inference_steps": 5, **arguments})
