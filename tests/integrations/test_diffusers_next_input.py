"""``scale_model_input`` of the drop-ins with sigmas: what a step has written, where a loop gives it the very x_prev, and only there."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import EDMEulerScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from layouts import assert_laid_out_alike

import ddim_fast.integrations.diffusers as drop_ins
from ddim_fast.integrations.diffusers import next_input

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers and NumPy

ORIGINALS = [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, EDMEulerScheduler]
PAIRS = {original: getattr(drop_ins, f"Fast{original.__name__}") for original in ORIGINALS}
SHAPE = (2, 3, 4, 5)


@pytest.fixture(autouse=True)
def _of_any_size(monkeypatch):
    monkeypatch.setattr(next_input, "_WORTH_IT", 0)


def draw(seed, dtype=torch.float32):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ready(kind, steps=6, **config):
    scheduler = kind(**config)
    scheduler.set_timesteps(steps)
    return scheduler


def c_in(scheduler, index):
    data = float(getattr(scheduler.config, "sigma_data", 1.0))
    return 1 / (scheduler.sigmas[index].double() ** 2 + data**2).sqrt()


def loop(scheduler, dtype, between=lambda x: x):
    """Return each model's input, and whether the step had written it."""
    torch.manual_seed(0)
    x, inputs, written = draw(0) * 14, [], []
    for i, t in enumerate(scheduler.timesteps):
        kept = getattr(scheduler, "_written", None)
        model_input = scheduler.scale_model_input(x, t)
        inputs.append(model_input)
        written.append(kept is not None and model_input is kept.model_input)
        x = between(scheduler.step(draw(i + 1, dtype), t, x, return_dict=False)[0])
    return inputs, written


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("original", ORIGINALS)
def test_a_loop_reads_what_the_steps_wrote(original, dtype):
    expected, _ = loop(ready(original), dtype)
    scheduler = ready(PAIRS[original])
    found, written = loop(scheduler, dtype)
    assert written == [False, False, True, True, True, True]  # known from the second call on
    assert_laid_out_alike(found, expected, ("contiguous", dtype))


@pytest.mark.parametrize("original", ORIGINALS)
def test_it_is_c_in_times_x_prev_in_float64_rounded_once(original):
    scheduler = ready(PAIRS[original])
    x = draw(0)
    for i, t in enumerate(scheduler.timesteps[:4]):
        scheduler.scale_model_input(x, t)
        x = scheduler.step(draw(i + 1), t, x).prev_sample
    exact = c_in(scheduler, 4) * x.double()
    found = scheduler.scale_model_input(x, scheduler.timesteps[4]).double()
    assert ((found - exact).abs() <= 2 * torch.finfo(torch.float32).eps * exact.abs()).all()


def written_as_often(scheduler, x):
    other = torch.ones_like(x)
    while other._version < x._version:
        other.fill_(1.0)
    return other


CHANGES = {
    "another tensor, written as often": written_as_often,
    "another tensor": lambda s, x: x.clone(),
    "both halves of guidance": lambda s, x: torch.cat([x, x]),
    "written in place": lambda s, x: x.mul_(2),
    "a view": lambda s, x: x[:],
}


@pytest.mark.parametrize("original", ORIGINALS)
@pytest.mark.parametrize("change", CHANGES)
def test_anything_else_is_scaled_as_by_the_original(original, change):
    results = []
    for kind in (original, PAIRS[original]):
        scheduler = ready(kind)
        torch.manual_seed(0)
        x = draw(0)
        for i, t in enumerate(scheduler.timesteps[:3]):
            scheduler.scale_model_input(x, t)
            x = scheduler.step(draw(i + 1), t, x).prev_sample
        x = CHANGES[change](scheduler, x)
        results.append(scheduler.scale_model_input(x, scheduler.timesteps[3]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("original", ORIGINALS)
def test_sigmas_and_indices_that_change_between_are_followed(original):
    for change in (
        lambda s: s.sigmas.mul_(1.5),
        lambda s: setattr(s, "sigmas", s.sigmas * 2),
        lambda s: setattr(s, "_step_index", s._step_index - 1),
    ):
        scheduler = ready(PAIRS[original])
        x = draw(0)
        for i, t in enumerate(scheduler.timesteps[:3]):
            scheduler.scale_model_input(x, t)
            x = scheduler.step(draw(i + 1), t, x).prev_sample
        change(scheduler)
        exact = c_in(scheduler, scheduler._step_index) * x.double()
        found = scheduler.scale_model_input(x, scheduler.timesteps[3])
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("original", ORIGINALS)
def test_a_copy_starts_anew_and_nothing_is_kept_alive(original):
    scheduler = ready(PAIRS[original])
    loop(scheduler, torch.float32)
    again = copy.deepcopy(scheduler)
    assert again._written is None
    assert again._last_x_prev is None
    assert scheduler._last_x_prev() is None  # the last x_prev is the loop's alone


@pytest.mark.parametrize("original", ORIGINALS)
def test_guidance_in_one_batch_costs_the_steps_nothing(original, monkeypatch):
    scheduler = ready(PAIRS[original])
    inputs = []
    monkeypatch.setattr(next_input, "_Written", lambda *_: pytest.fail("a step wrote an input that nobody reads"))
    x = draw(0)
    for i, t in enumerate(scheduler.timesteps):
        inputs.append(scheduler.scale_model_input(torch.cat([x, x]), t))
        x = scheduler.step(draw(i + 1), t, x).prev_sample
    assert all(model_input.shape[0] == 4 for model_input in inputs)


@pytest.mark.parametrize("original", ORIGINALS)
def test_where_gradients_or_inference_tensors_are_the_original_scales(original):
    for mode in (torch.enable_grad, torch.inference_mode):
        scheduler = ready(PAIRS[original])
        with mode():
            x = draw(0).requires_grad_(mode is torch.enable_grad)
            for i, t in enumerate(scheduler.timesteps[:4]):
                scheduler.scale_model_input(x, t)
                x = scheduler.step(draw(i + 1), t, x).prev_sample
            assert scheduler._written is None
            assert scheduler.scale_model_input(x, scheduler.timesteps[4]).requires_grad == x.requires_grad
