"""``generate``: a set of samples on disk, by one process or many, that can be stopped and resumed
anywhere."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.noise import sample_seeds
from ..models.protocol import Model, sample_shape_of
from ..sampler import DDIMSampler
from ..sampling.capture_mode import choose_mode
from ..sampling.guidance import check_rescale, guidance_scales
from ..sampling.initial_state import conditionings_of
from ..utils.checks import (
    check_choice,
    check_dtype,
    check_integer,
    check_memory,
    check_number,
    check_path,
    check_text,
    usable_device,
)
from ..utils.progress import tqdm
from .batches import Samples
from .conditioning import LABELS, Conditioning, Table, check_rule
from .directory import AGAIN, SetDirectory, Slice, Slices
from .formats import FORMATS, PER_SHARD, Shard
from .processes import WorkQueue, agree, processes, store_errors
from .settings import environment, model_digest, plan_settings
from .writer import Writer

SHARD_SIZE, BATCH_SIZE, COMPUTE_BATCH_SIZE = 512, 64, 16


@dataclass(frozen=True)
class Generated:
    """The result of a run.

    Attributes:
        made, found: samples that all processes of the run made, and that were on the disk before.
        shards: files of the set.
        writing_seconds: processor time of this process's writer thread.
        non_finite: samples of the set with NaN or infinity.
    """

    out: Path
    made: int
    found: int
    shards: int
    seconds: float
    writing_seconds: float
    non_finite: int
    rank: int


def generate(
    model: Model,
    sampler: DDIMSampler,
    count: int,
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    shape: Sequence[int] | None = None,
    conditioning: Conditioning | None = None,
    guidance_scale: Any = None,
    guidance_rescale: float = 0.0,
    format: str = "safetensors",
    shard_size: int = SHARD_SIZE,
    batch_size: int = BATCH_SIZE,
    compute_batch_size: int = COMPUTE_BATCH_SIZE,
    resume: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    model_dtype: torch.dtype | None = None,
    backend: str | None = None,
    capture: str = "auto",
    threads: int = 1,
    model_id: str | None = None,
    patience: float | None = None,
    check_space: bool = True,
    progress: bool = False,
) -> Generated:
    """Write ``count`` samples to a directory, as shards with a manifest: see docs/GENERATE.md.

    Sample i is a function of the model, the sampler's plan, the seed, i, and the settings in the
    manifest. The files have the same bytes for any number of processes, any ``batch_size``, and any
    interruptions. Under torchrun, or in an initialized process group, all its processes share the
    work; otherwise this process does all of it. Every process calls this with the same arguments,
    except ``device``.

    Args:
        model: any callable, see ``models.Model``; in eval mode, if it has modes; it must draw no
            random numbers.
        count: samples of the set.
        out: a directory that is new or empty, or with ``resume`` contains a set of the same
            settings. All processes must see it.
        seed: of the run; that of sample i is ``sample_seeds(seed, 1, i)``.
        shape: of one sample, ``(C, ...)``. None: the model's ``sample_shape``.
        conditioning: of each sample: ``EveryClass``, ``OneClass``, ``Table``, or an object with the
            same methods.
        guidance_scale, guidance_rescale, model_dtype, backend, capture: see ``DDIMSampler.sample``.
        format: "safetensors" (the samples unchanged), "npz" or "webdataset" (8-bit pictures), see
            docs/GENERATE.md.
        shard_size: samples in a file, a multiple of ``compute_batch_size``. A process holds at most
            four such shards in memory.
        batch_size: samples at a time, a multiple of ``compute_batch_size``. Changes speed and
            memory only.
        compute_batch_size: samples in each call of the model. A setting of the set, since a model's
            rounding may depend on it.
        resume: continue or repair the set in ``out``: its shards are read and compared with their
            checksums.
        threads: of torch in each process, during the run; rounding may depend on it, too.
        model_id: replaces the SHA-256 of the model's structure and weights; needed for a model that
            is no ``nn.Module``.
        patience: seconds after which an idle process makes a slice again that another has taken and
            not finished. None: 1.5 times as long as its own slowest slice took.
        check_space: refuse to begin where the disk may be too small.
        progress: show a progress bar of all processes, on rank 0.

    Raises:
        FileNotFoundError: processes do not see the same directory.
        OSError: the disk is full, another run uses ``out``, or the store of the process group is
            lost. What is written stays.
        GenerationError: a shard has other bytes than before, or rank 0 refused.
        TypeError, ValueError: an argument breaks a rule, or ``out`` contains something else.
            Nothing is written.
    """
    started = time.perf_counter()
    device = usable_device(device)
    _check_arguments(model, sampler, count, seed, format, shard_size, batch_size, compute_batch_size, threads, patience)
    path = check_path("out", out)
    if model_id is not None:
        check_text("model_id", model_id, "leave it out for the SHA-256 of the model's structure and weights")
    shape = sample_shape_of(model, shape)
    decode, written_shape = _written(model, shape, format)
    slices = Slices(int(count), int(shard_size))
    check_dtype("dtype", dtype)
    check_memory(
        "shard_size",
        shard_size,
        max(compute_batch_size, min(count, shard_size)) * math.prod(written_shape) * dtype.itemsize,
        "take a smaller one",
    )
    _check_conditioning(model, conditioning, count, format, compute_batch_size)
    if model_dtype is not None:
        check_dtype("model_dtype", model_dtype)
    if capture == "auto" and not isinstance(model, nn.Module):
        capture = "off"  # ``FixedBatch`` is a module, and would be captured
    choose_mode(capture, sampler.graphs, device, dtype, backend, None, model)
    scales = guidance_scales(guidance_scale, sampler.plan(model).timesteps)
    check_rescale(guidance_rescale, guidance_scale)
    conditionings_of(model, None if conditioning is None else conditioning.rows(0, compute_batch_size), scales, None)
    settings = {
        "count": int(count),
        "seed": int(seed),
        "shape": list(shape),
        "dtype": str(dtype),
        "model_dtype": str(model_dtype or dtype),
        "model": model_digest(model) if model_id is None else model_id,
        "plan": plan_settings(sampler, model),
        "guidance_scale": None if scales is None else [float(scale) for scale in scales],
        "guidance_rescale": float(guidance_rescale),
        "conditioning": None if conditioning is None else conditioning.settings(),
        "compute_batch_size": int(compute_batch_size),
        "shard_size": int(shard_size),
        "format": format,
        "environment": environment(device, dtype, backend, threads),
    }
    options: dict[str, Any] = {
        "guidance_scale": guidance_scale,
        "guidance_rescale": guidance_rescale,
        "model_dtype": model_dtype,
        "backend": backend,
        "capture": capture,
    }
    samples = Samples(
        sampler, model, shape, seed, compute_batch_size, batch_size, conditioning, device, dtype, options,
        written_shape, decode,
    )  # fmt: skip
    directory = SetDirectory(path, FORMATS[format].suffix)

    def begin() -> None:
        needed = partial(_space_needed, directory, slices, written_shape, dtype, format)
        directory.begin(settings, resume, needed if check_space else None)

    done = None
    with _fixed_algorithms(threads), store_errors(directory.is_finished):
        done = _share_work(samples, directory, slices, format, settings, begin, patience, progress)
    if done is None:  # the store was lost after the set was finished: what others did is not known any more
        done = Generated(directory.path, 0, int(count), len(slices), 0.0, 0.0, 0, -1)
    return replace(done, seconds=time.perf_counter() - started)


def _share_work(
    samples: Samples,
    directory: SetDirectory,
    slices: Slices,
    format: str,
    settings: dict[str, Any],
    begin: Callable[[], None],
    patience: float | None,
    progress: bool,
) -> Generated:
    """Make this process's share of the slices, and wait until the set is finished. ``seconds`` are
    left at 0."""
    try:
        who = processes()
        agree(who, settings, begin, directory.join)
        queue = WorkQueue(who, len(slices), patience)
        run = _Run(samples, directory, slices, queue, format, _bar(progress and who.rank == 0, slices.count))
        run.make_all()
        queue.close(lambda: directory.finish(settings, queue.records()))
        made, found = queue.samples
        non_finite = queue.non_finite
        who.leave()
    finally:
        directory.close()
    return Generated(directory.path, made, found, len(slices), 0.0, run.writing_seconds, non_finite, who.rank)


@dataclass
class _Run:
    """One process's part in a run."""

    samples: Samples
    directory: SetDirectory
    slices: Slices
    queue: WorkQueue
    format: str
    bar: tqdm
    writing_seconds: float = 0.0

    def make_all(self) -> None:
        with self.bar, Writer(self._write) as writer:
            for index in self.queue.turns(writer.flush):
                part = self.slices[index]
                record = self.directory.verified(part)
                if record is not None:
                    self.queue.finish(index, record, made=False)
                elif (drawn := self.samples(part, partial(self._goes_on, index))) is not None:
                    writer.put((part, drawn))
                self._show()
            writer.flush()
            self._show()

    def _goes_on(self, index: int) -> bool:
        self._show()
        return not self.queue.is_finished(index)

    def _write(self, item: tuple[Slice, Tensor]) -> None:
        started = time.thread_time()
        part, drawn = item
        shard = Shard(part.first, drawn, self._labels(part), self._keys(part))
        finite = drawn.flatten(1).isfinite().all(1)
        try:
            content = FORMATS[self.format].encode(shard)
            record = self.directory.save(part, content, {"non_finite": int((~finite).sum())})
        except FileNotFoundError:
            # This process was stopped for so long that others have finished the set and removed the
            # scratch folder.
            if not self.directory.is_finished():
                raise
            return
        except OSError as error:
            self.bar.close()
            raise OSError(
                error.errno, f"{self.directory.shard_name(part.index)} could not be written ({error.strerror}). {AGAIN}"
            ) from error
        self.queue.finish(part.index, record, made=True)
        self.writing_seconds += time.thread_time() - started

    def _labels(self, part: Slice) -> Tensor | None:
        rule = self.samples.conditioning
        labels = None if rule is None else rule.rows(part.first, part.count).get(LABELS)
        return labels if labels is not None and labels.ndim == 1 and labels.dtype == torch.int64 else None

    def _keys(self, part: Slice) -> Sequence[str] | None:
        keys = getattr(self.samples.conditioning, "keys", None)
        return None if keys is None else keys[part.first : part.first + part.count]

    def _show(self) -> None:
        if self.bar.disable:
            return
        made, found = self.queue.samples
        self.bar.initial = found  # samples from an earlier run do not count towards the speed
        self.bar.update(made + found - self.bar.n)


