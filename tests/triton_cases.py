"""Calls of the Triton step for the tests: every pair of options is covered, in few launches."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from model_inputs import assert_is_scaled

from ddim_fast.kernels import noise
from ddim_fast.kernels.contract import StepCoefficients, StepInputs, check_inputs
from ddim_fast.verify.truth import oracle
from ddim_fast.verify.truth.tolerances import allowed_density_error, assert_near, assert_within, to_numpy

F, H, B = torch.float32, torch.float16, torch.bfloat16

OPTIONS = {
    "types": [(F, F), (H, H), (B, B), (F, H), (F, B)],
    "prediction_type": ["epsilon", "sample", "v_prediction"],
    "clip": [None, "clip", "rederived", "thresholds"],
    "noise": [None, "given", "seeds"],
    "history": [None, "read", "not read", "two read", "two not read"],
    "model_input": [None, F, H, B],
    "guidance": [False, True],
    "x0": [False, True],
    "mask": [None, "given", "seeds"],
    "learned_variance": [False, True],
    "shape": [(1, 1), (2, 127), (3, 128), (2, 129), (1, 1025), (2, 3, 8, 8), (3, 2048), (1, 4100)],
    "place": ["aligned", "unaligned"],
    "in_place": [False, True],
    "log_prob": [None, "mean", "sum"],
}
_STEPS = [(0.98, 0.9995), (0.5, 0.6), (0.05, 0.09), (0.9999, 1.0)]


def name_of(choice: dict) -> str:
    return "-".join(
        str(v).replace("torch.", "").replace(" ", "") if not isinstance(v, bool) else f"{n}={v:d}"
        for n, v in choice.items()
    )


@dataclass
class Case:
    inputs: StepInputs
    expected: oracle.Result
    row: dict
    last_x0: torch.Tensor | None  # what the history holds before the step
    mean: oracle.Result  # of x_prev, without noise and known picture
    counted: np.ndarray  # 1 where an element counts in the log-probability

    def check(self, result: torch.Tensor) -> None:
        """Assert that the outputs are near float64, and those exact that are."""
        inputs = self.inputs
        assert_near(result, self.expected.x_prev, self.expected.terms, "x_prev")
        for name, tensor in (("x0", inputs.x0), ("history", inputs.history)):
            if tensor is not None:
                assert_near(tensor, self.expected.x0, self.expected.x0_terms, name)
        if inputs.history_2 is not None:
            torch.testing.assert_close(inputs.history_2, self.last_x0, rtol=0, atol=0, equal_nan=True)
        if inputs.model_input_out is not None:
            assert_is_scaled(inputs.model_input_out, result, self.row["input_scale"])
        if inputs.log_prob_out is not None:
            assert_within(inputs.log_prob_out, *self.log_prob(result), "log_prob_out")

    def log_prob(self, x_prev: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The log-probability of x_prev, and the error allowed: ``(B,)`` each."""
        std = max(self.row["prev_noise"], self.inputs.min_std or 0.0)
        samples = len(self.counted)
        deviation = ((to_numpy(x_prev) - self.mean.x_prev) * self.counted).reshape(samples, -1)
        terms, counted = (
            (values * self.counted).reshape(samples, -1) for values in (self.mean.terms, np.ones(self.counted.shape))
        )
        offset = math.log(std) + 0.5 * math.log(2 * math.pi)
        total = -(0.5 * (deviation / std) ** 2 + offset * counted).sum(1)
        allowed = allowed_density_error(x_prev.dtype, deviation, terms, 0.5 / std**2, offset)
        count = np.maximum(counted.sum(1), 1) if self.inputs.log_prob_reduction == "mean" else 1.0
        return total / count, allowed / count


