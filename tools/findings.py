"""Verify the DDIM samplers of other libraries, and write docs/FINDINGS.md.

The libraries are not in this project's environment; `prepare` makes one that also has them.

\b
python tools/findings.py prepare /tmp/wild
/tmp/wild/bin/python tools/findings.py run
python tools/findings.py render
"""

import importlib.metadata
import json
import math
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
JSON_FILE, DOCUMENT = ROOT / "docs" / "findings.json", ROOT / "docs" / "FINDINGS.md"
BEGIN, END = "<!-- findings: begin -->", "<!-- findings: end -->"
IN_THE_WILD = "ddim_fast.verify.subjects.in_the_wild:"
RESTATED = "ddim_fast.verify.subjects.restated:"

SUBJECTS = {
    "DDIMScheduler": (f"{IN_THE_WILD}Diffusers", "diffusers"),
    "DDIMScheduler, set_alpha_to_one=False": (f"{IN_THE_WILD}DiffusersFinalAlpha", "diffusers"),
    "DDIMScheduler, set_alpha_to_one=False, steps_offset=1": (f"{IN_THE_WILD}DiffusersOffset", "diffusers"),
    "DDIMScheduler with DDIMInverseScheduler": (f"{IN_THE_WILD}DiffusersInversion", "diffusers"),
    "DDIMParallelScheduler.step": (f"{IN_THE_WILD}DiffusersParallel", "diffusers"),
    "DDIMParallelScheduler.batch_step_no_noise": (f"{IN_THE_WILD}DiffusersBatch", "diffusers"),
    "DDIMParallelScheduler.batch_step_no_noise, set_alpha_to_one=False": (
        f"{IN_THE_WILD}DiffusersBatchFinalAlpha",
        "diffusers",
    ),
    "FlowMatchEulerDiscreteScheduler": ("diffusers:FlowMatchEulerDiscreteScheduler", "diffusers"),
    "FlowMatchEulerDiscreteScheduler, stochastic_sampling=True": (f"{IN_THE_WILD}DiffusersFlowStochastic", "diffusers"),
    "EulerDiscreteScheduler": ("diffusers:EulerDiscreteScheduler", "diffusers"),
    "EulerAncestralDiscreteScheduler": ("diffusers:EulerAncestralDiscreteScheduler", "diffusers"),
    "EDMEulerScheduler": ("diffusers:EDMEulerScheduler", "diffusers"),
    "DPMSolverMultistepScheduler, use_flow_sigmas=True, solver_order=1": (
        f"{IN_THE_WILD}DiffusersFlowSolver",
        "diffusers",
    ),
    "DPMSolverMultistepScheduler, use_flow_sigmas=True, solver_order=2": (
        f"{IN_THE_WILD}DiffusersFlowSolver2",
        "diffusers",
    ),
    "DDIMSampler": (f"{IN_THE_WILD}Azula", "azula"),
    "GaussianDiffusion.ddim_sample": (f"{IN_THE_WILD}DenoisingDiffusionPytorch", "denoising-diffusion-pytorch"),
    "GaussianDiffusion.ddim_sample, clipping": (
        f"{IN_THE_WILD}DenoisingDiffusionPytorchClipped",
        "denoising-diffusion-pytorch",
    ),
    "sample_euler, sample_euler_ancestral": (f"{IN_THE_WILD}KDiffusion", "k-diffusion"),
    "ddim_step_with_logprob (restated)": (f"{RESTATED}DDPO", "ddpo-pytorch"),
    "ddim_step_with_logprob (restated), set_alpha_to_one=True": (f"{RESTATED}DDPOToCleanData", "ddpo-pytorch"),
    "sde_step_with_logprob (restated)": (f"{RESTATED}FlowGRPO", "flow_grpo"),
    'sde_step_with_logprob (restated), sde_type="cps"': (f"{RESTATED}FlowGRPOWithCPS", "flow_grpo"),
    "FastDDIMScheduler (ours)": ("ddim_fast.integrations.diffusers:FastDDIMScheduler", "ddim-fast"),
    "FastFlowMatchEulerDiscreteScheduler (ours)": (
        "ddim_fast.integrations.diffusers:FastFlowMatchEulerDiscreteScheduler",
        "ddim-fast",
    ),
    "FastEulerDiscreteScheduler (ours)": ("ddim_fast.integrations.diffusers:FastEulerDiscreteScheduler", "ddim-fast"),
    "FastDDIMScheduler (ours), set_alpha_to_one=False": (f"{IN_THE_WILD}FastDiffusersFinalAlpha", "ddim-fast"),
}
"""Subjects by their name in the table: the name for ``verify``, and the package."""

