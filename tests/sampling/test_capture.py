"""Captured loops: equal to eager, nothing stale, and capturable. Graphs are the recorded stand-in on the CPU, and the fake CUDA device.

The stand-in freezes pointers and Python numbers as a CUDA graph does, so what holds with it is that nothing which changes between calls
was baked in. What only a GPU shows is in ``test_gpu.py``.
"""

import gc
import warnings
import weakref

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

import ddim_fast as df
from ddim_fast.gpu_lab.fake_cuda import FakeGraphs, fake_cuda
from ddim_fast.gpu_lab.replay import RecordedGraphs
from ddim_fast.sampling.capture import GraphCache
from ddim_fast.sampling.cuda_graphs import CaptureError
from ddim_fast.sampling.loop import Timing

SHAPE = (2, 3, 8, 8)


LOGS = weakref.WeakKeyDictionary()


class Net(nn.Module):
    """A small model that uses everything that it is given."""

    prediction_type = "epsilon"

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    @property
    def log(self):
        """One entry a call. It is kept elsewhere: a model that changes with each call is not captured."""
        return LOGS.setdefault(self, [])

    def forward(self, x, t, scale=None, name="a"):
        self.log.append(len(self.log))
        y = torch.tanh(self.conv(x) + t.view(-1, 1, 1, 1).to(x.dtype) / 1000)
        if scale is not None:
            y = y * scale.view(-1, 1, 1, 1).to(x.dtype)
        return y if name == "a" else -y

    def unconditional(self, conditioning):
        return {"scale": torch.zeros_like(conditioning["scale"])}


# Runs of one step are compared with one another; that they begin at the cleanest timestep is no matter.
pytestmark = pytest.mark.filterwarnings("ignore:one step from noise:UserWarning")


@pytest.fixture
def cache():
    return GraphCache(maxsize=4, backend=lambda device: RecordedGraphs(), device_types=("cpu",))


def sampler(cache, steps=5, eta=0.0, **options):
    return df.DDIMSampler(df.NoiseSchedule.linear(), steps, eta, graphs=cache, **options)


def scales(*values):
    return {"scale": torch.tensor(values)}


# --- equal to eager ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["step", "loop", "auto"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize(
    "options",
    [{}, {"clip_sample": True}, {"use_clipped_model_output": True, "clip_sample": True}, {"thresholding": True}],
    ids=["folded", "clip", "rederived", "thresholds"],
)
def test_a_captured_loop_gives_the_bits_of_eager(cache, mode, eta, options):
    model, s = Net(), sampler(cache, eta=eta, **options)
    for guidance in (None, 2.0):
        call = dict(shape=SHAPE, seed=3, conditioning=scales(1.0, 2.0), guidance_scale=guidance)
        expected = s.sample(model, capture="off", **call)
        for _ in range(2):
            assert torch.equal(s.sample(model, capture=mode, **call), expected)
    assert len(cache) == 2


@pytest.mark.parametrize("mode", ["step", "loop", "auto"])
@pytest.mark.parametrize(
    "options", [{}, {"clip_sample": True}, {"thresholding": True}], ids=["folded", "clip", "thresholds"]
)
def test_a_captured_multistep_loop_gives_the_bits_of_eager(cache, mode, options):
    """The first step of a replay reads nothing of what the run before left in the history."""
    model, s = Net(), sampler(cache, order=2, **options)
    for guidance in (None, 2.0):
        call = dict(shape=SHAPE, conditioning=scales(1.0, 2.0), guidance_scale=guidance)
        for seed in (3, 4):
            expected = s.sample(model, seed=seed, capture="off", **call)
            assert torch.equal(s.sample(model, seed=seed, capture=mode, **call), expected)
            watched = "step" if mode == "loop" else mode
            run = s.sample(model, seed=seed, capture=watched, return_trajectory=True, **call)
            assert torch.equal(run.samples, expected)
    first = sampler(cache, **options).sample(model, seed=4, capture=mode, **call)
    assert not torch.equal(first, expected)
    for captured in [captured for _, captured in cache._captured.values()]:
        if captured.loop.history is not None:  # whatever it holds
            captured.loop.history.fill_(float("nan"))
    assert torch.equal(s.sample(model, seed=4, capture=mode, **call), expected)


