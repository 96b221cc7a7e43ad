"""Rollouts: the samples are those of ``sample``, the states those of its trajectory, the log-probabilities those of the Gaussian
formula in float64, and the same bits come from a model that has not changed: eager, captured (the recorded stand-in on the CPU),
replayed from seeds."""

import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import ddim_fast as df
from ddim_fast.gpu_lab.fake_cuda import FakeGraphs, fake_cuda
from ddim_fast.gpu_lab.replay import RecordedGraphs
from ddim_fast.sampling.capture import GraphCache
from ddim_fast.verify.truth.tolerances import allowed_density_error, to_numpy

SHAPE = (3, 3, 8, 8)
COND = {"scale": torch.tensor([1.0, 0.5, 2.0])}
EAGER = GraphCache(device_types=())


class Net(nn.Module):
    """A small model that uses everything that it is given."""

    def __init__(self, seed=0):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        with torch.no_grad():
            weight = torch.linspace(-0.4, 0.3, self.conv.weight.numel()).roll(seed).view_as(self.conv.weight)
            self.conv.weight.copy_(weight)
            self.conv.bias.fill_(0.1)

    def forward(self, x, t, scale=None):
        y = torch.tanh(self.conv(x) + t.view(-1, 1, 1, 1).to(x.dtype) / 1000)
        return y if scale is None else y * scale.view(-1, 1, 1, 1).to(x.dtype)

    def unconditional(self, conditioning):
        return {"scale": torch.zeros_like(conditioning["scale"])}


@pytest.fixture(scope="module")
def model():
    return Net()


@pytest.fixture
def cache():
    return GraphCache(maxsize=8, backend=recorded, device_types=("cpu",))


def recorded(device):
    return RecordedGraphs()


SAMPLERS = {
    "vp": lambda **options: df.DDIMSampler(df.NoiseSchedule.linear(), 5, 0.8, **options),
    "vp clipped": lambda **options: df.DDIMSampler(df.NoiseSchedule.linear(), 5, 1.0, clip_sample=True, **options),
    "sigma-hat": lambda **options: df.DDIMSampler(df.NoiseSchedule.linear(), 5, 1.0, sigma_hat=True, **options),
    "flow": lambda **options: df.DDIMSampler(df.FlowSchedule(shift=3.0), 5, 0.7, eta_scales="flow_grpo", **options),
    "cps": lambda **options: df.DDIMSampler(df.FlowSchedule(), 5, 0.5, eta_scales="cps", **options),
    "edm": lambda **options: df.DDIMSampler(df.EDMSchedule(), 5, 1.0, **options),
}
PATHS = pytest.mark.parametrize("path", SAMPLERS)


def sampler(path="vp", cache=EAGER, **options):
    return SAMPLERS[path](graphs=cache, **options)


def assert_ratio_of_one(rollout, model, **options):
    """At unchanged weights, to the bit: with gradients, and without."""
    for index in range(len(rollout)):
        new = rollout.log_prob(model, index, **options)
        assert new.requires_grad
        assert torch.equal(torch.exp(new.detach().float() - rollout.log_probs[index]), torch.ones(len(new)))
        with torch.no_grad():
            assert torch.equal(rollout.log_prob(model, index, **options).float(), rollout.log_probs[index])


