"""Steps whose log-probability and divergence the tests know in float64, by the textbook."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from layouts import LAYOUTS

from ddim_fast.kernels.contract import StepCoefficients
from ddim_fast.kernels.dispatch import ddim_step
from ddim_fast.kernels.log_prob import ddim_kl, ddim_log_prob
from ddim_fast.verify.truth import oracle, tolerances
from ddim_fast.verify.truth.tolerances import to_numpy

F, H, B, D = torch.float32, torch.float16, torch.bfloat16, torch.float64
PAIRS = [(F, F), (H, H), (B, B), (F, H), (F, B)]
"""Dtypes of x_t and of the model's output that kernels take."""


def bits(tensor):
    return tensor.detach().contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()])


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


@dataclass
class Case:
    """One step with its tensors, and float64 results by the textbook."""

    row: dict
    x_t: torch.Tensor
    m: torch.Tensor
    x_prev: torch.Tensor
    reference: torch.Tensor
    keywords: dict
    reference_uncond: torch.Tensor | None
    reduction: str

    @property
    def coefficients(self):
        return StepCoefficients(**self.row)

    @property
    def std(self):
        return max(self.row["prev_noise"], self.keywords["min_std"] or 0.0)

    def mean(self, m, uncond):
        """The mean and the magnitudes of its terms, ``(B, n)`` float64."""
        exact = {} if uncond is None else {"uncond": to_numpy(uncond), "guidance": self.keywords["guidance_scale"]}
        result = oracle.row_step(self.row | {"prev_noise": 0.0}, to_numpy(self.x_t), to_numpy(m), **exact)
        return self.flat(result.x_prev), self.flat(result.terms)

    def flat(self, values):
        return values.reshape(len(values), math.prod(self.x_t.shape[1:]))

    @property
    def counted(self):
        mask = self.keywords["mask"]
        return self.flat(np.ones(self.x_t.shape) if mask is None else to_numpy(mask) == 0).astype(float)

    def log_prob(self):
        """The log-probability and the error allowed, ``(B,)``: log of the normal density, element by element."""
        mean, terms = self.mean(self.m, self.keywords["model_output_uncond"])
        deviation = (self.flat(to_numpy(self.x_prev)) - mean) * self.counted
        density = np.exp(-0.5 * (np.minimum(np.abs(deviation) / self.std, 20.0)) ** 2) / (
            self.std * math.sqrt(2 * math.pi)
        )
        beyond = 0.5 * np.maximum((deviation / self.std) ** 2 - 400.0, 0.0)  # where exp would underflow
        each = np.log(density) - beyond
        offset = math.log(self.std) + 0.5 * math.log(2 * math.pi)
        return self.reduced(each * self.counted, deviation, terms, offset)

    def kl(self):
        mean, terms = self.mean(self.m, self.keywords["model_output_uncond"])
        other, other_terms = self.mean(self.reference, self.reference_uncond)
        deviation = (other - mean) * self.counted
        return self.reduced(deviation**2 / (2 * self.std**2), deviation, terms + other_terms, 0.0)

    def reduced(self, each, deviation, terms, offset):
        allowed = tolerances.allowed_density_error(
            self.x_t.dtype, deviation, terms * self.counted, 0.5 / self.std**2, offset * self.counted.max(initial=0)
        )
        count = np.maximum(self.counted.sum(1), 1) if self.reduction == "mean" else 1.0
        return each.sum(1) / count, allowed / count

    def evaluate(self, backend, what="log_prob", **changed):
        options = self.keywords | changed
        if what == "log_prob":
            args = (self.x_prev, self.x_t, self.m, self.coefficients)
            return ddim_log_prob(*args, log_prob_reduction=self.reduction, backend=backend, **options)
        options |= {"model_output_ref_uncond": self.reference_uncond, "reduction": self.reduction}
        return ddim_kl(self.x_t, self.m, self.reference, self.coefficients, backend=backend, **options)


STEPS = [(0.98, 0.9995), (0.5, 0.6), (0.05, 0.09)]


def make(
    seed=0, shape=(2, 129), types=(F, F), prediction_type="epsilon", clip=math.inf, rederived=False, guidance=False,
    mask=False, reduction="mean", min_std=None, layout="contiguous",
):  # fmt: skip
    rng = np.random.default_rng(seed)
    state, output = types

    def tensor(dtype, scale=1.0):
        values = torch.from_numpy(rng.standard_normal(shape) * scale).to(dtype)
        return LAYOUTS[layout](values) if len(shape) > 2 and 0 not in shape else values

    level = STEPS[seed % len(STEPS)]
    row = oracle.textbook_row(prediction_type, *level, eta=1.0, clip=clip, use_clipped_model_output=rederived)
    x_t, m = tensor(state), tensor(output)
    uncond = tensor(output) if guidance else None
    keywords = {
        "model_output_uncond": uncond,
        "guidance_scale": 2.5 if guidance else None,
        "mask": (tensor(state) > 0.3).to(state) * tensor(state).abs().clamp(0.25, 1) if mask else None,
        "min_std": min_std,
    }
    reference = (m.double() + 0.1 * tensor(D)).to(output)
    reference_uncond = (uncond.double() + 0.1 * tensor(D)).to(output) if guidance else None
    guided = {"model_output_uncond": uncond, "guidance_scale": keywords["guidance_scale"]}
    x_prev = ddim_step(x_t, m, StepCoefficients(**row), noise=tensor(state), backend="reference", **guided)
    return Case(row, x_t, m, x_prev, reference, keywords, reference_uncond, reduction)
