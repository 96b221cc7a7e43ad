"""``module:attribute`` from the current folder: what is found, and what ``sys.path`` is afterwards."""

import sys

import pytest

from ddim_fast.utils.import_string import exits_refused, import_string

MODULE = """
import {name}_neighbour

class Outer:
    value = 3

def late():
    import {name}_later
    return {name}_later.value
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the module ``own_NAME`` and two that it imports, at once and later; ``sys.path`` is put back."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE.format(name=name))
    (tmp_path / f"{name}_neighbour.py").write_text("import sys\npath = list(sys.path)\n")
    (tmp_path / f"{name}_later.py").write_text("value = 4\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield name
    for module in [module for module in sys.modules if module.startswith(name)]:
        del sys.modules[module]


def test_attribute_of_a_module_in_the_current_folder(folder, tmp_path):
    before = list(sys.path)
    assert import_string(f"{folder}:Outer.value", "the number") == 3
    assert sys.modules[f"{folder}_neighbour"].path == [str(tmp_path), *before]  # first while it is imported
    assert sys.path == [*before, str(tmp_path)]  # last from then on
    assert import_string(f"{folder}:late", "the function")() == 4
    assert sys.path == [*before, str(tmp_path)]


def test_attribute_of_an_installed_module():
    assert import_string("os:path.join", "the function")("a", "b") == "a/b"


@pytest.mark.parametrize("name", ["{}:absent", "{}_absent:value", "{}:late.value"])
def test_what_cannot_be_imported_leaves_the_path_alone(folder, name):
    before = list(sys.path)
    with pytest.raises(ValueError, match=f"the number '{name.format(folder)}' cannot be imported"):
        import_string(name.format(folder), "the number")
    assert sys.path == before


@pytest.mark.parametrize("name", ["os", "os:", ":path"])
def test_a_name_of_another_form(name):
    with pytest.raises(ValueError, match=f"the number must be named module:attribute, got '{name}'"):
        import_string(name, "the number")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def f(:", r"SyntaxError: .*line 1\)"),
        ("import sys\nsys.exit(0)", r"SystemExit: 0, .*\.py, line 2\)"),
        ("\n1 / 0", r"ZeroDivisionError: division by zero, .*\.py, line 2\)"),
        ("raise EOFError", "EOFError"),
        ("raise RecursionError", "RecursionError"),
    ],
)
def test_whatever_a_module_does_is_an_error_with_its_place(folder, tmp_path, text, said):
    before = list(sys.path)
    (tmp_path / f"{folder}.py").write_text(text)
    with pytest.raises(ValueError, match=rf"the model '{folder}:value' cannot be imported \({said}"):
        import_string(f"{folder}:value", "the model")
    assert sys.path == before


def test_ctrl_c_is_the_users(folder, tmp_path):
    (tmp_path / f"{folder}.py").write_text("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        import_string(f"{folder}:value", "the model")


def test_a_function_that_ends_the_program():
    with (
        pytest.raises(ValueError, match=r"the model 'a:b' must not end the program, got SystemExit\(0\), .*, line \d+"),
        exits_refused("a:b", "the model"),
    ):
        sys.exit(0)
