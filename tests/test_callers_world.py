"""What is the caller's stays the caller's: the default device and dtype under which the package is called, and the autograd
of models that are sampled between two steps of their training."""

import copy
import multiprocessing
import pickle
import subprocess
import sys

import pytest
import torch
from layouts import default_dtype
from torch import nn

from ddim_fast import (
    CosineSchedule,
    DDIMSampler,
    EDMSchedule,
    FlowSchedule,
    LoadedModel,
    NoiseSchedule,
    Timing,
    VESchedule,
    VPSchedule,
    as_flow,
    load_model,
    sample_seeds,
    slerp,
    standard_normals,
)
from ddim_fast.kernels import dispatch
from ddim_fast.models.metrics import load_statistics
from ddim_fast.plans.files import TimestepList
from ddim_fast.sampling.capture import GraphCache
from ddim_fast.sampling.inversion import reconstruction_error
from ddim_fast.search import Search, search_timesteps

LINEAR = NoiseSchedule.linear(100)
SHAPE = (2, 2, 4, 4)
EFFORT = {"num_inference_steps": 2, "count": 2, "refine_count": 2, "refine_runs": 2, "held_out": 2, "candidates": 4}


class Net(nn.Module):
    """A model that makes no tensor of its own, and takes what a test gives it."""

    prediction_type = "epsilon"

    def __init__(self):
        super().__init__()
        weight = torch.linspace(-1, 1, 2 * 2 * 9, dtype=torch.float32, device="cpu").view(2, 2, 3, 3)
        self.convolution = nn.Conv2d(2, 2, 3, padding=1, bias=False, device="meta")
        self.convolution.weight = nn.Parameter(weight)

    def forward(self, x, t, scale=1.0):
        return (self.convolution(x) + t.to(x.dtype).view(-1, 1, 1, 1) / 100) * scale

    def unconditional(self, conditioning):
        return {**conditioning, "scale": 0.5}


def cond_fn(x_t, t, scale=1.0):
    return -x_t


class Caching(Net):
    """A model that keeps what it computed in its first call, such as a rotary table."""

    kept = None

    def forward(self, x, t, scale=1.0):
        if self.kept is None:
            self.kept = torch.full_like(x[:1, :1], 2).sqrt()
        return super().forward(x, t, scale) * self.kept


def numbers(values):
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def trained(model, sampler, run):
    """The log-probability of a replayed step of half of a batch."""
    rollout = sampler.rollout(model, SHAPE, keep_states=False, min_std=0.1, **run).replay(model)
    return rollout.select([1]).log_prob(model, 0)


def calls(make=Net):
    """What people call, each with its name; ``make()`` returns a model."""
    plain = DDIMSampler(LINEAR, 3)
    noisy = plain.replace(eta=1.0, thresholding=True)
    x0 = torch.linspace(-1, 1, 64, dtype=torch.float32, device="cpu").view(SHAPE)
    mask = (x0 > 0).float()
    seeds = [1, 2]
    start = dispatch.normals(torch.from_numpy(sample_seeds(0, 2)), SHAPE[1:], 0, 1)
    run = {"seed": 0, "guidance_scale": 2.0}
    generator = torch.Generator("cpu").manual_seed(0)
    return {
        "sample": lambda: plain.sample(make(), SHAPE, seed=0),
        "sample without a seed": lambda: torch.isfinite(plain.sample(make(), SHAPE)),
        "sample, seeds": lambda: noisy.sample(make(), SHAPE, seeds=seeds),
        "sample, generator": lambda: noisy.sample(make(), SHAPE, generator=generator.manual_seed(0)),
        "sample, classifier": lambda: plain.sample(make(), SHAPE, cond_fn=cond_fn, guidance_rescale=0.5, **run),
        "sample, half": lambda: noisy.sample(make(), SHAPE, dtype=torch.float16, model_dtype=torch.float32, **run),
        "sample, reference": lambda: noisy.sample(make(), SHAPE, backend="reference", **run),
        "sample, order 2": lambda: plain.replace(order=2).sample(make(), SHAPE, return_trajectory=True, **run).x_t[-1],
        "img2img": lambda: plain.img2img(make(), x0, 0.7, **run),
        "inpaint": lambda: noisy.inpaint(make(), x0, mask, **run),
        "interpolate": lambda: plain.interpolate(make(), start, start.flip(0), [0.0, 0.5], **run),
        "slerp": lambda: slerp(start, start.flip(0), 0.3),
        "invert": lambda: plain.invert(make(), x0, iterations=3, tolerance=1e-5),
        "reconstruct": lambda: reconstruction_error(x0, plain.reconstruct(make(), x0)),
        "sample_parallel": lambda: noisy.sample_parallel(make(), SHAPE, **run),
        "rollout": lambda: plain.replace(eta=1.0).rollout(make(), SHAPE, noisy_steps=[1], **run).states,
        "rollout, log_prob": lambda: trained(make(), plain.replace(eta=1.0), run).detach(),
        "optimize": lambda: plain.sample(plain.optimize(make(), SHAPE, compile=False, tolerance=0), SHAPE, seed=0),
        "table": lambda: plain.plan().table().rows,
        "add_noise": lambda: LINEAR.add_noise(x0, start, 50),
        "the statistics that ship": lambda: load_statistics().mean,
        "the model that ships": lambda: load_model()(
            start[:, :1, :1, :1].expand(2, 1, 28, 28), mask[:, 0, 0, 0].long()
        ),
        "search": lambda: numbers(search_timesteps(Search(make(), LINEAR, SHAPE[1:], **EFFORT)).timesteps),
    }


