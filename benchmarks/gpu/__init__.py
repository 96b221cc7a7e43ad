"""What only a GPU can show: the bits of the kernel there, and every speed that is claimed.

    python -m benchmarks.gpu --out out/gpu

``tools/gpu_run.sh`` runs it from a bare copy of the repository, with nothing installed but torch,
Triton and pytest.
"""