def _bar(shown: bool, count: int) -> tqdm:
    return tqdm(total=count, desc="samples", unit="sample", smoothing=0, disable=not shown)


@contextmanager
def _fixed_algorithms(threads: int) -> Iterator[None]:
    """Set the switches of torch that rounding may depend on, and restore them afterwards."""
    cudnn = torch.backends.cudnn
    before = torch.get_num_threads(), cudnn.benchmark, cudnn.deterministic
    torch.set_num_threads(threads)
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        cudnn.benchmark, cudnn.deterministic = before[1:]


def _space_needed(
    directory: SetDirectory, slices: Slices, shape: tuple[int, ...], dtype: torch.dtype, format: str
) -> int:
    there = directory.present(slices)
    missing = slices.count - sum(part.count for part in there)
    return missing * FORMATS[format].largest(shape, dtype) + (len(slices) - len(there)) * PER_SHARD


# --- Checks -----------------------------------------------------------------------------------------------------------


def _check_arguments(
    model, sampler, count, seed, format, shard_size, batch_size, compute_batch_size, threads, patience
) -> None:
    if not callable(model):
        raise TypeError(f"model must be callable as model(x, t, **conditioning), got {type(model).__name__}")
    if not isinstance(sampler, DDIMSampler):
        raise TypeError(f"sampler must be a DDIMSampler, got {type(sampler).__name__}")
    numbers = {
        "count": count,
        "shard_size": shard_size,
        "batch_size": batch_size,
        "compute_batch_size": compute_batch_size,
        "threads": threads,
    }
    for name, value in numbers.items():
        check_integer(name, value, at_least=1)
    check_integer("seed", seed)
    for name in ("batch_size", "shard_size"):
        if numbers[name] % compute_batch_size:
            raise ValueError(
                f"{name} must be a multiple of compute_batch_size, {compute_batch_size}, got {numbers[name]}: take "
                f"{-(-numbers[name] // compute_batch_size) * compute_batch_size}, or another compute_batch_size (which changes the bits)"
            )
    sample_seeds(seed, 0)  # which has the rule for seeds
    check_choice("format", format, FORMATS)
    if patience is not None:
        check_number("patience", patience, above=0, remedy="leave it out for 1.5 times the slowest slice")
    if getattr(model, "training", False):
        raise ValueError(
            "a model must be in eval mode, so that a sample does not depend on its batch: call model.eval()"
        )