def test_any_number_of_multistep_steps_replays_the_graph_of_a_step(cache):
    model = Net()
    for steps in (3, 1, 2, 7):
        s = sampler(cache, steps, order=2)
        expected = s.sample(model, SHAPE, seed=0, capture="off")
        assert torch.equal(s.sample(model, SHAPE, seed=0, capture="step"), expected)
    assert len(cache) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("state", ["same", "float32"])
def test_half_precision(cache, dtype, state):
    model, s = Net().to(dtype), sampler(cache, eta=1.0)
    call = dict(shape=SHAPE, seed=3, dtype=dtype) if state == "same" else dict(shape=SHAPE, seed=3, model_dtype=dtype)
    expected = s.sample(model, capture="off", **call)
    for mode in ("step", "loop"):
        assert torch.equal(s.sample(model, capture=mode, **call), expected)


def test_noise_from_a_generator_is_drawn_between_replays(cache):
    model, s = Net(), sampler(cache, eta=1.0)

    def sample(mode, seed):
        return s.sample(model, SHAPE, generator=torch.Generator().manual_seed(seed), capture=mode)

    for seed in (1, 2):
        assert torch.equal(sample("step", seed), sample("off", seed))
    assert len(cache) == 1


def test_callback_progress_and_trajectory_between_replays(cache, capsys):
    model, s = Net(), sampler(cache, eta=0.5)
    seen = {"off": [], "step": []}

    def watch(mode):
        return lambda step, t, x_t, x0: seen[mode].append((step, t, x_t.clone(), x0.clone()))

    runs = {
        mode: s.sample(model, SHAPE, seed=0, capture=mode, callback=watch(mode), return_trajectory=True, progress=True)
        for mode in ("off", "step")
    }
    assert runs["off"].timesteps == runs["step"].timesteps
    for name in ("x_t", "x0"):
        for a, b in zip(getattr(runs["off"], name), getattr(runs["step"], name), strict=True):
            assert torch.equal(a, b)
    for a, b in zip(seen["off"], seen["step"], strict=True):
        assert a[:2] == b[:2]
        assert torch.equal(a[2], b[2])
        assert torch.equal(a[3], b[3])
    bars = capsys.readouterr().err.split("\n")
    assert len([bar for bar in bars if "5/5" in bar]) == 2


def test_a_callback_stops_a_captured_loop(cache):
    model, s = Net(), sampler(cache)
    stop = lambda step, t, x_t, x0: step == 2  # noqa: E731 (a callback in a line)
    expected = s.sample(model, SHAPE, seed=0, callback=stop, capture="off")
    assert torch.equal(s.sample(model, SHAPE, seed=0, callback=stop, capture="step"), expected)
    assert not torch.equal(expected, s.sample(model, SHAPE, seed=0, capture="step"))


RUNS = {
    "img2img": lambda s, model, x0, **call: s.img2img(model, x0, 0.6, **call),
    "inpaint": lambda s, model, x0, **call: s.inpaint(model, x0, MASK, **call),
    "inpaint from x0": lambda s, model, x0, **call: s.inpaint(model, x0, MASK, strength=0.6, **call),
    "interpolate": lambda s, model, x0, **call: s.interpolate(model, x0, x0.flip(0), [0.1, 0.7], **call),
}
MASK = torch.linspace(0, 1, 8).round(decimals=1)


def picture(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "guidance",
    [{}, dict(guidance_scale=lambda t: 1 + t / 300), dict(guidance_scale=3.1, guidance_rescale=0.7)],
    ids=["none", "by timestep", "rescaled"],
)
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("how", RUNS)
def test_what_begins_with_a_picture_gives_the_bits_of_eager(cache, how, eta, guidance):
    model, x0 = Net(), picture(0)
    call = dict(seed=3, conditioning=scales(1.0, 2.0), **guidance)
    for s in (sampler(cache, eta=eta), sampler(cache, eta=eta, thresholding=True)):
        expected = RUNS[how](s, model, x0, capture="off", **call)
        for mode in ("step", "loop", "auto"):
            for _ in range(2):
                assert torch.equal(RUNS[how](s, model, x0, capture=mode, **call), expected)
        assert torch.equal(RUNS[how](s, model, x0, capture="step", return_trajectory=True, **call).samples, expected)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_the_known_parts_noise_from_a_generator_is_drawn_between_replays(cache, eta):
    model, s, x0 = Net(), sampler(cache, eta=eta), picture(0)

    def inpaint(mode, seed):
        return s.inpaint(model, x0, MASK, generator=torch.Generator().manual_seed(seed), capture=mode)

    for seed in (1, 2):
        assert torch.equal(inpaint("step", seed), inpaint("off", seed))
    assert len(cache) == 1
    with pytest.raises(ValueError, match="got noise from a generator"):
        inpaint("loop", 1)


