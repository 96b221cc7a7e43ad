"""Samplers on paths other than the discrete variance-preserving one that are wrong on purpose, as
in ``broken_subjects``; ``TextbookPath`` is right."""

from __future__ import annotations

import functools
import math

import torch
from verify.broken_subjects import BROKEN, Broken

from ddim_fast.verify.subjects.subject import Subject
from ddim_fast.verify.truth import oracle
from ddim_fast.verify.truth.cases import Level, Setting, StepCase, StepResult

FLOW, EDM, VE, VP, COSINE = PATHS = (
    Setting(schedule="flow?shift=3", prediction_type="flow"),
    Setting(schedule="edm", prediction_type="edm"),
    Setting(schedule="ve", prediction_type="score"),
    Setting(schedule="vp", prediction_type="epsilon"),
    Setting(schedule="trigonometric", prediction_type="v_prediction"),
)


class TextbookPath(Subject):
    """Right. All in float64, rounded once; with each thing that can go wrong in a method."""

    name = "textbook on a path"
    arithmetic = "exact"
    paths = PATHS
    schedules = ()
    features = frozenset(
        {"step", "levels", "timesteps", "explicit_timesteps", "x0", "eta", "given_noise", "draws_noise"}
    ) | {path.prediction_type for path in PATHS}

    def times(self, setting):
        return setting.path.times(setting.num_inference_steps)

    def level_at(self, setting, t):
        return setting.level_at(t)

    @functools.lru_cache(64)  # noqa: B019 (a few subjects, in a test)
    def levels(self, setting):
        if setting.alpha_bars is not None:
            return setting.levels()
        times = [*(setting.timesteps or self.times(setting)), 0.0]
        at = [*(self.level_at(setting, t) for t in times[:-1]), oracle.NoiseLevel(1.0, 0.0)]
        return tuple(Level(*pair) for pair in zip(times[:-1], times[1:], at[:-1], at[1:], strict=True))

    def told(self, setting, t):
        return setting.told(t)

    def input_scale(self, setting, t):
        return setting.input_scale(t)

    def goes_to(self, case, level):
        return level.level_prev

    def meaning(self, setting, x, m, level):
        return oracle.split(setting.prediction_type, x, m, level, setting.sigma_data)

    def std_dev(self, eta, level, target):
        return oracle.std_dev(level, target, eta)

    def combined(self, case, level, target, x, x0, eps, std):
        direction = math.sqrt(max(target.sigma**2 - std**2, 0.0))
        return target.alpha * x0 + direction * eps

    def step(self, case):
        level, x, m = self.levels(case.setting)[case.index], case.x_t.double(), case.model_output.double()
        target = oracle.alpha_sigma(self.goes_to(case, level))
        x0, eps = self.meaning(case.setting, x, m, level.level_t)
        std = self.std_dev(case.setting.eta, level.level_t, target)
        x_prev = self.combined(case, level, target, x, x0, eps, std)
        if std:
            drawn = case.noise
            if drawn is None:
                drawn = torch.randn(x.shape, generator=case.source, dtype=torch.float64)
            x_prev = x_prev + std * drawn.double()
        return StepResult(x_prev.to(case.dtype), x0.to(case.dtype))

    def sample(self, setting, model, x_T, source):
        x_t = x_T
        for index, level in enumerate(self.levels(setting)):
            scaled = (x_t.double() * self.input_scale(setting, level.t)).to(x_t.dtype)
            output = model(scaled, torch.full((len(x_t),), self.told(setting, level.t), dtype=torch.float32))
            x_t = self.step(StepCase(setting, index, x_t, output, source=source)).x_prev
        return x_t


def broken(what, *caught_by, paths=PATHS):
    """Decorator: this subclass of ``TextbookPath`` is wrong, on these paths."""

    def register(kind):
        kind.name = "path:" + "".join(f" {c.lower()}" if c.isupper() else c for c in kind.__name__)
        kind.paths = paths
        BROKEN.append(Broken(kind.name, kind, what, caught_by))
        return kind

    return register


@broken("the shift of flow matching is ignored", "timesteps", paths=(FLOW,))
class IgnoresShift(TextbookPath):
    def times(self, setting):
        return [1 - i / setting.num_inference_steps for i in range(setting.num_inference_steps)]


@broken("one step more than asked for", "timesteps", "observed-update", "model-input")
class OneStepMore(TextbookPath):
    def times(self, setting):
        return setting.path.times(setting.num_inference_steps + 1)


@broken("a run starts below the noisiest level", "timesteps", paths=(EDM,))
class StartsLower(TextbookPath):
    def times(self, setting):
        return [0.98 * t for t in super().times(setting)]