SPACINGS = ("leading", "trailing", "linspace")

FULL = ("DDIMScheduler", "DDIMSampler", "GaussianDiffusion.ddim_sample", "sample_euler, sample_euler_ancestral")
"""Subjects that are also verified with the full set."""

# --- What a failure means ---------------------------------------------------------------------------------------------

KINDS = {
    "wrong result": "the samples are not those of the algorithm",
    "approximation": "as exact as its method, which is not exact",
    "by design": "another algorithm than the one verified, under a name that may suggest it",
    "type": "the values are right, but not in the type of the samples",
    "side effect": "the samples are right; something else changes",
    "compatibility": "ours does what the library does, so that results stay the same",
}

SCHEDULERS = tuple(label for label in SUBJECTS if label.startswith(("DDIMScheduler", "DDIMParallel")))
BATCH = tuple(label for label in SCHEDULERS if "batch_step" in label)
BATCH_FINAL = BATCH[1]
OURS = tuple(label for label in SUBJECTS if label.startswith("FastDDIM"))
FLOW_SOLVERS = tuple(label for label in SUBJECTS if "use_flow_sigmas" in label)
STOCHASTIC = "FlowMatchEulerDiscreteScheduler, stochastic_sampling=True"
DDPO = tuple(label for label, (_, package) in SUBJECTS.items() if package == "ddpo-pytorch")
FLOW_GRPO = tuple(label for label, (_, package) in SUBJECTS.items() if package == "flow_grpo")
FINAL_ALPHA = tuple(label for label in SUBJECTS if "set_alpha_to_one=False" in label)
OFFSET = "DDIMScheduler, set_alpha_to_one=False, steps_offset=1"
INVERSION = "DDIMScheduler with DDIMInverseScheduler"

MEANINGS: dict[tuple[str, str], tuple[str, str]] = {}
"""The meaning of each failure by subject and check: a key of KINDS, and what it means to a user."""


def meaning(checks: str, kind: str, text: str, *subjects: str) -> None:
    """Record what a failure of these checks, separated by spaces, means for these subjects."""
    for subject in subjects:
        MEANINGS.update({(subject, check): (kind, " ".join(text.split())) for check in checks.split()})