# --- nothing is stale ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["step", "loop"])
def test_new_values_take_effect_in_the_same_graph(cache, mode):
    model = Net()
    for eta, schedule in [(0.3, df.NoiseSchedule.linear()), (0.9, df.NoiseSchedule.scaled_linear())]:
        for spacing in ("leading", "trailing"):
            s = df.DDIMSampler(schedule, 5, eta, timestep_spacing=spacing, graphs=cache)
            for seed, guidance, scale in [(0, 2.0, 1.0), (1, 2.0, 1.0), (1, 3.5, 1.0), (1, 3.5, 0.5)]:
                call = dict(shape=SHAPE, seed=seed, guidance_scale=guidance, conditioning=scales(scale, 2.0))
                expected = s.sample(model, capture="off", **call)
                assert torch.equal(s.sample(model, capture=mode, **call), expected), (eta, spacing, seed, guidance)
    assert len(cache) == 1


@pytest.mark.parametrize("mode", ["step", "loop"])
@pytest.mark.parametrize("rescale", [0.0, 0.4])
def test_new_pictures_masks_strengths_and_scales_take_effect_in_the_same_graph(cache, mode, rescale):
    model, results = Net(), []
    five, six = sampler(cache, 5, eta=0.7), sampler(cache, 6, eta=0.3)
    first = dict(s=five, x0=picture(0), mask=MASK, strength=0.6, guidance_scale=[1.1, 2.3, 0.7], seed=1)
    for change in (
        {},
        dict(x0=picture(1)),
        dict(mask=1 - MASK),
        dict(mask=MASK[:, None]),
        dict(strength=0.55),
        dict(s=six, strength=0.5),
        dict(guidance_scale=[1.1, 2.3, 0.8]),
        dict(guidance_scale=lambda t: t / 100),
        dict(guidance_scale=3.1),
        dict(seed=2),
    ):
        call = first | change
        s = call.pop("s")
        call |= dict(model=model, conditioning=scales(1.0, 2.0), guidance_rescale=rescale)
        expected = s.inpaint(capture="off", **call)
        assert torch.equal(s.inpaint(capture=mode, **call), expected), change
        results.append(expected)
    assert len(cache) == 1
    assert (
        sum(torch.equal(result, results[0]) for result in results) == 2
    )  # itself, and the other strength of three steps


def test_any_number_of_steps_replays_the_graph_of_a_step(cache):
    model = Net()
    for steps in (1, 7, 3, 64):
        s = sampler(cache, steps, eta=1.0 if steps > 1 else 0.0)
        s = sampler(cache, steps)
        assert torch.equal(
            s.sample(model, SHAPE, seed=0, capture="step"), s.sample(model, SHAPE, seed=0, capture="off")
        )
    assert len(cache) == 1
    s = sampler(cache, 65)
    assert torch.equal(s.sample(model, SHAPE, seed=0, capture="step"), s.sample(model, SHAPE, seed=0, capture="off"))
    assert len(cache) == 2


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (dict(shape=SHAPE), dict(shape=(3, 3, 8, 8))),
        (dict(shape=SHAPE), dict(shape=(2, 3, 8, 4))),
        (dict(conditioning=scales(1.0, 2.0)), dict()),
        (dict(conditioning=scales(1.0, 2.0)), dict(conditioning={"scale": torch.ones(2, dtype=torch.float64)})),
        (dict(conditioning={"name": "a"}), dict(conditioning={"name": "b"})),
        (dict(conditioning=scales(1.0, 2.0)), dict(conditioning=scales(1.0, 2.0), guidance_scale=2.0)),
        (dict(), dict(return_trajectory=True)),
        (dict(), dict(mask=MASK.expand(SHAPE), known_x0=picture(0))),
        (
            dict(conditioning=scales(1.0, 2.0), guidance_scale=2.0),
            dict(conditioning=scales(1.0, 2.0), guidance_scale=2.0, guidance_rescale=0.5),
        ),
        (
            dict(conditioning=scales(1.0, 2.0), guidance_scale=2.0, guidance_rescale=0.2),
            dict(conditioning=scales(1.0, 2.0), guidance_scale=2.0, guidance_rescale=0.5),
        ),
    ],
)
def test_what_is_baked_in_means_another_graph(cache, first, second):
    model, s = Net(), sampler(cache)
    for options in (first, second, first, second):
        call = dict(shape=SHAPE, seed=1) | options
        got, expected = s.sample(model, capture="step", **call), s.sample(model, capture="off", **call)
        if call.get("return_trajectory"):
            got, expected = got.samples, expected.samples
        assert torch.equal(got, expected)
    assert len(cache) == 2


