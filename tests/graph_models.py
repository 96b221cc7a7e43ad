"""Models of which graphs are made, or are not: built as those of peft, accelerate, torchao and step caches are; and graphs that log."""

import functools
import types

import torch
from torch import nn

from ddim_fast.gpu_lab import Replay

SHAPE = (2, 3, 8, 8)


class Base(nn.Module):
    prediction_type = "epsilon"

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        with torch.no_grad():
            self.conv.weight.copy_(torch.linspace(-0.3, 0.4, self.conv.weight.numel()).view_as(self.conv.weight))
            self.conv.bias.zero_()

    def forward(self, x, t):
        return torch.tanh(self.conv(x)) * self.gain()

    def gain(self):
        return 1.0


# --- adapters, as peft keeps them ---------------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A layer of peft: adapters in dictionaries of modules, which of them are on in a list, weights in a dictionary."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.lora = nn.ModuleDict({name: nn.Conv2d(3, 3, 1, bias=False) for name in ("one", "two")})
        for sign, layer in zip((0.5, -0.5), self.lora.values(), strict=True):
            nn.init.constant_(layer.weight, sign)
        self._active_adapter, self._disable_adapters = ["one"], False
        self.scaling, self.merged_adapters = {"one": 1.0, "two": 1.0}, []

    def forward(self, x):
        result = self.base_layer(x)
        if self._disable_adapters:
            return result
        for name in self._active_adapter:
            result = result + self.lora[name](x) * self.scaling[name]
        return result


SWITCHES = {
    "another adapter": lambda layer: setattr(layer, "_active_adapter", ["two"]),
    "in place": lambda layer: layer._active_adapter.append("two"),
    "disabled": lambda layer: setattr(layer, "_disable_adapters", True),
    "weighted": lambda layer: layer.scaling.update(one=0.3),
}


# --- what cannot be vouched for -----------------------------------------------------------------------------------------------------


class Opaque(torch.Tensor):
    """A tensor without memory of its own, which does not say what it wraps."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain = lambda leaf: leaf.inner if isinstance(leaf, Opaque) else leaf  # noqa: E731
        result = func(*map(plain, args), **(kwargs or {}))
        return cls(result) if func is torch.ops.aten.detach.default else result


class Wrapped(Opaque):
    """As quantised weights are: it says what it wraps."""

    def __tensor_flatten__(self):
        return ["inner"], {"scale": 1.0}


def with_(attribute, value):
    def make():
        model = Base()
        setattr(model, attribute, value(model) if isinstance(value, types.FunctionType) else value)
        return model

    return make


class Slotted:
    __slots__ = ("value",)


def offloaded(model):
    """As accelerate does: the module's forward is replaced by one that moves weights before and after."""
    old = model.forward
    return functools.partial(lambda module, x, t: old(x, t), model)


def compiled_stub(config):
    def make():
        model = Base()

        def call(*args, **kwargs):
            return model._call_impl(*args, **kwargs)

        if config is not ...:
            call.get_compiler_config = lambda: config
        model._compiled_call_impl = call
        return model

    return make


def hooked():
    model, offset = Base(), []
    model.conv.register_forward_hook(lambda module, args, output: output + len(offset))
    return model


def opaque_weight():
    model = Base()
    model.conv.weight = nn.Parameter(Opaque(model.conv.weight.detach()), requires_grad=False)
    return model


REFUSED = {
    "adapters of peft": (with_("peft_config", {"default": None}), "the model has adapters of peft"),
    "a replaced forward": (with_("forward", offloaded), "the model has its forward replaced, as hooks that move"),
    "a closure": (with_("act", lambda m: lambda x: m), r"act holds the function .*closes over what cannot be seen"),
    "a hook that closes over something": (hooked, r"conv holds the function .*closes over"),
    "a C object": (
        with_("random", torch.Generator()),
        "random holds a torch._C.Generator, which cannot be looked into",
    ),
    "slots": (with_("slots", Slotted()), r"slots holds a .*Slotted, which cannot be looked into"),
    "a tensor elsewhere": (
        with_("table", torch.empty(2, device="meta")),
        "table is on meta, and the samples are on cpu",
    ),
    "a wrapper of tensors": (opaque_weight, r"conv.weight is a tensor of type .*Opaque, whose memory cannot be seen"),
    "graphs of torch.compile": (compiled_stub({"triton.cudagraphs": True}), "is compiled with CUDA graphs of its own"),
    "an unknown compiler": (compiled_stub(...), "is compiled by a backend that may make CUDA graphs"),
}


# --- calls that differ from one another ---------------------------------------------------------------------------------------------


class StepCache(Base):
    """As step caches do: the deep part is computed in every n-th call only."""

    def __init__(self, interval):
        super().__init__()
        self.interval, self.calls, self.kept = interval, 0, None

    def forward(self, x, t):
        if self.calls % self.interval == 0:
            self.kept = super().forward(x, t)
        self.calls += 1
        return self.kept * x


CALLS = {"n": 0}


class Elsewhere(Base):
    """Its state is where nobody looks."""

    def gain(self):
        CALLS["n"] += 1
        return 1.0 if CALLS["n"] % 2 else 2.0


# --- graphs -------------------------------------------------------------------------------------------------------------------------


class Logged(Replay):
    """Replays on a stream with a name, and what waits for which."""

    def __init__(self):
        super().__init__()
        self.log, self.stream, self.full = [], "first", 0

    def capture(self, function, pool=None):
        if self.full:
            self.full -= 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        graph, replay = super().capture(function, pool), None
        replay, reset = graph.replay, graph.reset
        graph.replay = lambda: (self.log.append(f"replay on {self.stream}"), replay())
        graph.reset = lambda: (self.log.append("reset"), reset())
        return graph

    def fence(self, tensors):
        backend, of, tensors = self, self.stream, list(tensors)
        backend.log.append(f"fence on {of} of {len(tensors)} tensors")

        class Fence:
            def wait(self):
                backend.log.append(f"{backend.stream} waits for {of}")

        return Fence()
