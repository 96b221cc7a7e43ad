"""A snapshot sees every change of what containers hold and where tensors are, in C++ and in Python alike."""

import gc
import random
import sys
import threading
from collections import OrderedDict, defaultdict, deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ddim_fast.kernels import cpu_step
from ddim_fast.kernels.same_objects import Snapshot

IN_CPP = cpu_step.extension is not None
EXECUTIONS = ["C++", "Python"] if IN_CPP else ["Python"]


class Stored(dict):
    """A dictionary that says nothing true about itself: what is stored counts."""

    def __len__(self):
        return 7

    def keys(self):
        return ["nothing"]

    def __iter__(self):
        return iter(())


class Listed(list):
    pass


class Shown(list):
    """A list that shows what another holds."""

    def __init__(self, shown):
        super().__init__(shown)
        self.shown = shown

    def __iter__(self):
        return iter(self.shown)

    def __len__(self):
        return len(self.shown)


class First:
    pass


class Second:
    pass


def snapshot(world, execution="C++"):
    """A snapshot of a world by one of the two executions."""
    with pytest.MonkeyPatch.context() as patch:
        if execution == "Python":
            patch.setattr(cpu_step, "extension", None)
        taken = Snapshot(*(world[kind] for kind in ("dicts", "iterables", "sets", "objects", "tensors")))
    return taken


def is_current(taken, execution="C++"):
    with pytest.MonkeyPatch.context() as patch:
        if execution == "Python":
            patch.setattr(cpu_step, "extension", None)
        return taken.is_current()


class Thing:
    """Equal to any other, so that only identity tells them apart."""

    def __eq__(self, other):
        return isinstance(other, Thing)

    def __hash__(self):
        return 0


def make_world(rng):
    """Containers of every kind, some of them empty, and tensors of many layouts."""

    def items():
        return [
            Thing() if rng.random() < 0.5 else rng.choice([None, 1, 1.0, True, "a", ()])
            for _ in range(rng.choice([0, 1, 2, 9]))
        ]

    def pairs():
        return [(rng.choice([i, str(i), (i,)]), value) for i, value in enumerate(items())]

    class Held(*rng.sample([First, Second], rng.randrange(3))):
        name, number = "a", 1.5

    makers = [
        torch.empty(0), torch.ones(1), torch.ones(()), torch.ones(127), torch.ones(128, 129).t(), nn.Parameter(torch.ones(2, 3)),
        torch.ones(4, 6, dtype=torch.float16)[1:, ::2], torch.ones(3, 3, dtype=torch.int64), torch.empty(2, 2, device="meta"),
        torch.ones(2, 1, 3).expand(2, 5, 3), torch.zeros(2, 2, dtype=torch.bool), torch.ones(4, dtype=torch.complex64),
    ]  # fmt: skip
    return {
        "dicts": [dict(pairs()), OrderedDict(pairs()), OrderedDict(), Stored(pairs()), defaultdict(list, pairs()), {}],
        "iterables": [
            items(),
            deque(items()),
            Listed(items()),
            Shown(items()),
            [],
            vars(Held).keys(),
            vars(Held).values(),
        ],
        "sets": [set(map(id, items())), {Thing, *"abc"}, set()],
        "objects": [First(), Second(), nn.Linear(1, 1)],
        "tensors": [tensor.clone() if rng.random() < 0.2 else tensor for tensor in makers],
        "class": Held,
    }


def description(world):
    """The objects of a world and the layouts of its tensors, found out as plainly as possible."""
    found = []
    for each in world["dicts"]:
        for key, value in dict.items(each):
            found += [key, value]
        if isinstance(each, OrderedDict):
            found += list(each)
        found.append("end")
    for each in world["iterables"]:
        found += [*each, "end"]
    for each in world["sets"]:
        found += [*sorted(each, key=id), "end"]
    for each in world["objects"]:
        found.append(type(each))
    layouts = [(t.data_ptr(), tuple(t.shape), t.stride(), t.dtype) for t in world["tensors"]]
    return found, layouts


def same(before, after):
    (objects, layouts), (objects_after, layouts_after) = before, after
    return (
        len(objects) == len(objects_after)
        and all(map(lambda a, b: a is b, objects, objects_after))
        and layouts == layouts_after
    )


def one(world, kind, rng, fits=lambda each: True):
    return rng.choice([each for each in world[kind] if fits(each)])


def set_item(world, rng):
    one(world, "dicts", rng)[rng.choice([0, "0", (1,), "new"])] = rng.choice([None, 1, Thing()])


def delete_item(world, rng):
    each = one(world, "dicts", rng)
    if keys := list(dict.keys(each)):
        each.pop(rng.choice(keys))


