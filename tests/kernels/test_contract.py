"""Every error of a step: the rule and the value received are in its message, and nothing has been written."""

import dataclasses
import itertools
import math
import pickle
import re
import warnings

import numpy as np
import pytest
import torch

from ddim_fast.kernels import cpu_step, dispatch, reference
from ddim_fast.kernels.coefficients import ONLY_IN_TABLE
from ddim_fast.kernels.contract import ROW_WIDTH, Column, StepCoefficients, StepInputs, StepTable, check_inputs
from ddim_fast.kernels.dispatch import BACKENDS, choose, ddim_step, ddim_step_from_table
from ddim_fast.verify.truth import oracle

NAMES = ("x0_x", "x0_m", "eps_x", "eps_m", "eps_0", "prev_x0", "prev_eps", "prev_noise")
ON_CPU = [name for name in BACKENDS if name != "triton"]  # that one is held to the contract in test_triton.py
per_backend = pytest.mark.parametrize("backend", [None, *ON_CPU])


def row(**columns):
    return StepCoefficients(
        **(
            dict.fromkeys(NAMES, 0.0)
            | {"x0_x": 1.5, "x0_m": -0.5, "prev_x0": 0.5, "eps_m": 1.0, "prev_eps": 0.5}
            | columns
        )
    )


def error_of(call, *args, **kwargs):
    """The message of the call's ValueError, or None where it runs. Any other exception is a failure."""
    try:
        call(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return None


def sample(seed=0, shape=(2, 3, 4), dtype=torch.float32):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


PLAIN, CLIPPED, NOISY = row(), row(clip=1.0), row(prev_noise=0.5)
SEEDS = torch.tensor([1, 2])

# --- StepCoefficients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39, -3.5e38])
def test_coefficients_are_finite_in_float32(name, value):
    with pytest.raises(ValueError, match=re.escape(f"must be finite in float32, got {name} = {value}")):
        row(**{name: value})


@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan, -math.inf])
def test_clip_is_positive(clip):
    with pytest.raises(
        ValueError, match=re.escape(f"clip must be positive and within float32 (infinity for no clipping), got {clip}")
    ):
        row(clip=clip)


