"""Other libraries' schedulers as contenders: configured, rehearsed, run and counted."""

import pytest
import torch
from torch import nn
from tradeoff.test_study import LINEAR, closed_form

from ddim_fast import EDMSchedule, FlowSchedule, NoiseSchedule
from ddim_fast.generation.conditioning import EveryClass
from ddim_fast.integrations.named_schedulers import named_scheduler
from ddim_fast.tradeoff import Cell, StudyDirectory, Subject, measure, other_cells, run_study, settings_of
from ddim_fast.tradeoff.measure import draw
from ddim_fast.tradeoff.others import OtherSampler
from ddim_fast.tradeoff.results import describe, eta_text, order_text, way_of

UNIPC = "diffusers:UniPCMultistepScheduler"
CPU = torch.device("cpu")


def rehearsed(text, path=LINEAR, prediction_type="epsilon", steps=5, **options):
    return OtherSampler(named_scheduler(text, "it"), path, prediction_type, None, options, steps).rehearse(
        (1, 4, 4), CPU
    )


@pytest.mark.parametrize(
    ("name", "calls", "draws_noise"),
    [
        ("DDIMScheduler", 6, False),
        ("DDPMScheduler", 6, True),
        ("DEISMultistepScheduler", 6, False),
        ("DPMSolverMultistepScheduler?use_karras_sigmas=true&solver_order=3", 6, False),
        ("DPMSolverMultistepScheduler?algorithm_type=sde-dpmsolver++", 6, True),
        ("EulerAncestralDiscreteScheduler", 6, True),
        ("EulerDiscreteScheduler", 6, False),
        ("HeunDiscreteScheduler", 11, False),
        ("KDPM2DiscreteScheduler", 11, False),
        ("LMSDiscreteScheduler", 6, False),
        ("PNDMScheduler", 15, False),
        ("PNDMScheduler?skip_prk_steps=true", 7, False),
        ("UniPCMultistepScheduler", 6, False),
    ],
)
@pytest.mark.parametrize("path", [LINEAR, NoiseSchedule.scaled_linear()], ids=lambda path: path.name)
def test_a_rehearsal_counts_the_calls_and_finds_noise(name, calls, draws_noise, path):
    found = rehearsed(f"diffusers:{name}", path, "v_prediction", steps=6)
    assert (found.calls, found.draws_noise) == (calls, draws_noise)


@pytest.mark.parametrize(
    ("text", "path", "prediction_type", "calls"),
    [
        (UNIPC, FlowSchedule(shift=3.0), "flow", 5),
        ("diffusers:FlowMatchHeunDiscreteScheduler", FlowSchedule(time_scale=1000.0), "flow", 9),
        ("diffusers:EDMDPMSolverMultistepScheduler", EDMSchedule(sigma_data=1.0), "edm", 5),
        ("diffusers:DDIMScheduler", LINEAR.rescale_zero_terminal_snr(), "v_prediction", 5),
    ],
)
def test_paths_that_schedulers_have(text, path, prediction_type, calls):
    found = rehearsed(text, path, prediction_type)
    assert found.calls == calls
    if isinstance(path, FlowSchedule):
        assert found.times[0] == pytest.approx(path.time_scale, rel=2e-3)


@pytest.mark.parametrize(
    ("text", "path", "prediction_type", "said"),
    [
        ("diffusers:FlowMatchEulerDiscreteScheduler", LINEAR, "epsilon", "it takes no trained_betas"),
        ("diffusers:DDIMScheduler", FlowSchedule(), "flow", "takes neither flow_shift nor shift"),
        ("diffusers:EDMEulerScheduler", EDMSchedule(preconditioned=True), "sample", "preconditions the raw network itself"),
        ("diffusers:IPNDMScheduler", LINEAR, "v_prediction", "takes predictions of epsilon only"),
        ("diffusers:IPNDMScheduler", LINEAR, "epsilon", "where all data are 0.5 its samples end"),
        ("diffusers:DDIMInverseScheduler", LINEAR, "epsilon", "where all data are 0.5 its samples end"),
        ("diffusers:CogVideoXDDIMScheduler", LINEAR, "epsilon", "where all data are 0.5 its samples end"),
        ("diffusers:PNDMScheduler", LINEAR, "sample", "got diffusers:PNDMScheduler with 5 steps: ValueError: prediction_type"),
        (f"{UNIPC}?solver_type=best", LINEAR, "epsilon", "cannot be made with .*NotImplementedError: best is not"),
        (f"{UNIPC}?solver_oder=3", LINEAR, "epsilon", "takes beta_end, .*, got 'solver_oder': leave it out or correct"),
        ("diffusers:BestScheduler", LINEAR, "epsilon", "it 'diffusers:BestScheduler' cannot be imported"),
    ],
)  # fmt: skip
def test_what_cannot_do_the_path_is_refused(text, path, prediction_type, said):
    with pytest.raises(ValueError, match=said):
        rehearsed(text, path, prediction_type)


def test_an_object_is_no_contender():
    with pytest.raises(
        TypeError, match="it must be a class with set_timesteps and step, got <built-in function sin> from math:sin"
    ):
        named_scheduler("math:sin", "it")


# --- Runs -------------------------------------------------------------------------------------------------------------


