"""``FastDDPMScheduler`` held to its original, and ``fast_scheduler``."""

import copy
import itertools
import pickle

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

import ddim_fast.integrations.diffusers as ours
from ddim_fast.integrations.diffusers import FastDDPMScheduler, fast_scheduler

# diffusers' own, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

VARIANCES = ["fixed_small", "fixed_small_log", "fixed_large"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPE = (2, 3, 5, 4)


def both(**config):
    return DDPMScheduler(**config), FastDDPMScheduler(**config)


def exact_step(scheduler, m, t, x, z):
    """Equation 7 of DDPM with noise, in float64 from the scheduler's own alphas."""
    config, bars = scheduler.config, scheduler.alphas_cumprod.double()
    visited = scheduler.timesteps.tolist()
    later = visited[visited.index(t) + 1 :]
    bar_t, bar_prev = bars[t], bars[later[0]] if later else torch.ones((), dtype=torch.float64)
    beta = 1 - bar_t / bar_prev
    x, m = x.double(), m.double()
    x0 = {
        "epsilon": lambda: (x - (1 - bar_t).sqrt() * m) / bar_t.sqrt(),
        "sample": lambda: m,
        "v_prediction": lambda: bar_t.sqrt() * x - (1 - bar_t).sqrt() * m,
    }[config.prediction_type]()
    if config.clip_sample:
        x0 = x0.clamp(-config.clip_sample_range, config.clip_sample_range)
    mean = bar_prev.sqrt() * beta / (1 - bar_t) * x0 + (1 - beta).sqrt() * (1 - bar_prev) / (1 - bar_t) * x
    small = ((1 - bar_prev) / (1 - bar_t) * beta).clamp(min=1e-20)
    std_dev = (beta if config.variance_type == "fixed_large" else small).sqrt()
    return mean + (std_dev * z.double() if t > 0 else 0), x0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variance_type", VARIANCES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_whole_loops_are_the_originals_and_nearer_to_exact(prediction_type, variance_type, dtype):
    for clip, spacing in itertools.product([False, True], ["leading", "linspace", "trailing"]):
        original, fast = both(
            prediction_type=prediction_type, variance_type=variance_type, clip_sample=clip, clip_sample_range=0.8,
            timestep_spacing=spacing, steps_offset=int(spacing == "leading"),
        )  # fmt: skip
        for scheduler in (original, fast):
            scheduler.set_timesteps(5)
        assert torch.equal(original.timesteps, fast.timesteps)
        drawn, ours_drawn, z_drawn = (torch.Generator().manual_seed(1) for _ in range(3))
        inputs = torch.Generator().manual_seed(2)
        x = torch.randn(SHAPE, generator=inputs).to(dtype)
        for t in original.timesteps:
            m = torch.randn(SHAPE, generator=inputs).to(dtype)
            theirs = original.step(m, t, x, generator=drawn)
            got = fast.step(m, t, x, generator=ours_drawn)
            z = torch.randn(SHAPE, generator=z_drawn, dtype=dtype) if t > 0 else torch.zeros(SHAPE)
            expected, x0 = exact_step(original, m, int(t), x, z)
            for a, b, exact in (
                (got.prev_sample, theirs.prev_sample, expected),
                (got.pred_original_sample, theirs.pred_original_sample, x0),
            ):
                assert a.dtype == b.dtype
                assert a.stride() == b.stride()
                error, of_theirs = (float((v.double() - exact).abs().max()) for v in (a, b))
                # Two weights, a product and a sum are rounded, half a unit each, of terms that may nearly cancel.
                unit = torch.finfo(dtype).eps * max(float(v.abs().max()) for v in (exact, x, m))
                assert error <= of_theirs + 4 * unit
            x = theirs.prev_sample
        assert torch.equal(drawn.get_state(), ours_drawn.get_state())


@given(
    steps=st.integers(1, 60),
    spacing=st.sampled_from(["leading", "linspace", "trailing"]),
    thresholding=st.booleans(),
    zero_snr=st.booleans(),
    return_dict=st.booleans(),
    listed=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_any_configuration(steps, spacing, thresholding, zero_snr, return_dict, listed):
    original, fast = both(
        prediction_type="v_prediction", thresholding=thresholding, timestep_spacing=spacing, num_train_timesteps=60,
        rescale_betas_zero_snr=zero_snr, sample_max_value=1.5,
    )  # fmt: skip
    for scheduler in (original, fast):
        if listed:
            scheduler.set_timesteps(timesteps=list(range(59, -1, -max(1, 60 // steps))))
        else:
            scheduler.set_timesteps(steps)
    x, m = torch.randn((2, *SHAPE), generator=torch.Generator().manual_seed(3))
    for t in (original.timesteps[0], original.timesteps[-1], int(original.timesteps[len(original.timesteps) // 2])):
        results = []
        for scheduler in (original, fast):
            generator = torch.Generator().manual_seed(4)
            found = scheduler.step(m, t, x, generator=generator, return_dict=return_dict)
            results.append((*(found if not return_dict else found.values()), generator.get_state()))
        (theirs, x0, state), (ours_, our_x0, our_state) = results
        torch.testing.assert_close(ours_, theirs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(our_x0, x0, rtol=1e-4, atol=1e-5)
        assert torch.equal(state, our_state)


@pytest.mark.parametrize("variance_type", ["learned", "learned_range", "fixed_large_log"])
def test_what_is_left_to_the_original_is_the_originals(variance_type):
    original, fast = both(variance_type=variance_type)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    channels = 3 if variance_type == "fixed_large_log" else 6
    m = torch.randn((2, channels, 5, 4), generator=torch.Generator().manual_seed(1)).abs()
    for scheduler in (original, fast):
        scheduler.set_timesteps(4)
    theirs, got = (
        s.step(m, s.timesteps[1], x, generator=torch.Generator().manual_seed(2)).prev_sample for s in (original, fast)
    )
    assert torch.equal(got.nan_to_num(9.0), theirs.nan_to_num(9.0))


def test_wrong_use_raises_what_the_original_raises():
    original, fast = both()
    for scheduler in (original, fast):
        scheduler.set_timesteps(4)
    x = torch.zeros(SHAPE)
    for arguments in ((x, 3, x), (x, 5000, x), (x, "3", x), (x[:, :2], 0, x), (None, 0, x), (x, 0.5, x)):
        caught = []
        for scheduler in (original, fast):
            with pytest.raises(Exception) as error:  # noqa: PT011 (compared below)
                scheduler.step(*arguments)
            caught.append((type(error.value), str(error.value)))
        assert caught[0] == caught[1]


def test_without_set_timesteps_a_step_is_to_the_timestep_before():
    original, fast = both()
    x, m = torch.randn((2, *SHAPE), generator=torch.Generator().manual_seed(3))
    for t in (999, 500, 1, 0):
        theirs, got = (
            s.step(m, t, x, generator=torch.Generator().manual_seed(2)).prev_sample for s in (original, fast)
        )
        # The original's beta_t = 1 - alpha_bar_t / alpha_bar_prev, of 1e-4 to 0.02, is a difference in float32.
        torch.testing.assert_close(got, theirs, rtol=1e-3, atol=2e-4)


def test_rows_follow_the_scheduler():
    """Timesteps, config and alphas that are written between steps count."""
    original, fast = both(clip_sample=False)
    x, m = torch.randn((2, *SHAPE), generator=torch.Generator().manual_seed(3))

    def check(t):
        theirs, got = (
            s.step(m, t, x, generator=torch.Generator().manual_seed(2)).prev_sample for s in (original, fast)
        )
        torch.testing.assert_close(got, theirs, rtol=1e-5, atol=1e-6)

    def to_both(change):
        for scheduler in (original, fast):
            change(scheduler)

    check(500)
    to_both(lambda s: s.set_timesteps(timesteps=[999, 500, 7]))
    check(500)
    to_both(lambda s: s.set_timesteps(timesteps=[999, 500, 300]))
    check(500)
    to_both(lambda s: s.set_timesteps(10))
    check(int(original.timesteps[2]))
    to_both(lambda s: s.register_to_config(clip_sample=True, clip_sample_range=0.5))
    check(int(original.timesteps[2]))
    to_both(lambda s: s.alphas_cumprod.mul_(0.9))
    check(int(original.timesteps[2]))


def test_copies_and_saved_configs(tmp_path):
    fast = FastDDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="fixed_large")
    fast.set_timesteps(6)
    x, m = torch.randn((2, *SHAPE), generator=torch.Generator().manual_seed(3))

    def step(scheduler):
        return scheduler.step(m, fast.timesteps[2], x, generator=torch.Generator().manual_seed(2)).prev_sample

    expected = step(fast)
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(step(again), expected)
    fast.save_pretrained(tmp_path)
    for cls in (DDPMScheduler, FastDDPMScheduler):
        loaded = cls.from_pretrained(tmp_path)
        loaded.set_timesteps(6)
        torch.testing.assert_close(step(loaded), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in ours.__all__ if name.startswith("Fast")])
def test_the_fast_class_of_every_scheduler_that_has_one(name):
    original = getattr(diffusers, name.removeprefix("Fast"))
    scheduler = original() if name != "FastFlowMatchLCMScheduler" else original(shift=3.0)
    fast = fast_scheduler(scheduler)
    assert type(fast) is getattr(ours, name)
    assert {k: v for k, v in fast.config.items() if k in scheduler.config and k[0] != "_"} == {
        k: v for k, v in scheduler.config.items() if k[0] != "_"
    }
    assert fast_scheduler(fast) is fast


def test_a_scheduler_without_a_fast_class_is_refused():
    class Own(DDPMScheduler):
        pass

    for scheduler in (diffusers.PNDMScheduler(), Own()):
        with pytest.raises(ValueError, match=r"a class that has a drop-in \(.*DDPMScheduler.*\), got (PNDM|Own)"):
            fast_scheduler(scheduler)
    with pytest.raises(TypeError, match=r"scheduler must be one of diffusers, got 3: pass pipe\.scheduler"):
        fast_scheduler(3)


def test_what_is_no_scheduler_is_told_in_one_line_with_what_helps():
    scheduler = DDPMScheduler()
    pipeline = diffusers.DDPMPipeline(diffusers.UNet2DModel(8, block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2,
                                                            up_block_types=("UpBlock2D",) * 2), scheduler)  # fmt: skip
    wrong = {
        "fast_scheduler(pipe.scheduler), where pipe is this DDPMPipeline": pipeline,
        "pass an instance, DDPMScheduler.from_config(pipe.scheduler.config)": DDPMScheduler,
        "pass the scheduler that has this config": scheduler.config,
        "DDIMScheduler.from_pretrained(PATH, subfolder='scheduler')": "path/of/a/pipeline",
        "got None: pass pipe.scheduler": None,
    }
    for remedy, given_instead in wrong.items():
        with pytest.raises(TypeError, match="scheduler must be one of diffusers, got") as caught:
            fast_scheduler(given_instead)
        assert remedy in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 230
