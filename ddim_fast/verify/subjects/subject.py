"""What can be verified: the one face that every kind of sampler is given, and nothing of what is right.

A subject says by its ``features`` what it offers. Checks that need more do not apply to it. An adapter of your own is a subclass of
``Subject``; give it to ``verify`` as it is, or name it on the command line as ``module:attribute``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..truth.cases import Level, Model, Observed, Setting, StepCase, StepResult

FEATURES = {
    "step": "single steps can be made, in any order",
    "levels": "steps between any two noise levels, not only those of a schedule",
    "timesteps": "it chooses the timesteps, from their number and spacing",
    "num_train_timesteps": "schedules may have any number of timesteps, not only 1000",
    "explicit_timesteps": "it takes a list of timesteps",
    "eta": "it can add noise",
    "given_noise": "noise can be given as a tensor",
    "draws_noise": "it draws its noise itself, from a seed",
    "seeds": "a sample's noise depends on its own seed",
    "x0": "a step tells the predicted x0",
    "epsilon": "models that predict eps",
    "sample": "models that predict x0",
    "v_prediction": "models that predict v",
    "clip": "the predicted x0 can be clipped",
    "clip_range": "to another bound than 1, too",
    "use_clipped_model_output": "eps can be derived again from the clipped x0",
    "zero_terminal_snr": "schedules that end in pure noise",
    "in_place": "the result can be written over the samples",
    "guidance": "the guided output is computed by the step",
    "thresholds": "x0 can be scaled by a threshold for each sample",
    "inpainting": "a known region can be blended in by the step",
    "float64": "computes in double precision",
    "half": "takes float16 and bfloat16",
    "invert": "finds the noise that a sample comes from",
    "torch": "is made of torch's operators, so that a fake device can run it",
    "no_waiting": "steps on a GPU never wait for it, and copy nothing between host and device",
    "no_allocation": "steps in place allocate nothing",
}
"""What a subject may offer."""

ARITHMETIC = {
    "exact": "coefficients in float64, half precision computed in float32 and rounded once",
    "float32": "coefficients worked out in float32, half precision computed as such",
}
"""How exact a subject claims to be. It is held to that."""


class Subject:
    """What is verified. A subclass overrides ``step`` or ``sample``, and what else it differs in.

    Attributes:
        name: of this subject, in reports.
        features: keys of ``FEATURES``.
        arithmetic: a key of ``ARITHMETIC``.
        eta_scales: what its eta multiplies: "std_dev" (the paper), or "variance".
        ends_clean: its last step goes to clean data; False for one that goes to alpha_bar_0 (``set_alpha_to_one=False``).
        spacings: the values of ``Setting.timestep_spacing`` that it can be asked for; none where it has one of its own.
        schedules: likewise of ``Setting.schedule``; none where it has one of its own.
        steps_offset: what it adds to the timesteps of "leading".
        slow: a step takes 10 ms or more: the quick set makes fewer.
        own_alphas_cumprod: it works with a table of its own, in float32, which ``levels`` cannot tell exactly.
    """

    name = "subject"
    features: frozenset[str] = frozenset()
    arithmetic = "float32"
    eta_scales = "std_dev"
    ends_clean = True
    spacings: tuple[str, ...] = ("leading", "trailing", "linspace")
    schedules: tuple[str, ...] = ("linear", "scaled_linear", "cosine")
    steps_offset = 0
    slow = False
    own_alphas_cumprod = False

    def levels(self, setting: Setting) -> tuple[Level, ...]:
        """The steps of a setting: the timesteps that the subject chooses, each to the next, and its own alpha_bar of each."""
        return setting.levels()

    def step(self, case: StepCase) -> StepResult:
        """One step. Needed for the feature "step"."""
        raise NotImplementedError

    def source(self, seed: int, batch_size: int) -> Any:
        """Where one run of ``batch_size`` samples gets its noise from: a ``torch.Generator``, unless overridden."""
        return torch.Generator().manual_seed(seed)

    def sample(self, setting: Setting, model: Model, x_T: Tensor, source: Any) -> Tensor:
        """A whole run. The steps one after the other, unless overridden."""
        x_t = x_T
        for index, level in enumerate(self.levels(setting)):
            output = model(x_t, torch.full((len(x_t),), level.t, device=x_t.device))
            x_t = self.step(StepCase(setting, index, x_t, output, source=source)).x_prev
        return x_t

    def invert(self, setting: Setting, model: Model, x0: Tensor) -> Tensor:
        """x_T of clean samples. Needed for the feature "invert"."""
        raise NotImplementedError

    def on_gpu(self) -> Subject:
        """The subject for tensors on a GPU, which may be a pretended one."""
        return self

    def code(self, case: StepCase) -> str:
        """Python that makes the step of a case and leaves ``x_prev``; it finds torch and the case's tensors defined."""
        raise NotImplementedError

    def observe(self, setting: Setting, model: Model, x_T: Tensor, source: Any) -> list[Observed]:
        """A whole run, watched through the calls of its model."""
        seen, outputs = [], []

        def watched(x_t: Tensor, t: Tensor) -> Tensor:
            seen.append((x_t.clone(), float(t.reshape(-1)[0])))
            outputs.append(model(x_t, t).clone())
            return outputs[-1].clone()

        last = self.sample(setting, watched, x_T.clone(), source)
        levels = self.levels_seen(setting, [t for _, t in seen])
        states = [x for x, _ in seen] + [last]
        steps = zip(levels, states, outputs, states[1:], strict=False)
        return [Observed(level, x_t, output, x_prev) for level, x_t, output, x_prev in steps]

    def levels_seen(self, setting: Setting, timesteps: list[float]) -> tuple[Level, ...]:
        """The steps of a run whose model was given these timesteps."""
        return self.levels(setting)
