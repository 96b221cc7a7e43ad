"""Every backend and every instruction set against the float64 oracle: values, layouts, aliases, extremes, and equal bits."""

import contextlib
import itertools
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from covering import covering
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from model_inputs import assert_is_scaled

from ddim_fast.kernels import cpu_step, noise
from ddim_fast.kernels.contract import StepCoefficients, StepInputs
from ddim_fast.kernels.dispatch import BACKENDS, ddim_step
from ddim_fast.verify.truth import oracle, tolerances
from ddim_fast.verify.truth.tolerances import assert_near, to_numpy

pytestmark = pytest.mark.usefixtures("nan_memory")

KNOWN_REGION = 2  # the noise stream of a known picture
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
PAIRS = [(d, d) for d in FLOATS] + [(torch.float32, torch.float16), (torch.float32, torch.bfloat16)]


@dataclass(frozen=True)
class Target:
    """A way to run a step: a backend by name (None: as a user calls it), and an instruction set where it has any."""

    backend: str | None
    instruction_set: str | None = None

    def __str__(self):
        return "-".join(filter(None, [self.backend or "plain", self.instruction_set]))

    @contextlib.contextmanager
    def selected(self):
        if self.instruction_set is None:
            yield
            return
        before = cpu_step.extension.selected()
        cpu_step.extension.select(self.instruction_set)
        try:
            yield
        finally:
            cpu_step.extension.select(before)

    def __call__(self, *args, **kwargs):
        with self.selected():
            return ddim_step(*args, backend=self.backend, **kwargs)

    @property
    def pairs(self):
        return PAIRS + ([(torch.float64, torch.float64)] if self.backend == "reference" else [])


INSTRUCTION_SETS = cpu_step.extension.instruction_sets() if cpu_step.extension is not None else []
TARGETS = [Target("reference")]
TARGETS += [Target(backend, isa) for isa in INSTRUCTION_SETS for backend in ("cpu", None)]
SIMD = [t for t in TARGETS if t.instruction_set]
per_target = pytest.mark.parametrize("target", TARGETS, ids=str)
per_simd = pytest.mark.parametrize("target", SIMD, ids=str)


def row_of(**columns):
    zero = dict.fromkeys(
        (
            "x0_x", "x0_m", "eps_x", "eps_m", "eps_0", "prev_x0", "prev_eps", "prev_noise", "known_x0", "known_noise", "prev_history",
            "prev_history_2",
        ), 0.0
    )  # fmt: skip
    return zero | {"clip": math.inf, "input_scale": 1.0} | columns


def normal(rng, shape, dtype=torch.float32, scale=1.0):
    return (torch.from_numpy(rng.standard_normal(shape)) * scale).to(dtype)


def blend_weights(rng, shape, dtype):
    """Mostly nothing and everything, and some between."""
    return torch.from_numpy(np.clip(rng.uniform(-1, 2, shape), 0, 1)).to(dtype)


def z_of(seeds, shape, step=0, stream=0):
    return noise.standard_normals(seeds.numpy(), math.prod(shape[1:]), step, stream).reshape(shape)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def bits(t):
    return t.detach().contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[t.element_size()])


def test_every_backend_and_instruction_set_is_tested():
    assert cpu_step.extension is not None, cpu_step.missing_reason
    assert {t.backend for t in TARGETS} | {"triton"} == {*BACKENDS, None}  # triton: test_triton.py
    assert "portable" in INSTRUCTION_SETS


# --- The oracle itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "digits", "lowest", "largest"),
    [
        ("round_to_float16", 11, -24, 65504.0),
        ("round_to_bfloat16", 8, -133, 255 * 2.0**120),
        ("round_to_float32", 24, -149, None),
    ],
)
def test_oracle_rounds_to_nearest_even(name, digits, lowest, largest):
    rng = np.random.default_rng(1)
    x = rng.standard_normal(20000) * 2.0 ** rng.integers(lowest - 3, 12, 20000)
    unit = 2.0 ** np.maximum(np.frexp(x)[1] - digits, lowest)
    whole = np.rint(x / unit)
    x = np.concatenate(
        [
            x,
            (whole + 0.5) * unit,
            (whole + 0.5) * unit * (1 + 2.0**-50),
            (whole + 0.5) * unit * (1 - 2.0**-50),
            whole * unit,
        ]
    )
    unit = 2.0 ** np.maximum(np.frexp(x)[1] - digits, lowest)
    np.testing.assert_array_equal(getattr(oracle, name)(x), np.rint(x / unit) * unit)
    if largest is not None:
        step = largest * 2.0**-digits
        edge = getattr(oracle, name)(np.array([largest, largest + step * 0.4, -largest * 1.1, np.inf, -np.inf, np.nan]))
        np.testing.assert_array_equal(edge, [largest, largest, -np.inf, np.inf, -np.inf, np.nan])


SIX_STEPS = [(0.9999, 1.0), (0.98, 0.9995), (0.5, 0.6), (0.05, 0.09), (0.0047, 0.0063), (3e-5, 2e-4)]


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta_scales", ["std_dev", "variance"])
@pytest.mark.parametrize("use_clipped_model_output", [False, True])
@pytest.mark.parametrize("clip", [math.inf, 1.0, "thresholds"])
def test_rows_are_the_textbook(prediction_type, eta_scales, use_clipped_model_output, clip):
    rng = np.random.default_rng(2)
    x, m, cond, z = rng.standard_normal((4, 3, 500))
    s = None
    if clip == "thresholds":
        clip, s = 1.5, np.array([1.0, 2.5, 40.0])
    for ab_t, ab_prev in SIX_STEPS:
        for eta in (0.0, 0.3, 1.0):
            row = oracle.textbook_row(
                prediction_type,
                ab_t,
                ab_prev,
                eta=eta,
                eta_scales=eta_scales,
                clip=clip,
                use_clipped_model_output=use_clipped_model_output,
            )
            got = oracle.row_step(row, x, cond, uncond=m, guidance=1.75, noise=z, thresholds=s)
            expected, x0 = oracle.textbook_step(
                prediction_type, x, oracle.guide(cond, m, 1.75), ab_t, ab_prev,
                eta=eta, eta_scales=eta_scales, noise=z, clip=clip, use_clipped_model_output=use_clipped_model_output, thresholds=s,
            )  # fmt: skip
            assert np.abs(got.x0 - x0).max() <= 1e-15 * (1 + np.abs(got.x0_terms)).max() * 4
            assert np.all(np.abs(got.x_prev - expected) <= 1e-13 * got.long_terms)
            assert np.all(got.terms <= got.long_terms * (1 + 1e-12))


