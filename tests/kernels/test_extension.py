"""The C++ extension as a guest in a process: threads, forks, memory's edges and size; and the folder that is named kernels."""

import copy
import ctypes
import gc
import importlib.util
import math
import os
import pickle
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ddim_fast.kernels import cpu_step
from ddim_fast.kernels.contract import StepCoefficients
from ddim_fast.kernels.dispatch import ddim_step
from ddim_fast.kernels.fields import PER_ELEMENT
from ddim_fast.kernels.noise import philox_words, standard_normals, words_to_normals
from ddim_fast.verify.truth import oracle
from ddim_fast.verify.truth.tolerances import assert_near, to_numpy

ROOT = Path(__file__).parents[2]
INSTRUCTION_SETS = cpu_step.extension.instruction_sets() if cpu_step.extension is not None else []
NOISY = oracle.textbook_row("epsilon", 0.5, 0.6, eta=1.0, clip=1.0)


def python(code, timeout=120, cwd=None, **environment):
    """Run code in a process of its own. The tests' folder and this package are importable there."""
    return python_with("-c", code, timeout=timeout, cwd=cwd, **environment)


def python_with(*arguments, timeout=120, cwd=None, **environment):
    paths = [str(ROOT / "tests"), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, *arguments], env=env, cwd=cwd, timeout=timeout, capture_output=True, text=True
    )


def assert_runs(code, **options):
    done = python(code, **options)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# --- import kernels --------------------------------------------------------------------------------------------------------


def test_folder_is_not_a_package_named_kernels(tmp_path):
    """With the repository root on sys.path, ``import kernels`` finds what a folder without code would be."""
    code = """
import importlib, sys
import kernels
assert getattr(kernels, "__file__", None) is None
assert not hasattr(kernels, "__version__")
for name in ("noise", "dispatch", "get_kernel"):
    try:
        importlib.import_module("kernels." + name)
    except ModuleNotFoundError as error:
        assert error.name == "kernels." + name
    else:
        raise SystemExit("imported kernels." + name)
try:
    from kernels import get_kernel
except ImportError:
    pass
else:
    raise SystemExit("found a get_kernel")
"""
    assert_runs(code, cwd=ROOT)  # sys.path[0] is ""
    assert_runs(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + code, cwd=tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        (
            "-c",
            "import transformers, diffusers; from diffusers import UNet2DModel; from transformers import CLIPTextModel",
        ),
        ("-m", "ddim_fast", "info"),
        (
            "-m",
            "pytest",
            "--collect-only",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/integrations/test_diffusers_pipelines.py",
        ),
    ],
    ids=["imports", "command", "pytest"],
)
def test_transformers_and_diffusers_work_inside_the_repository(arguments):
    """They look for a package named kernels, and with ``python -m`` or ``-c`` they find this folder first."""
    done = python_with(*arguments, cwd=ROOT, timeout=300)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("kind", ["package", "module"])
def test_folder_hands_over_to_a_package_named_kernels(tmp_path, kind):
    if kind == "package":
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text("from . import part\nwho = 'the other one'\n")
        (tmp_path / "kernels" / "part.py").write_text("number = 7\n")
    else:
        (tmp_path / "kernels.py").write_text("who = 'the other one'\n")
    code = f"""
import sys
sys.path[:0] = ["", {str(ROOT)!r}]
sys.path.append({str(tmp_path)!r})
import kernels
assert kernels.who == "the other one"
assert sys.modules["kernels"] is kernels
assert kernels.__spec__.name == kernels.__name__ == "kernels"
assert kernels.__file__.startswith({str(tmp_path)!r})
if {kind == "package"}:
    import kernels.part
    assert kernels.part.number == 7
import importlib
assert importlib.import_module("kernels") is kernels
if {kind == "package"}:
    import ddim_fast.kernels
    assert ddim_fast.kernels is not kernels
"""
    assert_runs(code, cwd=ROOT)


def test_package_is_ddim_fast_kernels():
    import ddim_fast.kernels

    assert ddim_fast.kernels.__name__ == "ddim_fast.kernels"
    assert Path(ddim_fast.kernels.__file__).parent == Path(cpu_step.extension.__file__).parent


# --- Functions of the extension ------------------------------------------------------------------------------------------------


