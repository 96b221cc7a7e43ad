"""A step to time: its tensors, the contenders, and the float64 oracle that each must match.

All contenders read and write the same tensors, so that memory addresses favour none. The step goes
from t = 100 to 80 of the linear schedule (50 steps). Repeated in place, it lets the sample grow by
2 % per call, so ``prepare`` restores it before each block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ddim_fast as df
from ddim_fast.kernels import cpu_step
from ddim_fast.kernels.contract import StepInputs
from ddim_fast.kernels.dispatch import BACKENDS, choose
from ddim_fast.verify.truth import oracle

T, T_PREV, NUM_INFERENCE_STEPS = 100, 80, 50
NOISE_STEP = 44
SEED = 7
TRIAD_SCALE = 0.75
LARGE = 1 << 20
"""Above this many elements, only three samples are checked, and NumPy's noise takes too long."""

Calls = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class Variant:
    eta: float = 0.0
    clip: float | None = None
    guidance_scale: float | None = None


VARIANTS = {
    "eta0": Variant(),
    "clip": Variant(clip=1.0),
    "eta1": Variant(eta=1.0),
    "guidance": Variant(guidance_scale=7.5),
}

ALLOWED = {"ours": 4, "backend": 4, "triad": 1, "diffusers": 256}
"""Largest error in eps times the terms' magnitudes, by the first word of a contender's name; or 16.

diffusers computes alphas_cumprod in float32: at t = 100 that is 1e-5 of the direction term."""


