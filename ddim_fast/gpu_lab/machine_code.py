"""Count the GPU kernels' machine code: what a step costs on a GPU that is not there.

The kernels are compiled for a named target by the real launcher, and the result is disassembled
with the tools that come with Triton. Counted are the instructions that one thread executes, the
width of its bulk memory accesses, and spills. From the count and the bytes that a step moves
follows a **prediction**, not a measurement, of the share of memory bandwidth that it can use::

    seconds per element to move  = bytes / bandwidth
    seconds per element to issue = instructions / (processors * lanes * clock)
    share                        = min(1, to move / to issue)

The path counted is the longest one through the kernel that does not call the out-of-line slow paths
of square root and division, which serve subnormal, infinite and NaN arguments. (For AMD it is all
code up to the end of the program: an upper bound.) Latency, occupancy and the launch are not in the
model, which is a bound for large tensors.

    python -m ddim_fast.gpu_lab.machine_code --target sm_90
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch

from ..kernels import triton_backend
from ..kernels.contract import StepCoefficients, StepInputs, StepTable
from ..kernels.density import DensityInputs
from .compiling import Compiled, compiling_for
from .triton_internals import nvidia_tool


@dataclass(frozen=True)
class Device:
    """A GPU's numbers, from its vendor's data sheet.

    Attributes:
        processors: streaming multiprocessors, or compute units.
        lanes: instructions of one thread that a processor issues per clock, over all its
            schedulers.
        clock: Hz.
        bandwidth: bytes per second.
    """

    name: str
    processors: int
    lanes: int
    clock: float
    bandwidth: float


DEVICES = {
    "sm_80": Device("A100 80GB", 108, 128, 1.41e9, 2.039e12),
    "sm_89": Device("L40S", 142, 128, 2.52e9, 0.864e12),
    "sm_90": Device("H100 SXM", 132, 128, 1.755e9, 3.35e12),
    "sm_100": Device("B200", 148, 128, 1.85e9, 8.0e12),
    "sm_120": Device("RTX 5090", 170, 128, 2.407e9, 1.792e12),
    "gfx90a": Device("MI250X, one die", 110, 64, 1.7e9, 1.6e12),
    "gfx942": Device("MI300X", 304, 64, 2.1e9, 5.3e12),
    "gfx950": Device("MI355X", 256, 64, 2.4e9, 8.0e12),
}


@dataclass(frozen=True)
class Variant:
    """A way to call the step, or what ``ddim_log_prob`` launches; ``bytes`` is what it moves per
    element.

    Attributes:
        kernel: "step", "density" (a log-probability) or "gradient" (its gradient in the model's
            output).
        log_prob: whether the step computes its log-probability, too.
    """

    dtype: torch.dtype
    model_dtype: torch.dtype
    noise: str | None = None  # "given", "exact" or "fast"
    clip: bool = False
    thresholds: bool = False
    guidance: bool = False
    x0: bool = False
    mask: bool = False
    histories: int = 0
    model_input: torch.dtype | None = None
    log_prob: bool = False
    kernel: str = "step"

    @property
    def bytes(self) -> int:
        if self.kernel != "step":  # x_t and x_prev are read
            outputs = 1 + self.guidance + (self.kernel == "gradient")
            return 2 * self.dtype.itemsize + outputs * self.model_dtype.itemsize
        state = 2 + (self.noise == "given") + self.x0 + 2 * self.mask + 2 * self.histories
        of_model_input = 0 if self.model_input is None else self.model_input.itemsize
        return state * self.dtype.itemsize + (1 + self.guidance) * self.model_dtype.itemsize + of_model_input


_F, _B, _H = torch.float32, torch.bfloat16, torch.float16
VARIANTS = {
    "folded, float32": Variant(_F, _F),
    "folded, float16": Variant(_H, _H),
    "folded, bfloat16": Variant(_B, _B),
    "folded, float32 beside bfloat16": Variant(_F, _B),
    "clipped, bfloat16": Variant(_B, _B, clip=True),
    "dynamic thresholds, bfloat16": Variant(_B, _B, clip=True, thresholds=True),
    "guidance, bfloat16": Variant(_B, _B, guidance=True),
    "x0 output, bfloat16": Variant(_B, _B, x0=True),
    "given noise, bfloat16": Variant(_B, _B, noise="given"),
    "exact noise, float32": Variant(_F, _F, noise="exact"),
    "exact noise, bfloat16": Variant(_B, _B, noise="exact"),
    "fast noise, bfloat16": Variant(_B, _B, noise="fast"),
    "exact noise, guidance, bfloat16": Variant(_B, _B, noise="exact", guidance=True),
    "inpainting, bfloat16": Variant(_B, _B, mask=True),
    "history, bfloat16": Variant(_B, _B, histories=1),
    "history, exact noise, bfloat16": Variant(_B, _B, histories=1, noise="exact"),
    "two histories, bfloat16": Variant(_B, _B, histories=2),
    "model input, bfloat16": Variant(_B, _B, model_input=_B),
    "model input, float32 beside float16": Variant(_F, _H, model_input=_H),
    "exact noise, log-probability, float32": Variant(_F, _F, noise="exact", log_prob=True),
    "exact noise, log-probability, bfloat16": Variant(_B, _B, noise="exact", log_prob=True),
    "log-probability, float32": Variant(_F, _F, kernel="density"),
    "log-probability, bfloat16": Variant(_B, _B, kernel="density"),
    "gradient, clipped, bfloat16": Variant(_B, _B, clip=True, kernel="gradient"),
}


@dataclass(frozen=True)
class MachineCode:
    """What the disassembly shows of one kernel.

    Attributes:
        executed: instructions on the path counted, of one thread.
        elements: elements that one thread computes.
        by_class: ``executed`` by the first part of the mnemonic.
        access_bits: width -> how many global accesses wider than 32 bits a thread makes. (64: the
            row's number, a seed.)
        spills: bytes of local memory (scratch) of a thread.
        registers: of a thread.
    """

    target: str
    executed: int
    elements: int
    by_class: dict[str, int]
    access_bits: dict[int, int]
    spills: int
    registers: int

    @property
    def per_element(self) -> float:
        return self.executed / self.elements


def predicted_share(variant: Variant, code: MachineCode) -> float:
    """Return the share of ``DEVICES[code.target]``'s bandwidth that the variant can use, by the
    model above."""
    device = DEVICES[code.target]
    to_move = variant.bytes / device.bandwidth
    to_issue = code.per_element / (device.processors * device.lanes * device.clock)
    return min(1.0, to_move / to_issue)


def measure(variant: Variant, target: str) -> MachineCode:
    """Compile a variant as the launcher does for large tensors, and count.

    The second launch of a log-probability, over the sums of blocks, is not counted: it is for each
    2,048 elements what the first one is for each.

    Raises:
        ValueError: the target is not one of ``DEVICES``.
        ImportError: Triton is not installed.
    """
    if target not in DEVICES:
        raise ValueError(f"target must be one of {', '.join(DEVICES)}, got {target!r}")
    with compiling_for(target) as compiled:
        _launch(variant)
    kernel = compiled[0]
    elements = kernel.constant("BLOCK_SIZE") // (kernel.num_warps * kernel.warp_size)
    return _count_amd(kernel, elements) if target.startswith("gfx") else _count_nvidia(kernel, elements)


def _launch(variant: Variant) -> None:
    inputs = inputs_of(variant)
    if variant.kernel == "step":
        triton_backend.run(inputs)
        return
    row = _row_of(replace(variant, noise="given"))
    step = StepInputs(inputs.x_t, inputs.model_output, row)
    of = DensityInputs(step, x_prev=torch.empty_like(inputs.x_t))
    if variant.kernel == "density":
        triton_backend.density(of)
    else:
        factors = torch.ones(len(inputs.x_t), dtype=torch.float32, device=inputs.x_t.device)
        triton_backend.density_backward(of, factors, {"model_output": torch.empty_like(inputs.model_output)})


def _row_of(variant: Variant) -> StepCoefficients:
    columns = dict.fromkeys(("x0_x", "x0_m", "eps_x", "eps_m", "eps_0", "prev_x0", "prev_eps"), 0.25)
    return StepCoefficients(
        **columns,
        prev_noise=0.25 if variant.noise else 0.0,
        clip=1.0 if variant.clip else float("inf"),
        known_noise=0.25 if variant.mask else 0.0,
        prev_history=0.25 if variant.histories else 0.0,
        prev_history_2=0.25 if variant.histories > 1 else 0.0,
    )


def inputs_of(variant: Variant, device: str = "meta", n_elements: int = 1 << 20) -> StepInputs:
    """Return four aligned samples of ``n_elements``, updated in place as in a captured loop.

    On "meta" they have no memory.
    """
    samples = 4

    def tensor(dtype: torch.dtype) -> torch.Tensor:
        return torch.randn((samples, n_elements), dtype=torch.float32, device=device).to(dtype)

    def optional(wanted: bool, dtype: torch.dtype) -> torch.Tensor | None:
        return tensor(dtype) if wanted else None

    in_registers = variant.noise in ("exact", "fast") or variant.mask
    x_t = tensor(variant.dtype)
    return StepInputs(
        x_t,
        tensor(variant.model_dtype),
        StepTable.of([_row_of(variant)], device, 2.0 if variant.guidance else None),
        torch.zeros(1, dtype=torch.int64, device=device),
        model_output_uncond=optional(variant.guidance, variant.model_dtype),
        noise=optional(variant.noise == "given", variant.dtype),
        seeds=torch.arange(samples, dtype=torch.int64, device=device) if in_registers else None,
        thresholds=torch.ones(samples, dtype=torch.float32, device=device) if variant.thresholds else None,
        mask=optional(variant.mask, variant.dtype),
        known_x0=optional(variant.mask, variant.dtype),
        x_prev=x_t,
        x0=optional(variant.x0, variant.dtype),
        normals="fast" if variant.noise == "fast" else "exact",
        history=optional(variant.histories > 0, variant.dtype),
        history_2=optional(variant.histories > 1, variant.dtype),
        model_input_out=None if variant.model_input is None else tensor(variant.model_input),
        log_prob_out=torch.empty(samples, dtype=torch.float32, device=device) if variant.log_prob else None,
    )


# --- NVIDIA: SASS ---

_SASS = re.compile(
    r"^\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<predicate>@!?U?P\w+\s+)?(?P<opcode>[A-Z0-9_.]+)(?P<operands>[^;]*);"
)


@dataclass(frozen=True)
class _Instruction:
    address: int
    predicated: bool
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def conditional(self) -> bool:
        """Whether some threads may skip it.

        A branch can also depend on a predicate that all threads of a warp share (UP0).
        """
        return self.predicated or re.match(r"\s*!?UP\d", self.operands) is not None

    @property
    def branch_target(self) -> int | None:
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.name == "BRA" else None
        return int(found[1], 16) if found else None


def _numbers(pattern: str, listing: str) -> tuple[int, ...]:
    """Return the numbers that a pattern finds.

    Raises:
        RuntimeError: It finds none.
    """
    found = re.search(pattern, listing)
    if found is None:
        raise RuntimeError(f"the listing of a kernel has {pattern}, got one without it: the tools have changed")
    return tuple(int(number) for number in found.groups())


def _count_nvidia(kernel: Compiled, elements: int) -> MachineCode:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.assembly["cubin"])
        file.flush()
        text = subprocess.run(
            [nvidia_tool("cuobjdump"), "-sass", "-res-usage", file.name], capture_output=True, text=True
        )
    if text.returncode:
        raise RuntimeError(f"cuobjdump could not read the kernel for {kernel.target}: {text.stderr.strip()}")
    listing = text.stdout + text.stderr
    registers, stack, local = _numbers(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", listing)
    path = _longest_path(
        [
            _Instruction(int(m["address"], 16), m["predicate"] is not None, m["opcode"], m["operands"])
            for line in listing.splitlines()
            if (m := _SASS.match(line))
        ]
    )
    bits = re.compile(r"\.(64|128|256)\b")
    widths = Counter(int(found[1]) for i in path if i.name in ("LDG", "STG") and (found := bits.search(i.opcode)))
    if any(i.name in ("LDL", "STL") for i in path):
        raise RuntimeError("the kernel spills registers to local memory")
    return MachineCode(
        kernel.target,
        len(path),
        elements,
        dict(Counter(i.name for i in path).most_common()),
        dict(widths),
        stack + local,
        registers,
    )


def _longest_path(instructions: list[_Instruction]) -> list[_Instruction]:
    """Return the longest way from the first instruction to an exit.

    It follows forward branches, and avoids blocks that call a subroutine.

    Raises:
        RuntimeError: there is a loop, whose count would not be known.
    """
    at = {i.address: k for k, i in enumerate(instructions)}

    @cache
    def best(start: int) -> tuple[int, tuple[int, ...]] | None:
        """Return the length, and the first instruction of each block, from ``start``.

        None if it must call.
        """
        k = start
        while True:
            i = instructions[k]
            if i.name == "CALL":
                return None
            if i.name in ("BRX", "JMP", "JMX", "WARPSYNC") or i.opcode.startswith("BRA.DIV"):
                raise RuntimeError(f"the kernel has a {i.opcode}: where it goes is not known")
            if i.name in ("EXIT", "RET") and not i.conditional:
                return k - start + 1, (start,)
            if i.branch_target is not None:
                target = at[i.branch_target]
                if target <= k:
                    raise RuntimeError(f"the kernel has a loop, to {i.branch_target:#x}: its count is not known")
                starts = [target, k + 1] if i.conditional else [target]
                ways = [way for way in map(best, starts) if way is not None]
                if not ways:
                    return None
                length, blocks = max(ways)
                return k - start + 1 + length, (start, *blocks)
            k += 1

    found = best(0)
    if found is None:
        raise RuntimeError("every way through the kernel calls a subroutine")
    path = []
    blocks = found[1]
    for start, following in zip(blocks, (*blocks[1:], None), strict=True):
        k = start
        while True:
            path.append(instructions[k])
            i = instructions[k]
            ends = i.name in ("EXIT", "RET") and not i.conditional
            if ends or (i.branch_target is not None and following in (at[i.branch_target], k + 1)):
                break
            k += 1
    return path


# --- AMD: GCN assembly ---


def _count_amd(kernel: Compiled, elements: int) -> MachineCode:
    text = kernel.assembly["amdgcn"]
    body, _, after = text.partition("s_endpgm")
    body += after.partition("s_code_end")[0].partition(".section")[0]  # branches that lie behind the end
    names = re.findall(r"^\t([a-z]\w+)\b", body, re.MULTILINE)
    widths = Counter(32 * int(w) for w in re.findall(r"\b(?:global|buffer)_(?:load|store)_dwordx(\d)", body))
    return MachineCode(
        kernel.target,
        len(names),
        elements,
        dict(Counter(name.split("_")[0] + "_" + name.split("_")[1] for name in names).most_common()),
        dict(widths),
        _numbers(r"\.private_segment_fixed_size:\s*(\d+)", text)[0],
        _numbers(r"\.vgpr_count:\s*(\d+)", text)[0],
    )


# --- the table ---


def report(targets: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield every variant for each target, as plain data."""
    for target in targets:
        for name, variant in VARIANTS.items():
            code = measure(variant, target)
            numbers = {
                "per_element": round(code.per_element, 2),
                "predicted_share": round(predicted_share(variant, code), 3),
            }
            yield {"variant": name, "bytes": variant.bytes} | asdict(code) | numbers


@click.command(
    help=__doc__.split("\n\n")[0] + "\n\nThe share of bandwidth is a prediction from counts: nothing is measured."
)
@click.option("--target", "targets", multiple=True, type=click.Choice(list(DEVICES)), help="Default: all.")
@click.option(
    "--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write the counts to this file, too."
)
def main(targets: tuple[str, ...], path: Path | None) -> None:
    results = []
    for target in targets or DEVICES:
        click.echo(f"\n{target} ({DEVICES[target].name}): predicted, not measured")
        click.echo(
            f"{'variant':40}{'instr/elem':>11}{'bytes/elem':>11}{'registers':>10}{'spills':>7}{'bandwidth':>10}  accesses"
        )
        for row in report([target]):
            results.append(row)
            accesses = ", ".join(f"{count} x {bits}" for bits, count in sorted(row["access_bits"].items()))
            click.echo(
                f"{row['variant']:40}{row['per_element']:11.1f}{row['bytes']:11}{row['registers']:10}{row['spills']:7}"
                f"{row['predicted_share']:10.0%}  {accesses}"
            )
    if path is not None:
        path.write_text(json.dumps({"triton": version("triton"), "kernels": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