def make(choice: dict, seed: int = 0) -> Case:
    """Make tensors for a choice of the options, and the float64 result.

    The outputs are full of NaN, or are the sample itself.
    """
    rng = np.random.default_rng(seed)
    state, output = choice["types"]
    shape = choice["shape"]
    clip = math.inf if choice["clip"] is None else 1.0
    noise_kind, mask_kind, history = choice["noise"], choice["mask"], choice["history"] or ""
    eta = 1.0 if noise_kind else 0.0
    alpha_bars = _STEPS[rng.integers(len(_STEPS) - bool(noise_kind or mask_kind))]
    row = oracle.textbook_row(
        choice["prediction_type"],
        *alpha_bars,
        eta=eta,
        clip=clip,
        use_clipped_model_output=choice["clip"] == "rederived",
    )
    reads = bool(history) and "not" not in history
    row["prev_history"] = -0.375 if reads else 0.0
    row["prev_history_2"] = 0.1875 if reads and "two" in history else 0.0
    row["input_scale"] = 0.7 if choice["model_input"] else 1.0

    def tensor(dtype, values=None, channels_twice=False):
        values = rng.standard_normal(shape) if values is None else values
        full = torch.empty((shape[0], 2 * shape[1], *shape[2:]) if channels_twice else shape, dtype=dtype)
        memory = torch.full((full.numel() + 80,), -77.0, dtype=dtype)
        # 64 bytes is where torch aligns memory to; Triton asks for 16.
        begin = -memory.data_ptr() // memory.element_size() % 32 + (3 if choice["place"] == "unaligned" else 0)
        view = memory[begin : begin + full.numel()].view(full.shape)[:, : shape[1]]
        return view.copy_(torch.from_numpy(np.asarray(values)))

    x_t, m = tensor(state), tensor(output, channels_twice=choice["learned_variance"])
    keywords, exact = {}, {}
    seeds = torch.from_numpy(rng.integers(-(2**63), 2**63, shape[0]))
    step = int(rng.integers(2**32))
    if "seeds" in (noise_kind, mask_kind):
        keywords |= {"seeds": seeds, "noise_step": step}

    def noise_from(kind, stream, name):
        if kind == "given":
            keywords[name] = tensor(state)
            return to_numpy(keywords[name])
        return noise.standard_normals(seeds.numpy(), math.prod(shape[1:]), step, stream).reshape(shape)

    if noise_kind:
        exact["noise"] = noise_from(noise_kind, 0, "noise")
    for name in ("history", "history_2")[: 2 if "two" in history else bool(history)]:
        values = None if reads else np.full(shape, math.nan)  # NaN where it must not be read
        keywords[name] = tensor(state, values, channels_twice=True)  # a stride of its own
        exact[name] = to_numpy(keywords[name])
    if choice["model_input"]:
        keywords["model_input_out"] = tensor(choice["model_input"], np.full(shape, math.nan))
    if choice["guidance"]:
        keywords |= {"model_output_uncond": tensor(output), "guidance_scale": 2.5}
        exact |= {"uncond": to_numpy(keywords["model_output_uncond"]), "guidance": 2.5}
    if choice["clip"] == "thresholds":
        keywords["thresholds"] = torch.from_numpy(rng.uniform(0.5, 3, shape[0])).float()
        exact["thresholds"] = to_numpy(keywords["thresholds"])
    if mask_kind:
        keywords["mask"] = tensor(state, np.clip(rng.uniform(-1, 2, shape), 0, 1))
        keywords["known_x0"] = tensor(state)
        exact |= {"mask": to_numpy(keywords["mask"]), "known_x0": to_numpy(keywords["known_x0"])}
        exact["known_noise"] = noise_from(mask_kind, 2, "known_noise")
    expected = oracle.row_step(row, to_numpy(x_t), to_numpy(m), **exact)
    of_mean = {name: value for name, value in exact.items() if name not in ("noise", "mask", "known_x0", "known_noise")}
    mean = oracle.row_step(row | {"prev_noise": 0.0}, to_numpy(x_t), to_numpy(m), **of_mean)
    counted = (exact["mask"] == 0).astype(float) if mask_kind else np.ones(shape)
    if choice["log_prob"]:
        keywords |= {
            "log_prob_out": torch.full((shape[0],), math.nan, dtype=F),
            "log_prob_reduction": choice["log_prob"],
            "min_std": None if noise_kind else 0.25,
        }
    x_prev = x_t if choice["in_place"] else tensor(state, np.full(shape, math.nan))
    x0 = tensor(state, np.full(shape, math.nan)) if choice["x0"] else None
    last_x0 = keywords["history"].clone() if history else None
    inputs = StepInputs(x_t, m, StepCoefficients(**row), x_prev=x_prev, x0=x0, **keywords)
    check_inputs(inputs)
    return Case(inputs, expected, row, last_x0, mean, counted)
