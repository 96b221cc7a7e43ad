"""The log-probability of a step, the divergence of two, and their gradients: every backend and instruction set against float64, and the
bits that must not depend on anything."""

import contextlib
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from density_cases import PAIRS, B, D, F, make, same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS
from page_examples import examples

import ddim_fast as df
from ddim_fast.kernels import cpu_step, gaussian
from ddim_fast.kernels.contract import StepCoefficients, StepTable
from ddim_fast.kernels.dispatch import ddim_step, ddim_step_from_table
from ddim_fast.kernels.log_prob import ddim_kl, ddim_log_prob
from ddim_fast.verify.truth import oracle, tolerances
from ddim_fast.verify.truth.tolerances import to_numpy

pytestmark = pytest.mark.usefixtures("nan_memory")

INSTRUCTION_SETS = cpu_step.extension.instruction_sets() if cpu_step.extension is not None else []
TARGETS = ["reference", *INSTRUCTION_SETS]
per_target = pytest.mark.parametrize("target", TARGETS)
per_simd = pytest.mark.parametrize("target", INSTRUCTION_SETS)
SHAPES = [
    (0, 3),
    (2, 0),
    (1, 1),
    (2, 127),
    (3, 128),
    (2, 129),
    (2, 3, 8, 8),
    (1, 2048),
    (2, 2049),
    (1, 3, 70, 70),
    (5,),
]


@contextlib.contextmanager
def running_on(target):
    """The backend's name, with this instruction set where it is one."""
    if target == "reference":
        yield "reference"
        return
    before = cpu_step.extension.selected()
    cpu_step.extension.select(target)
    try:
        yield "cpu"
    finally:
        cpu_step.extension.select(before)


def test_every_instruction_set_is_tested():
    assert cpu_step.extension is not None, cpu_step.missing_reason
    assert "portable" in INSTRUCTION_SETS


# --- Values -----------------------------------------------------------------------------------------------------------


cases = {
    "seed": st.integers(0, 2**20),
    "shape": st.sampled_from(SHAPES),
    "types": st.sampled_from(PAIRS),
    "prediction_type": st.sampled_from(["epsilon", "sample", "v_prediction"]),
    "clip": st.sampled_from([math.inf, 1.0]),
    "rederived": st.booleans(),
    "guidance": st.booleans(),
    "mask": st.booleans(),
    "reduction": st.sampled_from(gaussian.REDUCTIONS),
    "min_std": st.sampled_from([None, 0.01, 0.5]),
    "layout": st.sampled_from(list(LAYOUTS)),
}


def valid(options):
    if options["clip"] == math.inf:
        options["rederived"] = False
    return options


def assert_near(got, exact, allowed, what=""):
    assert got.dtype == F
    tolerances.assert_within(got, exact, allowed, what)


@per_target
@given(options=st.fixed_dictionaries(cases).map(valid))
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
def test_log_probability_and_divergence_are_near_float64(target, options):
    case = make(**options)
    with running_on(target) as backend:
        assert_near(case.evaluate(backend), *case.log_prob(), "log-probability")
        assert_near(case.evaluate(backend, "kl"), *case.kl(), "divergence")


def test_the_oracle_is_the_normal_distribution():
    case = make(shape=(3, 64), reduction="sum")
    mean = torch.from_numpy(case.mean(case.m, None)[0])
    expected = torch.distributions.Normal(mean, case.std).log_prob(case.x_prev.double()).sum(1)
    np.testing.assert_allclose(case.log_prob()[0], expected.numpy(), rtol=1e-12)


# --- A step with its log-probability ----------------------------------------------------------------------------------


def step_options(case, seed=0, **more):
    seeds = torch.arange(len(case.x_t)) * 7 - seed
    options = {k: v for k, v in case.keywords.items() if k not in ("mask", "min_std")}
    if case.keywords["mask"] is not None:
        options |= {"mask": case.keywords["mask"], "known_x0": case.x_t.flip(0).contiguous()}
    return options | {"seeds": seeds, "noise_step": 3} | more


