"""The step as torch operators: one node in what torch.compile, make_fx and torch.export see, with the bits of a direct call."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import ddim_fast as df
from ddim_fast.kernels.dispatch import ddim_step, ddim_step_from_table
from ddim_fast.kernels.fields import StepInputs
from ddim_fast.kernels.operators import arguments_of

# torch's own, when inductor is first used
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore::DeprecationWarning:torch.*")
PLAN = df.SamplingPlan(df.NoiseSchedule.linear(), (900, 500, 100), eta=1.0)
ROW = PLAN.steps[0].coefficients
OURS = ("ddim_fast.step_", "ddim_fast.step_from_table_")


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def m():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


SEEDS = torch.tensor([1, -2])


def ours(graph):
    return [str(node.target) for node in graph.nodes if node.op == "call_function" and "ddim_fast" in str(node.target)]


def test_make_fx_sees_one_operator(x, m):
    traced = make_fx(lambda x, m: ddim_step(x, m, ROW, seeds=SEEDS))(x, m)
    assert ours(traced.graph) == ["ddim_fast.step_.default"]
    assert len([n for n in traced.graph.nodes if n.op == "call_function"]) == 2  # and memory for the result
    for other in (x, 2 * x):
        assert torch.equal(traced(other, m), ddim_step(other, m, ROW, seeds=SEEDS))


def test_torch_compile_sees_no_break_and_gives_the_same_bits(x, m):
    compiled = torch.compile(lambda x, m: ddim_step(x * 1, m, ROW, seeds=SEEDS) + 1, fullgraph=True)
    with torch.inference_mode():
        assert torch.equal(compiled(x, m), ddim_step(x, m, ROW, seeds=SEEDS) + 1)


def test_in_place_under_torch_compile(x, m):
    def function(x, m):
        ddim_step(x, m, ROW, seeds=SEEDS, out=x)
        return 2 * x

    expected = ddim_step(x, m, ROW, seeds=SEEDS)
    assert torch.equal(torch.compile(function, fullgraph=True)(x, m), 2 * expected)
    assert torch.equal(x, expected)


def test_outputs_that_are_written_are_seen_by_what_follows(x, m):
    def function(x, m, out, x0):
        before = out + 0
        ddim_step(x, m, ROW, seeds=SEEDS, out=out, x0_out=x0)
        return before, out + 1, x0 + 2

    out, x0 = torch.zeros_like(x), torch.zeros_like(x)
    got = torch.compile(function, fullgraph=True)(x, m, out, x0)
    expected_x0 = torch.empty_like(x)
    expected = ddim_step(x, m, ROW, seeds=SEEDS, x0_out=expected_x0)
    assert torch.equal(got[0], torch.zeros_like(x))
    assert torch.equal(got[1], expected + 1)
    assert torch.equal(got[2], expected_x0 + 2)
    assert torch.equal(out, expected)
    assert torch.equal(x0, expected_x0)


def test_a_loop_over_a_table_is_compiled_once_for_all_steps(x, m):
    table, index = PLAN.table(), torch.zeros(1, dtype=torch.int64)
    compilations = []

    def count(graph, inputs):
        compilations.append(graph)
        return graph

    def step(x, m, index):
        ddim_step_from_table(x, m, table, index, seeds=SEEDS, out=x)
        index.add_(1)
        return x

    compiled, expected = torch.compile(step, fullgraph=True, backend=count), x.clone()
    for planned in PLAN.steps:
        compiled(x, m, index)
        seeds = SEEDS if planned.std_dev_t else None
        ddim_step(expected, m, planned.coefficients, seeds=seeds, noise_step=planned.index, out=expected)
        assert torch.equal(x, expected)
    assert len(compilations) == 1
    assert ours(compilations[0].graph) == ["ddim_fast.step_from_table_"]


def test_torch_export_sees_one_operator(x, m):
    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            table = PLAN.table()
            self.register_buffer("rows", table.rows)
            self.kind = (table.clipped, table.adds_noise, table.adds_known_noise, table.guided)

        def forward(self, x, m, index):
            return ddim_step_from_table(x, m, df.StepTable(self.rows, *self.kind), index, seeds=SEEDS)

    program = torch.export.export(Step(), (x, m, torch.zeros(1, dtype=torch.int64)))
    assert ours(program.graph) == ["ddim_fast.step_from_table_.default"]
    for step in PLAN.steps:
        got = program.module()(x, m, torch.tensor([step.index]))
        seeds = SEEDS if step.std_dev_t else None
        assert torch.equal(got, ddim_step(x, m, step.coefficients, seeds=seeds, noise_step=step.index))


def check_operator(name, inputs, x_prev):
    torch.library.opcheck(getattr(torch.ops.ddim_fast, name).default, (), arguments_of(inputs, x_prev))


def test_operators_keep_what_they_declare(x, m):
    new, options = torch.empty_like(x), {"seeds": SEEDS, "noise_step": 3}
    check_operator("step_", StepInputs(x, m, ROW, **options), new)
    in_place = x.clone()
    check_operator("step_", StepInputs(in_place, m, ROW, x0=torch.empty_like(x), **options), in_place)
    check_operator("step_from_table_", StepInputs(x, m, PLAN.table(), torch.tensor([1]), **options), new)


def test_fake_tensors_pass(x, m):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
        assert ddim_step(fake, mode.from_tensor(m), ROW, seeds=mode.from_tensor(SEEDS)).shape == x.shape


def test_every_option_travels_through_the_operator(x, m):
    row = df.SamplingPlan(df.NoiseSchedule.linear(), (900, 500), eta=1.0, clip_sample_range=1.0).steps[0].coefficients
    options = dict(
        model_output_uncond=m.flip(0), guidance_scale=2.5, seeds=SEEDS, noise_step=5, noise_stream=1,
        thresholds=torch.tensor([1.5, 0.75]), mask=torch.rand_like(x), known_x0=x.flip(0),
    )  # fmt: skip
    expected_x0, x0 = torch.empty_like(x), torch.empty_like(x)
    expected = ddim_step(x, m, row, x0_out=expected_x0, **options)
    got = torch.compile(lambda: ddim_step(x, m, row, x0_out=x0, **options), fullgraph=True, backend="eager")()
    assert torch.equal(got, expected)
    assert torch.equal(x0, expected_x0)
    noises = dict(noise=m.flip(1), known_noise=x.flip(1), mask=torch.rand_like(x), known_x0=x.flip(0))
    expected = ddim_step(x, m, row, **noises)
    got = torch.compile(lambda: ddim_step(x, m, row, **noises), fullgraph=True, backend="eager")()
    assert torch.equal(got, expected)


def test_known_noise_travels_through_the_table_operator(x, m):
    table, index = PLAN.table("cpu", 2.0), torch.tensor([1])
    options = dict(
        model_output_uncond=m.flip(0), noise=m.flip(1), known_noise=x.flip(1), mask=torch.rand_like(x), known_x0=x.flip(0)
    )  # fmt: skip
    x0, expected_x0 = torch.empty_like(x), torch.empty_like(x)
    expected = ddim_step_from_table(x, m, table, index, x0_out=expected_x0, **options)
    function = torch.compile(
        lambda: ddim_step_from_table(x, m, table, index, x0_out=x0, **options), backend="eager", fullgraph=True
    )
    assert torch.equal(function(), expected)
    assert torch.equal(x0, expected_x0)


def test_a_history_travels_through_both_operators(x, m):
    steps = df.SamplingPlan(df.NoiseSchedule.linear(), (900, 500, 100), order=2).steps
    table, index = df.StepTable.of([step.coefficients for step in steps]), torch.tensor([1])
    row, last_x0 = steps[1].coefficients, x.flip(0).contiguous()
    history, expected_history = last_x0.clone(), last_x0.clone()
    expected = ddim_step(x, m, row, history=expected_history)
    for step in (
        lambda history: ddim_step(x, m, row, history=history),
        lambda history: ddim_step_from_table(x, m, table, index, history=history),
    ):
        history = last_x0.clone()
        compiled = torch.compile(
            lambda history, step=step: (step(history), history + 1), backend="eager", fullgraph=True
        )
        got, after = compiled(history)
        assert torch.equal(got, expected)
        assert torch.equal(history, expected_history)
        assert torch.equal(after, expected_history + 1)
    check_operator("step_", StepInputs(x, m, row, history=last_x0.clone()), torch.empty_like(x))


def test_what_a_step_keeps_travels_through_both_operators(x, m):
    row = df.StepCoefficients(1.1, -0.3, 0, 1, 0, 0.5, 0.5, 0.1, prev_history=-0.3, prev_history_2=0.2, input_scale=0.7)
    table, index = df.StepTable.of([row]), torch.tensor([0])

    def outputs():
        return [x.flip(0).contiguous(), x.roll(1, 0).contiguous(), torch.zeros_like(x, dtype=torch.bfloat16)]

    def step_by_row(*kept):
        return ddim_step(x, m, row, seeds=SEEDS, **dict(zip(NAMES, kept, strict=True)))

    def step_by_table(*kept):
        return ddim_step_from_table(x, m, table, index, seeds=SEEDS, **dict(zip(NAMES, kept, strict=True)))

    NAMES = ("history", "history_2", "model_input_out")
    expected_outputs = outputs()
    expected = step_by_row(*expected_outputs)
    for step in (step_by_row, step_by_table):
        kept = outputs()
        compiled = torch.compile(
            lambda *kept, step=step: (step(*kept), [tensor + 1 for tensor in kept]), backend="eager", fullgraph=True
        )
        got, after = compiled(*kept)
        assert torch.equal(got, expected)
        for tensor, plus_one, wanted in zip(kept, after, expected_outputs, strict=True):
            assert torch.equal(tensor, wanted)
            assert torch.equal(plus_one, wanted + 1)
    inputs = StepInputs(x, m, row, seeds=SEEDS, **dict(zip(NAMES, outputs(), strict=True)))
    check_operator("step_", inputs, torch.empty_like(x))


def test_a_traced_table_says_that_it_has_no_derivatives(x, m):
    with pytest.raises(ValueError, match="has no derivatives where it is traced"):
        make_fx(lambda x: ddim_step_from_table(x, m, PLAN.table(), torch.tensor([2])))(x.requires_grad_())


def test_gradients_go_through_the_reference_where_they_are_wanted(x, m):
    x.requires_grad_()
    row = PLAN.steps[-1].coefficients

    def loss(x):
        return ddim_step(x, m, row).square().sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    traced = make_fx(loss)(x)
    assert ours(traced.graph) == []
    (got,) = torch.autograd.grad(traced(x), x)
    torch.testing.assert_close(got, expected)
