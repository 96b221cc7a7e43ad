"""The timesteps against the conventions written again, for every count at T = 1000, and against exhaustive search."""

import itertools
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddim_fast.plans.schedules import NoiseSchedule
from ddim_fast.plans.timesteps import (
    SPACINGS,
    SpacingRequest,
    distinct_timesteps,
    explicit_timesteps,
    respaced_timesteps,
    select_timesteps,
)

T = 1000
LINEAR = NoiseSchedule.linear(T)


def is_valid(timesteps, count, num_train_timesteps):
    """Exactly ``count`` integers in [0, T-1], strictly decreasing."""
    timesteps = np.asarray(timesteps)
    return bool(
        timesteps.shape == (count,)
        and (np.diff(timesteps) < 0).all()
        and timesteps.min() >= 0
        and timesteps.max() < num_train_timesteps
    )


# --- The conventions, as their projects compute them ----------------------------------------------------------------


def diffusers_leading(count, offset=0):
    ratio = T // count
    return [index * ratio + offset for index in reversed(range(count))]


def diffusers_trailing(count):
    return [int(value) - 1 for value in np.round(np.arange(T, 0, -T / count))]


def diffusers_linspace(count):
    return [int(value) for value in np.linspace(0, T - 1, count).round()[::-1]]


def original_uniform(count):
    return list(range(0, T, T // count))[::-1]


def original_quad(count):
    return [int(value) for value in np.linspace(0, np.sqrt(T * 0.8), count) ** 2][::-1]


def original_ddim(count):
    for stride in range(1, T):
        timesteps = range(0, T, stride)
        if len(timesteps) == count:
            return list(timesteps)[::-1]
    return []


def original_sections(counts, total):
    """Section by section, the running position a float that grows by the stride."""
    result, start = [], 0
    for index, count in enumerate(counts):
        size = total // len(counts) + (index < total % len(counts))
        if count > size:
            return None
        stride = (size - 1) / (count - 1) if count > 1 else 1
        position = 0.0
        for _ in range(count):
            result.append(start + round(position))
            position += stride
        start += size
    return result[::-1]


CONVENTIONS = {  # ours, theirs, and at how many of the counts 1 ... 1000 theirs gives no valid list
    "leading": (lambda count: select_timesteps(count, T), diffusers_leading, 0),
    "leading, steps_offset=1": (
        lambda count: select_timesteps(count, T, steps_offset=1),
        lambda count: diffusers_leading(count, 1),
        1,
    ),
    "trailing": (lambda count: select_timesteps(count, T, "trailing"), diffusers_trailing, 62),
    "linspace": (lambda count: select_timesteps(count, T, "linspace"), diffusers_linspace, 0),
    "uniform": (lambda count: select_timesteps(count, T, "uniform"), original_uniform, 984),
    "quad": (lambda count: select_timesteps(count, T, "quad"), original_quad, 971),
    "ddimN": (lambda count: respaced_timesteps(f"ddim{count}", T), original_ddim, 938),
}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_where_a_convention_works_ours_is_identical(name):
    ours, theirs, expected_failures = CONVENTIONS[name]
    failures = 0
    for count in range(1, T + 1):
        expected, received = theirs(count), ours(count)
        if is_valid(expected, count, T):
            assert received == tuple(expected), (name, count)
        else:
            failures += 1
            assert is_valid(received, count, T), (name, count)
    assert failures == expected_failures
    assert received == tuple(range(T))[::-1]
    assert {type(value) for value in received} == {int}


@pytest.mark.parametrize("spacing", sorted(set(SPACINGS) - set(CONVENTIONS)))
def test_every_count_gets_exactly_its_timesteps(spacing):
    for count in range(1, T + 1):
        timesteps = select_timesteps(count, T, spacing, schedule=LINEAR)
        assert is_valid(timesteps, count, T), (spacing, count)
        assert timesteps[0] == T - 1 or spacing not in ("log_snr", "karras", "cosine", "beta")
    assert {type(value) for value in timesteps} == {int}
    assert timesteps == tuple(range(T - 1, -1, -1))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_other_lengths(data):
    total = data.draw(st.integers(1, 3000) | st.integers(1, 12))
    count = data.draw(st.integers(1, total))
    spacing = data.draw(st.sampled_from(sorted(SPACINGS)))
    offset = data.draw(st.integers(0, total - 1))
    rho = data.draw(st.floats(1e-3, 1e3))
    preset = data.draw(st.sampled_from([NoiseSchedule.linear, NoiseSchedule.cosine, NoiseSchedule.jsd]))
    timesteps = select_timesteps(count, total, spacing, steps_offset=offset, schedule=preset(total), rho=rho)
    assert is_valid(timesteps, count, total)
    assert is_valid(respaced_timesteps(f"ddim{count}", total), count, total)
    assert explicit_timesteps(timesteps, total) == timesteps


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("total", [1, 2, 3])
def test_the_shortest_schedules(spacing, total):
    schedule = NoiseSchedule.linear(total)
    for count in range(1, total + 1):
        assert is_valid(select_timesteps(count, total, spacing, schedule=schedule), count, total)
    assert select_timesteps(total, total, spacing, schedule=schedule) == tuple(range(total))[::-1]


# --- Known lists, and what mends a convention -----------------------------------------------------------------------


def test_lists_known_by_heart():
    assert select_timesteps(10, T) == (900, 800, 700, 600, 500, 400, 300, 200, 100, 0)
    assert select_timesteps(5, T, steps_offset=1) == (801, 601, 401, 201, 1)
    assert select_timesteps(5, T, "trailing") == (999, 799, 599, 399, 199)
    assert select_timesteps(5, T, "linspace") == (999, 749, 500, 250, 0)  # 749.25, 499.5 to even, 249.75
    assert select_timesteps(3, T, "uniform") == (666, 333, 0)
    assert select_timesteps(5, T, "quad") == (800, 450, 200, 50, 0)
    assert respaced_timesteps("ddim25", T) == tuple(range(960, -1, -40))
    assert respaced_timesteps("ddim36", T) == tuple(range(980, -1, -28))  # stride 28, where T // 36 = 27 gives 38


@pytest.mark.parametrize("spacing", ["leading", "linspace", "uniform", "quad"])
def test_one_step_of_these_conventions_is_timestep_0(spacing):
    assert select_timesteps(1, T, spacing) == (0,)


def test_leading_lowers_an_offset_that_would_reach_past_the_end():
    assert select_timesteps(T, T, steps_offset=1) == tuple(range(T))[::-1]
    assert select_timesteps(4, T, steps_offset=249) == (999, 749, 499, 249)
    assert select_timesteps(4, T, steps_offset=250) == (999, 749, 499, 249)
    assert select_timesteps(4, T, steps_offset=999) == (999, 749, 499, 249)


@pytest.mark.parametrize("spacing", sorted(set(SPACINGS) - {"leading"}))
def test_only_leading_has_an_offset(spacing):
    plain = select_timesteps(20, T, spacing, schedule=LINEAR)
    assert select_timesteps(20, T, spacing, schedule=LINEAR, steps_offset=1) == plain


def test_trailing_loses_only_the_step_too_many():
    for count in range(1, T + 1):
        assert list(select_timesteps(count, T, "trailing")) == diffusers_trailing(count)[:count]


def test_uniform_and_ddim_are_even_where_no_stride_gives_the_count():
    for count in range(1, T + 1, 6):
        even = tuple(math.floor(Fraction(index * T, count)) for index in reversed(range(count)))
        assert select_timesteps(count, T, "uniform") == even
        if original_ddim(count) == []:
            assert respaced_timesteps(f"ddim{count}", T) == even


def test_quad_is_mended_at_the_crowded_end_alone():
    ours, theirs = select_timesteps(50, T, "quad"), original_quad(50)
    assert theirs[-5:] == [5, 2, 1, 0, 0]
    assert ours[-5:] == (5, 3, 2, 1, 0)
    assert list(ours[:-4]) == theirs[:-4]


# --- Spacings by noise ----------------------------------------------------------------------------------------------


def nearest(values, wanted):
    return min(range(len(values)), key=lambda t: abs(values[t] - wanted))


@pytest.mark.parametrize("preset", [NoiseSchedule.linear, NoiseSchedule.scaled_linear, NoiseSchedule.cosine])
@pytest.mark.parametrize("count", [1, 2, 5, 10])
def test_log_snr_takes_the_nearest_timestep(preset, count):
    schedule = preset(T)
    snr = [math.log(value / (1 - value)) for value in schedule.alphas_cumprod.tolist()]
    wanted = [snr[-1] + (snr[0] - snr[-1]) * index / max(count - 1, 1) for index in range(count)]
    expected = [nearest(snr, value) for value in wanted]
    # The cosine schedule's capped last step is longer than a tenth of the whole: only there the nearest repeats.
    assert is_valid(expected, count, T) or (preset == NoiseSchedule.cosine and count == 10)
    assert select_timesteps(count, T, "log_snr", schedule=schedule) == distinct_timesteps(expected, T)


@pytest.mark.parametrize("preset", [NoiseSchedule.linear, NoiseSchedule.scaled_linear, NoiseSchedule.cosine])
@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
@pytest.mark.parametrize("count", [1, 2, 5, 10])
def test_karras_takes_the_nearest_timestep(preset, rho, count):
    """EDM's eq. 5 as printed; nearest in the ratio's logarithm, as in diffusers."""
    schedule = preset(T)
    ratios = [math.sqrt((1 - value) / value) for value in schedule.alphas_cumprod.tolist()]
    start, end = ratios[-1] ** (1 / rho), ratios[0] ** (1 / rho)
    wanted = [(start + index / max(count - 1, 1) * (end - start)) ** rho for index in range(count)]
    expected = [nearest([math.log(ratio) for ratio in ratios], math.log(value)) for value in wanted]
    assert is_valid(expected, count, T) or preset == NoiseSchedule.cosine  # its capped last step is most of the ratio
    assert select_timesteps(count, T, "karras", schedule=schedule, rho=rho) == distinct_timesteps(expected, T)


@pytest.mark.parametrize("preset", [NoiseSchedule.linear, NoiseSchedule.scaled_linear, NoiseSchedule.cosine])
@pytest.mark.parametrize("count", [1, 2, 5, 10])
def test_cosine_takes_the_nearest_timestep(preset, count):
    """Evenly in the angle whose cosine is the square root of alpha_bar."""
    schedule = preset(T)
    bars = schedule.alphas_cumprod.tolist()
    angles = [math.acos(math.sqrt(value)) for value in bars]
    wanted = [angles[-1] + (angles[0] - angles[-1]) * index / max(count - 1, 1) for index in range(count)]
    # Nearest in log-SNR, as the other spacings by noise.
    expected = [
        nearest([math.log(value / (1 - value)) for value in bars], -2 * math.log(math.tan(angle))) for angle in wanted
    ]
    assert select_timesteps(count, T, "cosine", schedule=schedule) == distinct_timesteps(expected, T)


def test_how_often_cosine_crowds():
    counts = range(1, T + 1)
    positions = (np.round(SPACINGS["cosine"](SpacingRequest(count, T, schedule=LINEAR))) for count in counts)
    assert sum(len(set(p)) < len(p) for p in positions) == 572  # docs/STEPS.md says so


def test_cosine_is_even_on_the_cosine_schedule():
    """But for its first and last timesteps, where that schedule is bent: its betas are capped, and it has an offset."""
    timesteps = select_timesteps(20, T, "cosine", schedule=NoiseSchedule.cosine(T))
    assert np.abs(np.diff(timesteps[1:-1])).max() <= T / 19 + 2
    assert np.abs(np.diff(timesteps[1:-1])).min() >= T / 19 - 2


def test_beta_has_the_quantiles_of_its_distribution():
    crowded = 0
    for count in range(2, T + 1):
        expected = (T - 1) * scipy.stats.beta.ppf(np.linspace(0, 1, count), 0.6, 0.6)
        np.testing.assert_allclose(SPACINGS["beta"](SpacingRequest(count, T)), expected, atol=1e-5)
        crowded += len(set(np.round(expected))) < count
    assert crowded == 861  # docs/STEPS.md says so
    assert select_timesteps(1, T, "beta") == (T - 1,)


def test_karras_tends_to_log_snr():
    expected = select_timesteps(30, T, "log_snr", schedule=LINEAR)
    assert select_timesteps(30, T, "karras", schedule=LINEAR, rho=1e9) == expected
    assert select_timesteps(30, T, "karras", schedule=LINEAR) != expected


@pytest.mark.parametrize("rho", [5e-324, 1e-3, 1, 1e3, 1.7e308])
def test_karras_survives_any_rho(rho):
    for schedule in (LINEAR, NoiseSchedule.cosine(T).rescale_zero_terminal_snr()):
        timesteps = select_timesteps(20, T, "karras", schedule=schedule, rho=rho)
        assert is_valid(timesteps, 20, T)
        assert timesteps[0] == T - 1
        assert timesteps[-1] == 0


@pytest.mark.parametrize("spacing", ["log_snr", "karras", "cosine"])
@pytest.mark.parametrize(
    "alphas_cumprod",
    [
        [1.0],
        [0.0],
        [0.5],
        [1.0, 0.0],
        [1.0, 0.5],
        [0.5, 0.0],
        [1.0, 0.5, 0.0],
        [1.0, 0.9, 0.5, 0.1, 0.0],
        [1.0, *np.linspace(0.99, 0.01, 40), 0.0],
        [1 - 1e-16, 0.5, 5e-324, 0.0],
        [1.0, np.nextafter(1, 0), 0.5, 0.0],
    ],
)
def test_infinite_ends(spacing, alphas_cumprod):
    schedule = NoiseSchedule.from_alphas_cumprod(alphas_cumprod)
    total = len(alphas_cumprod)
    for count in range(1, total + 1):
        timesteps = select_timesteps(count, total, spacing, schedule=schedule)
        assert is_valid(timesteps, count, total)
        assert timesteps[0] == total - 1
        assert count == 1 or timesteps[-1] == 0


def test_an_infinite_end_does_not_bend_the_middle():
    """ᾱ of exactly 0 counts as one more equal stride of log-SNR: the list is that of the schedule it continues."""
    snr = np.linspace(6, -6, 41)
    alphas_cumprod = 1 / (1 + np.exp(-snr))
    finite = NoiseSchedule.from_alphas_cumprod(alphas_cumprod)
    infinite = NoiseSchedule.from_alphas_cumprod([1.0, *alphas_cumprod[1:-1], 0.0])
    assert select_timesteps(11, 41, "log_snr", schedule=finite) == tuple(range(40, -1, -4))
    for count in range(1, 42):
        for spacing in ("log_snr", "karras"):
            expected = select_timesteps(count, 41, spacing, schedule=finite)
            received = select_timesteps(count, 41, spacing, schedule=infinite)
            assert max(abs(a - b) for a, b in zip(received, expected, strict=True)) <= 1  # ties may round either way


# --- distinct_timesteps: least total change, by exhaustive search ---------------------------------------------------


def total_change(timesteps, targets):
    return sum(abs(a - b) for a, b in zip(sorted(timesteps), sorted(targets), strict=True))


@pytest.mark.parametrize("total", [1, 2, 3, 4, 5, 6])
def test_no_choice_of_timesteps_is_nearer(total):
    """Every list of targets from -1 to T, against every choice of timesteps."""
    for count in range(1, total + 1):
        choices = np.array(list(itertools.combinations(range(total), count)))
        for targets in itertools.combinations_with_replacement(range(-1, total + 1), count):
            timesteps = distinct_timesteps(targets, total)
            assert is_valid(timesteps, count, total)
            assert total_change(timesteps, targets) == np.abs(choices - targets).sum(axis=1).min(), targets


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 400), st.data())
def test_properties_of_distinct_timesteps(total, data):
    positions = data.draw(st.lists(st.floats(-10, total + 10), min_size=1, max_size=min(total, 60)))
    timesteps = distinct_timesteps(positions, total)
    assert is_valid(timesteps, len(positions), total)
    assert distinct_timesteps(timesteps, total) == timesteps
    assert distinct_timesteps(positions[::-1], total) == timesteps
    rounded = sorted(round(position) for position in positions)
    if is_valid(rounded[::-1], len(rounded), total):
        assert timesteps == tuple(rounded[::-1])
    # A position at an end of the range, or past it, is visited there.
    assert timesteps[0] == total - 1 or rounded[-1] < total - 1
    assert timesteps[-1] == 0 or rounded[0] > 0


