"""Reports for tests: one with every outcome, and a subject whose texts try to break the format."""

import math
from dataclasses import replace

from ddim_fast.verify.reports.report import CheckResult, Outcome, Report

EVIL = "</pre><script>document.title = 'broken out'</script>&amp; <b>'\"`{{ 7 * 7 }}\x00\x1b[31m\ud800 ]]> ω\n  second line"
"""HTML, XML, a template, control characters, half a surrogate pair."""

CODE = (
    "import torch\n\nx_prev = torch.tensor([[1.0]])  # </code><i>\n"
    f"model_output = torch.tensor({[i / 7 for i in range(100)]})\nassert x_prev.item() == 2 and '\x07' < 'ω'"
)


def result(name, outcome=Outcome.PASSED, message="", cases=10, worst=0.25, seconds=0.5, **more):
    about = {"proves": f"What {name} proves.", "source": "equation 12", "tolerance": "4 eps"}
    return CheckResult(name, outcome, message, cases, worst, seconds, **about | more)


EVERY_OUTCOME = Report(
    subject="mine:step<u>",
    results=(
        result("update", Outcome.FAILED, EVIL, 3, 5.4e5, 0.1, code=CODE, details={"largest": math.inf, "of": EVIL}),
        result("noise", cases=200, worst=0.9, seconds=12.0, false_alarm_rate=1e-7),
        result("run", cases=20, worst=math.nan, seconds=2.0),
        result("timesteps", Outcome.NOT_APPLICABLE, "the subject does not offer timesteps", 0, math.nan, 0.0),
        result("gpu", Outcome.SKIPPED, "there is no GPU", 0, math.nan, 0.0),
        result("inversion", Outcome.ERROR, "the subject's process was ended by SIGSEGV", 0, math.nan, 1.0),
    ),
    features=("epsilon", "step"),
    conventions={"eta scales": "std_dev", "arithmetic": "float32"},
    seed=7,
    required=("update", "gpu"),
)
RIGHT = replace(
    EVERY_OUTCOME,
    subject="cpu",
    results=tuple(result(r.name, worst=0.1 * i) for i, r in enumerate(EVERY_OUTCOME.results)),
)
ENDED = replace(RIGHT, results=RIGHT.results[:2], complete=False, ended_by="Ctrl-C")
SKIPPED = replace(
    RIGHT, results=(result("update", Outcome.SKIPPED, "scipy is missing", 0, math.nan, 0.0), *RIGHT.results[1:])
)
CRASHED = replace(RIGHT, results=(*RIGHT.results[:2], EVERY_OUTCOME.results[-1]))
REFUSED = replace(RIGHT, results=(), features=(), conventions={}, complete=False, ended_by="no module mine")
ALL = {
    "every outcome": EVERY_OUTCOME,
    "right": RIGHT,
    "ended": ENDED,
    "skipped": SKIPPED,
    "crashed": CRASHED,
    "refused": REFUSED,
}
EXIT_CODES = {"every outcome": 1, "right": 0, "ended": 2, "skipped": 3, "crashed": 2, "refused": 2}
