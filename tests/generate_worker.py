"""One process of a run of ``generate``, for tests that start several: torch is imported once, by multiprocessing's fork server."""

import contextlib
import errno
import multiprocessing
import os
import signal
import socket
import stat
import sys
import time
import traceback
from pathlib import Path

import torch
from torch import nn

from ddim_fast import DDIMSampler, NoiseSchedule
from ddim_fast.cli import main
from ddim_fast.generation import EveryClass, directory, generate

SHAPE, CLASSES, COUNT, SHARD = (1, 6, 6), 3, 200, 32
forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(
    ["ddim_fast.cli", "ddim_fast.commands.run", "ddim_fast.generation"]
)  # what takes seconds to import


class Crowd(nn.Module):
    """The worst model for reproducible samples: its output depends on the batch size, on the neighbours, and on the place in the batch."""

    sample_shape, num_classes = SHAPE, CLASSES

    def __init__(self, seconds=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 36).reshape(SHAPE))
        self._seconds = seconds

    def forward(self, x, t, class_labels=None):
        time.sleep(self._seconds)
        place = torch.arange(len(x)).view(-1, 1, 1, 1) / 50
        labels = 0 if class_labels is None else class_labels.view(-1, 1, 1, 1)
        late = (t / 1000).view(-1, 1, 1, 1)
        return torch.tanh(x * self.weight + x.mean(0) + place + labels + late + len(x) / 30)

    def unconditional(self, conditioning):
        return {"class_labels": None}


class Small(nn.Module):
    """A convolution, which a library computes."""

    sample_shape = SHAPE

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t):
        return self.conv(x)


def sampler(steps=3, eta=1.0, **options):
    return DDIMSampler(NoiseSchedule.linear(), steps, eta, **options)


def crowd(out, count=COUNT, *, seconds=0.0, **options):
    """A set of the model above, in shards of 32."""
    options = {"conditioning": EveryClass(CLASSES), "shard_size": SHARD, **options}
    return generate(Crowd(seconds).eval(), sampler(), count, out, **options)


def seeded_by_rank(out, **options):
    """As when people start processes with different commands."""
    crowd(out, 64, seed=int(os.environ["RANK"]), **options)


def small(out, count, **options):
    return generate(Small().eval(), sampler(), count, out, **options)


def shipped(out, count, **options):
    import ddim_fast

    model = ddim_fast.load_model("fashion")
    return generate(model, sampler(2), count, out, conditioning=EveryClass(10), **options)


def command(out, *arguments):
    sys.argv = ["ddim-fast", "generate", *arguments, "--out", str(out)]
    main()


def memory(out, count, **options):
    """The most memory that a run took, in kB, is written beside the set."""
    small(out, count, **options)
    peak = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    Path(f"{out}.memory").write_text(peak[0].split()[1])


@contextlib.contextmanager
def disk_of(size):
    """Files of a set raise ENOSPC once they have so many bytes in all: a disk for where a test may not mount one."""
    written, real = 0, os.fsync

    def fsync(descriptor):
        nonlocal written
        written += os.fstat(descriptor).st_size * stat.S_ISREG(os.fstat(descriptor).st_mode)
        if written > size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    directory.os.fsync = fsync
    try:
        yield
    finally:
        directory.os.fsync = real


def full_disk(out, count, size, **options):
    with contextlib.nullcontext() if size is None else disk_of(size):
        crowd(out, count, **options)


def dies_at_fsync(out, number):
    """Killed when a file was written and is not yet safe."""
    left, real = number, os.fsync

    def fsync(descriptor):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    directory.os.fsync = fsync
    crowd(out)


def _work(name, out, errors, rank, world_size, port, arguments, options):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    if world_size > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    with open(errors, "w") as file, contextlib.redirect_stderr(file):
        try:
            globals()[name](out, *arguments, **options)
        except Exception:
            traceback.print_exc()
            sys.exit(1)


class Processes:
    """``world_size`` processes of ``name(out, *arguments, **options)``; ends those that are left."""

    def __init__(self, name, out, *arguments, world_size=1, **options):
        port = free_port()
        self._out = Path(out)
        self._errors = [self._out.parent / f"{self._out.name}.{rank}.{port}.txt" for rank in range(world_size)]
        self.ranks = [
            forkserver.Process(
                target=_work, args=(name, str(out), str(errors), rank, world_size, port, arguments, options)
            )
            for rank, errors in enumerate(self._errors)
        ]

    def __enter__(self):
        for rank in self.ranks:
            rank.start()
        return self

    def __exit__(self, *_):
        for rank in self.ranks:
            rank.kill()
            rank.join()

    def wait(self, timeout=300.0):
        """Exit codes; a negative one is a signal's."""
        end = time.monotonic() + timeout
        for rank in self.ranks:
            rank.join(max(0.0, end - time.monotonic()))
        return [rank.exitcode for rank in self.ranks]

    def errors(self, rank=0):
        return self._errors[rank].read_text()

    def wait_for_shards(self, count, timeout=300.0):
        end = time.monotonic() + timeout
        while len(list(self._out.glob("samples-*"))) < count:
            if time.monotonic() > end:
                raise TimeoutError(f"fewer than {count} shards")
            time.sleep(0.005)


def run(name, out, *arguments, world_size=1, **options):
    """Run to the end, without an error."""
    with Processes(name, out, *arguments, world_size=world_size, **options) as processes:
        codes = processes.wait()
        errors = [processes.errors(rank) for rank, code in enumerate(codes) if code]
    if any(codes):
        raise AssertionError(f"exit codes {codes}: {errors}")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
