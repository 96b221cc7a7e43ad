"""Write the recorded runs.

    python tools/golden_trajectories.py > ddim_fast/verify/truth/golden_trajectories.json

Only the float64 oracle computes them, so that no error of the sampler can affect them. They have
the same bytes on every machine: they use only operations that IEEE 754 rounds correctly (+ - * /
and square roots; no cosine schedule, whose last bits depend on the C library), and floats are
written as the shortest decimal that reads back exactly. A test compares the bytes. Changing a
number needs a new ``GOLDEN_VERSION`` (ddim_fast/verify/truth/golden.py) and a changelog entry.
"""

import json
import math
import sys

import numpy as np

from ddim_fast.verify.truth import oracle
from ddim_fast.verify.truth.cases import Setting
from ddim_fast.verify.truth.golden import GOLDEN_VERSION

SHAPE = (2, 3)
MOST_STEPS = 50
IRREGULAR = (999, 931, 640, 258, 17, 0)
STEPS = {"leading": 5, "trailing": 5, "linspace": 4}  # divide 1000; the 3 gaps of linspace divide 999
SIMPLEST = {
    "timestep_spacing": "leading",
    "schedule": "linear",
    "num_train_timesteps": 1000,
    "zero_terminal_snr": False,
    "prediction_type": "epsilon",
    "eta": 0.0,
    "clip_sample_range": None,
    "use_clipped_model_output": False,
}


def settings() -> list[dict]:
    """Return how each run differs from ``SIMPLEST``. The "quick" runs together use every option."""
    runs = []
    for prediction_type in ("epsilon", "sample", "v_prediction"):
        base = {"prediction_type": prediction_type}
        runs += [base | {"eta": eta, "quick": eta == 0.5} for eta in (0.0, 0.5, 1.0)]
        runs += [base | {"eta": 0.5, "eta_scales": "variance", "quick": prediction_type == "epsilon"}]
        for eta in (0.0, 0.5):
            clipped = base | {"eta": eta, "clip_sample_range": 1.0}
            runs += [clipped | {"quick": eta == 0 and prediction_type == "epsilon"}]
            runs += [clipped | {"use_clipped_model_output": True, "quick": eta == 0.5}]
        runs += [base | {"timestep_spacing": "trailing", "schedule": "scaled_linear", "quick": True}]
        runs += [base | {"timesteps": IRREGULAR, "eta": eta} for eta in (0.0, 0.5)]
    for spacing in ("trailing", "linspace"):
        runs += [{"timestep_spacing": spacing, "eta": eta, "quick": eta == 1} for eta in (0.0, 1.0)]
        runs += [{"timestep_spacing": spacing, "num_inference_steps": 1}]
    for prediction_type in ("sample", "v_prediction"):
        base = {"prediction_type": prediction_type, "timestep_spacing": "trailing", "zero_terminal_snr": True}
        runs += [base | {"schedule": "scaled_linear", "eta": eta, "quick": eta == 0.5} for eta in (0.0, 0.5)]
    runs += [{"clip_sample_range": 0.25}, {"num_inference_steps": 1, "quick": True}]
    runs += [{"num_inference_steps": 50, "eta": eta} for eta in (0.0, 1.0)]
    runs += [{"num_train_timesteps": 40, "num_inference_steps": 8}]
    return runs


def scripted(first: int) -> np.ndarray:
    """Return numbers in [-2, 2] that are exact in half precision.

    They are every 37th multiple of 1/32, wrapping around.
    """
    count = first + np.arange(math.prod(SHAPE))
    return ((37 * count % 129 - 64) / 32).reshape(SHAPE)


def inputs() -> dict[str, np.ndarray]:
    """Return the inputs of all runs."""
    size = math.prod(SHAPE)
    return {
        "x_T": scripted(5),
        "model_outputs": np.stack([scripted(23 + size * i) for i in range(MOST_STEPS)]),
        "noise": np.stack([scripted(71 + (size + 1) * i) for i in range(MOST_STEPS)]),
    }


def run(special: dict, given: dict[str, np.ndarray]) -> dict:
    """Return a complete run of equation 12, step by step."""
    setting = SIMPLEST | {name: value for name, value in special.items() if name not in ("eta_scales", "quick")}
    irregular = "timesteps" in setting
    if irregular:
        setting["num_inference_steps"] = len(setting["timesteps"])
    else:
        spacing, total = setting["timestep_spacing"], setting["num_train_timesteps"]
        setting.setdefault("num_inference_steps", STEPS[spacing])
        setting["timesteps"] = oracle.timesteps(spacing, setting["num_inference_steps"], total)
    table = Setting(**setting).alphas_cumprod()
    alpha_bars = [float(table[t]) for t in setting["timesteps"]] + [1.0]
    eta_scales = special.get("eta_scales", "std_dev")
    x_t, states = given["x_T"], []
    for i in range(len(setting["timesteps"])):
        x_t, _ = oracle.textbook_step(
            setting["prediction_type"],
            x_t,
            given["model_outputs"][i],
            alpha_bars[i],
            alpha_bars[i + 1],
            eta=setting["eta"],
            eta_scales=eta_scales,
            noise=given["noise"][i],
            clip=math.inf if setting["clip_sample_range"] is None else setting["clip_sample_range"],
            use_clipped_model_output=setting["use_clipped_model_output"],
        )
        states.append(x_t.tolist())
    return {
        "name": ", ".join(f"{name} = {_shown(name, value)}" for name, value in special.items() if name != "quick"),
        "quick": special.get("quick", False),
        "setting": setting,
        "eta_scales": eta_scales,
        "irregular": irregular,
        "alpha_bars": alpha_bars,
        "states": states,
    }


def _shown(name: str, value: object) -> object:
    return "irregular" if name == "timesteps" else value


def text() -> str:
    """Return the file's text, one line per run, so that a diff shows which runs changed."""
    given = inputs()
    runs = ",\n".join(json.dumps(run(special, given), sort_keys=True, allow_nan=False) for special in settings())
    plain = json.dumps({name: array.tolist() for name, array in given.items()}, sort_keys=True)
    return f'{{"inputs": {plain},\n"runs": [\n{runs}\n],\n"version": {GOLDEN_VERSION}}}\n'


if __name__ == "__main__":
    sys.stdout.write(text())