def test_coefficients_are_frozen_hashable_and_travel():
    assert row() == row()
    assert hash(row()) == hash(row())
    assert row() != row(clip=2.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        row().clip = 1.0
    used = row(clip=2.0)
    assert len(used.packed) == 4 * (len(Column) - len(ONLY_IN_TABLE) + 1)  # and a flag
    assert StepCoefficients.from_row(used.row(), clipped=True).packed == used.packed
    assert pickle.loads(pickle.dumps(used)) == used
    assert not row().clipped
    assert used.clipped


def test_largest_float32_is_a_coefficient():
    assert row(x0_x=torch.finfo(torch.float32).max, prev_x0=0.0).x0_x > 3e38


@pytest.mark.parametrize("clip", [1e39, 1e300])
@per_backend
def test_clip_beyond_float32_is_refused_or_runs(backend, clip):
    """A finite clip that float32 cannot hold: an error that names it, or a step."""
    assert "clip" in (error_of(lambda: ddim_step(sample(), sample(1), row(clip=clip), backend=backend)) or "clip")


@per_backend
def test_products_of_columns_beyond_float32_are_refused_or_run(backend):
    message = error_of(lambda: ddim_step(sample(), sample(1), row(x0_x=1e30, prev_x0=1e30), backend=backend))
    assert message is None or "float32" in message


# --- check_inputs: (arguments that differ from a valid call, error, parts of its message) ----------------------------------

X = sample()
ERRORS = {
    "x_t is no tensor": ({"x_t": [1.0]}, TypeError, ["x_t must be a torch.Tensor", "list"]),
    "x_t is sparse": ({"x_t": X.to_sparse()}, TypeError, ["x_t must be a dense", "sparse_coo"]),
    "x_t is an integer": (
        {"x_t": torch.zeros(2, 3, 4, dtype=torch.int32)},
        TypeError,
        ["x_t must be floating point", "int32"],
    ),
    "x_t is complex": ({"x_t": X.to(torch.complex64)}, TypeError, ["x_t must be floating point", "complex64"]),
    "x_t has no batch": ({"x_t": torch.tensor(1.0)}, ValueError, ["x_t must have a batch dimension", "unsqueeze"]),
    "coefficients": ({"coefficients": (1.0, 2.0)}, TypeError, ["coefficients must be a StepCoefficients", "tuple"]),
    "model_output is none": ({"model_output": None}, TypeError, ["model_output must be a torch.Tensor", "NoneType"]),
    "model_output shape": (
        {"model_output": sample(shape=(2, 3, 5))},
        ValueError,
        ["model_output", "(2, 3, 4)", "(2, 3, 5)"],
    ),
    "model_output broadcasts": (
        {"model_output": sample(shape=(1, 3, 4))},
        ValueError,
        ["model_output", "(2, 3, 4)", "(1, 3, 4)"],
    ),
    "learned variance": (
        {"model_output": sample(shape=(2, 6, 4))},
        ValueError,
        ["(2, 6, 4)", "learned variance", "model_output[:, :C]"],
    ),
    "model_output device": (
        {"model_output": X.to("meta")},
        ValueError,
        ["model_output must be on the device of x_t", "cpu", "meta"],
    ),
    "model_output dtype": (
        {"model_output": X.to(torch.int64)},
        TypeError,
        ["model_output must be floating point", "int64"],
    ),
    "no guidance_scale": (
        {"model_output_uncond": X},
        ValueError,
        ["guidance needs both", "only model_output_uncond", "pass guidance_scale"],
    ),
    "no uncond": (
        {"guidance_scale": 2.0},
        ValueError,
        ["guidance needs both", "only guidance_scale", "pass model_output_uncond"],
    ),
    "uncond shape": (
        {"model_output_uncond": sample(shape=(2, 3)), "guidance_scale": 2.0},
        ValueError,
        ["model_output_uncond", "(2, 3)"],
    ),
    "uncond dtype": (
        {"model_output_uncond": X.half(), "guidance_scale": 2.0},
        TypeError,
        ["dtype of model_output", "float32", "float16"],
    ),
    "guidance_scale nan": (
        {"model_output_uncond": X, "guidance_scale": math.nan},
        ValueError,
        ["guidance_scale must be finite", "nan"],
    ),
    "guidance_scale inf": (
        {"model_output_uncond": X, "guidance_scale": -math.inf},
        ValueError,
        ["guidance_scale must be finite", "-inf"],
    ),
    "two noises": ({"coefficients": NOISY, "noise": X, "seeds": SEEDS}, ValueError, ["either noise or seeds", "both"]),
    "no noise": ({"coefficients": NOISY}, ValueError, ["this step adds noise", "0.5", "pass noise, or seeds"]),
    "noise shape": (
        {"coefficients": NOISY, "noise": sample(shape=(2, 3))},
        ValueError,
        ["noise must have the shape of x_t", "(2, 3)"],
    ),
    "noise dtype": (
        {"coefficients": NOISY, "noise": X.double()},
        TypeError,
        ["noise must have the dtype of x_t", "float64"],
    ),
    "noise shape, not read": (
        {"noise": sample(shape=(2, 3))},
        ValueError,
        ["noise must have the shape of x_t", "(2, 3)"],
    ),
    "seeds shape": (
        {"coefficients": NOISY, "seeds": torch.zeros(3, dtype=torch.int64)},
        ValueError,
        ["seeds must have one entry per sample", "(2,)", "(3,)"],
    ),
    "seeds 2-d": (
        {"coefficients": NOISY, "seeds": SEEDS.view(2, 1)},
        ValueError,
        ["seeds must have one entry per sample", "(2, 1)"],
    ),
    "seeds dtype": ({"coefficients": NOISY, "seeds": SEEDS.int()}, TypeError, ["seeds must be torch.int64", "int32"]),
    "seeds list": ({"coefficients": NOISY, "seeds": [1, 2]}, TypeError, ["seeds must be a torch.Tensor", "list"]),
    "seeds device": (
        {"coefficients": NOISY, "seeds": SEEDS.to("meta")},
        ValueError,
        ["seeds must be on the device of x_t", "meta"],
    ),
    "seeds shape, not read": (
        {"seeds": torch.zeros(3, dtype=torch.int64)},
        ValueError,
        ["seeds must have one entry per sample", "(3,)"],
    ),
    "noise_step": (
        {"coefficients": NOISY, "seeds": SEEDS, "noise_step": 1 << 32},
        ValueError,
        ["noise_step must be an integer in [0, 4294967295]", str(1 << 32)],
    ),
    "unknown normals": ({"normals": "quick"}, ValueError, ["normals must be one of exact, fast", "'quick'"]),
    "a mask alone": ({"mask": sample(2)}, ValueError, ["both mask and known_x0", "got only mask"]),
    "known_x0 alone": ({"known_x0": sample(2)}, ValueError, ["both mask and known_x0", "got only known_x0"]),
    "known_noise alone": ({"known_noise": sample(2)}, ValueError, ["got no known_x0"]),
    "mask shape": (
        {"mask": sample(2, shape=(2, 3)), "known_x0": sample(3)},
        ValueError,
        ["mask must have the shape of x_t", "(2, 3)"],
    ),
    "mask dtype": (
        {"mask": sample(2).bool(), "known_x0": sample(3)},
        TypeError,
        ["mask must have the dtype of x_t", "torch.bool"],
    ),
    "no noise for the known picture": (
        {"coefficients": row(known_noise=0.5), "mask": sample(2), "known_x0": sample(3)},
        ValueError,
        ["known_x0 is brought to the noise level", "0.5", "pass known_noise, or seeds"],
    ),
    "noise_step below 0": (
        {"coefficients": NOISY, "seeds": SEEDS, "noise_step": -1},
        ValueError,
        ["noise_step must be an integer in [0, 4294967295]", "-1"],
    ),
    "noise_stream": (
        {"coefficients": NOISY, "seeds": SEEDS, "noise_stream": -5},
        ValueError,
        ["noise_stream must be an integer in [0, 4294967295]", "-5"],
    ),
    "noise_step huge": (
        {"coefficients": NOISY, "seeds": SEEDS, "noise_step": 1 << 70},
        ValueError,
        ["noise_step must be an integer in [0, 4294967295]"],
    ),
    "noise_step no integer": (
        {"coefficients": NOISY, "seeds": SEEDS, "noise_step": 1.5},
        TypeError,
        ["noise_step", "1.5"],
    ),
    "thresholds unclipped": ({"thresholds": torch.ones(2)}, ValueError, ["thresholds", "finite clip", "clip = inf"]),
    "thresholds shape": (
        {"coefficients": CLIPPED, "thresholds": torch.ones(3)},
        ValueError,
        ["thresholds must have one entry per sample", "(3,)"],
    ),
    "thresholds dtype": (
        {"coefficients": CLIPPED, "thresholds": torch.ones(2).double()},
        TypeError,
        ["thresholds must be torch.float32", "float64"],
    ),
    "out shape": ({"out": torch.zeros(2, 3)}, ValueError, ["out must have the shape of x_t", "(2, 3)"]),
    "out dtype": (
        {"out": torch.zeros(2, 3, 4, dtype=torch.float16)},
        TypeError,
        ["out must have the dtype of x_t", "float32", "float16"],
    ),
    "out is expanded": (
        {"out": torch.zeros(1, 3, 4).expand(2, 3, 4)},
        ValueError,
        ["out is written to", "expanded"],
    ),
    "out overlaps itself": (
        {"out": torch.zeros(40).as_strided((2, 3, 4), (4, 4, 1))},
        ValueError,
        ["out is written to", "must not share memory"],
    ),
    "out is a leaf": (
        {"out": torch.zeros(2, 3, 4, requires_grad=True)},
        ValueError,
        ["out is written to and must not require gradients"],
    ),
    "x0_out shape": ({"x0_out": torch.zeros(2, 3)}, ValueError, ["x0_out must have the shape of x_t", "(2, 3)"]),
    "x0_out dtype": (
        {"x0_out": torch.zeros(2, 3, 4, dtype=torch.bfloat16)},
        TypeError,
        ["x0_out must have the dtype of x_t", "bfloat16"],
    ),
    "x0_out is a leaf": (
        {"x0_out": torch.zeros(2, 3, 4, requires_grad=True)},
        ValueError,
        ["x0_out is written to and must not require gradients"],
    ),
    "model_input_out shape": (
        {"model_input_out": torch.zeros(2, 3)},
        ValueError,
        ["model_input_out must have the shape of x_t", "(2, 3)"],
    ),
    "model_input_out of integers": (
        {"model_input_out": torch.zeros(2, 3, 4, dtype=torch.int32)},
        TypeError,
        ["model_input_out must be floating point", "int32"],
    ),
    "model_input_out of 8 bits": (
        {"model_input_out": torch.zeros(2, 3, 4).to(torch.float8_e5m2)},
        TypeError,
        ["model_input_out must have at least 16 bits", "float8_e5m2", ".bfloat16()"],
    ),
    "model_input_out is a leaf": (
        {"model_input_out": torch.zeros(2, 3, 4, requires_grad=True)},
        ValueError,
        ["model_input_out is written to and must not require gradients"],
    ),
    "model_input_out is expanded": (
        {"model_input_out": torch.zeros(1, 3, 4).half().expand(2, 3, 4)},
        ValueError,
        ["model_input_out is written to", "expanded"],
    ),
    "history_2 alone": (
        {"history_2": torch.zeros(2, 3, 4)},
        ValueError,
        ["got history_2 without history", "pass history, too"],
    ),
    "no history_2": (
        {"coefficients": row(prev_history_2=0.25), "history": torch.zeros(2, 3, 4)},
        ValueError,
        ["(prev_history_2), got no history_2", "pass the tensor"],
    ),
    "history_2 dtype": (
        {"history": torch.zeros(2, 3, 4), "history_2": torch.zeros(2, 3, 4).half()},
        TypeError,
        ["history_2 must have the dtype of x_t", "float16"],
    ),
    "backend": ({"backend": "cuda"}, ValueError, ["backend must be one of cpu, triton, reference", "'cuda'"]),
}


def check_error(name, backend):
    changed, error, parts = ERRORS[name]
    arguments = {"x_t": X.clone(), "model_output": sample(1), "coefficients": PLAIN, "backend": backend}
    arguments |= {"out": torch.full_like(X, 7.0), "x0_out": torch.full_like(X, 8.0)} | changed
    tensors = {
        k: v
        for k, v in arguments.items()
        if isinstance(v, torch.Tensor) and v.layout == torch.strided and v.device.type == "cpu"
    }
    before = {k: v.detach().clone() for k, v in tensors.items()}
    with pytest.raises(error) as caught:
        ddim_step(arguments.pop("x_t"), arguments.pop("model_output"), arguments.pop("coefficients"), **arguments)
    for part in parts:
        assert part in str(caught.value)
    for k, v in tensors.items():
        assert torch.equal(v, before[k]), f"{k} was written"


@per_backend
@pytest.mark.parametrize("name", list(ERRORS))
def test_error_says_the_rule_and_touches_nothing(name, backend):
    check_error(name, backend)


def test_samples_beyond_the_noise_standard_are_refused():
    n = (1 << 34) + 1
    x = torch.zeros(1).expand(1, n)  # no memory
    with pytest.raises(ValueError, match=f"up to {1 << 34} elements, got {n}"):
        check_inputs(StepInputs(x, x, NOISY, seeds=torch.tensor([1])))


def test_error_of_the_plain_call_is_that_of_the_checks():
    with pytest.raises(ValueError, match="this step adds noise"):
        check_inputs(StepInputs(X, X, NOISY))


# --- Overlap -----------------------------------------------------------------------------------------------------------------


@per_backend
@pytest.mark.parametrize("written", ["out", "x0_out", "model_input_out"])
@pytest.mark.parametrize("read", ["x_t", "model_output", "model_output_uncond", "noise"])
@pytest.mark.parametrize("shift", [1, 4, 12, 23])
def test_partial_overlap_is_refused(backend, written, read, shift):
    memory = sample(2, (64,))
    arguments = {"x_t": X.clone(), "model_output": sample(1), "model_output_uncond": sample(3), "noise": sample(4)}
    for first in (0, shift):
        arguments[read] = memory[first : first + 24].view(2, 3, 4)
        arguments[written] = memory[shift - first : shift - first + 24].view(2, 3, 4)
        before = memory.clone()
        call = dict(arguments)
        with pytest.raises(ValueError, match="overlap"):
            ddim_step(call.pop("x_t"), call.pop("model_output"), NOISY, guidance_scale=2.0, backend=backend, **call)
        assert torch.equal(memory, before)


@per_backend
def test_other_strides_of_the_same_memory_are_refused(backend):
    square = sample(5, (1, 4, 4))
    with pytest.raises(ValueError, match="overlap"):
        ddim_step(square, square, PLAIN, out=square.transpose(1, 2), backend=backend)
    halves = torch.zeros(4, 8, dtype=torch.float16)
    x = halves.view(torch.float32)[:, :4]
    with pytest.raises(ValueError, match="overlap"):
        ddim_step(x, halves[:, :4], PLAIN, out=x, backend=backend)


@per_backend
def test_outputs_must_be_apart(backend):
    both = torch.zeros(3, 3, 4)
    for x0 in (both[:2], both[1:]):
        with pytest.raises(ValueError, match="x0_out and out must not share memory"):
            ddim_step(X, X, PLAIN, out=both[:2], x0_out=x0, backend=backend)
    assert (both == 0).all()
    apart = {name: torch.zeros(2, 3, 4) for name in WRITTEN}
    for name, other in itertools.permutations(WRITTEN, 2):
        for shared in (both[:2], both[1:]):
            with pytest.raises(ValueError, match="must not share memory"):
                ddim_step(X, X, PLAIN, backend=backend, **apart | {name: both[:2], other: shared})
    assert (both == 0).all()
    assert all((tensor == 0).all() for tensor in apart.values())


@per_backend
@pytest.mark.parametrize("written", ["history", "history_2"])
@pytest.mark.parametrize("read", ["x_t", "model_output", "model_output_uncond", "noise"])
def test_a_history_is_no_other_tensor(backend, written, read):
    tensors = {name: sample(i) for i, name in enumerate(("x_t", "model_output", "model_output_uncond", "noise"))}
    options = {"guidance_scale": 2.0, "history": sample(5), "history_2": sample(6)} | {written: tensors[read]}
    before = tensors[read].clone()
    with pytest.raises(ValueError, match=f"{written} and {read} must not share memory"):
        ddim_step(coefficients=NOISY, backend=backend, **tensors | options)
    assert torch.equal(tensors[read], before)


@per_backend
@pytest.mark.parametrize("read", ["x_t", "model_output", "model_output_uncond", "noise"])
def test_the_model_input_may_be_what_is_read(backend, read):
    tensors = {name: sample(i) for i, name in enumerate(("x_t", "model_output", "model_output_uncond", "noise"))}
    step = row(prev_noise=0.5, input_scale=0.75)
    expected = torch.empty_like(X)
    ddim_step(coefficients=step, guidance_scale=2.0, model_input_out=expected, backend=backend, **tensors)
    x_prev = ddim_step(coefficients=step, guidance_scale=2.0, model_input_out=tensors[read], backend=backend, **tensors)
    assert torch.equal(tensors[read], expected)
    assert torch.equal(tensors[read], 0.75 * x_prev)
    half = sample(7).half()
    with pytest.raises(ValueError, match="overlap"):  # of the same size, and another type
        ddim_step(X, half, step, noise=X, model_input_out=half.view(torch.bfloat16), backend=backend)


@per_backend
@pytest.mark.parametrize("name", ["seeds", "thresholds"])
def test_outputs_must_be_apart_from_numbers_of_samples(backend, name):
    memory = torch.zeros(64, dtype=torch.int64)
    per_sample = memory[:2] if name == "seeds" else (memory.view(torch.float32)[:2].fill_(1.0))
    out = memory.view(torch.float32)[:24].view(2, 3, 4)
    arguments = {name: per_sample, "out": out}
    before = memory.clone()
    with pytest.raises(ValueError, match=f"out and {name} must not share memory"):
        ddim_step(
            X,
            X,
            row(prev_noise=0.5, clip=1.0),
            backend=backend,
            **({"noise": X} if name == "thresholds" else {}),
            **arguments,
        )
    assert torch.equal(memory, before)


@per_backend
def test_same_elements_and_interleaved_views_are_accepted(backend):
    both = sample(6, (2, 8, 5))
    expected = ddim_step(both[:, :4].clone(), both[:, 4:].clone(), PLAIN, backend=backend)
    for x, m, out in [(both[:, :4], both[:, 4:], "x_t"), (both[:, :4], both[:, 4:], "model_output")]:
        memory = both.clone()
        x, m = memory[:, :4], memory[:, 4:]
        ddim_step(x, m, PLAIN, out=x if out == "x_t" else m, backend=backend)
        assert torch.equal(x if out == "x_t" else m, expected)
        assert torch.equal(m if out == "x_t" else x, both[:, 4:] if out == "x_t" else both[:, :4])
    memory = sample(7, (2, 3, 4))
    expected = ddim_step(memory.clone(), memory.clone(), PLAIN, backend=backend)
    assert ddim_step(memory, memory, PLAIN, out=memory, backend=backend) is memory
    assert torch.equal(memory, expected)


@per_backend
def test_every_other_sample_is_accepted(backend):
    """Interleaved rows, and neighbours that touch but do not overlap."""
    memory = sample(8, (4, 6))
    kept = memory.clone()
    expected = ddim_step(memory[::2].clone(), memory[::2].clone(), PLAIN, backend=backend)
    ddim_step(memory[::2], memory[::2], PLAIN, out=memory[1::2], backend=backend)
    assert torch.equal(memory[1::2], expected)
    assert torch.equal(memory[::2], kept[::2])
    memory = kept.clone()
    ddim_step(memory[:2], memory[:2], PLAIN, out=memory[2:], backend=backend)
    assert torch.equal(memory[:2], kept[:2])


@per_backend
def test_empty_tensors_never_overlap(backend):
    empty = torch.zeros(0, 3)
    assert ddim_step(empty, empty, PLAIN, out=empty, x0_out=empty, backend=backend) is empty


# --- Gradients ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["x_t", "model_output", "model_output_uncond", "noise", "thresholds"])
def test_gradient_inputs_go_to_the_reference(which):
    tensors = {
        "x_t": sample(1),
        "model_output": sample(2),
        "model_output_uncond": sample(3),
        "noise": sample(4),
        "thresholds": torch.tensor([1.5, 2.0]),
    }
    tensors[which].requires_grad_()
    step = row(prev_noise=0.5, clip=1.0)

    def call(backend):
        t = dict(tensors)
        return ddim_step(t.pop("x_t"), t.pop("model_output"), step, guidance_scale=2.0, backend=backend, **t)

    result = call(None)
    assert result.requires_grad
    result.sum().backward()
    assert tensors[which].grad is not None
    with pytest.raises(ValueError, match="cpu: a tensor requires gradients, which only the reference computes"):
        call("cpu")
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            torch.testing.assert_close(call(None), result.detach())
            assert not call("cpu").requires_grad


@pytest.mark.parametrize("clip", [math.inf, 1.0])
def test_gradients_are_right(clip):
    step = StepCoefficients(
        **oracle.textbook_row("v_prediction", 0.4, 0.6, eta=0.5, clip=clip, use_clipped_model_output=clip != math.inf)
    )
    inputs = [sample(i, dtype=torch.float64).requires_grad_() for i in range(4)]

    def call(x_t, m, uncond, z):
        x0 = torch.empty_like(x_t)
        return ddim_step(x_t, m, step, model_output_uncond=uncond, guidance_scale=1.5, noise=z, x0_out=x0), x0

    assert torch.autograd.gradcheck(call, inputs, eps=1e-7)


def test_out_of_a_gradient_step_records_it():
    x = sample().requires_grad_()
    out = torch.zeros_like(X)
    assert ddim_step(x, sample(1), PLAIN, out=out) is out
    out.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(X, PLAIN.folded[0]))


