"""The laboratory's boundaries: ``ptx`` stands alone, imports only point down, and private names have one place."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ddim_fast.gpu_lab

LAB = Path(ddim_fast.gpu_lab.__file__).parent
PTX = LAB / "ptx"
PTX_FLOORS = (
    {"executor"},
    {"decoder"},
    {"warp"},
    {"scheduler"},
    {"program"},
    {"operations"},
    {"memory", "parser"},
    {"floats", "integers", "errors"},
)
"""Top to bottom. A module may import those of lower floors."""


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """The level and name of everything that a file imports anywhere, under ``if TYPE_CHECKING`` and in functions, too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.level, node.module
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", sorted(PTX.glob("*.py")), ids=lambda path: path.stem)
def test_ptx_imports_nothing_of_ours_and_only_points_down(path):
    floor_of = {name: floor for floor, names in enumerate(PTX_FLOORS) for name in names}
    own = floor_of.get(path.stem, -1)
    assert path.stem == "__init__" or path.stem in floor_of, f"{path.name} has no floor"
    for level, name in imports_of(path):
        assert level <= 1, f"{path.name} imports {name} from outside of ptx"
        if level == 1:
            assert floor_of[name] > own, f"{path.name} imports {name}, which is not below it"
        else:
            assert name.partition(".")[0] in {"numpy", *sys.stdlib_module_names}, f"{path.name} imports {name}"


ALONE = """
import sys
for blocked in ("torch", "triton", "ddim_fast"):
    sys.modules[blocked] = None
sys.path.insert(0, sys.argv[1])
import numpy as np
import ptx
text = '''
.version 8.7
.target sm_90a
.visible .entry k(.param .u64 .ptr k_0)
.reqntid 32
{
    .reg .b32 %r<3>;
    .reg .b64 %rd<4>;
    ld.param.b64 %rd1, [k_0];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;
    st.global.b32 [%rd3], %r1;
    ret;
}
'''
out = np.zeros(32, np.int32)
execution = ptx.execute(ptx.parse(text), "k", (1,), [out])
assert (out == np.arange(32)).all() and execution.bytes_written == 128
try:
    ptx.execute(ptx.parse(text), "k", (1,), [out[:8]])
except ptx.AddressError as error:
    print(error)
"""


def run_alone(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-I", "-c", code, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ptx_runs_as_a_package_of_its_own():
    assert "which has 32 bytes; first at CTA (0, 0, 0), thread (8, 0, 0)" in run_alone(ALONE, LAB)


LAB_FLOORS = (
    {"machine_code", "replay"},
    {"compiling", "emulated_gpu", "fake_cuda"},
    {"recorded_pool"},
    {"torch_internals", "triton_internals"},
    {"ptx"},
)
BELOW_THE_LAB = ("kernels", "sampling.cuda_graphs")
"""What the laboratory uses of the other rooms."""

INTERNALS = {"torch_internals", "triton_internals"}
MODULES = [path for path in sorted(LAB.glob("*.py")) if path.stem != "__init__"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_the_laboratory_imports_only_what_is_below(path):
    floor_of = {name: floor for floor, names in enumerate(LAB_FLOORS) for name in names}
    for level, name in imports_of(path):
        assert level <= 2, f"{path.name} imports {name} from outside of the package"
        if level == 2:
            assert name.startswith(BELOW_THE_LAB), f"{path.name} imports {name}, which is not below the laboratory"
        elif level == 1:
            assert floor_of[name.partition(".")[0]] > floor_of[path.stem], f"{path.name} imports {name}"


def private_names(tree: ast.AST) -> Iterator[str]:
    """What is private to torch or Triton, or in a module of Triton's own."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            if node.module.startswith("triton."):
                yield node.module
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
            if node.attr in {"_cdata", "_schema", "_overloadname", "_backend_fns", "_init_fn", "_new_with_weak_ptr"}:
                yield names[0]
        for name in names:
            parts = name.split(".")
            hidden = [part for part in parts[1:] if part.startswith("_") and not part.startswith("__")]
            if parts[0] in ("torch", "triton") and hidden and name.replace(".", "").isidentifier():
                yield name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_private_names_of_torch_and_triton_have_one_place(path):
    found = sorted(set(private_names(ast.parse(path.read_text()))))
    assert path.stem in INTERNALS or found == []


@pytest.mark.parametrize(
    "line",
    [
        "from torch._subclasses.fake_tensor import FakeTensor",
        "import torch._C",
        "x = torch._C._ensureCUDADeviceGuardSet()",
        "from triton.runtime import driver",
        "key = storage._cdata",
    ],
)
def test_private_names_are_seen(line):
    assert list(private_names(ast.parse(line)))
