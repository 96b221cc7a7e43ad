"""Count the pipelines of the installed diffusers whose scheduler has a drop-in here.

    python tools/scheduler_coverage.py

A pipeline counts where the type of its constructor's argument ``scheduler`` names a class, or one
of several, that has a drop-in. Pipelines are read, not imported.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import diffusers
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

from ddim_fast.integrations.diffusers.choose import DROP_INS


def schedulers_of_pipelines() -> dict[str, frozenset[str]]:
    """Return the names of the schedulers that each pipeline's ``scheduler`` may be."""
    found: dict[str, frozenset[str]] = {}
    for file in sorted(Path(diffusers.__file__).parent.glob("pipelines/**/*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Pipeline"):
                names = frozenset(_named(node))
                if names:
                    found[node.name] = names
    return found


def _named(pipeline: ast.ClassDef) -> Iterator[str]:
    for method in pipeline.body:
        if not isinstance(method, ast.FunctionDef) or method.name != "__init__":
            continue
        for argument in (*method.args.args, *method.args.kwonlyargs):
            if argument.arg == "scheduler" and argument.annotation is not None:
                for part in ast.walk(argument.annotation):
                    name = part.id if isinstance(part, ast.Name) else getattr(part, "value", None)
                    if name == "KarrasDiffusionSchedulers":
                        yield from (member.name for member in KarrasDiffusionSchedulers)
                    elif isinstance(name, str) and "Scheduler" in name:
                        yield name


def main() -> None:
    ours = {original.__name__ for original in DROP_INS}
    pipelines = schedulers_of_pipelines()
    covered = [name for name, schedulers in pipelines.items() if schedulers & ours]
    left: Counter[str] = Counter()
    for name, schedulers in pipelines.items():
        if name not in covered:
            left[", ".join(sorted(schedulers))] += 1
    print(f"diffusers {diffusers.__version__}: {len(covered)} of {len(pipelines)} pipelines that name their scheduler")
    print(f"({len(covered) / len(pipelines):.1%}) name one with a drop-in: {', '.join(sorted(ours))}")
    print("without:")
    for schedulers, count in left.most_common():
        print(f"{count:4} {schedulers}")


if __name__ == "__main__":
    main()
