"""A module's calls as replays: eager's bits, a graph a signature, nothing stale."""

import copy

import pytest
import torch
from graph_models import SWITCHES, Adapted, Base
from graphed import RETURNS, SHAPE, Net, cache_of, check, graphed, same, x_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

import ddim_fast as df
from ddim_fast.sampling.cuda_graphs import CaptureError
from ddim_fast.sampling.static_tensors import fill, static_like

# --- eager's bits, a graph a signature --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("returns", RETURNS)
def test_what_is_returned_has_eagers_structure_layout_and_bits_in_memory_of_its_own(returns):
    module = Net()
    forward = graphed(module)
    kept = []
    for seed in range(3):
        expected = check(module, x_of(seed), returns=returns, graphs=1)
        with torch.no_grad():
            kept.append((module(x_of(seed), returns=returns), copy.deepcopy(expected)))
    for got, expected in kept:
        same(got, expected)
    assert (forward.stats().hits, forward.stats().misses) == (5, 1)


def test_a_tensor_that_is_returned_twice_is_one():
    module = Net()
    graphed(module)
    with torch.no_grad():
        (first, (second, _)) = module(x_of(), returns="nested")["out"]
    assert first is second


CALLS = {
    "shape": ((x_of(),), {}),
    "batch": ((x_of(0, (3, 3, 8, 8)),), {}),
    "dtype of another": ((x_of(), torch.tensor([1, 2])), {}),
    "dtype": ((x_of(), torch.tensor([1.0, 2.0])), {}),
    "by keyword": ((), {"x": x_of(), "t": torch.tensor([1.0, 2.0])}),
    "layout": ((x_of().to(memory_format=torch.channels_last),), {}),
    "a view": ((x_of(0, (2, 6, 8, 8))[:, ::2],), {}),
    "expanded": ((x_of(0, (1, 3, 8, 8)).expand(SHAPE),), {}),
    "a tuple": ((x_of(),), {"more": (x_of(1), x_of(2))}),
    "a longer tuple": ((x_of(),), {"more": (x_of(1), x_of(2), x_of(3))}),
    "a list": ((x_of(),), {"more": [x_of(1), x_of(2)]}),
    "a dictionary": ((x_of(),), {"added": {"embeds": {"text": x_of(3)}, "ids": [torch.tensor(3)]}}),
    "an int": ((x_of(),), {"scale": 1}),
    "a float": ((x_of(),), {"scale": 1.0}),
    "another number": ((x_of(),), {"scale": 2.0}),
    "true": ((x_of(),), {"flag": True}),
    "false": ((x_of(),), {"flag": False}),
    "one": ((x_of(),), {"flag": 1}),
    "text": ((x_of(),), {"returns": "tuple"}),
    "nothing": ((torch.empty(0, 3, 8, 8),), {}),
}


def test_each_signature_has_one_graph_and_every_value_is_followed():
    module = Net()
    graphed(module, cache_of(maxsize=len(CALLS)))
    for _ in range(2):
        for args, kwargs in CALLS.values():
            check(module, *args, **kwargs)
    assert module.forward.stats().graphs == len(CALLS)
    assert module.forward.stats().misses == len(CALLS)
    for args, kwargs in CALLS.values():  # new values
        args = [arg * 2 for arg in args]
        kwargs = {name: value * 2 if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}
        check(module, *args, **kwargs)
    assert module.forward.stats().misses == len(CALLS)


class Attends(nn.Module):
    """Self-attention where its arguments are one, as ``nn.MultiheadAttention`` asks."""

    def forward(self, x, context, more=()):
        return {"own": x @ x.mT, "first": more[0] is more[-1] if more else None} if context is x else x + context


@pytest.mark.parametrize("order", [0, 1])
def test_arguments_that_are_one_tensor_are_one_for_the_module_too(order):
    module = Attends()
    graphed(module)
    for seed in range(2):
        x, other = x_of(seed), x_of(seed)
        calls = [(x, x), (x, other), (x, x, [other, other]), (x, x, [other, x_of(9)]), (x, x, [x, x])]
        for call in calls[:: -1 if order else 1]:
            check(module, *call)
    assert (module.forward.stats().graphs, module.forward.stats().misses) == (5, 5)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    graphed(attention)
    x = x_of(0, (2, 5, 8))
    for call in ((x, x.clone(), x.clone()), (x, x, x)):
        check(attention, *call)