@per_target
@given(options=st.fixed_dictionaries(cases).map(valid))
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
def test_a_step_has_the_bits_of_the_log_probability_of_what_it_stored(target, options):
    case = make(**options)
    log_prob = torch.empty(len(case.x_t))
    with running_on(target) as backend:
        arguments = step_options(case)
        plain = ddim_step(case.x_t, case.m, case.coefficients, backend=backend, **arguments)
        scored = ddim_step(
            case.x_t, case.m, case.coefficients, backend=backend, log_prob_out=log_prob,
            log_prob_reduction=case.reduction, min_std=case.keywords["min_std"], **arguments,
        )  # fmt: skip
        assert same_bits(scored, plain)
        case.x_prev = scored
        assert torch.equal(case.evaluate(backend), log_prob)
    assert_near(log_prob, *case.log_prob())


@per_target
@pytest.mark.parametrize("types", PAIRS)
@pytest.mark.parametrize("other", ["x_t", "model_output", "mask"])
def test_in_place(target, types, other):
    case = make(shape=(2, 2100), types=types, mask=True)
    if other == "model_output" and types[0] != types[1]:
        other = "x_t"
    expected, log_prob = torch.empty(2), torch.empty(2)
    with running_on(target) as backend:
        arguments = step_options(case)
        first = ddim_step(case.x_t, case.m, case.coefficients, backend=backend, log_prob_out=expected, **arguments)
        out = {"x_t": case.x_t, "model_output": case.m, "mask": arguments["mask"]}[other]
        ddim_step(case.x_t, case.m, case.coefficients, backend=backend, log_prob_out=log_prob, out=out, **arguments)
    assert same_bits(out, first)
    assert same_bits(log_prob, expected)


@per_target
def test_every_other_option_of_a_step(target):
    """Thresholds, histories, given noise, the model's next input and x0: the mean is what comes before the noise."""
    case = make(shape=(2, 2100), clip=1.0)
    row = case.row | {"prev_history": -0.375, "prev_history_2": 0.1875, "input_scale": 0.7}
    history, history_2 = case.x_t.flip(1).contiguous(), case.m.flip(1).contiguous()
    options = {"thresholds": torch.tensor([1.5, 0.75])}
    exact = {"thresholds": np.array([1.5, 0.75]), "history": to_numpy(history), "history_2": to_numpy(history_2)}
    z = torch.from_numpy(np.random.default_rng(5).standard_normal((2, 2100))).float()
    log_prob, x0, model_input = torch.empty(2), torch.empty_like(z), torch.empty_like(z, dtype=B)
    mean = oracle.row_step(row | {"prev_noise": 0.0}, to_numpy(case.x_t), to_numpy(case.m), **exact)
    with running_on(target) as backend:
        x_prev = ddim_step(
            case.x_t, case.m, StepCoefficients(**row), noise=z, history=history, history_2=history_2, x0_out=x0,
            model_input_out=model_input, log_prob_out=log_prob, backend=backend, **options,
        )  # fmt: skip
    deviation, std = to_numpy(x_prev) - mean.x_prev, row["prev_noise"]
    each = -0.5 * (deviation / std) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi)
    offset = math.log(std) + 0.5 * math.log(2 * math.pi)
    allowed = tolerances.allowed_density_error(F, deviation, mean.terms, 0.5 / std**2, offset)
    assert_near(log_prob, each.mean(1), allowed / 2100)
    assert not x0.isnan().any()
    assert torch.equal(model_input, (0.7 * x_prev).to(B)) or torch.allclose(
        model_input.float(), 0.7 * x_prev, atol=0.02
    )


@per_target
def test_a_table_gives_the_same_bits(target):
    plan = df.SamplingPlan(df.NoiseSchedule.linear(), (900, 500, 100), eta=1.0)
    x, m = make(shape=(2, 300)).x_t, make(shape=(2, 300)).m
    seeds, index = torch.tensor([1, 2]), torch.tensor([2, 0])
    together, alone = torch.empty(2), torch.empty(2)
    with running_on(target):
        ddim_step_from_table(x, m, plan.table(min_std=0.3), index, seeds=seeds, log_prob_out=together)
        for i, k in enumerate(index.tolist()):
            one = slice(i, i + 1)
            ddim_step(
                x[one], m[one], plan.steps[k].coefficients, seeds=seeds[one], noise_step=k, log_prob_out=alone[one],
                min_std=0.3,
            )  # fmt: skip
    assert same_bits(together, alone)