def test_one_step_of_inpainting_which_makes_no_noise_has_a_graph_of_its_own(cache):
    model, x0 = Net(), picture(0)
    for steps in (1, 3, 1):
        s = sampler(cache, steps)
        call = dict(x0=x0, mask=MASK, seed=0)
        assert torch.equal(s.inpaint(model, capture="step", **call), s.inpaint(model, capture="off", **call))
    assert len(cache) == 2


def test_the_number_of_steps_of_a_whole_loop_is_baked_in(cache):
    model = Net()
    for steps in (3, 5, 3):
        s = sampler(cache, steps)
        assert torch.equal(
            s.sample(model, SHAPE, seed=0, capture="loop"), s.sample(model, SHAPE, seed=0, capture="off")
        )
    assert len(cache) == 2


def test_weights_changed_in_place_are_seen_and_moved_ones_mean_another_graph(cache):
    model, s = Net().eval(), sampler(cache)

    def check(graphs):
        assert torch.equal(
            s.sample(model, SHAPE, seed=0, capture="step"), s.sample(model, SHAPE, seed=0, capture="off")
        )
        assert len(cache) == graphs

    check(1)
    with torch.no_grad():
        model.conv.weight.mul_(2)
    check(1)
    model.conv.weight = nn.Parameter(model.conv.weight.detach() * 0.5)
    check(2)
    model.train()
    check(3)


class Layers(nn.Module):
    prediction_type = "epsilon"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh())
        self.gain = 1.0
        self.shift = torch.tensor(0.1)

    def forward(self, x, t):
        return self.gain * self.layers(x) + self.shift