def _written(
    model: Model, shape: tuple[int, ...], format: str
) -> tuple[Callable[[Tensor], Tensor] | None, tuple[int, ...]]:
    """Return what makes of samples what a format takes, or None, and the shape that is written."""
    if not FORMATS[format].pictures:
        return None, shape
    decode = getattr(model, "decode", None)
    if decode is not None and shape == tuple(getattr(model, "sample_shape", ())):
        shape = tuple(getattr(model, "picture_shape", shape))
    else:
        decode = None
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(
            f"format {format!r} is for pictures, (1 or 3, H, W), got samples {shape}: take format='safetensors'"
        )
    return decode, shape


def _check_conditioning(
    model: Model, conditioning: Conditioning | None, count: int, format: str, compute_batch_size: int
) -> None:
    if conditioning is None:
        return
    check_rule("conditioning", conditioning)
    if isinstance(conditioning, Table):
        if len(conditioning) < count:
            raise ValueError(
                f"{conditioning.path} must have a row for each of {count} samples, got {len(conditioning)}"
            )
        if conditioning.keys is not None and format != "webdataset":
            raise ValueError(
                f"keys name samples in a tar, got a column of them in {conditioning.path} and format={format!r}: take "
                "format='webdataset', or leave the column out"
            )
    classes = getattr(model, "num_classes", None)
    labels: Any = conditioning.columns.get(LABELS) if isinstance(conditioning, Table) else None
    if labels is None:
        labels = conditioning.rows(0, max(compute_batch_size, int(classes or 0))).get(LABELS)
    if isinstance(classes, int) and labels is not None and (int(labels.min()) < 0 or int(labels.max()) > classes):
        raise ValueError(
            f"{LABELS} must be from 0 to {classes - 1} ({classes}: no class), got {int(labels.min())} to {int(labels.max())}"
        )
