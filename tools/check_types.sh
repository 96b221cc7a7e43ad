#!/usr/bin/env bash
# Check the types of the package with mypy, and those of what a user writes with mypy and, where it is
# installed, pyright: against an editable install and against a wheel. A separate environment has only
# the package, and uses the dependencies of BIN. tests/typing/user_mistakes.py holds what must be an
# error: a comment there that ignores nothing is one.
# usage: tools/check_types.sh BIN   (the bin folder of an environment with mypy and the dependencies)
set -euo pipefail
bin=$(realpath -s "$1")
cd "$(dirname "$0")/.."
work=$(mktemp -d)
cache=$PWD/.mypy_cache  # torch alone takes a minute
trap 'rm -rf "$work"' EXIT
failed=0

echo "mypy: the package"
"$bin/mypy" --cache-dir "$cache" -p ddim_fast 2>&1 | sed "s#^ddim_fast/kernels/#kernels/#" || failed=1

mkdir "$work/source" "$work/user"
cp tests/typing/user_*.py "$work/user"
tar cf - --exclude __pycache__ --exclude "*.so" setup.py pyproject.toml README.md LICENSE pytest_ddim_fast.py ddim_fast kernels | tar xf - -C "$work/source"
# Type checking does not need the extension: without a compiler, the package builds in seconds.
export DDIM_FAST_REQUIRE_EXTENSION=0 CXX=false
"$bin/python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$work" "$work/source"

for how in "an editable install" "a wheel"; do
  # A moved package may not be found in an old cache, so each has an environment of its own.
  venv="$work/${how##* }"
  "$bin/python" -m venv --without-pip "$venv"
  site=$("$venv/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
  realpath "$("$bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")" > "$site/borrowed.pth"
  case $how in
    *editable*) what=(--no-build-isolation --editable "$work/source") ;;
    *) what=(--no-index "$work"/*.whl) ;;
  esac
  "$bin/python" -m pip --python "$venv/bin/python" install --quiet --no-deps "${what[@]}"
  echo "mypy: a user's script, against $how"
  (cd "$work/user" && "$bin/mypy" --cache-dir "$cache" --python-executable "$venv/bin/python" --warn-unused-ignores user_*.py) || failed=1
  if [[ -x $bin/pyright ]]; then
    echo "pyright: a user's script, against $how"
    (cd "$work/user" && "$bin/pyright" --pythonpath "$venv/bin/python" user_*.py) || failed=1
  else
    echo "pyright: not installed in $bin, so mypy alone has looked: pip install pyright"
  fi
done
exit $failed