@per_backend
def test_writing_is_seen_by_autograd(backend):
    """x_t is kept for a backward pass, then overwritten by the step: autograd must notice, as with any operation in place."""
    weight, x = torch.ones(2, 3, 4, requires_grad=True), sample()
    product = weight * x
    with torch.no_grad():
        ddim_step(x, sample(1), PLAIN, out=x, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own
def test_forward_mode_is_not_dropped():
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(sample(), torch.ones(2, 3, 4))
        tangent = torch.autograd.forward_ad.unpack_dual(ddim_step(dual, sample(1), PLAIN)).tangent
        assert tangent is not None
        torch.testing.assert_close(tangent, torch.full((2, 3, 4), PLAIN.folded[0]))


@per_backend
def test_lazy_negation_is_honoured(backend):
    """A tensor with torch's negative bit: its memory holds the opposite of its values."""
    x, m = sample(), sample(1)
    expected = ddim_step(-x, m, PLAIN, backend="reference")
    out = torch._neg_view(torch.zeros_like(x))
    if backend == "cpu":  # may refuse either
        for arguments in ((torch._neg_view(x), None), (-x, out)):
            if error_of(ddim_step, arguments[0], m, PLAIN, out=arguments[1], backend=backend) is None:
                torch.testing.assert_close(arguments[1] if arguments[1] is not None else expected, expected)
        return
    torch.testing.assert_close(ddim_step(torch._neg_view(x), m, PLAIN, backend=backend), expected)
    ddim_step(-x, m, PLAIN, out=out, backend=backend)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    "negated", ["x_t", "model_output", "model_output_uncond", "noise", "seeds", "thresholds", "out", "x0_out"]
)
def test_lazy_negation_of_dense_memory_is_honoured(negated):
    """The plain call of C++ reads memory as it is: it must leave such a tensor to others, whichever argument it is."""
    dense = {
        "x_t": sample(), "model_output": sample(1), "model_output_uncond": sample(2), "out": sample(4), "x0_out": sample(5),
        "thresholds": torch.tensor([1.5, 0.75]),
        **({"noise": sample(3)} if negated == "noise" else {"seeds": torch.tensor([3, -4])}),
    }  # fmt: skip
    row = StepCoefficients(**oracle.textbook_row("epsilon", 0.5, 0.6, eta=1.0, clip=1.0))
    results = []
    for backend, arguments in (
        ("reference", {name: t.clone() for name, t in dense.items()}),
        (None, {name: t.clone() for name, t in dense.items()} | {negated: torch._neg_view(-dense[negated])}),
    ):
        assert backend or arguments[negated].is_neg()
        assert arguments[negated].is_contiguous()
        prev = ddim_step(coefficients=row, guidance_scale=2.0, backend=backend, **arguments)
        results.append((prev.resolve_neg(), arguments["x0_out"].resolve_neg()))
    torch.testing.assert_close(*results)


