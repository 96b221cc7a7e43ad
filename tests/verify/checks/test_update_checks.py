"""The checks of steps and observed runs: they pass right subjects, and explain what is wrong."""

import math

import pytest
import torch

from ddim_fast.kernels.dispatch import ddim_step
from ddim_fast.verify.checks import CHECKS
from ddim_fast.verify.reports.report import Outcome
from ddim_fast.verify.run import run_check
from ddim_fast.verify.subjects.adapters import subject_of
from ddim_fast.verify.subjects.backends import Backend

STEP_CHECKS = ("update", "observed-update", "endpoints", "update-with-noise", "eta-convention", "ddpm")


def result_of(value, name, full=False, **attributes):
    subject = subject_of(value)
    for attribute, to in attributes.items():
        setattr(subject, attribute, to)
    return run_check(CHECKS[name], subject, full, 0, torch.device("cpu"))


def variance_of(alpha_bar_t, alpha_bar_prev):
    return (1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev)


def paper_std_dev(alpha_bar_t, alpha_bar_prev, eta):
    return eta * math.sqrt(variance_of(alpha_bar_t, alpha_bar_prev))


def room(alpha_bar_prev, std_dev):
    return math.sqrt(max(1 - alpha_bar_prev - std_dev**2, 0))


def step_with(std_dev=paper_std_dev, room=room, of_x0=math.sqrt):
    """A textbook step, each part of which can be replaced."""

    def step(x_t, model_output, alpha_bar_t, alpha_bar_prev, eta=0.0, noise=None):
        x0 = (x_t - math.sqrt(1 - alpha_bar_t) * model_output) / math.sqrt(alpha_bar_t)
        std = std_dev(alpha_bar_t, alpha_bar_prev, eta)
        x_prev = of_x0(alpha_bar_prev) * x0 + room(alpha_bar_prev, std) * model_output
        return x_prev if noise is None else x_prev + std * noise

    return step


def drawing(step):
    """The same with its own noise."""

    def draws(x_t, model_output, alpha_bar_t, alpha_bar_prev, eta=0.0, generator=None):
        noise = torch.randn(x_t.shape, generator=generator)
        return step(x_t, model_output, alpha_bar_t, alpha_bar_prev, eta, noise)

    return draws


def sampler_with(step=None, last=1.0, count=lambda timesteps: timesteps):
    """A textbook sampler in float32."""
    step = step or step_with()

    def sample(model, x_T, alphas_cumprod, timesteps, eta=0.0):
        bars = alphas_cumprod.float().double().tolist()
        timesteps = count(timesteps)
        x = x_T
        for t, t_prev in zip(timesteps, [*timesteps[1:], None], strict=True):
            output = model(x, torch.full((len(x),), t))
            noise = torch.randn_like(x) if eta else None
            x = step(x, output, bars[t], last if t_prev is None else bars[t_prev], eta, noise)
        return x

    return sample


def of_variance(alpha_bar_t, alpha_bar_prev, eta):
    return math.sqrt(eta * variance_of(alpha_bar_t, alpha_bar_prev))


def squared(alpha_bar_t, alpha_bar_prev, eta):
    return paper_std_dev(alpha_bar_t, alpha_bar_prev, eta) ** 2


def deaf(alpha_bar_t, alpha_bar_prev, eta):
    return math.sqrt(variance_of(alpha_bar_t, alpha_bar_prev)) if eta else 0.0


def of_beta(alpha_bar_t, alpha_bar_prev, eta):
    return eta * math.sqrt(1 - alpha_bar_t / alpha_bar_prev)


def silent(alpha_bar_t, alpha_bar_prev, eta):
    return 0.0


# --- Right ones pass --------------------------------------------------------------------------------------------------

RIGHT = {"given noise": step_with, "own noise": lambda: drawing(step_with()), "sampler": sampler_with}


@pytest.mark.parametrize("name", STEP_CHECKS)
@pytest.mark.parametrize("form", RIGHT)
def test_a_textbook_passes(form, name):
    result = result_of(RIGHT[form](), name)
    lacking = (form == "sampler" and name == "update") or (form != "given noise" and name == "update-with-noise")
    assert result.outcome is (Outcome.NOT_APPLICABLE if lacking else Outcome.PASSED), result.message


@pytest.mark.parametrize("name", [*STEP_CHECKS, "guidance", "thresholds", "inpainting"])
@pytest.mark.parametrize("seed", [0, 1])
def test_our_backend_passes(name, seed):
    result = run_check(CHECKS[name], Backend("cpu"), False, seed, torch.device("cpu"))
    assert result.outcome is Outcome.PASSED, result.message
    assert 0 < result.worst < 0.9


@pytest.mark.parametrize("form", RIGHT)
def test_the_other_convention_is_right_where_it_is_declared(form):
    forms = {
        "given noise": step_with(of_variance),
        "own noise": drawing(step_with(of_variance)),
        "sampler": sampler_with(step_with(of_variance)),
    }
    result = result_of(forms[form], "eta-convention", eta_scales="variance")
    assert result.outcome is Outcome.PASSED, result.message


# --- Wrong ones fail --------------------------------------------------------------------------------------------------

STD_DEVS = {
    of_variance: 'declare it: eta_scales="variance"',
    squared: "a square root is missing",
    deaf: "does not depend on eta",
    of_beta: "larger of DDPM's two choices",
    silent: "No noise is added",
}


