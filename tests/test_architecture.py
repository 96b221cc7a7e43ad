"""The house itself: imports only point down the rooms of CONTRIBUTING.md, go in no circle, and private names of other
libraries stand in the few files made for them."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "ddim_fast"
FOREIGN = ("torch", "triton", "diffusers", "numpy", "transformers", "safetensors")
INTERNALS = (
    "kernels/torch_internals.py",
    "kernels/triton_internals.py",
    "ddim_fast/gpu_lab/torch_internals.py",
    "ddim_fast/gpu_lab/triton_internals.py",
    "ddim_fast/integrations/diffusers/internals.py",
)
"""Where names that other libraries keep to themselves may stand."""
PUBLIC = {"_asdict", "_fields", "_getframe", "_replace"}
"""Documented names of the standard library, in spite of the underscore."""
OF_AN_ORIGINAL = {"ddim_fast/integrations/guided_diffusion.py": {"_scale_timesteps", "_wrap_model"}}
"""Methods that subclasses of the replaced original override, and that a drop-in therefore has to call."""


def rooms() -> list[str]:
    """The rooms, top to bottom: the first list of CONTRIBUTING.md in a code block."""
    block = (ROOT / "CONTRIBUTING.md").read_text().split("```")[1]
    return [line.split()[0].rstrip("/") for line in block.splitlines() if line.split() and not line.startswith(" ")]


def sources() -> dict[str, Path]:
    """Every module of the package by its name."""
    found = {}
    for folder, prefix in ((ROOT / "ddim_fast", PACKAGE), (ROOT / "kernels", f"{PACKAGE}.kernels")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((prefix, *(part for part in parts if part != "__init__")))] = path
    return found


SOURCES = sources()
TREES = {module: ast.parse(path.read_text()) for module, path in SOURCES.items()}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(module: str) -> set[str]:
    """The modules of the package that a module imports: at its top, in functions, and for type checkers."""
    package = module if SOURCES[module].name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join((*parts, *([node.module] if node.module else [])))
            found |= {name if (name := f"{base}.{alias.name}") in SOURCES else base for alias in node.names}
    return {name for name in found if name in SOURCES and name != module}


def room_of(module: str) -> str:
    path = relative(SOURCES[module])
    inside = [room for room in rooms() if path == room or path.startswith(f"{room}/")]
    assert inside, f"{path} lies in no room of CONTRIBUTING.md"
    return max(inside, key=len)


def test_imports_point_down():
    floor = {room: number for number, room in enumerate(rooms())}
    upwards = [
        f"{relative(SOURCES[module])} imports {relative(SOURCES[target])}"
        for module in SOURCES
        for target in imports(module)
        if floor[room_of(target)] < floor[room_of(module)]
    ]
    assert not upwards, "\n".join(["these imports point up:", *sorted(upwards)])


def test_no_import_goes_in_a_circle():
    graph = {module: imports(module) for module in SOURCES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("a circle of imports: " + " -> ".join(error.args[1]))


def defined_names() -> set[str]:
    """Every private name that the package itself gives to a function, a class, a variable, an attribute or an argument."""
    names = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
                names.add(node.name)
            elif isinstance(node, ast.arg) or (isinstance(node, ast.keyword) and node.arg):
                names.add(node.arg)
            elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
                names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return names


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def private_names(module: str, own: set[str]) -> list[str]:
    """Where a module uses what other libraries keep to themselves."""
    found = []
    for node in ast.walk(TREES[module]):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and not node.level and node.module and node.module.split(".")[0] in FOREIGN:
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [
                part for alias in node.names if alias.name.split(".")[0] in FOREIGN for part in alias.name.split(".")
            ]
        elif isinstance(node, ast.Attribute):
            names = [] if node.attr in own else [node.attr]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            constants = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            names = [name for name in constants if name not in own]
        path = relative(SOURCES[module])
        allowed = PUBLIC | OF_AN_ORIGINAL.get(path, set())
        found += [f"{path}:{node.lineno}: {name}" for name in names if is_private(name) and name not in allowed]
    return found


def test_private_names_of_other_libraries_stand_in_their_files_alone():
    own = defined_names()
    found = [
        where
        for module in SOURCES
        if relative(SOURCES[module]) not in INTERNALS
        for where in private_names(module, own)
    ]
    assert not found, "\n".join(["private names outside of the files made for them:", *sorted(found)])


def loaded_after(code: str) -> list[str]:
    """The modules that a new Python has loaded after ``code``."""
    words = [sys.executable, "-c", f"{code}\nimport sys; print('loaded:', *sorted(sys.modules))"]
    ran = subprocess.run(words, capture_output=True, text=True, check=True)
    return ran.stdout.split("loaded:")[1].split()


NOT_LOADED = ("gpu_lab", "verify", "search", "tradeoff", "generation", "commands", "integrations", "sampling.optimize")


def test_importing_the_package_loads_no_more_than_sampling_needs():
    loaded = loaded_after("import torch, ddim_fast; torch.ops.ddim_fast.step_")  # beside torch, at once
    rooms_loaded = [name for name in loaded for room in NOT_LOADED if name.startswith(f"{PACKAGE}.{room}")]
    assert not rooms_loaded
    assert not {"PIL", "click", "matplotlib", "scipy", "triton", "diffusers"} & {*loaded}


OF_SECONDS = {"torch", "numpy", "scipy", "tqdm", "PIL", "safetensors"}
"""What the first name of the package loads, and the command line must not, to say what its options are."""
HELP = """
from click.testing import CliRunner
from ddim_fast.cli import main
for words in ([], *([name] for name in main.commands)):
    said = CliRunner().invoke(main, [*words, "--help"])
    assert said.exit_code == 0 and "Usage:" in said.output, said
    said = CliRunner().invoke(main, [*words, "--no-such-option"])
    assert said.exit_code == 2 and "No such option" in said.output, said