# --- Bits that depend on nothing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 31, 129, 2047, 2048, 2049, 9000, 140 * 2048 + 5])
@pytest.mark.parametrize("types", PAIRS)
def test_instruction_sets_give_the_same_bits(n, types):
    case = make(shape=(2, n), types=types, clip=1.0, guidance=True, mask=n % 2 == 1)
    got = []
    for target in INSTRUCTION_SETS:
        with running_on(target) as backend:
            log_prob = torch.empty(2)
            x_prev = ddim_step(case.x_t, case.m, case.coefficients, log_prob_out=log_prob, **step_options(case))
            got.append(
                (x_prev, log_prob, case.evaluate(backend), case.evaluate(backend, "kl"), *gradients(case, backend))
            )
    for others in got[1:]:
        assert all(same_bits(a, b) for a, b in zip(got[0], others, strict=True))


@per_simd
@pytest.mark.parametrize("count", [2, 3, 8])
def test_threads_and_splits_of_the_batch_change_no_bits(target, count, threads):
    case = make(shape=(3, 9000), clip=1.0, guidance=True)
    with running_on(target) as backend:
        expected = case.evaluate(backend), *gradients(case, backend)
        stepped = torch.empty(3)
        x_prev = ddim_step(case.x_t, case.m, case.coefficients, log_prob_out=stepped, **step_options(case))
        threads(count)
        assert all(
            same_bits(a, b) for a, b in zip(expected, (case.evaluate(backend), *gradients(case, backend)), strict=True)
        )
        again = torch.empty(3)
        assert same_bits(
            ddim_step(case.x_t, case.m, case.coefficients, log_prob_out=again, **step_options(case)), x_prev
        )
        assert same_bits(again, stepped)
        for i in range(3):
            alone = dataclasses.replace(
                case, x_t=case.x_t[i : i + 1], m=case.m[i : i + 1], x_prev=case.x_prev[i : i + 1],
                keywords=case.keywords | {"model_output_uncond": case.keywords["model_output_uncond"][i : i + 1]},
            )  # fmt: skip
            assert same_bits(alone.evaluate(backend), expected[0][i : i + 1])