def test_instruction_sets(select):
    names = cpu_step.extension.instruction_sets()
    assert names[-1] == "portable"
    assert len(set(names)) == len(names)
    assert set(names) <= {"avx512", "avx2", "portable"}
    for name in names:
        select(name)
        assert cpu_step.extension.selected() == name
    with pytest.raises(ValueError, match=r"instruction set must be one of .*, got 'sse9'"):
        select("sse9")
    assert cpu_step.extension.selected() == names[-1]


def test_best_instruction_set_is_the_default():
    code = "from ddim_fast.kernels.cpu_step import extension as e; print(e.selected(), e.instruction_sets()[0])"
    first, second = assert_runs(code, DDIM_FAST_INSTRUCTION_SET="").split()
    assert first == second


def load_again():
    """cpu_step.py once more, as it would be at the start of a process; it shares the extension."""
    spec = importlib.util.spec_from_file_location("ddim_fast.kernels.cpu_step_again", cpu_step.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_instruction_set_by_environment(monkeypatch, select, name):
    for other in INSTRUCTION_SETS:
        select(other)
        monkeypatch.setenv("DDIM_FAST_INSTRUCTION_SET", name)
        load_again()
        assert cpu_step.extension.selected() == name


@pytest.mark.usefixtures("select")
def test_unknown_instruction_set_by_environment(monkeypatch):
    monkeypatch.setenv("DDIM_FAST_INSTRUCTION_SET", "sse9")
    with pytest.raises(ValueError, match="instruction set must be one of"):
        load_again()


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_triad(select, name):
    select(name)
    rng = np.random.default_rng(1)
    for n in [*range(70), 1000]:
        b, c = rng.standard_normal((2, n)).astype(np.float32)
        a = np.full(n + 16, -77, dtype=np.float32)
        cpu_step.extension.triad(a[8:].ctypes.data, b.ctypes.data, c.ctypes.data, 0.3, n)
        exact = b.astype(np.float64) * np.float32(0.3) + c
        assert np.all(np.abs(a[8 : 8 + n] - exact) <= 1.2e-7 * (np.abs(exact) + 1e-30))
        assert (a[:8] == -77).all()
        assert (a[8 + n :] == -77).all()


NO_LOG_PROB = (None, "mean", None)


def test_step_refuses_a_wrong_number_of_arguments():
    with pytest.raises(TypeError, match="step takes 18 arguments, got 2"):
        cpu_step.extension.step(1, 2)


def test_run_refuses_bad_coefficients():
    tensor = (0, 0, 0)
    with pytest.raises(TypeError, match="packed coefficients"):
        cpu_step.extension.run(1, 1, (tensor,) * 12, 0.0, b"short", 0, 0, 0, 0, 0, 1)
    with pytest.raises(TypeError, match="run takes 12 tensors"):
        cpu_step.extension.run(1, 1, (tensor,) * 6, 0.0, bytes(64), 0, 0, 0, 0, 0, 1)


def test_every_none_that_is_returned_is_counted():
    """A wheel for several versions of Python that counts none of them frees None itself in 3.10 and 3.11."""
    x, row = torch.zeros(1, 16), StepCoefficients(**NOISY)
    address = x.data_ptr()
    calls = {
        "triad": lambda: cpu_step.extension.triad(address, address, address, 1.0, 16),
        "normals": lambda: cpu_step.normals(torch.zeros(1, dtype=torch.int64), (16,), 0, 0),
        "run": lambda: ddim_step(x, x, row, noise=x, backend="cpu"),
        "step": lambda: cpu_step.extension.step(None, x, row, *[None] * 4, 0, 0, None, x, *[None] * 5, "mean", None),
        "step_to_new": lambda: cpu_step.plain_step(None, x, {}, 0, (), ()),
        "select": lambda: cpu_step.extension.select(cpu_step.extension.selected()),
    }
    gc.collect()
    gc.disable()  # what it frees between two counts may hold None, too
    try:
        for name, call in calls.items():
            call()
            before = sys.getrefcount(None)
            for _ in range(1000):
                call()
            assert abs(sys.getrefcount(None) - before) < 500, name
    finally:
        gc.enable()
    # Where None is immortal, counts show nothing, but the headers of 3.12 and 3.13 have the fault.
    sources = {file.name: file.read_text() for file in (ROOT / "kernels" / "csrc").iterdir()}
    assert not [name for name, text in sources.items() if "Py_RETURN_NONE;" in text]


def test_plain_call_declines_what_it_does_not_know():
    """Returns None, raises nothing and leaves no error behind: Python's checks then find the words."""
    x = torch.zeros(2, 3)
    good = [
        x,
        x,
        StepCoefficients(**NOISY | {"prev_noise": 0.0}),
        None,
        None,
        None,
        None,
        0,
        0,
        None,
        x,
        *[None] * 5,
        "mean",
        None,
    ]
    assert cpu_step.extension.step(*good) is x
    for i in range(len(good)):
        for bad in (
            "text",
            3.5,
            [],
            torch.zeros(2, 3, dtype=torch.float64),
            torch.zeros(3, 2).T,
            torch.zeros(1, 3),
            object(),
        ):
            if i in (5, 6, 7, 8):
                continue  # the noise, which this row does not read
            arguments = list(good)
            arguments[i] = bad
            if i == 4:
                arguments[3] = x
                if isinstance(bad, float):
                    continue
            assert cpu_step.extension.step(*arguments) is None, (i, bad)


def test_plain_call_takes_a_log_probability_that_is_apart():
    x, m, row = torch.ones(2, 3), torch.zeros(2, 3), StepCoefficients(1, 0, 0, 0, 0, 0.5, 0, prev_noise=0.5)
    quiet = StepCoefficients(1, 0, 0, 0, 0, 0.5, 0, prev_noise=0.0)
    out, log_prob = torch.zeros(2, 3), torch.full((2,), math.nan)

    def step(log_prob, reduction="mean", min_std=None, row=row, out=out):
        noise = None if row is quiet else torch.ones(2, 3)
        return cpu_step.extension.step(
            x, m, row, None, None, noise, None, 0, 0, None, out, None, None, None, None, log_prob, reduction, min_std
        )

    one = -0.5 - math.log(0.5) - 0.5 * math.log(2 * math.pi)
    assert step(log_prob) is out
    assert log_prob.tolist() == pytest.approx([one, one])
    assert step(log_prob, "sum") is out
    assert log_prob.tolist() == pytest.approx([3 * one, 3 * one])
    assert step(log_prob, "mean", 0.25, quiet) is out
    assert log_prob.tolist() == pytest.approx([-math.log(0.25) - 0.5 * math.log(2 * math.pi)] * 2)
    for wrong in (
        torch.zeros(3),
        torch.zeros(2).half(),
        torch.zeros(4)[::2],
        x[:, 0],
        log_prob.clone().requires_grad_(),
    ):
        assert step(wrong) is None
    for memory in (x, m, out):
        assert step(memory.view(-1)[:2]) is None
    for wrong in ("text", 1, None):
        assert step(log_prob, wrong) is None
    for least in ("text", 1, 0.0, -1.0, math.nan, math.inf):
        assert step(log_prob, "mean", least) is None
    assert step(log_prob, row=quiet) is None
    assert step(None, "mean", 0.25) is None


def test_plain_call_takes_a_history_that_is_apart():
    x, m, x0 = torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2, 3)
    writes, reads = (StepCoefficients(1, 0, 0, 0, 0, 0.5, 0, 0, prev_history=value) for value in (0.0, 0.25))
    noisy = StepCoefficients(1, 0, 0, 0, 0, 0.5, 0, prev_noise=1.0, prev_history=0.25)
    history = torch.full((2, 3), math.nan)

    def step(row, history, noise=None):
        return cpu_step.extension.step(
            x, m, row, None, None, noise, None, 0, 0, None, x, x0, history, None, None, *NO_LOG_PROB
        )

    assert step(writes, history) is x
    assert torch.equal(history, torch.ones(2, 3))
    assert step(reads, history) is x
    assert torch.equal(x, torch.full((2, 3), 0.5))  # 0.5 * 0.5 + 0.25 * 1
    assert torch.equal(history, torch.full((2, 3), 0.5))
    assert torch.equal(x0, history)
    for row, other in [(reads, None), (reads, x), (reads, m), (reads, x0), (writes, x), (reads, history.half())]:
        assert step(row, other) is None
    assert step(reads, history.clone().requires_grad_()) is None
    assert step(noisy, history, torch.ones(2, 3)) is x
    assert torch.equal(x, torch.full((2, 3), 1.375))  # 0.5 * 0.5 + 0.25 * 0.5 + 1
    assert step(noisy, history) is None
    assert cpu_step.extension.step_to_new(x, m, {7: reads}, 7, (), ()) is None


