"""The drop-ins for MONAI's schedulers, held to their originals."""

import copy
import itertools
from functools import partial

import pytest
import torch
from hypothesis import strategies as st
from layouts import assert_laid_out_alike, draw, kinds, modelled, shapes, sweep
from monai.data import MetaTensor
from monai.inferers import DiffusionInferer
from monai.networks.nets import DiffusionModelUNet
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler, PNDMScheduler, RFlowScheduler
from outcomes import half_unit, outcome, same_error
from twins import twins

from ddim_fast.integrations.monai import FastDDIMScheduler, FastDDPMScheduler, FastRFlowScheduler, fast_scheduler
from ddim_fast.verify.truth.tolerances import COMPUTED_IN, assert_near

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
PREDICTIONS = ["epsilon", "sample", "v_prediction"]
SHAPE = (2, 3, 5, 4)
FAST = {DDIMScheduler: FastDDIMScheduler, DDPMScheduler: FastDDPMScheduler, RFlowScheduler: FastRFlowScheduler}


def both(kind, steps=None, **config):
    pair = kind(**config), FAST[kind](**config)
    for scheduler in pair if steps is not None else ():
        scheduler.set_timesteps(steps)
    return pair


def inputs(dtype=torch.float32, seed=0):
    return torch.randn((2, *SHAPE), generator=torch.Generator().manual_seed(seed)).to(dtype)


def predicted(scheduler, x, m, bar_t, sign):
    """x0, not clipped, and eps; ``sign`` is that of every difference."""
    alpha, sigma = bar_t.sqrt(), (1 - bar_t).sqrt()
    return {
        "epsilon": ((x + sign * sigma * m) / alpha, m),
        "sample": (m, (x + sign * alpha * m) / sigma),
        "v_prediction": (alpha * x + sign * sigma * m, alpha * m + sigma * x),
    }[str(scheduler.prediction_type)]


def exact_and_terms(step):
    """Run ``step(scheduler, x, m, z, sign, ...)`` in float64: (x_prev, x0), and the same of the absolute values of all terms,
    of which rounding errors are shares."""

    def run(scheduler, x, m, z, *args):
        x, m, z = x.double(), m.double(), z.double()
        terms = step(scheduler, x.abs(), m.abs(), z.abs(), 1, *args)
        return step(scheduler, x, m, z, -1, *args), terms

    return run


def clipped(scheduler, x0, sign):
    return x0.clamp(*scheduler.clip_sample_values) if scheduler.clip_sample and sign < 0 else x0


@exact_and_terms
def exact_ddim(scheduler, x, m, z, sign, t, before, eta=0.0):
    """Equation 12 of the DDIM paper, to the timestep ``before``; below 0 is the final level."""
    bars = scheduler.alphas_cumprod.double()
    bar_t, bar_prev = bars[t], bars[before] if before >= 0 else scheduler.final_alpha_cumprod.double()
    x0, eps = predicted(scheduler, x, m, bar_t, sign)
    x0 = clipped(scheduler, x0, sign)
    variance = eta**2 * (1 - bar_prev) / (1 - bar_t) * (1 - bar_t / bar_prev)
    return bar_prev.sqrt() * x0 + (1 - bar_prev - variance).clamp(min=0).sqrt() * eps + variance.sqrt() * z, x0


@exact_and_terms
def exact_ddpm(scheduler, x, m, z, sign, t, before):
    """Equation 7 of DDPM with noise: with the scheduler's betas, where ``before`` is t - 1."""
    bars = scheduler.alphas_cumprod.double()
    bar_t, bar_prev = bars[t], bars[before] if before >= 0 else torch.ones((), dtype=torch.float64)
    beta = scheduler.betas[t].double() if before == t - 1 else 1 - bar_t / bar_prev
    x0 = clipped(scheduler, predicted(scheduler, x, m, bar_t, sign)[0], sign)
    mean = bar_prev.sqrt() * beta / (1 - bar_t) * x0 + (1 - beta).sqrt() * (1 - bar_prev) / (1 - bar_t) * x
    small = ((1 - bar_prev) / (1 - bar_t) * beta).clamp(min=1e-20)
    return mean + (beta if scheduler.variance_type == "fixed_large" else small).sqrt() * z, x0