def test_lazy_negation_of_a_conjugate_is_honoured():
    x, m = torch.tensor([[1 + 2j, 3 - 1j]]).conj().imag, torch.ones(1, 2)
    assert x.is_neg()
    for some in (slice(0, 2), slice(0, 1)):  # strided, and a single element, which is dense
        got = ddim_step(x[:, some], m[:, some], PLAIN)
        torch.testing.assert_close(got, ddim_step(x[:, some].clone(), m[:, some], PLAIN, backend="reference"))


# --- What torch's own in-place operations refuse ------------------------------------------------------------------------

WRITTEN = ("out", "x0_out", "history", "history_2", "model_input_out")


@per_backend
@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("outside", [torch.enable_grad, torch.no_grad])
def test_what_was_made_under_inference_mode_is_written_there_alone(written, backend, outside):
    with torch.inference_mode():
        target = torch.full((2, 3, 4), 7.0)
    x_t, m = sample(1), sample(2)
    others = {"history": sample(3)} if written == "history_2" else {}
    with outside():
        with pytest.raises(ValueError, match=r"written to outside of torch.inference_mode\(\).*clone"):
            ddim_step(x_t, m, row(), backend=backend, **others, **{written: target})
        assert bool((target == 7).all())
    with torch.inference_mode():
        ddim_step(x_t, m, row(), backend=backend, **others, **{written: target})
    assert not bool((target == 7).any())


