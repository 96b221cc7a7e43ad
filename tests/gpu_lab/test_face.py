"""The laboratory's face: four names, each seen to do what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from ddim_fast import gpu_lab
from ddim_fast.gpu_lab.triton_internals import TritonChangedError


@triton.jit
def double(x_ptr, out_ptr, n, BLOCK_SIZE: tl.constexpr):
    i = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    tl.store(out_ptr + i, 2 * tl.load(x_ptr + i, mask=i < n), mask=i < n)


def test_the_face_is_small_and_loads_nothing():
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import gpu_lab
assert set(gpu_lab.__all__) <= set(dir(gpu_lab))
print(*sorted({"torch", "triton", "numpy"} & set(sys.modules)))
"""
    folder = Path(gpu_lab.__file__).parents[1]
    done = subprocess.run([sys.executable, "-I", "-c", code, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
    assert sorted(gpu_lab.__all__) == ["FakeCuda", "Replay", "compile", "run"]
    with pytest.raises(AttributeError, match="has no attribute 'launch'"):
        gpu_lab.launch  # noqa: B018


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_a_kernel_is_compiled_for_a_target(target):
    before = triton.runtime.driver._active
    x = torch.zeros(1024)
    compiled = gpu_lab.compile(double, x, x, 1024, BLOCK_SIZE=512, num_warps=8, target=target)
    assert f".target {target}" in compiled.ptx
    assert ".entry double(" in compiled.ptx
    assert (compiled.name, compiled.num_warps, compiled.warp_size) == ("double", 8, 32)
    assert compiled.constant("BLOCK_SIZE") == 512
    assert ".v2" in compiled.ptx  # 2 elements a thread, and everything is a multiple of 16
    odd = gpu_lab.compile(double, x, x, 999, BLOCK_SIZE=512, num_warps=8, target=target)
    assert ".v2" not in odd.ptx
    assert torch.count_nonzero(x) == 0
    assert triton.runtime.driver._active is before


def test_dtypes_stand_for_pointers():
    compiled = gpu_lab.compile(double, torch.bfloat16, torch.float32, 1000, BLOCK_SIZE=128)
    assert "st.global.b32" in compiled.ptx


def test_amd_has_no_ptx():
    compiled = gpu_lab.compile(double, torch.float32, torch.float32, 1000, BLOCK_SIZE=128, target="gfx942")
    assert compiled.warp_size == 64
    assert "s_endpgm" in compiled.assembly["amdgcn"]
    with pytest.raises(ValueError, match="only NVIDIA targets have PTX, got gfx942"):
        _ = compiled.ptx


def test_an_unknown_target_and_the_interpreter_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"target must be sm_ and a number, or gfx and a name, got 'h100'"):
        gpu_lab.compile(double, torch.float32, torch.float32, 1000, BLOCK_SIZE=128, target="h100")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        gpu_lab.compile(double, torch.float32, torch.float32, 1000, BLOCK_SIZE=128)


def test_a_triton_that_has_changed_is_named(monkeypatch):
    message = rf"needs triton.runtime.driver._active \(Triton .* have it\), got Triton {triton.__version__} without it"
    with monkeypatch.context() as changed:
        changed.setattr(triton.runtime, "driver", object())
        with pytest.raises(TritonChangedError, match=message):
            gpu_lab.compile(double, torch.float32, torch.float32, 1000, BLOCK_SIZE=128)


def test_a_kernel_runs_on_an_emulated_gpu():
    x, out = torch.randn(1000), torch.empty(1000)
    launch = gpu_lab.run(double, (4,), x, out, 1000, BLOCK_SIZE=256)
    assert torch.equal(out, 2 * x)
    assert launch.grid == (4, 1, 1)
    assert launch.execution.bytes_read == launch.execution.bytes_written == 4000
    with pytest.raises(ValueError, match=r"a grid must have at least one CTA, got \(0,\)"):
        gpu_lab.run(double, (0,), x, out, 1000, BLOCK_SIZE=256)


def test_a_fake_device_is_a_context_manager_and_can_be_used_again():
    device = gpu_lab.FakeCuda(capability=(8, 6))
    assert not torch.cuda.is_available()
    for _ in range(2):
        with device:
            assert torch.cuda.get_device_capability() == (8, 6)
            x = torch.zeros(3, device="cuda")
            with device.steady_state() as steady:
                x.add_(1)
            assert steady.launches == 1
        assert not torch.cuda.is_available()


def test_a_graph_replays_on_the_cpu():
    x = torch.zeros(3)
    graph = gpu_lab.Replay().capture(lambda: x.add_(1))
    assert torch.count_nonzero(x) == 0
    graph.replay()
    graph.replay()
    assert x.tolist() == [2, 2, 2]
