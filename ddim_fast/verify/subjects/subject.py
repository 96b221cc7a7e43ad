"""The interface of everything that can be verified.

A subject lists what it offers in ``features``. Checks that need more do not apply to it. To verify
a sampler of another form, write a subclass of ``Subject``, and pass it to ``verify`` or name it on
the command line as ``module:attribute``.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor

from ..truth.cases import Level, Model, Observed, ScoredStep, Setting, StepCase, StepResult, unscaled

FEATURES = {
    "step": "makes single steps, in any order",
    "levels": "steps between any two noise levels, not only those of a schedule",
    "timesteps": "chooses the timesteps from their number and spacing",
    "num_train_timesteps": "takes schedules with any number of timesteps, not only 1000",
    "explicit_timesteps": "takes a list of timesteps",
    "eta": "can add noise",
    "given_noise": "takes noise as a tensor",
    "draws_noise": "draws its noise itself, from a seed",
    "seeds": "has a seed for each sample, which alone decides the sample's noise",
    "x0": "returns the predicted x0 of a step",
    "epsilon": "takes models that predict eps",
    "sample": "takes models that predict x0",
    "v_prediction": "takes models that predict v",
    "flow": "takes models that predict eps - x0",
    "score": "takes models that predict the score",
    "edm": "takes models that predict EDM's F",
    "orders": "can be a multistep solver of order 2 and 3",
    "clip": "can clip the predicted x0",
    "clip_range": "can clip it to bounds other than 1",
    "use_clipped_model_output": "can compute eps again from the clipped x0",
    "zero_terminal_snr": "takes schedules that end in pure noise",
    "in_place": "can write the result over the samples",
    "guidance": "applies classifier-free guidance in the step",
    "thresholds": "can scale x0 by a threshold for each sample",
    "inpainting": "can blend in a known region in the step",
    "log_prob": "returns the log-probability of the x_prev that a step draws",
    "given_x_prev": "returns the log-probability of an x_prev that is given",
    "log_prob_gradient": "has the gradient of these log-probabilities by the model's output",
    "log_prob_reduction": "takes the reduction of a log-probability over the elements: their mean, or their sum",
    "float64": "computes in double precision",
    "half": "takes float16 and bfloat16",
    "invert": "finds the noise that leads to a sample",
    "torch": "uses torch operators only, so that it runs on a fake device",
    "no_waiting": "makes steps on a GPU that never wait for it and copy nothing between host and device",
    "no_allocation": "makes steps in place that allocate nothing",
}
"""What a subject may offer."""

OLD_FEATURES = {"rederive": "use_clipped_model_output"}
"""The names that features had in ddim_fast 0.1. To be removed in 0.3."""

ARITHMETIC = {
    "exact": "coefficients in float64, half precision computed in float32 and rounded once",
    "float32": "coefficients in float32, half precision computed as such",
}
"""How exact a subject claims to be. The checks hold it to that."""


class Subject:
    """A sampler under test. A subclass overrides ``step`` or ``sample``, and what else is
    different.

    Attributes:
        name: its name in reports.
        features: keys of ``FEATURES``.
        arithmetic: a key of ``ARITHMETIC``.
        eta_scales: what its eta multiplies: "std_dev" (the paper's), or "variance". Of a subject
            with other noise, which does not offer "eta": "flow_grpo" or "cps"; its log-probabilities
            are checked at ``etas``.
        ends_clean: whether its last step goes to clean data; False where it goes to alpha_bar_0
            (``set_alpha_to_one=False``).
        spacings: the values of ``Setting.timestep_spacing`` that it takes; empty where it has a
            spacing of its own.
        schedules: the values of ``Setting.schedule`` that it takes; empty where it has a schedule
            of its own.
        paths: the settings that checks start from, one for each noise path: its schedule, and what
            models predict on it. Checks that hold on any path are made on each; others on the
            first.
        named_path: the one path that it was asked to be verified on, see ``on_path``.
        order: of its solver: 1 for DDIM, whose steps are equation 12; checks of single steps do not
            apply to others.
        etas: the values of eta that it takes; empty where it takes any.
        steps_offset: what it adds to the timesteps of "leading".
        slow: whether a step takes 10 ms or more: the quick set then makes fewer steps.
        own_alphas_cumprod: whether it uses a table of its own in float32, which ``levels`` does not
            give exactly.
        log_prob_reduction: what its log-probabilities are over the elements of a sample: their
            "mean", or their "sum".
        min_std: the least standard deviation that they are taken with; 0 for the step's own.
    """

    name = "subject"
    features: frozenset[str] = frozenset()
    arithmetic = "float32"
    eta_scales = "std_dev"
    ends_clean = True
    spacings: tuple[str, ...] = ("leading", "trailing", "linspace")
    schedules: tuple[str, ...] = ("linear", "scaled_linear", "cosine")
    paths: tuple[Setting, ...] = (Setting(),)
    named_path: Setting | None = None
    order = 1
    etas: tuple[float, ...] = ()
    steps_offset = 0
    slow = False
    own_alphas_cumprod = False
    log_prob_reduction = "mean"
    min_std = 0.0

    def levels(self, setting: Setting) -> tuple[Level, ...]:
        """Return the steps of a setting: the timesteps that the subject chooses, with its own
        alpha_bar of each."""
        return setting.levels()

    def on_path(self, path: Setting) -> Subject:
        """Return the subject with checks that start from this setting alone.

        Raises:
            ValueError: it has a path of its own.
        """
        subject = copy.copy(self)
        subject.paths, subject.named_path = (path,), path
        subject.features = self.features | {path.prediction_type}
        if path.path is not None:
            subject.schedules, subject.own_alphas_cumprod = (), False
        return subject

    def step(self, case: StepCase) -> StepResult:
        """Make one step. Needed for the feature "step"."""
        raise NotImplementedError

    def step_with_log_prob(self, case: StepCase) -> ScoredStep:
        """Make one step, and return the log-probability of the x_prev that it draws, too: by ``step``
        and ``log_prob``, unless overridden."""
        x_prev = self.step(case).x_prev
        return ScoredStep(x_prev, self.log_prob(case, x_prev))

    def log_prob(self, case: StepCase, x_prev: Tensor) -> Tensor:
        """Return the log-probability of a given x_prev under one step, ``(B,)``. Needed for the
        feature "given_x_prev"."""
        raise NotImplementedError

    def source(self, seed: int, batch_size: int) -> Any:
        """Return the source of noise of a run of ``batch_size`` samples: a ``torch.Generator``,
        unless overridden."""
        return torch.Generator().manual_seed(seed)

    def sample(self, setting: Setting, model: Model, x_T: Tensor, source: Any) -> Tensor:
        """Make a whole run: the steps one after the other, unless overridden."""
        x_t = x_T
        for index, level in enumerate(self.levels(setting)):
            output = model(*setting.model_input(level, x_t))
            x_t = self.step(StepCase(setting, index, x_t, output, source=source)).x_prev
        return x_t

    def invert(self, setting: Setting, model: Model, x0: Tensor) -> Tensor:
        """Return the x_T of clean samples. Needed for the feature "invert"."""
        raise NotImplementedError

    def on_gpu(self) -> Subject:
        """Return the subject for tensors on a GPU, real or fake."""
        return self

    def code(self, case: StepCase) -> str:
        """Return Python that assigns ``x_prev`` of a case, where torch and the case's tensors are
        defined."""
        raise NotImplementedError

    def observe(self, setting: Setting, model: Model, x_T: Tensor, source: Any) -> list[Observed]:
        """Make a whole run and return its steps, seen through the calls of its model.

        The model is called as the sampler calls it: see ``Setting.as_called``.
        """
        seen: list[tuple[Tensor, float]] = []
        outputs: list[Tensor] = []

        def watched(x_t: Tensor, t: Tensor) -> Tensor:
            seen.append((x_t.clone(), setting.time_told(float(t.reshape(-1)[0]))))
            outputs.append(model(x_t, t).clone())
            return outputs[-1].clone()

        last = self.sample(setting, watched, x_T.clone(), source)
        levels = self.levels_seen(setting, [t for _, t in seen])
        scales = [setting.input_scale(t) for _, t in seen]
        states = [unscaled(x, scale) for (x, _), scale in zip(seen, scales, strict=True)] + [last]
        steps = zip(levels, states, outputs, states[1:], scales, strict=False)
        eps = torch.finfo(x_T.dtype).eps
        return [
            Observed(level, x_t, output, x_prev, rounded=0.0 if scale == 1 else eps)
            for level, x_t, output, x_prev, scale in steps
        ]

    def levels_seen(self, setting: Setting, timesteps: list[float]) -> tuple[Level, ...]:
        """Return the steps of a run whose model was called with these timesteps."""
        return self.levels(setting)


def with_new_features(subject: Subject) -> Subject:
    """Return the subject with the present names of its features; warn where it has old ones."""
    if not (old := OLD_FEATURES.keys() & subject.features):
        return subject
    for name in sorted(old):
        warnings.warn(
            f"the feature {name!r} of a subject ends with ddim_fast 0.3: call it {OLD_FEATURES[name]!r}",
            DeprecationWarning,
            stacklevel=2,
        )
    subject = copy.copy(subject)
    subject.features = frozenset(OLD_FEATURES.get(name, name) for name in subject.features)
    return subject