def set_equal_value(world, rng):
    """Of the same value, and another object."""
    each = one(world, "dicts", rng)
    for key, value in list(dict.items(each)):
        if isinstance(value, Thing):
            each[key] = Thing()


def put_item_last(world, rng):
    each = one(world, "dicts", rng)
    if keys := list(dict.keys(each)):
        key = rng.choice(keys)
        each[key] = each.pop(key)


def rename_last_item(world, rng):
    """The same value in the same place."""
    each = one(world, "dicts", rng)
    if keys := list(dict.keys(each)):
        each[Thing() if rng.random() < 0.5 else "renamed"] = each.pop(keys[-1])


def move_to_end(world, rng):
    each = one(world, "dicts", rng, lambda each: isinstance(each, OrderedDict))
    if each:
        each.move_to_end(rng.choice(list(each)), last=rng.random() < 0.5)


def set_in_list(world, rng):
    each = one(world, "iterables", rng, lambda each: hasattr(each, "append"))
    each = getattr(each, "shown", each)
    if each:
        each[rng.randrange(len(each))] = rng.choice([1, None, Thing()])


def append(world, rng):
    each = one(world, "iterables", rng, lambda each: hasattr(each, "append"))
    getattr(each, "shown", each).append(Thing())


def reverse(world, rng):
    one(world, "iterables", rng, lambda each: hasattr(each, "reverse")).reverse()


def exchange_in_list(world, rng):
    each = one(world, "iterables", rng, lambda each: hasattr(each, "append"))
    each = getattr(each, "shown", each)
    if each:
        each.pop()
        each.append(Thing())


def change_set(world, rng):
    each = one(world, "sets", rng)
    if each and rng.random() < 0.5:
        each.discard(rng.choice(list(each)))
    each.add(rng.choice(["a", 1.5, Thing]))


def fill_and_empty_set(world, rng):
    """Its order of iteration changes, its members do not."""
    each = one(world, "sets", rng)
    members = list(each)
    each.update(object() for _ in range(40))
    each.clear()
    each.update(reversed(members))


def change_class(world, rng):
    kind = world["class"]
    rng.choice([
        lambda: setattr(kind, "number", 1.5 * rng.choice([1, 2])),
        lambda: setattr(kind, "more", None),
        lambda: setattr(kind, "name", kind.name),
    ])()  # fmt: skip


def rename_in_class(world, rng):
    kind = world["class"]
    if "number" in vars(kind):
        number = kind.number
        del kind.number
        kind.renamed = number


def change_type(world, rng):
    each = one(world, "objects", rng, lambda each: not isinstance(each, nn.Module))
    each.__class__ = rng.choice([First, Second])


def change_tensor(world, rng):
    each = one(world, "tensors", rng, lambda t: t.device.type != "meta")
    with torch.no_grad():
        rng.choice([
            lambda: setattr(each, "data", each.data.clone()),
            lambda: setattr(each, "data", each.data.double()) if each.dtype.is_floating_point else None,
            lambda: setattr(each, "data", each.data.view(-1)[:1]) if each.is_contiguous() and each.numel() else None,
            lambda: each.t_() if each.dim() == 2 and type(each) is torch.Tensor else None,
            lambda: each.unsqueeze_(0) if type(each) is torch.Tensor else None,
            lambda: each.copy_(each.clone()) if 0 not in each.stride() else None,  # no change
        ])()  # fmt: skip