def least_change(targets, total):
    """Dynamic programming over every timestep: the smallest total change, by another road than the code's."""
    costs = np.zeros(total + 1)  # costs[v]: the targets so far placed below v
    for target in sorted(targets):
        costs = np.concatenate([[np.inf], np.minimum.accumulate(costs[:-1] + np.abs(np.arange(total) - target))])
    return costs[-1]


@pytest.mark.parametrize("spacing", ["quad", "log_snr", "karras", "cosine", "beta"])
def test_spacings_change_least(spacing):
    for count in [*range(20, 200, 9), *range(200, T, 97), T]:
        targets = np.round(SPACINGS[spacing](SpacingRequest(count, T, schedule=LINEAR)))
        timesteps = select_timesteps(count, T, spacing, schedule=LINEAR)
        assert total_change(timesteps, targets) == least_change(targets, T), count


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(20, 60), min_size=2, max_size=40))
def test_crowds_far_from_both_ends_change_least(targets):
    assert total_change(distinct_timesteps(targets, 100), targets) == least_change(targets, 100)


def test_ties_round_to_even():
    assert distinct_timesteps([0.5, 1.5, 4.5], 10) == (4, 2, 0)


@pytest.mark.parametrize(
    ("positions", "total", "error", "message"),
    [
        ([], 5, ValueError, "got shape (0,)"),
        ([1, 2, 3], 2, ValueError, "num_train_timesteps = 2 values, got shape (3,)"),
        ([[1, 2]], 5, ValueError, "got shape (1, 2)"),
        ([1, math.nan], 5, ValueError, "finite, got nan"),
        ([-math.inf], 5, ValueError, "finite, got -inf"),
        ([1], 0, ValueError, "num_train_timesteps must be an integer, at least 1, got 0"),
        ([1], 5.0, TypeError, "num_train_timesteps must be an integer, at least 1, got 5.0"),
    ],
)
def test_bad_positions(positions, total, error, message):
    with pytest.raises(error, match=re.escape(message)):
        distinct_timesteps(positions, total)