CHANGES = {
    "a number": lambda m: setattr(m, "gain", 2.0),
    "the sign of zero": lambda m: setattr(m, "gain", -0.0 if str(m.gain) == "0.0" else 0.0),
    "a hook": lambda m: m.layers.register_forward_hook(lambda module, args, output: 2 * output),
    "a module": lambda m: m.layers.__setitem__(1, nn.Sigmoid()),
    "strides": lambda m: setattr(m.layers[0].weight, "data", m.layers[0].weight.data.transpose(2, 3)),
    "a tensor that is no weight": lambda m: setattr(m, "shift", torch.tensor(0.3)),
    "training": lambda m: m.eval(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_is_captured_anew(cache, name):
    model, s = Layers(), sampler(cache)
    for _ in range(2):
        s.sample(model, SHAPE, seed=0)
        assert len(cache) == 1
    CHANGES[name](model)
    assert torch.equal(s.sample(model, SHAPE, seed=0), s.sample(model, SHAPE, seed=0, capture="off"))
    assert len(cache) == 2


@pytest.mark.parametrize("mode", ["step", "loop"])
def test_conditioning_that_is_one_tensor_is_one_for_the_model_too(cache, mode):
    class Attends(Net):
        def forward(self, x, t, first, second):
            return torch.tanh(x) * (2.0 if first is second else 3.0) * first.mean()

    s, model, a, b = sampler(cache), Attends(), torch.ones(2), torch.ones(2)
    for first, second in ((a, b), (a, a), (b, a), (b, b)):
        options = dict(shape=SHAPE, seed=0, conditioning={"first": first, "second": second}, guidance_scale=2.0)
        # That a tensor is given to both calls is no matter.
        options["unconditional_conditioning"] = {"first": a, "second": torch.ones(2)}
        expected = s.sample(model, **options, capture="off")
        assert torch.equal(s.sample(model, **options, capture=mode), expected)
    assert cache.stats().misses == 2


def test_thresholds_are_part_of_the_key(cache):
    model = Net()
    for ratio, maximum in [(0.9, 1.0), (0.5, 1.0), (0.5, 1.5)]:
        s = sampler(cache, thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=maximum)
        call = dict(shape=SHAPE, seed=0)
        assert torch.equal(s.sample(model, capture="step", **call), s.sample(model, capture="off", **call))
    assert len(cache) == 3


@pytest.mark.parametrize("first", [True, False])
def test_inside_and_outside_of_inference_mode(cache, first):
    model, s = Net(), sampler(cache)
    expected = s.sample(model, SHAPE, seed=0, capture="off", conditioning=scales(1.0, 2.0))
    for inside in (first, not first, first):
        with torch.inference_mode(inside):
            got = s.sample(model, SHAPE, seed=0, capture="step", conditioning=scales(1.0, 2.0))
        assert torch.equal(got, expected)
    assert len(cache) == 1


def test_conditioning_with_a_history_is_not_kept(cache):
    model, s = Net(), sampler(cache)
    weight = torch.ones(2, requires_grad=True)
    for _ in range(3):
        got = s.sample(model, SHAPE, seed=0, capture="step", conditioning={"scale": weight * 2})
    ((_, captured),) = cache._captured.values()
    assert all(leaf.grad_fn is None for leaf in captured._leaves)
    assert torch.equal(got, s.sample(model, SHAPE, seed=0, capture="off", conditioning=scales(2.0, 2.0)))


def test_a_run_inside_a_run_has_a_graph_of_its_own(cache):
    model, s = Net(), sampler(cache)
    expected = [s.sample(model, SHAPE, seed=k, capture="off") for k in range(2)]
    inner = []

    def callback(step, t, x_t, x0):
        if step == 1:
            inner.append(s.sample(model, SHAPE, seed=1, capture="step", callback=lambda *a: None))
            cache.clear()  # frees nothing that is in use

    assert torch.equal(s.sample(model, SHAPE, seed=0, capture="step", callback=callback), expected[0])
    assert torch.equal(inner[0], expected[1])


def test_an_error_in_a_callback_leaves_the_graph_usable(cache):
    model, s = Net(), sampler(cache)

    def fails(step, t, x_t, x0):
        raise KeyError("mine")

    for _ in range(2):
        with pytest.raises(KeyError, match="mine"):
            s.sample(model, SHAPE, seed=0, capture="step", callback=fails)
    assert len(cache) == 1
    assert not next(iter(cache._captured.values()))[1].busy


class Draws(nn.Module):
    prediction_type = "epsilon"

    def forward(self, x, t):
        return 0.1 * torch.randn(x.shape)


def test_warming_up_draws_nothing_from_the_callers_generator(cache):
    s = sampler(cache, steps=1)
    torch.manual_seed(5)
    expected = s.sample(Draws(), SHAPE, seed=0, capture="off")
    torch.manual_seed(5)
    assert torch.equal(s.sample(Draws(), SHAPE, seed=0, capture="step"), expected)


def test_a_trajectory_is_not_overwritten_either(cache):
    model, s = Net(), sampler(cache)
    run = s.sample(model, SHAPE, seed=0, capture="step", return_trajectory=True, reuse_output=True)
    before = run.samples.clone()
    s.sample(model, SHAPE, seed=1, capture="step", return_trajectory=True)
    assert torch.equal(run.samples, before)


def test_a_python_number_of_the_step_would_be_stale():
    """The stand-in shows the classic bug: the same loop with the step known to Python replays the step of the capture."""
    model, s = Net(), sampler(None, steps=4, eta=1.0)
    plan = s.plan(model)
    x, seeds = torch.randn(SHAPE), torch.tensor([1, 2])
    t = torch.tensor(plan.timesteps)
    index = torch.zeros(1, dtype=torch.int64)
    table = plan.table()
    state = {"step": 0}

    def honest(x):
        df.ddim_step_from_table(x, model(x, t.index_select(0, index).expand(2)), table, index, seeds=seeds, out=x)
        index.add_(1)

    def baked(x):
        step = plan.steps[state["step"]]
        noise = seeds if step.std_dev_t else None
        df.ddim_step(x, model(x, t[step.index].expand(2)), step.coefficients, seeds=noise, noise_step=step.index, out=x)
        state["step"] += 1

    results = {}
    for name, function in {"honest": honest, "baked": baked}.items():
        eager, replayed = x.clone(), x.clone()
        with torch.inference_mode():
            index.zero_()
            state["step"] = 0
            for _ in plan.steps:
                function(eager)
            index.zero_()
            state["step"] = 0
            graph = RecordedGraphs().capture(lambda function=function, replayed=replayed: function(replayed))
            index.zero_()
            for _ in plan.steps:
                graph.replay()
        results[name] = torch.equal(eager, replayed)
    assert results == {"honest": True, "baked": False}


def test_a_result_is_not_overwritten_by_the_next_call(cache):
    model, s = Net(), sampler(cache)
    first = s.sample(model, SHAPE, seed=0, capture="step")
    copy = first.clone()
    second = s.sample(model, SHAPE, seed=1, capture="step")
    assert torch.equal(first, copy)
    assert not torch.equal(first, second)
    assert not first.is_inference()
    reused = s.sample(model, SHAPE, seed=0, capture="step", reuse_output=True)
    assert torch.equal(reused, copy)
    s.sample(model, SHAPE, seed=1, capture="step")
    assert torch.equal(reused, second)


def test_a_given_start_is_not_changed(cache):
    model, s = Net(), sampler(cache)
    x_T = torch.randn(SHAPE)
    before = x_T.clone()
    s.sample(model, x_T=x_T, seed=0, capture="step")
    s.sample(model, x_T=x_T, seed=0, capture="step")
    assert torch.equal(x_T, before)


# --- the cache ------------------------------------------------------------------------------------------------------------------


def test_the_earliest_used_graph_is_freed_first(cache):
    model, s = Net(), sampler(cache)
    shapes = [(n, 3, 8, 8) for n in (1, 2, 3, 4)]
    for shape in shapes:
        s.sample(model, shape, seed=0, capture="step")
    s.sample(model, shapes[0], seed=0, capture="step")
    model.log.clear()
    s.sample(model, (5, 3, 8, 8), seed=0, capture="step")  # frees that of two samples
    assert len(cache) == 4
    calls = len(model.log)
    model.log.clear()
    s.sample(model, shapes[0], seed=0, capture="step")
    assert model.log == []  # replayed
    s.sample(model, shapes[1], seed=0, capture="step")
    assert len(model.log) == calls > 0  # captured again


def test_graphs_are_let_go_of(cache):
    model, other, s = Net(), Net(1), sampler(cache)
    for m in (model, other):
        s.sample(m, SHAPE, seed=0, capture="step")
        s.sample(m, SHAPE, seed=0, capture="loop")
    cache.discard(model)
    assert len(cache) == 2
    cache.clear()
    assert len(cache) == 0
    gc.collect()
    assert torch.equal(s.sample(model, SHAPE, seed=0, capture="step"), s.sample(model, SHAPE, seed=0, capture="off"))


def test_a_cache_of_nothing_is_refused():
    with pytest.raises(ValueError, match="maxsize must be at least 1, got maxsize=0"):
        GraphCache(maxsize=0)


def test_time_of_replays_is_told_apart(cache):
    model, s = Net(), sampler(cache)
    for mode in ("step", "loop"):
        timing = Timing()
        s.sample(model, SHAPE, seed=0, capture=mode, timing=timing)
        assert timing.steps == 5
        assert timing.captured_seconds > 0
        assert timing.model_seconds == timing.update_seconds == 0


# --- what cannot be captured -----------------------------------------------------------------------------------------------------


class Syncs(nn.Module):
    prediction_type = "epsilon"

    def forward(self, x, t):
        return x * 0.1 if x.abs().max().item() > 0 else x


def test_a_model_that_cannot_be_captured_is_named_or_warned_about_once(cache):
    model, s = Syncs(), sampler(cache)
    for mode in ("step", "loop"):
        with pytest.raises(CaptureError, match=r"(?s)_local_scalar_dense.*test_capture.py.*x\.abs\(\)"):
            s.sample(model, SHAPE, seed=0, capture=mode)
    expected = s.sample(model, SHAPE, seed=0, capture="off")
    with pytest.warns(UserWarning, match="sampling without CUDA graphs: .*_local_scalar_dense") as caught:
        assert torch.equal(s.sample(model, SHAPE, seed=0), expected)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(s.sample(model, SHAPE, seed=0), expected)
    assert len(cache) == 0


def test_the_warning_names_the_line_that_called_whichever_method(cache):
    for run in RUNS.values():
        with pytest.warns(UserWarning, match="sampling without CUDA graphs") as caught:
            run(sampler(cache), Syncs(), picture(0), seed=0)
        assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(capture="loop", callback=lambda *a: None),
            "cannot come between them, got a callback: use capture='step'",
        ),
        (dict(capture="loop", progress=True), "got progress"),
        (dict(capture="loop", return_trajectory=True), "got return_trajectory"),
        (dict(capture="loop", generator=torch.Generator(), seed=None), "got noise from a generator"),
        (dict(capture="graph"), "capture must be one of auto, loop, step, off, got 'graph'"),
        (
            dict(capture="step", dtype=torch.float64),
            "takes float32, float16 and bfloat16, and the samples are torch.float64",
        ),
        (dict(capture="step", backend="reference"), "backend='reference' was asked for"),
        (dict(capture="step", cond_fn=lambda x, t: x), "cond_fn takes gradients, which a captured step does not; use"),
        (dict(capture="loop", cond_fn=lambda x, t: x), "capture='loop' cannot be used: cond_fn takes gradients"),
    ],
)
def test_a_mode_that_cannot_be_is_refused_with_the_reason(cache, options, message):
    s = sampler(cache, eta=1.0)
    with pytest.raises(ValueError, match=message):
        s.sample(Net(), SHAPE, **(dict(seed=0) | options))