meaning(
    "previous-timestep golden",
    "wrong result",
    """With `timestep_spacing` "trailing" or "linspace", a step goes to the noise level of `t - T // N`, which is not the
    next timestep visited unless N divides T ("trailing"), and never is for "linspace" with 2 steps or more. The model
    is then called with a timestep whose noise level is not that of its samples. The default, "leading", is not affected. Cause:
    `DDIMScheduler.step` and `_get_variance` (`schedulers/scheduling_ddim.py`, and likewise
    `scheduling_ddim_parallel.py`) compute `prev_timestep` from the numbers alone; `DDPMScheduler` looks it up.
    Reported upstream as huggingface/diffusers issues 11347 and 12633. With the exact model of data of standard
    deviation 0.5, 50 steps of "linspace" give 0.484 where "leading" gives 0.477, 2 steps 0.97 (table above).""",
    *SCHEDULERS,
)
meaning(
    "timesteps",
    "wrong result",
    """With "trailing", some numbers of steps give one timestep too many, the last of them -1. The model is called with
    timestep -1, and the step from there reads the noise level of the last timestep, as negative indices count from
    the end: the nearly clean sample is treated as pure noise. Cause: `DDIMScheduler.set_timesteps` counts down to 0
    with `np.arange` and a step that is not an integer; rounding can leave one more element. Of the numbers up to 1000,
    62 are affected, the smallest is 61; none of them divides 1000.""",
    *SCHEDULERS,
)
meaning(
    "timesteps ddpm",
    "wrong result",
    """`steps_offset=1` with as many steps as there are training timesteps starts at timestep 1000, which does not exist:
    the first step raises IndexError. Cause: `DDIMScheduler.set_timesteps` adds the offset without a bound. Only N =
    1000 is affected. Reported upstream as huggingface/diffusers issue 10003. The counts of "trailing" above are wrong
    here, too.""",
    OFFSET,
)
meaning(
    "zero-terminal-snr",
    "wrong result",
    """With `rescale_betas_zero_snr=True` and eta = 1, the first step from timestep 999 gives NaN for some numbers of
    steps (with the linear schedule and "trailing": for 54 of the 104 numbers 1 to 100, 250, 333, 500 and 1000; 3, 4,
    6, 8 and 9 are the first). The cosine schedule does it without rescaling at 5 steps. There 1 - alpha_bar_prev -
    std_dev_t^2 is 0 or nearly so, and float32 makes it slightly negative before its square root is taken (on an AMD
    EPYC of the first generation; an Intel Xeon, Sapphire Rapids, rounds otherwise, and gives no NaN). Cause:
    `DDIMScheduler.step`, where the coefficient of `pred_epsilon` is computed. At eta = 0 the results are right.""",
    *SCHEDULERS,
)
meaning(
    "finite",
    "wrong result",
    """The same, without rescaling: one step of "trailing" from timestep 999 to the noise level of timestep 0 at eta = 1
    gives NaN with `set_alpha_to_one=False`, where the exact squared coefficient of `pred_epsilon` is 4e-18.""",
    "DDIMScheduler, set_alpha_to_one=False",
    OFFSET,
)
meaning(
    "update observed-update endpoints whole-run zero-terminal-snr previous-timestep",
    "wrong result",
    """`batch_step_no_noise` goes to alpha_bar = 1 in the last step even with `set_alpha_to_one=False`, where `step` of
    the same object goes to the noise level of timestep 0. The two differ in the last step only, by about 1 % of the
    predicted noise. Cause: `DDIMParallelScheduler.batch_step_no_noise` (`schedulers/scheduling_ddim_parallel.py`)
    writes 1 where it should take `final_alpha_cumprod`, which it moves to the device just before. The spacings above
    are wrong here, too.""",
    BATCH_FINAL,
)
meaning(
    "no-stale-state half-precision",
    "type",
    """`batch_step_no_noise` gives float32 for float16 and bfloat16 samples, where `step` keeps the type. Its
    coefficients are float32 tensors with a batch dimension, which promote the samples; those of `step` are scalars and
    do not. The next call of a model in half precision gets float32.""",
    *BATCH,
)
meaning(
    "inversion",
    "approximation",
    """`DDIMInverseScheduler` inverts each step with the model's output at the known sample instead of the unknown one, as
    the paper and most code do. A sample that is inverted and sampled again comes back with an error that is inversely
    proportional to the number of steps (root mean square, data of standard deviation 0.5: 0.143 after 10 steps, 0.0154
    after 100, 0.0031 after 500). The check demands the accuracy of an inversion by fixed-point iteration.""",
    INVERSION,
)
meaning(
    "draws-nothing",
    "side effect",
    """At eta = 0, normal numbers are drawn from torch's global generator and multiplied by 0, or not used. The samples
    do not depend on them, but other code that draws from that generator gets other numbers, and drawing takes time. Cause:
    `DDIMSampler.step` (`azula/sample.py`), `GaussianDiffusion.ddim_sample` (`denoising_diffusion_pytorch.py`) and
    `sample_euler` (`k_diffusion/sampling.py`) call `torch.randn_like` in every step.""",
    *(
        label
        for label, (_, package) in SUBJECTS.items()
        if package in ("azula", "denoising-diffusion-pytorch", "k-diffusion")
    ),
)
meaning(
    "timesteps previous-timestep golden",
    "compatibility",
    """`FastDDIMScheduler` is a drop-in for `DDIMScheduler`: it visits the same timesteps and makes the same steps,
    including those of the findings above, so that replacing one by the other changes no image. `ddim_fast.DDIMSampler`
    has none of them.""",
    *OURS,
)

