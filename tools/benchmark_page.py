"""Write docs/BENCHMARKS.md from runs of `make bench`.

\b
make bench OUT=out/first && make bench OUT=out/second && make bench-avx2 OUT=out/avx2
python tools/benchmark_page.py write out/first/bench.json --again out/second/bench.json --beside out/avx2/bench.json
python tools/benchmark_page.py render
"""

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import median

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from compare import EVEN, THRESHOLD, agreement, read_run  # noqa: E402

JSON_FILE, DOCUMENT = ROOT / "docs" / "benchmarks.json", ROOT / "docs" / "BENCHMARKS.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
LEFT_OUT = ("calls_per_round", "ratio_to_baseline", "ratio_spread", "bytes_formula", "stable", "gigabytes_per_second")
QUIET = 0.05
"""The share of processors that other processes may use before a run counts as disturbed."""

SCHEDULERS = "diffusers", "ours"
SIDES = "ours", "eager"
OTHER_WAYS = "ours, own loop", "ours, drop-in"

ABOUT = {
    "One step": """One update, x_t to x_prev, and how many times longer others take, like with like: in place against in place, the
        rest against ours into a given buffer. Noise (`eta1`) is part of the step. The last column is bandwidth: our bytes
        per second over those of `a = b * s + c` on as much data in the same rounds, and the same without the cost of a call.""",
    "Whole loops, without a model": """The model returns a tensor that was there before, so that only the sampler is left. *Ours* is
        `DDIMSampler.sample`; *own loop* is `ddim_step` in a loop of your own; *drop-in* is diffusers' loop with
        `FastDDIMScheduler`; *eager* is the formula in PyTorch with coefficients made before. Seconds of whole loops, and how
        many times longer others take than `sample`.""",
    "Pictures, end to end": """The model that ships, from the same x_T and the same labels: the time of diffusers' own
        `DDIMPipeline` over ours. All draw the same pictures, within one of 255 grey levels. The shares say where a run of
        ours spends its time.""",
    "A robot's policy": """A plan of 16 actions of 7 numbers, one at a time, from a small 1-D U-Net: here a step of the model costs
        little, and what surrounds it counts. *transposed*: the model turns its input and output by views, so that its
        output is not contiguous. *model alone* is the least that any sampler could take.""",
    "Noise": """`torch.randn` into a buffer, against our normals, which are the same on every machine, and against a whole step
        that makes them.""",
    "A call": "A step of 16 elements, all checks included.",
    "The host's part, for a GPU": """Microseconds of the host, with nothing behind it that a GPU would do: finding out that a U-Net
        of that structure is as it was when its graph was captured; a call whose graph is there, without its replays; a step
        that is launched by itself, to a driver that launches nothing, beside `x.add_(m)` on the CPU.""",
    "The drop-in for diffusers": """`step` of `FastDDIMScheduler`, or of the class named, and how many times longer that of the
        original takes.""",
    "Convolutions": """A 3 x 3 convolution of a model, channels last, in float32: ours has a quarter of the products (Winograd's minimal
        filtering) and takes the place of PyTorch's in a model that `optimize` has made faster.""",
    "Time to quality": """Pictures of the model that ships, as near to converged samples as those of diffusers' `DDIMPipeline` in 50
        steps: ours are eight steps of the [solver that was fitted](TRADEOFF.md#fitted-solvers-against-everybody) with the
        model that `optimize` made faster, and the others are diffusers' schedulers, each with the fewest model calls (in
        parentheses) that come as near. How many times longer they take.""",
    "Log-probabilities": """A noisy step with the log-probability of what it drew, and the log-probability of a given x_prev with its
        gradient in the model's output, against [the published formulas](LOG_PROB.md) in PyTorch; and against the step
        alone.""",
    "Threads": "A step in place: times faster on more threads than on one, and eager PyTorch's time over ours.",
    "Batches": "The model that ships, 20 steps, by pictures at once and by threads.",
}
"""The text before the table of each section."""

# --- Reducing ---------------------------------------------------------------------------------------------------------