# --- Respacing strings and explicit lists ---------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 2000), st.lists(st.integers(0, 120), min_size=1, max_size=8))
def test_sections_follow_the_original(total, counts):
    expected = original_sections(counts, total)
    if expected is None or not expected:
        with pytest.raises(ValueError, match="got"):
            respaced_timesteps(counts, total)
        return
    assert is_valid(expected, sum(counts), total)
    assert respaced_timesteps(counts, total) == tuple(expected)
    assert respaced_timesteps(",".join(map(str, counts)), total) == tuple(expected)


def test_single_sections_follow_the_original():
    for count in range(1, T + 1, 3):
        assert respaced_timesteps(str(count), T) == tuple(original_sections([count], T))


def test_section_notation():
    assert respaced_timesteps("2,3", 10) == (9, 7, 5, 4, 0)
    assert respaced_timesteps(" 2 , 3 ", 10) == (9, 7, 5, 4, 0)
    assert respaced_timesteps("0,1", 11) == (6,)  # the first section is the longer one
    assert respaced_timesteps("4", 4) == (3, 2, 1, 0)
    for counts in ([2, 3], (2, 3), range(2, 4), np.array([2, 3]), torch.tensor([2, 3])):
        assert respaced_timesteps(counts, 10) == (9, 7, 5, 4, 0)


