"""The restated steps of codes that train with log-probabilities: what was found is found again, and the drop-ins for them pass."""

import json

import pytest
import torch
from verify.subjects.test_in_the_wild import findings

from ddim_fast.integrations.ddpo_pytorch import ddim_step_with_logprob
from ddim_fast.integrations.flow_grpo import sde_step_with_logprob
from ddim_fast.verify.checks import CHECKS
from ddim_fast.verify.reports.report import Outcome
from ddim_fast.verify.run import run_check, verify
from ddim_fast.verify.subjects import restated
from ddim_fast.verify.subjects.adapters import subject_of
from ddim_fast.verify.truth.cases import ScoredStep

FOUND = [one for one in json.loads(findings.JSON_FILE.read_text())["subjects"] if one["package"] in restated.SOURCES]
LOG_PROB = [name for name in CHECKS if name.startswith("log-prob")]


def outcome_of(subject, name):
    return run_check(CHECKS[name], subject, False, 0, torch.device("cpu"))


def test_every_restated_step_is_a_finding():
    assert {one["subject"].partition(":")[2] for one in FOUND} == set(restated.SUBJECTS)
    assert {one["version"] for one in FOUND} == {commit for commit, _ in restated.SOURCES.values()}


@pytest.mark.parametrize("one", FOUND, ids=lambda one: one["label"])
def test_what_was_found_is_found_again(one):
    subject, before = subject_of(one["subject"]), {check["name"]: check for check in one["checks"]}
    for name in (*LOG_PROB, "draws-nothing", "endpoints"):
        found = outcome_of(subject, name)
        assert found.outcome.value == before[name]["outcome"], (name, found.message)


class FastDDPO(restated.DDPO):
    """Our drop-in, called as the restated function is."""

    def __init__(self):
        super().__init__()
        self.features -= {"given_noise"}  # it draws as the original does
        self.arithmetic = "exact"
        self.own_alphas_cumprod = True

    def _call(self, case, **given):
        setting = case.setting
        scheduler = self.built(setting.but(eta=0.0, use_clipped_model_output=False))
        return ddim_step_with_logprob(
            scheduler, case.model_output, scheduler.timesteps[case.index], case.x_t, setting.eta,
            setting.use_clipped_model_output, **given,
        )  # fmt: skip

    def step_with_log_prob(self, case):
        x_prev, log_prob = self._call(case, generator=case.source)
        return ScoredStep(x_prev, None if case.setting.eta == 0 else log_prob)

    def log_prob(self, case, x_prev):
        return self._call(case, prev_sample=x_prev)[1]


class FastFlowGRPO(restated.FlowGRPO):
    sde_type = "sde"

    def __init__(self):
        super().__init__()
        self.features -= {"given_noise"}
        self.arithmetic = "exact"

    def _call(self, case, **given):
        scheduler, setting = self.built(case.setting.but(eta=0.0)), case.setting
        options = {"noise_level": setting.eta, "sde_type": self.sde_type, "log_density": True}
        return sde_step_with_logprob(
            scheduler, case.model_output, scheduler.timesteps[case.index], case.x_t, **options, **given
        )

    def step_with_log_prob(self, case):
        x_prev, log_prob = self._call(case, generator=case.source)[:2]
        return ScoredStep(x_prev, None if case.setting.eta == 0 else log_prob)

    def log_prob(self, case, x_prev):
        return self._call(case, prev_sample=x_prev)[1]


class FastCPS(FastFlowGRPO):
    eta_scales = sde_type = "cps"


@pytest.mark.parametrize("name", [*LOG_PROB, "observed-update", "no-stale-state", "inputs-untouched"])
@pytest.mark.parametrize("kind", [FastDDPO, FastFlowGRPO, FastCPS])
def test_the_drop_ins_pass_where_the_originals_fail(kind, name):
    found = outcome_of(kind(), name)
    expected = Outcome.NOT_APPLICABLE if name == "log-prob-half" and kind is not FastDDPO else Outcome.PASSED
    assert found.outcome is expected, found.message


@pytest.mark.parametrize(("theirs", "ours"), [(restated.DDPO, FastDDPO), (restated.FlowGRPO, FastFlowGRPO)])
def test_the_drop_ins_give_the_numbers_of_the_restated_steps(theirs, ours):
    """In float32, with the same draws."""
    original, drop_in = theirs(), ours()
    for setting in [one.but(eta=0.7) for one in original.paths]:
        for index in (0, 4, 8):
            x_t, m = torch.randn(2, 2, 3, 43, generator=torch.Generator().manual_seed(index))
            case = restated.StepCase(setting, index, x_t, m)
            results = [
                subject.step_with_log_prob(case.but(source=torch.Generator().manual_seed(1)))
                for subject in (original, drop_in)
            ]
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_noise_that_is_not_equation_16s_is_held_to_its_own_formula_alone():
    report = verify(restated.FlowGRPO(), checks=["log-prob", "eta-convention"], required=())
    assert [result.outcome for result in report.results] == [Outcome.NOT_APPLICABLE, Outcome.PASSED]