@exact_and_terms
def exact_flow(scheduler, x, m, z, sign, t, length):
    return x + length * m, x + t / scheduler.num_train_timesteps * m


def assert_nearer(got, theirs, exact, terms):
    """As near to exact arithmetic as the dtype allows, and never further from it than the original, but for one rounding."""
    for a, b, e, size in zip(got, theirs, exact, terms, strict=True):
        assert (a.dtype, a.stride()) == (b.dtype, b.stride())
        assert_near(a, e.numpy(), size.numpy())
        error, of_theirs = (float((v.double() - e).abs().max()) for v in (a, b))
        unit = torch.finfo(COMPUTED_IN[a.dtype]).eps * float(size.max())
        assert error <= of_theirs + max(unit, half_unit(a, e.numpy()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_whole_loops_of_ddim_are_the_originals_and_nearer_to_exact(prediction_type, dtype):
    for clip, eta, more in itertools.product(
        [False, True], [0.0, 0.7, 1], [{}, {"steps_offset": 1, "set_alpha_to_one": False}]
    ):
        original, fast = both(
            DDIMScheduler, 6, prediction_type=prediction_type, clip_sample=clip, clip_sample_min=-0.8, clip_sample_max=0.8,
            schedule="scaled_linear_beta", **more,
        )  # fmt: skip
        assert torch.equal(original.timesteps, fast.timesteps)
        drawn, ours_drawn, z_drawn = (torch.Generator().manual_seed(1) for _ in range(3))
        x = inputs(dtype)[0]
        for t in original.timesteps:
            m = inputs(dtype, int(t))[1]
            theirs = original.step(m, t, x, eta, drawn)
            got = fast.step(m, t, x, eta, ours_drawn)
            z = torch.randn(SHAPE, generator=z_drawn, dtype=dtype) if eta > 0 else torch.zeros(SHAPE)
            assert_nearer(got, theirs, *exact_ddim(original, x, m, z, int(t), int(t) - 1000 // 6, eta))
            x = theirs[0]
        assert torch.equal(drawn.get_state(), ours_drawn.get_state())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_whole_loops_of_ddpm_are_the_originals_and_nearer_to_exact(prediction_type, dtype):
    for clip, variance_type in itertools.product([False, True], ["fixed_small", "fixed_large"]):
        original, fast = both(
            DDPMScheduler, 5, prediction_type=prediction_type, clip_sample=clip, variance_type=variance_type
        )
        drawn, ours_drawn, z_drawn = (torch.Generator().manual_seed(1) for _ in range(3))
        x = inputs(dtype)[0]
        for t in (*original.timesteps, 2, torch.tensor(1)):
            m = inputs(dtype, int(t))[1]
            theirs = original.step(m, t, x, drawn)
            got = fast.step(m, t, x, ours_drawn)
            z = torch.randn(SHAPE, generator=z_drawn, dtype=dtype) if t > 0 else torch.zeros(SHAPE)
            assert_nearer(got, theirs, *exact_ddpm(original, x, m, z, int(t), int(t) - 1))
            x = theirs[0]
        assert torch.equal(drawn.get_state(), ours_drawn.get_state())


def test_a_step_without_variance_adds_the_originals_smallest_noise():
    """As the one to a clean level, where beta is 0: in float64 it is seen."""
    original, fast = both(DDPMScheduler, beta_start=0.0)
    x, m = inputs(torch.float64)
    theirs, got = (s.step(m, 1, x, torch.Generator().manual_seed(0))[0] for s in (original, fast))
    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact, terms = exact_ddpm(original, x, m, z, 1, 0)
    assert_nearer([got], [theirs], exact[:1], terms[:1])
    assert float((exact[0] - exact_ddpm(original, x, m, 0 * z, 1, 0)[0][0]).abs().max()) > 1e-11


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", [{}, {"use_discrete_timesteps": False}, {"use_timestep_transform": True}], ids=str)
def test_whole_loops_of_rectified_flow_are_the_originals_and_nearer_to_exact(config, dtype):
    original, fast = both(RFlowScheduler, **config)
    for scheduler in (original, fast):
        scheduler.set_timesteps(7, input_img_size_numel=16**3)
    times = original.timesteps
    for ahead in ([*times[1:], torch.tensor(0)], [int(t) for t in times[1:]] + [0], [None] * 7):
        x = inputs(dtype)[0]
        for t, t_next in zip(times, ahead, strict=True):
            m = inputs(dtype, int(t))[1]
            theirs, got = (scheduler.step(m, t, x, t_next) for scheduler in (original, fast))
            length = 1 / 7 if t_next is None else float(t - int(t_next)) / 1000
            assert_nearer(got, theirs, *exact_flow(original, x, m, x, float(t), length))
            x = theirs[0]


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("config", [{}, {"prediction_type": "v_prediction", "clip_sample": False}], ids=str)
@pytest.mark.parametrize("kind", FAST)
def test_the_inferer_samples_the_originals_pictures(kind, config, seed):
    if kind is RFlowScheduler and config:
        config = {"use_discrete_timesteps": False}
    torch.manual_seed(0)
    network = DiffusionModelUNet(
        spatial_dims=2, in_channels=1, out_channels=1, num_res_blocks=1, channels=(8, 8), attention_levels=(False, True),
        norm_num_groups=4, num_head_channels=4,
    )  # fmt: skip
    for parameter in network.out.parameters():  # they are 0 in a new network
        torch.nn.init.normal_(parameter, std=0.3)
    noise = torch.randn(2, 1, 8, 8)
    pictures, states = [], []
    for scheduler in both(kind, 8, **config):
        inferer = DiffusionInferer(scheduler)
        torch.manual_seed(5)
        found = inferer.sample(noise, network, scheduler if seed is None else None, verbose=False)
        pictures.append(found)
        states.append(torch.get_rng_state())
    assert float(pictures[0].std()) > 0.1, "these pictures must show something"
    torch.testing.assert_close(pictures[1], pictures[0], rtol=0, atol=2e-5 * float(pictures[0].abs().max()))
    assert torch.equal(*states)


def test_the_inferer_computes_likelihoods_with_it():
    """It asks for the scheduler's class by its name."""
    original, fast = both(DDPMScheduler, 3, num_train_timesteps=20)
    network = lambda x, timesteps, context: 0.1 * x  # noqa: E731
    x = inputs()[0][:, :1].clamp(-1, 1)
    likelihoods = []
    for scheduler in (original, fast):
        torch.manual_seed(0)
        likelihoods.append(DiffusionInferer(scheduler).get_likelihood(x, network, scheduler, verbose=False))
    assert torch.equal(likelihoods[0], likelihoods[1])


@sweep(
    examples=25, shape=shapes, sample=kinds, output=kinds, kind=st.sampled_from(list(FAST)),
    prediction_type=st.sampled_from(PREDICTIONS), clip=st.booleans(), eta=st.sampled_from([0.0, 0.6]),
)  # fmt: skip
def test_layouts_and_dtypes(defaults, shape, sample, output, kind, prediction_type, clip, eta):
    config = {} if kind is RFlowScheduler else {"prediction_type": prediction_type, "clip_sample": clip}
    original, fast = both(kind, 5, **config)
    x = draw(0, shape, sample)
    m = modelled(x, output)
    results = []
    for scheduler, mode in ((original, None), (fast, defaults.device_mode())):
        generator = torch.Generator().manual_seed(2)
        more = {} if kind is RFlowScheduler else {"generator": generator}
        if kind is DDIMScheduler:
            more["eta"] = eta
        with mode if mode is not None else torch.device("cpu"):
            results.append(scheduler.step(m, 400, x, **more))
    assert_laid_out_alike(results[1], results[0], sample, output)


LEFT = {
    "asymmetric clipping": lambda s, m, x: vars(s).update(clip_sample_values=[-0.5, 1.0]),
    "levels in half precision": lambda s, m, x: s.add_noise(x.half(), x.half(), torch.tensor([3, 4])),
    "an unknown prediction": lambda s, m, x: setattr(s, "prediction_type", "x0"),
}


@pytest.mark.parametrize("change", LEFT)
@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
def test_what_is_left_to_the_original_is_the_originals(kind, change):
    x, m = inputs()
    results = []
    for scheduler in both(kind, 9):
        LEFT[change](scheduler, m, x)
        results.append(outcome(partial(scheduler.step, m, 500, x, generator=torch.Generator().manual_seed(0))))
    (theirs, error), (got, ours) = results
    if error is not None:
        same_error(error, ours)
    else:
        assert all(torch.equal(a, b) for a, b in zip(theirs, got, strict=True))


def test_learned_variances_and_metatensors_are_left_to_the_original():
    x, m = inputs()
    for variance_type in ("learned", "learned_range"):
        output = torch.cat([m, m.abs()], dim=1)
        theirs, got = (
            s.step(output, 500, x, generator=torch.Generator().manual_seed(0))[0]
            for s in both(DDPMScheduler, 9, variance_type=variance_type)
        )
        assert torch.equal(theirs, got)
    theirs, got = (s.step(MetaTensor(m), 500, MetaTensor(x))[0] for s in both(DDIMScheduler, 9))
    assert type(got) is MetaTensor
    assert torch.equal(theirs, got)


def test_wrong_use_raises_what_the_original_raises():
    x, m = inputs()
    steps = [(m, 1000, x), (m, "3", x), (m[:, :2], 5, x), (None, 5, x), (m, 0.5, x), (m, torch.tensor([1, 2, 3]), x)]
    for kind in FAST:
        for arguments in steps:
            (theirs, error), (got, ours) = (outcome(partial(s.step, *arguments)) for s in both(kind, 4))
            assert (error is None) == (ours is None)
            if error is not None:
                same_error(error, ours)
            else:
                assert all(torch.equal(a, b) for a, b in zip(theirs, got, strict=True))
    (_, error), (_, ours) = (outcome(partial(s.step, m, 5, x)) for s in both(RFlowScheduler))
    assert isinstance(error, AttributeError)
    same_error(error, ours)


def test_too_much_noise_is_an_error_that_names_the_most():
    x, m = inputs()
    original, fast = both(DDIMScheduler, 5)
    assert original.step(m, 999, x, 3.0)[0].isnan().all()
    with pytest.raises(ValueError, match=r"at timestep 999, eta may be at most [0-9.]+, got 3.0"):
        fast.step(m, 999, x, 3.0)


# --- Explicit pairs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_explicit_pairs_lead_to_the_next_timestep(steps):
    large = {"variance_type": "fixed_large"}
    for kind, exact, config in (
        (DDIMScheduler, exact_ddim, {}), (DDPMScheduler, exact_ddpm, {}), (DDPMScheduler, exact_ddpm, large),
    ):  # fmt: skip
        original, _ = both(kind, steps)
        fast = FAST[kind](explicit_pairs=True, **config)
        fast.set_timesteps(steps)
        visited = [*fast.timesteps.tolist(), -1]
        assert visited[:-1] == original.timesteps.tolist()
        for t, before in itertools.pairwise(visited):
            x, m = inputs(seed=t)
            noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * (before >= 0)
            more = {"eta": 0.5} if kind is DDIMScheduler else {}
            got = fast.step(m, t, x, generator=torch.Generator().manual_seed(0), **more)
            for a, *exact_and_size in zip(got, *exact(fast, x, m, noise, t, before, *more.values()), strict=True):
                assert_near(a, *(v.numpy() for v in exact_and_size))


def test_explicit_pairs_follow_a_list_and_refuse_what_they_cannot_do():
    x, m = inputs()
    fast = fast_scheduler(DDIMScheduler(), explicit_pairs=True)
    fast.timesteps = torch.tensor([900, 333, 10])
    for a, *exact_and_size in zip(fast.step(m, 333, x), *exact_ddim(fast, x, m, x, 333, 10), strict=True):
        assert_near(a, *(v.numpy() for v in exact_and_size))
    with pytest.raises(ValueError, match=r"timestep must be one of scheduler\.timesteps, got 334"):
        fast.step(m, 334, x)
    fast.timesteps[1] = 10
    with pytest.raises(ValueError, match=r"strictly decreasing, got \[900, 10, 10\]: choose fewer steps"):
        fast.step(m, 10, x)
    fast.timesteps = torch.tensor([900, 10])
    fast.clip_sample_values = [0.0, 1.0]
    with pytest.raises(ValueError, match=r"clip_sample_min must be -clip_sample_max.*explicit_pairs=False"):
        fast.step(m, 900, x)


# --- Objects ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAST)
def test_fast_scheduler_keeps_levels_and_timesteps(kind):
    original, _ = both(kind, 4)
    made = fast_scheduler(original)
    assert type(made) is type(fast_scheduler(made)) is FAST[kind]
    assert isinstance(made, kind)
    assert not made.explicit_pairs
    assert torch.equal(made.timesteps, original.timesteps)
    x, m = inputs()
    torch.testing.assert_close(made.step(m, 250, x)[1], original.step(m, 250, x)[1])
    assert not hasattr(original, "_host_copies")


def test_fast_scheduler_takes_nothing_else():
    for wrong in (PNDMScheduler(), None, type("Mine", (DDIMScheduler,), {})()):
        with pytest.raises(TypeError, match=r"one of MONAI's DDIMScheduler, DDPMScheduler, RFlowScheduler, got"):
            fast_scheduler(wrong)
    with pytest.raises(ValueError, match="explicit_pairs must be False for RFlowScheduler"):
        fast_scheduler(RFlowScheduler(), explicit_pairs=True)
    for make in (FastDDIMScheduler, FastDDPMScheduler):
        with pytest.raises(TypeError, match="explicit_pairs must be True or False, got 1"):
            make(explicit_pairs=1)


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
def test_writes_and_changed_attributes_are_noticed(kind):
    x, m = inputs()
    changes = (
        lambda s: s.alphas_cumprod.mul_(0.9),
        lambda s: setattr(s, "alphas_cumprod", s.alphas_cumprod**2),
        lambda s: setattr(s, "prediction_type", "sample"),
        lambda s: vars(s).update(clip_sample_values=[-0.1, 0.1]),
        lambda s: s.set_timesteps(17),
    )
    pair = both(kind, 4)
    for change in changes:
        results = []
        for scheduler in pair:
            change(scheduler)
            results.append(scheduler.step(m, 700, x, generator=torch.Generator().manual_seed(0)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(b, a)


def test_copies_compute_their_own_rows():
    x, m = inputs()
    fast = FastDDIMScheduler(explicit_pairs=True)
    fast.set_timesteps(5)
    expected = fast.step(m, 999, x)[0]
    for twin in (*twins(fast), copy.copy(fast)):
        assert type(twin) is FastDDIMScheduler
        assert twin.explicit_pairs
        assert "_host_copies" not in vars(twin)
        assert torch.equal(twin.step(m, 999, x)[0], expected)


def test_gradients_are_the_originals():
    gradients = []
    for scheduler in both(DDIMScheduler, 5, clip_sample=False):
        x, m = (tensor.clone().requires_grad_() for tensor in inputs())
        x_prev, x0 = scheduler.step(m, 600, x)
        (x_prev.square().sum() + x0.sum()).backward()
        gradients.append((x.grad, m.grad))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(b, a)


def test_inside_torch_compile():
    x, m = inputs()
    for kind in (
        DDIMScheduler,
        DDPMScheduler,
    ):  # RFlowScheduler is a Module that never became one, which cannot be traced
        original, fast = both(kind, 5)
        step = torch.compile(lambda m, x, s=fast: s.step(m, 600, x)[1], backend="eager", fullgraph=True)
        assert torch.equal(step(m, x), original.step(m, 600, x)[1])
    explicit = FastDDIMScheduler(explicit_pairs=True)
    explicit.set_timesteps(5)
    step = torch.compile(lambda m, x: explicit.step(m, 999, x)[0], backend="eager")
    assert torch.equal(step(m, x), explicit.step(m, 999, x)[0])