def test_on_a_cpu_there_is_nothing_to_capture():
    s = sampler(None)
    with pytest.raises(
        ValueError, match="needs a CUDA device, and the samples are on cpu; use capture='off', or 'auto'"
    ):
        s.sample(Net(), SHAPE, seed=0, capture="step")
    assert torch.equal(s.sample(Net(), SHAPE, seed=0), s.sample(Net(), SHAPE, seed=0, capture="off"))


def test_auto_does_without_a_graph_where_gradients_are_taken(cache):
    model, s, call = Net(), sampler(cache), dict(shape=SHAPE, seed=0, cond_fn=lambda x, t: torch.sin(x))
    assert torch.equal(s.sample(model, **call), s.sample(model, capture="off", **call))
    assert len(cache) == 0


def test_conditioning_that_cannot_be_a_key_is_refused(cache):
    with pytest.raises(TypeError, match=r"must be tensors and plain values .*got a set"):
        sampler(cache).sample(lambda x, t, what: x, SHAPE, seed=0, capture="step", conditioning={"what": {1, 2}})


class Takes(Net):
    def forward(self, x, t, **conditioning):
        return super().forward(x, t)


def test_auto_does_without_a_graph_where_a_key_cannot_be_made(cache):
    model, s = Takes(), sampler(cache)
    with pytest.warns(UserWarning, match="got a set"):
        got = s.sample(model, SHAPE, seed=0, conditioning={"what": {1, 2}})
    assert torch.equal(got, s.sample(model, SHAPE, seed=0, capture="off"))
    assert len(cache) == 0
    s.sample(model, SHAPE, seed=0)  # without it, the same model is captured
    assert len(cache) == 1