def assert_same(a, b):
    for name in ("samples", "log_probs", "states", "seeds"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.noisy_steps == b.noisy_steps
    assert a.plan == b.plan


# --- What is recorded ----------------------------------------------------------------------------------------------------------


@PATHS
def test_it_is_the_run_of_sample_with_its_states(path, model):
    s = sampler(path)
    rollout = s.rollout(model, SHAPE, seed=3)
    run = s.sample(model, SHAPE, seed=3, return_trajectory=True)
    assert torch.equal(rollout.samples, run.samples)
    assert rollout.noisy_steps == (0, 1, 2, 3)
    assert len(rollout) == 4
    assert torch.equal(rollout.states, torch.stack(run.x_t[:5]))
    for index in range(4):
        assert torch.equal(rollout.x_t(index), run.x_t[index])
        assert torch.equal(rollout.x_prev(index), run.x_t[index + 1])
    assert rollout.timesteps == s.timesteps[:4]
    assert rollout.model_times.tolist() == torch.tensor(rollout.plan.model_times[:4]).tolist()
    assert rollout.model_times.dtype == s.schedule.time_dtype
    assert rollout.steps == s.plan(model).steps[:4]
    np.testing.assert_array_equal(rollout.seeds.numpy(), df.sample_seeds(3, 3))
    assert rollout.log_probs.shape == (4, 3)
    assert rollout.log_probs.dtype == torch.float32
    assert repr(rollout) == "Rollout(3 samples of (3, 8, 8), noisy steps 0, 1, 2, 3 of 5, 5 states)"


# The mean and standard deviation of a step, from the sample and the model's output, in float64.


def vp_mean(x, m, step, eta):
    a, b = step.alpha_bar_t, step.alpha_bar_prev
    std = eta * math.sqrt((1 - b) / (1 - a) * (1 - a / b))
    x0 = (x - math.sqrt(1 - a) * m) / math.sqrt(a)
    return math.sqrt(b) * x0 + math.sqrt(1 - b - std**2) * m, std


def flow_grpo_mean(x, v, step, eta):
    t, s = step.t, step.t_prev
    dt, diffusion = s - t, eta * math.sqrt(t / (1 - (s if t == 1 else t)))
    mean = x * (1 + diffusion**2 / (2 * t) * dt) + v * (1 + diffusion**2 * (1 - t) / (2 * t)) * dt
    return mean, diffusion * math.sqrt(-dt)


def edm_mean(x, f, step, eta, data=0.5):
    t, s = step.t, step.t_prev
    denoised = data**2 / (t**2 + data**2) * x + t * data / math.sqrt(t**2 + data**2) * f
    std = eta * s * math.sqrt(1 - s**2 / t**2)
    return denoised + math.sqrt(s**2 - std**2) * (x - denoised) / t, std


@pytest.mark.parametrize(
    ("path", "mean_of", "eta"), [("vp", vp_mean, 0.8), ("flow", flow_grpo_mean, 0.7), ("edm", edm_mean, 1.0)]
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_log_probabilities_are_those_of_the_formula_in_float64(path, mean_of, eta, reduction, model):
    rollout = sampler(path).rollout(model, SHAPE, seed=1, log_prob_reduction=reduction)
    for index, step in enumerate(rollout.steps):
        x_t, x_prev = (to_numpy(state).reshape(3, -1) for state in (rollout.x_t(index), rollout.x_prev(index)))
        with torch.no_grad():
            output = model(rollout.x_t(index) * step.input_scale, rollout.model_times[index].expand(3))
        m = to_numpy(output).reshape(3, -1)
        mean, std = mean_of(x_t, m, step, eta)
        scale, offset = 1 / (2 * std**2), math.log(std) + math.log(2 * math.pi) / 2
        exact = -(scale * (x_prev - mean) ** 2 + offset).sum(1)
        of_x, of_m = step.coefficients.folded
        allowed = allowed_density_error(
            torch.float32, x_prev - mean, np.abs(of_x * x_t) + np.abs(of_m * m), scale, offset
        )
        share = 1 / x_t.shape[1] if reduction == "mean" else 1.0
        assert (np.abs(rollout.log_probs[index].double().numpy() - share * exact) <= share * allowed).all()


def test_a_sample_depends_on_its_own_seed_alone():
    s, pointwise = sampler(), lambda x, t: torch.tanh(x)
    whole = s.rollout(pointwise, SHAPE, seeds=[5, 6, 7])
    one = s.rollout(pointwise, (1, *SHAPE[1:]), seeds=[6])
    assert torch.equal(whole.log_probs[:, 1:2], one.log_probs)
    assert torch.equal(whole.states[:, 1:2], one.states)
    assert whole.seeds.tolist() == [5, 6, 7]


@pytest.mark.parametrize("size", [0, 1, 127, 128, 129])
def test_samples_of_any_size(size):
    rollout = sampler().rollout(lambda x, t: torch.tanh(x), (2, size), seed=0)
    assert rollout.states.shape == (5, 2, size)
    assert rollout.log_probs.isfinite().all()
    assert sampler().rollout(lambda x, t: torch.tanh(x), (0, 3), seed=0).log_probs.shape == (4, 0)


# --- The ratio -------------------------------------------------------------------------------------------------------------


def pull(x, t, scale=None):
    return -0.1 * x.detach()


RUNS = {
    "plain": {},
    "conditioned": dict(conditioning=COND),
    "guided": dict(conditioning=COND, guidance_scale=3.0),
    "guided by step": dict(conditioning=COND, guidance_scale=[1.0, 2.0, 3.0, 4.0, 5.0]),
    "guided apart": dict(conditioning=COND, guidance_scale=3.0, unconditional_conditioning={"scale": torch.ones(3)}),
    "rescaled": dict(conditioning=COND, guidance_scale=3.0, guidance_rescale=0.7),
    "classifier": dict(cond_fn=pull),
    "masked": dict(mask=torch.linspace(0, 1, 8).round(), known_x0=torch.zeros(SHAPE)),
    "sum": dict(log_prob_reduction="sum"),
    "least": dict(min_std=0.5),
    "with the last": dict(min_std=0.1, noisy_steps=[2, 4]),
    "window": dict(noisy_steps=range(1, 3)),
    "x_T": dict(x_T=torch.linspace(-2, 2, 576).view(SHAPE)),
    "generator": dict(generator=torch.Generator()),
    "float16": dict(dtype=torch.float16),
    "bfloat16": dict(dtype=torch.bfloat16),
    "half model": dict(model_dtype=torch.bfloat16),
    "float64": dict(dtype=torch.float64),
}


def model_for(name):
    dtype = {
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
        "half model": torch.bfloat16,
        "float64": torch.float64,
    }
    return Net().to(dtype.get(name, torch.float32))


def call_of(name):
    call = dict(RUNS[name])
    return call if "generator" in call else {"seed": 5, **call}


@pytest.mark.parametrize("name", RUNS)
def test_the_ratio_at_unchanged_weights_is_exactly_one(name):
    model, call = model_for(name), call_of(name)
    rollout = sampler().rollout(model, SHAPE, **call)
    assert_ratio_of_one(rollout, model)
    changed = Net(1).to(next(model.parameters()).dtype)
    assert not torch.equal(rollout.log_prob(changed, 0).float(), rollout.log_probs[0])


@PATHS
def test_the_ratio_on_every_path(path, model):
    s = sampler(path)
    assert_ratio_of_one(s.rollout(model, SHAPE, seed=0), model)
    guided = dict(conditioning=COND, guidance_scale=2.0, dtype=torch.bfloat16, model_dtype=torch.float32)
    rollout = s.rollout(model, SHAPE, seed=0, noisy_steps=[0, 2], **guided)
    assert_ratio_of_one(rollout, model)


def test_the_ratio_of_a_model_that_batches_guidance(model):
    class Both(Net):
        batches_guidance = True

    both = Both()
    assert_ratio_of_one(sampler().rollout(both, SHAPE, seed=0, conditioning=COND, guidance_scale=2.0), both)


def test_conditioning_may_differ_from_the_rollouts(model):
    rollout = sampler().rollout(model, SHAPE, seed=0, conditioning=COND)
    other = {"scale": torch.tensor([1.0, 0.5, 1.9])}
    new = rollout.log_prob(model, 1, conditioning=other)
    assert torch.equal(new[:2], rollout.log_probs[1][:2])
    assert new[2] != rollout.log_probs[1][2]
    guided = sampler().rollout(model, SHAPE, seed=0, conditioning=COND, guidance_scale=2.0)
    output = model(guided.x_t(0), guided.model_times[0].expand(3), **COND)
    unguided = df.ddim_log_prob(guided.x_prev(0), guided.x_t(0), output, guided.steps[0].coefficients)
    assert torch.equal(guided.log_prob(model, 0, guidance_scale=None), unguided)


def test_the_callers_mapping_may_change_afterwards(model):
    conditioning = dict(COND)
    rollout = sampler().rollout(model, SHAPE, seed=0, conditioning=conditioning)
    conditioning["scale"] = torch.zeros(3)
    assert_ratio_of_one(rollout, model)


def test_gradients_are_those_of_the_formula_in_float64():
    """d log_prob / d weights = mean of (x_prev - mean) / std^2 d mean / d weights, by autograd in float64."""
    model = Net().double()
    rollout = sampler("flow").rollout(model, SHAPE, seed=2, dtype=torch.float64)
    for index in range(len(rollout)):
        weight, bias = torch.autograd.grad(rollout.log_prob(model, index).sum(), [model.conv.weight, model.conv.bias])
        step, x_t = rollout.steps[index], rollout.x_t(index)
        v = model(x_t, rollout.model_times[index].expand(3))
        mean, std = flow_grpo_mean(x_t, v, step, 0.7)
        log_prob = (-((rollout.x_prev(index) - mean) ** 2) / (2 * std**2)).flatten(1).mean(1)
        expected = torch.autograd.grad(log_prob.sum(), [model.conv.weight, model.conv.bias])
        torch.testing.assert_close((weight, bias), expected, rtol=1e-9, atol=1e-12)
    assert not rollout.log_probs.requires_grad
    assert not rollout.samples.requires_grad


def test_training_raises_the_probability_of_what_is_rewarded():
    """Ten steps of policy gradient on one rollout."""
    model = Net()
    rollout = sampler().rollout(model, SHAPE, seed=0, noisy_steps=[1, 2])
    advantage = torch.tensor([1.0, -1.0, 0.0])
    for _ in range(10):
        for index in range(len(rollout)):
            ratio = torch.exp(rollout.log_prob(model, index) - rollout.log_probs[index])
            (ratio * advantage).mean().backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.05 * weight.grad
                weight.grad = None
    gain = sum(rollout.log_prob(model, index).detach() - rollout.log_probs[index] for index in range(2))
    assert gain[0] > gain[1]


# --- Noise in chosen steps ---------------------------------------------------------------------------------------------------


@PATHS
@pytest.mark.parametrize("steps", [(0,), (3,), (1, 2), (0, 2), (0, 3)], ids=str)
def test_the_other_steps_are_deterministic(path, steps, model):
    s = sampler(path)
    rollout = s.rollout(model, SHAPE, seed=4, noisy_steps=steps)
    assert [step.coefficients.adds_noise for step in rollout.plan.steps] == [index in steps for index in range(5)]
    for step, noisy, quiet in zip(
        rollout.plan.steps, s.plan().steps, s.replace(eta=0, sigma_hat=False).plan().steps, strict=True
    ):
        assert step == (noisy if step.index in steps else quiet)
    kept = sorted({*steps, *(number + 1 for number in steps)})
    assert rollout.states.shape == (len(kept), *SHAPE)
    if path != "sigma-hat":
        eta = [s.eta if index in steps else 0 for index in range(5)]
        run = s.replace(eta=eta).sample(model, SHAPE, seed=4, return_trajectory=True)
        assert torch.equal(rollout.samples, run.samples)
        assert torch.equal(rollout.states, torch.stack([run.x_t[number] for number in kept]))
    assert rollout.noisy_steps == steps


def test_an_analytic_variance_has_noise_in_chosen_steps_alone(model):
    s = df.DDIMSampler(
        df.NoiseSchedule.linear(), timesteps=[900, 500, 100], analytic_variance=[0.5, 0.5, 0.5], graphs=EAGER
    )
    rollout = s.rollout(model, SHAPE, seed=0, noisy_steps=[1])
    assert [step.std_dev_t > 0 for step in rollout.plan.steps] == [False, True, False]
    assert rollout.plan.steps[1] == s.plan().steps[1]
    assert s.rollout(model, SHAPE, seed=0).noisy_steps == (0, 1)
    assert_ratio_of_one(rollout, model)


@pytest.mark.parametrize(
    "steps", [[1, 3], (1, 3), np.array([1, 3]), torch.tensor([1, 3])], ids=lambda s: type(s).__name__
)
def test_chosen_steps_may_come_as_a_list_or_an_array(steps, model):
    assert sampler().rollout(model, SHAPE, seed=0, noisy_steps=steps).noisy_steps == (1, 3)


# --- Replay ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in RUNS if name != "generator"])
def test_a_replay_has_the_same_bits(name):
    model, call = model_for(name), call_of(name)
    s = sampler()
    kept = s.rollout(model, SHAPE, **call)
    light = s.rollout(model, SHAPE, keep_states=False, **call)
    assert light.states is None
    assert repr(light).endswith("no states)")
    again = light.replay(model)
    assert_same(again, kept)
    assert_same(again.replay(model), kept)
    assert_ratio_of_one(again, model)


def test_a_seed_that_was_drawn_is_replayed(model):
    light = sampler().rollout(model, SHAPE, keep_states=False)
    assert torch.equal(light.replay(model).samples, light.samples)


def test_a_replay_of_a_model_that_changed_is_refused():
    model = Net()
    light = sampler().rollout(model, SHAPE, seed=0, keep_states=False)
    with torch.no_grad():
        model.conv.bias.add_(1e-3)
    with pytest.raises(
        ValueError, match=r"the model as it was .* differ by up to .*: replay in the same batch, before"
    ):
        light.replay(model)


# --- Parts -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "numbers"),
    [
        (slice(1, 3), [1, 2]),
        ([2, 0], [2, 0]),
        (torch.tensor([2, 0]), [2, 0]),
        (torch.tensor([True, False, True]), [0, 2]),
        ([], []),
        (range(2), [0, 1]),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["guided apart", "masked", "x_T", "with the last"])
def test_a_part_has_what_belongs_to_its_samples(chosen, numbers, name):
    pointwise = Net()
    pointwise.conv = nn.Conv2d(3, 3, 1)  # the bits of a sample do not depend on the batch
    call = call_of(name)
    whole = sampler().rollout(pointwise, SHAPE, **call)
    part = whole.select(chosen)
    assert torch.equal(part.samples, whole.samples[numbers])
    assert torch.equal(part.log_probs, whole.log_probs[:, numbers])
    assert torch.equal(part.states, whole.states[:, numbers])
    assert torch.equal(part.seeds, whole.seeds[numbers])
    assert part.noisy_steps == whole.noisy_steps
    for index in range(len(part)):
        torch.testing.assert_close(part.log_prob(pointwise, index), part.log_probs[index], rtol=1e-5, atol=1e-6)


def test_a_slice_copies_nothing(model):
    whole = sampler().rollout(model, SHAPE, seed=0)
    part = whole.select(slice(0, 2))
    assert part.states.data_ptr() == whole.states.data_ptr()
    assert part.samples.data_ptr() == whole.samples.data_ptr()
    assert whole.select(slice(0, 2)).select(slice(1, 2)).seeds.tolist() == whole.seeds[1:2].tolist()


# --- Captured ------------------------------------------------------------------------------------------------------------------

CAPTURED = [name for name in RUNS if name not in ("classifier", "float64")]


@pytest.mark.parametrize("name", CAPTURED)
def test_a_captured_rollout_has_the_bits_of_eager(name, cache):
    model, call = model_for(name), call_of(name)
    seed = call.get("generator", torch.Generator()).get_state()
    rollouts = []
    for mode in ("off", "step", "auto", "step"):
        if "generator" in call:
            call["generator"].set_state(seed)
        s = sampler(cache=cache)
        rollouts.append(s.rollout(model, SHAPE, capture=mode, **call))
    if "generator" in call:
        assert all(rollout.seeds is None for rollout in rollouts)
        assert all(torch.equal(rollout.states, rollouts[0].states) for rollout in rollouts)
        assert all(torch.equal(rollout.log_probs, rollouts[0].log_probs) for rollout in rollouts)
    else:
        for rollout in rollouts[1:]:
            assert_same(rollout, rollouts[0])
    assert cache.stats().graphs == 1
    assert cache.stats().hits == 2
    assert_ratio_of_one(rollouts[1], model)


@PATHS
def test_a_captured_rollout_on_every_path(path, cache, model):
    for steps in (None, [0, 2]):
        eager, captured = (
            sampler(path, cache).rollout(model, SHAPE, seed=1, noisy_steps=steps, capture=mode)
            for mode in ("off", "step")
        )
        assert_same(captured, eager)
    assert len(cache) == 1  # one graph of a step, whichever have noise


def test_graphs_of_samples_and_of_rollouts_are_apart(cache, model):
    s = sampler(cache=cache)
    expected = s.sample(model, SHAPE, seed=0, capture="off")
    for _ in range(2):
        assert torch.equal(s.sample(model, SHAPE, seed=0, capture="step"), expected)
        for reduction in ("mean", "sum"):
            rollout = s.rollout(model, SHAPE, seed=0, capture="step", log_prob_reduction=reduction)
            assert torch.equal(rollout.samples, expected)
            assert_ratio_of_one(rollout, model)
    assert len(cache) == 3
    kept = rollout.samples.clone(), rollout.states.clone(), rollout.log_probs.clone()
    s.rollout(model, SHAPE, seed=1, capture="step", log_prob_reduction="sum")  # nothing kept is the graph's memory
    assert all(
        torch.equal(a, b) for a, b in zip((rollout.samples, rollout.states, rollout.log_probs), kept, strict=True)
    )


def test_a_loop_in_one_graph_is_refused(cache, model):
    with pytest.raises(ValueError, match="cannot come between them, got a rollout: use capture='step'"):
        sampler(cache=cache).rollout(model, SHAPE, seed=0, capture="loop")
    assert len(cache) == 0


@pytest.mark.parametrize("call", [{}, dict(guidance_scale=2.0)], ids=["plain", "guided"])
def test_a_captured_step_launches_one_kernel_of_ours_and_waits_for_nothing(call):
    with fake_cuda() as device:
        cache = GraphCache(backend=lambda where: FakeGraphs(device))
        conditioning = {"scale": torch.empty(2, device="cuda")}
        s, model = sampler(cache=cache), device.tagged("model", Net().to("cuda"))
        if call:
            call = {**call, "unconditional_conditioning": conditioning}
        rollout = s.rollout(
            model,
            (2, 3, 8, 8),
            seed=0,
            device="cuda",
            capture="step",
            noisy_steps=[0, 2],
            conditioning=conditioning,
            **call,
        )
        (steady,) = [captured._graph.steady for _, captured in cache._captured.values()]
        assert rollout.states.shape == (4, 2, 3, 8, 8)
        assert rollout.log_probs.shape == (2, 2)
    assert steady.region().own_launches == {"ddim_fast::ddim_step_kernel": 1}
    assert steady.syncs == steady.copies == steady.others == []


# --- The caller's world, and refusals --------------------------------------------------------------------------------------------


def test_a_rollout_in_inference_mode_can_be_trained_on(model):
    with torch.inference_mode():
        rollout = sampler().rollout(model, SHAPE, seed=0)
    assert not rollout.states.is_inference()
    assert not rollout.log_probs.is_inference()
    assert_ratio_of_one(rollout, model)


def test_nothing_global_changes(model):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    rollout = sampler().rollout(model, SHAPE, seed=0)
    rollout.log_prob(model, 0)
    rollout.replay(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()
    with torch.no_grad():
        assert not rollout.log_prob(model, 0).requires_grad
        assert not torch.is_grad_enabled()


def test_a_rollout_can_be_sent_to_another_process(cache, model):
    rollout = sampler(cache=cache).rollout(model, SHAPE, seed=0, conditioning=COND, capture="step")
    there = pickle.loads(pickle.dumps(rollout))
    assert_same(there, rollout)
    assert_ratio_of_one(there, model)
    assert_same(there.replay(model), rollout)
    assert rollout != there  # equal to itself alone


def test_memory_is_what_is_stated(model):
    """N + 1 states for N noisy steps in a row, 2 N for N that stand alone, and 4 N B bytes."""
    for steps, count in ((None, 5), ([0, 2], 4), ([1, 2], 3)):
        rollout = sampler().rollout(model, SHAPE, seed=0, noisy_steps=steps)
        assert rollout.states.nbytes == count * rollout.samples.nbytes
        assert rollout.log_probs.nbytes == 4 * len(rollout) * len(rollout.samples)


FLOW = df.DDIMSampler(df.FlowSchedule(), 4, 0.5, eta_scales="cps", graphs=EAGER)
REFUSALS = [
    (
        FLOW.replace(eta=0),
        {},
        ValueError,
        "a rollout needs a step that adds noise, got a sampler with eta=0 and 4 steps",
    ),
    (FLOW.replace(num_inference_steps=1), {}, ValueError, "1 steps, of which the last leads to clean data"),
    (FLOW.replace(order=2), {}, ValueError, "must depend on one state, got order=2, .*: make a sampler with order=1"),
    (sampler(thresholding=True), {}, ValueError, "got Thresholding.*: make a sampler without thresholding"),
    (
        FLOW,
        dict(noisy_steps=[3]),
        ValueError,
        "step 3 from t = 0.25, which leads to clean data .*: leave it out, or pass min_std",
    ),
    (
        FLOW.replace(eta=[0, 1, 0, 0]),
        dict(noisy_steps=[1, 2]),
        ValueError,
        "step 2 .* where eta = 0: make a sampler with an eta",
    ),
    (FLOW, dict(noisy_steps=[]), ValueError, r"increasing, from 0 to 3, got \(\): for instance"),
    (FLOW, dict(noisy_steps=[2, 1]), ValueError, r"increasing, from 0 to 3, got \(2, 1\)"),
    (FLOW, dict(noisy_steps=[1, 1]), ValueError, r"increasing, from 0 to 3, got \(1, 1\)"),
    (FLOW, dict(noisy_steps=[0, 4]), ValueError, r"noisy_steps\[1\] must be an integer in \[0, 3\], got 4"),
    (FLOW, dict(noisy_steps=[-1]), ValueError, r"noisy_steps\[0\] must be an integer in \[0, 3\], got -1"),
    (FLOW, dict(noisy_steps=[0.5]), TypeError, r"noisy_steps\[0\] must be an integer in \[0, 3\], got 0.5"),
    (FLOW, dict(noisy_steps="012"), TypeError, "noisy_steps must be numbers of steps"),
    (FLOW, dict(noisy_steps=2), TypeError, "noisy_steps must be numbers of steps, .*, got 2: for instance range"),
    (FLOW, dict(min_std=0.0), ValueError, "min_std must be a finite number, above 0, got 0.0"),
    (FLOW, dict(min_std="1"), TypeError, "min_std must be a finite number, above 0, got '1'"),
    (FLOW, dict(log_prob_reduction="max"), ValueError, "log_prob_reduction must be one of mean, sum, got 'max'"),
    (
        FLOW,
        dict(keep_states=False, generator=torch.Generator()),
        ValueError,
        "got a generator, .*: pass seed or seeds, or keep",
    ),
    (FLOW, dict(callback=print), TypeError, "rollout has no keyword 'callback'"),
    (FLOW, dict(return_trajectory=True), TypeError, "rollout has no keyword 'return_trajectory'"),
    (FLOW, dict(dtype=torch.int32), TypeError, "dtype must be a floating-point torch.dtype"),
    (FLOW, dict(seeds=[1, 2]), ValueError, "seeds must have one entry per sample, 3, got 2"),
    (FLOW, dict(guidance_scale=2.0), ValueError, "guidance needs the model's unconditional output"),
]


@pytest.mark.parametrize(
    ("s", "call", "kind", "words"), REFUSALS, ids=[f"{w[:30]}-{i}" for i, (*_, w) in enumerate(REFUSALS)]
)
def test_bad_input_is_refused_before_anything_is_drawn(s, call, kind, words):
    state = torch.get_rng_state()

    def never(x, t):
        raise AssertionError("the model was called")

    with pytest.raises(kind, match=words):
        s.rollout(never, SHAPE, **call)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_a_rollout_refuses_afterwards(model):
    rollout = sampler().rollout(model, SHAPE, seed=0)
    for index in (-1, 4):
        with pytest.raises(ValueError, match=rf"index must be an integer in \[0, 3\], got {index}"):
            rollout.log_prob(model, index)
    with pytest.raises(TypeError, match="index must be an integer"):
        rollout.x_t(0.5)
    with pytest.raises(TypeError, match="log_prob has no keyword 'seed'"):
        rollout.log_prob(model, 0, seed=3)
    with pytest.raises(TypeError, match="samples must be a slice, or a list of numbers, got 1"):
        rollout.select(1)
    with pytest.raises(IndexError):
        rollout.select([3])
    light = sampler().rollout(model, SHAPE, seed=0, keep_states=False)
    with pytest.raises(
        ValueError, match=r"states of this rollout were not kept, got states = None: use rollout.replay"
    ):
        light.log_prob(model, 0)
    drawn = sampler().rollout(model, SHAPE, generator=torch.Generator())
    with pytest.raises(ValueError, match="whose noise came from a generator: make it with seed or seeds"):
        drawn.replay(model)

    class Other(Net):
        prediction_type = "v_prediction"

    with pytest.raises(
        ValueError, match="predict what the rollout's did, 'epsilon', got one with prediction_type 'v_pred"
    ):
        rollout.log_prob(Other(), 0)