@pytest.mark.parametrize(
    ("respacing", "total", "error", "message"),
    [
        ("ddim0", T, ValueError, "must be an integer in [1, 1000], got 0"),
        ("ddim1001", T, ValueError, "must be an integer in [1, 1000], got 1001"),
        ("ddim", T, ValueError, "got 'ddim'"),
        ("ddim-5", T, ValueError, "got 'ddim-5'"),
        ("ddim5,5", T, ValueError, "got 'ddim5,5'"),
        ("ddim 5", T, ValueError, "got 'ddim 5'"),
        ("ddim5.0", T, ValueError, "got 'ddim5.0'"),
        ("DDIM5", T, ValueError, "got 'DDIM5'"),
        ("", T, ValueError, "got ''"),
        ("10,", T, ValueError, "got '10,'"),
        ("10;20", T, ValueError, "got '10;20'"),
        ("-1,5", T, ValueError, "got '-1,5'"),
        ("fast27", T, ValueError, "got 'fast27'"),
        ("0", T, ValueError, "at least one timestep, got [0]"),
        (
            "6,1",
            10,
            ValueError,
            "section 0 of 10 timesteps in 2 sections holds 5, so its count must lie in [0, 5], got 6",
        ),
        (
            "1,1,1",
            2,
            ValueError,
            "section 2 of 2 timesteps in 3 sections holds 0, so its count must lie in [0, 0], got 1",
        ),
        ([5, -1], T, ValueError, "got -1"),
        ([], T, ValueError, "at least one timestep, got []"),
        ([2.0], T, TypeError, "respacing[0] must be an integer, got 2.0"),
        ([True], T, TypeError, "got True"),
        (50, T, TypeError, "respacing must be a list of ints, got 50"),
        (None, T, TypeError, "got None"),
        ({1, 2}, T, TypeError, "got {1, 2}"),
        (b"ddim5", T, TypeError, "got b'ddim5'"),
        ("ddim5", 0, ValueError, "num_train_timesteps must be an integer, at least 1, got 0"),
        ("5", 10.0, TypeError, "num_train_timesteps must be an integer, at least 1, got 10.0"),
    ],
)
def test_bad_respacing(respacing, total, error, message):
    with pytest.raises(error, match=re.escape(message)):
        respaced_timesteps(respacing, total)