def test_plain_call_takes_a_second_history_and_a_model_input_that_are_apart():
    x, m = torch.ones(2, 3), torch.ones(2, 3)
    reads = StepCoefficients(1, 0, 0, 0, 0, 0.5, 0, 0, prev_history_2=0.25, input_scale=3.0)

    def step(history, history_2, model_input=None, row=reads, seeds=None):
        return cpu_step.extension.step(
            x, m, row, None, None, None, seeds, 0, 0, None, x, None, history, history_2, model_input, *NO_LOG_PROB
        )

    history, history_2, model_input = torch.full((2, 3), 7.0), torch.full((2, 3), 2.0), torch.zeros(2, 3).half()
    assert step(history, history_2, model_input) is x
    assert torch.equal(x, torch.ones(2, 3))  # 0.5 * 1 + 0.25 * 2
    assert torch.equal(history, torch.ones(2, 3))
    assert torch.equal(history_2, torch.full((2, 3), 7.0))
    assert torch.equal(model_input, torch.full((2, 3), 3.0).half())
    for one, two in [
        (history, None), (None, history_2), (history, history), (history, x), (history, m), (history, history_2.half()),
        (history, history_2.clone().requires_grad_()),
    ]:  # fmt: skip
        assert step(one, two) is None
    inside = m.view(torch.float16).view(-1)[:6].view(2, 3)
    for wrong in (
        history, history_2, x, x[:1], inside, model_input.double(), model_input.int(), model_input.clone().requires_grad_(),
    ):  # fmt: skip
        assert step(history, history_2, wrong) is None
    assert step(history, history_2, m) is x  # element for element
    seeds = torch.tensor([1, 2])
    assert step(history, history_2, seeds.view(torch.float16)[:6].view(2, 3), seeds=seeds) is None
    assert cpu_step.extension.step_to_new(x, m, {7: reads}, 7, (), ()) is None