def test_auto_leaves_functions_alone_since_what_they_hold_cannot_be_seen(cache):
    net, s = Net(), sampler(cache)
    s.sample(lambda x, t: net(x, t), SHAPE, seed=0)
    assert len(cache) == 0


# --- the rules of a capture, on a fake CUDA device --------------------------------------------------------------------------------


def unet2d_condition():
    """One block down and one up: tests/gpu_lab/test_fake_cuda.py captures a step of larger ones."""
    model = UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        attention_head_dim=4, cross_attention_dim=6, mid_block_type=None,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    )  # fmt: skip
    return model, {"encoder_hidden_states": torch.empty(2, 3, 6, device="cuda")}


def small():
    return Net(), {}


def small_condition():
    return Net(), {"scale": torch.empty(2, 1, 1, 1, device="cuda")}


@pytest.mark.parametrize(
    ("make", "eta", "options", "guidance"),
    [
        (small, 0.0, {}, None),
        (unet2d_condition, 1.0, {}, 5.0),
        (small, 1.0, {"clip_sample": True}, None),
        (small, 0.0, {"thresholding": True}, None),
        (small_condition, 0.0, {"thresholding": True}, 5.0),
        (small_condition, 0.0, {"order": 2}, 5.0),
        (small, 1.0, {"mask": True, "thresholding": True}, None),
    ],
)
def test_a_step_launches_one_kernel_of_ours_waits_for_nothing_and_allocates_nothing(make, eta, options, guidance):
    with fake_cuda() as device:
        network, conditioning = make()
        network = network.to("cuda").eval()
        graphs = []

        class Reporting(FakeGraphs):
            def capture(self, function, pool=None):
                graphs.append(super().capture(function, pool))
                return graphs[-1]

        cache = GraphCache(backend=lambda where: Reporting(device))
        own = {name: value for name, value in options.items() if name != "mask"}
        s = df.DDIMSampler(df.NoiseSchedule.linear(), 3, eta, graphs=cache, **own)
        model = device.tagged("model", network)
        call = dict(shape=SHAPE, seed=0, device="cuda", conditioning=conditioning, guidance_scale=guidance)
        if "mask" in options:
            known = torch.empty(SHAPE, device="cuda")
            call |= dict(mask=known[0, 0], known_x0=known)
        if guidance:
            call["unconditional_conditioning"] = conditioning
        s.sample(model, capture="step", **call)
        s.sample(model, capture="loop", **call)
    step, loop = graphs
    ours = {"ddim_fast::ddim_step_kernel": 1}
    if "thresholding" in options:
        ours["ddim_fast::thresholds_kernel"] = 1
    assert step.steady.region().own_launches == ours
    # Beside ours: the timestep is looked up, and the counter moves on.
    assert step.steady.region().launches.total() == 2 + sum(ours.values())
    assert loop.steady.region().own_launches == dict.fromkeys(ours, 3)
    for graph in graphs:
        assert graph.steady.syncs == graph.steady.copies == graph.steady.others == []
        assert graph.steady.region().allocations.total() == 0


