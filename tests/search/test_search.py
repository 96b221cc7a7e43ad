"""The search for timesteps, on data whose best model is known: fast, and with an answer that can be checked."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from ddim_fast import DDIMSampler, FlowSchedule, NoiseSchedule, VPSchedule, select_timesteps
from ddim_fast.generation.conditioning import EveryClass
from ddim_fast.models.metrics import sample_distances
from ddim_fast.plans.continuous import CONTINUOUS_SPACINGS
from ddim_fast.plans.files import read_timesteps
from ddim_fast.search import Search, fitted, search_timesteps
from ddim_fast.search.analytic import measure_eps_residual
from ddim_fast.search.costs import cost_table, reference
from ddim_fast.search.fitted import Checkpoint
from ddim_fast.search.refine import Candidate, Refinement
from ddim_fast.search.runs import Runs, State, after
from ddim_fast.search.search import ONE_LIST
from ddim_fast.tradeoff import ClosedForm

LINEAR = NoiseSchedule.linear()
CPU = torch.device("cpu")


def search(**changes):
    options = dict(order=1, count=64, refine_count=64, held_out=64, refine_runs=40, candidates=24, seed=5)
    return Search(ClosedForm(LINEAR), LINEAR, (1,), **{"num_inference_steps": 5, **options, **changes})


@pytest.mark.parametrize("order", [1, 2])
def test_what_is_found_is_better_also_on_noise_it_has_not_seen(order, tmp_path):
    found = search_timesteps(search(order=order))
    closed = [score for score in found.scores if score.name not in ("searched", ONE_LIST, "dynamic programming")]
    best = found.score("searched")
    one_list = found.score(ONE_LIST)
    assert found.best.model_timesteps is not None
    assert best.candidate == Candidate(found.timesteps, found.best.model_timesteps)
    assert one_list.candidate.is_one_list
    assert best.seen < one_list.seen
    assert best.held_out < one_list.held_out
    assert best.seen < min(score.seen for score in closed)
    assert best.held_out < 0.9 * min(score.held_out for score in closed)
    assert found.scores == tuple(sorted(found.scores, key=lambda score: score.held_out))
    # What the list says of itself is so: from the noise that it names, by the public sampler.
    found.best.write(tmp_path / "found.json")
    again = read_timesteps(tmp_path / "found.json")
    assert again.order == order
    assert json.dumps(again.provenance) == json.dumps(found.best.provenance)
    held_out = again.provenance["seeds"]["held_out"]
    sampler = DDIMSampler(LINEAR, timesteps=again)
    model = ClosedForm(LINEAR)
    got = sampler.sample(model, (64, 1), seed=held_out)
    many = DDIMSampler(LINEAR, timesteps=range(999, -1, -1), order=2).sample(model, (64, 1), seed=held_out)
    assert sample_distances(got, many).mean().item() == pytest.approx(best.held_out, rel=0.05, abs=2e-4)


def test_one_list_is_for_any_sampler():
    found = search_timesteps(search(model_timesteps=False, refine_runs=10))
    both = search_timesteps(search(refine_runs=10))
    assert found.best.model_timesteps is None
    assert ONE_LIST not in {score.name for score in found.scores}
    assert found.timesteps == both.score(ONE_LIST).candidate.timesteps
    assert found.score("searched").held_out == both.score(ONE_LIST).held_out


def test_the_same_search_finds_the_same():
    a, b = (search_timesteps(search(refine_runs=10)) for _ in range(2))
    assert a.scores == b.scores
    assert a.best.eps_residual == b.best.eps_residual


class Interrupted(ClosedForm):
    """A model that is interrupted after so many calls; what a search knows of it stays the same."""

    calls, allowed = 0, math.inf

    def forward(self, x, t):
        type(self).calls += 1
        if self.calls > self.allowed:
            raise KeyboardInterrupt
        return super().forward(x, t)


def test_a_search_that_is_interrupted_anywhere_finds_the_same(tmp_path):
    path = tmp_path / "five.json.partial"
    counted = type("Interrupted", (Interrupted,), {})
    wanted = search(refine_runs=6, candidates=12, num_inference_steps=3)
    wanted.model = counted(LINEAR)
    whole = search_timesteps(wanted)
    needed, parts = counted.calls, 0
    first = len(wanted.converging_plan().steps) + len(wanted.converging_plan().steps)  # converged, and the costs
    counted.allowed = first + 20
    while True:
        counted.calls = 0
        try:
            again = search_timesteps(wanted, checkpoint=path)
            break
        except KeyboardInterrupt:
            parts += 1
            assert path.exists()
            content = json.loads(path.read_text())
            tried = [str(one) for one in content.get("tried", ())]
            assert content["dynamic"]
            assert len(tried) == len({*tried})  # none is run again
            counted.allowed += 15
    assert parts >= 2
    assert tried
    assert counted.calls < needed - len(wanted.converging_plan().steps) + 10  # the costs are not measured again
    assert again.scores == whole.scores
    assert again.timesteps == whole.timesteps
    assert not path.exists()


def test_what_a_search_has_tried_is_in_its_file_within_seconds(tmp_path, monkeypatch):
    kept = Checkpoint(tmp_path / "partial", search())
    kept.add(Candidate((9, 5)), 0.25)
    assert not kept.path.exists()
    monkeypatch.setattr(fitted, "_SECONDS_BETWEEN_WRITES", -1.0)
    kept.add(Candidate((9, 4), (8, 4)), 0.125)
    assert Checkpoint(kept.path, search()).known == {Candidate((9, 5)): 0.25, Candidate((9, 4), (8, 4)): 0.125}


def test_progress_is_told_of_every_call():
    told, seen = [], []

    class Counted(ClosedForm):
        def forward(self, x, t):
            seen.append(len(x))
            return super().forward(x, t)

    wanted = search(refine_runs=10)
    wanted.model = Counted(LINEAR)
    search_timesteps(wanted, told.append)
    assert sum(told) == sum(seen) <= wanted.calls()


class OwnGraphs(nn.Module):
    """As torch.compile(mode="reduce-overhead") does it on a GPU: what a step returned is memory that the next step uses again. A step is
    a call, until somebody says where steps begin."""

    prediction_type = "epsilon"

    def __init__(self, shape):
        super().__init__()
        self.memory, self.used, self.told = [torch.empty(shape) for _ in range(2)], 0, False

        def call(x, t, **conditioning):
            self.used = self.used + 1 if self.told else 1
            return self.memory[self.used - 1].copy_(self.forward(x, t, **conditioning))

        call.get_compiler_config = lambda: {"triton.cudagraphs": True}
        self._compiled_call_impl = call

    def begin(self):
        self.told, self.used = True, 0

    def forward(self, x, t, factor=1.0):
        return factor * torch.sin(x)

    def unconditional(self, conditioning):
        return {"factor": -0.5}


@pytest.mark.parametrize("guidance_scale", [None, 3.0])
def test_runs_of_a_model_with_graphs_of_its_own(monkeypatch, guidance_scale):
    """Neither the calls of guidance nor the parts of a batch overwrite each other."""
    model, plan = OwnGraphs((2, 1, 3, 3)), DDIMSampler(NoiseSchedule.linear(), 3).plan()
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", model.begin)
    runs = Runs.from_seed(model, (1, 3, 3), 6, 0, torch.device("cpu"), guidance_scale=guidance_scale, batch_size=2)
    got = runs.run(plan)
    model._compiled_call_impl = None
    for state, expected in zip(got, runs.run(plan), strict=True):
        assert torch.equal(state.x_t, expected.x_t)


class Conditional(nn.Module):
    """Another mixture for each label, and none."""

    prediction_type = "epsilon"

    def __init__(self):
        super().__init__()
        self.of = nn.ModuleList([ClosedForm(LINEAR, means=(m, m + 0.5)) for m in (-1.0, 0.0, 1.0)])

    def forward(self, x, t, class_labels):
        outputs = torch.stack([model(x, t) for model in self.of])
        return outputs[class_labels, torch.arange(len(x))]

    def unconditional(self, conditioning):
        return {"class_labels": torch.full_like(conditioning["class_labels"], 2)}


def test_runs_are_the_samplers():
    """With classes, guidance and parts of a batch: state for state."""
    model, options = Conditional(), dict(order=2)
    for scale in (None, 1.7):
        runs = Runs.from_seed(
            model, (1,), 7, 3, CPU, conditioning=EveryClass(2).rows(0, 7), guidance_scale=scale, batch_size=3
        )
        sampler = DDIMSampler(LINEAR, 6, **options)
        states = runs.run(sampler.plan(model))
        expected = sampler.sample(
            model, (7, 1), seed=3, conditioning=EveryClass(2).rows(0, 7), guidance_scale=scale, return_trajectory=True
        )
        for state, x_t in zip(states, expected.x_t, strict=True):
            torch.testing.assert_close(state.x_t, x_t, rtol=1e-5, atol=1e-6)
        for state, x0 in zip(states[1:], expected.x0, strict=True):
            torch.testing.assert_close(state.x0_last, x0, rtol=1e-5, atol=1e-6)
        # From the middle on: the same.
        again = runs.run(sampler.plan(model), 4, states)
        assert all(torch.equal(a.x_t, b.x_t) for a, b in zip(again, states, strict=True))


def test_guidance_in_one_batch_is_that_of_two_calls():
    runs = Runs.from_seed(Conditional(), (1,), 5, 3, CPU, conditioning=EveryClass(2).rows(0, 5), guidance_scale=1.7)
    (step,) = DDIMSampler(LINEAR, timesteps=[500]).plan(runs.model).steps
    expected = runs.predict(runs.start, step)
    runs.model.batches_guidance = True
    torch.testing.assert_close(runs.predict(runs.start, step), expected)


@pytest.mark.parametrize("order", [1, 2])
def test_costs_are_those_of_steps_taken_one_by_one(order):
    """The table against its definition, in float64."""
    model = ClosedForm(LINEAR)
    candidates = (999, 700, 300, 50)
    runs = Runs.from_seed(model, (1,), 16, 0, CPU)
    many = DDIMSampler(LINEAR, timesteps=sorted({*range(0, 1000, 10), *candidates}, reverse=True), order=2).plan(model)
    along = reference(runs, many, candidates)
    costs = cost_table(along, DDIMSampler(LINEAR, timesteps=candidates, order=order).plan(model))
    assert costs.shape == ((4, 5) if order == 1 else (5, 4, 5))
    bars = [LINEAR.alpha_bar(t) for t in candidates] + [1.0]
    x = [x_t.double().numpy() for x_t in along.x_t]
    x0 = [v.double().numpy() for v in along.x0]
    lambdas = [0.5 * math.log(a / (1 - a)) if a < 1 else math.inf for a in bars]
    for i in range(4):
        for j in range(i + 1, 5):
            for before in [None, *range(i)] if order == 2 else [None]:
                d = x0[i]
                if before is not None and j < 4:
                    r = (lambdas[i] - lambdas[before]) / (lambdas[j] - lambdas[i])
                    d = d + (d - x0[before]) / (2 * r)
                eps = (x[i] - math.sqrt(bars[i]) * d) / math.sqrt(1 - bars[i])
                landed = math.sqrt(bars[j]) * d + math.sqrt(1 - bars[j]) * eps
                expected = np.sqrt(((landed - x[j]) ** 2).mean(1)).mean() / math.sqrt(bars[j])
                found = costs[i, j] if order == 1 else costs[4 if before is None else before, i, j]
                assert found == pytest.approx(expected, rel=1e-3, abs=3e-6 / math.sqrt(bars[j]))
    impossible = np.isinf(costs)
    assert impossible[..., 2, 1].all()
    assert impossible[..., 1, 1].all()
    if order == 2:
        assert impossible[2, 1].all()


def refinement(budget, start, model_timesteps=()):
    model = ClosedForm(LINEAR)
    runs = Runs.from_seed(model, (1,), 32, 0, CPU)

    def plan_of(candidate):
        return DDIMSampler(LINEAR, timesteps=candidate.timesteps, model_timesteps=candidate.model_timesteps).plan(model)

    converged = runs.run(plan_of(Candidate(tuple(range(999, -1, -2)))))[-1].x_t
    found = Refinement(runs, plan_of, converged, 1000, budget)
    found.offer(Candidate(start, model_timesteps))
    return found


def test_refinement_never_gets_worse_and_ends_where_no_neighbour_is_better():
    found = refinement(10**6, (999, 600, 300, 100))
    began = found.distance
    found.refine()
    assert found.distance < 0.8 * began
    assert found.best.is_one_list
    for moved in neighbours(found.best.timesteps):
        inside = min(moved) >= 0 and max(moved) < 1000 and list(moved) == sorted(set(moved), reverse=True)
        assert not inside or found.tried[Candidate(moved)] >= found.distance


def neighbours(values):
    for k in range(len(values)):
        for towards in (-1, 1):
            yield (*values[:k], values[k] + towards, *values[k + 1 :])


def test_model_timesteps_make_it_better_still():
    found = refinement(10**6, (999, 600, 300, 100))
    found.refine()
    began = found.distance
    found.refine_model_timesteps()
    assert found.distance < 0.8 * began
    best = found.best
    assert best.model_timesteps != best.timesteps
    for moved in neighbours(best.model_timesteps):
        assert (
            not 0 <= min(moved) <= max(moved) < 1000 or found.tried[Candidate(best.timesteps, moved)] >= found.distance
        )


@pytest.mark.parametrize(
    ("other", "first"),
    [
        (Candidate((900, 500, 100)), 3),
        (Candidate((900, 500, 90)), 1),  # the step that goes there changes, too
        (Candidate((800, 500, 100)), 0),
        (Candidate((900, 500, 100), (900, 500, 90)), 2),
        (Candidate((900, 500, 100), (900, 490, 100)), 1),
        (Candidate((900, 500)), 1),
        (Candidate((900, 500, 100, 50)), 2),
    ],
)
def test_where_candidates_differ_first(other, first):
    one = Candidate((900, 500, 100))
    assert one.first_difference(other) == other.first_difference(one) == first


def test_a_candidate_is_said_in_one_way():
    assert Candidate((900, 500), (900, 500)) == Candidate((900, 500))
    assert Candidate((900, 500)).model_timesteps == (900, 500)
    assert Candidate((900, 500), (900, 400)).model_timesteps == (900, 400)


def test_refinement_keeps_to_its_budget():
    found = refinement(4, (999, 600, 300, 100))
    assert found.spent == 4
    found.budget = 25
    found.refine()
    assert found.spent <= 25
    found.budget = 40
    found.refine_model_timesteps()
    assert found.spent <= 40


def test_a_run_that_goes_on_from_another_is_the_same_as_a_whole_one():
    found = refinement(10**6, (999, 600, 300, 100))
    for start, given in (((999, 600, 300, 50), ()), ((999, 600, 300, 100), (999, 600, 310, 90))):
        found.offer(Candidate(start, given))
        whole = refinement(10**6, start, given)
        assert found.tried[Candidate(start, given)] == whole.distance


def test_a_state_is_left_as_it_was():
    model = ClosedForm(LINEAR)
    runs = Runs.from_seed(model, (1,), 4, 0, CPU)
    plan = DDIMSampler(LINEAR, 3, order=2).plan(model)
    first = after(State(runs.start), plan.steps[0], runs.predict(runs.start, plan.steps[0]), 2)
    kept = first.x0_last.clone(), first.x_t.clone()
    after(first, plan.steps[1], runs.predict(first.x_t, plan.steps[1]), 2)
    assert torch.equal(first.x0_last, kept[0])
    assert torch.equal(first.x_t, kept[1])


@pytest.mark.parametrize("count", [1, 2, 24, 1000])
def test_candidates_are_distinct_and_reach_both_ends(count):
    candidates = search(candidates=count, num_inference_steps=1).candidate_timesteps
    assert len(candidates) == count
    assert list(candidates) == sorted(set(candidates), reverse=True)
    assert candidates[0] == 999
    assert set(candidates) <= set(search(candidates=count, num_inference_steps=1).reference_timesteps)


def test_closed_forms_have_as_many_steps():
    assert {len(form.timesteps) for form in search().closed_forms().values()} == {5}
    assert search().closed_forms()["log_snr"] == Candidate(select_timesteps(5, 1000, "log_snr", schedule=LINEAR))


class GaussianMixtureFlow(nn.Module):
    """The velocity of a mixture of two normals on flow matching's path, exactly; the model is told 1000 t."""

    prediction_type = "flow"

    def forward(self, x, t):
        t = t.double().view(-1, 1) / 1000
        alpha, sigma, y = 1 - t, t, x.double()
        means, spread = torch.tensor([-1.0, 0.7], dtype=torch.float64), 0.1
        variance = (alpha * spread) ** 2 + sigma**2
        share = torch.softmax(-((y - alpha * means) ** 2) / (2 * variance), dim=1)
        x0 = (share * (means + alpha * spread**2 / variance * (y - alpha * means))).sum(1, keepdim=True)
        # (y - alpha x0) / sigma - x0, without the division.
        eps = (share * sigma / variance * (y - alpha * means)).sum(1, keepdim=True)
        return (eps - x0).to(x.dtype)


