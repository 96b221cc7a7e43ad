"""The GPU kernels' machine code: no worse than what is committed, no spills, bulk accesses of 128 bits.

``data/machine_code.json`` is written by ``python -m ddim_fast.gpu_lab.machine_code --json tests/data/machine_code.json``. A change that
makes a number larger fails here; one that makes it smaller is a reason to write the file again.
"""

import json
from pathlib import Path

import pytest
import torch

from ddim_fast.gpu_lab import machine_code
from ddim_fast.gpu_lab.machine_code import DEVICES, VARIANTS, MachineCode, Variant, measure, predicted_share

COMMITTED = json.loads((Path(__file__).parents[1] / "data" / "machine_code.json").read_text())
KERNELS = {(row["target"], row["variant"]): row for row in COMMITTED["kernels"]}
FAST = [("sm_90", name) for name in VARIANTS] + [
    (target, name) for target in ("sm_80", "sm_100") for name in ("folded, bfloat16", "exact noise, bfloat16", "fast noise, bfloat16")
]  # fmt: skip
ALL = [(target, name) for target in DEVICES for name in VARIANTS]


def check(target, name):
    code, committed = measure(VARIANTS[name], target), KERNELS[target, name]
    assert code.per_element <= committed["per_element"] + 0.01
    assert code.spills == 0
    widths = dict(code.access_bits)
    if target.startswith("sm_"):  # scalars: the row's number, and a seed for each use of the noise
        seeds = (VARIANTS[name].noise in ("exact", "fast")) + VARIANTS[name].mask
        seeds += (
            VARIANTS[name].mask and VARIANTS[name].noise is None
        )  # the step's own noise is compiled in, and branched over
        assert widths.pop(64, 0) <= 1 + seeds
    assert set(widths) == {128}
    # Every byte of the tensors is moved by the accesses counted.
    assert widths[128] * 16 == VARIANTS[name].bytes * code.elements


@pytest.mark.parametrize(("target", "name"), FAST)
def test_machine_code_is_no_worse_than_committed(target, name):
    check(target, name)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "name"), [one for one in ALL if one not in FAST])
def test_machine_code_is_no_worse_on_every_target(target, name):
    check(target, name)


def test_committed_numbers_are_of_every_kernel_and_the_pinned_triton():
    assert set(KERNELS) == set(ALL)
    pinned = (Path(__file__).parents[2] / "constraints.txt").read_text()
    assert f"triton=={COMMITTED['triton']}\n" in pinned


@pytest.mark.parametrize("target", [t for t in DEVICES if t.startswith("sm_")])
def test_committed_numbers_keep_the_promises(target):
    def per_element(name):
        return KERNELS[target, name]["per_element"]

    assert per_element("folded, bfloat16") <= 10
    assert per_element("fast noise, bfloat16") <= 40
    assert per_element("exact noise, bfloat16") <= 50


def test_the_model_of_the_prediction():
    variant = Variant(torch.float32, torch.float32)
    h100 = DEVICES["sm_90"]
    code = MachineCode("sm_90", 16 * 1000, 16, {}, {}, 0, 32)
    assert variant.bytes == 12
    expected = (12 / h100.bandwidth) / (1000 / (h100.processors * h100.lanes * h100.clock))
    assert predicted_share(variant, code) == pytest.approx(expected)
    assert predicted_share(variant, MachineCode("sm_90", 16, 16, {}, {}, 0, 32)) == 1


def test_the_longest_path_is_counted_around_slow_paths():
    def listing(*lines):
        return [
            machine_code._Instruction(16 * k, predicated, opcode, operands)
            for k, (predicated, opcode, operands) in enumerate(lines)
        ]

    code = listing(
        (False, "LDG.E.128", " R0"),
        (True, "BRA", " 0x40"),  # over the slow path
        (False, "CALL.REL.NOINC", " 0x90"),
        (False, "MOV", " R1"),
        (False, "BRA.U", " !UP0, 0x70"),  # over two instructions
        (False, "FFMA", " R1"),
        (False, "FFMA", " R2"),
        (False, "STG.E.128", " R0"),
        (False, "EXIT", ""),
        (False, "RET.REL", " R0"),
    )
    assert [i.name for i in machine_code._longest_path(code)] == ["LDG", "BRA", "BRA", "FFMA", "FFMA", "STG", "EXIT"]
    with pytest.raises(RuntimeError, match="loop"):
        machine_code._longest_path(listing((False, "FADD", ""), (True, "BRA", " 0x0"), (False, "EXIT", "")))


def test_an_unknown_target_is_refused():
    with pytest.raises(ValueError, match=r"target must be one of sm_80.*got 'sm_20'"):
        measure(VARIANTS["folded, bfloat16"], "sm_20")
