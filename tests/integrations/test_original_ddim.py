"""The samplers of the original DDIM repository against its formulas, over whole loops.

The formulas are restated here in float64.
"""

import itertools
import re

import pytest
import torch
from hypothesis import strategies as st
from layouts import assert_laid_out_alike, default_dtype, draw, kinds, modelled, shapes, sweep
from mistakes import mistakes

from ddim_fast.integrations import original_results
from ddim_fast.integrations.original_ddim import compute_alpha, ddpm_steps, generalized_steps

BETAS = torch.linspace(1e-4, 0.09, 60)
SHAPE = (2, 3, 2, 4)
SEQUENCES = {
    "uniform": list(range(0, 60, 7)),
    "a range": range(0, 60, 12),
    "not from 0": [3, 20, 21, 59],
    "repeats": [0, 0, 0, 2, 5, 5, 40],
    "one": [30],
    "none": [],
}
# Rounding of each of some ten steps, each amplified by less than 10 in all that follow.
TOLERANCE = 100


def wavy(x, t):
    """An elementwise model that is not linear, and knows the timestep."""
    assert t.dtype == torch.float32
    assert t.shape == x.shape[:1]
    return 0.9 * torch.tanh(x * (0.6 + t.to(x.dtype).view(-1, 1, 1, 1) / 90)) + 0.2


def random(seed, dtype=torch.float64):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def alpha_bar(t):
    return torch.prod(1 - BETAS.double()[: t + 1])


def downwards(x, seq, step, draw_dtypes):
    """Return (xs, x0_preds) in float64, by ``step(t, x, eps, a, a_next, z)``.

    Each step draws noise in the dtype of its samples.
    """
    xs, x0s = [x.double()], []
    for position in reversed(range(len(seq))):
        t, t_next = seq[position], seq[position - 1] if position else -1
        eps = wavy(xs[-1], torch.full((len(x),), float(t)))
        z = torch.randn(SHAPE, dtype=next(draw_dtypes)).double()
        x_next, x0 = step(t, xs[-1], eps, alpha_bar(t), alpha_bar(t_next), z)
        xs.append(x_next)
        x0s.append(x0)
    return xs, x0s


def ddim(eta):
    def step(t, x, eps, a, a_next, z):
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        variance = eta**2 * (1 - a / a_next) * (1 - a_next) / (1 - a)
        return a_next.sqrt() * x0 + variance.sqrt() * z + (1 - a_next - variance).clamp(min=0).sqrt() * eps, x0

    return step


def ddpm(t, x, eps, a, a_next, z):
    beta = 1 - a / a_next
    x0 = (x / a.sqrt() - (1 / a - 1).sqrt() * eps).clamp(-1, 1)
    mean = (a_next.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - a_next) * x) / (1 - a)
    return mean + (beta.sqrt() * z if t != 0 else 0), x0


