"""The fake CUDA device: every rule of a captured step is seen to fire, honest steps pass, and what they launch is counted."""

import contextlib
import gc
import linecache
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import ddim_fast
from ddim_fast import gpu_lab
from ddim_fast.gpu_lab.fake_cuda import SAMPLER, FakeGraphs, NotCapturable, Steady, fake_cuda
from ddim_fast.kernels.contract import StepTable
from ddim_fast.kernels.dispatch import ddim_step, ddim_step_from_table
from ddim_fast.models.unet import SmallUNet
from ddim_fast.sampling.cuda_graphs import CaptureError


@pytest.fixture
def device():
    with fake_cuda() as fake:
        yield fake


@pytest.fixture
def x(device):
    return torch.empty(2, 4, 8, 8, device="cuda")


def host(*shape):
    return torch.zeros(shape)


# --- What is refused --------------------------------------------------------------------------------------------------

WAITS = {
    "item": (lambda x: x.sum().item(), "_local_scalar_dense"),
    "int": (lambda x: int(x[0, 0, 0, 0]), "_local_scalar_dense"),
    "tolist": (lambda x: x.tolist(), "_local_scalar_dense"),
    "an if": (lambda x: 1 if x.sum() > 0 else 2, "_local_scalar_dense"),
    "in": (lambda x: 1.0 in x, "_local_scalar_dense"),
    "repr": (repr, "Tensor.__repr__"),
    "format": (lambda x: f"{x.sum()}", "Tensor.__format__"),
    "numpy": (lambda x: x.numpy(), "Tensor.numpy"),
    "equal": (lambda x: torch.equal(x, x), "aten::equal"),
    "allclose": (lambda x: torch.allclose(x, x), "aten::allclose"),
    "nonzero": (lambda x: x.nonzero(), "aten::nonzero"),
    "argwhere": (lambda x: torch.argwhere(x), "nonzero"),
    "one-argument where": (lambda x: torch.where(x > 0), "nonzero"),
    "a mask as index": (lambda x: x[x > 0], "aten::index.Tensor"),
    "a byte mask as index": (lambda x: torch.ops.aten.index(x, [x[:, 0, 0, 0].byte()]), "aten::index.Tensor"),
    "assignment by a mask": (lambda x: x.__setitem__(x > 0, x.sum()), "aten::index_put_"),
    "assignment by two masks": (
        lambda x: x.__setitem__((x[:, 0, 0, 0] > 0, x[0, :, 0, 0] > 0), 2.0),
        "aten::index_put_",
    ),
    "masked_select": (lambda x: x.masked_select(x > 0), "aten::masked_select"),
    "unique": (lambda x: x.unique(), "aten::_unique2"),
    "unique_consecutive": (lambda x: x.unique_consecutive(), "aten::unique_consecutive"),
    "bincount": (lambda x: x.long().flatten().bincount(), "aten::bincount"),
    "repeat_interleave": (lambda x: x.repeat_interleave(x[:, 0, 0, 0].long(), dim=0), "repeat_interleave"),
    "one_hot without classes": (lambda x: nn.functional.one_hot(x.long()), "_local_scalar_dense"),
    "histc": (lambda x: x.histc(), "aten::histc"),
    "multinomial": (lambda x: x[0, 0].multinomial(1), "aten::multinomial"),
    "an inverse": (lambda x: torch.linalg.inv(x), "_linalg_check_errors"),
    "synchronize": (lambda x: torch.cuda.synchronize(), "torch.cuda.synchronize"),
    "accelerator.synchronize": (lambda x: torch.accelerator.synchronize(), "synchronize"),
    "a stream": (lambda x: torch.cuda.current_stream().synchronize(), "torch.cuda.Stream.synchronize"),
    "a stream's query": (lambda x: torch.cuda.Stream().query(), "torch.cuda.Stream.query"),
    "an event": (lambda x: torch.cuda.Event().synchronize(), "torch.cuda.Event.synchronize"),
    "an event's query": (lambda x: torch.cuda.Event().query(), "torch.cuda.Event.query"),
    "an event's time": (lambda x: torch.cuda.Event().elapsed_time(torch.cuda.Event()), "torch.cuda.Event.elapsed_time"),
    "empty_cache": (lambda x: torch.cuda.empty_cache(), "torch.cuda.empty_cache"),
    "manual_seed": (lambda x: torch.cuda.manual_seed(0), "torch.cuda.manual_seed"),
    "seed_all": (lambda x: torch.cuda.seed_all(), "torch.cuda.seed_all"),
    "get_rng_state": (lambda x: torch.cuda.get_rng_state(), "torch.cuda.get_rng_state"),
}
COPIES = {
    "cpu": (lambda x, h: x.cpu(), "aten::_to_copy"),
    "to the host": (lambda x, h: x.to("cpu"), "aten::_to_copy"),
    "copy_ to the host": (lambda x, h: h.copy_(x), "aten::copy_"),
    "cuda": (lambda x, h: h.to("cuda"), "aten::_to_copy"),
    "cuda without waiting": (lambda x, h: h.to("cuda", non_blocking=True), "aten::_to_copy"),
    "copy_ from the host": (lambda x, h: x.copy_(h), "aten::copy_"),
    "assignment of a host tensor": (lambda x, h: x.__setitem__(slice(1), h[:1]), "aten::copy_"),
    "tensor": (lambda x, h: torch.tensor([1.0, 2.0], device="cuda"), "aten::lift_fresh"),
    "tensor of one": (lambda x, h: torch.tensor(1.0, device=x.device), "aten::lift_fresh"),
    "as_tensor": (lambda x, h: torch.as_tensor(3, device="cuda"), "aten::lift_fresh"),
    "new_tensor": (lambda x, h: x.new_tensor([1.0]), "aten::"),
    "a list as index": (lambda x, h: x[[0, 1]], "aten::lift_fresh"),
    "a host tensor as index": (lambda x, h: x[h[:, 0, 0, 0].long()], "aten::"),
}
OTHERS = {
    "arithmetic on the host": (lambda h: h + 1, "aten::add.Tensor", "host"),
    "a new host tensor": (lambda h: torch.zeros(3), "aten::zeros", "host"),
    "random numbers of the host": (lambda h: torch.randn(3), "aten::randn", "random"),
    "randomness in a host tensor": (lambda h: h.normal_(), "aten::normal_", "random"),
    "a generator of the host": (
        lambda h: torch.randn(3, device="cuda", generator=torch.Generator()),
        "aten::randn.generator",
        "random",
    ),
}


