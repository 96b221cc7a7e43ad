"""Sampling in parallel over time: against the sequential run, bit by bit, and against Picard iteration written here in float64 NumPy."""

import math

import numpy as np
import pytest
import torch

from ddim_fast.kernels.noise import NoiseStream, standard_normals
from ddim_fast.plans.schedules import NoiseSchedule
from ddim_fast.sampler import DDIMSampler
from ddim_fast.sampling.parallel import ParallelStatistics

sample_parallel = DDIMSampler.sample_parallel

ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
LINEAR = NoiseSchedule.from_alphas_cumprod(ALPHA_BAR)
STEPS = (999, 910, 777, 640, 433, 300, 101, 40, 7, 0)  # no two strides alike
SHAPE = (3, 2, 4, 5)
KINDS = ("epsilon", "sample", "v_prediction")
SEEDS = [3, -1, 2**63 + 7]
EPS64 = torch.finfo(torch.float64).eps


@pytest.fixture(autouse=True)
def _restored_state():
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def wavy(x, t, label=0.0):
    """An elementwise model that knows the timestep and its label; tensors and arrays alike."""
    wave = torch.tanh if isinstance(x, torch.Tensor) else np.tanh
    if isinstance(x, torch.Tensor):
        t, label = (torch.as_tensor(v, dtype=x.dtype).view(-1, *[1] * (x.ndim - 1)) for v in (t, label))
    return 0.9 * wave(x * (0.6 + t / 1500)) + 0.2 + label * wave(2 * x + 0.3)


def sampler_of(eta=0.0, kind="v_prediction", **options):
    return DDIMSampler(LINEAR, timesteps=STEPS, eta=eta, prediction_type=kind, **options)


# --- Bit by bit -------------------------------------------------------------------------------------------------------

SAMPLERS = {
    "eta 0": {},
    "eta 1": {"eta": 1.0},
    "epsilon": {"eta": 0.4, "kind": "epsilon"},
    "sample": {"eta": 1.0, "kind": "sample"},
    "clipped": {"eta": 0.4, "kind": "epsilon", "clip_sample": True, "clip_sample_range": 0.5},
    "thresholds": {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.7},
}


@pytest.mark.parametrize(
    ("window", "dtype"),
    [*((window, torch.float32) for window in (1, 3, 99, None)), (3, torch.float64), (None, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("name", SAMPLERS)
def test_no_tolerance_gives_the_bits_of_the_sequential_run(name, window, dtype):
    sampler = sampler_of(**SAMPLERS[name])
    options = {"seeds": SEEDS, "dtype": dtype, "conditioning": {"label": torch.tensor([0.1, 0.2, 0.3])}}
    samples, statistics = sample_parallel(
        sampler, wavy, SHAPE, window=window, tolerance=0.0, return_statistics=True, **options
    )
    assert torch.equal(samples, sampler.sample(wavy, SHAPE, **options))
    assert samples.dtype == dtype
    assert not samples.is_inference()
    assert samples.untyped_storage().nbytes() == samples.nbytes  # nothing of the window is kept
    assert statistics.converged
    if window == 1:
        assert statistics == ParallelStatistics(len(STEPS), len(STEPS), True)


@pytest.mark.parametrize(
    "scale", [3.0, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10.5], lambda t: 1 + t / 500], ids=["one", "list", "function"]
)
def test_guidance_and_conditioning_are_those_of_each_state(scale):
    """Tensors with one entry for each sample, also nested; others, one of them with a first size that is no batch's, as they are."""

    def model(x, t, nested, table, name):
        assert (name, table.shape) == ("as it is", (5, 1))
        return wavy(x, t, nested["labels"][0]) + table[4]

    def conditioning(*labels):
        return {"nested": {"labels": [torch.tensor(labels)]}, "table": torch.full((5, 1), 0.1), "name": "as it is"}

    options = {
        "conditioning": conditioning(0.1, -0.2, 0.3),
        "unconditional_conditioning": conditioning(0.0, 0.5, 0.0),
        "guidance_scale": scale,
    }
    found = sample_parallel(sampler_of(1.0), model, SHAPE, seed=4, window=4, tolerance=0, **options)
    assert torch.equal(found, sampler_of(1.0).sample(model, SHAPE, seed=4, **options))


def test_the_start_is_that_of_the_sequential_run():
    sampler = sampler_of(1.0)
    for options in (
        {"seed": 5},
        {"seeds": SEEDS},
        {"x_T": torch.randn(SHAPE).transpose(0, 2).contiguous().transpose(0, 2), "seed": 6},
        {},
    ):
        shape = None if "x_T" in options else SHAPE
        before = options["x_T"].clone() if "x_T" in options else None
        torch.manual_seed(0)
        wanted = sampler.sample(wavy, shape, **options)
        torch.manual_seed(0)
        assert torch.equal(sample_parallel(sampler, wavy, shape, tolerance=0, **options), wanted)
        assert before is None or torch.equal(options["x_T"], before)


def test_a_model_may_return_its_input_or_twice_the_channels():
    for model in (
        lambda x, t: x,
        lambda x, t: (torch.cat([wavy(x, t), x], 1),),
        lambda x, t: {"sample": x.flip(0).flip(0)},
    ):
        found = sample_parallel(sampler_of(), model, SHAPE, seed=1, tolerance=0)
        assert torch.equal(found, sampler_of().sample(model, SHAPE, seed=1))


def test_the_model_is_called_once_for_the_window():
    seen = []

    def model(x, t):
        assert not torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert t.dtype == torch.int64
        seen.append((tuple(x.shape), t.tolist()))
        return wavy(x, t)

    _, statistics = sample_parallel(sampler_of(), model, SHAPE, seed=1, window=4, tolerance=0, return_statistics=True)
    assert seen[0] == ((12, 2, 4, 5), [t for t in STEPS[:4] for _ in range(3)])
    assert seen[-1][0] == (3 * len(seen[-1][1]) // 3, 2, 4, 5)
    assert statistics.iterations == len(seen)
    assert statistics.model_evaluations == sum(shape[0] for shape, _ in seen) / 3


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3)], ids=str)
def test_no_samples_and_no_elements(shape):
    assert sample_parallel(sampler_of(1.0), wavy, shape, seed=1).shape == shape