# --- A step into new tensors ---------------------------------------------------------------------------------------------------

ROW = StepCoefficients(**NOISY | {"prev_noise": 0.0})


def to_new(x, m, t=7, rows=None, values=(), writes=()):
    return cpu_step.extension.step_to_new(x, m, {7: ROW} if rows is None else rows, t, values, writes)


@pytest.mark.parametrize("state", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 5), (1,) * 8, (2, 40000)], ids=str)
def test_a_step_into_new_tensors_is_the_step(shape, state):
    rng = np.random.default_rng(0)
    x, m = (torch.from_numpy(rng.standard_normal(shape)).to(state) for _ in range(2))
    expected_x0 = torch.empty_like(x)
    expected = ddim_step(x, m, ROW, x0_out=expected_x0)
    for t in (7, torch.tensor(7)):
        got = to_new(x, m, t)
        assert isinstance(got, tuple)
        for result, wanted in zip(got, (expected, expected_x0), strict=True):
            assert torch.equal(result, wanted)
            assert (result.dtype, result.stride()) == (wanted.dtype, wanted.stride())
            assert not result.requires_grad
            assert not result.is_inference()
            assert result.data_ptr() % 64 == 0


def test_a_step_into_new_tensors_without_x0():
    x, m = torch.ones(2, 3), torch.full((2, 3), 0.5)
    prev, x0 = cpu_step.extension.step_to_new(x, m, {7: ROW}, 7, (), (), False)
    assert x0 is None
    assert torch.equal(prev, ddim_step(x, m, ROW))
    assert cpu_step.extension.step_to_new(x, m, {7: ROW}, 8, (), (), False) is None


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adds", [("noise",), ("history",), ("noise", "history")], ids=str)
@pytest.mark.parametrize("wants_x0", [True, False])
def test_a_step_into_new_tensors_reads_noise_and_a_history_and_leaves_them(adds, wants_x0, state):
    rng = np.random.default_rng(0)
    x, m, noise, history = (torch.from_numpy(rng.standard_normal((2, 3, 5))).to(state) for _ in range(4))
    weights = {"noise": "prev_noise", "history": "prev_history"}
    row = replace(ROW, **{weights[name]: 0.5 for name in adds})
    given = {"noise": noise, "history": history}
    before = {name: tensor.clone() for name, tensor in given.items()}
    kept, expected_x0 = history.clone(), torch.empty_like(x)
    expected = ddim_step(x, m, row, noise=noise, history=kept, x0_out=expected_x0)

    def to_new(**tensors):
        arguments = (tensors.get("noise"), tensors.get("history"))
        return cpu_step.extension.step_to_new(x, m, {7: row}, 7, (), (), wants_x0, *arguments)

    prev, x0 = to_new(**given)
    assert torch.equal(prev, expected)
    assert x0 is None if not wants_x0 else torch.equal(x0, expected_x0)
    for name, tensor in given.items():
        assert torch.equal(tensor, before[name])
    assert to_new(**{name: given[name] for name in adds}) is not None
    for name in adds:
        others = {other: tensor for other, tensor in given.items() if other != name}
        for wrong in (
            None, given[name][:1], given[name].double(), given[name].transpose(0, 1).contiguous().transpose(0, 1), 3.0,
            given[name].clone().requires_grad_(), given[name].to(torch.float16),
        ):  # fmt: skip
            assert to_new(**others, **{name: wrong}) is None


