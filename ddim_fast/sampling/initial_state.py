"""What a run starts from: shape, device and dtype, the conditioning of its model calls, seeds,
noise, a noised picture, a known region."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels.cpu_step import seeds_of
from ..kernels.dispatch import ddim_step, normals
from ..kernels.noise import NoiseStream, check_seed
from ..kernels.torch_internals import tree_map_only
from ..models.protocol import Model, check_model
from ..plans.coefficients import known_region_coefficients, noising_coefficients
from ..plans.levels import AnyLevel
from ..utils.checks import as_index, check_alike, check_sample_shape, check_samples, refuse, usable_device
from ..utils.transfer import to_device
from ..utils.warn import warn_caller

BEFORE_THE_FIRST_STEP = (1 << 32) - 1
"""Step -1 of the noise standard's stream KNOWN_REGION: the noise of the known region at x_T, before
any step."""

_NO_SAMPLE = 32
"""More than this, and nothing below 0, is no scale of samples but that of pictures of 8 bits."""


def place(
    model: Model,
    shape: Sequence[int] | None,
    device: str | torch.device,
    dtype: torch.dtype,
    seeds: Any = None,
    **given: Tensor | None,
) -> tuple[tuple[int, ...], torch.device, torch.dtype]:
    """Return shape, device and dtype of the samples: those of the given tensors, or else those
    asked for, or else the shape of the model's samples, one for each of the ``seeds``.

    Raises:
        TypeError, ValueError: there is no shape, or it breaks a rule.
    """
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    for name, tensor in tensors.items():
        check_samples(name, tensor)
        if shape is not None and tuple(shape) != tuple(tensor.shape):
            raise ValueError(f"shape must be that of {name}, {tuple(tensor.shape)}, or left out, got {tuple(shape)}")
    if not tensors:
        wanted = _shape_of_model(model, seeds) if shape is None else _check_shape(shape)
        if not isinstance(shape, torch.Size):  # that of a tensor is a batch's, and to ask the model takes a while
            check_batched(model, "shape", wanted)
            _warn_of_shape(model, "shape", wanted)
        return wanted, usable_device(device), dtype
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        check_alike(name, tensor, first_name, first)
    check_batched(model, first_name, first.shape)
    _warn_of_shape(model, first_name, first.shape)
    return tuple(first.shape), first.device, first.dtype


def _shape_of_model(model: Model, seeds: Any) -> tuple[int, ...]:
    """Return the shape of one of the model's samples, or of one for each seed."""
    stated = getattr(model, "sample_shape", None)
    if stated is None:
        raise ValueError(
            "shape is needed where no x_T is given and the model has no sample_shape, got None: for instance "
            "shape=(16, 3, 32, 32), or set model.sample_shape = (3, 32, 32)"
        )
    count = len(seeds) if isinstance(seeds, (Sequence, Tensor, np.ndarray)) and np.ndim(seeds) else 1
    return count, *check_sample_shape("model.sample_shape", stated)


def check_batched(model: Model, name: str, shape: Sequence[int]) -> None:
    """Raise ValueError where a shape lacks the batch of a model that says what one sample is."""
    stated = getattr(model, "sample_shape", None)
    if isinstance(stated, (tuple, list)) and len(shape) == len(stated):
        sizes = ", ".join(map(str, shape))
        remedy = f"shape=(1, {sizes})" if name == "shape" else f"{name}.unsqueeze(0)"
        refuse(
            f"{name} must have a batch before the model's sample_shape {tuple(stated)}", tuple(shape), f"use {remedy}"
        )


def _warn_of_shape(model: Model, name: str, shape: Sequence[int]) -> None:
    """Warn of samples of another shape than those that a model says it was trained on."""
    stated = getattr(model, "sample_shape", None)
    if isinstance(stated, (tuple, list)) and tuple(shape[1:]) != tuple(stated):
        warn_caller(
            f"{name} should be a batch of the model's sample_shape, {('B', *stated)}, got {tuple(shape)}, on which it was not "
            "trained: leave shape out, or change model.sample_shape if that is meant".replace("'B'", "B")
        )


def _check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    try:
        shape = tuple(map(as_index, shape))
    except TypeError:
        raise TypeError(f"shape must be integers (batch, channels, ...), got {shape!r}") from None
    if len(shape) < 2 or min(shape) < 0:
        raise ValueError(f"shape must be (batch, channels, ...) with no negative size, got {shape}")
    return shape