@settings(max_examples=25)
@given(
    st.lists(st.sampled_from([0, 1, 2, 3, 127, 128, 129]), min_size=1, max_size=3),
    st.permutations([0, 1, 2]),
    st.sampled_from([slice(None), slice(None, None, 2), slice(1, None)]),
    st.booleans(),
)
def test_a_static_tensor_has_the_layout_and_the_values(sizes, order, part, expands):
    tensor = torch.arange(max(1, torch.Size(sizes).numel()), dtype=torch.float32)[: torch.Size(sizes).numel()].view(
        sizes
    )
    tensor = tensor.permute([i for i in order if i < len(sizes)])[part]
    if expands:
        tensor = tensor[None].expand(3, *tensor.shape)
    static = static_like(tensor)
    fill(static, tensor)
    same(static, tensor)
    assert static.data_ptr() != tensor.data_ptr() or tensor.numel() == 0


def test_what_is_expanded_to_nothing_is_nothing():
    tensor = torch.ones(1).expand(0)
    static = static_like(tensor)
    fill(static, tensor)
    same(static, tensor)


def test_where_elements_share_memory_otherwise_a_static_tensor_is_dense():
    tensor = torch.arange(5.0).as_strided((3, 3), (1, 1))
    static = static_like(tensor)
    fill(static, tensor)
    assert torch.equal(static, tensor)
    assert static.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    module = Net().to(dtype)
    graphed(module)
    for seed in range(2):
        check(module, x_of(seed, dtype=dtype), graphs=1)


def test_extreme_values_are_followed():
    module = Net()
    graphed(module)
    for value in (0.0, -0.0, 1e38, -1e38, 1e-40):
        check(module, torch.full(SHAPE, value), graphs=1)
    for value in (float("inf"), float("nan")):
        with torch.no_grad():
            assert (
                module(torch.full(SHAPE, value)).isnan().any()
                == module.forward.eager(torch.full(SHAPE, value)).isnan().any()
            )


# --- nothing is stale ---------------------------------------------------------------------------------------------------------------


CHANGES = {
    "a value in place": (lambda m: m.conv.weight.data.mul_(2), 1),
    "weights elsewhere": (lambda m: setattr(m.conv, "weight", nn.Parameter(m.conv.weight.detach() * 2)), 2),
    "a dtype": (lambda m: m.double(), 2, torch.float64),
    "an attribute": (lambda m: setattr(m, "gain_of", 2.0), 2),
    "a hook": (lambda m: m.conv.register_forward_hook(lambda module, args, output: 2 * output), 2),
    "the mode": (lambda m: m.train(not m.training), 2),
    "a class": (lambda m: setattr(type(m), "of_class", 3.0), 2),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_module_is_seen_between_calls(name):
    class Changed(Net):
        of_class, gain_of = 1.0, 1.0

        def forward(self, x, **more):
            return super().forward(x, **more) * self.gain_of * self.of_class

    module = Changed()
    forward = graphed(module)
    check(module, x_of(), graphs=1)
    change, graphs, *dtype = CHANGES[name]
    change(module)
    options = {"dtype": dtype[0]} if dtype else {}
    for seed in range(2):
        check(module, x_of(seed, **options), graphs=graphs)
    forward.clear()
    assert forward.stats().graphs == 0
    check(module, x_of(**options), graphs=1)


@pytest.mark.parametrize("name", SWITCHES)
def test_outputs_are_those_of_the_adapter_that_is_on(name):
    module = Net()
    module.conv = Adapted(module.conv)
    graphed(module)
    before = check(module, x_of(), graphs=1)
    SWITCHES[name](module.conv)
    for _ in range(2):
        assert not torch.equal(check(module, x_of(), graphs=2), before)


SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "another autocast": lambda: torch.autocast("cpu", torch.float16),
    "attention": lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_around_a_call_have_graphs_of_their_own(name):
    """Autocast frees its copies of weights when it ends: a graph has its own."""
    module = Net()
    graphed(module)
    for _ in range(3):
        check(module, x_of(), graphs=None)
        with SETTINGS[name]():
            check(module, x_of())
            check(module, x_of(1))
    assert module.forward.stats().graphs == 2
    assert module.forward.stats().misses == 2
    assert torch.is_autocast_cache_enabled()


CUDA = torch.backends.cuda
SWITCHED = {
    "matmul.fp32_precision": ("tf32", "ieee"),
    "matmul.allow_fp16_reduced_precision_reduction": (False, True),
    "matmul.allow_bf16_reduced_precision_reduction": (False, True),
    "matmul.allow_fp16_accumulation": (True, False),
    "cudnn.enabled": (False, True),
    "cudnn.benchmark": (True, False),
    "cudnn.deterministic": (True, False),
    "cudnn.conv.fp32_precision": ("ieee", "tf32"),
    "flash": (CUDA.enable_flash_sdp, CUDA.flash_sdp_enabled),
    "memory-efficient": (CUDA.enable_mem_efficient_sdp, CUDA.mem_efficient_sdp_enabled),
    "math": (CUDA.enable_math_sdp, CUDA.math_sdp_enabled),
    "cudnn's attention": (CUDA.enable_cudnn_sdp, CUDA.cudnn_sdp_enabled),
    "reductions of attention": (CUDA.allow_fp16_bf16_reduction_math_sdp, CUDA.fp16_bf16_reduction_math_sdp_allowed),
    "deterministic": (torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled),
}


def switch_of(name):
    """Return what switches a setting: to another value, or back."""
    one, other = SWITCHED[name]
    if callable(one):
        before = other()
        return lambda to: one(to != before)
    *path, attribute = name.split(".")
    owner = torch.backends if path[0] == "cudnn" else CUDA
    for part in path:
        owner = getattr(owner, part)
    before = getattr(owner, attribute)
    return lambda to: setattr(owner, attribute, (one if before != one else other) if to else before)


@pytest.mark.parametrize("name", SWITCHED)
def test_settings_that_choose_kernels_have_graphs_of_their_own(name):
    module, switch = Net(), switch_of(name)
    forward = graphed(module)
    try:
        for to in (False, True, False, True):
            switch(to)
            check(module, x_of())
    finally:
        switch(False)
    assert (forward.stats().graphs, forward.stats().hits) == (2, 2)


def test_the_order_of_attention_kernels_has_graphs_of_its_own():
    module, backends = Net(), [torch.nn.attention.SDPBackend.MATH, torch.nn.attention.SDPBackend.FLASH_ATTENTION]
    forward = graphed(module)
    for order in (backends, backends[::-1], backends):
        with torch.nn.attention.sdpa_kernel(order, set_priority=True):
            check(module, x_of())
    assert (forward.stats().graphs, forward.stats().hits) == (2, 1)


def test_hooks_of_all_modules_are_part_of_the_state():
    module = Net()
    forward = graphed(module, vouched=True)
    before, factor = check(module, x_of(), graphs=1), 2
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * factor if isinstance(module, nn.Conv2d) else None
    )
    try:
        assert not torch.equal(check(module, x_of(), graphs=2), before)
        strict = graphed(Net(), strict=True)
        with (
            torch.no_grad(),
            pytest.raises(CaptureError, match=r"all modules' hooks\.\d+ holds the function .*closes over"),
        ):
            strict.module(x_of())
    finally:
        hook.remove()
    assert torch.equal(check(module, x_of(), graphs=2), before)
    assert forward.stats().hits == 1


