"""The choice of a run's timesteps: what one step is warned of."""

import re
import warnings

import pytest

from ddim_fast.plans.schedules import NoiseSchedule
from ddim_fast.plans.timesteps import SPACINGS, select_timesteps
from ddim_fast.sampler import DDIMSampler

SCHEDULE = NoiseSchedule.linear()


@pytest.mark.parametrize("spacing", SPACINGS)
def test_one_step_that_leaves_noise_is_warned_of_at_the_callers_line(spacing):
    (visited,) = select_timesteps(1, 1000, spacing, schedule=SCHEDULE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sampler = DDIMSampler(SCHEDULE, 1, timestep_spacing=spacing)
    assert sampler.timesteps == (visited,)
    assert len(caught) == (visited != 999)
    for warning in caught:
        assert warning.category is UserWarning
        assert warning.filename == __file__
        said = rf"got {visited} of 0 to 999 from '{spacing}' spacing.*'trailing' spacing, or timesteps=\[999\]"
        assert re.search(said, str(warning.message))


def test_what_was_asked_for_by_hand_or_has_more_steps_is_not_warned_of():
    """Warnings are errors here."""
    DDIMSampler(SCHEDULE, timesteps=[0])
    DDIMSampler(SCHEDULE, timesteps="ddim1")
    DDIMSampler(SCHEDULE, 2)
    DDIMSampler(SCHEDULE, 2).last_steps(1)
    DDIMSampler(NoiseSchedule.from_alphas_cumprod([0.5]), 1)