meaning(
    "model-input",
    "wrong result",
    """With `use_flow_sigmas=True` the model is told whole numbers: of 20 steps with `flow_shift=3` the first is at sigma
    = 0.99967, and the model is told 999 where `FlowMatchEulerDiscreteScheduler` tells 1000 sigma = 999.67; up to 1 of
    1000 is cut off, always towards the data. Cause: `DPMSolverMultistepScheduler.set_timesteps` converts
    `timesteps` to int64 (`schedulers/scheduling_dpmsolver_multistep.py`). The effect is small: with the exact model of
    N(0.3, 0.5^2), `flow_shift=3` and 20 steps, samples move by 0.0005 (order 1) and 0.0007 (order 2, root mean square), where
    the solver's own error is 0.069 and 0.015. It does not fall with more steps: after 200 steps of order 2 the error is
    0.0016, where it is 0.0011 if the model is told 1000 sigma.""",
    *FLOW_SOLVERS,
)
meaning(
    "timesteps",
    "approximation",
    """With `use_flow_sigmas=True` a run starts at sigma = 0.999 before the shift (0.99967 with `flow_shift=3`), not at pure
    noise, sigma = 1, where `FlowMatchEulerDiscreteScheduler` starts: log(alpha / sigma), in which DPM-Solver steps, is
    infinite there. Samples start from N(0, 1) all the same, so that 0.1 % of the signal is missing at most.""",
    *FLOW_SOLVERS,
)
meaning(
    "eta-convention ddpm noise-normal noise-within-sample noise-between-steps gaussian-marginals data-marginals mixture-marginals",
    "by design",
    """`stochastic_sampling=True` adds noise of the whole sigma of the next level to the predicted x0, as consistency models
    are sampled (arXiv 2303.01469, algorithm 1): it is meant for models distilled to jump to clean data. It is not the
    stochastic sampler of flow matching, which is DDIM's eta = 1 and leaves the marginals right. With the exact velocity
    of N(0.3, 0.5^2) and `shift=3`, samples have the standard deviation 0.315 after 28 steps and 0.343 after 200, where
    the deterministic scheduler has 0.454 and 0.498, and eta = 1 0.414 and 0.480: more steps do not mend it.""",
    STOCHASTIC,
)
meaning(
    "log-prob-ratio log-prob-half",
    "wrong result",
    """In half precision, the log-probability is that of x_prev before it is rounded to the type of the samples, where
    training evaluates that of the rounded x_prev, which is what was stored. The ratio of a policy with itself is then not
    1. Measured with Stable Diffusion's schedule, 50 steps, eta = 1 and latents of 4 x 64 x 64 of data of standard deviation
    1 (8 samples a step): it is off by up to 1.2e-4 in float16, in the last steps, and by up to 3.6e-3 in bfloat16, where 13 %
    of all ratios are off by more than 1e-4, the range that DDPO clips them to before anything is trained. Cause:
    `ddim_step_with_logprob` computes `prev_sample` and its log-probability in float32, and converts `prev_sample` when it
    returns.""",
    *DDPO,
)
meaning(
    "log-prob-no-noise",
    "wrong result",
    """At eta = 0, the function's default, the log-probability is NaN: 0 is divided by 0, and the logarithm of 0 is taken. The
    same happens in the step from timestep 0 where the timesteps include it, with `steps_offset=0`. A loss with one NaN in it
    is NaN.""",
    *DDPO,
)
meaning(
    "ddpm timesteps",
    "wrong result",
    """With `steps_offset=1`, as many steps as there are training timesteps start at timestep 1000, which does not exist: this
    is `DDIMScheduler.set_timesteps`, see above.""",
    DDPO[0],
)
meaning(
    "update observed-update endpoints update-with-noise ddpm whole-run golden previous-timestep",
    "wrong result",
    """The last step never goes to clean data, `final_alpha_cumprod`, but to the noise level of timestep 0. With
    `set_alpha_to_one=False`, as Stable Diffusion is configured, the two are the same; with diffusers' default, noise of
    standard deviation 0.01 remains (linear schedule), and the step from timestep 0 does nothing. Cause: `prev_timestep` is
    bounded to 0 or more before it is asked whether it is below 0.""",
    DDPO[1],
)
meaning(
    "draws-nothing",
    "side effect",
    """Without noise, at eta = 0 or `noise_level=0`, normal numbers are drawn from the generator and multiplied by 0.""",
    *DDPO,
    *FLOW_GRPO,
)
meaning(
    "log-prob-no-noise",
    "wrong result",
    """At `noise_level=0`, with which evaluation is run, the log-probability is NaN: 0 is divided by 0, and the logarithm of 0 is
    taken. It is not used there.""",
    FLOW_GRPO[0],
)
meaning(
    "log-prob log-prob-integral log-prob-gradient log-prob-constant log-prob-no-noise",
    "by design",
    """With `sde_type="cps"`, what is returned as the log-probability is -(x_prev - mean)^2, without the division by 2
    std_dev_t^2 and the constants ("remove all constants" in the code). The constants cancel in a ratio; the divisor does not:
    the logarithm of the ratio is 2 std_dev_t^2 times that of the probabilities, another multiple in each step. With
    `noise_level=0.7` and ten steps it is 1.5 times at the first, and 1.3e-4 times at the last that adds noise: steps
    with little noise are hardly trained, and the clip range has another meaning in each.""",
    FLOW_GRPO[1],
)
# --- Running ----------------------------------------------------------------------------------------------------------