SAMPLERS = {
    "ddim": (generalized_steps, ddim(0.0), {}),
    "eta 0.5": (generalized_steps, ddim(0.5), {"eta": 0.5}),
    "eta 1": (generalized_steps, ddim(1.0), {"eta": 1}),
    "ddpm": (ddpm_steps, ddpm, {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seq", SEQUENCES.values(), ids=list(SEQUENCES))
@pytest.mark.parametrize("kind", SAMPLERS)
def test_whole_loop(kind, seq, dtype):
    sampler, step, options = SAMPLERS[kind]
    x = random(0, dtype)
    before = x.clone()
    torch.manual_seed(3)
    xs, x0_preds = sampler(x, seq, wavy, BETAS, **options)
    stream = torch.get_rng_state()
    torch.manual_seed(3)
    want_xs, want_x0s = downwards(x, list(seq), step, itertools.repeat(dtype))
    assert torch.equal(stream, torch.get_rng_state())
    assert xs[0] is x
    assert torch.equal(x, before)
    assert (len(xs), len(x0_preds)) == (len(seq) + 1, len(seq))
    tolerance = TOLERANCE * torch.finfo(dtype).eps
    for got, want in zip([*xs, *x0_preds], [*want_xs, *want_x0s], strict=True):
        assert (got.dtype, got.device.type, got.requires_grad) == (dtype, "cpu", False)
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_ddpm_clips():
    """Else the tests above could not tell."""
    _, x0_preds = ddpm_steps(5 * random(0), range(0, 60, 7), wavy, BETAS)
    assert all(x0.abs().max() == 1 for x0 in x0_preds[:3])


@pytest.mark.parametrize("kind", ["eta 1", "ddpm"])
def test_half_precision_becomes_float32_as_beside_float32_coefficients(kind):
    sampler, step, options = SAMPLERS[kind]
    x, seq, seen = random(1, torch.bfloat16), [0, 20, 50], []

    def model(x, t):
        seen.append(x.dtype)
        return wavy(x.float(), t)

    torch.manual_seed(4)
    xs, x0_preds = sampler(x, seq, model, BETAS, **options)
    assert seen == [torch.bfloat16, torch.float32, torch.float32]
    assert {result.dtype for result in (*xs[1:], *x0_preds)} == {torch.float32}
    torch.manual_seed(4)
    # DDIM draws like x_T, DDPM like x_t.
    draw_dtypes = [torch.bfloat16, *[torch.float32 if kind == "ddpm" else torch.bfloat16] * 2]
    want_xs, want_x0s = downwards(x, seq, step, iter(draw_dtypes))
    tolerance = TOLERANCE * torch.finfo(torch.float32).eps
    for got, want in zip([*xs, *x0_preds], [*want_xs, *want_x0s], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_a_half_precision_output_beside_float32_is_read_as_it_is():
    x = random(1, torch.float32)
    xs, _ = generalized_steps(x, [50], lambda x, t: wavy(x, t).bfloat16(), BETAS)
    eps = wavy(x, torch.full((2,), 50.0)).bfloat16().double()
    want, _ = ddim(0.0)(50, x.double(), eps, alpha_bar(50), torch.tensor(1.0), 0.0)
    assert xs[1].dtype == torch.float32
    torch.testing.assert_close(xs[1].double(), want, rtol=1e-6, atol=1e-6)


def test_one_pass_a_step(monkeypatch):
    calls = []
    step = original_results.ddim_step
    monkeypatch.setattr(original_results, "ddim_step", lambda *a, **k: calls.append(1) or step(*a, **k))
    generalized_steps(random(0), range(0, 60, 10), wavy, BETAS, eta=1.0)
    assert len(calls) == 6
    ddpm_steps(random(0), range(0, 60, 10), wavy, BETAS)
    assert len(calls) == 12


def test_half_precision_betas_have_float32_levels():
    b, t = BETAS.half(), torch.tensor([-1, 0, 59])
    got = compute_alpha(b, t)
    assert got.dtype == original_alpha(b, t).dtype == torch.float32
    torch.testing.assert_close(got, original_alpha(b, t), rtol=TOLERANCE * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compute_alpha(dtype):
    t = torch.tensor([-1, 0, 30, 59])
    got = compute_alpha(BETAS.to(dtype), t)
    assert (got.shape, got.dtype) == ((4, 1, 1, 1), dtype)
    assert got[0].item() == 1
    want = torch.stack([alpha_bar(i) for i in t.tolist()])
    torch.testing.assert_close(got.double().flatten(), want, rtol=2 * torch.finfo(dtype).eps, atol=0)


def original_alpha(beta, t):
    return (1 - torch.cat([torch.zeros(1), beta])).cumprod(0).index_select(0, t + 1).view(-1, 1, 1, 1)


def original_steps(kind, x, seq, model, b, eta):
    """Run the original's loops, operation by operation, in its dtypes."""
    xs, x0s, start = [x], [], x
    for i, j in zip(reversed(seq), reversed([-1, *seq[:-1]]), strict=True):
        t, t_next = torch.full((len(x),), float(i)), torch.full((len(x),), float(j))
        a, a_next, x = original_alpha(b, t.long()), original_alpha(b, t_next.long()), xs[-1]
        m = model(x, t)
        if kind == "ddim":
            x0 = (x - m * (1 - a).sqrt()) / a.sqrt()
            c1 = eta * ((1 - a / a_next) * (1 - a_next) / (1 - a)).sqrt()
            x = a_next.sqrt() * x0 + c1 * torch.randn_like(start) + ((1 - a_next) - c1**2).sqrt() * m
        else:
            beta = 1 - a / a_next
            x0 = ((1 / a).sqrt() * x - (1 / a - 1).sqrt() * m).clamp(-1, 1)
            mean = ((a_next.sqrt() * beta) * x0 + ((1 - beta).sqrt() * (1 - a_next)) * x) / (1 - a)
            mask = (1 - (t == 0).float()).view(-1, 1, 1, 1)
            x = mean + mask * torch.exp(0.5 * beta.log()) * torch.randn_like(x)
        xs.append(x)
        x0s.append(x0)
    return xs, x0s


@sweep(
    kind=st.sampled_from(["ddim", "ddpm"]),
    of_noise=kinds,
    of_model=kinds,
    betas=st.sampled_from([torch.float32, torch.float64, torch.float16]),
    shape=shapes,
    eta=st.sampled_from([0.0, 0.6]),
)
def test_layouts_and_dtypes_are_the_originals(defaults, kind, of_noise, of_model, betas, shape, eta):
    """The original draws noise in the order of the samples' memory, and float64 betas make float64 samples."""
    x, seq, b = draw(0, shape, of_noise), [0, 10, 30, 50], (BETAS + 1e-3).to(betas)
    sampler, options = (generalized_steps, {"eta": eta}) if kind == "ddim" else (ddpm_steps, {})
    torch.manual_seed(3)
    with defaults.device_mode():
        xs, x0s = sampler(x, seq, lambda x, t: modelled(x, of_model), b, **options)
    stream = torch.get_rng_state()
    torch.manual_seed(3)
    half = defaults.dtype in (torch.float16, torch.bfloat16)  # the original then loses 1 - alpha_bar
    with default_dtype(torch.float32 if half else defaults.dtype):
        want_xs, want_x0s = original_steps(kind, x, seq, lambda x, t: modelled(x, of_model), b, eta)
    assert torch.equal(stream, torch.get_rng_state())
    assert_laid_out_alike([*xs, *x0s], [*want_xs, *want_x0s], of_noise, of_model)


def test_float64_betas_make_float64_samples_to_float64_accuracy():
    b, x, seq = torch.linspace(1e-4, 0.09, 60, dtype=torch.float64), random(0, torch.float32), [0, 20, 50]
    tolerance = TOLERANCE * torch.finfo(torch.float64).eps
    for kind, (sampler, *_) in {"ddim": SAMPLERS["ddim"], "ddpm": SAMPLERS["ddpm"]}.items():
        torch.manual_seed(3)
        xs, x0s = sampler(x, seq, wavy, b)
        torch.manual_seed(3)
        want_xs, want_x0s = original_steps(kind, x, seq, wavy, b, 0.0)
        for got, want in zip([*xs[1:], *x0s], [*want_xs[1:], *want_x0s], strict=True):
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def refuses_to_be_called(x, t):
    raise AssertionError("the model was called")


@pytest.mark.parametrize(
    ("seq", "options", "error", "message"),
    [
        ([0, 60], {}, ValueError, "from 0 to 59 at most, got 60"),
        ([-1, 5], {}, ValueError, "got -1"),
        ([5, 3], {}, ValueError, "increasing.*got 3 after 5"),
        ([0.5, 3], {}, TypeError, "seq must be integers"),
        ([0, 3], {"eta": -1}, ValueError, "eta must be a finite number"),
        ([0, 3], {"eta": torch.tensor(0.5)}, ValueError, r"eta must be a finite number.*got tensor\(0.5"),
        ([0, 3], {"eta": float("nan")}, ValueError, "eta must be a finite number"),
        ([0, 59], {"eta": 7.0}, ValueError, "eta may be at most"),
        ([0, 3], {"skip": 1}, TypeError, "skip"),
    ],
)
def test_refused_before_the_model_is_called(seq, options, error, message):
    with pytest.raises(error, match=message):
        generalized_steps(random(0), seq, refuses_to_be_called, BETAS, **options)


def test_the_largest_eta_named_is_accepted():
    with pytest.raises(ValueError, match="eta may be at most") as caught:
        generalized_steps(random(0), [0, 59], wavy, BETAS, eta=7.0)
    most = float(re.search(r"at most ([\d.]+)", str(caught.value))[1])
    assert most > 1
    xs, _ = generalized_steps(random(0), [0, 59], wavy, BETAS, eta=most)
    assert xs[-1].isfinite().all()


def test_no_eta_for_ddpm():
    with pytest.raises(TypeError, match="eta"):
        ddpm_steps(random(0), [0, 3], refuses_to_be_called, BETAS, eta=0.0)


CALLS = {
    "generalized_steps": dict(x=random(0), seq=[0, 20, 50], model=lambda x, t: 0.5 * x, b=BETAS, eta=0.0),
    "ddpm_steps": dict(x=random(0), seq=[0, 20, 50], model=lambda x, t: 0.5 * x, b=BETAS),
    "compute_alpha": dict(beta=BETAS, t=torch.tensor([0, 3])),
}


@mistakes(CALLS)
def test_a_mistake_ends_as_in_the_original_or_by_its_name(name, arguments):
    if name == "compute_alpha":
        return compute_alpha, arguments, original_alpha
    kind, sampler = ("ddim", generalized_steps) if "eta" in arguments else ("ddpm", ddpm_steps)
    x = arguments["x"]
    if isinstance(x, torch.Tensor) and x.ndim != 4:  # the original returns samples of another shape
        return sampler, arguments
    return sampler, arguments, lambda eta=0.0, **rest: original_steps(kind, **rest, eta=eta)


WRONG_OUTPUTS = {
    "nothing": (lambda x, t: None, TypeError, "a tensor of shape .* got <class 'NoneType'>"),
    "complex": (lambda x, t: x.to(torch.complex64), TypeError, "dense and real, got .*complex64"),
    "sparse": (lambda x, t: x.to_sparse(), TypeError, "dense and real, got .*sparse"),
    "one sample": (lambda x, t: x[:1], ValueError, r"\(2, 3, 2, 4\), got \(1, 3, 2, 4\)"),
    "elsewhere": (lambda x, t: x.to("meta"), ValueError, "device of the samples, cpu, got 'meta'"),
}


@pytest.mark.parametrize("sampler", [generalized_steps, ddpm_steps])
@pytest.mark.parametrize("wrong", WRONG_OUTPUTS)
def test_what_the_model_returns_is_checked(sampler, wrong):
    model, error, message = WRONG_OUTPUTS[wrong]
    with pytest.raises(error, match=f"the output of model must be.*{message}"):
        sampler(torch.ones(SHAPE), [0, 7], model, BETAS)
