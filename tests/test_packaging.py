"""Building the package: what a wheel is called and holds, with and without the C++ extension, and what it claims to need."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import ninja
import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "pytest_ddim_fast.py", "ddim_fast", "kernels"]
BUILD = """
import runpy, sys, sysconfig
if {free_threaded}:
    sysconfig.get_config_vars()["Py_GIL_DISABLED"] = 1
sys.argv = ["setup.py", "--quiet", "{command}", "--dist-dir", "dist"]
runpy.run_path("setup.py", run_name="__main__")
"""
# Stands for a compiler: says what it compiles for, and writes every output and no dependencies.
COMPILER = """#!/bin/sh
[ "$1" = -dumpmachine ] && { echo MACHINE-linux-gnu; exit; }
while [ $# -gt 0 ]; do
  case $1 in -o | -MF) : > "$2"; shift ;; esac
  shift
done
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of the sources to build in, with nothing built."""
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(source, tmp_path / name, ignore=ignored, symlinks=True)
        else:
            shutil.copy(source, tmp_path)
    return tmp_path


def build(tree, free_threaded=False, command="bdist_wheel", **environment):
    """Build a wheel in ``tree``: the exit status, what was printed, and the wheel's path or None."""
    shutil.rmtree(tree / "dist", ignore_errors=True)
    kept = {name: value for name, value in os.environ.items() if name not in ("CXX", "DDIM_FAST_REQUIRE_EXTENSION")}
    done = subprocess.run(
        [sys.executable, "-c", BUILD.format(free_threaded=free_threaded, command=command)],
        cwd=tree,
        env=kept | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    wheels = list(tree.glob("dist/*.whl"))
    return done.returncode, done.stdout, wheels[0] if wheels else None


def assert_pure(wheel):
    assert wheel.name.endswith("-py3-none-any.whl"), wheel
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [archive.read(name).decode() for name in names if name.endswith(".dist-info/WHEEL")]
    assert "Root-Is-Purelib: true" in metadata
    assert "Tag: py3-none-any" in metadata
    assert not [name for name in names if name.endswith(".so")]
    assert "ddim_fast/kernels/cpu_step.py" in names


def write_compiler(path, machine):
    path.write_text(COMPILER.replace("MACHINE", machine))
    path.chmod(0o755)
    return str(path)


def native():
    return os.uname().machine


def test_a_wheel_without_the_extension_is_pure_and_says_so(tree):
    status, printed, wheel = build(tree, CXX="false")
    assert status == 0, printed
    assert "built WITHOUT its C++ extension" in printed
    assert_pure(wheel)


def test_a_wheel_with_the_extension_has_a_platform_and_a_later_failure_leaves_nothing_of_it(tree, tmp_path):
    compiler = write_compiler(tmp_path / "compiler", native())
    status, printed, wheel = build(tree, CXX=compiler)
    assert status == 0, printed
    assert "WITHOUT" not in printed
    assert "-cp310-abi3-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        assert [name for name in archive.namelist() if name.endswith(".so")] == ["ddim_fast/kernels/_cpu_step.abi3.so"]
    status, printed, wheel = build(tree, CXX="false")  # in the same folder
    assert status == 0, printed
    assert_pure(wheel)


def test_an_editable_install_is_a_line_that_type_checkers_follow_and_new_files_are_in_it(tree, tmp_path):
    compiler = write_compiler(tmp_path / "compiler", native())
    status, printed, wheel = build(tree, command="editable_wheel", CXX=compiler)
    assert status == 0, printed
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.startswith("__editable__")]
        assert archive.read(name).decode().split() == [str(tree)]
    (tree / "kernels/_cpu_step.abi3.so").unlink()  # of the stand-in for a compiler
    (tree / "kernels/new.py").touch()
    code = "import ddim_fast.kernels.new, pytest_ddim_fast; print(ddim_fast.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd="/", env={"PYTHONPATH": str(tree)}, capture_output=True, text=True, check=True
    )
    assert found.stdout == f"{tree}/ddim_fast/__init__.py\n"


def test_an_editable_install_without_the_link_is_a_hook(tree):
    (tree / "ddim_fast/kernels").unlink()
    status, printed, wheel = build(tree, command="editable_wheel", CXX="false")
    assert status == 0, printed
    with zipfile.ZipFile(wheel) as archive:
        (hook,) = [archive.read(name).decode() for name in archive.namelist() if name.endswith("_finder.py")]
    assert f"'ddim_fast.kernels': '{tree / 'kernels'}'" in hook