@pytest.mark.filterwarnings("ignore:samples must be finite")
def test_nan_ends_in_as_many_iterations_as_steps():
    def model(x, t):
        return x * math.nan

    samples, statistics = sample_parallel(sampler_of(), model, SHAPE, seed=1, return_statistics=True)
    assert samples.isnan().all()
    assert statistics.iterations == len(STEPS)


# --- Picard iteration, in NumPy float64 -------------------------------------------------------------------------------


def step(kind, i, x, old, m, eta, z):
    """Equation 12 of the DDIM paper from x, with the v of the model's output m for an older x."""
    a, prev = ALPHA_BAR[STEPS[i]], 1.0 if i + 1 == len(STEPS) else ALPHA_BAR[STEPS[i + 1]]
    v = {
        "epsilon": lambda: (m - math.sqrt(1 - a) * old) / math.sqrt(a),
        "sample": lambda: (math.sqrt(a) * old - m) / math.sqrt(1 - a),
        "v_prediction": lambda: m,
    }[kind]()
    x0 = math.sqrt(a) * x - math.sqrt(1 - a) * v
    eps = math.sqrt(1 - a) * x + math.sqrt(a) * v
    variance = eta**2 * (1 - prev) / (1 - a) * (1 - a / prev)
    return math.sqrt(prev) * x0 + math.sqrt(max(1 - prev - variance, 0)) * eps + math.sqrt(variance) * z


def picard(kind, eta, window, tolerance, max_iterations=None, model=wavy):
    """All states by their numbers: nothing slides. Returns the last state, iterations and evaluations."""
    size = math.prod(SHAPE[1:])
    x_T = standard_normals(SEEDS, size, 0, NoiseStream.INITIAL).reshape(SHAPE).astype(float)
    noises = [
        standard_normals(SEEDS, size, i, NoiseStream.STEP).reshape(SHAPE).astype(float) for i in range(len(STEPS))
    ]
    states = [x_T] * (len(STEPS) + 1)
    first = iterations = evaluations = 0
    while first < len(STEPS) and iterations != max_iterations:
        end = min(first + window, len(STEPS))
        new = list(states)
        for i in range(first, end):
            new[i + 1] = step(kind, i, new[i], states[i], model(states[i], STEPS[i]), eta, noises[i])
        for i in range(end + 1, len(STEPS) + 1):
            new[i] = new[end]
        settled = first + 1
        while settled < end:
            change = ((new[settled] - states[settled]) ** 2).reshape(len(SEEDS), -1).mean(1)
            if not (change <= tolerance**2 * (1 - ALPHA_BAR[STEPS[settled]])).all():
                break
            settled += 1
        states, iterations, evaluations, first = new, iterations + 1, evaluations + end - first, settled
    return states[-1], iterations, evaluations


def early(x, t):
    """``wavy`` in the first two steps, and nothing after them: later states may settle before earlier ones."""
    late = t.view(-1, 1, 1, 1) < 900 if isinstance(t, torch.Tensor) else t < 900
    return wavy(x, t) * (1 - 1 * late)