@pytest.mark.parametrize("order", [1, 2])
def test_in_continuous_time(order, tmp_path):
    schedule = FlowSchedule(shift=2.0, time_scale=1000.0)
    options = dict(order=order, count=48, refine_count=48, held_out=48, refine_runs=30, candidates=20, seed=5)
    found = search_timesteps(Search(GaussianMixtureFlow(), schedule, (1,), num_inference_steps=5, **options))
    closed = [score for score in found.scores if score.name in CONTINUOUS_SPACINGS]
    assert len(closed) == len(CONTINUOUS_SPACINGS)
    best = found.score("searched")
    assert best.held_out < 0.9 * min(score.held_out for score in closed)
    found.best.write(tmp_path / "found.json")
    again = read_timesteps(tmp_path / "found.json")
    assert again.num_train_timesteps is None
    assert json.loads((tmp_path / "found.json").read_text())["version"] == 3
    # What the list says of itself is so, with any shift: the times are the list's own.
    sampler = DDIMSampler(FlowSchedule(time_scale=1000.0), timesteps=tmp_path / "found.json")
    assert sampler.timesteps == found.timesteps
    assert sampler.order == order
    assert 0 < sampler.timesteps[-1] < sampler.timesteps[0] <= 1
    held_out = again.provenance["seeds"]["held_out"]
    got = sampler.sample(GaussianMixtureFlow(), (48, 1), seed=held_out)
    many = DDIMSampler(schedule, 1000, order=2, timestep_spacing="log_snr")
    converged = many.sample(GaussianMixtureFlow(), (48, 1), seed=held_out)
    assert sample_distances(got, converged).mean().item() == pytest.approx(best.held_out, rel=0.05, abs=5e-4)
    with pytest.raises(ValueError, match="times of another path in continuous time, got a schedule with 1000 training"):
        DDIMSampler(LINEAR, timesteps=again)
    with pytest.raises(ValueError, match="got a schedule with times of another path in continuous time: search again"):
        DDIMSampler(VPSchedule(), timesteps=again)


def test_the_residual_of_eps_on_any_path():
    """Of normal data N(0, s^2), the exact model leaves alpha^2 s^2 / (alpha^2 s^2 + sigma^2) of the variance of eps."""

    class Normal(nn.Module):
        prediction_type = "flow"

        def forward(self, x, t):
            alpha, sigma = 1 - t.view(-1, 1), t.view(-1, 1)
            total = (0.5 * alpha) ** 2 + sigma**2
            return x * (sigma - 0.25 * alpha) / total

    plan = DDIMSampler(FlowSchedule(), timesteps=[1.0, 0.6, 0.2]).plan(Normal())
    runs = Runs.from_seed(Normal(), (1,), 4000, 0, CPU)
    x0 = 0.5 * torch.randn(4000, 1, generator=torch.Generator().manual_seed(1))
    expected = [(0.5 * (1 - t)) ** 2 / ((0.5 * (1 - t)) ** 2 + t**2) for t in (1.0, 0.6, 0.2)]
    assert measure_eps_residual(runs, plan, x0) == pytest.approx(expected, abs=0.03)