CHANGES = (
    set_item, delete_item, set_equal_value, put_item_last, rename_last_item, move_to_end, set_in_list, append, reverse, exchange_in_list,
    change_set, fill_and_empty_set, change_class, rename_in_class, change_type, change_tensor,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_every_change_is_seen_by_both_and_nothing_else_is(change, seed, times):
    rng = random.Random(seed)
    world = make_world(rng)
    before = description(world)
    taken = {execution: snapshot(world, execution) for execution in EXECUTIONS}
    assert all(is_current(each, execution) for execution, each in taken.items())
    for _ in range(times):
        change(world, rng)
    unchanged = same(before, description(world))
    assert {execution: is_current(each, execution) for execution, each in taken.items()} == dict.fromkeys(
        taken, unchanged
    )


def test_each_kind_of_change_does_change_something():
    """Or else the test above shows nothing of it."""
    for change in CHANGES:
        seen = set()
        for seed in range(60):
            rng = random.Random(seed)
            world = make_world(rng)
            before = description(world)
            change(world, rng)
            seen.add(same(before, description(world)))
        assert False in seen or change is fill_and_empty_set, change.__name__


WORLD = dict(dicts=(), iterables=(), sets=(), objects=(), tensors=())


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_what_iterating_gives_more_or_less_of_is_seen(execution):
    class Longer(list):
        """It gives more than its length says, or less."""

        def __iter__(self):
            return iter(self.shown)

    each = Longer([1, 2])
    each.shown = [1, 2]
    taken = snapshot(WORLD | {"iterables": [each]}, execution)
    assert is_current(taken, execution)
    for shown in ([1, 2, 3], [1], []):
        each.shown = shown
        assert not is_current(taken, execution), shown


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_errors_of_iterating_pass_and_what_changes_under_way_is_not_current(execution):
    class Raises(list):
        error = None

        def __iter__(self):
            yield from super().__iter__()
            if self.error is not None:
                raise self.error

    class Grows(list):
        grows = False

        def __iter__(self):
            for each in super().__iter__():
                if self.grows and len(self) < 50:
                    self.append(each)
                yield each

    each, grows, members = Raises([1]), Grows([1, 2]), {1}
    taken = snapshot(WORLD | {"iterables": [each, grows], "sets": [members]}, execution)
    assert is_current(taken, execution)
    each.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        is_current(taken, execution)
    each.error = RuntimeError("deque mutated during iteration")
    assert not is_current(taken, execution)
    each.error = None
    assert is_current(taken, execution)
    grows.grows = True
    assert not is_current(taken, execution)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_what_was_held_is_kept_so_that_no_address_is_used_again(execution):
    each = [Thing()]
    taken = snapshot(WORLD | {"iterables": [each]}, execution)
    for _ in range(100):
        each[0] = Thing()  # often where the last one was
        assert not is_current(taken, execution)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_looking_counts_no_reference(execution):
    things = [Thing() for _ in range(8)]
    world = make_world(random.Random(3)) | {
        "iterables": [things, deque(things), {"a": things[0]}.values()], "sets": [set(map(id, things)), {things[0]}],
    }  # fmt: skip
    taken = snapshot(world, execution)
    gc.collect()
    before = [sys.getrefcount(each) for each in (*things, None, True, world["tensors"][3], *world["objects"])]
    for _ in range(200):
        assert is_current(taken, execution)
    things.append(None)
    for _ in range(200):
        assert not is_current(taken, execution)
    after = [sys.getrefcount(each) for each in (*things[:-1], None, True, world["tensors"][3], *world["objects"])]
    assert all(abs(a - b) < 50 for a, b in zip(after, before, strict=True)), (before, after)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_containers_that_another_thread_changes_end_no_process(execution):
    world = make_world(random.Random(5))
    taken = snapshot(world, execution)
    stop = threading.Event()

    def change():
        rng = random.Random(0)
        while not stop.is_set():
            for change in (set_item, delete_item, append, exchange_in_list, change_set):
                change(world, rng)
            for each in world["iterables"]:
                if hasattr(each, "clear") and len(each) > 99:
                    each.clear()

    thread = threading.Thread(target=change)
    thread.start()
    try:
        answers = {is_current(taken, execution) for _ in range(2000)}
    finally:
        stop.set()
        thread.join()
    assert answers <= {True, False}
    world["iterables"][0].append(Thing())
    assert not is_current(taken, execution)


@pytest.mark.skipif(not IN_CPP, reason="the C++ extension is not built")
def test_cpp_refuses_what_is_no_record():
    same_objects, layouts = cpu_step.extension.same_objects, cpu_step.extension.layouts
    assert same_objects((), (), (), (), b"")
    assert not same_objects(({},), (), (), (), b"")  # a record of less
    assert not same_objects((), (), (), (), bytes(8))  # and of more
    assert not same_objects(({1: 2},), (), (), (), (1).to_bytes(8, sys.byteorder))
    for wrong in [([], (), (), (), b""), ((), (), (), (), ""), ((1,), (), (), (), b""), ((), (), (), ())]:
        with pytest.raises(TypeError, match="same_objects takes tuples of dictionaries"):
            same_objects(*wrong)
    with pytest.raises(TypeError, match="layouts takes a tuple"):
        layouts([])
    assert layouts((1,)) is None
    assert layouts(()) in (b"", None)


@pytest.mark.skipif(not IN_CPP, reason="the C++ extension is not built")
def test_cpp_reads_plain_tensors_itself_where_torch_lets_it():
    from_torch_2_10 = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
    tensors = [torch.ones(2, 3), nn.Parameter(torch.ones(2)), torch.ones(3, dtype=torch.bfloat16), torch.ones(())]
    assert (cpu_step.extension.layouts(tuple(tensors)) is not None) == from_torch_2_10
    assert cpu_step.extension.layouts((torch.ones(2, device="meta"),)) is None
    assert cpu_step.extension.layouts((torch.ones(2).to_sparse(),)) is None