def test_new_tensors_are_like_any():
    x, m = torch.ones(2, 3), torch.full((2, 3), 0.5)
    expected = ddim_step(x, m, ROW)
    prev, x0 = to_new(x, m)
    del x0  # the memory of one is not that of the other
    assert torch.equal(copy.deepcopy(prev), expected)
    assert torch.equal(pickle.loads(pickle.dumps(prev)), expected)
    assert torch.equal(torch.from_numpy(prev.numpy().copy()), expected)
    weight = torch.ones(3, requires_grad=True)
    product = prev * weight
    prev.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    assert torch.equal(prev, 2 * expected)
    prev.share_memory_()
    assert torch.equal(prev, 2 * expected)
    with torch.inference_mode():
        assert to_new(x, m)[0].is_inference()


def test_new_tensors_give_their_memory_back():
    x = torch.ones(1, 1 << 20)
    code = f"""
import resource, torch
from ddim_fast.kernels import cpu_step
from ddim_fast.kernels.contract import StepCoefficients
x, row = torch.ones(1, 1 << 20), StepCoefficients(*{ROW.columns[:8]})
for i in range(60):
    assert cpu_step.extension.step_to_new(x, x, {{7: row}}, 7, (), ()) is not None
    assert cpu_step.extension.step_to_new(x, x.double(), {{7: row}}, 7, (), ()) is None
    if i == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert grown < 100_000, grown  # kilobytes; all of it would be {50 * 2 * x.nbytes // 1000}
"""
    # (AddressSanitizer, where it is there, keeps what was freed for a while.)
    assert_runs(code, ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=0:quarantine_size_mb=1")


def test_a_step_into_new_tensors_declines_what_it_does_not_know():
    x, config = torch.zeros(2, 3), {"name": ROW}
    levels = torch.ones(3)
    good = {
        "x": x, "m": x, "t": 7, "rows": {7: ROW}, "values": ((config, "name", ROW),), "writes": ((levels, levels._version),),
    }  # fmt: skip
    assert to_new(**good) is not None
    bad_tensors = [
        "text", 3.5, None, x.double(), torch.zeros(3, 2).T, torch.zeros(1, 3), torch.nn.Parameter(x), torch._neg_view(x),
        torch.zeros(2, 3, requires_grad=True), torch.zeros((1,) * 9), torch.zeros(()), torch.zeros(2, 3, device="meta"),
    ]  # fmt: skip
    bad = {
        "x": bad_tensors,
        "m": bad_tensors,
        "t": [8, -1, True, 7.0, None, 1 << 70, np.int64(7), torch.tensor(8), torch.tensor([7]), torch.tensor(7.0),
              torch.tensor(7, dtype=torch.int32), torch._neg_view(torch.tensor(7))],
        "rows": [{}, {8: ROW}, {7: None}, {7: StepCoefficients(**NOISY)}],
        "values": [None, [], (None,), ((),), ((config, "name"),), ((config, "other", ROW),), ((config, "name", None),),
                   ((None, "name", ROW),), ((config, [], ROW),)],
        "writes": [None, [], (None,), ((),), ((levels,),), ((levels, levels._version + 1),), ((None, 0),)],
    }  # fmt: skip
    for name, values in bad.items():
        for value in values:
            assert to_new(**good | {name: value}) is None, (name, value)
    for both in (torch.zeros((1,) * 9), torch.zeros(2, 0)):  # there is room for eight dimensions
        assert to_new(**good | {"x": both, "m": both}) is None
    levels.mul_(2)
    assert to_new(**good) is None
    with pytest.raises(TypeError, match="step_to_new takes x_t"):
        cpu_step.extension.step_to_new(x, x)
    with torch.autograd.forward_ad.dual_level():
        assert to_new(x, x) is None
    with torch.no_grad():
        assert to_new(torch.zeros(2, 3, requires_grad=True), x) is not None


# --- Threads and forks ------------------------------------------------------------------------------------------------------------


def big_step(seed=0, n=200_000):
    rng = np.random.default_rng(seed)
    x, m = (torch.from_numpy(rng.standard_normal((2, n))).float() for _ in range(2))
    return lambda: ddim_step(x, m, StepCoefficients(**NOISY), seeds=torch.tensor([seed, -seed]))


def equal(a, b):
    """By NumPy: torch's own comparison runs on OpenMP threads, which do not survive a fork."""
    return np.array_equal(a.numpy(), b.numpy())


def test_two_python_threads_at_once(threads):
    threads(2)
    steps = [big_step(seed) for seed in (1, 2, 3)]
    expected, wrong = [step() for step in steps], []

    def work(i):
        for _ in range(30):
            if not torch.equal(steps[i](), expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(3)]
    for worker in workers:
        worker.start()
    deadline = time.monotonic() + 60
    for worker in workers:
        worker.join(max(deadline - time.monotonic(), 0.0))
    assert not any(worker.is_alive() for worker in workers), "threads wait for each other"
    assert not wrong


def test_threads_may_come_and_go(threads):
    step = big_step()
    threads(1)
    expected = step()
    for count in (2, 3, 2, 6, 1, 4, 2):
        threads(count)
        assert torch.equal(step(), expected)


FORK = """
import os, signal, sys, torch
sys.path.insert(0, {tests!r})
from test_extension import big_step, equal
step = big_step()
torch.set_num_threads(1)
expected = step()
for generation in range(4):
    if generation == 2:  # until here the parent has not used its pool
        torch.set_num_threads(2)
        assert equal(step(), expected)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        torch.set_num_threads(2)
        ok = all(equal(step(), expected) for _ in range(3))
        if ok and generation in (0, 3):  # a grandchild, from a child that has used its own pool
            grandchild = os.fork()
            if grandchild == 0:
                signal.alarm(10)
                os._exit(0 if equal(step(), expected) else 5)
            ok = os.waitpid(grandchild, 0)[1] == 0
        os._exit(0 if ok else 3)
    status = os.waitpid(child, 0)[1]
    assert status == 0, f"child {{generation}} ended with status {{status}}"
    assert equal(step(), expected)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_children_compute():
    assert_runs(FORK.format(tests=str(Path(__file__).parent)), timeout=150)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_while_another_thread_computes():
    code = f"""
import os, signal, sys, threading, torch
sys.path.insert(0, {str(ROOT / "tests")!r})
from test_extension import big_step, equal
torch.set_num_threads(2)
step, other = big_step(1), big_step(2)
expected = step()
stop = threading.Event()
def work():
    while not stop.is_set():
        other()
worker = threading.Thread(target=work)
worker.start()
for _ in range(15):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if equal(step(), expected) else 3)
    status = os.waitpid(child, 0)[1]
    assert status == 0, status
