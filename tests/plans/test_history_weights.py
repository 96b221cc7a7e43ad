"""Weights of earlier predictions: consistent whatever they are, the textbook's where they are the
textbook's, and whole solvers in files."""

import json
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddim_fast import DDIMSampler, FlowSchedule, NoiseSchedule
from ddim_fast.generation.settings import plan_settings
from ddim_fast.plans.files import TimestepList, read_timesteps
from ddim_fast.plans.plan import SamplingPlan
from ddim_fast.plans.rows import rows_of_plan
from ddim_fast.tradeoff import Cell, ClosedForm, grid

LINEAR = NoiseSchedule.linear()
VISITED = (999, 700, 420, 90)
WEIGHTS = ((0.0, 0.0), (-0.3, 0.0), (-0.5, 0.125), (0.2, -0.1))


def fitted(weights=WEIGHTS, prediction_type="v_prediction", schedule=LINEAR, **more):
    plan = DDIMSampler(schedule, timesteps=VISITED, history_weights=weights, prediction_type=prediction_type).plan()
    total = schedule.num_train_timesteps
    fields = {"order": plan.order, "coefficients": rows_of_plan(plan), "prediction_type": prediction_type, **more}
    return TimestepList(VISITED, total, schedule.digest, **fields)


def levels():
    bars = [LINEAR.alpha_bar(t) for t in VISITED] + [1.0]
    return [(math.sqrt(bar), math.sqrt(1 - bar)) for bar in bars]


MODEL_OUTPUT = {  # of constant x0 and eps, at a level
    "epsilon": lambda alpha, sigma, x0, eps: eps,
    "sample": lambda alpha, sigma, x0, eps: x0,
    "v_prediction": lambda alpha, sigma, x0, eps: alpha * eps - sigma * x0,
}
WEIGHT = st.floats(-2, 2)


@pytest.mark.parametrize("prediction_type", MODEL_OUTPUT)
@settings(max_examples=25, deadline=None)
@given(weights=st.tuples(*[WEIGHT] * 5), x0=st.floats(-1, 1), eps=st.floats(-3, 3))
def test_where_x0_and_eps_stay_the_same_every_step_is_exact(prediction_type, weights, x0, eps):
    """By the rows alone, in float64: data that is one point is sampled exactly, whatever the
    weights."""
    pairs = ((0, 0), (weights[0], 0), weights[1:3], weights[3:5])
    plan = SamplingPlan(LINEAR, VISITED, prediction_type, order=3, history_weights=pairs)
    at = levels()
    x, room = at[0][0] * x0 + at[0][1] * eps, 0.0
    for k, (a, b, last, last_2) in enumerate(rows_of_plan(plan)):
        m = MODEL_OUTPUT[prediction_type](*at[k], x0, eps)
        x = a * x + b * m + last * x0 + last_2 * x0
        room = abs(a) * room + 100 * np.finfo(float).eps * (1 + abs(a) + abs(b) + abs(last) + abs(last_2))
        assert x == pytest.approx(at[k + 1][0] * x0 + at[k + 1][1] * eps, abs=room)


@pytest.mark.parametrize("order", [2, 3])
def test_the_textbooks_rows_are_of_this_form(order):
    textbook = SamplingPlan(LINEAR, (999, 800, 600, 400, 200), order=order)
    weights = [(step.coefficients.prev_history, step.coefficients.prev_history_2) for step in textbook.steps]
    assert any(last_2 for _, last_2 in weights) == (order == 3)
    ours = SamplingPlan(LINEAR, (999, 800, 600, 400, 200), order=order, history_weights=tuple(weights))
    for step, other in zip(ours.steps, textbook.steps, strict=True):
        assert step.coefficients.columns == pytest.approx(other.coefficients.columns, rel=1e-12, abs=1e-15)