@pytest.mark.parametrize("model", [wavy, early])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(("window", "tolerance"), [(1, 0.03), (3, 1e-3), (3, 0.3), (6, 0.03), (10, 1e-3), (10, 0.3)])
def test_every_iteration_is_picards(window, tolerance, eta, kind, model):
    wanted, iterations, evaluations = picard(kind, eta, window, tolerance, model=model)
    x_T = standard_normals(SEEDS, math.prod(SHAPE[1:]), 0, NoiseStream.INITIAL).reshape(SHAPE)
    samples, statistics = sample_parallel(
        sampler_of(eta, kind=kind),
        model,
        x_T=torch.from_numpy(x_T.astype(float)),
        seeds=SEEDS,
        window=window,
        tolerance=tolerance,
        return_statistics=True,
    )
    assert statistics == ParallelStatistics(iterations, evaluations, True)
    # 10 steps of 3 terms: tens of roundings, of states of size 4
    np.testing.assert_allclose(samples.numpy(), wanted, rtol=0, atol=1000 * EPS64)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_last_guess_where_iterations_run_out(count):
    wanted, *_ = picard("v_prediction", 1.0, len(STEPS), 0.0, count)
    samples, statistics = sample_parallel(
        sampler_of(1.0),
        wavy,
        SHAPE,
        seeds=SEEDS,
        dtype=torch.float64,
        tolerance=0.0,
        max_iterations=count,
        return_statistics=True,
    )
    assert (statistics.iterations, statistics.converged) == (count, False)
    np.testing.assert_allclose(samples.numpy(), wanted, rtol=0, atol=1000 * EPS64)


@pytest.mark.parametrize(("eta", "window", "most"), [(0.0, None, 13), (0.0, 20, 13), (1.0, None, 25)], ids=str)
def test_a_smooth_model_takes_fewer_iterations_than_steps(eta, window, most):
    """Data N(0.7, 0.3^2), for which the model is known in closed form; 50 steps."""
    alpha_bar = torch.from_numpy(ALPHA_BAR)

    def model(x, t):
        a = alpha_bar[t].view(-1, 1, 1)
        x0 = 0.7 + 0.3**2 * a.sqrt() / (a * 0.3**2 + 1 - a) * (x - a.sqrt() * 0.7)
        return (x - a.sqrt() * x0) / (1 - a).sqrt()

    sampler, options = DDIMSampler(LINEAR, 50, eta), {"seed": 0, "dtype": torch.float64}
    samples, statistics = sample_parallel(sampler, model, (8, 4, 4), window=window, return_statistics=True, **options)
    assert statistics.iterations <= most
    difference = samples - sampler.sample(model, (8, 4, 4), **options)
    assert difference.square().mean().sqrt() < 1e-3  # the tolerance
    assert statistics.model_evaluations < most * (window or 50)


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 0}, ValueError, "window must be an integer, at least 1, got 0"),
        ({"window": 2.0}, TypeError, "window must be an integer, at least 1, got 2.0"),
        ({"max_iterations": 0}, ValueError, "max_iterations must be an integer, at least 1, got 0"),
        ({"max_iterations": True}, TypeError, "max_iterations must be an integer, at least 1, got True"),
        ({"max_iterations": 3, "window": 9}, ValueError, "a window of all 10 steps has, got window=9"),
        (
            {"tolerance": -1e-3},
            ValueError,
            "tolerance must be a finite number, at least 0, got -0.001: 0 gives the sequential result",
        ),
        ({"tolerance": math.inf}, ValueError, "tolerance must be a finite number, at least 0, got inf"),
        ({"tolerance": None}, TypeError, "tolerance must be a finite number, at least 0, got None"),
        ({"seed": 1, "seeds": SEEDS}, ValueError, "pass seed or seeds, got both"),
        ({"shape": None}, ValueError, "shape is needed"),
        ({"guidance_scale": 2.0}, ValueError, "pass unconditional_conditioning"),
        ({"device": "nowhere"}, ValueError, "device must be a torch device"),
    ],
    ids=str,
)
def test_errors_come_before_the_model_is_called(options, error, message):
    def model(x, t):
        pytest.fail("called")

    with pytest.raises(error, match=message):
        sample_parallel(sampler_of(), model, **{"shape": SHAPE, **options})


def test_backend_and_progress(capsys):
    with pytest.raises(ValueError, match="backend must be one of"):
        sample_parallel(sampler_of(), wavy, SHAPE, seed=1, backend="none")
    assert capsys.readouterr().err == ""
    sample_parallel(sampler_of(), wavy, SHAPE, seed=1, progress=True)
    assert "10/10" in capsys.readouterr().err