# --- Any row, shape, dtype, layout and alias ---------------------------------------------------------------------------

SHAPES = [
    (0,), (1,), (127,), (128,), (129,), (0, 4, 4), (3, 0), (3, 1), (1, 1), (2, 127), (4, 128), (3, 129), (1, 1025), (2, 4100),
    (3, 5, 7), (2, 3, 8, 8), (3, 4, 5, 5), (1, 3, 33, 31), (5, 1, 1, 3), (2, 2, 2, 2, 3),
]  # fmt: skip
LAYOUTS = [
    "contiguous",
    "unaligned",
    "strided batch",
    "channel slice",
    "last dims swapped",
    "channels last",
    "batch innermost",
    "every other",
]


def place(values, layout):
    """The same values in another layout of memory; around them lies a number that no test value equals. Returns (tensor, its buffer)."""
    shape, axes, slices, shift = list(values.shape), list(range(values.ndim)), [slice(None)] * values.ndim, 0
    if layout == "unaligned":
        shift = 3
    elif layout == "strided batch":
        slices[0] = slice(None, None, 2)
        shape[0] *= 2
    elif layout == "channel slice" and values.ndim > 1:
        slices[1] = slice(0, shape[1])
        shape[1] *= 2
    elif layout == "last dims swapped" and values.ndim > 2:
        axes[-2:] = axes[-1], axes[-2]
    elif layout == "channels last" and values.ndim > 2:
        axes.append(axes.pop(1))
    elif layout == "batch innermost":
        axes.append(axes.pop(0))
    elif layout == "every other":
        slices[-1] = slice(1, None, 2)
        shape[-1] *= 2
    buffer = torch.full((math.prod(shape) + 64,), -77.0, dtype=values.dtype)
    body = buffer[16 + shift : 16 + shift + math.prod(shape)]
    view = body.view([shape[a] for a in axes]).permute([axes.index(d) for d in range(len(axes))])[tuple(slices)]
    assert view.shape == values.shape
    view.copy_(values)
    return view, buffer


def expand(values, dim):
    return values.narrow(dim, 0, 1).expand(values.shape) if values.shape[dim] else values


@dataclass
class Case:
    """One call of ddim_step, drawn by hypothesis, with the buffers that its tensors lie in."""

    text: str
    row: dict
    x_t: torch.Tensor
    model_output: torch.Tensor
    keywords: dict
    buffers: dict = field(default_factory=dict)
    expected: oracle.Result | None = None
    last_x0: torch.Tensor | None = None

    def __repr__(self):
        return self.text


REALISTIC = st.builds(
    lambda kind, pair, eta, eta_scales, clip, use_clipped_model_output: oracle.textbook_row(
        kind, *pair, eta=eta, eta_scales=eta_scales, clip=clip, use_clipped_model_output=use_clipped_model_output
    ),
    st.sampled_from(["epsilon", "sample", "v_prediction"]),
    st.sampled_from(SIX_STEPS),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from(["std_dev", "variance"]),
    st.sampled_from([math.inf, 1.0, 2.5]),
    st.booleans(),
)
COLUMN = st.one_of(st.just(0.0), st.floats(-3, 3, width=32), st.floats(1e-6, 1e4), st.floats(-1e4, -1e-6)).map(
    lambda v: 0.0 if abs(v) < 1e-20 else v
)
RANDOM = st.builds(
    lambda columns, clip: row_of(**columns, clip=clip),
    st.fixed_dictionaries({name: COLUMN for name in row_of() if name != "clip"}),
    st.sampled_from([math.inf, 0.7, 3.0]),
)


MULTISTEP = st.builds(
    lambda kind, pair, eta, clip, use_clipped_model_output, histories, input_scale: (
        oracle.textbook_row(kind, *pair, eta=eta, clip=clip, use_clipped_model_output=use_clipped_model_output)
        | dict(zip(("prev_history", "prev_history_2"), histories, strict=True))
        | {"input_scale": input_scale}
    ),
    st.sampled_from(["epsilon", "sample", "v_prediction"]),
    st.sampled_from(SIX_STEPS),
    st.sampled_from([0.0, 1.0]),
    st.sampled_from([math.inf, 1.0]),
    st.booleans(),
    st.tuples(st.floats(-2, -1e-3), st.one_of(st.just(0.0), st.floats(1e-3, 1))),
    st.floats(1e-3, 2),
)


