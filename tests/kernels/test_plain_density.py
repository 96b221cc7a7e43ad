"""The log-probability of plain tensors, one call of C++ each way: the bits of the checked way, and what is left to it."""

import itertools

import pytest
import torch
from density_cases import PAIRS, D, F, H, make, same_bits

import ddim_fast as df
from ddim_fast.kernels import cpu_step, log_prob
from ddim_fast.kernels.log_prob import ddim_log_prob

pytestmark = [
    pytest.mark.usefixtures("nan_memory"),
    pytest.mark.skipif(cpu_step.extension is None, reason="the C++ extension is missing"),
]


@pytest.fixture
def taken(monkeypatch):
    """How often each plain call answered, and how often it declined."""
    counts = {"forward": 0, "backward": 0, "declined": 0}

    def watch(name, call):
        def counted(*arguments):
            found = call(*arguments)
            counts["declined" if found is None else name] += 1
            return found

        return counted

    monkeypatch.setattr(cpu_step, "plain_density", watch("forward", cpu_step.plain_density))
    monkeypatch.setattr(cpu_step, "plain_density_backward", watch("backward", cpu_step.plain_density_backward))
    return counts


def with_gradients(case, backend, weights=None):
    """The result, and the gradients of the outputs and of x_t, each an own leaf."""
    uncond = case.keywords["model_output_uncond"]
    leaves = [t.detach().clone().requires_grad_() for t in (case.m, uncond, case.x_t) if t is not None]
    m, x_t = leaves[0], leaves[-1]
    options = case.keywords | {"model_output_uncond": leaves[1] if uncond is not None else None}
    found = ddim_log_prob(
        case.x_prev, x_t, m, case.coefficients, log_prob_reduction=case.reduction, backend=backend, **options
    )
    (found.sum() if weights is None else (found * weights).sum()).backward()
    return [found.detach(), *(leaf.grad for leaf in leaves)]


