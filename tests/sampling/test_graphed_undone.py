"""A module whose capture is refused is as if nobody had tried, and warming up leaves no trace."""

import collections
import warnings

import pytest
import torch
from graph_models import Base, Logged, StepCache
from graphed import cache_of, graphed, same, x_of
from torch import nn

from ddim_fast.sampling import contents


class Counts(Base):
    """It changes in each call, in one of the ways that there are."""

    def __init__(self, how):
        super().__init__()
        self.how, self.number, self.items, self.queue = how, 0, [], collections.deque(maxlen=2)
        self.members, self.entries, self.latest = set(), collections.OrderedDict(a=1, b=2), None
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("counts", torch.zeros(1).expand(3))

    def forward(self, x):
        self.number += 1
        self.latest = x * self.number
        self.items.append(self.number)
        self.queue.append(self.number)
        self.members.add(self.number)
        self.entries.move_to_end("a")
        self.entries[f"call {self.number}"] = self.entries.pop("b", 0)
        self.count += 1
        self.counts[:1] += 1
        if self.how == "waits" and self.count.item() < 0:
            return x
        return self.latest * self.count + self.counts[2] + len(self.items) + len(self.entries)


def held(module):
    parts = module.number, module.items, module.queue, module.members, list(module.entries.items())
    return *parts, module.latest, module.count, module.counts


@pytest.mark.parametrize("vouched", [False, True])
@pytest.mark.parametrize("how", ["changes", "waits"])
def test_a_module_that_is_refused_is_as_if_nobody_had_tried(how, vouched):
    module, alone = Counts(how), Counts(how)
    graphed(module, vouched=vouched)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(3):
            same(module(x_of(seed)), alone(x_of(seed)))
            same(held(module), held(alone))
    assert module.forward.stats().graphs == 0


class Numbered(Base):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return self.conv(x)


def test_a_graph_of_a_module_that_changed_meanwhile_is_freed():
    backend, module = Logged(), Numbered()
    graphed(module, cache_of(backend))
    with torch.no_grad(), pytest.warns(UserWarning, match="calls changed"):
        module(x_of())
    assert (backend.log, module.calls) == (["reset"], 1)


@pytest.mark.parametrize("interval", [2, 3, 4, 5])
def test_a_step_cache_is_not_moved_by_calls_that_were_tried(interval):
    module, alone = StepCache(interval), StepCache(interval)
    graphed(module)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(6):
            same(module(x_of(seed), None), alone(x_of(seed), None))


def test_batch_statistics_move_once_a_call():
    module, alone = nn.Sequential(nn.BatchNorm2d(3)), nn.Sequential(nn.BatchNorm2d(3))
    forward = graphed(module)
    with torch.no_grad(), pytest.warns(UserWarning, match=r"0\.running_mean is written to in each call"):
        same(module(x_of()), alone(x_of()))
    same(module.state_dict(), alone.state_dict())
    forward.restore()
    module, alone = nn.Sequential(nn.BatchNorm2d(3)), nn.Sequential(nn.BatchNorm2d(3))
    forward = graphed(module, vouched=True)  # captured, and warming up leaves no trace
    for seed in range(3):
        with torch.no_grad():
            same(module(x_of(seed)), alone(x_of(seed)))
        same(module.state_dict(), alone.state_dict())
    assert forward.stats().graphs == 1


class Fitted(Base):
    """Its first call fits it to its argument."""

    def __init__(self):
        super().__init__()
        self.scale, self.is_fitted = nn.Parameter(torch.ones(()), requires_grad=False), False
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, x):
        if not self.is_fitted:
            self.scale.copy_(x.std())
            self.shift.copy_(x.mean())
            self.is_fitted = True
        return (x - self.shift) / self.scale


def test_what_the_first_call_makes_of_a_module_stays():
    module, alone = Fitted(), Fitted()
    graphed(module)
    with torch.no_grad():
        for seed in range(3):
            same(module(x_of(seed)), alone(x_of(seed)))
    assert module.forward.stats().graphs == 1


def test_of_the_memory_of_a_module_so_much_is_put_back_smallest_first(monkeypatch):
    small, large, weight = torch.zeros(2), torch.zeros(4), nn.Parameter(torch.zeros(1), requires_grad=False)
    monkeypatch.setattr(contents, "MOST_BYTES", small.nbytes + large.nbytes - 1)
    before = contents.Contents(
        [],
        [],
        [],
        [large, weight, small, small[1:], torch.zeros(0), torch.zeros(0).to_sparse(), torch.zeros(2, device="meta")],
    )
    for tensor in (small, large, weight):
        tensor += 1
    before.put_back()
    assert (small.sum(), large.sum(), weight.sum()) == (0, 4, 1)
