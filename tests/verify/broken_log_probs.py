"""Log-probabilities that are wrong on purpose, as in ``broken_subjects``; ``gaussian_step`` is right."""

from __future__ import annotations

import math

import torch
from verify.broken_subjects import Textbook, broken

from ddim_fast.verify.truth.cases import ScoredStep


def gaussian_step(
    x_t, model_output, alpha_bar_t, alpha_bar_prev, eta=0.0, noise=None, x_prev=None, log_prob_reduction="mean"
):
    """Right, in float32: a step with its log-probability, in the form of a function."""
    x, m = x_t.float(), model_output.float()
    x0 = (x - math.sqrt(1 - alpha_bar_t) * m) / math.sqrt(alpha_bar_t)
    std = eta * math.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev))
    mean = math.sqrt(alpha_bar_prev) * x0 + math.sqrt(max(1 - alpha_bar_prev - std**2, 0.0)) * m
    if x_prev is None:
        x_prev = (mean if noise is None else mean + std * noise).to(x_t.dtype)
    if std == 0:
        return x_prev, None
    each = -((x_prev.detach().float() - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
    each = each.reshape(len(x), math.prod(x.shape[1:]))
    return x_prev, each.sum(1) if log_prob_reduction == "sum" else each.mean(1)


@broken("log(std_dev_t) is forgotten", "log-prob", "log-prob-integral")
class NoLogStd(Textbook):
    def log_density(self, deviation, std):
        return super().log_density(deviation, std) + math.log(std)


@broken("log(2 pi) / 2 is forgotten", "log-prob", "log-prob-integral")
class NoLogPi(Textbook):
    def log_density(self, deviation, std):
        return super().log_density(deviation, std) + 0.5 * math.log(2 * math.pi)


@broken("all that does not depend on the model is forgotten", "log-prob", "log-prob-integral", "log-prob-gradient")
class SquaresAlone(Textbook):
    def log_density(self, deviation, std):
        return -(deviation**2)


@broken(
    "the square is divided by twice the standard deviation",
    "log-prob",
    "log-prob-integral",
    "log-prob-gradient",
    "log-prob-constant",
)
class DividedByStd(Textbook):
    def log_density(self, deviation, std):
        return super().log_density(deviation / math.sqrt(std) * std, std)


@broken("the standard deviation is taken for the variance", "log-prob", "log-prob-gradient")
class StdForVariance(Textbook):
    def log_density(self, deviation, std):
        return super().log_density(deviation, math.sqrt(std))


@broken("the sum over the elements, declared as their mean", "log-prob", "log-prob-reduction", "log-prob-gradient")
class SumForMean(Textbook):
    def reduced(self, each, reduction, dtype):
        return super().reduced(each, "sum", dtype)


@broken("the mean over the elements, where their sum is asked for", "log-prob-reduction")
class MeanForSum(Textbook):
    def reduced(self, each, reduction, dtype):
        return super().reduced(each, "mean", dtype)


@broken("the noise that was drawn in the place of x_prev - mean", "log-prob-ratio", "log-prob-half")
class NoiseForDeviation(Textbook):
    def step_with_log_prob(self, case):
        _, std = self.distribution(case)
        if std == 0:
            raise ValueError("no noise, no density")
        each = self.log_density(self.added(case, std), std)
        return ScoredStep(self.step(case).x_prev, self.reduced(each.flatten(1), "mean", case.dtype))


@broken("x_prev is not detached: the gradient flows through it, too", "log-prob-constant", "log-prob-gradient")
class GradientThroughXPrev(Textbook):
    def sampled(self, x_prev):
        return x_prev


@broken("no gradient at all", "log-prob-constant", "log-prob-gradient")
class NoGradient(Textbook):
    def log_prob(self, case, x_prev):
        with torch.no_grad():
            return super().log_prob(case, x_prev)


@broken("the density has the other convention of eta than the step", "log-prob")
class OtherEtaInDensity(Textbook):
    def distribution(self, case):
        return super().distribution(case.but(setting=case.setting.but(eta=math.sqrt(case.setting.eta))))


@broken("elements are added in bfloat16", "log-prob", "log-prob-half")
class AddedInBFloat16(Textbook):
    def reduced(self, each, reduction, dtype):
        return super().reduced(each, reduction, dtype).bfloat16().float()


@broken("a log-probability has the type of the samples", "log-prob-half")
class ResultInHalfPrecision(Textbook):
    def reduced(self, each, reduction, dtype):
        return super().reduced(each, reduction, dtype).to(dtype)


@broken("the row is that of the previous step", "log-prob", "log-prob-gradient")
class StaleRow(Textbook):
    def distribution(self, case):
        return super().distribution(case.but(index=max(case.index - 1, 0)))


@broken("x0 is not clipped in the density", "log-prob")
class UnclippedDensity(Textbook):
    def distribution(self, case):
        unclipped = case.setting.but(clip_sample_range=None, use_clipped_model_output=False)
        return super().distribution(case.but(setting=unclipped))


@broken("a least standard deviation that is not declared", "log-prob", "log-prob-no-noise")
class UndeclaredMinStd(Textbook):
    def distribution(self, case):
        mean, std = super().distribution(case)
        return mean, max(std, 0.3)


@broken("the logarithm of 0 where a step adds no noise", "log-prob-no-noise")
class InfiniteDensity(Textbook):
    def distribution(self, case):
        mean, std = super().distribution(case)
        return mean, max(std, 5e-324)


@broken("the sum depends on what ran before", "log-prob-ratio")
class AnotherOrder(Textbook):
    calls = 0

    def reduced(self, each, reduction, dtype):
        self.calls += 1
        each = each.float().roll(self.calls, 1)
        return super().reduced(each[:, :50], reduction, dtype) + super().reduced(each[:, 50:], reduction, dtype)


@broken("one log-probability for the whole batch", "log-prob")
class ForTheBatch(Textbook):
    def reduced(self, each, reduction, dtype):
        return super().reduced(each.reshape(1, -1), reduction, dtype)