OPTIONS = [
    *({"shape": (2, n), "seed": n} for n in (1, 127, 128, 129, 2049)),
    {"shape": (5,)},
    {"shape": (3, 2, 8, 8)},
    *({"types": types, "guidance": True} for types in PAIRS),
    *({"mask": True, "reduction": r, "types": t} for r, t in itertools.product(("mean", "sum"), PAIRS[::2])),
    {"reduction": "sum", "clip": 1.0},
    {"clip": 1.0, "rederived": True, "guidance": True, "mask": True},
    {"min_std": 0.5},
    {"prediction_type": "v_prediction", "seed": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_bits_are_those_of_the_checked_way(options, taken):
    case = make(**options)
    assert same_bits(case.evaluate(None), case.evaluate("cpu"))
    assert taken == {"forward": 1, "backward": 0, "declined": 0}
    for weights in (None, torch.linspace(-1.0, 2.0, len(case.x_t))):
        for ours, checked in zip(
            with_gradients(case, None, weights), with_gradients(case, "cpu", weights), strict=True
        ):
            assert same_bits(ours, checked)
    assert taken == {"forward": 3, "backward": 2, "declined": 0}


def test_no_gradient_is_made_that_is_not_asked_for():
    case = make(guidance=True)
    case.keywords["model_output_uncond"].requires_grad_()
    case.evaluate(None).sum().backward()
    assert case.keywords["model_output_uncond"].grad is not None
    assert case.m.grad is None
    assert case.x_t.grad is None


def test_a_backward_that_declines_is_done_the_checked_way(monkeypatch, taken):
    case = make(guidance=True, mask=True)
    expected = with_gradients(case, None)
    monkeypatch.setattr(cpu_step, "plain_density_backward", lambda *_: None)
    for ours, checked in zip(with_gradients(case, None), expected, strict=True):
        assert same_bits(ours, checked)


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@pytest.mark.parametrize("mask", [False, True])
def test_batched_gradients_are_those_of_each(backend, mask):
    case = make(shape=(3, 129), mask=mask)
    case.m.requires_grad_()
    found, rows = case.evaluate(backend), torch.tensor([[1.0, 0, 0], [0, 0.3, 0], [3.0, -1, 2]])
    (batched,) = torch.autograd.grad(found, case.m, rows, is_grads_batched=True, retain_graph=True)
    for row, got in zip(rows, batched, strict=True):
        (alone,) = torch.autograd.grad(found, case.m, row, retain_graph=True)
        torch.testing.assert_close(got, alone, rtol=4 * torch.finfo(F).eps, atol=0)


def test_a_gradient_is_not_differentiable_twice():
    case = make()
    m = case.m.requires_grad_()
    found = ddim_log_prob(case.x_prev, case.x_t, m, case.coefficients)
    (gradient,) = torch.autograd.grad(found.sum(), m, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


def test_a_changed_input_is_noticed_in_the_backward_pass():
    case = make()
    found = ddim_log_prob(case.x_prev, case.x_t, case.m.requires_grad_(), case.coefficients)
    case.x_prev.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.sum().backward()


def test_under_inference_mode_and_no_grad(taken):
    case = make()
    case.m.requires_grad_()
    expected = case.evaluate("cpu").detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = case.evaluate(None)
        assert same_bits(found, expected)
        assert not found.requires_grad
    assert taken["forward"] == 2


DECLINED = {
    "float64": lambda: make(types=(D, D)),
    "not contiguous": lambda: make(shape=(2, 3, 8, 8), layout="channels last"),
    "no elements": lambda: make(shape=(2, 0)),
    "no samples": lambda: make(shape=(0, 3)),
}


@pytest.mark.parametrize("name", DECLINED)
def test_what_is_not_plain_is_left_to_the_checked_way(name, taken):
    case = DECLINED[name]()
    assert torch.equal(case.evaluate(None), case.evaluate("reference")) or name == "not contiguous"
    assert taken["forward"] == 0
    assert taken["declined"] == 1


WRONG = {
    "x_prev of another dtype": (lambda c: {"x_prev": c.x_prev.to(H)}, "x_prev must have"),
    "x_prev of another shape": (lambda c: {"x_prev": c.x_prev[:1]}, "x_prev must have"),
    "x_prev no tensor": (lambda _: {"x_prev": 3}, "x_prev must be"),
    "x_prev with a gradient": (lambda c: {"x_prev": c.x_prev.clone().requires_grad_()}, "x_prev is a constant"),
    "x_t no tensor": (lambda _: {"x_t": None}, "x_t must be"),
    "mask of another shape": (lambda c: {"mask": c.x_t[:, :5]}, "mask must have"),
    "mask with a gradient": (lambda c: {"mask": c.x_t.clone().requires_grad_()}, "mask is a constant"),
    "scale without output": (lambda _: {"guidance_scale": 2.0}, "guidance"),
    "scale not finite": (lambda c: {"guidance_scale": float("inf"), "model_output_uncond": c.m}, "guidance_scale"),
    "reduction": (lambda _: {"log_prob_reduction": "median"}, "log_prob_reduction must be"),
    "min_std of 0": (lambda _: {"min_std": 0.0}, "min_std must be"),
    "no noise": (lambda _: {"coefficients": df.SamplingPlan(df.NoiseSchedule.linear(), (500,)).steps[0].coefficients},
                 "standard deviation above 0"),
    "no row": (lambda _: {"coefficients": "row"}, "coefficients must be"),
    "a row that reads a history": (lambda c: {"coefficients": reading(c)}, "x0 of earlier steps"),
}  # fmt: skip


def reading(case):
    return type(case.coefficients)(**case.row | {"prev_history": 0.5})


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_by_the_checks(name, taken):
    case = make()
    change, message = WRONG[name]
    arguments = {"x_prev": case.x_prev, "x_t": case.x_t, "model_output": case.m, "coefficients": case.coefficients}
    with pytest.raises((TypeError, ValueError), match=message):
        ddim_log_prob(**arguments | change(case))
    assert taken["forward"] == 0


def test_the_calls_of_c_take_as_many_arguments_as_they_say():
    for call in (cpu_step.extension.density_of_plain, cpu_step.extension.density_backward_of_plain):
        with pytest.raises(TypeError, match="this takes"):
            call(1, 2)


def test_both_ways_are_there():
    """``ddim_log_prob`` asks the plain call by its name in ``cpu_step``, which these tests watch."""
    assert log_prob.cpu_step is cpu_step
