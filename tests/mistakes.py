"""Plausible mistakes in a call of a drop-in, and how it may end: as in the original, or in an error that names the argument."""

import re
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from outcomes import outcome

OURS = tuple(str(Path(__file__).parents[1] / folder) for folder in ("ddim_fast", "kernels"))
TESTS = str(Path(__file__).parent)
VALUES = [
    None, True, 0, -1, 3, -10**30, 0.5, -0.5, float("nan"), float("inf"), 1j, "", "cpu", "text", b"x", [], (), {}, [1, 2],
    (2, 3), [None], ["a"], {"a": 1}, object(), print, torch.float16, torch.Generator(), [torch.Generator()],
    np.float32(0.5), np.int64(1), np.zeros(3), np.ones((3, 2, 4, 5)), torch.tensor(0.5), torch.tensor(1), torch.zeros(0),
    torch.ones(3), torch.tensor([0, 1, 2]), torch.tensor([0, 0, 99]), torch.tensor([True, False, True]), torch.ones(2, 3),
    torch.ones(3, 2, 4, 5), torch.ones(3, 2, 4, 5, dtype=torch.int64), torch.ones(3, 2, 4, 5, dtype=torch.complex64),
    torch.ones(1, 2, 4, 5), torch.ones(3, 4, 4, 5), torch.ones(3, 2, 4), torch.ones(3, 2, 4, 5).to_sparse(),
    torch.ones(3, 2, 4, 5, device="meta"), range(3), range(0), [0, 7], [7, 0], [0.0, 1.0], [0, 10**6], lambda *a, **k: None,
]  # fmt: skip


def is_the_callers(error):
    """Whether it was raised by what the caller gave, such as the model."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return [file for file in files if file.startswith((*OURS, TESTS))][-1].startswith(TESTS)


def assert_ends_well(call, arguments, original=None):
    """Call with these keyword arguments: the end is the original's, or an error that names one of them."""
    torch.manual_seed(0)
    got, error = outcome(lambda: call(**arguments))
    if error is None and original is None:
        return
    torch.manual_seed(0)
    expected, originals = outcome(lambda: original(**arguments)) if original else (None, None)
    if error is None:
        if originals is None:
            assert_same(got, expected)
        return
    named = re.search(rf"\b({'|'.join(map(re.escape, arguments))})\b", str(error))
    truth = "ambiguous" in str(error)  # of a tensor given for a flag: Python's own error
    in_our_form = isinstance(error, (TypeError, ValueError)) and named and " got " in str(error)
    if not (in_our_form or truth or type(error) is type(originals) or is_the_callers(error)):
        raise AssertionError(f"{type(error).__name__}: {error} (the original: {originals!r})") from error


def assert_same(got, expected):
    """Compare what two calls return: tensors, or lists, tuples and dicts of them."""
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(got.double(), expected.double(), rtol=1e-3, atol=1e-3, equal_nan=True)
    elif isinstance(expected, dict):
        assert_same([got[name] for name in expected], list(expected.values()))
    else:
        for a, b in zip(got, expected, strict=True):
            assert_same(a, b)


def mistakes(calls, examples=60):
    """Decorate a test ``(call)``, which returns (function, the original or None) for a name of ``calls``.

    Args:
        calls: for each name the arguments of a call that works.
    """

    def decorate(make):
        @pytest.mark.parametrize("name", calls)
        @pytest.mark.parametrize("examples", [examples, pytest.param(3000, marks=pytest.mark.slow)])
        @pytest.mark.filterwarnings("ignore")
        def test(name, examples):
            right = calls[name]

            @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
            @given(wrong=st.dictionaries(st.sampled_from(list(right)), st.sampled_from(VALUES), min_size=1, max_size=2))
            def run(wrong):
                assert_ends_well(*make(name, right | wrong))

            run()

        test.__doc__ = make.__doc__
        return test

    return decorate
