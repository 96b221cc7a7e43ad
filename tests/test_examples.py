"""The programs in examples/, in a short form."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import ddim_fast as df

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def width_of(path):
    with Image.open(path) as picture:
        return picture.width


ddpo = load("ddpo")
SHORT = ["--iterations", "2", "--batch-size", "4", "--held-out", "4", "--quiet"]


@pytest.fixture(autouse=True)
def own_threads():
    """One thread, as the programs set it; the number of the caller afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_ddpo_runs_as_its_page_says(tmp_path, capsys):
    runs = ddpo.main(["--seeds", "0", "1", *SHORT, "--out", str(tmp_path / "out")])
    for seed in (0, 1):
        written = json.loads((tmp_path / "out" / f"{seed}.json").read_text())
        assert [ddpo.Mean(*pair) for pair in written["rewards"]] == runs[seed]["rewards"]
        assert len(written["rewards"]) == 2
        for name in ("before", "after"):
            assert 0 <= written[name][0] <= 1
            assert width_of(tmp_path / "out" / f"{seed}-{name}.png") > 28
    assert runs[0]["before"] == runs[1]["before"]  # the same held-out noise, before any training
    assert runs[0]["rewards"] != runs[1]["rewards"]
    assert width_of(tmp_path / "out" / "reward.png") == 1050
    assert "2 iterations" in capsys.readouterr().out


def test_ddpo_refuses_a_class_that_is_none(tmp_path):
    with pytest.raises(SystemExit, match=r"--want must be one of T-shirt/top, .*got 'Bicycle'"):
        ddpo.main(["--want", "Bicycle", *SHORT, "--out", str(tmp_path)])


def test_an_update_makes_what_was_rewarded_more_likely():
    torch.manual_seed(0)
    model = df.models.load_shipped_model()
    sampler = df.DDIMSampler(model.schedule, len(ddpo.ETA), eta=ddpo.ETA)
    parameters = ddpo.add_low_rank(model, rank=4)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "parametrizations" not in name)
    rollout = sampler.rollout(model, (2, *model.sample_shape), seeds=torch.arange(2))
    assert torch.equal(torch.stack([rollout.log_prob(model, i) for i in range(len(rollout))]), rollout.log_probs)
    # Small enough that the objective is nearly linear.
    ddpo.update(rollout, model, torch.tensor([1.0, -1.0]), torch.optim.SGD(parameters, lr=1e-2))
    with torch.no_grad():
        change = torch.stack([rollout.log_prob(model, i) for i in range(len(rollout))]) - rollout.log_probs
    assert change[:, 0].sum() > change[:, 1].sum()
    assert change.abs().max() > 0
