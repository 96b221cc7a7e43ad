"""Builds ddim_fast. What needs no code is in pyproject.toml; here are the package folders and the C++ extension.

The extension is compiled by ninja, one file per instruction set, and needs neither torch nor numpy to build. Where there is no C++
compiler, installing goes on without it: ddim_fast then computes with its PyTorch reference and says so once.
"""

import os
import platform
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
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
# File -> flags of its own. Files for x86 are left out elsewhere.
PORTABLE = {"module.cpp": [], "parallel.cpp": [], "isa_portable.cpp": []}
X86 = {"isa_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"], "isa_avx512.cpp": ["-mavx512f", "-mfma", "-mf16c"]}


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def find_compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    raise CompileError("no C++ compiler found: looked for $CXX, c++, g++ and clang++")


def find_ninja() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        path = shutil.which("ninja")
        if path is None:
            raise CompileError("ninja not found: pip install ninja") from None
        return path


def ninja_file(compiler: str, output: Path) -> str:
    """The text of a build.ninja that compiles each source with its flags and links ``output``."""
    extra = os.environ.get("DDIM_FAST_CXXFLAGS", "")  # for sanitizers
    flags = " ".join([*COMMON_FLAGS, extra, f"-I{sysconfig.get_path('include')}"])
    sources = dict(PORTABLE)
    if is_x86():
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
    def build_extension(self, ext: Extension) -> None:
        compiler, ninja = find_compiler(), find_ninja()
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp)
        for directory in (folder, output.parent):
            directory.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(compiler, output))
        try:
            subprocess.run([ninja, "-C", str(folder)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"the C++ kernel did not build ({error}); installing without it") from error


setup(
    version=re.search(r'__version__ = "(.+)"', (ROOT / "ddim_fast/_version.py").read_text()).group(1),
    # The folder kernels/ is installed as ddim_fast.kernels.
    packages=[*find_packages(include=["ddim_fast", "ddim_fast.*"]), "ddim_fast.kernels"],
    py_modules=["pytest_ddim_fast"],  # outside the package: see there
    package_dir={"ddim_fast": "ddim_fast", "ddim_fast.kernels": "kernels"},
    include_package_data=False,  # the sources of the kernel stay in the sdist
    package_data={
        "ddim_fast": ["py.typed", "weights/*.safetensors", "weights/*.md"],
        "ddim_fast.tradeoff": ["report.html.jinja", "report.css", "report.js"],
        "ddim_fast.verify.reports": ["report.schema.json", "report.html.jinja", "report.css", "report.js"],
        "ddim_fast.verify.truth": ["golden_trajectories.json"],
    },
    ext_modules=[
        Extension(
            "ddim_fast.kernels._cpu_step",
            sources=[str(SOURCES / name) for name in [*PORTABLE, *X86]],
            py_limited_api=True,
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildWithNinja},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