def test_one_that_is_ddim_gives_our_samples():
    """The same noise, timesteps, model calls and classes; ours is the oracle of the whole way."""
    subject = closed_form()
    ddim = "diffusers:DDIMScheduler?timestep_spacing=trailing"
    (cell,) = other_cells(subject, ddim, (8,))
    ours = Cell(8, "trailing")
    torch.testing.assert_close(draw(subject, cell), draw(subject, ours), rtol=0, atol=1e-4)
    (cell,) = other_cells(subject, "diffusers:EulerDiscreteScheduler?timestep_spacing=trailing", (8,))
    torch.testing.assert_close(draw(subject, cell), draw(subject, ours), rtol=0, atol=1e-3)
    edm = Subject(Raw(), EDMSchedule(sigma_max=40.0), (2, 4, 4), count=6, batch_size=4)
    (cell,) = other_cells(edm, "diffusers:EDMEulerScheduler", (6,))
    torch.testing.assert_close(draw(edm, cell), draw(edm, Cell(6, "karras")), rtol=1e-3, atol=1e-3)
    flow = Subject(Flow(), FlowSchedule(time_scale=1000.0), (2, 4, 4), count=6, batch_size=4)
    (cell,) = other_cells(flow, "diffusers:FlowMatchEulerDiscreteScheduler", (4,))
    torch.testing.assert_close(draw(flow, cell), draw(flow, Cell(4, "linspace")), rtol=0, atol=1e-4)


class Flow(nn.Module):
    """A velocity that bends trajectories, told times up to 1000."""

    prediction_type = "flow"

    def forward(self, x, t):
        assert t.dtype is torch.float32
        return 0.3 * x + (t.view(-1, 1, 1, 1) / 1000) ** 2


class Raw(nn.Module):
    """EDM's raw network, which is told log(sigma) / 4."""

    prediction_type = "edm"

    def forward(self, x, t):
        return 0.3 * x + 0.1 * t.view(-1, 1, 1, 1)


class Guided(nn.Module):
    """A model of eps that depends on the class, with guidance."""

    prediction_type = "epsilon"

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x, t, class_labels):
        self.calls += len(x)
        return 0.2 * x + class_labels.view(-1, 1, 1, 1) / 10

    def unconditional(self, conditioning):
        return {"class_labels": torch.full_like(conditioning["class_labels"], 9)}


def guided():
    return Subject(Guided(), LINEAR, (1, 4, 4), EveryClass(3), 2.5, count=10, batch_size=4, seed=5)


def test_guidance_and_classes_are_ours():
    subject = guided()
    (cell,) = other_cells(subject, "diffusers:DDIMScheduler", (6,))
    theirs, ours = measure(subject, cell), measure(subject, Cell(6, "leading"))
    torch.testing.assert_close(theirs[1], ours[1], rtol=0, atol=1e-4)
    assert theirs[0].calls == ours[0].calls == 12
    (heun,) = other_cells(subject, "diffusers:HeunDiscreteScheduler", (6,))
    subject.model.calls, told = 0, []
    found, _ = measure(subject, heun, progress=told.append)
    assert found.calls == 22
    assert subject.model.calls == sum(told) == subject.calls(heun) == 10 * 22


def test_random_schedulers_draw_from_seeded_generators():
    subject, before = guided(), torch.get_rng_state()
    for name in ("EulerAncestralDiscreteScheduler", "DDPMScheduler"):
        (cell,) = other_cells(subject, f"diffusers:{name}", (5,))
        assert not cell.deterministic
        one, two = draw(subject, cell), draw(subject, cell)
        assert torch.equal(one, two)
        subject.seed += 1
        assert not torch.equal(one, draw(subject, cell))
        result, _ = measure(subject, cell, converged=one)
        assert "distance" not in result.quality
    assert torch.equal(torch.get_rng_state(), before)


def test_timesteps_between_two_need_a_model_that_takes_them():
    subject = closed_form()  # it looks its noise levels up
    with pytest.raises(
        ValueError, match=r"whole timesteps, .* from diffusers:EulerDiscreteScheduler: add timestep_spacing"
    ):
        other_cells(subject, "diffusers:EulerDiscreteScheduler", (7,))
    other_cells(subject, "diffusers:EulerDiscreteScheduler?timestep_spacing=leading", (7,))
    other_cells(guided(), "diffusers:EulerDiscreteScheduler", (7,))


def test_a_cell_of_theirs_is_told_apart():
    (cell,) = other_cells(closed_form(), f"{UNIPC}?solver_order=3&predict_x0=true", (8,))
    assert describe(cell) == "8 steps of UniPCMultistep (solver_order=3, predict_x0=true)"
    assert way_of(cell) == ("UniPCMultistep (solver_order=3, predict_x0=true)",)
    assert eta_text(cell) == order_text(cell) == "theirs"
    assert not {"/", "?"} & {*cell.key}
    assert Cell.from_dict(cell.as_dict()) == cell


def test_a_study_refuses_one_that_was_not_rehearsed(tmp_path):
    subject = closed_form()
    directory = StudyDirectory(tmp_path, settings_of(subject))
    cells = [Cell(4, "UniPC", scheduler=UNIPC, calls=5)]
    with pytest.raises(
        ValueError, match=r"must have calls=4 and draws_noise=False, got \(5, False\): make it by other_cells"
    ):
        run_study(subject, cells, directory, "x")