def test_a_file_is_all_that_a_sampler_needs(tmp_path):
    """Its rows alone, in a loop of four lines in float64, give the sampler's samples."""
    model = ClosedForm(LINEAR)
    fitted(prediction_type="epsilon", model_timesteps=(999, 650, 400, 60)).write(tmp_path / "four.json")
    content = json.loads((tmp_path / "four.json").read_text())
    assert (content["version"], content["order"], content["prediction_type"]) == (4, 3, "epsilon")
    x_T = torch.randn(6, 1, generator=torch.Generator().manual_seed(0))
    x, last, last_2 = x_T.double(), torch.zeros(6, 1).double(), torch.zeros(6, 1).double()
    for t, told, (a, b, h, h_2) in zip(
        content["timesteps"], content["model_timesteps"], content["coefficients"], strict=True
    ):
        m = model(x, torch.tensor([told]))
        bar = LINEAR.alpha_bar(t)
        x, last, last_2 = a * x + b * m + h * last + h_2 * last_2, (x - math.sqrt(1 - bar) * m) / math.sqrt(bar), last
    sampler = DDIMSampler(LINEAR, timesteps=tmp_path / "four.json")
    assert (sampler.order, sampler.history_weights) == (3, WEIGHTS)
    got = sampler.sample(model, x_T=x_T)
    torch.testing.assert_close(got.double(), x, rtol=0, atol=2e-5)
    assert not torch.allclose(got, DDIMSampler(LINEAR, timesteps=VISITED, order=2).sample(model, x_T=x_T), atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(weights=st.tuples(*[WEIGHT] * 5))
def test_round_trip(tmp_path_factory, weights):
    path = tmp_path_factory.getbasetemp() / "solver.json"
    found = fitted(((0, 0), (weights[0], 0), weights[1:3], weights[3:5]), provenance={"seed": 1})
    found.write(path)
    assert read_timesteps(path) == found
    assert DDIMSampler(LINEAR, timesteps=path).plan() == DDIMSampler(LINEAR, timesteps=found).plan()


def test_an_order_asks_for_the_textbooks_steps():
    found = fitted()
    for order in (1, 2):
        sampler = DDIMSampler(LINEAR, timesteps=found, order=order)
        assert sampler.history_weights is None
        assert sampler.plan() == DDIMSampler(LINEAR, timesteps=VISITED, order=order).plan()
    assert DDIMSampler(LINEAR, timesteps=found).replace(order=1).plan().order == 1


def test_a_sampler_with_weights_is_a_value():
    sampler = DDIMSampler(LINEAR, timesteps=fitted())
    assert pickle.loads(pickle.dumps(sampler)) == sampler != DDIMSampler(LINEAR, timesteps=fitted(), order=2)
    assert sampler == DDIMSampler(LINEAR, timesteps=VISITED, history_weights=np.array(WEIGHTS))
    given_again = DDIMSampler(LINEAR, timesteps=VISITED, history_weights=[list(pair) for pair in WEIGHTS])
    assert hash(given_again) == hash(sampler)
    assert plan_settings(sampler, None)["history_weights"] == [list(pair) for pair in WEIGHTS]
    assert "history_weights" not in plan_settings(sampler.replace(order=2), None)


def test_the_last_steps_alone_read_what_there_is():
    last = DDIMSampler(LINEAR, timesteps=fitted()).last_steps(3)
    assert last.history_weights == ((0, 0), (-0.5, 0), (0.2, -0.1))
    assert DDIMSampler(LINEAR, timesteps=fitted()).last_steps(1).history_weights == ((0, 0),)
    x_t = torch.randn(2, 1, generator=torch.Generator().manual_seed(0))
    assert last.sample(ClosedForm(LINEAR), x_T=x_t).isfinite().all()


def test_another_model_or_schedule_is_refused():
    found = fitted()
    with pytest.raises(ValueError, match="prediction_type 'v_prediction', got 'epsilon': search again with this model"):
        DDIMSampler(LINEAR, timesteps=found).sample(ClosedForm(LINEAR), (2, 1), seed=0)
    with pytest.raises(ValueError, match="prediction_type 'v_prediction', got 'epsilon': search again with this model"):
        DDIMSampler(LINEAR, timesteps=found, prediction_type="epsilon")
    with pytest.raises(ValueError, match="those of one noise schedule, got another one of the same length: search"):
        DDIMSampler(NoiseSchedule.cosine(), timesteps=found)
    with pytest.raises(ValueError, match=r"consistent coefficients: .* step 3 from t = 90 needs"):
        DDIMSampler(LINEAR, timesteps=found, set_alpha_to_one=False)
    with pytest.raises(ValueError, match=r"they need eta = 0, got eta = 0.5 .*: use eta=0, or an order"):
        DDIMSampler(LINEAR, timesteps=found, eta=0.5)
    assert DDIMSampler(LINEAR, timesteps=found, eta=0.5, order=1).plan().eta == 0.5


def changed(content, k, j, by):
    content["coefficients"][k][j] += by


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: changed(c, 2, 0, 1e-6), "step 2 from t = 420 needs"),
        (lambda c: changed(c, 3, 1, -1e-6), "step 3 from t = 90 needs"),
        (lambda c: changed(c, 2, 3, 1e-6), "step 2 from t = 420 needs"),
        (lambda c: changed(c, 0, 2, 0.1), "must have weights of 0 for steps that were not taken"),
        (lambda c: changed(c, 1, 3, 0.1), "must have weights of 0 for steps that were not taken"),
        (lambda c: c["coefficients"].pop(), r"coefficients must be one row for each of the 4 timesteps, got 3"),
        (lambda c: c["coefficients"][1].append(0), r"coefficients\[1\] must be 4 numbers"),
        (lambda c: c.update(coefficients=[["a"] * 4] * 4), r"coefficients\[0\]\[0\] must be a"),
        (lambda c: c.update(coefficients=5), "coefficients must be a list of 4 numbers for each step"),
        (lambda c: c.update(prediction_type="noise"), "prediction_type must be one of"),
        (lambda c: c.update(prediction_type=None), "prediction_type must be one of"),
        (lambda c: c.update(coefficients=None), "prediction_type belongs to coefficients"),
        (lambda c: c.update(schedule_sha256=None), "schedule_digest must be given"),
        (
            lambda c: c.update(order=2),
            "order must be one more than the predictions that the coefficients read, 3, got 2",
        ),
        (lambda c: c.update(version=5), "must have version 1 or 2 or 3 or 4, got 5"),
    ],
)
def test_a_changed_file_is_refused(tmp_path, change, said):
    path = tmp_path / "solver.json"
    fitted().write(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=said) as caught:
        DDIMSampler(LINEAR, timesteps=path)
    assert str(path) in str(caught.value)