def test_explicit_lists():
    for timesteps in ([999, 500, 0], (999, 500, 0), np.array([999, 500, 0]), torch.tensor([999, 500, 0])):
        result = explicit_timesteps(timesteps, T)
        assert result == (999, 500, 0)
        assert {type(value) for value in result} == {int}
    assert explicit_timesteps([np.int32(3)], 4) == (3,)
    assert explicit_timesteps(range(3, -1, -1), 4) == (3, 2, 1, 0)


@pytest.mark.parametrize(
    ("timesteps", "total", "error", "message"),
    [
        ([], T, ValueError, "at least one timestep, got []"),
        ([1000, 5], T, ValueError, "[0, 999], got timesteps[0] = 1000"),
        ([5, -1], T, ValueError, "got timesteps[1] = -1"),
        ([5, 5], T, ValueError, "strictly decreasing, got 5 followed by 5 at index 1"),
        ([9, 3, 7], T, ValueError, "strictly decreasing, got 3 followed by 7 at index 2"),
        ([5.0], T, TypeError, "timesteps[0] must be an integer, got 5.0"),
        ([5, True], T, TypeError, "timesteps[1] must be an integer, got True"),
        (torch.tensor([5.0]), T, TypeError, "must be an integer, got 5.0"),
        (torch.tensor(5), T, TypeError, "must be a list of ints, got tensor(5)"),
        ([[5]], T, TypeError, "must be an integer, got [5]"),
        ("999,5", T, TypeError, "must be a list of ints, got '999,5'"),
        (5, T, TypeError, "must be a list of ints, got 5"),
        ([0], 0, ValueError, "num_train_timesteps must be an integer, at least 1, got 0"),
    ],
)
def test_bad_explicit_lists(timesteps, total, error, message):
    with pytest.raises(error, match=re.escape(message)):
        explicit_timesteps(timesteps, total)