stop.set()
worker.join()
"""
    assert_runs(code, timeout=120)


def test_interpreter_ends_with_threads_waiting():
    assert_runs("import torch; from test_extension import big_step; torch.set_num_threads(3); big_step()()", timeout=60)


WITHOUT_THREADS = """
import os, resource, threading
import numpy, torch
from ddim_fast import StepCoefficients, ddim_step
from ddim_fast.kernels import cpu_step
from ddim_fast.kernels.convolution import convolve, transformed_weights
from ddim_fast.kernels.normalization import group_norm, silu

torch.set_num_threads(1)
row = StepCoefficients(1.5, -0.5, 0, 1, 0, 0.5, 0.5, 0.1)
x = torch.linspace(-1, 1, 1 << 18, dtype=torch.float32)[None]
seeds, picture = torch.tensor([5]), x.view(1, 16, 128, 128).contiguous(memory_format=torch.channels_last)
weights = transformed_weights(torch.linspace(-1, 1, 16 * 16 * 9).view(16, 16, 3, 3))
calls = [
    lambda: ddim_step(x, x, row, seeds=seeds),
    lambda: ddim_step(x, x, row, seeds=seeds, backend="cpu"),
    lambda: cpu_step.normals(seeds, (1 << 18,), 0, 0),
    lambda: convolve(picture, weights, None),
    lambda: group_norm(picture, 4),
    lambda: silu(picture),
]
expected = [call().numpy() for call in calls]
torch.set_num_threads(4)
if os.geteuid() == 0:
    os.setuid(65534)  # root may start as many as it likes
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
try:
    threading.Thread(target=int).start()
