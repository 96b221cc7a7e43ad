"""The fit of a whole solver, on data whose best model is known."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from ddim_fast import DDIMSampler, NoiseSchedule
from ddim_fast.models.metrics import sample_distances
from ddim_fast.plans.files import read_timesteps
from ddim_fast.search import FITTED, Search, search_timesteps
from ddim_fast.search.fit import ROW_RIDGE, Fit, Parameter, _least_squares
from ddim_fast.search.fitted import Checkpoint
from ddim_fast.search.refine import Candidate
from ddim_fast.search.runs import Runs
from ddim_fast.search.solver import Plans, Solver, weights_of_plan
from ddim_fast.tradeoff import ClosedForm

LINEAR = NoiseSchedule.linear()
CPU = torch.device("cpu")
VISITED = (999, 650, 350, 120, 20)


def search(model=None, **changes):
    options = dict(order=2, count=32, refine_count=96, held_out=96, refine_runs=10, candidates=16, seed=5)
    options |= dict(coefficients=True, fit_iterations=6)
    return Search(model or ClosedForm(LINEAR), LINEAR, (1,), **{"num_inference_steps": 5, **options, **changes})


def fit_of(model=None, count=64, **changes):
    wanted = search(model, refine_count=count, **changes)
    runs, unseen = (wanted.runs(count, seed, lambda calls: None) for seed in (5, 7))
    plans = Plans(wanted.plan_of, lambda candidate, weights: wanted.plan_of(candidate, history_weights=weights))
    validation = unseen, wanted.converged(unseen)
    return wanted, Fit(runs, plans, wanted.converged(runs), 1000, validation, wanted.model_timesteps, 6)


def test_a_fitted_solver_is_nearer_also_on_noise_it_has_not_seen(tmp_path):
    found = search_timesteps(search())
    fitted, before = found.score(FITTED), found.score("searched")
    assert found.fitted.gained
    assert fitted.held_out < 0.6 * before.held_out
    assert fitted.held_out < 1.5 * fitted.seen  # the noise of the fit is no part of the solver
    # What the file says of itself is so, by the public sampler.
    found.best.write(tmp_path / "five.json")
    again = read_timesteps(tmp_path / "five.json")
    assert again.order == 3
    assert again.prediction_type == "epsilon"
    assert again.provenance["fit"]["kept"]
    held_out = again.provenance["seeds"]["held_out"]
    got = DDIMSampler(LINEAR, timesteps=again).sample(ClosedForm(LINEAR), (96, 1), seed=held_out)
    many = DDIMSampler(LINEAR, timesteps=range(999, -1, -1), order=2).sample(ClosedForm(LINEAR), (96, 1), seed=held_out)
    assert sample_distances(got, many).mean().item() == pytest.approx(fitted.held_out, rel=0.1, abs=3e-4)


class OnePoint(nn.Module):
    """The exact model of data that is one point, the Gaussian of no spread."""

    prediction_type = "epsilon"

    def forward(self, x, t):
        bar = torch.tensor(LINEAR.alphas_cumprod)[t].view(-1, 1)
        return ((x.double() - bar.sqrt() * 0.4) / (1 - bar).sqrt()).to(x.dtype)


def test_where_the_textbook_is_exact_its_rows_are_found_again():
    found = search_timesteps(search(OnePoint()))
    assert not found.fitted.gained
    assert found.best.coefficients is None
    assert found.best.order == 2
    for pair in found.fitted.solver.deviations:
        assert pair == pytest.approx((0, 0), abs=0.05)
    assert found.score(FITTED).held_out < 1e-4


def test_row_by_row_is_the_solution_of_least_squares():
    draws = torch.Generator().manual_seed(0)
    towards = [torch.randn(20, 3, generator=draws) for _ in range(2)]
    error = 0.4 * towards[0] - 0.7 * towards[1] + 0.1 * torch.randn(20, 3, generator=draws)
    columns = np.stack([direction.double().numpy().ravel() for direction in towards], 1)
    ridge, start = ROW_RIDGE * np.square(columns).sum(0).mean(), np.array([-0.5, 0.1])
    # The ridge as further equations: sqrt(ridge) w = sqrt(ridge) start.
    matrix = np.concatenate([columns, np.sqrt(ridge) * np.eye(2)])
    right = np.concatenate([error.double().numpy().ravel(), np.sqrt(ridge) * start])
    wanted = np.linalg.lstsq(matrix, right, rcond=None)[0]
    assert _least_squares(towards, error, start) == pytest.approx(wanted, rel=1e-9)
    assert wanted == pytest.approx([0.4, -0.7], abs=0.05)
    assert _least_squares([], error, ()) == []
    assert _least_squares([torch.zeros(20, 3)] * 2, error, (-0.5, 0.1)) == [-0.5, 0.1]


def test_rows_lead_to_the_converged_trajectory():
    """Each fitted row ends nearer to it, from where the rows before it led, than a row of order 1,
    2 or 3."""
    wanted, fit = fit_of()
    candidate = Candidate(VISITED)
    converging = wanted.converging_plan(candidate)
    rows = fit.rows(candidate, converging, VISITED)
    ends = {}
    for t in VISITED[1:]:
        part = [u for u in converging.timesteps if u >= t]
        plan = DDIMSampler(LINEAR, timesteps=[*part[:-1], t], order=2).plan(wanted.model)
        ends[t] = fit.runs.run(plan)[-2].x_t
    states = fit.trace(rows).states
    distances = [sample_distances(states[k + 1].x_t, ends[t]).mean().item() for k, t in enumerate(VISITED[1:])]
    plan = fit.plans.of_order(candidate, 2)
    textbook = fit.runs.run(plan)
    others = [sample_distances(textbook[k + 1].x_t, ends[t]).mean().item() for k, t in enumerate(VISITED[1:])]
    assert distances[0] == pytest.approx(others[0])  # the first step has nothing to read
    assert all(ours < theirs for ours, theirs in zip(distances[1:], others[1:], strict=True))


@pytest.mark.parametrize(
    "parameter",
    [
        Parameter("weight", 1, 0),
        Parameter("weight", 3, 1),
        Parameter("weight", 4, 0),
        Parameter("timestep", 0),
        Parameter("timestep", 2),
        Parameter("timestep", 4),
        Parameter("model timestep", 0),
        Parameter("model timestep", 3),
    ],
    ids=str,
)
def test_slopes_are_differences_of_whole_runs(parameter):
    """By two runs of the public sampler; a slope that reuses a state which has changed differs."""
    wanted, fit = fit_of(count=16)
    solver = Solver(Candidate(VISITED, (990, 640, 340, 110, 30)), ((0, 0), (0.1, 0), (0.2, 0.1), (0, -0.1), (0.3, 0)))
    trace = fit.trace(solver)
    slope = fit._slope(solver, trace, parameter)
    change = {"weight": 0.02}.get(parameter.kind) or 1
    found = next(
        c for c in (change, *range(1, 40), *range(-1, -40, -1))
        if torch.allclose((_ends(wanted, fit, fit._moved(solver, {parameter: c})) - trace.result) / c, slope, atol=2e-4 / abs(c))
    )  # fmt: skip
    assert found == change or parameter.kind != "weight"
    assert slope.abs().max() > 0


def _ends(wanted, fit, solver):
    plan = fit.plans.of(solver)
    sampler = DDIMSampler(
        LINEAR,
        timesteps=solver.candidate.timesteps,
        model_timesteps=solver.candidate.model_timesteps,
        history_weights=plan.history_weights,
    )
    return sampler.sample(wanted.model, x_T=fit.runs.start)


def test_solvers_of_the_textbook():
    _, fit = fit_of()
    candidate = Candidate(VISITED)
    assert fit.plans.textbook(candidate, 2).deviations == ((0, 0),) * 5
    for order in (2, 3):
        ours, theirs = fit.plans.of(fit.plans.textbook(candidate, order)), fit.plans.of_order(candidate, order)
        for one, other in zip(weights_of_plan(ours), weights_of_plan(theirs), strict=True):
            assert one == pytest.approx(other, abs=1e-12)


def test_moves_stay_in_order_and_in_range():
    _, fit = fit_of()
    solver = fit.plans.textbook(Candidate((999, 500, 3, 2, 1)), 2)
    moved = fit._moved(solver, {Parameter("timestep", k): -900.0 for k in range(5)})
    assert list(moved.candidate.timesteps) == sorted(set(moved.candidate.timesteps), reverse=True)
    assert min(moved.candidate.timesteps) >= 0
    up = fit._moved(solver, {Parameter(kind, k): 900.0 for k in range(5) for kind in ("timestep", "model timestep")})
    assert max(up.candidate.timesteps) <= 999
    assert max(up.candidate.model_timesteps) <= 999
    assert fit._moved(solver, {}) == solver


def test_an_interrupted_search_goes_on_where_it_was(tmp_path):
    path, told = tmp_path / "five.json.partial", []

    class StoppedError(Exception):
        pass

    def stop_at(word, number):
        def say(text):
            told.append(text)
            if sum(word in line for line in told) == number:
                raise StoppedError

        return say

    all_calls, calls = [], []
    whole = search_timesteps(search(), all_calls.append)
    for word in ("iteration 1", "iteration 3"):
        told.clear()
        with pytest.raises(StoppedError):
            search_timesteps(search(), say=stop_at(word, 1), checkpoint=path)
        assert path.exists()
    with pytest.raises(ValueError, match=r"five\.json\.partial must be of this search .*: remove it"):
        search_timesteps(search(seed=6), checkpoint=path)
    again = search_timesteps(search(), calls.append, checkpoint=path)
    assert not path.exists()
    assert again.best.coefficients == whole.best.coefficients
    assert again.scores == whole.scores
    assert sum(calls) < 0.8 * sum(all_calls)


@pytest.mark.parametrize("text", ["[1]", "{}", '{"format": "ddim_fast search", "search": "other"}'])
def test_a_file_of_something_else_is_not_resumed_from(tmp_path, text):
    path = tmp_path / "partial"
    path.write_text(text)
    with pytest.raises(ValueError, match="must be of this search"):
        Checkpoint(path, search())


@pytest.mark.parametrize("model_timesteps", [True, False])
def test_progress_is_told_of_every_call(model_timesteps):
    told, seen = [], []

    class Counted(ClosedForm):
        def forward(self, x, t):
            seen.append(len(x))
            return super().forward(x, t)

    wanted = search(Counted(LINEAR), refine_runs=2, fit_iterations=2, model_timesteps=model_timesteps)
    found = search_timesteps(wanted, told.append)
    assert sum(told) == sum(seen) <= wanted.calls()
    assert (found.best.model_timesteps is None) == (not model_timesteps)


def test_a_search_that_is_not_asked_for_coefficients_has_none():
    found = search_timesteps(search(coefficients=False))
    assert found.fitted is None
    assert found.best.coefficients is None
    assert FITTED not in {score.name for score in found.scores}


def test_more_histories_than_steps():
    for steps in (1, 2):
        found = search_timesteps(search(num_inference_steps=steps, refine_runs=2, fit_iterations=1))
        assert len(found.timesteps) == steps
        assert found.score(FITTED).held_out <= 1.05 * found.score("searched").held_out
    json.dumps(found.best.provenance)


def test_runs_of_order_3_are_the_samplers():
    plan = DDIMSampler(LINEAR, 8, order=3, timestep_spacing="log_snr").plan(ClosedForm(LINEAR))
    assert any(step.coefficients.reads_history_2 for step in plan.steps)
    runs = Runs.from_seed(ClosedForm(LINEAR), (1,), 5, 3, CPU)
    sampler = DDIMSampler(LINEAR, 8, order=3, timestep_spacing="log_snr")
    torch.testing.assert_close(runs.run(plan)[-1].x_t, sampler.sample(ClosedForm(LINEAR), (5, 1), seed=3))