def version_of(package: str) -> str:
    """Return the version of a package, or the commit of a code that is restated."""
    from ddim_fast.verify.subjects.restated import SOURCES

    return SOURCES[package][0] if package in SOURCES else importlib.metadata.version(package)


def verified(subject: str, full: bool, seed: int = 0) -> list[dict]:
    """Return the outcome of each check on a subject, and the message and code of failures."""
    from ddim_fast.verify import verify

    report = verify(subject, full=full, seed=seed, required=())
    kept = ("name", "outcome", "message", "code")
    return [{k: v for k, v in result.items() if k in kept and v} for result in report.to_dict()["results"]]


def spacing_sweep() -> list[dict]:
    """Return which numbers of steps from 1 to 1000 diffusers gets wrong.

    It compares the timesteps visited, and the timestep that each step goes to.
    """
    from diffusers import DDIMScheduler

    rows = []
    for spacing in SPACINGS:
        scheduler = DDIMScheduler(timestep_spacing=spacing)
        count = {
            "number of timesteps": [],
            "a timestep below 0": [],
            "previous timestep": [],
            "end above clean data": [],
        }
        for steps in range(1, 1001):
            scheduler.set_timesteps(steps)
            visited = scheduler.timesteps.tolist()
            goes_to = [max(t - 1000 // steps, -1) for t in visited]
            wrong = {
                "number of timesteps": len(visited) != steps,
                "a timestep below 0": min(visited) < 0,
                "previous timestep": any(a != b for a, b in zip(goes_to, [*visited[1:], -1], strict=True)),
                "end above clean data": goes_to[-1] != -1,
            }
            for name, is_wrong in wrong.items():
                count[name] += [steps] if is_wrong else []
        rows.append({"spacing": spacing} | {k: {"counts": len(v), "first": v[:6]} for k, v in count.items()})
    return rows


def samples_by_spacing() -> list[dict]:
    """Return the (mean, standard deviation) of diffusers' samples of N(0.3, 0.5^2) at eta = 0.

    The model is exact.
    """
    import torch
    from diffusers import DDIMScheduler

    rows = []
    for steps in (2, 10, 50, 60, 61, 206):
        row: dict = {"steps": steps}
        for spacing in SPACINGS:
            scheduler = DDIMScheduler(timestep_spacing=spacing, clip_sample=False)
            scheduler.set_timesteps(steps)
            x = torch.randn(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            for t in scheduler.timesteps:
                alpha_bar = float(scheduler.alphas_cumprod[t])
                eps = math.sqrt(1 - alpha_bar) * (x - math.sqrt(alpha_bar) * 0.3) / (alpha_bar * 0.25 + 1 - alpha_bar)
                x = scheduler.step(eps, t, x).prev_sample
            row[spacing] = [round(x.mean().item(), 3), round(x.std().item(), 3)]
        rows.append(row)
    return rows


def solver_orders() -> dict:
    """Return the errors of diffusers' multistep solvers, by their numbers of steps."""
    from solver_orders import STEPS, measured

    return {"version": version_of("diffusers"), "steps": list(STEPS), "solvers": measured()}


# --- Writing ----------------------------------------------------------------------------------------------------------


def rendered(found: dict) -> str:
    """Return the text between the markers: the tables, then each failure."""
    parts = [_table(found), _sweep(found["spacings"]), _samples(found["samples"]), _orders(found["orders"])]
    return "\n\n".join([*parts, *_failures(found)])


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _table(found: dict) -> str:
    lines = [_row("library", "sampler", "checks that fail", "pass", "do not apply"), _row(*["---"] * 5)]
    for one in found["subjects"]:
        outcomes = [check["outcome"] for check in one["checks"]]
        failed = [check["name"] for check in one["checks"] if check["outcome"] == "failed"]
        names = ", ".join(f"`{name}`" for name in failed) or "none"
        lines.append(
            _row(
                f"{one['package']} {one['version']}",
                f"{one['label']}{' (full set)' if one['full'] else ''}",
                names,
                outcomes.count("passed"),
                outcomes.count("not applicable"),
            )
        )
    return "\n".join(lines)


def _sweep(rows: list[dict]) -> str:
    names = [name for name in rows[0] if name != "spacing"]
    lines = [_row("`timestep_spacing`", *names), _row(*["---"] * (len(names) + 1))]
    for row in rows:
        cells = []
        for name in names:
            first = ", ".join(map(str, row[name]["first"]))
            more = ", ..." if row[name]["counts"] > len(row[name]["first"]) else ""
            cells.append(f"{row[name]['counts']} ({first}{more})" if row[name]["counts"] else "0")
        lines.append(_row(f"`{row['spacing']}`", *cells))
    title = (
        "How many of the numbers of steps from 1 to 1000 diffusers' `DDIMScheduler` gets wrong, and the first of them:"
    )
    return f"{title}\n\n" + "\n".join(lines)


def _samples(rows: list[dict]) -> str:
    lines = [_row("steps", *(f"`{spacing}`" for spacing in SPACINGS)), _row(*["---"] * 4)]
    for row in rows:
        lines.append(_row(row["steps"], *("{:.3f}, {:.3f}".format(*row[spacing]) for spacing in SPACINGS)))
    return (
        "The effect on samples: mean and standard deviation of 20 000 samples in float64 of the data N(0.3, 0.5^2), "
        "with the exact model and eta = 0. The standard deviation of a right sampler approaches 0.5 from below as "
        "the number of steps grows. With 61 and 206 steps of `trailing` the model is called with timestep -1; the "
        "exact model used here answers for the noise level that the scheduler reads there, that of timestep 999, and "
        "all samples become nearly equal. What another model answers at timestep -1 depends on the model.\n\n"
        + "\n".join(lines)
    )


def _orders(found: dict) -> str:
    """Return what ``tools/solver_orders.py`` has measured."""
    steps = found["steps"]
    lines = [_row("`algorithm_type`", "`solver_order`", *(f"{n} steps" for n in steps), "order")]
    lines.append(_row(*["---"] * (len(steps) + 3)))
    for row in found["solvers"]:
        order = math.log2(row["errors"][-2] / row["errors"][-1])
        name = f"{row['order']}, as derived" if row["derived"] else row["order"]
        errors = (f"{error:.2e}" for error in row["errors"])
        lines.append(_row(f"`{row['algorithm']}`", name, *errors, f"{order:.2f}"))
    return (
        f"`DPMSolverMultistepScheduler` of diffusers {found['version']} with `solver_order=3` converges with order 2, and "
        "with `sde-dpmsolver++` with order 1. `python tools/solver_orders.py` runs its own update methods in float64, with the "
        "exact model and steps of equal length in lambda, from -4 to 4. The errors are the largest of nine samples of a "
        "mixture of three normal distributions; of the SDE form, that of the standard deviation of samples of "
        "N(0.3, 0.5^2). The order is that of the last two.\n\n"
        "Cause: `multistep_dpm_solver_third_order_update` (`schedulers/scheduling_dpmsolver_multistep.py`, and likewise in "
        "the EDM scheduler) gives the second divided difference of the predictions the weight of their second derivative. "
        "The difference is half the derivative: the parabola through three predictions has it with twice that weight. In the "
        "SDE form the weight also has `- 0.5` where the integral has `+ 0.5`, so that it tends to -1 for short steps, rather "
        "than to 0, and errors are larger than with `solver_order=2`. `order=3` of `ddim_fast` has the weights of the "
        "derivation; `FastDPMSolverMultistepScheduler` takes the steps of its original.\n\n" + "\n".join(lines)
    )


def _failures(found: dict) -> list[str]:
    """Return the failures grouped by meaning, each group with its first case."""
    groups: dict[tuple, list] = {}
    for one in found["subjects"]:
        for check in one["checks"]:
            if check["outcome"] == "failed":
                groups.setdefault((check["name"], *MEANINGS[one["label"], check["name"]]), []).append((one, check))
    texts = []
    for (name, kind, text), cases in groups.items():
        one, check = cases[0]
        subjects = dict.fromkeys(f"{one['package']} {one['label']}" for one, _ in cases)
        texts.append(f"### `{name}`: {', '.join(subjects)}\n\n**{kind.capitalize()}** ({KINDS[kind]}). {text}")
        texts.append(f"> {_one_line(check['message'])}")
        texts.append(f"```python\n{check['code']}\n```")
    return texts


def _one_line(text: str) -> str:
    return " ".join(text.split())


def unexplained(found: dict) -> list[str]:
    return [
        f"{one['label']}: {check['name']}: {check['message']}"
        for one in found["subjects"]
        for check in one["checks"]
        if check["outcome"] == "failed" and (one["label"], check["name"]) not in MEANINGS
    ]


def with_findings(document: str, found: dict) -> str:
    before, _, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise click.ClickException(f"{DOCUMENT} must have the lines {BEGIN} and {END}, and lacks one: restore it")
    return f"{before}{BEGIN}\n\n{rendered(found)}\n\n{END}{after}"


def render(found: dict) -> None:
    if missing := unexplained(found):
        raise click.ClickException("each failure needs a meaning in MEANINGS, got none for:\n" + "\n".join(missing))
    DOCUMENT.write_text(with_findings(DOCUMENT.read_text(), found))


# --- Commands ---------------------------------------------------------------------------------------------------------


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command("run", help="Verify all subjects, and write docs/findings.json and docs/FINDINGS.md.")
@click.option("--only", multiple=True, help="Verify only subjects of this package; keep the other results.")
@click.option("--quick", is_flag=True, help="Run only the quick set; keep the results of the full set.")
@click.option("--full", is_flag=True, help="Run only the full set; keep the results of the quick set.")
def run_command(only: tuple[str, ...], quick: bool, full: bool) -> None:
    from tqdm.auto import tqdm

    before = json.loads(JSON_FILE.read_text()) if JSON_FILE.exists() else {"subjects": [], "spacings": []}
    kept = {(one["label"], one["full"]): one for one in before["subjects"]}
    wanted = [(label, False) for label in SUBJECTS] + [(label, True) for label in FULL]
    for label, thorough in tqdm(
        [w for w in wanted if not (quick and w[1]) and not (full and not w[1])], unit="subject"
    ):
        name, package = SUBJECTS[label]
        if only and package not in only:
            continue
        one = {"label": label, "subject": name, "package": package, "version": version_of(package), "full": thorough}
        kept[label, thorough] = one | {"checks": verified(name, thorough)}
    found = before | {"subjects": [kept[key] for key in wanted if key in kept]}
    if not only or "diffusers" in only:
        found |= {"spacings": spacing_sweep(), "samples": samples_by_spacing(), "orders": solver_orders()}
        found["versions"] = {p: version_of(p) for p in ("torch", "numpy")}
    JSON_FILE.write_text(json.dumps(found, indent=1) + "\n")
    render(found)


@main.command("orders", help="Measure the orders of diffusers' multistep solvers again; keep the other results.")
def orders_command() -> None:
    found = json.loads(JSON_FILE.read_text())
    found["orders"] = solver_orders()
    JSON_FILE.write_text(json.dumps(found, indent=1) + "\n")
    render(found)


@main.command("render", help="Regenerate docs/FINDINGS.md from docs/findings.json.")
def render_command() -> None:
    render(json.loads(JSON_FILE.read_text()))


PACKAGES = ("azula==0.11.1", "denoising-diffusion-pytorch==2.3.4", "k-diffusion==0.1.1.post1")
NEEDED = ("einops", "ema-pytorch", "torchdiffeq", "torchsde", "trampoline", "boltons")
STANDING_IN = (
    "torchvision", "accelerate", "pytorch_fid", "skimage", "cleanfid", "clip", "dctorch", "jsonmerge", "kornia", "wandb",
)  # fmt: skip
"""Packages that the libraries import only for training, data and images. Their samplers do not use
them, so empty modules suffice."""


@main.command("prepare", help="Make an environment in FOLDER with the libraries and all packages of this environment.")
@click.argument("folder", type=click.Path(path_type=Path, exists=False))
def prepare_command(folder: Path) -> None:
    from borrowed_environment import make_environment  # beside this script

    make_environment(folder, (*PACKAGES, *NEEDED), STANDING_IN)


if __name__ == "__main__":
    main()
