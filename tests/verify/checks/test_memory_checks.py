"""The checks of what a step reads and writes: they pass right samplers and detect wrong ones."""

import math

import pytest
import torch
from verify.right_subjects import INSTALLED, sampler

from ddim_fast.verify import Outcome, verify
from ddim_fast.verify.subjects.adapters import StepFunction
from ddim_fast.verify.subjects.backends import Backend
from ddim_fast.verify.subjects.subject import Subject

CHECKS = ("in-place", "layout", "every-element", "no-waiting", "no-allocation")


def step(x_t, model_output, alpha_bar_t, alpha_bar_prev, out=None):
    scale = math.sqrt(alpha_bar_prev / alpha_bar_t)
    result = scale * x_t + (math.sqrt(1 - alpha_bar_prev) - scale * math.sqrt(1 - alpha_bar_t)) * model_output
    return result if out is None else out.copy_(result)


RIGHT = INSTALLED | {"step": step, "sampler": sampler}


@pytest.mark.parametrize("name", RIGHT)
def test_right_samplers_pass(name):
    for seed in (0, 1):
        report = verify(RIGHT[name], checks=CHECKS, seed=seed, required=(), full=seed == 1)
        assert report.passed, [(r.name, r.message) for r in report.results if r.message]


def test_the_gpu_backend_neither_waits_nor_allocates_nor_forgets_a_tail():
    report = verify("triton", checks=["no-waiting", "no-allocation", "every-element"])
    assert report.passed, [r.message for r in report.results]
    assert all(r.outcome is Outcome.PASSED for r in report.results)


# --- Steps that break one thing ---------------------------------------------------------------------------------------


def leaves_x_t(x_t, model_output, alpha_bar_t, alpha_bar_prev, out=None):
    return step(x_t, model_output, alpha_bar_t, alpha_bar_prev)


def writes_x_t_before_it_reads_it(x_t, model_output, alpha_bar_t, alpha_bar_prev, out=None):
    if out is None:
        return step(x_t, model_output, alpha_bar_t, alpha_bar_prev)
    torch.mul(model_output, math.sqrt(1 - alpha_bar_prev), out=out)
    return out.add_((x_t - math.sqrt(1 - alpha_bar_t) * model_output) * math.sqrt(alpha_bar_prev / alpha_bar_t))


def forgets_the_tail_in_place(x_t, model_output, alpha_bar_t, alpha_bar_prev, out=None):
    result = step(x_t, model_output, alpha_bar_t, alpha_bar_prev)
    if out is None:
        return result
    whole = result.numel() // 128 * 128
    if whole == result.numel():
        return out.copy_(result)
    out.view(-1)[:whole] = result.view(-1)[:whole]
    return out


def as_if_contiguous(tensor):
    strides = torch.empty(tensor.shape, device="meta").stride()
    span = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    return tensor.as_strided(tensor.shape, strides) if span >= tensor.numel() else tensor


def reads_x_t_as_if_contiguous(x_t, model_output, alpha_bar_t, alpha_bar_prev):
    return step(as_if_contiguous(x_t), model_output, alpha_bar_t, alpha_bar_prev)


def reads_the_output_as_if_contiguous(x_t, model_output, alpha_bar_t, alpha_bar_prev):
    return step(x_t, as_if_contiguous(model_output), alpha_bar_t, alpha_bar_prev)