def conditionings_of(model: Model, conditioning, scales, unconditional_conditioning) -> list[Mapping[str, Any]]:
    """Return the conditioning of each model call of a step: one, or a conditional and an
    unconditional one."""
    check_model(model)
    conditioning = _keywords("conditioning", conditioning)
    if unconditional_conditioning is not None:
        unconditional_conditioning = _keywords("unconditional_conditioning", unconditional_conditioning)
    if scales is None:
        return [conditioning]
    if unconditional_conditioning is None:
        unconditional = getattr(model, "unconditional", None)
        if unconditional is None:
            raise ValueError(
                "guidance needs the model's unconditional output, too, "
                f"got guidance_scale={scales[0]} alone: pass unconditional_conditioning"
            )
        unconditional_conditioning = unconditional(conditioning)
        if _are_the_same(conditioning, unconditional_conditioning):
            warn_caller(
                f"guidance needs what the model is guided to, got guidance_scale={max(scales, key=abs):g} and no conditioning that "
                "model.unconditional leaves out, which is no guidance: pass conditioning, for instance "
                '{"class_labels": labels}'
            )
    return [conditioning, dict(unconditional_conditioning)]


def _are_the_same(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Return whether a model is told the same by both; None is the same as nothing."""
    told, other = ({name: value for name, value in given.items() if value is not None} for given in (first, second))
    return told.keys() == other.keys() and all(value is other[name] for name, value in told.items())


def _keywords(name: str, value: object) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        refuse(
            f"{name} must be a dict of the model's keywords",
            value,
            'for instance {"class_labels": labels}',
            TypeError,
        )
    return dict(value)


def repeat_conditioning(
    conditioning: Mapping[str, Any] | None, batch_size: int, times: int, name: str = "conditioning"
) -> dict[str, Any] | None:
    """Return the conditioning of ``times`` copies of a batch: tensors with ``batch_size`` rows are
    repeated."""
    if conditioning is None:
        return None

    def repeat(tensor: Tensor) -> Tensor:
        of_batch = tensor.ndim > 0 and len(tensor) == batch_size
        return tensor.repeat(times, *[1] * (tensor.ndim - 1)) if of_batch else tensor

    return tree_map_only(Tensor, repeat, _keywords(name, conditioning))


def part_of_conditioning(
    conditioning: Mapping[str, Any] | None, batch_size: int, samples: slice | Tensor
) -> dict[str, Any] | None:
    """Return the conditioning of some samples of a batch: of tensors with ``batch_size`` rows, those
    rows."""
    if conditioning is None:
        return None

    def part(tensor: Tensor) -> Tensor:
        return tensor[samples] if tensor.ndim > 0 and len(tensor) == batch_size else tensor

    return tree_map_only(Tensor, part, dict(conditioning))


def check_generator(generator: object, device: torch.device) -> None:
    """Raise TypeError or ValueError unless ``generator`` is None, or one that draws on ``device``."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        remedy = "for one seed per sample pass seeds=[...]" if isinstance(generator, Sequence) else "or pass seed"
        refuse("generator must be one torch.Generator, for all samples", generator, remedy, TypeError)
    if generator.device.type != device.type:
        raise ValueError(
            f"generator must be on the device of the samples, {device}, got one on {generator.device}: "
            f"make it with torch.Generator({str(device)!r})"
        )


def seeds_of_samples(seed, seeds, generator, batch_size: int, needed: bool = True) -> Tensor | None:
    """Return ``(B,)`` int64 on the host, the seed of each sample; None if noise comes from a
    generator or is not needed."""
    if generator is None and not needed and seeds is None:
        if seed is not None:
            check_seed(_integer("seed", seed))  # a wrong seed is an error, needed or not
        return None
    if generator is None:
        return _per_sample_seeds(seed, seeds, batch_size)
    if seed is not None or seeds is not None:
        raise ValueError("noise comes from one place: pass seed, seeds or generator, got generator and another")
    return None


def _per_sample_seeds(seed: int | None, seeds, batch_size: int) -> Tensor:
    """Return ``(B,)`` int64 from one seed, a list of seeds, or torch's global generator."""
    if seed is not None and seeds is not None:
        raise ValueError("noise comes from one place: pass seed or seeds, got both")
    if seeds is None:
        seed = int(torch.randint(2**63 - 1, (), device="cpu")) if seed is None else _integer("seed", seed)
        return seeds_of(seed, batch_size)
    if isinstance(seeds, (Tensor, np.ndarray)):
        seeds = seeds.tolist()
    if isinstance(seeds, (str, bytes)) or not isinstance(seeds, Sequence):
        raise TypeError(f"seeds must be a list of integers, one per sample, got {seeds!r}: for one number use seed")
    if len(seeds) != batch_size:
        raise ValueError(f"seeds must have one entry per sample, {batch_size}, got {len(seeds)}")
    seeds = [_integer(f"seeds[{i}]", s) for i, s in enumerate(seeds)]
    if bad := [(i, s) for i, s in enumerate(seeds) if not -(1 << 63) <= s < 1 << 64]:
        raise ValueError("seeds[{}] must fit in 64 bits, got {}".format(*bad[0]))
    return torch.tensor([s - (1 << 64) if s >= 1 << 63 else s for s in seeds], dtype=torch.int64, device="cpu")


def _integer(name: str, value: Any) -> int:
    try:
        return as_index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got the {type(value).__name__} {value!r}") from None


def initial_state(shape, x_T, per_sample, generator, device, dtype, std_dev: float = 1.0) -> Tensor:
    """Return x_T in new memory: as given, or drawn with this standard deviation."""
    if x_T is not None:
        return x_T.detach().clone(memory_format=torch.contiguous_format)
    if generator is not None:
        drawn = torch.randn(shape, generator=generator, device=device, dtype=dtype)
    else:
        drawn = normals(per_sample, shape[1:], 0, NoiseStream.INITIAL, dtype)
    return drawn if std_dev == 1 else drawn.mul_(std_dev)


def noised(x0: Tensor, level: AnyLevel, seeds: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """Return x0 at a noise level (equation 4 of the DDIM paper), in one kernel pass.

    The noise is the one that ``sample`` would start from: of the stream INITIAL, or the generator's
    next ``randn``.
    """
    check_generator(generator, x0.device)
    x0 = x0.detach()
    noise = None
    if generator is not None:
        noise = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
    seeds = None if seeds is None else to_device(seeds, x0.device)
    row = noising_coefficients(level)
    return ddim_step(x0, x0, row, noise=noise, seeds=seeds, noise_stream=NoiseStream.INITIAL)


def warn_of_levels(x0: Tensor) -> None:
    """Warn where clean samples look like pictures of 8 bits, 0 to 255. (On the CPU only: elsewhere
    the host would wait for the device.)"""
    if x0.device.type != "cpu" or not x0.numel():
        return
    low, high = (float(bound) for bound in x0.detach().aminmax())
    if low >= 0 and high > _NO_SAMPLE:
        warn_caller(
            f"clean samples (x0) must be as the model's are, most often in [-1, 1], got {low:g} to {high:g}: pictures of 8 bits "
            "are x0 / 127.5 - 1"
        )


def known_region(mask: Tensor | None, known_x0: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the mask like ``known_x0``, and ``known_x0``, both contiguous; or neither.

    Raises:
        TypeError, ValueError: only one is given, a type or shape is wrong, or the mask leaves [0,
            1]. (Checked on the CPU only: elsewhere the host would wait for the device.)
    """
    if mask is None and known_x0 is None:
        return None, None
    if mask is None or known_x0 is None:
        have, lack = ("known_x0", "mask") if mask is None else ("mask", "known_x0")
        raise ValueError(f"inpainting needs both mask and known_x0, got only {have}: pass {lack}, too, or neither")
    check_samples("known_x0", known_x0)
    warn_of_levels(known_x0)
    if not isinstance(mask, Tensor) or mask.is_complex() or mask.layout != torch.strided:
        raise TypeError(f"mask must be a real tensor, dense, 1 where the picture is known, got {mask!r:.80}")
    mask = mask.detach()
    if mask.device.type == "cpu" and not bool(((mask >= 0) & (mask <= 1)).all()):
        raise ValueError(
            "mask must be in [0, 1], 0 where the picture is drawn and 1 where it is known, "
            f"got {mask.min().item()} to {mask.max().item()}: scale it"
        )
    try:
        mask = mask.expand(known_x0.shape)
    except RuntimeError:
        raise ValueError(
            f"mask must broadcast to known_x0, {tuple(known_x0.shape)}, got {tuple(mask.shape)}: "
            "for instance (B, 1, H, W), or (H, W)"
        ) from None
    return mask.to(known_x0.device, known_x0.dtype).contiguous(), known_x0.detach().contiguous()


def blend_known_region(
    x_t: Tensor,
    mask: Tensor,
    known_x0: Tensor,
    level: AnyLevel,
    seeds: Tensor | None,
    generator: torch.Generator | None,
    backend: str | None,
) -> None:
    """Put the known picture into x_T, in place and at its noise level, as every step does with its
    x_prev."""
    row = known_region_coefficients(level)
    known_noise = None
    if generator is not None:
        known_noise = torch.randn(x_t.shape, generator=generator, device=x_t.device, dtype=x_t.dtype)
    ddim_step(
        x_t,
        x_t,
        row,
        mask=mask,
        known_x0=known_x0,
        known_noise=known_noise,
        seeds=seeds,
        noise_step=BEFORE_THE_FIRST_STEP,
        out=x_t,
        backend=backend,
    )