def test_infinite_coefficients_are_refused(tmp_path):
    path = tmp_path / "solver.json"
    fitted().write(path)
    path.write_text(path.read_text().replace("0.125", "NaN"))
    with pytest.raises(ValueError, match=r"coefficients\[2\]\[3\] must be a finite number, got nan|must be JSON"):
        read_timesteps(path)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (WEIGHTS[1:], r"history_weights must be one row for each of the 4 timesteps, got 3"),
        (((0, 0), (0, 1), (0, 0), (0, 0)), r"history_weights\[1\] must have weights of 0 for steps .* there are 1"),
        ([1, 2, 3, 4], r"history_weights\[0\] must be 2 numbers, got 1"),
        ("abcd", "history_weights must be a list of 2 numbers for each step, got 'abcd'"),
        (((0, 0), (math.inf, 0), (0, 0), (0, 0)), r"history_weights\[1\]\[0\] must be a finite number, got inf"),
    ],
)
def test_weights_of_the_callers_own_are_checked(weights, said):
    with pytest.raises((TypeError, ValueError), match=said):
        DDIMSampler(LINEAR, timesteps=VISITED, history_weights=weights)


def test_weights_and_an_order_contradict_each_other():
    with pytest.raises(ValueError, match=r"must not be given beside history_weights, got 2: leave one"):
        DDIMSampler(LINEAR, timesteps=VISITED, order=2, history_weights=WEIGHTS)
    with pytest.raises(ValueError, match=r"need an order of 3 at least, got order=2"):
        SamplingPlan(LINEAR, VISITED, order=2, history_weights=WEIGHTS)


def test_in_continuous_time(tmp_path):
    schedule = FlowSchedule()
    sampler = DDIMSampler(schedule, timesteps=(1.0, 0.7, 0.3), history_weights=((0, 0), (-0.2, 0), (0.1, 0.1)))
    plan = sampler.plan()
    found = TimestepList(
        plan.timesteps, None, schedule.digest, 3, coefficients=rows_of_plan(plan), prediction_type="flow"
    )
    found.write(tmp_path / "flow.json")
    assert DDIMSampler(schedule, timesteps=tmp_path / "flow.json").plan() == plan


def test_a_study_has_a_cell_for_them():
    cells = grid((), (), (0.0, 1.0), orders=(1, 2), searched={"mine": fitted()})
    (cell,) = (cell for cell in cells if cell.history_weights is not None)
    assert cell.key == "mine-4-eta0-fitted"
    assert len({cell.key for cell in cells}) == len(cells) == 4
    assert Cell.from_dict(json.loads(json.dumps(cell.as_dict()))) == cell
    assert cell.sampler(LINEAR, {}).history_weights == WEIGHTS
    assert not any(cell.history_weights for cell in grid((), (), (1.0,), searched={"mine": fitted()}))