def views_that_torch_does_not_write():
    leaf, other = torch.ones(2, 3, 4, requires_grad=True), torch.ones(2, 2, 3, 4, requires_grad=True)
    with torch.no_grad():
        quiet = leaf[:]
    return {"of a leaf": leaf[:], "of many": (other * 1).unbind(0)[0], "made without gradients": quiet}


def outputs_that_torch_does_not_write():
    """Each with whether it is refused only where what is written to it records gradients."""
    views = {kind: (view, False) for kind, view in views_that_torch_does_not_write().items()}
    buffer = torch.ones(2, 2, 3, 4)
    with torch.no_grad():
        quiet = buffer[0]
    with torch.inference_mode():
        made_there = torch.ones(2, 3, 4)
    return views | {
        "a leaf": (torch.ones(2, 3, 4, requires_grad=True), False),
        "of many, of a buffer": (buffer.unbind(0)[0], True),
        "of a buffer, made without gradients": (quiet, True),
        "made under inference mode": (made_there, False),
        "expanded": (torch.ones(1, 3, 4).expand(2, 3, 4), False),
        "zeros that have no memory": (torch._efficientzerotensor((2, 3, 4)), False),
    }


@per_backend
@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("kind", outputs_that_torch_does_not_write())
def test_an_output_that_torch_does_not_write_is_refused_before_another_is_written(kind, written, backend):
    refused, only_recorded = outputs_that_torch_does_not_write()[kind]
    if not only_recorded and "expanded" not in kind and "inference" not in kind:
        with pytest.raises(RuntimeError):
            refused.add_(1)
    before = refused.detach().clone()
    outputs = {name: torch.full((2, 3, 4), 7.0) for name in WRITTEN} | {written: refused}
    x_t = sample(1).requires_grad_(only_recorded)
    versions = {name: tensor._version for name, tensor in outputs.items() if name != written}
    with pytest.raises(ValueError, match=rf"^{written} is written to\b.*, got .*: "):
        ddim_step(x_t, sample(2), row(), backend=backend, **outputs)
    for name, tensor in outputs.items():
        assert torch.equal(tensor.detach(), before if name == written else torch.full((2, 3, 4), 7.0)), name
        assert name == written or tensor._version == versions[name]
    table, index = StepTable.of([row()]), torch.tensor([0])
    with pytest.raises(ValueError, match=rf"^{written} is written to\b"):
        ddim_step_from_table(x_t, sample(2), table, index, **outputs)
    assert all(bool((tensor == 7).all()) for name, tensor in outputs.items() if name != written)