def test_thresholds_of_large_samples_wait_for_nothing_and_allocate_nothing():
    """Six launches instead of one: a workspace is cleared, four digits are counted, the quantile is selected."""
    with fake_cuda() as device:
        cache = GraphCache(backend=lambda where: FakeGraphs(device))
        s = df.DDIMSampler(df.NoiseSchedule.linear(), 3, graphs=cache, thresholding=True)
        model = device.tagged("model", Net().to("cuda"))
        s.sample(
            model,
            (2, 3, 64, 64),
            seed=0,
            device="cuda",
            capture="step",
            conditioning={"scale": torch.empty(2, 1, 1, 1, device="cuda")},
        )
        (steady,) = [captured._graph.steady for _, captured in cache._captured.values()]
    ours = {"ddim_step_kernel": 1, "count_digits_kernel": 4, "select_thresholds_kernel": 1}
    assert steady.region().own_launches == {f"ddim_fast::{name}": count for name, count in ours.items()}
    assert steady.region().launches.total() == 3 + sum(ours.values())
    assert steady.syncs == steady.copies == steady.others == []
    assert steady.region().allocations.total() == 0


def test_a_rescaled_output_waits_for_nothing():
    """A few operations of torch before the one kernel, whose scale is looked up on the device."""
    with fake_cuda() as device:
        cache = GraphCache(backend=lambda where: FakeGraphs(device))
        s, model = sampler(cache, 3, 1.0), Net().to("cuda")
        call = dict(shape=SHAPE, seed=0, device="cuda", conditioning={"scale": torch.empty(2, device="cuda")})
        call |= dict(guidance_scale=[5.0, 3.0, 1.0], guidance_rescale=0.7)
        for mode in ("step", "loop"):
            s.sample(model, capture=mode, **call)
        steady = [captured._graph.steady for _, captured in cache._captured.values()]
    assert [graph.region().own_launches["ddim_fast::ddim_step_kernel"] for graph in steady] == [1, 3]
    for graph in steady:
        assert graph.syncs == graph.copies == graph.others == []