def refused(device, operation):
    with pytest.raises(NotCapturable) as caught, device.steady_state():
        operation()
    return caught.value


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_for_the_device_is_refused_by_name(device, x, name):
    operation, operator = WAITS[name]
    error = refused(device, lambda: operation(x))
    assert operator in error.operator
    assert error.operator in str(error)
    assert error.kind == "sync"


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", COPIES)
def test_what_crosses_between_host_and_device_is_refused_by_name(device, x, name, inference):
    operation, operator = COPIES[name]
    h = host(2, 4, 8, 8)
    with torch.inference_mode(inference):
        error = refused(device, lambda: operation(x, h))
    assert operator in error.operator
    assert error.kind in ("copy", "host")
    assert "host" in str(error)


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_host_computes_or_draws_is_refused_by_name(device, name):
    operation, operator, kind = OTHERS[name]
    h = host(3)
    error = refused(device, lambda: operation(h))
    assert error.operator == operator
    assert error.kind == kind


def test_a_host_number_among_device_tensors_is_refused(device, x):
    h = host()
    error = refused(device, lambda: x.mul_(h))
    assert error.kind == "host"
    assert "shape ()" in str(error)


def test_a_host_vector_among_device_tensors_is_refused_as_a_copy(device, x):
    h = host(2).long()
    assert refused(device, lambda: x.index_select(0, h)).kind == "copy"


def test_waiting_is_refused_under_inference_mode_as_well(device, x):
    with torch.inference_mode():
        assert refused(device, lambda: torch.allclose(x, x)).kind == "sync"
        assert refused(device, lambda: nn.functional.one_hot(x.long())).operator == "aten::one_hot"


