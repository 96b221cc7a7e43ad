"""What a graph bakes in of a model: state that Python reads is seen, what cannot be vouched for is not captured, and pictures are eager's
whatever happens to the model between calls. Structures of peft, accelerate, torchao and step caches are restated here."""

import functools
import warnings
from collections import OrderedDict, deque
from dataclasses import dataclass, field

import pytest
import torch
from graph_models import CALLS, REFUSED, SWITCHES, Adapted, Base, Elsewhere, StepCache, Wrapped, opaque_weight, with_
from torch import nn

import ddim_fast as df
from ddim_fast.gpu_lab import Replay
from ddim_fast.sampling.capture import GraphCache
from ddim_fast.sampling.cuda_graphs import CaptureError
from ddim_fast.sampling.model_state import DoubtError, ModelState

SHAPE = (2, 3, 8, 8)
CPU = torch.device("cpu")


@pytest.fixture
def cache():
    return GraphCache(maxsize=8, backend=lambda device: Replay(), device_types=("cpu",))


def sample(model, cache, capture="auto", **options):
    s = df.DDIMSampler(df.NoiseSchedule.linear(), 4, graphs=cache)
    return s.sample(model, SHAPE, seed=0, capture=capture, **options)


def quietly(model, cache, capture="auto", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return sample(model, cache, capture, **options)


def check(model, cache, graphs):
    """Whether captured or not, the pictures are eager's."""
    assert torch.equal(quietly(model, cache), sample(model, cache, "off"))
    assert len(cache) == graphs


# --- seen: another value is another graph, the old value the old graph -----------------------------------------------------------


class Holder:
    factor = 1.0

    def __init__(self, value):
        self.value = value


class Doubled(Holder):
    factor = 2.0


@dataclass
class Config:
    scale: float = 1.0
    nested: dict = field(default_factory=lambda: {"deep": [1.0, {"er": 1.0}]})


class Seen(Base):
    def __init__(self):
        super().__init__()
        self.listed, self._hidden, self.sets, self.queue = [1.0], 1.0, {1.0}, deque([1.0])
        self.ordered = OrderedDict(first=1.0, second=2.0)
        self.by_name, self.pair = {"a": 1.0, "b": 0.0}, ([1.0], 2.0)
        self.config, self.holder = Config(), Holder([1.0])
        self.call = functools.partial(torch.mul, other=self.listed)
        self.function = double

    def gain(self):
        gain = self.listed[0] * self._hidden * min(self.sets) * self.queue[0] * self.by_name["a"] * self.pair[0][0]
        gain = gain * self.config.scale * self.config.nested["deep"][1]["er"] * self.holder.value[0]
        gain = gain * next(iter(self.ordered.values())) * self.holder.factor
        return self.function(gain) * type(self).of_class * (1.0 + ("b" in self.by_name))

    of_class = 1.0


def double(x):
    return 2 * x


def treble(x):
    return 3 * x


def renamed(d, old, new):
    d[new] = d.pop(old)


SEEN = {
    "an item of a list": (lambda m: m.listed.__setitem__(0, 2.0), lambda m: m.listed.__setitem__(0, 1.0)),
    "an underscore": (lambda m: setattr(m, "_hidden", 2.0), lambda m: setattr(m, "_hidden", 1.0)),
    "a set": (lambda m: (m.sets.clear(), m.sets.add(0.5)), lambda m: (m.sets.clear(), m.sets.add(1.0))),
    "a queue": (lambda m: m.queue.appendleft(0.5), lambda m: m.queue.popleft()),
    "an item of a dictionary": (lambda m: m.by_name.update(a=0.5), lambda m: m.by_name.update(a=1.0)),
    "the name of an item": (lambda m: renamed(m.by_name, "b", "c"), lambda m: renamed(m.by_name, "c", "b")),
    "a list in a tuple": (lambda m: m.pair[0].__setitem__(0, 0.5), lambda m: m.pair[0].__setitem__(0, 1.0)),
    "an object": (lambda m: setattr(m.config, "scale", 0.5), lambda m: setattr(m.config, "scale", 1.0)),
    "deep inside": (
        lambda m: m.config.nested["deep"][1].update(er=0.5),
        lambda m: m.config.nested["deep"][1].update(er=1.0),
    ),
    "a list of an object": (lambda m: m.holder.value.__setitem__(0, 3.0), lambda m: m.holder.value.__setitem__(0, 1.0)),
    "a function": (lambda m: setattr(m, "function", treble), lambda m: setattr(m, "function", double)),
    "an order": (lambda m: m.ordered.move_to_end("first"), lambda m: m.ordered.move_to_end("second")),
    "the class of an object": (
        lambda m: setattr(m.holder, "__class__", Doubled),
        lambda m: setattr(m.holder, "__class__", Holder),
    ),
    "a class": (lambda m: setattr(Seen, "of_class", 2.0), lambda m: setattr(Seen, "of_class", 1.0)),
}


@pytest.mark.parametrize("name", SEEN)
def test_state_of_python_is_seen_and_its_old_value_has_its_graph(cache, name):
    change, undo = SEEN[name]
    model = Seen()
    before = sample(model, cache)
    check(model, cache, graphs=1)
    change(model)
    try:
        assert not torch.equal(sample(model, cache), before)
        check(model, cache, graphs=2)
    finally:
        undo(model)
    check(model, cache, graphs=2)
    assert torch.equal(quietly(model, cache), before)


def test_a_state_is_known_at_a_glance_as_long_as_nothing_changes():
    model = Seen()
    state = ModelState(model)
    assert state.is_current()
    assert ModelState(model).key == state.key
    for change, undo in SEEN.values():
        change(model)
        try:
            assert not state.is_current()
            assert ModelState(model).key != state.key
        finally:
            undo(model)
        assert ModelState(model).key == state.key


def test_a_circle_of_objects_is_walked_once(cache):
    model = Seen()
    model.config.nested["model"] = model
    model.listed.append(model.listed)
    check(model, cache, graphs=1)


# --- adapters, as peft keeps them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capture", ["auto", "step", "loop"])
@pytest.mark.parametrize("name", SWITCHES)
def test_pictures_are_those_of_the_adapter_that_is_on(cache, name, capture):
    model = Base()
    model.conv = Adapted(model.conv)
    before = sample(model, cache, capture)
    SWITCHES[name](model.conv)
    got, expected = sample(model, cache, capture), sample(model, cache, "off")
    assert torch.equal(got, expected)
    assert not torch.equal(got, before)


# --- refused by "auto", once and with the reason ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*script_method. is deprecated:DeprecationWarning")  # Inductor's own
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_vouched_for_is_refused_once_with_the_reason(cache, name):
    make, reason = REFUSED[name]
    model = make()
    expected = sample(model, cache, "off")
    with pytest.warns(UserWarning, match=f"sampling without CUDA graphs: .*{reason}") as caught:
        assert torch.equal(sample(model, cache), expected)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    check(model, cache, graphs=0)


FOLLOWED = [name for name in REFUSED if name != "a wrapper of tensors"]  # which the stand-in cannot record


@pytest.mark.filterwarnings("ignore:.*script_method. is deprecated:DeprecationWarning")  # Inductor's own
@pytest.mark.parametrize("name", FOLLOWED)
def test_what_cannot_be_vouched_for_is_captured_where_it_is_asked_for(cache, name):
    torch.compiler.cudagraph_mark_step_begin()  # what Inductor warns of when it is imported, it warns of here
    model = REFUSED[name][0]()
    expected = sample(model, cache, "off")
    for _ in range(2):
        assert torch.equal(quietly(model, cache, "step"), expected)
    assert len(cache) == 1


def test_attributes_of_an_opaque_weight_are_seen():
    model = opaque_weight()
    state = ModelState(model)
    assert state.is_current()
    model.conv.weight.inner = model.conv.weight.inner * 2
    assert not state.is_current()
    assert ModelState(model).key != state.key


def test_what_is_vouched_for_again_is_captured(cache):
    model = with_("peft_config", {"default": None})()
    with pytest.warns(UserWarning, match="adapters of peft"):
        sample(model, cache)
    del model.peft_config
    check(model, cache, graphs=1)
    model.peft_config = {}
    check(model, cache, graphs=1)  # a doubt about a model that has a graph


def test_wrapped_weights_that_say_what_they_wrap_are_vouched_for_and_followed():
    model = Base()
    weight = model.conv.weight.detach()
    model.conv.weight = nn.Parameter(Wrapped(weight), requires_grad=False)
    state = ModelState(model, CPU)
    assert state.is_current()
    model.conv.weight.inner = weight * 2
    assert not state.is_current()
    assert ModelState(model, CPU).key != state.key


def test_weights_on_meta_are_refused_in_every_mode(cache):
    model = Base()
    model.unused = nn.Parameter(torch.empty(2, device="meta"))
    for mode in ("step", "loop"):
        with pytest.raises(DoubtError, match="unused is on meta, so its values come and go with each call"):
            sample(model, cache, mode)


def test_another_device_of_the_same_kind_is_another():
    state = ModelState(Base())
    with pytest.raises(DoubtError, match=r"conv.weight is on cpu, and the samples are on cuda:0"):
        state.vouch(torch.device("cuda", 0))


@pytest.mark.filterwarnings("ignore:.*script_method. is deprecated:DeprecationWarning")  # Inductor's own
def test_a_compiled_module_is_captured_unless_it_makes_graphs():
    for mode, doubt in ((None, None), ("reduce-overhead", "is compiled with CUDA graphs of its own")):
        wrapped, in_place = torch.compile(Base(), mode=mode), Base()
        in_place.compile(mode=mode)
        for model in (wrapped, in_place):
            state = ModelState(model)
            assert state.is_compiled
            assert (state.doubt or "").endswith(doubt or "")
            assert (state.doubt is None) == (doubt is None)
            assert state.is_current()
    assert ModelState(torch.compile(Base(), backend="eager")).doubt is not None


# --- calls that differ from one another ---------------------------------------------------------------------------------------------


class Schedules(Base):
    def gain(self):
        CALLS["n"] += 1
        return torch.ones(CALLS["n"] % 2 + 1).sum()


@pytest.mark.parametrize("interval", [2, 3, 100])
def test_a_step_cache_is_not_captured(cache, interval):
    with pytest.warns(UserWarning, match=r"got (kept|calls|interval) changed|got .* in one call and") as caught:
        got = sample(StepCache(interval), cache)
    assert len(caught) == 1
    assert len(cache) == 0
    for mode in ("step", "loop"):
        with pytest.raises(CaptureError, match="replays one call of the model for all, so each must do the same"):
            sample(StepCache(interval), cache, mode)
    assert torch.equal(got, sample(StepCache(interval), cache, "off"))


@pytest.mark.parametrize("kind", [Elsewhere, Schedules])
def test_operators_that_differ_between_calls_are_found(cache, kind):
    model = kind()
    with pytest.warns(UserWarning, match=r"got aten\..* with other shapes or numbers in the next call"):
        sample(model, cache)
    CALLS["n"] = 0
    got = quietly(model, cache)
    assert CALLS["n"] == 4  # it is not tried again
    CALLS["n"] = 0
    assert torch.equal(got, sample(model, cache, "off"))


class Completed(Base):
    """It completes itself in its first call, as many models do."""

    def __init__(self):
        super().__init__()
        self.table, self.calls = None, []

    def gain(self):
        if self.table is None:
            self.table, self.calls = torch.full((1,), 0.5), ["done"]
        return self.table


def test_a_model_that_completes_itself_is_captured_once(cache):
    model = Completed()
    for _ in range(3):
        check(model, cache, graphs=1)


def test_what_a_model_gets_in_its_first_call_is_vouched_for_too(cache):
    class Late(Base):
        def gain(self):
            self.random = getattr(self, "random", torch.Generator())
            return 1.0

    model = Late()
    with pytest.warns(UserWarning, match="random holds a torch._C.Generator"):
        sample(model, cache)
    assert len(cache) == 0


# --- graphs of the model's own ------------------------------------------------------------------------------------------------------


class GraphedModel(Base):
    """As torch.compile(mode="reduce-overhead") does it on a GPU: outputs are memory of a graph, which another step uses again. A step
    is a call, until somebody says where steps begin."""

    def __init__(self):
        super().__init__()
        self.pool, self.used, self.told = [torch.empty(SHAPE) for _ in range(2)], 0, False

        def call(*args, **kwargs):
            output = self._call_impl(*args, **kwargs)
            self.used = self.used + 1 if self.told else 1
            return self.pool[self.used - 1].copy_(output)

        call.get_compiler_config = lambda: {"triton.cudagraphs": True}
        self._compiled_call_impl = call

    def begin(self):
        self.told, self.used = True, 0

    def forward(self, x, t, scale=1.0):
        return scale * super().forward(x, t)


RUNS = {
    "sample": lambda s, model, **call: s.sample(model, SHAPE, seed=0, capture="off", **call),
    "invert": lambda s, model, **call: s.invert(model, torch.ones(SHAPE), **call),
    "sample_parallel": lambda s, model, **call: s.sample_parallel(model, SHAPE, seed=0, window=1, **call),
}


@pytest.mark.parametrize("run", RUNS)
def test_calls_of_guidance_do_not_overwrite_each_other_in_graphs_of_the_models_own(monkeypatch, run):
    model, s = GraphedModel(), df.DDIMSampler(df.NoiseSchedule.linear(), 4)
    call = dict(conditioning={"scale": 2.0}, unconditional_conditioning={"scale": 1.0}, guidance_scale=3.0)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", model.begin)
    got = RUNS[run](s, model, **call)
    model._compiled_call_impl = None
    assert torch.equal(got, RUNS[run](s, model, **call))
