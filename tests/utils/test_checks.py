"""Every error states the rule, the value received and the remedy."""

import fractions
import math

import numpy as np
import pytest
import torch

from ddim_fast.utils.checks import check_choice, check_integer, check_memory, check_number, refuse, shown


@pytest.mark.parametrize("value", [3, np.int64(3), torch.tensor(3)])
def test_an_integer_comes_back_as_an_int(value):
    result = check_integer("count", value, at_least=3, at_most=3)
    assert (type(result), result) == (int, 3)


@pytest.mark.parametrize(
    ("value", "limits", "error", "message"),
    [
        (2.0, {}, TypeError, "count must be an integer, got 2.0"),
        (True, {}, TypeError, "count must be an integer, got True"),
        ("2", {"at_least": 1}, TypeError, "count must be an integer, at least 1, got '2'"),
        (0, {"at_least": 1, "remedy": "leave it out"}, ValueError, "count must be an integer, at least 1, got 0: leave it out"),
        (9, {"at_most": 8}, ValueError, "count must be an integer, at most 8, got 9"),
        (9, {"at_least": 1, "at_most": 8}, ValueError, "count must be an integer in [1, 8], got 9"),
        (10**30, {"at_most": 8}, ValueError, f"count must be an integer, at most 8, got {10**30}"),
    ],
)  # fmt: skip
def test_no_such_integer(value, limits, error, message):
    with pytest.raises(error) as caught:
        check_integer("count", value, **limits)
    assert str(caught.value) == message


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), fractions.Fraction(1, 2)])
def test_a_number_comes_back_as_a_float(value):
    result = check_number("eta", value, at_least=0.5, at_most=0.5)
    assert (type(result), result) == (float, 0.5)


@pytest.mark.parametrize(
    ("value", "limits", "error", "message"),
    [
        ("1", {}, TypeError, "eta must be a finite number, got '1'"),
        (True, {}, TypeError, "eta must be a finite number, got True"),
        (math.nan, {"at_least": 0}, ValueError, "eta must be a finite number, at least 0, got nan"),
        (-math.inf, {}, ValueError, "eta must be a finite number, got -inf"),
        (10**400, {}, ValueError, "eta must be a finite number, got 1000"),
        (0, {"above": 0}, ValueError, "eta must be a finite number, above 0, got 0"),
        (0.0, {"above": 0, "at_most": 1}, ValueError, "eta must be a finite number in (0, 1], got 0.0"),
        (1.5, {"at_least": 0, "at_most": 1, "remedy": "1 is DDPM"}, ValueError,
         "eta must be a finite number in [0, 1], got 1.5: 1 is DDPM"),
        (2, {"at_most": 1}, ValueError, "eta must be a finite number, at most 1, got 2"),
    ],
)  # fmt: skip
def test_no_such_number(value, limits, error, message):
    with pytest.raises(error) as caught:
        check_number("eta", value, **limits)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("value", ["c", 1, None, ["a"]])
def test_no_such_choice(value):
    check_choice("mode", "a", ("a", "b"))
    with pytest.raises(ValueError, match=r"^mode must be one of a, b, got .*: or none$"):
        check_choice("mode", value, iter(("a", "b")), "or none")


def test_a_long_value_is_shortened():
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (its length is what matters)
        refuse("a rule", list(range(10_000)))
    assert len(str(caught.value)) < 300


def test_memory_is_that_of_the_machine():
    check_memory("count", 1, 1, "take fewer")
    with pytest.raises(
        ValueError, match=r"count must fit into memory, of \d+ GB, and would take at least [\d,]+ GB, got 5: take fewer"
    ):
        check_memory("count", 5, 10**400, "take fewer")
    with open("/proc/meminfo") as file:
        kilobytes = int(file.readline().split()[1])
    with pytest.raises(ValueError, match="into memory"):
        check_memory("count", 5, 1024 * kilobytes + 10**9, "take fewer")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(2, 3, 40, 40), "a tensor (2, 3, 40, 40) of float32"),
        (np.zeros((3, 1)), "an array (3, 1) of float64"),
        (torch.tensor(5), "tensor(5)"),
        (np.float64(0.5), repr(np.float64(0.5))),
        (torch.nn.Sequential(torch.nn.ReLU(), torch.nn.ReLU()), "an object of class Sequential"),
        (
            dict.fromkeys(range(99), "long"),
            "{0: 'long', 1: 'long', 2: 'long', 3: 'long', 4: 'long', 5: 'long', 6: 'long',...",
        ),
        ("a/path/of/many/folders" * 4, repr("a/path/of/many/folders" * 4)),
        (10**150, str(10**150)),
        (None, "None"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_an_error_shows_one_line_of_any_value(value, text):
    assert shown(value) == text
    with pytest.raises(ValueError, match="got") as caught:
        refuse("it must be another", value, "change it")
    assert str(caught.value) == f"it must be another, got {text}: change it"