@st.composite
def cases(draw, pairs):
    shape = draw(st.sampled_from(SHAPES))
    state, output = draw(st.sampled_from(pairs))
    row = draw(st.one_of(REALISTIC, RANDOM, MULTISTEP))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([1.0, 1.0, 30.0, 1e-3]))
    same_layout = draw(st.one_of(st.none(), st.sampled_from(LAYOUTS)))
    text = [f"shape={shape} x_t={state} model_output={output} scale={scale} row={row}"]
    buffers, tensors = {}, {}

    def make(name, dtype, random=normal):
        values = random(rng, shape, dtype) * scale if random is normal else random(rng, shape, dtype)
        layout = same_layout or draw(st.sampled_from([*LAYOUTS, "expanded batch", "expanded row"]))
        text.append(f"{name}: {layout}")
        if layout.startswith("expanded"):
            tensors[name] = expand(values, 0 if layout == "expanded batch" else -1)
        else:
            tensors[name], buffers[name] = place(values, layout)
        return tensors[name]

    x_t, m = make("x_t", state), make("model_output", output)
    keywords, for_oracle = {}, {}
    if draw(st.booleans()):
        keywords["model_output_uncond"] = make("model_output_uncond", output)
        keywords["guidance_scale"] = for_oracle["guidance"] = draw(st.sampled_from([0.0, 1.0, 7.5, -2.0]))
        for_oracle["uncond"] = to_numpy(tensors["model_output_uncond"])
    reads = {"history": row.get("prev_history", 0.0) != 0, "history_2": row.get("prev_history_2", 0.0) != 0}
    given = {"history_2": reads["history_2"] or draw(st.integers(0, 3)) == 0}
    given["history"] = reads["history"] or given["history_2"] or draw(st.booleans())
    kind = draw(st.sampled_from(["given", "seeds"] if row["prev_noise"] else ["none", "given", "seeds"]))
    if kind == "given":
        keywords["noise"] = make("noise", state)
        for_oracle["noise"] = to_numpy(keywords["noise"])
    elif kind == "seeds":
        keywords["seeds"] = torch.from_numpy(rng.integers(-(2**63), 2**63, shape[0]))
        keywords |= {
            "noise_step": draw(st.sampled_from([0, 7, 2**32 - 1])),
            "noise_stream": draw(st.sampled_from([0, 2])),
        }
        for_oracle["noise"] = z_of(keywords["seeds"], shape, keywords["noise_step"], keywords["noise_stream"])
    if row["clip"] != math.inf and draw(st.booleans()):
        keywords["thresholds"] = torch.from_numpy(rng.uniform(0.5, 5, shape[0])).float()
        for_oracle["thresholds"] = to_numpy(keywords["thresholds"])
    if draw(st.integers(0, 3)) == 0:
        keywords["known_x0"] = make("known_x0", state)
        keywords["mask"] = make("mask", state, lambda rng, shape, dtype: blend_weights(rng, shape, dtype))
        for_oracle |= {"known_x0": to_numpy(keywords["known_x0"]), "mask": to_numpy(keywords["mask"])}
        if row["known_noise"]:
            if kind == "seeds":
                for_oracle["known_noise"] = z_of(keywords["seeds"], shape, keywords["noise_step"], KNOWN_REGION)
            else:
                keywords["known_noise"] = make("known_noise", state)
                for_oracle["known_noise"] = to_numpy(keywords["known_noise"])
    for name in ("history", "history_2"):
        if given[name]:  # NaN where it must not be read
            values = normal(rng, shape, state) * scale if reads[name] else torch.full(shape, math.nan, dtype=state)
            keywords[name], buffers[name] = place(values, same_layout or draw(st.sampled_from(LAYOUTS)))
            for_oracle[name] = to_numpy(values)
    last_x0 = keywords["history"].clone() if "history" in keywords else None
    of_model = draw(st.sampled_from([state, output, *FLOATS]))
    could_be_read = [name for name in buffers if name in tensors]
    taken = set()
    for name, dtype, default in (
        ("out", state, "new"),
        ("x0_out", state, "none"),
        ("model_input_out", of_model, "none"),
    ):
        targets = [other for other in could_be_read if tensors[other].dtype == dtype and other not in taken]
        where = draw(st.sampled_from([default, default, "separate", "separate", *targets]))
        taken.add(where)
        if where == "separate":
            keywords[name] = make(name, dtype, lambda rng, shape, dtype: torch.full(shape, math.nan, dtype=dtype))
            if name not in buffers:  # an expanded tensor cannot be written to
                keywords[name], buffers[name] = place(torch.full(shape, math.nan, dtype=dtype), "contiguous")
                tensors[name] = keywords[name]
        elif where not in ("new", "none"):
            keywords[name] = tensors[where]
        text.append(f"{name}={where}")
    text.append(f"noise={kind} thresholds={'thresholds' in keywords} guidance={keywords.get('guidance_scale')}")
    expected = oracle.row_step(row, to_numpy(x_t), to_numpy(m), **for_oracle)
    return Case("; ".join(text), row, x_t, m, keywords, buffers, expected, last_x0)


OUTPUTS = ("out", "x0_out", "history", "history_2", "model_input_out")


def check_case(target, case):
    written = [case.keywords[name] for name in OUTPUTS if name in case.keywords]
    before = {name: buffer.clone() for name, buffer in case.buffers.items()}
    result = target(case.x_t, case.model_output, StepCoefficients(**case.row), **case.keywords)
    if "out" in case.keywords:
        assert result is case.keywords["out"]
    assert result.shape == case.x_t.shape
    assert result.dtype == case.x_t.dtype
    long = result.dtype == torch.float64
    assert_near(result, case.expected.x_prev, case.expected.long_terms if long else case.expected.terms, "x_prev")
    for name in ("x0_out", "history"):
        if name in case.keywords:
            assert_near(case.keywords[name], case.expected.x0, case.expected.x0_terms, name)
    if "history_2" in case.keywords:
        assert same_bits(case.keywords["history_2"], case.last_x0)
    if "model_input_out" in case.keywords:
        assert_is_scaled(case.keywords["model_input_out"], result, case.row.get("input_scale", 1.0))
    for name, buffer in case.buffers.items():  # nothing but the outputs' elements has changed
        for tensor in written:
            if tensor.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr():
                for b in (buffer, before[name]):
                    b.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(0)
        assert same_bits(buffer, before[name]), f"{name}: memory beside the outputs was written"