def reduced(data: dict) -> dict:
    """Return the part of a pytest-benchmark file that the page and ``benchmarks/compare.py`` need.

    It keeps the file's structure.
    """
    return {
        "machine_info": {"ddim_fast": data["machine_info"]["ddim_fast"]},
        "commit_info": {name: data["commit_info"][name] for name in ("id", "dirty")},
        "datetime": data["datetime"],
        "benchmarks": [
            {
                "fullname": one["fullname"],
                "group": one["group"],
                "extra_info": {k: _rounded(v) for k, v in one["extra_info"].items() if k not in LEFT_OUT},
            }
            for one in data["benchmarks"]
        ],
    }


def _rounded(value):
    """Round numbers to four digits; NaN and infinity become null."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


# --- Writing ----------------------------------------------------------------------------------------------------------


def rendered(data: dict) -> str:
    """Return the text between the markers."""
    infos = {one["fullname"]: one["extra_info"] for one in data["benchmarks"]}
    sections = [section(found) for prefix, section in SECTIONS.items() if (found := _of(infos, prefix))]
    return "\n\n".join([measured_where(data), *sections, *beside(data), *repeated(data)])


def _of(infos: dict, prefix: str) -> list[dict]:
    return [info for name, info in infos.items() if name.startswith(prefix)]


def _section(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    return f"## {title}\n\n{' '.join(ABOUT[title].split())}\n\n{_table(columns, rows)}"


def _table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _number(value: float) -> str:
    """Format a number with three digits near 1 and below, two above, and no exponent."""
    return (
        f"{value:.3f}"
        if value < 0.1
        else f"{value:.2f}"
        if value < 2
        else f"{value:.1f}"
        if value < 10
        else f"{value:.0f}"
    )


def _share(value: float | None) -> str:
    return "?" if value is None else f"{100 * value:.0f} %"


def _ratio(info: dict, other: str, ours: str) -> str:
    """Format a ratio and its spread."""
    found = info["ratios"].get(f"{other} / {ours}")
    return f"{_number(found['ratio'])} ({_share(found['spread'])})" if found else "–"


def _time(seconds: float) -> str:
    unit, scale = next((u, s) for u, s in (("s", 1), ("ms", 1e-3), ("µs", 1e-6), ("ns", 0)) if seconds >= s)
    return f"{_number(seconds / (scale or 1e-9))} {unit}"


def measured_where(data: dict) -> str:
    facts, commit = data["machine_info"]["ddim_fast"], data["commit_info"]
    versions = [f"{name} {facts[name]}" for name in ("torch", "diffusers", "numpy", "python")]
    rows = [
        ("processor", _processor(facts)),
        ("threads", f"{facts['threads']}, where nothing else is said"),
        ("versions", ", ".join([f"ddim_fast {facts['version']}", *versions])),
        ("commit", f"`{commit['id'][:12]}`{' and changes that were not committed' if commit['dirty'] else ''}"),
        ("date", data["datetime"][:10]),
        (
            "cases",
            f"{len(data['benchmarks'])}{', **a quick run: some of them, briefly**' if facts['quick'] else ', all'}",
        ),
        ("what else ran", _what_else_ran(data)),
    ]
    return "## Measured where\n\n" + _table(["", ""], rows)


def _processor(facts: dict) -> str:
    limits = " ".join(f"{name}={value}" for name, value in facts.get("limited_by", {}).items())
    return (
        f"{facts['cpu_model']}, {facts['cpu_count']} processors, {facts['instruction_set']}{limits and f' ({limits})'}"
    )


def _what_else_ran(data: dict) -> str:
    others = [one["extra_info"]["processors_of_others"] for one in data["benchmarks"]]
    others = sorted(value for value in others if value is not None)
    if not others:
        return "unknown"
    quiet = others[-1] <= QUIET * data["machine_info"]["ddim_fast"]["cpu_count"]
    verdict = "quiet" if quiet else "**not quiet: read one digit, not two**"
    return (
        f"used {others[len(others) // 2]:.2f} processors (median over the cases), {others[-1]:.2f} at most: {verdict}"
    )


def steps(infos: list[dict]) -> str:
    columns = ("step", "shape", "dtype", "ours, in place", "diffusers", "eager PyTorch", "torch.compile")
    return _section("One step", (*columns, "torch.compile, in place", "share of the triad"), map(_step, infos))


def _step(info: dict) -> list[str]:
    in_place = "ours in place"
    pairs = [name.partition(" / ") for name in info["ratios"]]
    compiled = [other for other, _, ours in pairs if other.startswith("torch.compile") and ours == in_place]
    shares = info["triad_share"]
    return [
        *(info[name] for name in ("variant", "shape", "dtype")),
        _time(info["seconds"][in_place]),
        *(_ratio(info, other, "ours out") for other in ("diffusers", "eager", "torch.compile")),
        _ratio(info, min(compiled, key=info["seconds"].__getitem__, default=""), in_place),
        f"{shares['in place']:.2f} ({shares['in place, kernel']:.2f})" if shares else "–",
    ]


def loops(infos: list[dict]) -> str:
    others = ("diffusers", "eager")
    rows = ([info["shape"], info["steps"], *_against_ours(info, others)] for info in infos)
    return _section("Whole loops, without a model", ("shape", "steps", "ours", *others, *OTHER_WAYS), rows)


def robot(infos: list[dict]) -> str:
    others = ("diffusers", "eager", "model alone")
    rows = ([info["layout"], info["steps"], *_against_ours(info, others)] for info in infos)
    return _section("A robot's policy", ("layout", "steps", "ours", *others, *OTHER_WAYS), rows)


def _against_ours(info: dict, others: tuple[str, ...]) -> list[str]:
    """Return our time, the ratios of the others, and the times of our other loops."""
    seconds = info["seconds"]
    ways = [_time(seconds[name]) for name in OTHER_WAYS]
    return [_time(seconds["ours"]), *(_ratio(info, other, "ours") for other in others), *ways]


def pictures(infos: list[dict]) -> str:
    pairs = list(dict.fromkeys(name for info in infos for name in info["ratios"]))
    parts = ("model", "update", "rest")
    rows = (
        [
            info["pictures"],
            info["steps"],
            _time(info["seconds"]["ours"]),
            *(_ratio(info, *pair.split(" / ")) for pair in pairs),
            *(f"{100 * info['share'][part]:.2f} %" for part in parts),
        ]
        for info in infos
    )
    return _section("Pictures, end to end", ("pictures", "steps", "ours", *pairs, *parts), rows)


def noise(infos: list[dict]) -> str:
    names = ("torch.randn", "ours, normals", "ours in place")
    rows = (
        [
            info["shape"],
            *(f"{info['ns_per_element'][name]:.2f} ns" for name in names),
            *(_ratio(info, names[0], name) for name in names[1:]),
        ]
        for info in infos
    )
    columns = (
        "shape",
        "torch.randn, an element",
        "our normals",
        "a step at eta = 1",
        "randn / normals",
        "randn / step",
    )
    return _section("Noise", columns, rows)


def calls(infos: list[dict]) -> str:
    rows = ((f"`{name}`" if "(" in name else name, _time(s)) for info in infos for name, s in info["seconds"].items())
    return _section("A call", ("call", "time"), rows)


def host(infos: list[dict]) -> str:
    rows = ((info["case"], name, _time(s)) for info in infos for name, s in info["seconds"].items())
    return _section("The host's part, for a GPU", ("what", "how", "time"), rows)


def drop_ins(infos: list[dict]) -> str:
    one_step = [info for info in infos if "returns" in info]
    rows = [
        (
            *(info[name] for name in ("step", "shape", "returns")),
            _time(info["seconds"]["ours"]),
            _ratio(info, *SCHEDULERS),
        )
        for info in one_step
    ]
    runs = [info for info in infos if "run" in info]
    table = _table(
        ("a run", "steps", "ours", "diffusers"),
        ((info["run"], info["steps"], _time(info["seconds"]["ours"]), _ratio(info, *SCHEDULERS)) for info in runs),
    )
    more = [f"A whole run, with its timesteps and without a model:\n\n{table}"] if runs else []
    more += [
        f"A pipeline of {info['steps']} steps, with a U-Net as small as one can be: {_ratio(info, *SCHEDULERS)}."
        for info in infos
        if info not in one_step and info not in runs
    ]
    columns = ("step", "shape", "returns", "ours", "diffusers")
    return "\n\n".join([_section("The drop-in for diffusers", columns, rows), *more])


def convolutions(infos: list[dict]) -> str:
    rows = (
        [
            *(info[name] for name in ("channels", "picture", "batch")),
            _time(info["seconds"]["ours"]),
            _ratio(info, "PyTorch", "ours"),
        ]
        for info in infos
    )
    return _section("Convolutions", ("channels", "picture", "at once", "ours", "PyTorch"), rows)


def qualities(infos: list[dict]) -> str:
    pairs = list(dict.fromkeys(name for info in infos for name in info["ratios"]))
    others = [pair.removesuffix(" / ours") for pair in pairs]
    rows = (
        [
            info["pictures"],
            _time(info["seconds"]["ours"]),
            *(f"{_ratio(info, *pair.split(' / '))}" for pair in pairs),
        ]
        for info in infos
    )
    calls = infos[0]["calls"]
    columns = [f"{name} ({calls.get(name, calls['ours'])})" for name in others]
    return _section("Time to quality", ("pictures", f"ours ({calls['ours']})", *columns), rows)


def log_probabilities(infos: list[dict]) -> str:
    rows = [
        [
            "x_prev and its log-probability" if "of_the_step_alone" in info else "a log-probability and its gradient",
            *(info[name] for name in ("shape", "dtype")),
            _time(info["seconds"]["ours"]),
            *(_ratio(info, other, "ours") for other in ("eager", "torch.compile")),
            _number(info["of_the_step_alone"]) if "of_the_step_alone" in info else "–",
        ]
        for info in infos
    ]
    columns = ("what", "shape", "dtype", "ours", "eager PyTorch", "torch.compile", "ours, of the step alone")
    return _section("Log-probabilities", columns, rows)


def threads(infos: list[dict]) -> str:
    more = list(infos[0]["times_faster_than_one_thread"]["ours"])[1:]
    rows = (
        [
            info["variant"],
            info["shape"],
            *(_number(info["times_faster_than_one_thread"][who][n]) for who in SIDES for n in more),
            *(_ratio(info, f"eager {_on(n)}", f"ours {_on(n)}") for n in ("1", *more)),
        ]
        for info in infos
    )
    gains = [f"{who}, {_on(n)}" for who in SIDES for n in more]
    return _section("Threads", ("step", "shape", *gains, *(f"eager / ours, {_on(n)}" for n in ("1", *more))), rows)


def _on(n: str) -> str:
    return f"{n} thread{'' if n == '1' else 's'}"


def batches(infos: list[dict]) -> str:
    (info,) = infos
    first, *_ = info["seconds"]
    rows = (
        (name.removeprefix("ours "), _number(rate), "1" if name == first else _ratio(info, first, name))
        for name, rate in info["pictures_per_second_of_20_steps"].items()
    )
    return _section("Batches", ("at once", "pictures a second", "times faster than one by one"), rows)


SECTIONS = {
    "bench_step.py::": steps,
    "bench_loops.py::": loops,
    "bench_sampling.py::": pictures,
    "bench_time_to_quality.py::": qualities,
    "bench_convolution.py::": convolutions,
    "bench_robot.py::": robot,
    "bench_log_prob.py::": log_probabilities,
    "bench_noise.py::": noise,
    "bench_overhead.py::": calls,
    "bench_host.py::": host,
    "bench_drop_ins.py::": drop_ins,
    "bench_scaling.py::test_threads": threads,
    "bench_scaling.py::test_batches": batches,
}
"""Prefixes of case names, and the function that writes their section."""


COMPARED = {
    "bench_step.py::": ("diffusers / ours out", "eager / ours out", "torch.compile / ours out"),
    "bench_loops.py::": ("diffusers / ours", "eager / ours"),
    "bench_sampling.py::": ("diffusers / ours", "diffusers / ours, optimized"),
    "bench_time_to_quality.py::": ("DDIMPipeline / ours", "DPM-Solver++(3M) / ours", "ours, model as it is / ours"),
    "bench_convolution.py::": ("PyTorch / ours",),
    "bench_robot.py::": ("eager / ours", "model alone / ours"),
    "bench_log_prob.py::": ("eager / ours", "torch.compile / ours"),
    "bench_noise.py::": ("torch.randn / ours, normals",),
}
"""Prefixes of case names, and their ratios that two kinds of processor are compared by."""


def beside(data: dict) -> list[str]:
    """Return the section that compares with a run on another kind of processor, if there is one."""
    if "beside" not in data:
        return []
    runs = [data, data["beside"]]
    both = set.intersection(*({one["fullname"] for one in run["benchmarks"]} for run in runs))
    rows = []
    for prefix, pairs in COMPARED.items():
        for pair in pairs:
            found = [_ratios_of(run, {name for name in both if name.startswith(prefix)}, pair) for run in runs]
            if all(found):
                infos = _of({one["fullname"]: one["extra_info"] for one in data["benchmarks"]}, prefix)
                title = SECTIONS[prefix](infos).partition("\n")[0].removeprefix("## ")
                rows.append([title, pair, *map(_middle, found)])
    sets = [run["machine_info"]["ddim_fast"]["instruction_set"] for run in runs]
    facts = data["beside"]["machine_info"]["ddim_fast"]
    return [
        "## Another kind of processor\n\n"
        f"{'A part of it, briefly,' if facts['quick'] else 'The same'} on {_processor(facts)}. "
        f"What else ran there {_what_else_ran(data['beside'])}. The "
        "median over the cases that both ran, and in parentheses the least and the most.\n\n"
        + _table(["table", "times as long", *sets], rows)
    ]


def _ratios_of(run: dict, names: set[str], pair: str) -> list[float]:
    ratios = (one["extra_info"]["ratios"].get(pair) for one in run["benchmarks"] if one["fullname"] in names)
    return sorted(found["ratio"] for found in ratios if found)


def _middle(ratios: list[float]) -> str:
    spread = f" ({_number(ratios[0])} to {_number(ratios[-1])})" if len(ratios) > 1 else ""
    return f"{_number(median(ratios))}{spread}"


def repeated(data: dict) -> list[str]:
    if "again" not in data:
        return []
    same = data["again"]["agreement"]
    return [
        "## Measured twice\n\n"
        f"A second run after the first: {same['agree_on_which_is_faster']} of {same['ratios']} ratios agree on which is faster "
        f"({same['even']} of them are within {EVEN:.0%} of 1 in a run, and count as even). {same['within_threshold']} differ by "
        f"{THRESHOLD:.0%} or less, half of them by {same['median_difference']:.1%} or less; the largest difference is "
        f"{same['largest_difference']:.0%}, in `{same['largest_difference_in']}`."
    ]


def with_numbers(document: str, data: dict) -> str:
    before, _, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise click.ClickException(f"{DOCUMENT} must have the lines {BEGIN} and {END}, and lacks one: restore it")
    return f"{before}{BEGIN}\n\n{rendered(data)}\n\n{END}{after}"


def render(data: dict) -> None:
    DOCUMENT.write_text(with_numbers(DOCUMENT.read_text(), data))


# --- Commands ---------------------------------------------------------------------------------------------------------


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command("write", help="Write docs/benchmarks.json and the page from a file that make bench wrote.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--again", type=click.Path(path_type=Path), help="A second run, to report how well it repeats the first.")
@click.option("--beside", "other", type=click.Path(path_type=Path), help="A run on another kind of processor.")
def write_command(file: Path, again: Path | None, other: Path | None) -> None:
    run = read_run(file)
    data = reduced(json.loads(file.read_text()))
    if other is not None:
        read_run(other)
        data["beside"] = reduced(json.loads(other.read_text()))
        for one in data["beside"]["benchmarks"]:
            one["extra_info"] = {name: one["extra_info"].get(name) for name in ("ratios", "processors_of_others")}
    if again is not None:
        data["again"] = {"agreement": _rounded(agreement(run, read_run(again)))}
    JSON_FILE.write_text(json.dumps(data, indent=1) + "\n")
    render(data)


@main.command("render", help="Regenerate the page from docs/benchmarks.json.")
def render_command() -> None:
    render(json.loads(JSON_FILE.read_text()))


if __name__ == "__main__":
    main()