assert CliRunner().invoke(main, ["--version"]).exit_code == 0
"""


def test_help_and_usage_errors_of_every_command_load_nothing_that_takes_seconds():
    assert not OF_SECONDS & {*loaded_after(HELP)}


FIRST_NAME = """
import sys
import ddim_fast as df
assert df.__version__ and df.__doc__ and not hasattr(df, "__wrapped__") and "torch" not in sys.modules
assert df.plans.timesteps.SPACINGS and {"slerp", "DDIMSampler"} <= {*dir(df)} and not hasattr(df, "no_such_name")
from ddim_fast import *
assert slerp is df.slerp and ddim_step is df.ddim_step
"""


def test_the_package_loads_its_names_when_the_first_is_asked_for():
    assert "torch" in loaded_after(FIRST_NAME)


MAKERS = {
    "arange",
    "as_tensor",
    "asarray",
    "empty",
    "empty_strided",
    "eye",
    "full",
    "linspace",
    "logspace",
    "normal",
    "ones",
}
MAKERS |= {"rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"}
"""Functions of torch that make a tensor on the caller's default device, unless they are given one."""
OF_NO_DEFAULT_DTYPE = {"as_tensor", "asarray", "normal", "randint", "randperm"}
"""Those of them that ask for no default dtype, or whose callers give them a tensor."""
DEFAULT_DTYPE_OF_THE_ORIGINAL = {"randn", "linspace", "full", "tensor"}
"""What drop-ins make in the caller's default dtype, because their originals do."""


def makers_without(module: str) -> list[str]:
    """Where a module leaves the device or the dtype of a new tensor to the caller's defaults."""
    found, path = [], relative(SOURCES[module])
    for node in ast.walk(TREES[module]):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        function = node.func
        if not isinstance(function.value, ast.Name) or function.value.id != "torch" or function.attr not in MAKERS:
            continue
        dropped_in = path.startswith("ddim_fast/integrations/") and function.attr in DEFAULT_DTYPE_OF_THE_ORIGINAL
        wanted = {"device"} if dropped_in or function.attr in OF_NO_DEFAULT_DTYPE else {"device", "dtype"}
        if missing := wanted - {keyword.arg for keyword in node.keywords}:
            found.append(f"{path}:{node.lineno}: torch.{function.attr} without {' and '.join(sorted(missing))}")
    return found


def test_every_new_tensor_names_its_device_and_dtype():
    found = [where for module in SOURCES for where in makers_without(module)]
    assert not found, "\n".join(["these follow the caller's default device or dtype:", *sorted(found)])


def holds_arrays(annotation: ast.expr) -> bool:
    """Whether a field's type is a tensor or an array, or a container of them (but not a function that takes or returns some)."""
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Callable":
        return False
    if isinstance(annotation, (ast.Name, ast.Attribute)):
        return ast.unparse(annotation) in ("Tensor", "torch.Tensor", "np.ndarray")
    return any(holds_arrays(child) for child in ast.iter_child_nodes(annotation) if isinstance(child, ast.expr))


def test_records_that_hold_tensors_are_compared_by_identity_or_by_a_rule_of_their_own():
    """Python would compare their tensors, whose truth torch calls ambiguous, and hash them by their addresses."""
    found = []
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            decorators = [ast.unparse(d) for d in node.decorator_list] if isinstance(node, ast.ClassDef) else []
            if not any(d.startswith("dataclass") for d in decorators) or any("eq=False" in d for d in decorators):
                continue
            assert isinstance(node, ast.ClassDef)
            own = any(isinstance(member, ast.FunctionDef) and member.name == "__eq__" for member in node.body)
            if not own and any(isinstance(m, ast.AnnAssign) and holds_arrays(m.annotation) for m in node.body):
                found.append(f"{relative(SOURCES[module])}:{node.lineno}: {node.name}")
    assert not found, "\n".join(["these need eq=False, or an __eq__:", *sorted(found)])