except RuntimeError:
    pass
else:
    raise SystemExit("this test needs a limit on threads")
for call, wanted in zip(calls, expected):
    assert numpy.array_equal(call().numpy(), wanted)  # torch's own comparison would want threads
"""


def test_where_no_thread_can_be_made_the_caller_does_all():
    assert_runs(WITHOUT_THREADS)


NOWHERE = {
    "normals": (0, 1, 8, 0, 0, 0, 1),
    "words": (0, 0, 0, 0, 0, 8),
    "triad": (0, 0, 0, 1.0, 8),
    "convolve": (0, 0, 0, 0, 1, 4, 4, 16, 16, 1),
    "normalize": (0, 0, 0, 0, 0, 0, 0, 0, 1, 16, 16, 4, 1e-5, False, 1),
    "silu": (0, 0, 8, 1),
    "run": (
        1,
        8,
        ((0, 8, 0),) * len(PER_ELEMENT),
        0.0,
        StepCoefficients(1, 0, 0, 1, 0, 1, 1, 0).packed,
        0,
        0,
        0,
        0,
        0,
        1,
    ),
}


@pytest.mark.parametrize("function", NOWHERE)
def test_no_kernel_works_on_the_address_of_a_tensor_without_memory(function):
    with pytest.raises(ValueError, match="must be given memory on the CPU, got a tensor that has none"):
        getattr(cpu_step.extension, function)(*NOWHERE[function])


def test_a_dtype_that_no_kernel_has_is_refused():
    *before, tensors = NOWHERE["run"][:3]
    wrong = (*before, ((8, 8, 3), *tensors[1:]), *NOWHERE["run"][3:])
    with pytest.raises(ValueError, match=r"dtype must be a code of csrc/step.h, got 3"):
        cpu_step.extension.run(*wrong)


# --- The edges of memory ---------------------------------------------------------------------------------------------------------------

EDGES = """
import ctypes, math, mmap, sys, torch
import numpy as np
sys.path.insert(0, {tests!r})
from ddim_fast.verify import oracle
from ddim_fast.kernels import cpu_step
from ddim_fast.kernels.contract import StepCoefficients
from ddim_fast.kernels.dispatch import ddim_step

libc = ctypes.CDLL(None, use_errno=True)
keep = []