def test_an_error_names_the_rule_the_line_the_public_function_and_the_remedy(device, x):
    error = refused(device, lambda: x.sum().item())  # this line
    assert "this line" in linecache.getline(__file__, int(error.where.rpartition(":")[2]))
    assert error.where.startswith(__file__)
    for part in ("never waits for the device", "aten::_local_scalar_dense", "torch.Tensor.item", "torch.where"):
        assert part in str(error)
    assert isinstance(error, CaptureError)


def test_an_error_inside_the_package_names_the_callers_line_and_ours(device, x):
    row = ddim_fast.DDIMSampler(ddim_fast.NoiseSchedule.linear(), 3).plan().steps[0].coefficients
    with torch.inference_mode():
        error = refused(device, lambda: ddim_step(x, x, row, out=x))
    assert error.where.startswith(__file__)
    assert "through coefficients.py" in str(error)


def test_a_folder_whose_name_begins_like_ours_is_the_users(device, x):
    ours, theirs = Path(ddim_fast.__file__).parent, Path(torch.__file__).parent
    for folder in (f"{ours}_experiments", f"{theirs}_extras"):
        code = compile("value = x.sum().item()", f"{folder}/loop.py", "exec")
        assert refused(device, lambda code=code: exec(code, {"x": x})).where == f"{folder}/loop.py:1"


def test_a_line_of_the_laboratory_is_nobodys(device, x):
    lab = Path(gpu_lab.__file__).parent
    code = compile("def call(function): return function()", f"{lab}/helper.py", "exec")
    names = {}
    exec(code, names)
    error = refused(device, lambda: names["call"](x.sum().item))
    assert error.where.startswith(__file__)
    assert "through" not in str(error)


# --- What is allowed --------------------------------------------------------------------------------------------------