@broken(
    "each step goes one sigma further than it says", "update", "observed-update", "previous-timestep", "convergence"
)
class OneSigmaFurther(TextbookPath):
    def goes_to(self, case, level):
        if case.setting.alpha_bars is not None:
            return level.level_prev
        levels = self.levels(case.setting)
        return levels[min(case.index + 1, len(levels) - 1)].level_prev


@broken("the last step stops at the cleanest sigma", "endpoints", "whole-run", paths=(EDM, VE))
class StopsAtSigmaMin(TextbookPath):
    def goes_to(self, case, level):
        return oracle.NoiseLevel(1.0, 0.002) if level.level_prev.sigma == 0 else level.level_prev


@broken("a run says that it ends with noise left", "endpoints")
class SaysThatNoiseIsLeft(TextbookPath):
    def levels(self, setting):
        *levels, last = super().levels(setting)
        return (
            *levels,
            last._replace(level_prev=self.level_at(setting, last.t / 2) if last.t_prev == 0 else last.level_prev),
        )


@broken(
    "the level at a time is that of another path",
    "alphas-cumprod",
    "gaussian-marginals",
    paths=(COSINE,),
)
class LevelsOfAnotherPath(TextbookPath):
    def level_at(self, setting, t):
        return VP.level_at(t)


@broken("c_in is forgotten", "model-input", "observed-update", paths=(EDM,))
class ForgetsInputScale(TextbookPath):
    def input_scale(self, setting, t):
        return 1.0


@broken("c_in is that of the next level", "observed-update", paths=(EDM,))
class InputScaleOfAnotherLevel(TextbookPath):
    def input_scale(self, setting, t):
        return setting.input_scale(t if t == setting.path.first else 0.9 * t)


@broken("the model is told sigma where it is log(sigma) / 4", "model-input", paths=(EDM,))
class TellsSigma(TextbookPath):
    def told(self, setting, t):
        return t


@broken("the model is told 1000 t where it is t", "model-input", "whole-run", paths=(FLOW, VP))
class TellsThousandfold(TextbookPath):
    def told(self, setting, t):
        return 1000 * t


@broken("the velocity is taken as x0 - eps", "update", "gaussian-marginals", "convergence", paths=(FLOW,))
class Backwards(TextbookPath):
    def meaning(self, setting, x, m, level):
        return super().meaning(setting, x, -m if setting.prediction_type == "flow" else m, level)


@broken("the score is taken as -eps, without sigma", "update", "mixture-marginals", paths=(VE,))
class ScoreWithoutSigma(TextbookPath):
    def meaning(self, setting, x, m, level):
        kind = setting.prediction_type
        return super().meaning(setting, x, m / oracle.alpha_sigma(level).sigma if kind == "score" else m, level)


@broken("EDM's network is taken for the denoiser", "update", "convergence", paths=(EDM,))
class WithoutPreconditioning(TextbookPath):
    def meaning(self, setting, x, m, level):
        kind = setting.prediction_type
        return oracle.split("sample" if kind == "edm" else kind, x, m, level)


@broken("Euler's step is made in x_t and t, not along the path", "update", "observed-update", paths=(VP, COSINE))
class EulerInTime(TextbookPath):
    def combined(self, case, level, target, x, x0, eps, std):
        if case.setting.alpha_bars is not None or std or level.t_prev == 0:
            return super().combined(case, level, target, x, x0, eps, std)
        near = case.setting.level_at(level.t - 1e-6)
        here = level.level_t
        slope = (here.alpha - near.alpha) / 1e-6 * x0 + (here.sigma - near.sigma) / 1e-6 * eps
        return x + (level.t_prev - level.t) * slope


@broken("all the noise of the target is new, at any eta", "update-with-noise", "eta-convention", "gaussian-marginals")
class FreshNoiseAlone(TextbookPath):
    """diffusers' ``stochastic_sampling``."""

    def std_dev(self, eta, level, target):
        return target.sigma if eta else 0.0


@broken(
    "the noise is that of equation 16, whose alpha^2 + sigma^2 = 1 does not hold",
    "update-with-noise",
    "eta-convention",
    "ddpm",
    paths=(FLOW, EDM),
)
class NoiseOfTheVariancePreservingPath(TextbookPath):
    def std_dev(self, eta, level, target):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = oracle.alpha_sigma(level), target
        return eta * sigma_s / sigma_t * math.sqrt(1 - (alpha_t / alpha_s) ** 2) if sigma_s else 0.0


@broken("noise is added, but nothing taken from the predicted noise", "update-with-noise", "ddpm", "gaussian-marginals")
class NoRoomForNoise(TextbookPath):
    def combined(self, case, level, target, x, x0, eps, std):
        return super().combined(case, level, target, x, x0, eps, 0.0)


@broken("a solver of order 1 says that it is of order 2", "convergence", paths=(FLOW.but(order=2), EDM.but(order=2)))
class SaysOrderTwo(TextbookPath):
    order = 2