def at_edge(n, dtype, end):
    '''n numbers that touch an unreadable page: at their end, or at their beginning.'''
    size = n * dtype.itemsize
    pages = max(-(-size // mmap.PAGESIZE), 1) + 2
    memory = mmap.mmap(-1, pages * mmap.PAGESIZE)
    keep.append(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert address % mmap.PAGESIZE == 0
    for page in (0, pages - 1):
        assert libc.mprotect(ctypes.c_void_p(address + page * mmap.PAGESIZE), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    first = (pages - 1) * mmap.PAGESIZE - size if end else mmap.PAGESIZE
    return torch.frombuffer(memory, dtype=dtype, count=n, offset=first)

for isa in cpu_step.extension.instruction_sets():
    cpu_step.extension.select(isa)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for n in (1, 3, 7, 8, 9, 15, 17, 31, 33, 63, 65, 129, 1025):
            for end in (True, False):
                x, m, u, z, out, x0 = (at_edge(n, dtype, end).view(1, n) for _ in range(6))
                for t in (x, m, u, z):
                    t.fill_(0.5)
                row = oracle.textbook_row("epsilon", 0.5, 0.6, eta=1.0, clip=1.0)
                c = StepCoefficients(**row)
                for backend in (None, "cpu"):
                    ddim_step(x, m, c, noise=z, model_output_uncond=u, guidance_scale=2.0, out=out, x0_out=x0, backend=backend)
                    ddim_step(x, m, c, seeds=torch.tensor([3]), out=out, backend=backend)
                if dtype == torch.float32:
                    seeds = torch.tensor([5])
                    cpu_step.extension.normals(seeds.data_ptr(), 1, n, 0, 0, out.data_ptr(), 1)
                    words = at_edge(4 * n, torch.int32, end)
                    cpu_step.extension.words(5, 0, 0, 0, words.data_ptr(), n)
print("done")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects pages with Linux's mprotect")
def test_nothing_beyond_a_tensor_is_touched():
    """Each tensor lies against a page that may be neither read nor written: one byte too far ends the process."""
    assert ctypes.sizeof(ctypes.c_void_p) == 8
    assert assert_runs(EDGES.format(tests=str(Path(__file__).parent))).split() == ["done"]


# --- More than 2^31 elements -------------------------------------------------------------------------------------------------------------

PLACES = [0, 1, 2**31 - 1, 2**31, 2**31 + 1, 2**31 + 128]
COUNT = 2**31 + 130  # bfloat16: 4.3 GB, and nothing else


def check_in_parts(tensor, expected, special):
    for first in range(0, COUNT, 2**27):
        part = tensor.view(-1)[first : first + 2**27]
        wrong = int((part != expected).sum())
        assert wrong == sum(first <= place < first + 2**27 for place in special), f"elements {first} ..."


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(threads):
    threads(2)
    x = torch.full((1, COUNT), 2.0, dtype=torch.bfloat16)
    for i, place in enumerate(PLACES):
        x[0, place] = 4.0 + i
    row = StepCoefficients(**dict.fromkeys(NOISY, 0.0) | {"x0_x": 1.5, "x0_m": -1.0, "prev_x0": 1.0, "clip": math.inf})
    assert ddim_step(x, x, row, out=x) is x  # every tensor is this one: 0.5 x
    for i, place in enumerate(PLACES):
        assert x[0, place].item() == (4.0 + i) / 2
    check_in_parts(x, 1.0, PLACES)
    x = x.view(3, -1)
    ddim_step(x, x, row, out=x, backend="cpu")
    check_in_parts(x, 0.5, PLACES)


@pytest.mark.slow
def test_noise_of_more_than_2_to_the_31_elements(threads):
    threads(2)
    x = torch.zeros(1, COUNT, dtype=torch.bfloat16)
    row = StepCoefficients(**dict.fromkeys(NOISY, 0.0) | {"prev_noise": 1.0, "clip": math.inf})
    ddim_step(x, x, row, out=x, seeds=torch.tensor([77]), noise_step=5)
    for first in (0, 2**31 - 64, 2**31 + 128 - 60, 2**29 * 3):
        z = torch.from_numpy(words_to_normals(philox_words(77, 15, 5, 0, first // 4)).ravel()).to(torch.bfloat16)
        assert torch.equal(x[0, first : first + 60], z)
    last = words_to_normals(philox_words(77, 1, 5, 0, (COUNT - 1) // 4)).ravel()[(COUNT - 1) % 4]
    assert x[0, -1] == torch.tensor(last).to(torch.bfloat16)


# --- A whole step, through everything at once ------------------------------------------------------------------------------------


def test_large_step_is_right(threads):
    threads(2)
    rng = np.random.default_rng(5)
    x, m, u = (torch.from_numpy(rng.standard_normal((3, 3, 128, 128))).to(torch.bfloat16) for _ in range(3))
    seeds, s = torch.tensor([1, -2, 3]), torch.tensor([1.0, 1.5, 3.0])
    z = standard_normals(seeds.numpy(), x[0].numel(), 4).reshape(x.shape)
    expected = oracle.row_step(
        NOISY, to_numpy(x), to_numpy(m), uncond=to_numpy(u), guidance=7.5, noise=z, thresholds=to_numpy(s)
    )
    got = ddim_step(
        x,
        m,
        StepCoefficients(**NOISY),
        model_output_uncond=u,
        guidance_scale=7.5,
        seeds=seeds,
        noise_step=4,
        thresholds=s,
    )
    assert_near(got, expected.x_prev, expected.terms)