@per_target
def test_any_case(target):
    # The plain call leads to the loops of C++, too, and the reference has none.
    examples = 250 if target.backend == "cpu" else 100

    @settings(max_examples=examples, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
    @given(cases(target.pairs))
    def run(case):
        check_case(target, case)

    run()


LOOPS = {
    "kind": [
        "none", "given", "seeds", "history", "history not read", "history, given", "history, seeds", "2 histories",
        "2 histories not read", "2 histories, seeds",
    ],
    "x0_out": [False, True],
    "dtypes": PAIRS,
}  # fmt: skip
"""What the C++ kernels have loops of their own for."""


def loops():
    """Return every loop of each instruction set, and pairs of options of each other way to them."""
    every = [dict(zip(LOOPS, values, strict=True)) for values in itertools.product(*LOOPS.values())]
    return [
        pytest.param(target, *choice.values(), id=f"{target}-{'-'.join(map(str, choice.values()))}")
        for i, target in enumerate(TARGETS)
        for choice in (every if target.backend == "cpu" else covering(LOOPS, seed=i))
    ]


@pytest.mark.parametrize(("target", "kind", "x0_out", "dtypes"), loops())
def test_every_loop(target, kind, x0_out, dtypes):
    """At a length with every kind of tail."""
    state, output = dtypes
    rng = np.random.default_rng(3)
    shape = (2, 1024 + 61)
    coefficients = {
        "x0_x": 1.25,
        "x0_m": -0.75,
        "prev_x0": 0.875,
        "prev_noise": 0.375 if "given" in kind or "seeds" in kind else 0.0,
    }
    histories = ("history", "history_2")[: 2 if "2" in kind else "history" in kind]
    if "not read" not in kind:
        coefficients |= zip(("prev_history", "prev_history_2")[: len(histories)], (-0.625, 0.4375), strict=False)
    rests = [(0.25, 0.5, -0.125), (0.25, 0.0, 0.0), (0.0, 0.5, 0.0), (0.0, 0.0, 0.5)]
    for guided in (False, True):
        for clip, rest in [(math.inf, rests[0])] + [(1.0, rest) for rest in rests]:
            row = row_of(**coefficients, prev_eps=0.5, eps_x=rest[0], eps_m=rest[1], eps_0=rest[2], clip=clip)
            x, m, uncond = normal(rng, shape, state), normal(rng, shape, output), normal(rng, shape, output)
            keywords, z = {"out": torch.full_like(x, math.nan)}, None
            if guided:
                keywords |= {"model_output_uncond": uncond, "guidance_scale": 3.0}
            if "given" in kind:
                keywords["noise"] = normal(rng, shape, state)
                z = to_numpy(keywords["noise"])
            elif "seeds" in kind:
                keywords |= {"seeds": torch.tensor([5, -6]), "noise_step": 12}
                z = z_of(keywords["seeds"], shape, 12)
            past = {
                name: torch.full_like(x, math.nan) if "not read" in kind else normal(rng, shape, state)
                for name in histories
            }
            keywords |= {name: last_x0.clone() for name, last_x0 in past.items()}
            if x0_out:
                keywords["x0_out"] = torch.full_like(x, math.nan)
            result = target(x, m, StepCoefficients(**row), **keywords)
            expected = oracle.row_step(
                row,
                to_numpy(x),
                to_numpy(m),
                noise=z,
                uncond=to_numpy(uncond) if guided else None,
                guidance=3.0 if guided else None,
                **{name: to_numpy(last_x0) for name, last_x0 in past.items()},
            )
            assert_near(result, expected.x_prev, expected.terms, f"x_prev, guided={guided} clip={clip} rest={rest}")
            for name in {"x0_out", "history"} & keywords.keys():
                assert_near(keywords[name], expected.x0, expected.x0_terms, name)
            assert "history_2" not in keywords or same_bits(keywords["history_2"], past["history"])


@per_target
@pytest.mark.parametrize("state", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("of_model", [*FLOATS, torch.float64], ids=lambda d: str(d).removeprefix("torch."))
def test_the_model_input_is_that_of_a_pass_of_its_own(target, state, of_model):
    """At lengths with every kind of tail, with all that changes x_prev, every NaN among the samples, and subnormal products."""
    if of_model == torch.float64 and target.backend == "cpu":
        with pytest.raises(
            ValueError, match=r"model_input_out is torch.float64, it takes float32, float16 and bfloat16"
        ):
            target(*torch.ones(2, 1, 3), StepCoefficients(**row_of()), model_input_out=torch.ones(1, 3).double())
        return
    rng = np.random.default_rng(16)
    row = oracle.textbook_row("epsilon", 0.5, 0.6, eta=1.0) | {"prev_history": -0.5, "prev_history_2": 0.25}
    scales = (1 / 3, -1e-38, 0.0)
    for i, n in enumerate((0, 1, 7, 8, 15, 16, 17, 127, 128, 129, 2047, 2048, 2049, 4097 + 61)):
        for scale in scales if n > 4096 else [scales[i % 3]]:
            x, m, last, last_2, mask = (normal(rng, (2, n), state) for _ in range(5))
            x.view(-1)[: 2 * n // 3 : 5] = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32).to(state)
            x.view(-1)[1 : 2 * n // 3 : 7] = math.inf
            options = {
                "plain": {},
                "all": {"history": last, "history_2": last_2, "mask": mask, "known_x0": last_2.clone()},
            }
            for name, more in options.items():
                step = row if more else oracle.textbook_row("epsilon", 0.5, 0.6, eta=1.0)
                step = step | {"input_scale": scale, "known_x0": 0.75, "known_noise": 0.5}
                buffer = torch.full((2 * n + 40,), -77.0, dtype=of_model)
                model_input = buffer[17 : 17 + 2 * n].view(2, n)
                seeds = torch.tensor([5, -6])
                got = target(x, m, StepCoefficients(**step), seeds=seeds, model_input_out=model_input, **more)
                assert_is_scaled(model_input, got, scale)
                separate = (scale * got.float()).to(of_model)
                assert torch.equal(separate.nan_to_num(7.0), model_input.nan_to_num(7.0)), (n, scale, name)
                assert (buffer[:17] == -77).all()
                assert (buffer[17 + 2 * n :] == -77).all()


@per_target
def test_every_length(target):
    rng = np.random.default_rng(4)
    row = oracle.textbook_row("epsilon", 0.5, 0.6, eta=1.0)
    for n in [*range(70), 255, 256, 257, 1023, 1024, 1025, 2049]:
        for samples in (1, 3):
            buffer = torch.full((samples * n + 40,), -77.0)
            out = buffer[17 : 17 + samples * n].view(samples, n)
            x, m = normal(rng, (samples, n)), normal(rng, (samples, n))
            seeds = torch.arange(samples) - 1
            target(x, m, StepCoefficients(**row), seeds=seeds, noise_step=3, out=out)
            expected = oracle.row_step(row, to_numpy(x), to_numpy(m), noise=z_of(seeds, x.shape, 3))
            assert_near(out, expected.x_prev, expected.terms, f"n={n}")
            assert (buffer[:17] == -77).all()
            assert (buffer[17 + samples * n :] == -77).all(), f"n={n}"


@per_target
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(("state", "output"), PAIRS, ids=lambda d: str(d).removeprefix("torch."))
def test_textbook_steps(target, prediction_type, state, output):
    """Realistic samples: also, half precision is the correctly rounded result nearly everywhere."""
    rng = np.random.default_rng(5)
    shares = []
    for ab_t, ab_prev in SIX_STEPS:
        clean, eps = rng.uniform(-1, 1, (2, 5000)), rng.standard_normal((2, 5000))
        x = torch.from_numpy(math.sqrt(ab_t) * clean + math.sqrt(1 - ab_t) * eps).to(state)
        m = {"epsilon": eps, "sample": clean, "v_prediction": math.sqrt(ab_t) * eps - math.sqrt(1 - ab_t) * clean}[
            prediction_type
        ]
        m = torch.from_numpy(m + 0.05 * rng.standard_normal(m.shape)).to(output)
        z = normal(rng, x.shape, state)
        for clip, use_clipped_model_output, eta in [
            (math.inf, False, 0.0),
            (math.inf, False, 1.0),
            (1.0, False, 0.0),
            (1.0, True, 0.5),
        ]:
            row = oracle.textbook_row(
                prediction_type, ab_t, ab_prev, eta=eta, clip=clip, use_clipped_model_output=use_clipped_model_output
            )
            got = target(x, m, StepCoefficients(**row), noise=z)
            exact, _ = oracle.textbook_step(
                prediction_type,
                to_numpy(x),
                to_numpy(m),
                ab_t,
                ab_prev,
                eta=eta,
                noise=to_numpy(z),
                clip=clip,
                use_clipped_model_output=use_clipped_model_output,
            )
            terms = oracle.row_step(row, to_numpy(x), to_numpy(m), noise=to_numpy(z)).terms
            assert_near(got, exact, terms)
            shares.append(tolerances.share_correctly_rounded(got, exact, terms))
    if state != torch.float32:
        assert np.mean(shares) >= tolerances.SHARE_CORRECTLY_ROUNDED


def test_backends_take_the_dtypes_they_promise():
    row = StepCoefficients(**row_of(x0_x=1.0, prev_x0=1.0))
    for state in (*FLOATS, torch.float64):
        for output in (*FLOATS, torch.float64):
            inputs = StepInputs(torch.zeros(2, dtype=state), torch.zeros(2, dtype=output), row)
            assert (BACKENDS["cpu"].unsupported_reasons(inputs) == []) == ((state, output) in PAIRS)
            assert BACKENDS["reference"].unsupported_reasons(inputs) == []
            result = ddim_step(inputs.x_t, inputs.model_output, row)
            assert result.dtype == state


# --- Layouts and aliases by name (each is also drawn above) ---------------------------------------------------------------


@per_target
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
def test_what_a_step_keeps_in_every_layout(target, layout, dtype):
    """One history, two, and the model's next input."""
    rng, shape = np.random.default_rng(8), (3, 4, 5, 5)
    row = oracle.textbook_row("epsilon", 0.5, 0.6) | {"prev_history": -0.25, "input_scale": 0.7}
    x, m, last_x0, last_x0_2 = (normal(rng, shape, dtype) for _ in range(4))
    for of_last_2 in (0.0, 0.125):
        row["prev_history_2"] = of_last_2
        placed = {
            "history": place(last_x0, layout),
            "history_2": place(last_x0_2, layout),
            "model_input_out": place(torch.zeros(shape, dtype=torch.float16), layout),
        }
        around = {name: (buffer == -77).sum() for name, (_, buffer) in placed.items()}
        given = {name: tensor for name, (tensor, _) in placed.items() if of_last_2 or name != "history_2"}
        got = target(x, m, StepCoefficients(**row), **given)
        expected = oracle.row_step(
            row, to_numpy(x), to_numpy(m), history=to_numpy(last_x0), history_2=to_numpy(last_x0_2)
        )
        assert_near(got, expected.x_prev, expected.terms, "x_prev")
        assert_near(given["history"], expected.x0, expected.x0_terms, "history")
        assert same_bits(placed["history_2"][0], last_x0 if of_last_2 else last_x0_2)
        assert_is_scaled(given["model_input_out"], got, 0.7)
        for name, (_, buffer) in placed.items():
            assert (buffer == -77).sum() == around[name], name


@per_target
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("seeded", [False, True], ids=["", "seeds"])
def test_learned_variance_view(target, dtype, seeded):
    rng = np.random.default_rng(6)
    row = oracle.textbook_row("epsilon", 0.5, 0.6, eta=1.0, clip=1.0)
    both = normal(rng, (3, 8, 6, 6), dtype)
    variance = both[:, 4:].clone()
    x = normal(rng, (3, 4, 6, 6), dtype)
    seeds = torch.tensor([1, 2, 3])
    z = normal(rng, x.shape, dtype)
    keywords = {"seeds": seeds} if seeded else {"noise": z}
    expected = oracle.row_step(
        row, to_numpy(x), to_numpy(both[:, :4]), noise=z_of(seeds, x.shape) if seeded else to_numpy(z)
    )
    assert_near(target(x, both[:, :4], StepCoefficients(**row), **keywords), expected.x_prev, expected.terms)
    out = both[:, :4]
    target(x, both[:, :4], StepCoefficients(**row), out=out, **keywords)
    assert_near(both[:, :4], expected.x_prev, expected.terms)
    assert same_bits(both[:, 4:], variance)


@per_target
@pytest.mark.parametrize("seeded", [False, True], ids=["", "seeds"])
@pytest.mark.parametrize("mixed", [False, True], ids=["all", "mixed"])
def test_channels_last(target, seeded, mixed):
    rng = np.random.default_rng(7)
    row = oracle.textbook_row("v_prediction", 0.5, 0.6, eta=1.0, clip=1.5)
    x, m, z = (normal(rng, (2, 3, 5, 4)).to(memory_format=torch.channels_last) for _ in range(3))
    m = m.contiguous() if mixed else m
    seeds = torch.tensor([8, 9])
    keywords = {"seeds": seeds} if seeded else {"noise": z}
    expected = oracle.row_step(row, to_numpy(x), to_numpy(m), noise=z_of(seeds, x.shape) if seeded else to_numpy(z))
    result = target(x, m, StepCoefficients(**row), **keywords)
    assert_near(result, expected.x_prev, expected.terms)
    assert result.is_contiguous(memory_format=torch.channels_last)
    target(x, m, StepCoefficients(**row), out=x, **keywords)
    assert same_bits(x, result)


@per_target
def test_layout_does_not_change_bits(target):
    rng = np.random.default_rng(8)
    row = StepCoefficients(**oracle.textbook_row("epsilon", 0.3, 0.4, eta=0.7, clip=1.0, use_clipped_model_output=True))
    values = [normal(rng, (3, 4, 5, 6)) for _ in range(3)]
    seeds, s = torch.tensor([3, 1, 2]), torch.tensor([1.0, 2.0, 3.0])
    plain = [
        target(values[0], values[1], row, noise=values[2]),
        target(values[0], values[1], row, seeds=seeds, thresholds=s, model_output_uncond=values[2], guidance_scale=2.0),
    ]
    for layout in LAYOUTS:
        x, m, z = (place(v, layout)[0] for v in values)
        out = place(torch.full_like(values[0], math.nan), layout)[0]
        target(x, m, row, noise=z, out=out)
        assert same_bits(out, plain[0]), layout
        target(x, m, row, seeds=seeds, thresholds=s, model_output_uncond=z, guidance_scale=2.0, out=x)
        assert same_bits(x, plain[1]), layout


@per_target
def test_strided_seeds_and_thresholds(target):
    rng = np.random.default_rng(9)
    row = oracle.textbook_row("epsilon", 0.3, 0.4, eta=0.7, clip=1.5)
    x, m = normal(rng, (4, 37)), normal(rng, (4, 37))
    seeds, s = torch.arange(8)[::2], torch.arange(1, 9).float()[1::2]
    expected = oracle.row_step(row, to_numpy(x), to_numpy(m), noise=z_of(seeds, x.shape), thresholds=to_numpy(s))
    assert_near(target(x, m, StepCoefficients(**row), seeds=seeds, thresholds=s), expected.x_prev, expected.terms)
    seeds, s = torch.tensor([7]).expand(4), torch.tensor([2.0]).expand(4)
    expected = oracle.row_step(row, to_numpy(x), to_numpy(m), noise=z_of(seeds, x.shape), thresholds=to_numpy(s))
    assert_near(target(x, m, StepCoefficients(**row), seeds=seeds, thresholds=s), expected.x_prev, expected.terms)


# --- Extreme values ------------------------------------------------------------------------------------------------------


def edge_rows():
    folded = row_of(x0_x=0.5, x0_m=-0.25, eps_m=1.0, prev_x0=0.5, prev_eps=0.75)
    return {
        "not clipped": folded,
        "clipped": folded | {"clip": 1.0},
        "re-derived": folded | {"clip": 1.0, "eps_x": 0.5, "eps_0": -0.5},
    }


@per_target
@pytest.mark.parametrize("name", list(edge_rows()))
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("scaled", [False, True], ids=["", "thresholds"])
def test_nan_passes_through(target, name, dtype, scaled):
    row = edge_rows()[name]
    thresholds = torch.tensor([2.0]) if scaled and row["clip"] != math.inf else None
    for n in (5, 64):
        for i in (0, n - 1):
            for which in (0, 1):
                pair = [torch.full((1, n), 3.0, dtype=dtype), torch.full((1, n), -3.0, dtype=dtype)]
                pair[which][0, i] = math.nan
                x0 = torch.zeros(1, n, dtype=dtype)
                result = target(*pair, StepCoefficients(**row), thresholds=thresholds, x0_out=x0)
                without = target(*pair, StepCoefficients(**row), thresholds=thresholds)
                wanted = torch.arange(n) == i
                for got in (result, without, x0):
                    assert torch.equal(got[0].isnan(), wanted)


@per_target
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
def test_nan_in_noise_and_guidance_passes_through(target, dtype):
    row = StepCoefficients(**edge_rows()["clipped"] | {"prev_noise": 0.5})
    x = torch.ones(1, 9, dtype=dtype)
    bad = x.clone()
    bad[0, 4] = math.nan
    wanted = torch.arange(9) == 4
    assert torch.equal(target(x, x, row, noise=bad)[0].isnan(), wanted)
    assert torch.equal(target(x, x, row, noise=x, model_output_uncond=bad, guidance_scale=1.5)[0].isnan(), wanted)
    assert torch.equal(target(x, bad, row, noise=x, model_output_uncond=x, guidance_scale=1.5)[0].isnan(), wanted)


@per_target
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("x0_out", [False, True], ids=["", "x0"])
def test_infinity_passes_through(target, dtype, x0_out):
    """Every column that infinity meets here is non-zero: what 0 * infinity should be is for the formula to say (NaN)."""
    x = torch.tensor([[math.inf, -math.inf, 1.0, 1.0, math.inf, math.inf, 0.0]], dtype=dtype)
    m = torch.tensor([[1.0, 1.0, math.inf, -math.inf, math.inf, -math.inf, 0.0]], dtype=dtype)
    for name, row in edge_rows().items():
        row = row | ({"eps_x": -0.25} if row["eps_x"] == 0 else {})
        expected = oracle_with_infinities(row, x, m)
        x0 = torch.zeros_like(x) if x0_out else None
        np.testing.assert_array_equal(
            to_numpy(target(x, m, StepCoefficients(**row), x0_out=x0)), expected[0], err_msg=name
        )
        if x0_out:
            np.testing.assert_array_equal(to_numpy(x0), expected[1], err_msg=name)


def oracle_with_infinities(row, x, m):
    """Folded where the kernel folds, so that no infinities meet which the folded step keeps apart."""
    x, m = to_numpy(x), to_numpy(m)
    with np.errstate(invalid="ignore"):
        x0 = row["x0_x"] * x + row["x0_m"] * m
        if row["clip"] == math.inf:
            fold_x = row["prev_x0"] * row["x0_x"] + row["prev_eps"] * row["eps_x"]
            fold_m = row["prev_x0"] * row["x0_m"] + row["prev_eps"] * row["eps_m"]
            return fold_x * x + fold_m * m, x0
        x0 = np.minimum(np.maximum(x0, -row["clip"]), row["clip"])
        eps = row["eps_x"] * x + row["eps_m"] * m + row["eps_0"] * x0
        return row["prev_x0"] * x0 + row["prev_eps"] * eps, x0


@per_target
@pytest.mark.parametrize("name", ["not clipped", "clipped", "re-derived"])
def test_huge_and_subnormal(target, name):
    row = edge_rows()[name]
    rng = np.random.default_rng(10)
    for dtype in FLOATS:
        info = torch.finfo(dtype)
        for size in (info.max / 2, info.tiny, info.tiny * info.eps * 8, info.smallest_normal / 3):
            x = (torch.from_numpy(rng.uniform(-1, 1, (2, 200))) * size).to(dtype)
            m = (torch.from_numpy(rng.uniform(-1, 1, (2, 200))) * size).to(dtype)
            expected = oracle.row_step(row, to_numpy(x), to_numpy(m))
            x0 = torch.full_like(x, math.nan)
            assert_near(
                target(x, m, StepCoefficients(**row), x0_out=x0), expected.x_prev, expected.terms, f"{dtype} {size}"
            )
            assert_near(x0, expected.x0, expected.x0_terms, f"x0 {dtype} {size}")


@per_target
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
def test_every_nan_stays_one(target, dtype):
    """Whatever its other bits: rounding must not carry them into the exponent."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    every = (every.to(torch.int32) * 65536 + 0xFFFF if dtype == torch.float32 else every).view(dtype)
    every = every[every.isnan()].unsqueeze(0)
    zero, row = torch.zeros_like(every), StepCoefficients(**edge_rows()["clipped"])
    assert target(every, zero, row).isnan().all()
    assert target(zero, every, row).isnan().all()
    threshold = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    assert target(zero, zero, row, thresholds=threshold).isnan().all()


@per_target
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_halves_round_like_the_definition(target, dtype):
    """Every finite half number comes back as it is, and what lies between two rounds to nearest even; too large is infinite."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    every = every[every.isfinite()].unsqueeze(0)
    copy = StepCoefficients(**row_of(x0_x=1.0, prev_x0=1.0))
    result = target(every, torch.zeros_like(every), copy)
    assert torch.equal(result, every)
    # A float32 factor moves each onto, or close to, the middle between two: x * (1 + 2^-k) is exact in float32 for these.
    digits = {torch.float16: 11, torch.bfloat16: 8}[dtype]
    for k in (1, digits - 1, digits, digits + 1):
        scale = row_of(x0_x=1.0 + 2.0**-k, prev_x0=1.0)
        exact = to_numpy(every) * (1 + 2.0**-k)
        result = target(every, torch.zeros_like(every), StepCoefficients(**scale))
        np.testing.assert_array_equal(to_numpy(result), tolerances.ROUND[dtype](exact).reshape(exact.shape))
    halved = target(every, torch.zeros_like(every), StepCoefficients(**row_of(x0_x=0.5, prev_x0=1.0)))
    np.testing.assert_array_equal(to_numpy(halved), tolerances.ROUND[dtype](to_numpy(every) / 2).reshape(exact.shape))


@per_simd
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
def test_nan_payload_does_not_become_infinity(target, dtype):
    """A NaN with only its lowest bit set, in both directions of the conversions."""
    x = torch.zeros(1, 40, dtype=dtype)
    lowest = {torch.float32: 0x7F800001, torch.float16: 0x7C01, torch.bfloat16: 0x7F81}[dtype]
    x.view(torch.int32 if dtype == torch.float32 else torch.int16)[0, ::3] = lowest
    m = torch.zeros_like(x)
    result = target(x, m, StepCoefficients(**row_of(x0_x=1.0, prev_x0=1.0)))
    assert torch.equal(result.isnan(), x.isnan())
    assert x.isnan().sum() == 14


@per_target
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
def test_nan_threshold_passes_through(target, dtype):
    """Also one whose every bit is set: rounding it to bfloat16 like a number would carry into the sign and give -0."""
    x = torch.ones(3, 37, dtype=dtype)
    thresholds = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x3F800000], dtype=torch.int32).view(torch.float32)
    result = target(x, x, StepCoefficients(**edge_rows()["clipped"]), thresholds=thresholds)
    assert result[:2].isnan().all()
    assert result[2].isfinite().all()


@per_target
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    exponents=st.tuples(*[st.floats(-149, 127)] * 2),
    size=st.sampled_from([1.0, 2.0**7, 2.0**20]),
    name=st.sampled_from(["clipped", "re-derived"]),
    dtype=st.sampled_from(FLOATS),
)
@example(exponents=(-149.0, -149.0), size=1.0, name="clipped", dtype=torch.float32)
@example(exponents=(-127.0, -120.0), size=2.0**7, name="clipped", dtype=torch.float32)
def test_every_positive_threshold_has_its_result(target, exponents, size, name, dtype):
    """Down to the least float32: clip / threshold, times a coefficient, times an element must not overflow to a NaN or
    the wrong bound. The elements make x0 exact in float32, 0 among them."""
    row = edge_rows()[name]
    row |= {"x0_x": row["x0_x"] * size, "x0_m": row["x0_m"] * size}
    thresholds = torch.tensor([2.0**e for e in exponents], dtype=torch.float32)
    grid = torch.cartesian_prod(*[torch.arange(-8.0, 9.0)] * 2).to(dtype)
    x, m = (column.repeat(2, 1) for column in grid.T)
    x0 = torch.empty_like(x)
    got = target(x, m, StepCoefficients(**row), thresholds=thresholds, x0_out=x0)
    expected = oracle.row_step(row, to_numpy(x), to_numpy(m), thresholds=to_numpy(thresholds))
    assert_near(got, expected.x_prev, expected.terms, f"x_prev {thresholds}")
    assert_near(x0, expected.x0, expected.x0_terms, f"x0 {thresholds}")


# --- Equal bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(len(INSTRUCTION_SETS) < 2, reason="one instruction set on this machine: nothing to compare with")
def test_instruction_sets_agree_to_the_bit():
    @settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
    @given(cases(PAIRS))
    def run(case):
        results = []
        for isa in INSTRUCTION_SETS:
            keywords = dict(case.keywords)
            for name in keywords.keys() & set(OUTPUTS):
                old = keywords[name]
                keywords[name] = (
                    old.clone() if name.startswith("history") else torch.full(old.shape, math.nan, dtype=old.dtype)
                )
            result = Target("cpu", isa)(case.x_t, case.model_output, StepCoefficients(**case.row), **keywords)
            results.append((result, *(keywords.get(name) for name in OUTPUTS[1:])))
        for written in results[1:]:
            for tensor, first in zip(written, results[0], strict=True):
                assert tensor is None or same_bits(tensor, first)

    run()


@pytest.mark.skipif(len(INSTRUCTION_SETS) < 2, reason="one instruction set on this machine: nothing to compare with")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_instruction_sets_round_alike(dtype):
    """Sums of a half number and a tiny float32 reach every kind of rounding, NaN and infinity included."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).unsqueeze(0)
    rng = np.random.default_rng(11)
    m = normal(rng, every.shape, dtype)
    for fold_x, fold_m in [(1.0, 0.0), (1.0 + 2.0**-12, 2.0**-14), (0.3, 1e-6), (1e-3, 0.0), (37.0, 1.0)]:
        row = StepCoefficients(**row_of(x0_x=fold_x, x0_m=fold_m, prev_x0=1.0))
        results = [Target("cpu", isa)(every, m, row) for isa in INSTRUCTION_SETS]
        for result in results[1:]:
            assert torch.equal(result.isnan(), results[0].isnan())
            assert torch.equal(bits(result.nan_to_num(nan=7.0)), bits(results[0].nan_to_num(nan=7.0)))


@per_simd
@pytest.mark.parametrize("kind", ["given", "seeds", "thresholds"])
def test_threads_do_not_change_bits(target, kind, threads):
    rng = np.random.default_rng(12)
    row = StepCoefficients(**oracle.textbook_row("epsilon", 0.3, 0.4, eta=0.7, clip=1.0))
    for shape in [(1, 100_003), (3, 40_001), (7, 10_007), (70_001, 3), (2, 3, 150, 150)]:
        x, m, z = (normal(rng, shape) for _ in range(3))
        seeds = torch.from_numpy(rng.integers(-(2**63), 2**63, shape[0]))
        keywords = {"noise": z} if kind == "given" else {"seeds": seeds}
        if kind == "thresholds":
            keywords["thresholds"] = torch.from_numpy(rng.uniform(0.5, 3, shape[0])).float()
        results = []
        for count in (1, 2, 3, 5):
            threads(count)
            out = torch.full_like(x, math.nan)
            target(x, m, row, out=out, **keywords)
            results.append(out)
            assert same_bits(out, results[0]), f"{shape} with {count} threads"
            in_place = x.clone()
            target(in_place, m, row, out=in_place, **keywords)
            assert same_bits(in_place, results[0]), f"{shape} with {count} threads, in place"
        assert results[0].isfinite().all()


@per_simd
def test_threads_do_not_change_what_a_step_keeps(target, threads):
    rng = np.random.default_rng(17)
    row = StepCoefficients(
        **oracle.textbook_row("epsilon", 0.3, 0.4, eta=0.7, clip=1.0)
        | {"prev_history": -0.5, "prev_history_2": 0.25, "input_scale": 0.7}
    )
    for shape in [(1, 100_003), (3, 40_001), (70_001, 3)]:
        x, m, last, last_2 = (normal(rng, shape) for _ in range(4))
        seeds = torch.from_numpy(rng.integers(-(2**63), 2**63, shape[0]))
        results = []
        for count in (1, 2, 3, 5):
            threads(count)
            kept = [last.clone(), last_2.clone(), torch.full(shape, math.nan, dtype=torch.bfloat16)]
            keywords = dict(zip(("history", "history_2", "model_input_out"), kept, strict=True))
            results.append([target(x, m, row, seeds=seeds, **keywords), *kept])
            for tensor, first in zip(results[-1], results[0], strict=True):
                assert same_bits(tensor, first), f"{shape} with {count} threads"
        assert results[0][0].isfinite().all()


@per_target
def test_batch_split_does_not_change_bits(target):
    rng = np.random.default_rng(13)
    row = StepCoefficients(**oracle.textbook_row("v_prediction", 0.3, 0.4, eta=0.7, clip=1.0))
    x, m = normal(rng, (6, 3, 11, 13)), normal(rng, (6, 3, 11, 13))
    seeds, s = torch.from_numpy(rng.integers(-(2**63), 2**63, 6)), torch.linspace(1, 3, 6)
    together = target(x, m, row, seeds=seeds, thresholds=s, noise_step=9)
    for parts in ([1] * 6, [2, 4], [5, 1]):
        split = [
            target(a, b, row, seeds=c, thresholds=d, noise_step=9)
            for a, b, c, d in zip(x.split(parts), m.split(parts), seeds.split(parts), s.split(parts), strict=True)
        ]
        assert same_bits(torch.cat(split), together)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert same_bits(
        target(x[order], m[order], row, seeds=seeds[order], thresholds=s[order], noise_step=9), together[order]
    )


@per_simd
def test_in_registers_is_the_noise_standard(target):
    """x_prev = z where everything else is zero: bit-equal to NumPy."""
    x = torch.zeros(3, 2999)
    seeds = torch.tensor([0, -1, 2**62])
    row = StepCoefficients(**row_of(prev_noise=1.0))
    for step, stream in [(0, 0), (5, 1), (2**32 - 1, 2**32 - 1)]:
        z = torch.from_numpy(z_of(seeds, x.shape, step, stream))
        assert same_bits(target(x, x, row, seeds=seeds, noise_step=step, noise_stream=stream), z)


# --- Nearer to float64 than diffusers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("clip_sample", [False, True], ids=["", "clip"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
def test_nearer_to_float64_than_diffusers(prediction_type, clip_sample, eta, dtype):
    from diffusers.schedulers import scheduling_ddim  # a test dependency: missing, it is a failure and no skip

    scheduler = scheduling_ddim.DDIMScheduler(
        prediction_type=prediction_type, clip_sample=clip_sample, timestep_spacing="leading", set_alpha_to_one=True
    )
    scheduler.set_timesteps(50)
    table = scheduler.alphas_cumprod.to(torch.float64).tolist()
    rng = np.random.default_rng(14)
    errors = {target: [] for target in (*TARGETS, "diffusers")}
    for t in [*scheduler.timesteps.tolist()[::3], 1, 0]:
        ab_t, ab_prev = table[t], table[t - 20] if t >= 20 else 1.0
        clean, eps = rng.uniform(-1, 1, (2, 2000)), rng.standard_normal((2, 2000))
        x = torch.from_numpy(math.sqrt(ab_t) * clean + math.sqrt(1 - ab_t) * eps).to(dtype)
        m = {"epsilon": eps, "sample": clean, "v_prediction": math.sqrt(ab_t) * eps - math.sqrt(1 - ab_t) * clean}[
            prediction_type
        ]
        m = torch.from_numpy(m + 0.05 * rng.standard_normal(m.shape)).to(dtype)
        z = normal(rng, x.shape, dtype)
        clip = 1.0 if clip_sample else math.inf
        exact, _ = oracle.textbook_step(
            prediction_type, to_numpy(x), to_numpy(m), ab_t, ab_prev, eta=eta, noise=to_numpy(z), clip=clip
        )
        row = oracle.textbook_row(prediction_type, ab_t, ab_prev, eta=eta, clip=clip)
        terms = oracle.row_step(row, to_numpy(x), to_numpy(m), noise=to_numpy(z)).terms
        for target, found in errors.items():
            if target == "diffusers":
                got = scheduler.step(m, t, x, eta=eta, variance_noise=z).prev_sample
            else:
                got = target(x, m, StepCoefficients(**row), noise=z)
            assert got.dtype == dtype
            found.append((to_numpy(got) - exact) / terms)
    theirs = np.concatenate(errors.pop("diffusers"))
    for target, found in errors.items():
        ours = np.concatenate(found)
        # The reference computes a clipped step column by column, as the formula stands: in float32 that is about as exact as diffusers.
        slack = 1.4 if target.backend == "reference" and clip_sample and dtype == torch.float32 else 1.0
        assert np.abs(ours).max() < slack * np.abs(theirs).max(), str(target)
        assert np.sqrt(np.mean(ours**2)) < slack * np.sqrt(np.mean(theirs**2)), str(target)


def test_the_checks_can_fail():
    """A kernel wrong by one part in a million, or by a wrong rounding, is found by the comparison used above."""
    rng = np.random.default_rng(15)
    row = oracle.textbook_row("epsilon", 0.5, 0.6)
    for state in FLOATS:
        x, m = normal(rng, (2, 500), state), normal(rng, (2, 500), state)
        expected = oracle.row_step(row, to_numpy(x), to_numpy(m))
        right = ddim_step(x, m, StepCoefficients(**row))
        wrong = ddim_step(
            x, m, StepCoefficients(**replace_column(row, "x0_x", 1 + (1e-6 if state == torch.float32 else 1e-3)))
        )
        assert_near(right, expected.x_prev, expected.terms)
        with pytest.raises(AssertionError, match="too far from float64"):
            assert_near(wrong, expected.x_prev, expected.terms)
        one_off = right.clone()
        i = torch.nonzero(one_off[0] > 0.5)[0]
        bits_of = one_off.view(torch.int32 if state == torch.float32 else torch.int16)
        bits_of[0, i] += 1 if state != torch.float32 else 64
        with pytest.raises(AssertionError, match="1 of 1000 elements too far"):
            assert_near(one_off, expected.x_prev, expected.terms)
        missing = right.clone()
        missing[1, 7] = math.nan
        with pytest.raises(AssertionError, match="1 of 1000 elements too far"):
            assert_near(missing, expected.x_prev, expected.terms)


def replace_column(row, name, factor):
    return row | {name: row[name] * factor}