@per_simd
def test_the_order_of_the_sum_is_the_written_one(target):
    """docs/LOG_PROB.md, in NumPy."""
    rng = np.random.default_rng(3)
    samples, n = 8, 131 * 2048 + 77
    x_prev = torch.from_numpy(rng.standard_normal((samples, n)) * 2.0 ** rng.integers(-8, 9, n)).float()
    zero, row = torch.zeros(samples, n), StepCoefficients(0, 0, 0, 0, 0, 0, 0, prev_noise=0.75)
    blocks = np.zeros((samples, -(-n // 2048) * 2048), np.float32)
    blocks[:, :n] = x_prev.numpy() ** 2
    sums = by_halves(by_halves(blocks.reshape(samples, -1, 512, 4)))
    columns = np.zeros((samples, 128))
    for k in range(sums.shape[1]):
        columns[:, k % 128] += sums[:, k].astype(np.float64)
    scale, offset = (np.float64(np.float32(number)) for number in gaussian.scale_and_offset(0.75, None))
    total = -(scale * by_halves(columns) + offset * n)
    with running_on(target) as backend:
        mean, together = (
            ddim_log_prob(x_prev, zero, zero, row, log_prob_reduction=reduction, backend=backend)
            for reduction in gaussian.REDUCTIONS
        )
    np.testing.assert_array_equal(mean.numpy(), (total / n).astype(np.float32))
    np.testing.assert_array_equal(together.numpy(), total.astype(np.float32))


def by_halves(values, axis=-1):
    values = np.moveaxis(values, axis, 0)
    while len(values) > 1:
        values = values[: len(values) // 2] + values[len(values) // 2 :]
    return values[0]


# --- Gradients --------------------------------------------------------------------------------------------------------


def gradients(case, backend, what="log_prob", weights=None):
    """The gradients of a weighted sum of the results, in the model's outputs and, of a log-probability, in x_t."""
    leaves = {"m": case.m.detach().clone().requires_grad_()}
    uncond = case.keywords["model_output_uncond"]
    if uncond is not None:
        leaves["uncond"] = uncond.detach().clone().requires_grad_()
    if what == "log_prob":
        leaves["x_t"] = case.x_t.detach().clone().requires_grad_()
    changed = dataclasses.replace(
        case,
        m=leaves["m"],
        x_t=leaves.get("x_t", case.x_t),
        keywords=case.keywords | {"model_output_uncond": leaves.get("uncond")},
    )
    result = changed.evaluate(backend, what)
    weights = torch.linspace(0.5, 2, len(result), dtype=result.dtype) if weights is None else weights
    return torch.autograd.grad(result, list(leaves.values()), weights)


def exact_gradients(case, what="log_prob"):
    """The same by autograd in float64, from the textbook; and which elements are clear of the bounds of x0."""
    row, std, counted = case.row, case.std, torch.from_numpy(case.counted)
    x, m = (
        case.x_t.double().reshape(counted.shape).requires_grad_(),
        case.m.double().reshape(counted.shape).requires_grad_(),
    )
    uncond = case.keywords["model_output_uncond"]
    leaves = [m]
    guided = m
    if uncond is not None:
        uncond = uncond.double().reshape(counted.shape).requires_grad_()
        leaves.append(uncond)
        guided = uncond + case.keywords["guidance_scale"] * (m - uncond)

    def mean_of(guided):
        x0 = (row["x0_x"] * x + row["x0_m"] * guided).clamp(-row["clip"], row["clip"])
        eps = row["eps_x"] * x + row["eps_m"] * guided + row["eps_0"] * x0
        return row["prev_x0"] * x0 + row["prev_eps"] * eps

    with torch.no_grad():
        size = abs(row["x0_x"]) * x.abs() + abs(row["x0_m"]) * (
            m.abs() * 2.5 + (0 if uncond is None else uncond.abs() * 1.5)
        )
        clear = ((row["x0_x"] * x + row["x0_m"] * guided).abs() - row["clip"]).abs() > 1e-5 * size
    if what == "log_prob":
        leaves.append(x)
        target = case.x_prev.double().reshape(counted.shape)
        each = torch.distributions.Normal(mean_of(guided), std).log_prob(target)
    else:
        with torch.no_grad():
            other = case.reference.double().reshape(counted.shape)
            if uncond is not None:
                other_uncond = case.reference_uncond.double().reshape(counted.shape)
                other = other_uncond + case.keywords["guidance_scale"] * (other - other_uncond)
            other_mean = mean_of(other)
        each = (mean_of(guided) - other_mean) ** 2 / (2 * std**2)
    result = (each * counted).sum(1)
    if case.reduction == "mean":
        result = result / counted.sum(1).clamp(min=1)
    weights = torch.linspace(0.5, 2, len(result), dtype=D)
    return torch.autograd.grad(result, leaves, weights), clear


def assert_gradients(case, backend, what):
    exact, clear = exact_gradients(case, what)
    got = gradients(case, backend, what)
    _, terms = case.mean(case.m, case.keywords["model_output_uncond"])
    if what == "kl":
        terms = 2 * terms + case.mean(case.reference, case.reference_uncond)[1]
    off = tolerances.allowed_error(case.x_t.dtype, terms + np.abs(case.flat(to_numpy(case.x_prev))))
    count = np.maximum(case.counted.sum(1), 1) if case.reduction == "mean" else np.ones(len(case.x_t))
    weights = np.linspace(0.5, 2, len(case.x_t))
    slope = (
        4 + max(abs(column) for name, column in case.row.items() if name != "clip") ** 3
    )  # at least any d mean / d tensor
    allowed = (weights / count / case.std**2)[:, None] * off * slope
    for gradient, expected in zip(got, exact, strict=True):
        wanted = np.where(clear, expected.numpy(), 0)
        found = torch.where(clear, gradient.reshape(clear.shape), torch.zeros_like(gradient.reshape(clear.shape)))
        tolerances.assert_within(found, wanted, allowed, what)


@per_target
@given(options=st.fixed_dictionaries(cases).map(valid))
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
def test_gradients_are_near_float64(target, options):
    if 0 in options["shape"]:
        options["shape"] = (2, 130)
    case = make(**options)
    with running_on(target) as backend:
        assert_gradients(case, backend, "log_prob")
        assert_gradients(case, backend, "kl")


@pytest.mark.parametrize("clip", [math.inf, 1.0])
@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize("reduction", gaussian.REDUCTIONS)
def test_gradcheck(clip, guidance, reduction):
    case = make(shape=(2, 3, 4), types=(D, D), clip=clip, guidance=guidance, mask=True, reduction=reduction)
    tensors = [case.x_t, case.m, *([case.keywords["model_output_uncond"]] if guidance else [])]

    def evaluate(what):
        def function(x_t, m, *uncond):
            keywords = case.keywords | {"model_output_uncond": uncond[0] if guidance else None}
            return dataclasses.replace(case, x_t=x_t, m=m, keywords=keywords).evaluate(None, what)

        return function

    assert torch.autograd.gradcheck(evaluate("log_prob"), [t.clone().requires_grad_() for t in tensors])
    trained = [tensors[0], *(t.clone().requires_grad_() for t in tensors[1:])]
    assert torch.autograd.gradcheck(evaluate("kl"), trained)


@pytest.mark.parametrize("reduction", gaussian.REDUCTIONS)
def test_closed_gradients_are_those_of_autograd_through_the_reference(reduction):
    """The formulas of the backward pass against torch's derivatives of the forward pass, on the bound of x0, too."""
    case = make(shape=(2, 40), types=(D, D), clip=1.0, guidance=True, reduction=reduction)
    case.row |= {"x0_x": 1.0, "x0_m": 0.0}
    case.x_t[0, :3] = torch.tensor([1.0, -1.0, 1.5])
    got = gradients(case, None)
    leaves = [t.clone().requires_grad_() for t in (case.m, case.keywords["model_output_uncond"], case.x_t)]
    from ddim_fast.kernels import density, fields, reference

    step = fields.StepInputs(leaves[2], leaves[0], case.coefficients, model_output_uncond=leaves[1], guidance_scale=2.5)
    result = reference.density(density.DensityInputs(step, x_prev=case.x_prev, reduction=reduction))
    expected = torch.autograd.grad(result, leaves, torch.linspace(0.5, 2, 2, dtype=D))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@per_target
def test_only_the_inputs_are_saved(target):
    case = make(shape=(2, 500), guidance=True, mask=True)
    m = case.m.clone().requires_grad_()
    saved = []
    with (
        running_on(target) as backend,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        dataclasses.replace(case, m=m).evaluate(backend).sum()
    inputs = {
        t.data_ptr()
        for t in (case.x_t, m, case.x_prev, *(v for v in case.keywords.values() if isinstance(v, torch.Tensor)))
    }
    assert {t.data_ptr() for t in saved if t.numel() > 2} == inputs


@per_target
def test_only_gradients_that_are_asked_for_are_computed(target):
    case = make(shape=(2, 50), guidance=True)
    with running_on(target) as backend:
        _, uncond, _ = gradients(case, backend)
        leaf = case.keywords["model_output_uncond"].clone().requires_grad_()
        result = case.evaluate(backend, model_output_uncond=leaf)
        (alone,) = torch.autograd.grad(result, leaf, torch.linspace(0.5, 2, 2))
    assert same_bits(alone, uncond)
    assert not case.m.requires_grad


@per_target
def test_a_gradient_is_not_differentiable_twice(target):
    case = make(shape=(2, 50))
    m = case.m.clone().requires_grad_()
    with running_on(target) as backend:
        result = dataclasses.replace(case, m=m).evaluate(backend)
        (gradient,) = torch.autograd.grad(result.sum(), m, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            gradient.sum().backward()


def test_a_changed_input_is_noticed_in_the_backward_pass():
    case = make(shape=(2, 50))
    m = case.m.clone().requires_grad_()
    result = dataclasses.replace(case, m=m).evaluate(None)
    case.x_prev.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_a_step_that_records_gradients_has_x_prev_as_a_constant():
    case = make(shape=(2, 50))
    m, log_prob = case.m.clone().requires_grad_(), torch.empty(2)
    x_prev = ddim_step(case.x_t, m, case.coefficients, log_prob_out=log_prob, **step_options(case))
    (got,) = torch.autograd.grad(log_prob, m, torch.linspace(0.5, 2, 2))
    case.x_prev = x_prev.detach()
    expected = gradients(case, "reference")[0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    assert got.abs().max() > 0.001


def test_transforms_of_torch_func():
    case = make(shape=(2, 50), types=(D, D))
    got = torch.func.grad(lambda m: dataclasses.replace(case, m=m).evaluate(None).sum())(case.m)
    expected = gradients(case, None, weights=torch.ones(2, dtype=D))[0]
    torch.testing.assert_close(got, expected)


# --- Traced -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore::DeprecationWarning:torch.*")
def test_torch_compile():
    case = make(shape=(2, 300))

    def train(m):
        result = dataclasses.replace(case, m=m).evaluate(None)
        return result, torch.autograd.grad(result.sum(), m)[0]

    def step(x_t, m, out):
        return ddim_step(x_t, m, case.coefficients, log_prob_out=out, **step_options(case))

    m = case.m.clone().requires_grad_()
    expected, gradient = train(m)
    compiled = torch.compile(lambda m: dataclasses.replace(case, m=m).evaluate(None), fullgraph=True, backend="eager")(
        m
    )
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(torch.autograd.grad(compiled.sum(), m)[0], gradient, rtol=1e-5, atol=1e-7)
    eager, traced = torch.empty(2), torch.empty(2)
    x_prev = step(case.x_t, case.m, eager)
    assert same_bits(torch.compile(step, fullgraph=True, backend="eager")(case.x_t, case.m, traced), x_prev)
    assert same_bits(traced, eager)


# --- Errors -----------------------------------------------------------------------------------------------------------

QUIET = StepCoefficients(1.5, -0.5, 0, 1, 0, 0.5, 0.5, prev_noise=0)
NOISY = dataclasses.replace(QUIET, prev_noise=0.5)
X = torch.zeros(2, 3, 4)


def call(**changed):
    arguments = {"x_prev": X, "x_t": X, "model_output": X, "coefficients": NOISY} | changed
    return ddim_log_prob(**arguments)


def call_kl(**changed):
    arguments = {"x_t": X, "model_output": X, "model_output_ref": X, "coefficients": NOISY} | changed
    return ddim_kl(**arguments)


def call_step(**changed):
    arguments = {
        "x_t": X, "model_output": X, "coefficients": NOISY, "seeds": torch.tensor([1, 2]), "log_prob_out": torch.zeros(2)
    }  # fmt: skip
    return ddim_step(**(arguments | changed))


LEAF = torch.zeros(2, 3, 4, requires_grad=True)
ERRORS = {
    "no x_prev": (call, {"x_prev": None}, TypeError, ["x_prev must be a torch.Tensor", "NoneType"]),
    "x_prev shape": (call, {"x_prev": X[:1]}, ValueError, ["x_prev must have the shape of x_t", "(1, 3, 4)"]),
    "x_prev dtype": (call, {"x_prev": X.double()}, TypeError, ["x_prev must have the dtype of x_t", "float64"]),
    "x_prev device": (call, {"x_prev": X.to("meta")}, ValueError, ["x_prev must be on the device of x_t", "meta"]),
    "x_prev gradient": (call, {"x_prev": LEAF}, ValueError, ["x_prev is a constant", "x_prev.detach()"]),
    "mask gradient": (call, {"mask": LEAF}, ValueError, ["mask is a constant", "mask.detach()"]),
    "mask dtype": (call, {"mask": X.bool()}, TypeError, ["mask must have the dtype of x_t", "bool"]),
    "reduction": (call, {"log_prob_reduction": "max"}, ValueError, ["log_prob_reduction must be one of mean, sum", "max"]),
    "no noise": (call, {"coefficients": QUIET}, ValueError, ["standard deviation above 0", "prev_noise = 0", "min_std"]),
    "tiny": (call, {"min_std": 1e-30, "coefficients": QUIET}, ValueError, ["2**-60 to 2**60", "min_std = 1e-30"]),
    "min_std": (call, {"min_std": 0.0}, ValueError, ["min_std must be a finite number, above 0", "0.0"]),
    "min_std kind": (call, {"min_std": "0.1"}, TypeError, ["min_std must be a finite number", "'0.1'"]),
    "guidance": (call, {"guidance_scale": 2.0}, ValueError, ["guidance needs both", "model_output_uncond"]),
    "history": (
        call, {"coefficients": dataclasses.replace(NOISY, prev_history=0.5)}, ValueError, ["prev_history = 0.5", "order=1"]
    ),
    "row": (call, {"coefficients": (1, 2)}, TypeError, ["coefficients must be a StepCoefficients", "tuple"]),
    "backend": (call, {"backend": "gpu"}, ValueError, ["backend must be one of", "gpu"]),
    "kl: no reference": (call_kl, {"model_output_ref": None}, TypeError, ["model_output_ref must be a torch.Tensor"]),
    "kl: gradient of the reference": (
        call_kl, {"model_output_ref": LEAF}, ValueError, ["model_output_ref is a constant", "model_output_ref.detach()"]
    ),
    "kl: gradient of x_t": (call_kl, {"x_t": LEAF}, ValueError, ["x_t is a constant", "x_t.detach()"]),
    "kl: one half": (
        call_kl, {"model_output_uncond": X, "guidance_scale": 2.0}, ValueError, ["model_output_ref_uncond", "only one"]
    ),
    "kl: dtype": (
        call_kl, {"model_output_ref": X.half()}, TypeError, ["model_output_ref must have the dtype of model_output", "float16"]
    ),
    "kl: reduction": (call_kl, {"reduction": None}, ValueError, ["reduction must be one of mean, sum", "None"]),
    "step: shape": (call_step, {"log_prob_out": torch.zeros(3)}, ValueError, ["log_prob_out must have one entry", "(3,)"]),
    "step: dtype": (call_step, {"log_prob_out": torch.zeros(2).half()}, TypeError, ["log_prob_out must be torch.float32"]),
    "step: no noise": (call_step, {"coefficients": QUIET, "seeds": None}, ValueError, ["above 0", "prev_noise = 0"]),
    "step: min_std alone": (call_step, {"log_prob_out": None, "min_std": 0.1}, ValueError, ["min_std", "log_prob_out"]),
    "step: reduction": (call_step, {"log_prob_reduction": "mode"}, ValueError, ["log_prob_reduction must be one of", "mode"]),
    "step: expanded": (
        call_step, {"log_prob_out": torch.zeros(1).expand(2)}, ValueError, ["log_prob_out is written to", "expanded"]
    ),
    "step: overlap": (
        call_step, {"out": (memory := torch.zeros(24)).view(2, 3, 4), "log_prob_out": memory[:2]}, ValueError, ["share"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument_the_value_and_the_remedy(name):
    function, changed, kind, parts = ERRORS[name]
    with pytest.raises(kind) as error:
        function(**changed)
    for part in parts:
        assert part in str(error.value)


def test_a_table_with_quiet_steps_is_refused_unless_it_has_a_least_deviation():
    index, seeds, log_prob = torch.tensor([1]), torch.tensor([1, 2]), torch.empty(2)
    rows = [QUIET, NOISY]
    with pytest.raises(ValueError, match="needs a table whose steps all add noise, got one with steps that add none"):
        ddim_step_from_table(X, X, StepTable.of(rows), index, seeds=seeds, log_prob_out=log_prob)
    ddim_step_from_table(X, X, StepTable.of(rows, min_std=0.1), index, seeds=seeds, log_prob_out=log_prob)
    assert log_prob.isfinite().all()
    with pytest.raises(ValueError, match="min_std must be a finite number, above 0"):
        StepTable.of(rows, min_std=-1.0)


def test_a_table_may_skip_quiet_steps():
    """Their log-probability is 0, whatever was there; that of the others is as it was."""
    seeds, rows = torch.tensor([1, 2]), [QUIET, NOISY]
    table, log_prob = StepTable.of(rows, skip_quiet=True), torch.full((2,), 7.0)
    x_prev = ddim_step_from_table(X, X, table, torch.tensor([0]), seeds=seeds, log_prob_out=log_prob)
    assert torch.equal(log_prob, torch.zeros(2))
    assert same_bits(x_prev, ddim_step(X, X, QUIET))
    ddim_step_from_table(X, X, table, torch.tensor([1]), seeds=seeds, log_prob_out=log_prob)
    expected = torch.empty(2)
    ddim_step(X, X, NOISY, seeds=seeds, noise_step=1, log_prob_out=expected)
    assert same_bits(log_prob, expected)
    with pytest.raises(ValueError, match=r"rows of their own .*: make it without skip_quiet"):
        ddim_step_from_table(X, X, table, torch.tensor([0, 1]), seeds=seeds, log_prob_out=log_prob)


@per_target
def test_a_floor_is_the_deviation_of_a_quiet_step(target):
    case = make(shape=(2, 130), min_std=0.25)
    case.row["prev_noise"] = 0.0
    with running_on(target) as backend:
        assert_near(case.evaluate(backend), *case.log_prob())


# --- Extremes ---------------------------------------------------------------------------------------------------------


@per_target
@pytest.mark.parametrize("std", [2.0**-60, 1e-8, 1e9, 2.0**60])
@pytest.mark.parametrize("reduction", gaussian.REDUCTIONS)
def test_extreme_standard_deviations(target, std, reduction):
    x_prev = torch.linspace(-2, 2, 130).repeat(2, 1) * std
    zero = torch.zeros(2, 130)
    row = StepCoefficients(0, 0, 0, 0, 0, 0, 0, prev_noise=std)
    with running_on(target) as backend:
        got = ddim_log_prob(x_prev, zero, zero, row, log_prob_reduction=reduction, backend=backend)
    each = -0.5 * (to_numpy(x_prev) / std) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi)
    expected = each.sum(1) if reduction == "sum" else each.mean(1)
    np.testing.assert_allclose(to_numpy(got), expected, rtol=1e-6)


@per_target
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_not_hidden(target, value):
    for place, mask in itertools.product(("x_prev", "x_t", "m"), (False, True)):
        case = make(shape=(2, 300), mask=mask)
        getattr(case, place)[0, 7] = value
        with running_on(target) as backend:
            got = case.evaluate(backend)
            hidden = mask and float(case.keywords["mask"][0, 7]) != 0
            assert bool(got[0].isfinite()) == hidden
            assert got[1].isfinite()


@per_target
def test_a_sample_in_which_nothing_counts_has_log_probability_0(target):
    case = make(shape=(2, 300), mask=True)
    case.keywords["mask"][0] = 1
    with running_on(target) as backend:
        for case.reduction in gaussian.REDUCTIONS:
            assert case.evaluate(backend)[0] == 0
            assert not any(g[0].any() for g in gradients(case, backend))


# --- docs/LOG_PROB.md -------------------------------------------------------------------------------------------------


def test_the_examples_of_the_page_run_and_say_the_truth():
    names = {}
    step, rollout = examples("LOG_PROB.md")
    step.run(names)
    assert torch.equal(names["ratio"], torch.ones(4))
    assert names["model_output"].grad.isfinite().all()
    assert (names["divergence"] > 0).all()
    rollout.run(names)
    assert names["rollout"].noisy_steps == (1, 2, 3, 4)
    assert names["rollout"].states.shape == (5, 8, 4, 16, 16)
    assert all(weight.grad.isfinite().all() and weight.grad.any() for weight in names["network"].parameters())
