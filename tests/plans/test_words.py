"""The words that type checkers offer are those that the tables take, in their order."""

from typing import get_args

import pytest

from ddim_fast.kernels.contract import NORMALS
from ddim_fast.kernels.gaussian import REDUCTIONS
from ddim_fast.plans import words
from ddim_fast.plans.coefficients import PREDICTION_TYPES
from ddim_fast.plans.continuous import CONTINUOUS_SPACINGS
from ddim_fast.plans.eta import ETA_SCALES
from ddim_fast.plans.named import ALL_SCHEDULES
from ddim_fast.plans.timesteps import SPACINGS
from ddim_fast.sampling.capture_mode import MODES
from ddim_fast.sampling.options import Capture, LogProbReduction, Normals


@pytest.mark.parametrize(
    ("literal", "table"),
    [
        (words.PredictionType, PREDICTION_TYPES),
        (words.DiscreteSpacing, SPACINGS),
        (words.ContinuousSpacing, CONTINUOUS_SPACINGS),
        (words.EtaScales, ETA_SCALES),
        (words.ScheduleName, ALL_SCHEDULES),
        (Normals, NORMALS),
        (Capture, MODES),
        (LogProbReduction, REDUCTIONS),
    ],
)
def test_literals_are_the_keys_of_their_tables(literal, table):
    assert get_args(literal) == tuple(table)