@pytest.mark.parametrize("kind", [kind for kind, (_, only) in outputs_that_torch_does_not_write().items() if only])
def test_a_view_of_a_buffer_is_written_where_nothing_is_recorded(kind):
    view = outputs_that_torch_does_not_write()[kind][0]
    expected = ddim_step(sample(1), sample(2), row())
    for backend in ("cpu", "reference"):
        assert torch.equal(ddim_step(sample(1), sample(2), row(), backend=backend, out=view), view)
        torch.testing.assert_close(view, expected)
    with torch.no_grad():
        ddim_step(sample(1).requires_grad_(), sample(2), row(), out=view.zero_())
    torch.testing.assert_close(view, expected)


@pytest.mark.parametrize("name", ["x_t", "model_output"])
def test_zeros_that_have_no_memory_are_zeros(name):
    given = {"x_t": sample(1), "model_output": sample(2)}
    zeros = torch._efficientzerotensor((2, 3, 4))
    got = ddim_step(**given | {name: zeros}, coefficients=row())
    torch.testing.assert_close(got, ddim_step(**given | {name: torch.zeros(2, 3, 4)}, coefficients=row()))


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
@pytest.mark.parametrize("name", ["x_t", "model_output", "noise", "out", "x0_out"])
def test_a_nested_tensor_is_refused_in_a_sentence(name):
    given = {"x_t": sample(1), "model_output": sample(2), "coefficients": row(prev_noise=0.1), "noise": sample(3)}
    nested = torch.nested.nested_tensor([sample(4)[0], sample(5)[0]])
    with pytest.raises(TypeError, match="one shape, got a nested one"):
        ddim_step(**given | {name: nested})


# --- Inside torch.func's transforms -------------------------------------------------------------------------------------


def test_under_vmap_every_tensor_may_be_mapped_but_those_read_on_the_host():
    x_t, m, noisy = sample(1, (4, 2, 3)), sample(2, (4, 2, 3)), row(prev_noise=0.1)
    seeds = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]])
    expected = torch.stack([ddim_step(a, b, row(), backend="reference") for a, b in zip(x_t, m, strict=True)])
    assert torch.equal(torch.vmap(lambda a, b: ddim_step(a, b, row()))(x_t, m), expected)
    out = torch.empty_like(x_t)
    torch.vmap(lambda a, b, out: ddim_step(a, b, row(), out=out))(x_t, m, out)
    assert torch.equal(out, expected)
    thresholds = torch.tensor([[0.5, 1.0], [2.0, 1.0], [1.5, 3.0], [0.1, 0.2]])
    clipped = torch.vmap(lambda a, b, s: ddim_step(a, b, row(clip=0.5), thresholds=s))(x_t, m, thresholds)
    each = [ddim_step(*of, row(clip=0.5), thresholds=s) for *of, s in zip(x_t, m, thresholds, strict=True)]
    torch.testing.assert_close(clipped, torch.stack(each))
    with pytest.raises(ValueError, match=r"seeds must be the same for all samples of a torch.func transform"):
        torch.vmap(lambda a, b, s: ddim_step(a, b, noisy, seeds=s))(x_t, m, seeds)
    table = StepTable.of([row(), row()])
    with pytest.raises(ValueError, match=r"index must be the same for all samples of a torch.func transform"):
        torch.vmap(lambda a, b, i: ddim_step_from_table(a, b, table, i))(x_t, m, torch.zeros(4, 1, dtype=torch.int64))


