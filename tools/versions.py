"""Print the versions of Python and of all packages in pyproject.toml, as docs/VERSIONS.md lists
them.

usage: python tools/versions.py
"""

import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version


def main() -> None:
    names = {re.split(r"[<>=!~;\[ ]", line)[0].lower() for line in requires("ddim-fast") or ()}
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    print(f"Python {platform.python_version()}, " + ", ".join(f"{name} {found[name]}" for name in sorted(found)))


if __name__ == "__main__":
    main()
