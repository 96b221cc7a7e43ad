"""Build ddim_fast: the package folders and the C++ extension. Everything else is in pyproject.toml.

Ninja compiles the extension, one file for each instruction set. Neither torch nor NumPy is needed.
Without a working C++ compiler, the package is installed without the extension, and its wheel is
tagged as pure Python: ddim_fast then computes with its PyTorch reference, and says so once.

Environment variables:
    CXX: the compiler, or a cross compiler.
    DDIM_FAST_CXXFLAGS: more flags for compiling and linking, such as a sanitizer's.
    DDIM_FAST_REQUIRE_EXTENSION: 1 makes a missing extension an error.
"""

import contextlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
SOURCES = Path("kernels/csrc")
COMMON_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-pthread",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # a fused multiply-add only where it is written: the bits are part of the contract
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
]
# Source -> its own flags. Other processors leave out the x86 sources.
PORTABLE: dict[str, list[str]] = {
    f"{name}.cpp": []
    for name in (
        "module",
        "plain_tensors",
        "density_calls",
        "layer_calls",
        "density",
        "same_objects",
        "parallel",
        "isa_portable",
    )
}
X86 = {"isa_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"], "isa_avx512.cpp": ["-mavx512f", "-mfma", "-mf16c"]}

REQUIRED = os.environ.get("DDIM_FAST_REQUIRE_EXTENSION", "0") not in ("", "0")
# The extension uses the limited API, which a free-threaded Python does not have.
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


def is_x86(compiler: str) -> bool:
    """Return whether ``compiler`` compiles for x86-64, which is not this machine's processor for a
    cross compiler."""
    try:
        answer = subprocess.run([*shlex.split(compiler), "-dumpmachine"], capture_output=True, text=True, check=True)
        machine = answer.stdout
    except (OSError, subprocess.CalledProcessError):
        machine = platform.machine()
    return machine.strip().lower().startswith(("x86_64", "amd64"))


def find_compiler() -> str:
    """Return the command of the C++ compiler: $CXX where it is set, otherwise the first that
    exists."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(name)[0]):
            return name
    if wanted:
        raise CompileError(f"CXX must name a C++ compiler, got {wanted!r}, which was not found")
    raise CompileError("no C++ compiler found (c++, g++ or clang++): install one, or set CXX")


def find_ninja() -> str:
    """Return the path of the ninja program: of the Python package, or else on the PATH.

    The package's script is passed over. In pip's isolated builds it may belong to another version
    of the package than the one that is imported, and then calls itself for ever.
    """
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    with contextlib.suppress(ImportError):
        import ninja

        folders.insert(0, ninja.BIN_DIR)
    for folder in folders:
        path = shutil.which("ninja", path=folder)
        if path is not None and not Path(path).read_bytes().startswith(b"#!"):
            return path
    raise CompileError("ninja not found: pip install ninja")


def ninja_file(compiler: str, output: Path) -> str:
    """Return a build.ninja that compiles each source with its flags and links ``output``."""
    extra = os.environ.get("DDIM_FAST_CXXFLAGS", "")
    flags = " ".join([*COMMON_FLAGS, extra, f"-I{sysconfig.get_path('include')}"])
    sources = dict(PORTABLE)
    if is_x86(compiler):
        sources |= X86
        flags += " -DDDIM_WITH_X86"
    shared = "-dynamiclib -undefined dynamic_lookup" if platform.system() == "Darwin" else "-shared"
    lines = [
        f"cxx = {compiler}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx {shared} -pthread {extra} $in -o $out",
    ]
    objects = []
    for name, own in sources.items():
        obj = name.replace(".cpp", ".o")
        lines += [f"build {obj}: compile {ROOT.resolve() / SOURCES / name}", f"  flags = {flags} {' '.join(own)}"]
        objects.append(obj)
    lines += [f"build {output}: link {' '.join(objects)}", f"default {output}"]
    return "\n".join(lines) + "\n"


class BuildWithNinja(build_ext):
    """The command that compiles the extension."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            compiler, ninja = find_compiler(), find_ninja()
            folder = Path(self.build_temp)
            for directory in (folder, output.parent):
                directory.mkdir(parents=True, exist_ok=True)
            (folder / "build.ninja").write_text(ninja_file(compiler, output))
            subprocess.run([ninja, "-C", str(folder)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            output.unlink(missing_ok=True)  # left by an earlier build
            raise CompileError(f"the C++ kernel did not compile ({error}): see the compiler's output above") from error
        except CompileError:
            output.unlink(missing_ok=True)
            raise


class Wheel(bdist_wheel):
    """The command that builds a wheel: tagged as pure Python where the extension was not built."""

    def run(self) -> None:
        if self.distribution.has_ext_modules() and not self.skip_build:
            self.run_command("build_ext")
            if not all(Path(path).exists() for path in self.get_finalized_command("build_ext").get_outputs()):
                self.distribution.ext_modules = []
                self.root_is_pure = True
        super().run()
        if self.root_is_pure:
            warn_without_extension()


class Editable(editable_wheel):
    """The command of ``pip install --editable``: a line in a .pth file, which type checkers and
    editors follow, and not an import hook, which they do not run.

    The link ddim_fast/kernels makes that enough. Where it is missing, as in an sdist, it is a hook.
    """

    def finalize_options(self) -> None:
        if (ROOT / "ddim_fast/kernels").is_dir():
            self.distribution.package_dir = {"": "."}
        super().finalize_options()


def warn_without_extension() -> None:
    """Say on stderr that what was built has no extension."""
    reason = "a free-threaded Python cannot load it" if FREE_THREADED else "it did not compile: see above"
    print(
        f"WARNING: ddim_fast was built WITHOUT its C++ extension ({reason}). The wheel is pure Python, and slow on a CPU. "
        "DDIM_FAST_REQUIRE_EXTENSION=1 makes this an error.",
        file=sys.stderr,
    )


if FREE_THREADED and REQUIRED:
    sys.exit(
        "DDIM_FAST_REQUIRE_EXTENSION=1 needs a Python with the limited API, got a free-threaded one: "
        "use a standard build of Python, or unset the variable"
    )

setup(
    version=re.search(r'__version__ = "(.+)"', (ROOT / "ddim_fast/_version.py").read_text()).group(1),
    # The folder kernels/ is installed as ddim_fast.kernels.
    packages=sorted({*find_packages(include=["ddim_fast", "ddim_fast.*"]), "ddim_fast.kernels"}),
    py_modules=["pytest_ddim_fast"],  # outside the package: see there
    package_dir={"ddim_fast": "ddim_fast", "ddim_fast.kernels": "kernels"},
    include_package_data=False,  # the sources of the kernel stay in the sdist
    package_data={
        "ddim_fast": ["py.typed", "weights/*.safetensors"],
        "ddim_fast.tradeoff": ["report.html.jinja", "report.css", "report.js"],
        "ddim_fast.verify.reports": ["report.schema.json", "report.html.jinja", "report.css", "report.js"],
        "ddim_fast.verify.truth": ["golden_trajectories.json"],
    },
    ext_modules=[]
    if FREE_THREADED
    else [
        Extension(
            "ddim_fast.kernels._cpu_step",
            sources=[str(SOURCES / name) for name in [*PORTABLE, *X86]],
            py_limited_api=True,
            optional=not REQUIRED,
        )
    ],
    cmdclass={"build_ext": BuildWithNinja, "bdist_wheel": Wheel, "editable_wheel": Editable},
    options={} if FREE_THREADED else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