@pytest.mark.parametrize("written", ["out", "x0_out"])
@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_a_transform_does_not_write_what_it_does_not_hold(transform, written):
    plain = torch.full((2, 3), 7.0)

    def step(x_t):
        return ddim_step(x_t, x_t, row(), **{written: plain}).sum()

    calls = {
        "vmap": lambda x_t: torch.vmap(step)(x_t[None].repeat(4, 1, 1)),
        "grad": lambda x_t: torch.func.grad(step)(x_t),
    }
    with pytest.raises(
        ValueError, match=f"^{written} is written to inside a torch.func transform.*, got one from outside"
    ):
        calls[transform](sample(1, (2, 3)))
    assert bool((plain == 7).all())


def test_seeds_serve_a_function_whose_gradient_is_taken():
    seeds, noisy = torch.tensor([3, 4]), row(prev_noise=0.1)
    gradient = torch.func.grad(lambda x_t: ddim_step(x_t, x_t * 0, noisy, seeds=seeds).sum())(sample(1, (2, 3)))
    torch.testing.assert_close(gradient, torch.full((2, 3), 1.5 * 0.5))


# --- Dispatch -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setattr(cpu_step, "extension", None)
    monkeypatch.setattr(cpu_step, "missing_reason", "the C++ extension is not there (test)", raising=False)
    monkeypatch.setattr(dispatch, "_run_plain", None)
    monkeypatch.setattr(dispatch, "_warned", set())


@pytest.mark.usefixtures("no_extension")
def test_missing_extension_warns_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = ddim_step(X, sample(1), PLAIN)
        second = ddim_step(X, sample(1), PLAIN)
    assert [str(w.message) for w in caught] == [
        "ddim_fast runs its PyTorch reference, which is slower: the C++ extension is not there (test)"
    ]
    assert caught[0].filename == __file__  # the caller's line
    assert torch.equal(first, second)
    assert torch.equal(first, ddim_step(X, sample(1), PLAIN, backend="reference"))


@pytest.mark.usefixtures("no_extension")
def test_missing_extension_is_a_reason():
    with pytest.raises(ValueError, match=re.escape("cpu: the C++ extension is not there (test)")):
        ddim_step(X, sample(1), PLAIN, backend="cpu")


@pytest.mark.usefixtures("no_extension")
def test_normals_without_the_extension_are_the_same():
    got = cpu_step.normals(torch.tensor([3, -4]), (2, 5), 7, 1)
    assert got.shape == (2, 2, 5)
    np.testing.assert_array_equal(got.numpy().reshape(2, 10), cpu_step.standard_normals([3, -4], 10, 7, 1))


def test_no_backend_lists_every_reason(monkeypatch):
    monkeypatch.setattr(reference, "unsupported_reasons", lambda inputs, more: ["it is on holiday", "it is tired"])
    with pytest.raises(ValueError, match="no backend can run this step") as caught:
        choose(StepInputs(X.double(), X.double(), PLAIN))
    assert "cpu: x_t is torch.float64, it takes float32, float16 and bfloat16" in str(caught.value)
    assert "reference: it is on holiday; it is tired" in str(caught.value)


def test_reasons_of_the_cpu_backend():
    def reasons(x, m):
        return "; ".join(BACKENDS["cpu"].unsupported_reasons(StepInputs(x, m, PLAIN)))

    assert reasons(X, X) == ""
    assert "x_t is torch.float64" in reasons(X.double(), X.double())
    assert "model_output is torch.float32 beside an x_t of torch.float16" in reasons(X.half(), X)
    assert "model_output is torch.float64 beside an x_t of torch.float32" in reasons(X, X.double())
    assert "tensors are on meta, it runs on cpu" in reasons(X.to("meta"), X.to("meta"))

    class Wrapped(torch.Tensor):
        pass

    assert "subclass" in reasons(X.as_subclass(Wrapped), X)
    assert reasons(torch.nn.Parameter(X, requires_grad=False), X) == ""


def test_meta_tensors_give_shapes():
    meta = X.to("meta")
    result = ddim_step(meta, meta, PLAIN)
    assert result.device.type == "meta"
    assert result.shape == X.shape


def test_seeds_are_not_read_without_noise():
    assert torch.equal(ddim_step(X, X, PLAIN, seeds=SEEDS), ddim_step(X, X, PLAIN))
    assert torch.equal(ddim_step(X, X, PLAIN, noise=X * math.nan), ddim_step(X, X, PLAIN))


@per_backend
def test_infinite_sample_does_not_depend_on_x0_out(backend):
    x, m = torch.full((1, 4), math.inf), torch.zeros(1, 4)
    without = ddim_step(x, m, CLIPPED, backend=backend)
    with_x0 = ddim_step(x, m, CLIPPED, x0_out=torch.zeros(1, 4), backend=backend)
    torch.testing.assert_close(with_x0, without, rtol=0, atol=0, equal_nan=True)


# --- A row of a table -------------------------------------------------------------------------------------------------