class StepCase:
    """The tensors of a step, and the contenders that compute it."""

    def __init__(self, variant: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32):
        self.name, self.variant, self.shape, self.dtype = variant, VARIANTS[variant], shape, dtype
        generator = torch.Generator().manual_seed(SEED)
        self.start, self.model_output, uncond = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
        self.uncond = uncond if self.variant.guidance_scale is not None else None
        self.x_t, self.out = self.start.clone(), torch.zeros_like(self.start)
        self.noise = torch.zeros_like(self.start) if self.variant.eta else None
        self.seeds = torch.from_numpy(df.sample_seeds(SEED, shape[0])) if self.variant.eta else None
        self.step = _planned_step(self.variant)

    @property
    def elements(self) -> int:
        return self.x_t.numel()

    @property
    def streams(self) -> int:
        """Tensors read or written: x_t, model_output, x_prev, and any unconditional output."""
        return 3 if self.uncond is None else 4

    @property
    def bytes(self) -> int:
        return self.streams * self.elements * self.x_t.element_size()

    @property
    def bytes_formula(self) -> str:
        read = "x_t + model_output" + (" + model_output_uncond" if self.uncond is not None else "")
        return f"({read} read, x_prev written) {self.streams} * {self.x_t.element_size()} B * elements"

    def prepare(self) -> None:
        """Restore x_t after in-place steps, and seed torch's generator for the oracle's noise."""
        self.x_t.copy_(self.start)
        torch.manual_seed(SEED)

    # ---------------------------------------------------------------------------------------------------- contenders
    def ours(self) -> Calls:
        """Return ddim_step in place, into a buffer, and into a new tensor."""
        return {"ours in place": self._ours(self.x_t), "ours out": self._ours(self.out), "ours new": self._ours(None)}

    def _ours(self, out: Tensor | None) -> Callable[[], Tensor]:
        """Return a call as users write it.

        functools.partial or **options would cost a third of a small call.
        """
        step, x, m, row = df.ddim_step, self.x_t, self.model_output, self.step.coefficients
        seeds, uncond, scale = self.seeds, self.uncond, self.variant.guidance_scale
        if seeds is not None:
            return lambda: step(x, m, row, seeds=seeds, noise_step=NOISE_STEP, out=out)
        if uncond is not None:
            return lambda: step(x, m, row, model_output_uncond=uncond, guidance_scale=scale, out=out)
        return lambda: step(x, m, row, out=out)

    def other_backends(self) -> Calls:
        """Return every other backend that can run this step, into the buffer."""
        inputs = StepInputs(self.x_t, self.model_output, self.step.coefficients, x_prev=self.out, **self._options())
        calls = {}
        for name, backend in BACKENDS.items():
            too_slow = self.seeds is not None and self.elements > LARGE and name == "reference"
            if backend is choose(inputs) or backend.unsupported_reasons(inputs) or too_slow:
                continue
            calls[f"backend {name}"] = self._with_backend(name)
        return calls

    def _with_backend(self, name: str) -> Callable[[], Tensor]:
        x, m, row, options = self.x_t, self.model_output, self.step.coefficients, self._options()
        return partial(df.ddim_step, x, m, row, out=self.out, backend=name, **options)

    def eager(self) -> Calls:
        formula, x, m, uncond = self._formula(), self.x_t, self.model_output, self.uncond
        return {"eager": lambda: formula(x, m, uncond, None)}

    def compiled(self) -> tuple[Calls, dict[str, str]]:
        """Return torch.compile of the eager formula, and why any variant is missing.

        Coefficients are compiled in, and shapes are static. With noise, there is also a faster
        variant: torch's generator fills a buffer, which the compiled step reads.
        """
        formula, x, m, uncond, noise = self._formula(), self.x_t, self.model_output, self.uncond, self.noise

        def in_place(x_t, model_output, model_output_uncond, z):
            return x_t.copy_(formula(x_t, model_output, model_output_uncond, z))

        torch._dynamo.reset()  # all cases share code objects, which would count as recompilations
        out_step, in_step = (torch.compile(f, fullgraph=True, dynamic=False) for f in (formula, in_place))
        calls = {
            "torch.compile": lambda: out_step(x, m, uncond, None),
            "torch.compile in place": lambda: in_step(x, m, uncond, None),
        }
        if noise is not None:
            given = torch.compile(in_place, fullgraph=True, dynamic=False)
            calls["torch.compile + normal_ in place"] = lambda: given(x, m, uncond, noise.normal_())
        missing = {name: reason for name, call in calls.items() if (reason := self._why_not(call))}
        return {name: call for name, call in calls.items() if name not in missing}, missing

    def _why_not(self, call: Callable[[], Tensor]) -> str | None:
        """Compile; return the reason if that fails, such as a missing C++ compiler."""
        try:
            with torch.inference_mode():
                self.prepare()
                call()
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return None

    def diffusers(self) -> Calls:
        """Return DDIMScheduler.step with the same settings, called as in pipelines.

        Only the timestep is an int, which is faster.
        """
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler(
            beta_schedule="linear",
            clip_sample=self.variant.clip is not None,
            clip_sample_range=self.variant.clip or 1.0,
            set_alpha_to_one=True,
            timestep_spacing="leading",
        )
        scheduler.set_timesteps(NUM_INFERENCE_STEPS)
        step, x, m, uncond, v = scheduler.step, self.x_t, self.model_output, self.uncond, self.variant
        if uncond is None:
            return {"diffusers": lambda: step(m, T, x, eta=v.eta, return_dict=False)[0]}
        scale = v.guidance_scale
        return {"diffusers": lambda: step(uncond + scale * (m - uncond), T, x, eta=v.eta, return_dict=False)[0]}

    def triads(self) -> Calls:
        """Return the triad a = b * scale + c over as many bytes as x_t: the processor's bandwidth.

        It writes in place, over b, and into another buffer.
        """
        if cpu_step.extension is None:
            return {}
        triad, n = cpu_step.extension.triad, self.elements * self.x_t.element_size() // 4
        x, m, out = (t.data_ptr() for t in (self.x_t, self.model_output, self.out))

        def in_place():
            triad(x, x, m, TRIAD_SCALE, n)
            return self.x_t

        def elsewhere():
            triad(out, x, m, TRIAD_SCALE, n)
            return self.out

        return {"triad in place": in_place, "triad out": elsewhere}

    def _options(self) -> dict[str, Any]:
        options = {}
        if self.uncond is not None:
            options |= {"model_output_uncond": self.uncond, "guidance_scale": self.variant.guidance_scale}
        if self.seeds is not None:
            options |= {"seeds": self.seeds, "noise_step": NOISE_STEP}
        return options

    def _formula(self) -> Callable[..., Tensor]:
        """Return equation 12 as a user would write it, with Python coefficients.

        It draws noise unless given.
        """
        signal, spread = math.sqrt(self.step.alpha_bar_t), math.sqrt(1 - self.step.alpha_bar_t)
        std_dev_t, clip, scale = self.step.std_dev_t, self.variant.clip, self.variant.guidance_scale
        signal_prev = math.sqrt(self.step.alpha_bar_prev)
        direction = math.sqrt(1 - self.step.alpha_bar_prev - std_dev_t**2)

        def formula(x_t, model_output, model_output_uncond, z):
            m = model_output
            if model_output_uncond is not None:
                m = model_output_uncond + scale * (m - model_output_uncond)
            x0 = (x_t - spread * m) / signal
            if clip is not None:
                x0 = x0.clamp(-clip, clip)
            x_prev = signal_prev * x0 + direction * m
            if std_dev_t != 0:
                x_prev = x_prev + std_dev_t * (torch.randn_like(x_t) if z is None else z)
            return x_prev

        return formula

    # -------------------------------------------------------------------------------------------------------- oracle
    def check(self, name: str, result: Tensor) -> None:
        """Raise AssertionError if a contender's ``result`` is not the step in float64."""
        picked = range(self.shape[0]) if self.elements <= LARGE else (0, self.shape[0] // 2, self.shape[0] - 1)
        picked = torch.tensor(list(picked))
        if name.startswith("triad"):
            return self._check_triad(name, result, picked)
        if name in ("torch.compile", "torch.compile in place") and self.variant.eta:
            return self._check_own_noise(name, result, picked)
        exact = self._exact(picked, self._noise_of(name, picked))
        _assert_near(name, result[picked], exact.x_prev, exact.long_terms)

    def _exact(self, picked: Tensor, noise: np.ndarray | None) -> oracle.Result:
        v, step = self.variant, self.step
        row = oracle.textbook_row(
            "epsilon", step.alpha_bar_t, step.alpha_bar_prev, eta=v.eta, clip=math.inf if v.clip is None else v.clip
        )
        uncond = None if self.uncond is None else _float64(self.uncond[picked])
        x_t, m = _float64(self.start[picked]), _float64(self.model_output[picked])
        return oracle.row_step(row, x_t, m, uncond=uncond, guidance=v.guidance_scale, noise=noise)

    def _noise_of(self, name: str, picked: Tensor) -> np.ndarray | None:
        """Return the noise of a contender.

        For ours, the noise standard's in NumPy; for others, torch's generator after ``prepare``.
        """
        if not self.variant.eta:
            return None
        if name.startswith(("ours", "backend")):
            z = df.standard_normals(self.seeds[picked].numpy(), math.prod(self.shape[1:]), NOISE_STEP)
            return z.astype(np.float64).reshape(len(picked), *self.shape[1:])
        torch.manual_seed(SEED)
        return _float64(torch.randn(self.shape, dtype=self.dtype)[picked])

    def _check_own_noise(self, name: str, result: Tensor, picked: Tensor) -> None:
        """Check that the added noise has a normal's first four moments.

        The noise of Inductor's generator cannot be obtained otherwise.
        """
        without = self._exact(picked, np.zeros((len(picked), *self.shape[1:]))).x_prev
        assert_normal(name, (_float64(result[picked]) - without) / self.step.std_dev_t)

    def _check_triad(self, name: str, result: Tensor, picked: Tensor) -> None:
        b, c, got = (t[picked].view(torch.float32) for t in (self.start, self.model_output, result))
        b, c = TRIAD_SCALE * _float64(b), _float64(c)
        _assert_near(name, got, b + c, np.abs(b) + np.abs(c))


def _planned_step(variant: Variant) -> df.PlannedStep:
    timesteps = df.select_timesteps(NUM_INFERENCE_STEPS, 1000, "leading")
    plan = df.SamplingPlan(df.NoiseSchedule.linear(), timesteps, eta=variant.eta, clip_sample_range=variant.clip)
    (step,) = (s for s in plan.steps if s.t == T)
    assert step.t_prev == T_PREV
    return step


def _float64(tensor: Tensor) -> np.ndarray:
    return tensor.to(torch.float64).numpy()


def _assert_near(name: str, result: Tensor, exact: np.ndarray, terms: np.ndarray) -> None:
    allowed = ALLOWED.get(name.split()[0], 16) * torch.finfo(result.dtype).eps * terms
    if name == "diffusers" and result.dtype != torch.float32:
        allowed = 16 * torch.finfo(result.dtype).eps * terms
    worst = np.max(np.abs(_float64(result) - exact) / allowed)
    assert worst <= 1, f"{name} is wrong: its largest error is {worst:.3g} times the tolerance, so it is not timed"


def assert_normal(name: str, z: np.ndarray) -> None:
    """Assert that the first four moments of ``z`` are normal within six standard errors."""
    n = z.size
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        moment = float(np.mean(z**power))
        assert abs(moment - expected) < 6 * math.sqrt(variance / n), f"{name}: moment {power} of its noise is {moment}"