WORLDS = {
    "device meta": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", calls())
def test_results_are_the_same_whatever_the_callers_defaults(name, world):
    torch.manual_seed(0)
    expected = calls()[name]()
    with WORLDS[world]():
        got = calls()[name]()
    assert (got.device, got.dtype) == (expected.device, expected.dtype)
    assert torch.equal(got, expected)


# --- Autograd ---------------------------------------------------------------------------------------------------------


CALLING_A_MODEL = [name for name, call in calls().items() if "make" in call.__code__.co_freevars]


@pytest.mark.parametrize("name", CALLING_A_MODEL)
def test_a_model_that_was_sampled_can_be_trained_on(name):
    model = Caching()
    result = calls(lambda: model)[name]()
    assert model.kept is not None
    assert not result.is_inference()
    assert not result.requires_grad
    model(torch.zeros(SHAPE), torch.zeros(SHAPE[0], dtype=torch.int64)).sum().backward()
    assert model.convolution.weight.grad is not None


class Recording(Net):
    """A model that turns gradients on for itself, as some with checkpointing do."""

    def forward(self, x, t, scale=1.0):
        with torch.enable_grad():
            return super().forward(x, t, scale)


@pytest.mark.parametrize("name", CALLING_A_MODEL)
def test_results_have_no_gradient_even_if_the_model_records_one(name):
    assert not calls(Recording)[name]().requires_grad


# --- Copies -----------------------------------------------------------------------------------------------------------


def held():
    """What people hold, each with what it gives."""
    sampler, model = DDIMSampler(LINEAR, 3, 1.0, clip_sample=True), Net()
    plan, x0 = sampler.plan(model), torch.linspace(-1, 1, 64).view(SHAPE)
    table = plan.table("cpu", 2.0)
    row, other = plan.steps[1].coefficients, table.coefficients(1)[0]
    optimized = sampler.optimize(model, SHAPE, compile=False, tolerance=1.0)
    trajectory = sampler.sample(model, SHAPE, seed=0, return_trajectory=True)
    chosen = TimestepList((7, 3, 1), 100, provenance={"method": "by hand"}, model_timesteps=(6, 3, 2))

    flow = as_flow(load_model())
    found = search_timesteps(Search(model, LINEAR, SHAPE[1:], **EFFORT))
    rollout = sampler.rollout(model, SHAPE, seed=0)

    def drawn(sampler):
        return sampler.sample(model, SHAPE, seed=0)

    def step(row):
        return dispatch.ddim_step(x0, x0.flip(0), row, seeds=torch.tensor([1, 2]))

    return {
        "sampler": (sampler, drawn),
        "sampler with a list and a cache": (DDIMSampler(LINEAR, timesteps=chosen, graphs=GraphCache(3)), drawn),
        "schedule": (LINEAR, lambda schedule: drawn(DDIMSampler(schedule, 3))),
        "plan": (plan, lambda plan: plan.table().rows),
        "planned step": (plan.steps[1], lambda planned: step(planned.coefficients)),
        "row": (row, step),
        "row of a table": (other, step),
        "table": (table, lambda table: table.rows),
        "trajectory": (trajectory, lambda trajectory: trajectory.samples),
        "list of timesteps": (chosen, lambda chosen: drawn(DDIMSampler(LINEAR, timesteps=chosen))),
        "cache of graphs": (GraphCache(3), lambda cache: drawn(sampler.replace(graphs=cache))),
        "optimized model": (optimized, lambda model: sampler.sample(model, SHAPE, seed=0)),
        "the model that ships": (load_model(), lambda model: model.unet.state_dict()["time_mlp.0.weight"]),
        "search": (
            Search(model, LINEAR, SHAPE[1:], num_inference_steps=2),
            lambda search: numbers(search.candidate_timesteps),
        ),
        "result of a search": (found, lambda found: numbers(found.timesteps)),
        "rollout": (rollout, lambda rollout: rollout.log_prob(model, 1).detach()),
        "rollout without states": (
            sampler.rollout(model, SHAPE, seed=0, keep_states=False),
            lambda rollout: rollout.replay(model).states,
        ),
        "loaded model": (LoadedModel(model, sample_shape=SHAPE[1:]), lambda model: sampler.sample(model, seed=0)),
        "flow model": (flow, lambda model: model(torch.zeros(1, 1, 28, 28), torch.tensor([0.5])).detach()),
        "statistics": (load_statistics(), lambda statistics: statistics.covariance),
        "gain": (optimized.gain, lambda gain: numbers([gain.times_faster])),
        "timing": (Timing(1.0, 2.0), lambda timing: numbers([timing.model_seconds])),
        "statistics of a run": (
            sampler.sample_parallel(model, SHAPE, seed=0, return_statistics=True)[1],
            lambda statistics: numbers([statistics.iterations]),
        ),
        **{
            f"{type(path).__name__}": (path, lambda path: DDIMSampler(path, 3).plan().table().rows)
            for path in (FlowSchedule(shift=3.0), EDMSchedule(), VPSchedule(), VESchedule(), CosineSchedule())
        },
    }


COPIES = {"pickle": lambda x: pickle.loads(pickle.dumps(x)), "copy": copy.copy, "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("way", COPIES)
def test_what_people_hold_can_be_copied_and_sent_to_workers_before_and_after_its_use(way):
    for name, (thing, use) in held().items():
        before = COPIES[way](thing)
        expected = use(thing)
        for again in (before, COPIES[way](thing), COPIES[way](before)):
            assert type(again) is type(thing), name
            assert torch.equal(use(again), expected), name


def test_what_people_hold_is_printed_in_a_line_or_two_without_its_numbers():
    long = DDIMSampler(LINEAR, 100, eta=[0.5] * 99 + [0.0])
    more = {"long sampler": long, "long plan": long.plan(), "long table": long.plan().table()}
    for name, thing in {**{name: thing for name, (thing, _) in held().items()}, **more}.items():
        shown = repr(thing)
        assert "tensor(" not in shown, name
        assert "object at 0x" not in shown, name
        assert len(shown) < 1000 or isinstance(thing, nn.Module), (name, len(shown))
    trajectory = DDIMSampler(LINEAR, 3).sample(Net(), SHAPE, seed=0, return_trajectory=True)
    assert repr(trajectory) == (
        "Trajectory(timesteps=[66, 33, 0], x_t=[4 x <(2, 2, 4, 4) float32>], x0=[3 x <(2, 2, 4, 4) float32>])"
    )
    optimized = DDIMSampler(LINEAR, 2).optimize(Net(), SHAPE, compile=False)
    assert f"for {SHAPE}: {optimized.gain}" in repr(optimized)


# --- torch.compile ----------------------------------------------------------------------------------------------------


def step_with_a_gradient():
    x_t = torch.linspace(-1, 1, 64).view(SHAPE).requires_grad_()
    row = DDIMSampler(LINEAR, 3, 1.0).plan().steps[0].coefficients
    return dispatch.ddim_step(x_t, x_t * 0.5, row, seeds=torch.tensor([1, 2])).detach()


COMPILED = {
    "seeds": lambda: torch.from_numpy(sample_seeds(2**63 + 5, 3)),
    "normals": lambda: torch.from_numpy(standard_normals([3, 4], 8, 0)),
    "step with a gradient": step_with_a_gradient,
    "sample": lambda: DDIMSampler(LINEAR, 2, 1.0).sample(lambda x, t: x * 0.5, SHAPE, seed=0),
    "sample, reference": lambda: DDIMSampler(LINEAR, 2, 1.0).sample(
        lambda x, t: x * 0.5, SHAPE, seed=0, backend="reference"
    ),
}


@pytest.mark.filterwarnings("ignore:.*Dynamo:UserWarning")  # dynamo warns of graph breaks and caches
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # it looks at those of tensors inside a graph
@pytest.mark.parametrize("name", COMPILED)
def test_what_a_compiled_function_calls_gives_the_same(name):
    torch.compiler.reset()
    compiled = torch.compile(COMPILED[name], backend="eager")
    assert torch.equal(compiled(), COMPILED[name]())


def test_importing_the_package_does_not_load_the_compiler():
    code = "import sys, ddim_fast; ddim_fast.sample_seeds(0, 1); print('torch._dynamo' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"


# --- Workers ----------------------------------------------------------------------------------------------------------


def sent():
    """What people send to a worker, each with what the worker computes with it."""
    from ddim_fast.integrations import diffusers as ours

    x_t = torch.linspace(-1, 1, 64, dtype=torch.float32, device="cpu").view(SHAPE)
    seeds = torch.tensor([1, -2], dtype=torch.int64, device="cpu")
    noisy = DDIMSampler(LINEAR, 3, eta=1.0)
    scheduler = ours.FastDDIMScheduler(num_train_timesteps=100)
    scheduler.set_timesteps(3)
    index = torch.tensor([1], dtype=torch.int64, device="cpu")
    return {
        "sampler": noisy,
        "plan": noisy.plan(),
        "table": noisy.plan().table(),
        "drop-in": scheduler,
    }, {
        "sampler": lambda sampler: sampler.sample(Net(), SHAPE, seed=5),
        "plan": lambda plan: dispatch.ddim_step(x_t, -x_t, plan.steps[0].coefficients, seeds=seeds),
        "table": lambda table: dispatch.ddim_step_from_table(x_t, -x_t, table, index, seeds=seeds),
        "drop-in": lambda scheduler: scheduler.step(-x_t, int(scheduler.timesteps[0]), x_t).prev_sample,
    }


def work(things, results):
    """Run in the worker: compute with what arrived, by this module's functions."""
    _, uses = sent()
    results.put({name: uses[name](thing).numpy() for name, thing in things.items()})


def test_a_worker_that_is_spawned_gets_the_same_results():
    things, uses = sent()
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    worker = context.Process(target=work, args=(things, results))
    worker.start()
    try:
        got = results.get(timeout=240)
    finally:
        worker.join(120)  # a busy machine takes a while to end a process
        worker.kill()
    assert worker.exitcode == 0
    assert got.keys() == uses.keys()
    for name, use in uses.items():
        assert torch.equal(torch.from_numpy(got[name]), use(things[name])), name


HOLDING_TENSORS = {
    "table": lambda: DDIMSampler(LINEAR, 3).plan().table(),
    "trajectory": lambda: DDIMSampler(LINEAR, 2).sample(Net(), SHAPE, seed=0, return_trajectory=True),
}


@pytest.mark.parametrize("name", HOLDING_TENSORS)
def test_what_holds_tensors_is_equal_to_itself_alone(name):
    """As tensors in sets and dicts are; whether the numbers are equal is ``torch.equal``'s to say."""
    one, other = HOLDING_TENSORS[name](), HOLDING_TENSORS[name]()
    assert one == one
    assert one != other
    assert other not in [one]
    assert len({one, one, other}) == 2
