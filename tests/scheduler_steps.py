"""A step of a scheduler of diffusers and of its drop-in, compared with one another and with float64."""

import functools
import inspect

import numpy as np
import torch
from hypothesis import strategies as st
from outcomes import half_unit

from ddim_fast.verify.truth.tolerances import allowed_error, assert_within, to_numpy

SHAPE = (3, 2, 4, 4)
X = torch.linspace(-1, 1, 96).reshape(SHAPE)
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.bfloat16),
    (torch.float64, torch.float64),
    (torch.float32, torch.float64),
]
"""Of the sample and of the model's output."""
TINY = 2.0**-40
"""A number so small that no x0 of it is clipped; its inverse is so large that every one is."""
merged = functools.partial(st.builds, lambda *parts: {name: value for part in parts for name, value in part.items()})
"""The strategy of a config from strategies of its parts."""


def known_fields(original, config):
    """Leave out what a class, or an old version of it, does not have."""
    return {name: value for name, value in config.items() if name in inspect.signature(original).parameters}


def noise_of(kind, seed):
    """Return the argument ``generator``, and all generators there are."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(3)]
    return {"global": None, "generator": generators[0], "generators": generators}[kind], generators


def next_noise(generator, shape, *dtypes):
    """The last noise of those that the next step draws, one of each dtype, from copies of the generators."""
    given = generator if isinstance(generator, list) else [generator or torch.default_generator]
    copies = [torch.Generator().set_state(g.get_state()) for g in given]
    z = torch.zeros(shape)
    for dtype in dtypes:
        if len(copies) == 1:
            z = torch.randn(shape, generator=copies[0], dtype=dtype)
        else:
            z = torch.cat([torch.randn(1, *shape[1:], generator=g, dtype=dtype) for g in copies])
    return to_numpy(z)


def outputs(found):
    return found if isinstance(found, tuple) else found.to_tuple()


def linear_truth(update, *inputs, clips=False):
    """[(result, its terms), ...] of ``update(*inputs)``, each linear in all inputs, but for an x0 that is clipped."""
    values = update(*inputs)
    terms = [np.abs(value) if clips else 0.0 for value in values]
    for size in (TINY, 1 / TINY) if clips else (TINY,):  # where x0 is not clipped, and where it is
        one, no = np.full((), size), np.zeros(())
        for k, part in enumerate(inputs):
            weights = update(*(one if i == k else no for i in range(len(inputs))))
            terms = [t + abs(float(w)) / size * np.abs(part) for t, w in zip(terms, weights, strict=True)]
    return list(zip(values, terms, strict=True))


def assert_same_kinds(expected, got, return_dict, m):
    """Compare all of a step's results but the values."""
    assert type(got) is type(expected)
    if return_dict and not isinstance(got, tuple):
        assert list(got.keys()) == list(expected.keys())
        assert all(got[name] is getattr(got, name) for name in got)
    expected, got = outputs(expected), outputs(got)
    assert len(got) == len(expected)
    for a, b in zip(expected, got, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        assert (a is m) == (b is m)
        assert [other is a for other in expected] == [other is b for other in got]


def assert_never_further(expected, got, exact, m, rounded=(), inputs=None):
    """Compare a step of ours and of the original with float64.

    Args:
        exact: [(result, its terms), ...].
        rounded: other exact results, which a step in half precision rounds on its way.
        inputs: in float64, how large what the truth's terms are made of is; None where numbers cancel
            before they are terms.
    """
    for values, originals, (e, terms) in zip(outputs(got), outputs(expected), exact, strict=True):
        if values is m or not np.isfinite(to_numpy(originals)).all():
            continue
        if values.dtype == torch.float64:  # the truth is rounded, too, where its numbers cancel
            terms = terms * 1e4 if inputs is None else terms + inputs
        allowed = allowed_error(values.dtype, terms) + sum(half_unit(values, other) for other in rounded)
        assert_within(values, e, allowed)
        worst, of_original = (float(np.abs(to_numpy(v) - e).max()) for v in (values, originals))
        assert not worst > of_original + float(allowed.max()) + half_unit(values, e)


def _no_value(self, *args, **kwargs):
    raise AssertionError("the value of a timestep on a device is read")


class OnDevice(torch.Tensor):
    """A tensor whose values nobody may read, as if they were on a busy device."""

    item = tolist = __bool__ = __float__ = __int__ = nonzero = __eq__ = _no_value
    __hash__ = torch.Tensor.__hash__