HONEST = {
    "arithmetic": lambda x: x.mul_(2).add_(1.5),
    "a selected row": lambda x: x.index_select(0, torch.zeros(1, dtype=torch.long, device="cuda")),
    "a number assigned": lambda x: x.__setitem__(0, 2.0),
    "a number assigned by a mask": lambda x: x.__setitem__(x > 0, 2.0),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "new on the device": lambda x: torch.arange(4, device="cuda") + torch.full((4,), 2, device="cuda"),
    "the default generator": lambda x: x.normal_() + torch.randn_like(x) + nn.functional.dropout(x),
    "a known output size": lambda x: x.repeat_interleave(x[:, 0, 0, 0].long(), dim=0, output_size=7),
    "known classes": lambda x: nn.functional.one_hot(x.long(), 5),
    "copies within the device": lambda x: torch.empty_like(x).copy_(x).half().float(),
    "streams that wait for each other": lambda x: torch.cuda.Stream().wait_stream(torch.cuda.current_stream()),
    "an event recorded": lambda x: torch.cuda.Event().record(),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", HONEST)
def test_what_a_capture_allows_is_accepted(device, x, name, inference):
    with torch.inference_mode(inference), device.steady_state() as steady:
        HONEST[name](x)
    assert (steady.syncs, steady.copies, steady.others) == ([], [], [])


def test_outside_a_steady_state_only_what_needs_values_fails(device, x):
    torch.cuda.synchronize()
    torch.cuda.manual_seed(0)
    x.copy_(host(2, 4, 8, 8))
    assert x.cpu().device.type == "cpu"
    assert torch.tensor([1.0], device="cuda").device.type == "cuda"
    assert "cuda" in repr(x)


# --- What is counted --------------------------------------------------------------------------------------------------


def test_launches_are_counted_and_views_and_empty_memory_are_none(device, x):
    with device.steady_state() as steady:
        y = torch.empty_like(x)
        torch.add(x[0], 1, out=y[0])
        x.view(-1).mul_(2)
        x.transpose(1, 2).reshape(2, -1).detach()  # the reshape copies
    assert steady.region().launches == {"aten::add.out": 1, "aten::mul_.Tensor": 1, "aten::clone": 1}
    assert steady.region().allocations == {"aten::empty_like": 1, "aten::clone": 1}
    assert steady.region().allocated_bytes == 2 * x.numel() * 4


def test_what_grows_in_place_is_an_allocation(device):
    x = torch.empty(3, device="cuda")
    with device.steady_state() as steady:
        x.resize_(2)
        x.resize_(100)
    assert (steady.launches, steady.allocations) == (0, 1)


def test_regions_are_counted_apart_the_innermost_first(device, x):
    model = device.tagged("model", nn.Conv2d(4, 4, 3, padding=1).to("cuda"))
    assert model.padding == (1, 1)
    with device.steady_state() as steady:
        with device.region("guidance"):
            x.add_(model(x))
        x.mul_(2)
    assert steady.region("model").launches == {"aten::convolution": 1}
    assert steady.region("model").allocations.total() == 1
    assert steady.region("guidance").launches == {"aten::add_.Tensor": 1}
    assert steady.region(SAMPLER).launches == {"aten::mul_.Tensor": 1}
    assert (steady.region("elsewhere").launches.total(), steady.launches) == (0, 3)
    for part in ("3 launches (0 of ours), 1 allocations", "model: 1 launches", "1 x aten::convolution"):
        assert part in str(steady)


def test_each_steady_state_begins_at_zero_and_only_one_is_open(device, x):
    with device.steady_state() as first:
        x.add_(1)
        with pytest.raises(RuntimeError, match="one steady state"), device.steady_state():
            pass
    x.add_(1)
    with device.steady_state() as second:
        x.add_(1)
    assert first == second
    assert first != Steady()


def test_a_survey_counts_what_it_would_refuse(device, x):
    with device.steady_state(refuse=False) as steady:
        if x.sum() > 0:
            x.add_(1)
        torch.tensor([1.0], device="cuda")
        torch.randn(2)
    assert (len(steady.syncs), len(steady.copies) > 0, len(steady.others) > 0) == (1, True, True)
    assert "_local_scalar_dense" in str(steady)


def test_an_operator_of_ours_is_counted_as_ours(device, x):
    library = torch.library.Library("ddim_fast", "FRAGMENT")
    library.define("test_advance(Tensor(a!) x) -> ()")
    library.impl("test_advance", lambda x: None, "Meta")
    try:
        with device.steady_state() as steady:
            torch.ops.ddim_fast.test_advance(x)
        assert (steady.own_launches, steady.launches, steady.allocations) == (1, 1, 0)
    finally:
        library._destroy()


def test_a_launch_outside_the_dispatcher_is_counted_instead_of_run():
    launchers = []

    def kernel(out, number):
        raise AssertionError("a fake tensor has no memory to write to")

    with fake_cuda(launchers=[launchers]) as device:
        x, h = torch.empty(3, device="cuda"), host(3)
        with device.steady_state() as steady:
            launchers[-1](kernel, x, number=2)
        assert steady.region().own_launches == {"ddim_fast::kernel": 1}
        assert refused(device, lambda: launchers[-1](kernel, h, number=2)).operator == "ddim_fast::kernel"
    assert launchers == []


@pytest.mark.parametrize("adds_noise", [False, True])
def test_a_step_by_a_table_is_one_launch_of_ours_and_the_counters_advance(device, x, adds_noise):
    plan = ddim_fast.DDIMSampler(ddim_fast.NoiseSchedule.linear(), 5, eta=float(adds_noise)).plan()
    rows = [step.coefficients for step in plan.steps]
    table = StepTable.of(rows, torch.device("cuda"), None)
    timesteps = torch.tensor(plan.timesteps, device="cuda")[:, None].repeat(1, 2)
    t, index = timesteps[0].clone(), torch.zeros(1, dtype=torch.long, device="cuda")
    seeds = torch.zeros(2, dtype=torch.long, device="cuda")
    model = device.tagged("model", nn.Conv2d(4, 4, 3, padding=1).to("cuda"))

    def step():
        torch.index_select(timesteps, 0, index, out=t.view(1, 2))
        ddim_step_from_table(x, model(x), table, index, seeds=seeds if adds_noise else None, out=x)
        index.add_(1)

    with torch.inference_mode():
        for _ in range(2):
            with device.steady_state() as steady:
                step()
            assert steady.region().own_launches == {"ddim_fast::ddim_step_kernel": 1}
            assert steady.region().launches.total() == 3
            assert steady.region().allocations.total() == 0


def test_a_step_whose_tensors_have_no_rows_is_seen_to_copy_them(device, x):
    plan = ddim_fast.DDIMSampler(ddim_fast.NoiseSchedule.linear(), 5).plan()
    table = StepTable.of([step.coefficients for step in plan.steps], torch.device("cuda"), None)
    index, m = (
        torch.zeros(1, dtype=torch.long, device="cuda"),
        torch.empty_like(x).to(memory_format=torch.channels_last),
    )
    with torch.inference_mode(), device.steady_state() as steady:
        ddim_step_from_table(x, m, table, index, out=x)
    assert steady.region().launches == {"aten::clone": 1, "ddim_fast::ddim_step_kernel": 1}
    assert steady.region().allocations == {"aten::clone": 1}


# --- Real models ------------------------------------------------------------------------------------------------------


def unet2d():
    return UNet2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
    )


