"""Modules with graphs in the slot of their forward, and the check that a call has eager's bits. Graphs are the recorded stand-in on the
CPU, which freezes pointers and Python's numbers as a CUDA graph does."""

import warnings
from collections import Counter

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from graph_models import SHAPE, Base

from ddim_fast.gpu_lab import Replay
from ddim_fast.sampling.capture import GraphCache
from ddim_fast.sampling.graphed_forward import GraphedForward


def cache_of(backend=None, **options):
    return GraphCache(backend=lambda device: Replay() if backend is None else backend, device_types=("cpu",), **options)


def graphed(module, cache=None, **options):
    """The module, with graphs in its slot."""
    forward = GraphedForward(module, cache_of() if cache is None else cache, "net", **options)
    forward.put_in_place()
    return forward


def x_of(seed=0, shape=SHAPE, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(a, b):
    """The same types, shapes, layouts and bits, however nested."""
    if isinstance(a, torch.Tensor):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert type(a) is type(b)
        same(list(a.items()), list(b.items()))
    elif isinstance(a, (list, tuple)):
        assert type(a) is type(b)
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            same(one, other)
    else:
        assert a == b


@torch.no_grad()
def check(module, *args, graphs=None, **kwargs):
    """A call has eager's bits, without a warning."""
    forward = vars(module)["forward"]
    expected = forward.eager(*args, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(module(*args, **kwargs), expected)
    assert graphs is None or forward.stats().graphs == graphs
    return expected


COUNTS = Counter()  # where no key looks


class Net(Base):
    """It uses everything that it is given, however nested, and returns what it is told to."""

    def forward(self, x, t=None, more=(), added=None, scale=1.0, flag=False, returns="tensor"):
        COUNTS["calls"] += 1
        y = torch.tanh(self.conv(x)) * scale
        if t is not None:
            y = y + t.view(-1, 1, 1, 1).to(y.dtype) / 1000
        for tensor in more:
            y = y + tensor
        if added is not None:
            y = y * added["embeds"]["text"].mean() + added["ids"][0].to(y.dtype)
        y = -y if flag else y
        return RETURNS[returns](self, x, y)


RETURNS = {
    "tensor": lambda module, x, y: y,
    "tuple": lambda module, x, y: (y,),
    "nested": lambda module, x, y: {"out": [y, (y, y.sum())], "name": "a", "none": None},
    "output": lambda module, x, y: UNet2DOutput(sample=y),
    "view": lambda module, x, y: y[:, 1:],
    "channels last": lambda module, x, y: y.to(memory_format=torch.channels_last),
    "expanded": lambda module, x, y: y[:1].expand(4, -1, -1, -1),
    "argument": lambda module, x, y: x,
    "weight": lambda module, x, y: module.conv.weight,
}
