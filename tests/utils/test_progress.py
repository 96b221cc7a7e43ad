"""Progress bars: a bar where it can be drawn again, and a few lines in a log."""

import io
import sys
import types

import pytest
import tqdm.std

from ddim_fast.utils.progress import SECONDS_BETWEEN_LINES
from ddim_fast.utils.progress import tqdm as bar_of


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that is put forward by hand."""
    now = [1000.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    monkeypatch.setattr("ddim_fast.utils.progress.monotonic", lambda: now[0])
    return now


def shown(monkeypatch, file, clock, steps=100, seconds=1.0, **options):
    monkeypatch.setattr(sys, "stderr", file)
    with bar_of(total=steps, desc="working", unit="step", **options) as bar:
        for step in range(steps):
            clock[0] += seconds
            bar.update(1)
            bar.set_postfix_str(f"at {step}")  # which asks for a refresh
    return file.getvalue()


def test_a_log_has_a_line_at_once_every_thirty_seconds_and_at_the_end(monkeypatch, clock):
    lines = shown(monkeypatch, io.StringIO(), clock).splitlines()
    assert [line.split("|")[0] for line in lines] == [f"working: {p:3d}%" for p in (0, 30, 60, 90, 100)]
    assert "100/100 [01:40<00:00" in lines[-1]
    assert all(line.isascii() and "\r" not in line for line in lines)
    assert SECONDS_BETWEEN_LINES == 30


def test_a_short_command_writes_two_lines(monkeypatch, clock):
    assert len(shown(monkeypatch, io.StringIO(), clock, 1000, 0.01).splitlines()) == 2
    assert shown(monkeypatch, io.StringIO(), clock, 1000, 0.01, disable=True) == ""


def test_an_interrupted_loop_says_where_it_was(monkeypatch, clock):
    monkeypatch.setattr(sys, "stderr", file := io.StringIO())

    def interrupted():
        for step in bar_of(range(10), desc="sampling"):
            clock[0] += 1
            if step == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    first, last = file.getvalue().splitlines()
    assert "0/10" in first
    assert "4/10" in last


def test_a_terminal_has_a_bar_that_is_drawn_again(monkeypatch, clock):
    said = shown(monkeypatch, Terminal(), clock)
    assert said.count("\r") >= 100
    assert said.count("\n") == 1


def test_a_notebook_has_the_bar_that_it_had(monkeypatch, clock):
    kernel = types.SimpleNamespace(get_ipython=lambda: types.SimpleNamespace(kernel=object()))
    monkeypatch.setitem(sys.modules, "IPython", kernel)
    assert shown(monkeypatch, io.StringIO(), clock).count("\r") >= 100
    monkeypatch.setitem(
        sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: None)
    )  # a plain IPython or script
    assert "\r" not in shown(monkeypatch, io.StringIO(), clock)


def test_a_bar_of_bars_writes_whole_lines(monkeypatch, clock):
    monkeypatch.setattr(sys, "stderr", file := io.StringIO())
    for _ in bar_of(range(2), desc="outer"):
        for _ in bar_of(range(2), desc="inner", leave=False):
            clock[0] += 40
    names = [line.split(":")[0] for line in file.getvalue().splitlines()]
    assert set(names) == {"outer", "inner"}