@pytest.mark.parametrize("spacing", ["leading", "karras"])
@pytest.mark.parametrize(
    ("arguments", "changes", "error", "message"),
    [
        ((0, T), {}, ValueError, "num_inference_steps must be an integer in [1, 1000], got 0"),
        ((-5, T), {}, ValueError, "got -5"),
        ((1001, T), {}, ValueError, "num_inference_steps must be an integer in [1, 1000], got 1001"),
        ((2.0, T), {}, TypeError, "num_inference_steps must be an integer in [1, 1000], got 2.0"),
        ((True, T), {}, TypeError, "num_inference_steps must be an integer in [1, 1000], got True"),
        (("5", T), {}, TypeError, "num_inference_steps must be an integer in [1, 1000], got '5'"),
        ((1, 0), {}, ValueError, "num_train_timesteps must be an integer, at least 1, got 0"),
        ((1, 1000.0), {}, TypeError, "num_train_timesteps must be an integer, at least 1, got 1000.0"),
        ((5, T), {"steps_offset": -1}, ValueError, "steps_offset must be an integer in [0, 999], got -1"),
        ((5, T), {"steps_offset": 1000}, ValueError, "steps_offset must be an integer in [0, 999], got 1000"),
        ((5, T), {"steps_offset": 1.0}, TypeError, "steps_offset must be an integer in [0, 999], got 1.0"),
        ((5, T), {"rho": 0}, ValueError, "above 0, got 0"),
        ((5, T), {"rho": -7.0}, ValueError, "got -7.0"),
        ((5, T), {"rho": math.nan}, ValueError, "got nan"),
        ((5, T), {"rho": math.inf}, ValueError, "got inf"),
        ((5, T), {"rho": "7"}, TypeError, "rho must be a finite number, above 0, got '7'"),
        ((5, T), {"rho": True}, TypeError, "got True"),
        ((5, 999), {}, ValueError, "num_train_timesteps = 999 timesteps, got one of 1000"),
        ((5, T), {"schedule": "linear"}, TypeError, "schedule must be a NoiseSchedule, got 'linear'"),
    ],
)
def test_bad_selection(spacing, arguments, changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        select_timesteps(*arguments, spacing, **{"schedule": LINEAR, **changes})


@pytest.mark.parametrize("spacing", ["log_snr", "karras", "cosine"])
def test_spacings_by_noise_need_a_schedule(spacing):
    with pytest.raises(ValueError, match=f"spacing '{spacing}' .* got schedule=None: pass schedule="):
        select_timesteps(5, T, spacing)


@pytest.mark.parametrize("spacing", ["trailling", "", None, [999, 0]])
def test_unknown_spacing_lists_the_known_ones(spacing):
    with pytest.raises(ValueError, match=re.escape(f"got {spacing!r}")) as caught:
        select_timesteps(5, T, spacing)
    assert all(known in str(caught.value) for known in SPACINGS)