@pytest.mark.parametrize("form", RIGHT)
@pytest.mark.parametrize("std_dev", STD_DEVS, ids=lambda f: f.__name__)
def test_what_the_noise_is_scaled_by_is_told(std_dev, form):
    step = step_with(std_dev)
    result = result_of(
        {"given noise": step, "own noise": drawing(step), "sampler": sampler_with(step)}[form], "eta-convention"
    )
    assert result.outcome is Outcome.FAILED
    assert STD_DEVS[std_dev] in result.message


def test_the_paper_is_wrong_where_the_variance_is_declared_to_be_scaled():
    result = result_of(step_with(), "eta-convention", eta_scales="variance")
    assert result.outcome is Outcome.FAILED
    assert 'declare it: eta_scales="std_dev"' in result.message


@pytest.mark.parametrize("form", RIGHT)
@pytest.mark.parametrize("std_dev", [squared, of_beta], ids=lambda f: f.__name__)
def test_ddpm_has_this_variance(std_dev, form):
    step = step_with(std_dev)
    result = result_of({"given noise": step, "own noise": drawing(step), "sampler": sampler_with(step)}[form], "ddpm")
    assert result.outcome is Outcome.FAILED
    assert "q(x_s | x_t, x0)" in result.message


@pytest.mark.parametrize("form", RIGHT)
def test_ddpm_has_this_mean(form):
    """The direction term takes no notice of the noise: the mean is wrong, the variance right."""
    step = step_with(room=lambda alpha_bar_prev, std_dev: math.sqrt(1 - alpha_bar_prev))
    result = result_of({"given noise": step, "own noise": drawing(step), "sampler": sampler_with(step)}[form], "ddpm")
    assert result.outcome is Outcome.FAILED
    assert "mean" in result.message
    if form == "given noise":
        assert result_of(step, "update-with-noise").outcome is Outcome.FAILED
        assert result_of(step, "update").outcome is Outcome.PASSED
        assert result_of(step, "eta-convention").outcome is Outcome.PASSED


def test_update_with_noise_names_the_other_convention():
    result = result_of(step_with(of_variance), "update-with-noise")
    assert result.outcome is Outcome.FAILED
    assert 'declare it: eta_scales="variance"' in result.message


@pytest.mark.parametrize("form", ["given noise", "sampler"])
def test_noise_at_the_last_step_is_found(form):
    """From some floor below which the noise does not go."""

    def floored(alpha_bar_t, alpha_bar_prev, eta):
        return max(paper_std_dev(alpha_bar_t, alpha_bar_prev, eta), 1e-3 * eta)

    step = step_with(floored)
    result = result_of({"given noise": step, "sampler": sampler_with(step)}[form], "endpoints")
    assert result.outcome is Outcome.FAILED
    assert "must give the predicted x0" in result.message


def test_a_run_that_ends_before_clean_data_is_found():
    for name in ("endpoints", "observed-update"):
        result = result_of(sampler_with(last=0.9999), name)
        assert result.outcome is Outcome.FAILED


def test_a_step_to_its_own_level_changes_nothing():
    result = result_of(step_with(of_x0=lambda a: math.sqrt(a) * (1 + 2e-6 * (a < 1))), "endpoints")
    assert result.outcome is Outcome.FAILED
    assert "must give x_t back" in result.message


def from_the_alpha_before(x_t, model_output, alpha_bar_t, alpha_bar_prev, eta=0.0, noise=None):
    return step_with()(x_t, model_output, alpha_bar_t * 1.0002, alpha_bar_prev, eta, noise)


@pytest.mark.parametrize(
    "sample",
    [
        sampler_with(from_the_alpha_before),
        sampler_with(count=lambda timesteps: timesteps[:-1] or timesteps),
        sampler_with(count=lambda timesteps: [timesteps[0], *timesteps]),
        sampler_with(count=lambda timesteps: [max(t - 1, 0) for t in timesteps]),
    ],
    ids=["alpha_bar", "a step short", "a step twice", "shifted"],
)
def test_watched_steps_are_held_against_equation_12(sample):
    assert result_of(sample, "observed-update").outcome is Outcome.FAILED


class Meddling(Backend):
    """Changes an argument of few steps on the way to the kernel."""

    def __init__(self, argument, change):
        super().__init__("cpu")
        self.argument, self.change = argument, change

    def _step(self, *args, **options):
        if options.get(self.argument) is not None:
            options[self.argument] = self.change(options[self.argument])
        return ddim_step(*args, **options, backend="cpu")


@pytest.mark.parametrize(
    ("argument", "change", "name"),
    [
        ("guidance_scale", lambda w: 1 + w, "guidance"),
        ("guidance_scale", lambda w: 1 - w, "guidance"),
        ("model_output_uncond", torch.zeros_like, "guidance"),
        ("thresholds", lambda s: torch.ones_like(s), "thresholds"),
        ("thresholds", lambda s: s.flip(0), "thresholds"),
        ("mask", lambda mask: 1 - mask, "inpainting"),
        ("mask", torch.round, "inpainting"),
        ("known_x0", lambda x: 1.001 * x, "inpainting"),
        ("known_noise", torch.zeros_like, "inpainting"),
    ],
)
def test_an_option_that_means_something_else_is_found(argument, change, name):
    result = run_check(CHECKS[name], Meddling(argument, change), False, 0, torch.device("cpu"))
    assert result.outcome is Outcome.FAILED
