"""3 x 3 convolutions of a model on the CPU: those of ``optimize``, which need a quarter of the
multiplications, against PyTorch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ddim_fast.kernels import cpu_step
from ddim_fast.models.convolutions import WinogradConv2d

LAYERS = [(32, 14), (96, 7), (128, 16)]
"""Channels and image size; the first two are those of the shipped model."""
BATCHES = [1, 8, 64]
QUICK = (96, 7), 8
ALLOWED = 1e-4
"""The largest error allowed, as a share of the largest output."""


def cases():
    for layer in LAYERS:
        for batch in BATCHES:
            channels, side = layer
            marks = () if (layer, batch) == QUICK else pytest.mark.full
            yield pytest.param(channels, side, batch, marks=marks, id=f"{channels}-{side}x{side}-{batch}")


@pytest.mark.skipif(cpu_step.extension is None, reason="the C++ extension is missing")
@pytest.mark.parametrize(("channels", "side", "batch"), list(cases()))
def test_convolution(channels, side, batch, settings, measure, benchmark, show):
    """Time one layer, channels last."""
    torch.manual_seed(0)
    torch.set_num_threads(settings.threads)
    layer = nn.Conv2d(channels, channels, 3, padding=1).requires_grad_(False).to(memory_format=torch.channels_last)
    ours = WinogradConv2d(layer)
    x = torch.randn(batch, channels, side, side).contiguous(memory_format=torch.channels_last)
    exact = nn.functional.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)

    def without_gradients(layer):
        def run():
            with torch.inference_mode():
                return layer(x)

        return run

    def check(name, result):
        worst = float((result - exact).abs().max() / exact.abs().max())
        assert worst <= ALLOWED, f"{name} is wrong: its error is {worst:.1e} of the largest output, so it is not timed"

    contenders = {"PyTorch": without_gradients(layer), "ours": without_gradients(ours)}
    result = measure("convolution", contenders, check, baseline="ours", pairs=[("PyTorch", "ours")])
    benchmark.extra_info.update(channels=channels, picture=f"{side}x{side}", batch=batch)
    show(
        "a 3 x 3 convolution: microseconds, and times longer than ours",
        channels=str(channels),
        picture=f"{side}x{side}",
        **{"at once": str(batch)},
        ours=f"{1e6 * result.seconds('ours'):.0f}",
        PyTorch=f"{result.ratio('PyTorch'):.2f}",
        spread=f"{100 * result.spread('ours'):.0f}%",
    )
