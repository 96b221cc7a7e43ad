#!/usr/bin/env bash
# Check the types of the package and of a user's script with mypy's defaults: against the source
# tree, which an editable install imports, and against an installed wheel.
# usage: tools/check_types.sh BIN   (the bin folder of an environment with mypy and the dependencies)
set -euo pipefail
bin=$(realpath -s "$1")
cd "$(dirname "$0")/.."
script=tests/typing/user_script.py
work=$(mktemp -d)
cache=$PWD/.mypy_cache  # torch alone takes a minute
trap 'rm -rf "$work"' EXIT
failed=0

# kernels/ is installed as ddim_fast.kernels. An editable install maps it with an import hook, which
# type checkers do not run, so this builds the same tree from links.
tree=build/types
rm -rf $tree
mkdir -p $tree/ddim_fast
for entry in ddim_fast/*; do [[ $entry == */__pycache__ ]] || ln -s "../../../$entry" "$tree/$entry"; done
ln -s ../../../kernels $tree/ddim_fast/kernels
echo "mypy: the source tree"
MYPYPATH=$tree "$bin/mypy" --cache-dir "$cache" -p ddim_fast 2>&1 | sed "s#^$tree/ddim_fast/kernels/#kernels/#; s#^$tree/##" || failed=1
echo "mypy: a user's script, against the source tree"
MYPYPATH=$tree "$bin/mypy" --cache-dir "$cache" $script || failed=1

# Checking the source does not check the wheel: py.typed or a module may be missing from it. A
# separate environment has only the wheel, and uses the dependencies of BIN.
"$bin/python" -m venv --without-pip "$work/venv"
site=$("$work/venv/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
realpath "$("$bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")" > "$site/borrowed.pth"
mkdir "$work/source"
tar cf - --exclude __pycache__ setup.py pyproject.toml README.md LICENSE pytest_ddim_fast.py ddim_fast kernels | tar xf - -C "$work/source"
# Type checking does not need the extension: without a compiler, the wheel builds in seconds.
DDIM_FAST_REQUIRE_EXTENSION=0 CXX=false "$bin/python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$work" "$work/source"
"$bin/python" -m pip install --quiet --no-deps --no-index --target "$site" "$work"/*.whl
cp $script "$work"
cd "$work"
echo "mypy: a user's script, against the wheel"
"$bin/mypy" --cache-dir "$cache" --python-executable "$work/venv/bin/python" "${script##*/}" || failed=1
exit $failed
