"""Tensors in any memory layout and dtype, and any defaults of torch, for tests that a drop-in's results are the original's."""

import functools
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "reversed": lambda x: x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim))),
    "batch inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded batch": lambda x: x[:1].expand(x.shape),
    "expanded channels": lambda x: x[:, :1].expand(x.shape),
    "one number": lambda x: x.flatten()[0].expand(x.shape),
    "slice": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "every second": lambda x: torch.stack([x, x], dim=-1)[..., 0],
}
PICTURE_LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every other": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "channel slice": lambda x: torch.cat([x + 1, x], 1)[:, x.shape[1] :],
    "last dims swapped": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded batch": lambda x: x[:1].expand(3, -1, -1, -1),
    "expanded row": lambda x: x[:, :, :1].expand(-1, -1, 6, -1),
    "one pixel": lambda x: x[:, :, :1, :1],
    "negated": lambda x: torch._neg_view(x),
    "negated, channels last": lambda x: torch._neg_view(x.contiguous(memory_format=torch.channels_last)),
}
"""Of pictures (B, C, H, W) for the kernels of layers; a layout may choose some of the pixels."""
SHAPES = [(3, 2, 4, 5), (2, 3, 2, 2), (1, 2, 4, 5), (3, 1, 4, 5), (2, 3, 1, 1)]

_DTYPES = [torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16]
kinds = st.tuples(
    st.sampled_from(list(LAYOUTS)),
    st.sampled_from(_DTYPES),
)
"""A layout and a dtype."""
shapes = st.sampled_from(SHAPES)


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class Defaults:
    """torch's default device and dtype where the caller stands."""

    device: str | None = None
    dtype: torch.dtype = torch.float32

    def device_mode(self):
        """Return the context of a call of ours.

        The originals run outside of it: the default "meta" would take the values from tensors that they make.
        """
        return nullcontext() if self.device is None else torch.device(self.device)


defaults_of_torch = st.builds(Defaults, st.sampled_from([None, "cpu", "meta"]), st.sampled_from(_DTYPES))


def laid_out(x, kind):
    """Return ``x`` in this layout and dtype. Where it is expanded, elements become equal."""
    layout, dtype = kind
    return LAYOUTS[layout](x.to(dtype))


def draw(seed, shape, kind):
    return laid_out(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), kind)


def modelled(x, kind, pull=0.9):
    """Return what a model that is smooth and bounded makes of ``x``."""
    return laid_out(pull * torch.tanh(0.6 * x.double()) + 0.1 * x.double().flip(1).cos(), kind)


def sweep(examples=25, **strategies):
    """Decorate a ``check(defaults, ...)``: with a few examples in every run, with 3,000 in ``make test-slow``.

    It runs under the default dtype of its ``defaults``.
    """

    def decorate(check):
        @functools.wraps(check)
        def under_the_default_dtype(defaults, **drawn):
            with default_dtype(defaults.dtype):
                check(defaults, **drawn)

        @pytest.mark.parametrize("examples", [examples, pytest.param(3000, marks=pytest.mark.slow)])
        def test(examples):
            run = given(defaults=defaults_of_torch, **strategies)(under_the_default_dtype)
            settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))(run)()

        test.__doc__ = check.__doc__
        return test

    return decorate


def assert_laid_out_alike(got, expected, *kinds, values=True, of_size_1=True):
    """Compare dtypes, strides, and the values as ``assert_alike`` does.

    Args:
        values: also compare these.
        of_size_1: also compare the strides of dimensions of size 1, which say nothing of memory.
    """
    for a, b in zip(got, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        same = [i == j for i, j, size in zip(a.stride(), b.stride(), b.shape, strict=True) if of_size_1 or size != 1]
        assert all(same), f"{a.stride()} for the original's {b.stride()} of {tuple(b.shape)}"
    if values:
        assert_alike(got, expected, *kinds)


def assert_alike(got, expected, *kinds):
    """Compare values roughly: noise in another order is off by 1 or more.

    Args:
        kinds: all that were mixed; rounding to the narrowest dtype among them, or to torch's default, may go either way.
    """
    eps = max(
        torch.finfo(dtype).eps
        for dtype in [torch.float32, torch.get_default_dtype(), *(kind[1] for kind in kinds if kind)]
    )
    allowed = 30 * eps if eps > 1e-5 else 3000 * eps
    for a, b in zip(got, expected, strict=True):
        error = (a.double() - b.double()).abs().max()
        assert error <= allowed * b.double().abs().max().clamp(min=1), float(error)
