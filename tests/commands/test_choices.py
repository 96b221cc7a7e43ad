"""The names that the options take are those of the library's tables, which the command line does not import."""

from ddim_fast.commands import choices
from ddim_fast.generation import formats
from ddim_fast.generation import run as generation
from ddim_fast.kernels import dispatch
from ddim_fast.models import shipped
from ddim_fast.plans import coefficients, continuous, eta, named, timesteps
from ddim_fast.sampling import capture_mode
from ddim_fast.tradeoff import METRICS

EXPECTED = {
    "SHIPPED": shipped.SHIPPED,
    "BACKENDS": dispatch.BACKENDS,
    "CAPTURE_MODES": capture_mode.MODES,
    "SPACINGS": timesteps.SPACINGS,
    "CONTINUOUS_SPACINGS": continuous.CONTINUOUS_SPACINGS,
    "SCHEDULES": named.ALL_SCHEDULES,
    "ETA_SCALES": eta.ETA_SCALES,
    "OF_EQUATION_16": eta.OF_EQUATION_16,
    "PREDICTION_TYPES": coefficients.PREDICTION_TYPES,
    "FORMATS": formats.FORMATS,
    "RACED_METRICS": [name for name, metric in METRICS.items() if metric.raced],
}
OTHERS = {
    "CLOSED_FORM": "closed-form",
    "PAPER": eta.PAPER,
    "SHARD_SIZE": generation.SHARD_SIZE,
    "COMPUTE_BATCH_SIZE": generation.COMPUTE_BATCH_SIZE,
}


def test_every_choice_is_the_librarys():
    expected = {name: tuple(table) for name, table in EXPECTED.items()} | OTHERS
    assert {name: value for name, value in vars(choices).items() if name.isupper()} == expected