def forgets_the_offset(x_t, model_output, alpha_bar_t, alpha_bar_prev):
    x_t = x_t.as_strided(x_t.shape, x_t.stride(), x_t.storage_offset() // 4 * 4)
    return step(x_t, model_output, alpha_bar_t, alpha_bar_prev)


def flattens_the_result(x_t, model_output, alpha_bar_t, alpha_bar_prev):
    result = step(x_t, model_output, alpha_bar_t, alpha_bar_prev)
    return result if x_t.is_contiguous() else result.flatten(1)


def writes_around_x_t(x_t, model_output, alpha_bar_t, alpha_bar_prev, out=None):
    result = step(x_t, model_output, alpha_bar_t, alpha_bar_prev, out)
    if out is not None and out.storage_offset():
        out.as_strided((1,), (1,), out.storage_offset() - 1).zero_()
    return result


def forgets_a_tail(x_t, model_output, alpha_bar_t, alpha_bar_prev):
    result, whole = torch.empty_like(x_t), x_t.numel() // 8 * 8
    result.view(-1)[:whole] = step(x_t, model_output, alpha_bar_t, alpha_bar_prev).view(-1)[:whole]
    return result


def forgets_the_last_of_33(x_t, model_output, alpha_bar_t, alpha_bar_prev):
    result = step(x_t, model_output, alpha_bar_t, alpha_bar_prev)
    if result.numel() == 33:
        result.view(-1)[-1] = torch.empty(1)[0]
    return result


BROKEN_STEPS = {
    "in-place": (leaves_x_t, writes_x_t_before_it_reads_it, forgets_the_tail_in_place),
    "layout": (
        reads_x_t_as_if_contiguous,
        reads_the_output_as_if_contiguous,
        forgets_the_offset,
        flattens_the_result,
        writes_around_x_t,
    ),
    "every-element": (forgets_a_tail, forgets_the_last_of_33),
}


@pytest.mark.parametrize(
    ("check", "broken"), [(check, broken) for check, all_of_it in BROKEN_STEPS.items() for broken in all_of_it]
)
def test_a_broken_step_is_caught(check, broken):
    found = verify(broken, checks=[check]).results[0]
    assert found.outcome is Outcome.FAILED, found
    assert "must" in found.message
    assert " raised " not in found.message


def test_broken_runs_are_caught():
    def reads_x_T_as_if_contiguous(model, x_T, alphas_cumprod, timesteps):  # noqa: N802 (x_T is the paper's)
        return sampler(model, as_if_contiguous(x_T), alphas_cumprod, timesteps)

    def reads_outputs_as_if_contiguous(model, x_T, alphas_cumprod, timesteps):
        return sampler(lambda x_t, t: as_if_contiguous(model(x_t, t)), x_T, alphas_cumprod, timesteps)

    def drops_a_tail(model, x_T, alphas_cumprod, timesteps):
        return sampler(model, x_T, alphas_cumprod, timesteps, step=forgets_a_tail)

    for check, broken in (
        ("layout", reads_x_T_as_if_contiguous),
        ("layout", reads_outputs_as_if_contiguous),
        ("every-element", drops_a_tail),
    ):
        found = verify(broken, checks=[check]).results[0]
        assert found.outcome is Outcome.FAILED, (broken, found)


class TailOfAnotherRounding(Backend):
    """A claim to exact arithmetic is a claim to the same bits in every layout."""

    def __init__(self):
        super().__init__("reference")

    sample = Subject.sample

    def step(self, case):
        result = super().step(case)
        if not case.x_t.is_contiguous():
            result.x_prev.copy_(torch.nextafter(result.x_prev, torch.tensor(math.inf)))
        return result


def test_one_bit_is_caught_where_arithmetic_is_exact():
    assert verify(TailOfAnotherRounding(), checks=["layout"]).results[0].outcome is Outcome.FAILED


# --- Speed that is claimed --------------------------------------------------------------------------------------------


def claiming(function, *claims):
    subject = StepFunction(function)
    subject.features |= set(claims)
    return subject


def copies_a_coefficient(x_t, model_output, alpha_bar_t, alpha_bar_prev):
    bar = torch.tensor(alpha_bar_t).to(x_t.device)
    return step(x_t, model_output, alpha_bar_t, alpha_bar_prev) * (bar / alpha_bar_t)


def looks_at_the_result(x_t, model_output, alpha_bar_t, alpha_bar_prev):
    result = step(x_t, model_output, alpha_bar_t, alpha_bar_prev)
    if x_t.device.type == "cuda" and result.sum() > 0:
        return result
    return result


def allocates_nothing(x_t, model_output, alpha_bar_t, alpha_bar_prev, out=None):
    scale = math.sqrt(alpha_bar_prev / alpha_bar_t)
    offset = math.sqrt(1 - alpha_bar_prev) - scale * math.sqrt(1 - alpha_bar_t)
    result = x_t * scale if out is None else out.mul_(scale)
    return result.add_(model_output, alpha=offset)


def test_waits_and_copies_are_caught_of_a_step_that_claims_there_are_none():
    assert verify(claiming(step, "no_waiting"), checks=["no-waiting"]).passed
    for broken in (copies_a_coefficient, looks_at_the_result):
        found = verify(claiming(broken, "no_waiting"), checks=["no-waiting"]).results[0]
        assert found.outcome is Outcome.FAILED, found
        assert "must not wait" in found.message
        assert verify(broken, checks=["no-waiting"], required=()).results[0].outcome is Outcome.NOT_APPLICABLE


def test_allocations_are_caught_of_a_step_that_claims_there_are_none():
    assert verify(claiming(allocates_nothing, "no_allocation"), checks=["no-allocation"]).passed
    found = verify(claiming(step, "no_allocation"), checks=["no-allocation"]).results[0]
    assert found.outcome is Outcome.FAILED
    assert "aten::" in found.message


def test_allocations_on_a_gpu_are_caught():
    class OnGpu(StepFunction):
        def on_gpu(self):
            return claiming(self.function, "no_allocation")

    for function, outcome in ((allocates_nothing, Outcome.PASSED), (step, Outcome.FAILED)):
        subject = OnGpu(function)
        subject.features |= {"no_allocation"}
        assert verify(subject, checks=["no-allocation"]).results[0].outcome is outcome


def test_a_machine_without_a_fake_device_skips(monkeypatch):
    def refuse():
        raise RuntimeError("a fake CUDA device needs another torch")

    monkeypatch.setattr("ddim_fast.gpu_lab.fake_cuda.fake_cuda", refuse)
    found = verify(claiming(step, "no_waiting"), checks=["no-waiting"]).results[0]
    assert found.outcome is Outcome.SKIPPED
    assert "a fake CUDA device needs another torch" in found.message


def test_new_memory_is_as_before_afterwards():
    before = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    verify(forgets_a_tail, checks=["every-element"])
    assert (torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory) == before