def test_a_required_extension_that_does_not_compile_is_an_error(tree):
    status, printed, wheel = build(tree, CXX="false", DDIM_FAST_REQUIRE_EXTENSION="1")
    assert status != 0
    assert "the C++ kernel did not compile" in printed
    assert wheel is None


def test_an_unknown_compiler_is_named(tree):
    status, printed, _ = build(tree, CXX="no-such-compiler", DDIM_FAST_REQUIRE_EXTENSION="1")
    assert status != 0
    assert "CXX must name a C++ compiler, got 'no-such-compiler'" in printed


def test_the_compilers_errors_are_shown(tree, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'step.h:1: error: this is what is wrong' >&2\nexit 1\n")
    compiler.chmod(0o755)
    status, printed, _ = build(tree, CXX=str(compiler))
    assert status == 0
    assert "step.h:1: error: this is what is wrong" in printed


def test_a_free_threaded_python_installs_without_the_extension(tree, tmp_path):
    status, printed, wheel = build(tree, free_threaded=True)
    assert status == 0, printed
    assert "a free-threaded Python cannot load it" in printed
    assert_pure(wheel)
    status, printed, wheel = build(tree, free_threaded=True, DDIM_FAST_REQUIRE_EXTENSION="1")
    assert status != 0
    assert "got a free-threaded one" in printed
    assert wheel is None


@pytest.mark.parametrize(("machine", "x86"), [("x86_64", True), ("aarch64", False)])
def test_the_compilers_processor_decides_what_is_compiled(tree, tmp_path, machine, x86):
    status, printed, _ = build(tree, CXX=write_compiler(tmp_path / "compiler", machine))
    assert status == 0, printed
    (ninja,) = tree.glob("build/temp*/build.ninja")
    assert ("isa_avx2.cpp" in ninja.read_text()) == x86
    assert ("-DDDIM_WITH_X86" in ninja.read_text()) == x86


def test_the_script_of_another_ninja_is_never_called(tree, tmp_path):
    """pip builds with a ninja of its own, and finds the environment's scripts where its package looks."""
    package, scripts = tmp_path / "package", tmp_path / "scripts"
    (package / "ninja").mkdir(parents=True)
    (package / "ninja" / "__init__.py").write_text(f"BIN_DIR = {str(scripts)!r}\n")
    scripts.mkdir()
    (scripts / "ninja").write_text("#!/bin/sh\necho the script was called\nexit 7\n")
    (scripts / "ninja").chmod(0o755)
    status, printed, _ = build(
        tree,
        CXX=write_compiler(tmp_path / "compiler", native()),
        PYTHONPATH=str(package),
        PATH=os.pathsep.join([str(scripts), ninja.BIN_DIR, os.environ["PATH"]]),
        DDIM_FAST_REQUIRE_EXTENSION="1",
    )
    assert status == 0, printed
    assert "the script was called" not in printed


def test_the_oldest_versions_that_are_tested_are_the_ones_that_are_claimed():
    the_rest = re.sub(
        r"\ndocs = \[.*?\n\]", "", (ROOT / "pyproject.toml").read_text(), flags=re.S
    )  # makes the site: one version
    claimed = re.findall(r'"([a-z0-9_-]+)>=([0-9.]+)"', the_rest)
    pinned = dict(re.findall(r"^([a-z0-9_-]+)==([0-9.]+)$", (ROOT / "constraints-oldest.txt").read_text(), re.M))
    assert len(claimed) > 20
    for name, lowest in claimed:
        if name in ("mypy", "pyright", "ruff"):  # check the sources, and run on one version
            continue
        assert f"{pinned[name]}.".startswith(f"{lowest}."), (name, lowest, pinned[name])


def test_what_is_tested_in_ci_is_within_what_is_claimed():
    claimed = dict(re.findall(r'"([a-z0-9_-]+)>=([0-9.]+)"', (ROOT / "pyproject.toml").read_text()))
    pins = dict(re.findall(r"^([a-z0-9_-]+)==([0-9.]+)", (ROOT / "constraints.txt").read_text(), re.M))
    assert claimed.keys() <= pins.keys()
    for name, lowest in claimed.items():
        assert [int(n) for n in pins[name].split(".")] >= [int(n) for n in lowest.split(".")], name


def test_build_check_names_what_is_missing():
    done = subprocess.run(
        ["tools/build_check.sh", sys.executable, "no-such-compiler"], cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 1
    assert "did not find: no-such-compiler" in done.stderr


def test_the_users_script_runs():
    spec = importlib.util.spec_from_file_location("user_script", ROOT / "tests/typing/user_script.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.pictures.shape == (1, 1, 28, 28)
    assert module.edited.isfinite().all()
    assert module.x_t.isfinite().all()
