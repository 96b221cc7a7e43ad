"""What the model is told where that is not the timestep visited.

The oracle is a plain sampler with a model that looks up for itself what it should have been told.
"""

import numpy as np
import pytest
import torch

import ddim_fast as df
from ddim_fast.generation.settings import plan_settings
from ddim_fast.gpu_lab.replay import RecordedGraphs
from ddim_fast.plans.files import TimestepList
from ddim_fast.plans.timesteps import explicit_model_timesteps
from ddim_fast.sampling.capture import GraphCache

LINEAR = df.NoiseSchedule.linear()
SHAPE = (2, 3, 4)
VISITED = (900, 700, 420, 50)
TOLD = (650, 720, 300, 0)  # in no order, below and above
INSTEAD = dict(zip(VISITED, TOLD, strict=True))


def wavy(x, t, label=0.0):
    return 0.9 * torch.tanh(x * (0.6 + t.to(x.dtype).view(-1, 1, 1) / 700)) + 0.2 + label


def looked_up(x, t, label=0.0):
    return wavy(x, torch.tensor([INSTEAD[int(one)] for one in t]), label)


def samplers(**options):
    """One that tells the model other timesteps, and one that does not."""
    return (
        df.DDIMSampler(LINEAR, timesteps=VISITED, model_timesteps=TOLD, **options),
        df.DDIMSampler(LINEAR, timesteps=VISITED, **options),
    )


@pytest.mark.parametrize("options", [{}, {"eta": 1.0}, {"order": 2}, {"clip_sample": True}, {"thresholding": True}])
@pytest.mark.parametrize(
    "call",
    [
        {},
        {"guidance_scale": 2.0, "conditioning": {"label": 0.3}, "unconditional_conditioning": {"label": -0.1}},
        {"return_trajectory": True},
        {"model_dtype": torch.bfloat16},
    ],
)
def test_the_model_is_told_other_timesteps(options, call):
    told, plain = samplers(**options)
    got, expected = (
        sampler.sample(model, SHAPE, seed=3, **call) for sampler, model in ((told, wavy), (plain, looked_up))
    )
    if "return_trajectory" in call:
        assert got.timesteps == expected.timesteps == list(VISITED)
        got, expected = torch.stack(got.x_t), torch.stack(expected.x_t)
    assert torch.equal(got, expected)
    assert not torch.equal(
        got, samplers(**options)[1].sample(wavy, SHAPE, seed=3, **(call | {"return_trajectory": False}))
    )


@pytest.mark.parametrize("mode", ["step", "loop"])
def test_captured(mode):
    told, plain = samplers(graphs=GraphCache(2, lambda device: RecordedGraphs(), ("cpu",)))

    class Wavy(torch.nn.Module):
        def forward(self, x, t):
            return wavy(x, t)

    model = Wavy()
    for sampler, expected in ((plain, wavy), (told, looked_up), (plain, wavy)):
        assert torch.equal(
            sampler.sample(model, SHAPE, seed=1, capture=mode), plain.sample(expected, SHAPE, seed=1, capture="off")
        )


def test_in_parallel_and_backwards():
    told, plain = samplers()
    assert torch.equal(told.sample_parallel(wavy, SHAPE, seed=2, tolerance=0.0), plain.sample(looked_up, SHAPE, seed=2))
    x0 = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(told.invert(wavy, x0, iterations=3), plain.invert(looked_up, x0, iterations=3))
    for edit in (
        lambda sampler, model: sampler.img2img(model, x0, strength=0.5, seed=1),
        lambda sampler, model: sampler.inpaint(model, x0, mask=torch.ones(SHAPE) / 2, seed=1),
    ):
        assert torch.equal(edit(told, wavy), edit(plain, looked_up))


def test_whoever_else_asks_is_told_the_timestep_visited():
    told, plain = samplers()
    seen = {"callback": [], "cond_fn": [], "scale": []}

    def cond_fn(x, t, label):
        seen["cond_fn"].append(int(t[0]))
        return 0.1 * x

    def scale(t):
        seen["scale"].append(t)
        return 1.5

    call = dict(
        seed=0,
        conditioning={"label": 0.2},
        unconditional_conditioning={"label": 0.0},
        cond_fn=cond_fn,
        guidance_scale=scale,
    )
    got = told.sample(wavy, SHAPE, callback=lambda i, t, x, x0: seen["callback"].append(t), **call)
    assert seen == {who: list(VISITED) for who in seen}
    assert torch.equal(got, plain.sample(looked_up, SHAPE, **call))


def test_the_last_steps_keep_theirs():
    assert samplers()[0].last_steps(2).plan().model_timesteps == TOLD[-2:]
    assert samplers()[1].last_steps(2).plan().model_timesteps == VISITED[-2:]


def test_a_plan_differs_by_what_the_model_is_told_alone():
    told, plain = (sampler.plan() for sampler in samplers())
    assert told != plain
    assert [step.coefficients for step in told.steps] == [step.coefficients for step in plain.steps]
    assert [step.t for step in told.steps] == list(VISITED)
    assert [step.model_timestep for step in told.steps] == list(TOLD)
    assert [step.model_timestep for step in plain.steps] == list(VISITED)


def test_the_list_of_a_file_and_ones_own():
    found = TimestepList(VISITED, 1000, LINEAR.digest, model_timesteps=np.array(TOLD))
    assert found.model_timesteps == TOLD
    assert df.DDIMSampler(LINEAR, timesteps=found).plan().model_timesteps == TOLD
    assert df.DDIMSampler(LINEAR, timesteps=found, model_timesteps=VISITED).plan().model_timesteps == VISITED
    for own in (list(TOLD), np.array(TOLD), torch.tensor(TOLD)):
        assert df.DDIMSampler(LINEAR, timesteps=VISITED, model_timesteps=own).plan().model_timesteps == TOLD


def test_settings_say_it_where_it_is_so():
    told, plain = (plan_settings(sampler, wavy) for sampler in samplers())
    assert told.pop("model_timesteps") == list(TOLD)  # as JSON has it
    assert told == plain


@pytest.mark.parametrize(
    ("model_timesteps", "error", "said"),
    [
        (
            (1, 2, 3),
            ValueError,
            r"must be 4 integers, one for each timestep visited, in \[0, 999\], got \[1, 2, 3\]",
        ),
        ((1, 2, 3, 1000), ValueError, r"in \[0, 999\], got \[1, 2, 3, 1000\]"),
        ((1, 2, 3, -1), ValueError, r"got \[1, 2, 3, -1\]"),
        ((1, 2, 3, 4.5), TypeError, "model_timesteps"),
        ((1, 2, 3, True), TypeError, "model_timesteps"),
        ("1234", TypeError, "model_timesteps"),
        (7, TypeError, "model_timesteps"),
    ],
)
def test_errors(model_timesteps, error, said):
    with pytest.raises(error, match=said):
        df.DDIMSampler(LINEAR, timesteps=VISITED, model_timesteps=model_timesteps)
    with pytest.raises(error, match=said):
        explicit_model_timesteps(model_timesteps, 4, 1000)
    with pytest.raises(error, match=said):
        df.SamplingPlan(LINEAR, VISITED, model_timesteps=model_timesteps)
