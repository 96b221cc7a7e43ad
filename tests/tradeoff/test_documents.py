"""The page on trade-offs says what was measured."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch

from ddim_fast import NoiseSchedule
from ddim_fast.commands.tradeoff import tradeoff
from ddim_fast.integrations.named_schedulers import named_scheduler
from ddim_fast.plans.files import read_timesteps
from ddim_fast.tradeoff.others import OtherSampler

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tables():
    spec = importlib.util.spec_from_file_location("tradeoff_tables", ROOT / "tools/tradeoff_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_tables_are_those_of_the_studies(tables):
    text = tables.PAGE.read_text()
    assert tables.page_text(text) == text
    for name in tables.TABLES:
        changed = text.replace(f"<!-- {name}: begin -->\n", f"<!-- {name}: begin -->\nx", 1)
        assert changed != text
        assert tables.page_text(changed) == text
        with pytest.raises(ValueError, match=f"one pair of markers for {name}, got 0"):
            tables.page_text(text.replace(f"<!-- {name}: begin -->", ""))


def test_its_commands_are_understood_and_their_contenders_can_race():
    text = (ROOT / "docs/TRADEOFF.md").read_text().replace("\\\n", "")
    lines = [line.partition(" #")[0] for line in re.findall(r"^ddim-fast tradeoff (.*)$", text, re.M)]
    assert len(lines) >= 7
    raced = []
    for line in lines:
        given = tradeoff.make_context("tradeoff", shlex.split(line), resilient_parsing=True).params
        raced += given["against"]
        for path in given["files"]:
            read_timesteps(ROOT / path).for_schedule(NoiseSchedule.linear(), str(path))
    assert len({*raced}) == 3
    for name in raced:
        named = named_scheduler(name, "it")
        for steps in (5, 50):
            OtherSampler(named, NoiseSchedule.linear(), "v_prediction", None, {}, steps).rehearse(
                (1, 8, 8), torch.device("cpu")
            )