def test_attributes_of_a_weight_are_part_of_the_state():
    class Scaled(Net):
        def forward(self, x):
            return super().forward(x) * getattr(self.conv.weight, "scale", 1.0)

    module = Scaled()
    graphed(module)
    for n, scale in enumerate((2.0, 3.0), 2):
        check(module, x_of(), graphs=n - 1)
        module.conv.weight.scale = scale
        check(module, x_of(), graphs=n)
    del module.conv.weight.scale
    check(module, x_of(), graphs=3)


class Doubles(nn.Module):
    def forward(self, weight):
        return weight * 2


def test_weights_that_are_computed_once_for_several_calls_are_not_baked_in():
    module = Net()
    parametrize.register_parametrization(module.conv, "weight", Doubles())
    forward = graphed(module)
    with torch.no_grad(), parametrize.cached(), pytest.warns(UserWarning, match=r"parametrize.cached\(\), which frees"):
        module(x_of())
    check(module, x_of(), graphs=1)
    with torch.no_grad(), parametrize.cached():
        same(module(x_of(1)), forward.eager(x_of(1)))
    check(module, x_of(1), graphs=1)
    s = df.DDIMSampler(df.NoiseSchedule.linear(), 3, graphs=cache_of())
    with parametrize.cached(), pytest.raises(CaptureError, match="a captured step computes its weights itself"):
        s.sample(Base(), SHAPE, seed=0, capture="step")


@pytest.mark.parametrize("mode", ["step", "loop"])
def test_a_captured_loop_survives_the_end_of_autocast_too(mode):
    s, model = df.DDIMSampler(df.NoiseSchedule.linear(), 3, graphs=cache_of()), Base()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            expected = s.sample(model, SHAPE, seed=0, capture="off")
            assert torch.equal(s.sample(model, SHAPE, seed=0, capture=mode), expected)
    assert s.graphs.stats().misses == 1


def test_inside_and_outside_of_inference_mode():
    module = Net()
    graphed(module)
    for inside in (True, False, True):
        with torch.inference_mode(inside):
            got = module(x_of()) if inside else check(module, x_of())
        assert got.is_inference() == inside
        check(module, x_of(), graphs=1)


def test_nothing_global_changes():
    module = Net()
    graphed(module)
    torch.manual_seed(5)
    before = (
        torch.get_rng_state(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.is_autocast_cache_enabled(),
    )
    with torch.no_grad():
        module(x_of())
        module(x_of())
    after = torch.get_rng_state(), torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_autocast_cache_enabled()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