def unet2d_condition():
    return UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=6,
    )


MODELS = {
    "UNet2DModel": (unet2d, lambda: {}),
    "UNet2DConditionModel": (
        unet2d_condition,
        lambda: {"encoder_hidden_states": torch.empty(2, 3, 6, device="cuda")},
    ),
    "SmallUNet": (lambda: SmallUNet(in_channels=4, width=16), lambda: {}),
    "SmallUNet with labels": (
        lambda: SmallUNet(in_channels=4, width=16),
        lambda: {"class_labels": torch.empty(2, dtype=torch.long, device="cuda")},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_real_models_step_is_capturable_and_the_samplers_part_of_it_allocates_nothing(device, name):
    make, conditioning = MODELS[name]
    network = make().to("cuda").eval()
    model, conditioning = device.tagged("model", network), conditioning()
    x = torch.empty(2, 4, 16, 16, device="cuda")
    timesteps = torch.empty(50, 2, dtype=torch.long, device="cuda")
    t, index = torch.empty(1, 2, dtype=torch.long, device="cuda"), torch.zeros(1, dtype=torch.long, device="cuda")
    with torch.inference_mode(), device.steady_state() as steady:
        torch.index_select(timesteps, 0, index, out=t)
        x.add_(ddim_fast.models.protocol.output_tensor(model(x, t[0], **conditioning), x))
        index.add_(1)
    assert steady.region().launches.total() == 3
    assert steady.region().allocations.total() == 0
    # The network's convolutions in any form, each one kernel at least and one new tensor.
    convolutions = sum(isinstance(module, nn.Conv2d) for module in network.modules())
    assert steady.region("model").launches["aten::convolution"] == convolutions
    assert steady.region("model").allocations.total() >= convolutions
    assert (steady.syncs, steady.copies, steady.others) == ([], [], [])


def test_weights_loaded_before_are_moved_here(device):
    network = SmallUNet(in_channels=4, width=16)
    model = network.to("cuda").to(memory_format=torch.channels_last)
    assert all(p.device.type == "cuda" for p in model.parameters())


class Bad(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.convolution, self.what = nn.Conv2d(4, 4, 3, padding=1), what

    def forward(self, x, t):
        if self.what == "item":
            scale = t[0].item()
        elif self.what == "if":
            scale = 1.0 if t.sum() > 0 else 2.0
        elif self.what == "tensor":
            scale = torch.tensor([2.0], device=x.device)
        else:
            scale = 1.0 + t[0].cpu()
        return self.convolution(x) * scale


@pytest.mark.parametrize(
    ("what", "operator", "code"),
    [
        ("item", "aten::_local_scalar_dense", "t[0].item()"),
        ("if", "aten::_local_scalar_dense", "if t.sum() > 0"),
        ("tensor", "aten::lift_fresh", "torch.tensor([2.0], device=x.device)"),
        ("cpu", "aten::_to_copy", "t[0].cpu()"),
    ],
)
def test_a_model_that_asks_the_host_is_refused_with_the_line_in_the_model(device, x, what, operator, code):
    model = device.tagged("model", Bad(what).to("cuda"))
    t = torch.empty(2, dtype=torch.long, device="cuda")
    error = refused(device, lambda: model(x, t))
    assert error.operator == operator
    assert error.where.startswith(__file__)
    assert code in str(error)
    assert "in forward" in str(error)


# --- The device itself ------------------------------------------------------------------------------------------------


def test_addresses_tell_memory_apart(device):
    a, b = torch.empty(1000, device="cuda"), torch.empty(1000, device="cuda")
    first, last = sorted((a, b), key=lambda t: t.data_ptr())
    assert first.data_ptr() + 4000 <= last.data_ptr()
    assert a[10:].data_ptr() == a.data_ptr() + 40
    assert a[10:].untyped_storage().data_ptr() == a.data_ptr() == a.untyped_storage().data_ptr()
    a.resize_(5000)
    first, last = sorted((a, b), key=lambda t: t.data_ptr())
    assert first.data_ptr() + 4 * len(first) <= last.data_ptr()
    with pytest.raises(RuntimeError, match="fake tensor of the device only"):
        host(3).data_ptr()


def test_torch_says_that_there_is_a_device_only_while_it_pretends():
    before = torch.cuda.is_available(), torch.cuda.Stream, torch.utils.swap_tensors, torch.UntypedStorage.data_ptr
    with fake_cuda(capability=(8, 6)):
        assert torch.cuda.is_available()
        assert torch.cuda.device_count() == 1
        assert torch.cuda.get_device_capability() == (8, 6)
        with torch.cuda.device(0), torch.cuda.stream(torch.cuda.Stream()):
            assert not torch.cuda.is_current_stream_capturing()
    after = torch.cuda.is_available(), torch.cuda.Stream, torch.utils.swap_tensors, torch.UntypedStorage.data_ptr
    assert after == before
    real = torch.arange(3.0)
    assert real.untyped_storage().data_ptr() == real.data_ptr() != 0
    assert torch.equal(real + 1, torch.tensor([1.0, 2.0, 3.0]))


def test_one_device_at_a_time_and_another_after_an_error():
    with fake_cuda(), pytest.raises(RuntimeError, match="one fake device"), fake_cuda():
        pass
    with pytest.raises(KeyError), fake_cuda() as device, device.steady_state(), device.region("model"):
        raise KeyError
    with fake_cuda() as device:
        assert device.steady is None
        x = torch.empty(3, device="cuda")
        x.copy_(x[0])
    del x, device
    gc.collect()


def test_the_guard_of_the_device_is_gone_afterwards():
    with fake_cuda():
        torch.empty(2, device="cuda")[0].add_(1)
    built = torch.backends.cuda.is_built()
    without = contextlib.nullcontext() if built else pytest.raises(RuntimeError, match="not linked")
    with FakeTensorMode(), without:
        torch.empty(2, device="cuda")[0].add_(1)


def test_gradients_on_the_host_still_flow_after_the_guard_is_gone():
    with fake_cuda():
        torch.empty(2, device="cuda").add_(1)
    w = torch.ones(3, requires_grad=True)
    (w * w).sum().backward()
    assert torch.equal(w.grad, torch.full((3,), 2.0))


def test_a_graph_backend_of_the_fake_device_reports_what_a_capture_did(device, x):
    graphs = FakeGraphs(device)
    calls = []
    graphs.warm_up(lambda: calls.append(torch.cuda.is_current_stream_capturing()), 2)
    graph = graphs.capture(lambda: calls.append(torch.cuda.is_current_stream_capturing()) or x.add_(1))
    assert calls == [False, False, True]
    assert graph.output is x
    assert graph.steady.launches == 1
    graph.replay()
    assert graph.replays == 1
    with pytest.raises(NotCapturable):
        graphs.capture(lambda: x.sum().item())