TABLE = StepTable.of([PLAIN, row(x0_x=0.5)])
TABLE_ERRORS = {
    "no table": (
        {"table": PLAIN, "index": torch.zeros(1, dtype=torch.int64)},
        TypeError,
        ["table must be a StepTable"],
    ),
    "index a number": ({"index": 0}, TypeError, ["index must be a torch.Tensor", "int"]),
    "index dtype": ({"index": torch.zeros(1)}, ValueError, ["index must be one int64 number", "torch.float32"]),
    "five indices": (
        {"index": torch.zeros(5, dtype=torch.int64)},
        ValueError,
        ["index must be one int64 number", "(5,)"],
    ),
    "index too large": ({"index": torch.tensor([2])}, ValueError, ["less than the 2 rows", "got 2"]),
    "index below 0": ({"index": torch.tensor([-1])}, ValueError, ["at least 0", "got -1"]),
    "index elsewhere": (
        {"index": torch.zeros(1, dtype=torch.int64, device="meta")},
        ValueError,
        ["index must be on", "meta"],
    ),
    "noise_step": (
        {"index": torch.tensor([1]), "noise_step": 2**32},
        ValueError,
        ["noise_step must be an integer in [0, 4294967295]"],
    ),
    "noise_step a word": (
        {"index": torch.tensor([1]), "noise_step": "a"},
        TypeError,
        ["noise_step must be an integer"],
    ),
    "a scale and no output": (
        {"index": torch.tensor([0]), "table": StepTable.of([PLAIN], guidance_scale=2.0)},
        ValueError,
        ["the table has a guidance scale", "got none"],
    ),
    "an output and no scale": (
        {"index": torch.tensor([0]), "model_output_uncond": sample(2)},
        ValueError,
        ["model_output_uncond needs a guidance scale", "the table has none"],
    ),
}


@pytest.mark.parametrize("name", TABLE_ERRORS)
def test_error_of_a_table_says_the_rule(name):
    changed, error, parts = TABLE_ERRORS[name]
    x, m = sample(), sample(1)
    before = x.clone()
    with pytest.raises(error) as caught:
        ddim_step_from_table(x, m, **({"table": TABLE, "out": x} | changed))
    for part in parts:
        assert part in str(caught.value)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("scale", "error"), [(math.nan, ValueError), (1e39, ValueError), ("2", TypeError), (math.inf, ValueError)]
)
def test_a_scale_of_a_table_is_a_finite_number(scale, error):
    with pytest.raises(error, match="guidance_scale must be"):
        StepTable.of([PLAIN], guidance_scale=scale)
    with pytest.raises(error, match="guidance_scale must be"):
        StepTable.of([PLAIN], guidance_scale=1.0).set_guidance_scale(scale)
    with pytest.raises(ValueError, match="without a guidance scale"):
        TABLE.set_guidance_scale(1.0)


@pytest.mark.parametrize(
    "rows",
    [
        torch.zeros(2, ROW_WIDTH).double(),
        torch.zeros(2, 2 * ROW_WIDTH)[:, ::2],
        torch.zeros(ROW_WIDTH),
        torch.zeros(2, ROW_WIDTH - 1),
    ],
    ids=["float64", "strided", "1-d", "narrow"],
)
def test_rows_of_a_table_are_checked(rows):
    with pytest.raises(ValueError, match="contiguous float32 rows"):
        StepTable(rows, False, False, False)


def test_the_place_in_the_noise_goes_round():
    table, x, m = StepTable.of([NOISY, NOISY]), sample(), sample(1)
    got = ddim_step_from_table(x, m, table, torch.tensor([1]), seeds=SEEDS, noise_step=2**32 - 1)
    assert torch.equal(got, ddim_step(x, m, NOISY, seeds=SEEDS, noise_step=0))


def test_an_output_with_a_history_keeps_its_gradients():
    leaf = torch.ones(2, 4, requires_grad=True)
    out = leaf * 2
    ddim_step(torch.randn(2, 4), torch.randn(2, 4), PLAIN, out=out)
    out.sum().backward()
    assert torch.equal(leaf.grad, torch.zeros(2, 4))


def test_a_table_is_made_of_coefficients():
    with pytest.raises(TypeError, match="made of StepCoefficients, got a int"):
        StepTable.of([1])


def test_a_table_is_of_one_kind():
    with pytest.raises(ValueError, match="must all clip x0, or none, and be at least one, got 1 of 2"):
        StepTable.of([PLAIN, row(clip=1.0)])
    with pytest.raises(ValueError, match="got 0 of 0"):
        StepTable.of([])


def test_a_row_of_a_table_is_the_step():
    x, m = sample(), sample(1)
    for index, coefficients in enumerate([PLAIN, row(x0_x=0.5)]):
        got = ddim_step_from_table(x, m, TABLE, torch.tensor([index]))
        assert torch.equal(got, ddim_step(x, m, coefficients))


def test_a_table_may_have_a_guidance_scale_for_each_step():
    rows = [StepCoefficients(1, 0, 0, 1, 0, 1, 0, 0)] * 3
    table = StepTable.of(rows, "cpu", [1.0, 2.5, -1.0])
    assert table.guided
    assert [table.coefficients(i)[1] for i in range(3)] == [1.0, 2.5, -1.0]
    assert torch.equal(StepTable.of(rows, "cpu", 2.0).rows, StepTable.of(rows, "cpu", [2.0] * 3).rows)
    with pytest.raises(ValueError, match="one for each of the 3 steps, got 2"):
        StepTable.of(rows, "cpu", [1.0, 2.0])
    with pytest.raises(ValueError, match="finite"):
        StepTable.of(rows, "cpu", [1.0, 2.0, float("nan")])
