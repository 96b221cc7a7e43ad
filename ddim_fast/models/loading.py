"""Models from files: a diffusers directory, a TorchScript archive, a torch.export archive.

A module, a compiled module or any other callable needs no loading: ``DDIMSampler.sample`` takes it
as it is.
"""

from __future__ import annotations

import io
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..plans.coefficients import DISCRETE_PREDICTIONS
from ..plans.schedules import NoiseSchedule, make_schedule
from ..plans.timesteps import SPACINGS
from ..utils.checks import check_choice, check_dtype, check_integer, check_number, refuse, usable_device
from ..utils.files import check_safetensors, first_line, read_json_object
from ..utils.suggestions import nearest
from .protocol import denoiser_in, output_tensor
from .shipped import SHIPPED, ShippedModel, load_shipped_model

_ADDED = {
    "text_time": ("text_embeds", "time_ids"),
    "text_image": ("text_embeds", "image_embeds"),
    "image": ("image_embeds",),
    "image_hint": ("image_embeds", "hint"),
}
"""By the ``addition_embed_type`` of a network of diffusers (the first: Stable Diffusion XL), what its
added_cond_kwargs have."""


class LoadedModel(nn.Module):
    """A network with the settings from its files: ``model(x, t, **conditioning)`` returns a tensor,
    see ``models.Model``.

    Attributes:
        network: the module itself.
        prediction_type: "epsilon", "sample" or "v_prediction"; None where the files do not say (a
            sampler then uses "epsilon").
        schedule: the noise schedule it was trained with, or None.
        clip_sample_range: x0 is clipped to plus or minus this; None: not clipped.
        sample_shape: (C, H, W), or None.
        sampler_options: further settings of a scheduler's configuration, as arguments of
            ``DDIMSampler``: ``DDIMSampler(model.schedule, 50, **model.sampler_options)``.

    Set what the files do not say: ``model.prediction_type = "v_prediction"``.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        prediction_type: str | None = None,
        schedule: NoiseSchedule | None = None,
        clip_sample_range: float | None = None,
        sample_shape: tuple[int, ...] | None = None,
        sampler_options: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.network = network
        self.prediction_type = prediction_type
        self.schedule = schedule
        self.clip_sample_range = clip_sample_range
        self.sample_shape = sample_shape
        self.sampler_options = dict(sampler_options or {})
        embedded = getattr(getattr(network, "config", None), "addition_embed_type", None)
        self._added = _ADDED.get(embedded, ()) if isinstance(embedded, str) else ()

    def forward(self, x: Tensor, t: Tensor, **conditioning: Any) -> Tensor:
        if self._added:
            _check_added(self._added, conditioning.get("added_cond_kwargs"))
        return output_tensor(self.network(x, t, **conditioning), x)

    # ---- pickle: torch pickles no TorchScript ----

    def __getstate__(self) -> dict[str, Any]:
        network = self.network
        kept = _ScriptArchive(network) if isinstance(network, torch.jit.ScriptModule) else network
        state = vars(self)
        return {**state, "_modules": {**state["_modules"], "network": kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        kept = state["_modules"]["network"]
        network = kept.network if isinstance(kept, _ScriptArchive) else kept
        super().__setstate__({**state, "_modules": {**state["_modules"], "network": network}})


def _check_added(names: tuple[str, ...], given: Any) -> None:
    """Raise ValueError unless added_cond_kwargs has what a network of diffusers embeds with the time,
    whose own error speaks of an iteration over None."""
    if not isinstance(given, Mapping) or not all(name in given for name in names):
        refuse(
            f"this model needs conditioning added_cond_kwargs, a dict of {' and '.join(names)}",
            sorted(given) if isinstance(given, Mapping) else given,
            "pass conditioning={'encoder_hidden_states': ..., 'added_cond_kwargs': {"
            + ", ".join(f"'{name}': ..." for name in names)
            + "}}",
        )


def load_model(
    name: str | os.PathLike[str] = "fashion",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    trust_pickle: bool = False,
    variant: str | None = None,
) -> ShippedModel | LoadedModel:
    """Load the model that ships with the package, or one from a file or directory.

    Args:
        name: "fashion": pictures of clothes, 28 x 28, ten classes; "scenes": solids on a floor, 32
            x 32 in colour, six classes (docs/MODEL_CARD.md); or a path, see ``load_model_from``.
        dtype: of the weights. None: float32 for models that ship, else as stored.
        trust_pickle, variant: see ``load_model_from``.

    Raises:
        FileNotFoundError: there is no such model or path.
        ImportError, TypeError, ValueError: see ``load_model_from``.
    """
    if isinstance(name, str) and name in SHIPPED:
        _check_variant(variant, None)
        return load_shipped_model(name, device, torch.float32 if dtype is None else dtype)
    _check_name(name)
    if not os.path.exists(name):
        alike = nearest(str(name), SHIPPED)
        meant = "" if alike is None else f"did you mean {alike!r}? Otherwise "
        raise FileNotFoundError(
            f"a model must be one of those that ship ({', '.join(SHIPPED)}), or the path of a local file or directory, got "
            f"{str(name)!r}, which does not exist: {meant}download a model from a hub first, for instance "
            "with huggingface_hub.snapshot_download"
        )
    return load_model_from(name, device=device, dtype=dtype, trust_pickle=trust_pickle, variant=variant)


def load_model_from(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    trust_pickle: bool = False,
    variant: str | None = None,
) -> LoadedModel:
    """Load a model from a file or directory, in eval mode, its weights frozen. Nothing is
    downloaded.

    - A diffusers directory: of a pipeline (``model_index.json``, whose ``unet`` and ``scheduler``
      are read), or of one model (``config.json``). ``UNet2DModel`` and ``UNet2DConditionModel``.
      Needs diffusers. The samples of a latent pipeline are latents.
    - A TorchScript archive (``torch.jit.save``), called as ``module(x, t, **conditioning)``.
    - A torch.export archive (``torch.export.save``), called alike. It accepts the shapes that it
      was exported for.

    The last two contain a program and pickles, and can run code while they are read: they need
    ``trust_pickle``. Nothing in a directory runs without it.

    Args:
        device: of the model. An exported program stays on the device that it was exported for,
            which must be this one.
        dtype: of the weights. None: as stored, float32 for diffusers. That of an exported program
            cannot be changed.
        trust_pickle: also read what can run code: an archive, or a diffusers model's weights from a
            pickle (``.bin``) if there is no ``.safetensors``. What a file is, its bytes decide.
        variant: of a diffusers model's weights: "fp16" for
            ``diffusion_pytorch_model.fp16.safetensors``.

    Raises:
        FileNotFoundError: the path does not exist.
        ImportError: diffusers is needed.
        TypeError, ValueError: the file is of another kind, damaged, or has a setting that is not
            supported.
    """
    _check_name(path)
    path = Path(path)
    device = usable_device(device)
    if dtype is not None:
        check_dtype("dtype", dtype)
    if not path.exists():
        raise FileNotFoundError(
            f"path must be a local file or directory, got {path}, which does not exist: download a model from a hub first, "
            "for instance with huggingface_hub.snapshot_download"
        )
    if path.is_dir():
        _check_variant(variant, path)
        model = _load_diffusers(path, dtype, trust_pickle, variant).to(device)
    else:
        _check_variant(variant, None)
        kind = _archive_kind(path)
        if not trust_pickle:
            raise ValueError(
                f"a model from a source that is not trusted must be a diffusers directory with .safetensors, got the {kind} archive "
                f"{path}, which contains a program and pickles and can run code: pass trust_pickle=True (--trust-pickle) if you trust "
                "where it came from"
            )
        model = _ARCHIVES[kind](path, device, dtype)
    _check_finite(model, path)
    return model.requires_grad_(False).eval()


def _check_name(name: object) -> None:
    """Raise TypeError unless ``name`` is text or a path."""
    if isinstance(name, (str, os.PathLike)):
        return
    denoiser, given = denoiser_in(name), type(name).__name__
    if denoiser is not None:
        remedy = f"of a pipeline in memory sample pipe.{denoiser}, with NoiseSchedule(pipe.scheduler.alphas_cumprod)"
    else:
        remedy = "a model in memory is sampled as it is" if callable(name) else "for instance 'fashion'"
    raise TypeError(f"a model to load must be the name of one that ships, or a path, got {given}: {remedy}")


def _check_variant(variant: object, directory: Path | None) -> None:
    if variant is None:
        return
    rule = "variant must be a word such as fp16, of the weights in a diffusers directory"
    if not isinstance(variant, str):
        refuse(rule, variant, kind=TypeError)
    if directory is None:
        refuse(rule, variant, "leave it out for a model that is no such directory")
    if not re.fullmatch(r"\w[\w-]*", variant):
        refuse(rule, variant)


def _check_finite(model: nn.Module, path: Path) -> None:
    for name, weights in model.named_parameters():
        if not weights.is_meta and not bool(weights.detach().float().isfinite().all()):
            raise ValueError(
                f"a model's weights must be finite, got NaN or infinity in {name.removeprefix('network.')} of {path} as "
                f"{weights.dtype}: the file is damaged, or its weights are beyond that dtype"
            )


# --- diffusers --------------------------------------------------------------------------------------------------------

UNETS = ("UNet2DModel", "UNet2DConditionModel")
SCHEDULERS = (
    "DDIMScheduler",
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
"""diffusers' schedulers for models trained on discrete timesteps with betas, which DDIM can sample
as well."""
_ORIGINALS = {f"Fast{name}": name for name in SCHEDULERS[:3]}
"""Our drop-ins, by whose names a pipeline is saved that uses them."""
_SAMPLER_OPTIONS = ("timestep_spacing", "steps_offset", "set_alpha_to_one")
_WHICH = "docs/MODELS.md, Which model do I have?, says what to write for which model"
"""The remedy where a model is of another kind than can be loaded here."""
_THRESHOLDING_OPTIONS = ("thresholding", "dynamic_thresholding_ratio", "sample_max_value")


def _load_diffusers(path: Path, dtype: torch.dtype | None, trust_pickle: bool, variant: str | None) -> LoadedModel:
    if (path / "model_index.json").is_file():
        index = _read_json(path / "model_index.json")
        if missing := [part for part in ("unet", "scheduler") if part not in index]:
            parts = ", ".join(key for key in index if not key.startswith("_")) or "nothing"
            raise ValueError(
                f"a pipeline must have a unet and a scheduler, got one in {path} without {missing[0]}: {parts}. {_WHICH}"
            )
        stated = _read_scheduler(path / "scheduler" / "scheduler_config.json")
        return _load_unet(path / "unet", dtype, trust_pickle, variant, stated)
    if (path / "config.json").is_file():
        return _load_unet(path, dtype, trust_pickle, variant, {})
    raise ValueError(
        f"a directory must be diffusers', with a model_index.json (a pipeline) or a config.json (a model), got {path}: "
        f"name the directory that save_pretrained wrote. {_WHICH}"
    )


def _load_unet(
    path: Path, dtype: torch.dtype | None, trust_pickle: bool, variant: str | None, stated: Mapping[str, Any]
) -> LoadedModel:
    config = _read_json(path / "config.json")
    name = config.get("_class_name")
    if name not in UNETS:
        raise ValueError(
            f"a diffusers model must be one of {', '.join(UNETS)}, got _class_name = {name!r} in {path}. {_WHICH}"
        )
    if config.get("quantization_config") is not None:
        raise ValueError(
            f"a model's weights must not be quantized, got a quantization_config in {path}: load it with diffusers, and use the "
            "result as the model"
        )
    sample_shape = _sample_shape(config, path)
    use_safetensors = _has_safetensors(path, trust_pickle, variant)
    diffusers = diffusers_module()
    try:
        with torch.device("cpu"):  # diffusers makes a network on the caller's default device, in its default dtype
            network, found = getattr(diffusers, name).from_pretrained(
                path,
                local_files_only=True,
                use_safetensors=use_safetensors,
                variant=variant,
                output_loading_info=True,
                torch_dtype=torch.float32,
                low_cpu_mem_usage=diffusers.utils.is_accelerate_available(),
            )
    except Exception as error:
        raise ValueError(
            f"diffusers cannot load the {name} in {path}, which may be damaged or incomplete: {first_line(error)}"
        ) from error
    # diffusers itself only logs that such weights stay random.
    if missing := found["missing_keys"] or found["mismatched_keys"]:
        raise ValueError(
            f"the weights in {path} must be those of its config.json, got none that fit {sorted(missing)[0]}"
        )
    return LoadedModel(network.to(dtype), sample_shape=sample_shape, **stated)


def _sample_shape(config: Mapping[str, Any], path: Path) -> tuple[int, ...] | None:
    """Return (C, H, W) of the network's input, or None where its configuration leaves the size
    open."""
    file = path / "config.json"
    default = 4 if config["_class_name"] == "UNet2DConditionModel" else 3
    with _settings_of_a_file():
        channels, returned = (
            check_integer(f"{name} in {file}", config.get(name, default), at_least=1)
            for name in ("in_channels", "out_channels")
        )
        size = config.get("sample_size")
        sizes = size if isinstance(size, list) and len(size) == 2 else [size, size]
        if size is not None:
            for one in sizes:
                check_integer(f"sample_size in {file}", one, at_least=1)
    if returned not in (channels, 2 * channels):
        raise ValueError(
            f"a model must return as many channels as it takes (or twice, with a learned variance), got in_channels = {channels} "
            f"and out_channels = {returned} in {path}: load it with diffusers, and wrap it in a function that adds the others"
        )
    return None if size is None else (channels, *sizes)


_STEM = "diffusion_pytorch_model"


def _has_safetensors(path: Path, trust_pickle: bool, variant: str | None) -> bool:
    """Return whether diffusers will read ``.safetensors``, or else a pickle.

    Raises:
        ValueError: there are no weights by the names that diffusers gives them, they are damaged,
            or pickles that are not trusted.
    """
    if files := _weights(path, "safetensors", variant):
        for file in files:
            check_safetensors(file)
        return True
    pickles = _weights(path, "bin", variant)
    if not pickles:
        others = sorted(_variants(path) - {variant})
        remedy = f": pass variant={others[0]!r} (--variant {others[0]})" if others else ""
        if None in _variants(path) and variant is not None:
            remedy = ": leave variant out"
        held = ", ".join(sorted(file.name for file in path.iterdir()))
        raise ValueError(
            f"a model's directory must hold its weights as .safetensors, in {_single(variant, 'safetensors')}, got none in {path}, "
            f"which holds {held}{remedy}"
        )
    if not trust_pickle:
        raise ValueError(
            f"weights must be .safetensors, in {_single(variant, 'safetensors')}, got only {pickles[0].name} in {path}, a pickle, "
            "which can run code: pass trust_pickle=True (--trust-pickle) if you trust where it came from"
        )
    return False


def _single(variant: str | None, suffix: str) -> str:
    return f"{_STEM}.{suffix}" if variant is None else f"{_STEM}.{variant}.{suffix}"


def _weights(path: Path, suffix: str, variant: str | None) -> list[Path]:
    """Return the files that diffusers will read: all that an index lists, or one, or none."""
    names = ["index.json"] if variant is None else [f"index.{variant}.json", f"{variant}.index.json"]
    for index in (path / f"{_STEM}.{suffix}.{name}" for name in names):
        if index.is_file():
            return _shards(index, suffix)
    single = path / _single(variant, suffix)
    return [single] if single.is_file() else []


def _shards(index: Path, suffix: str) -> list[Path]:
    weights = read_json_object(index).get("weight_map")
    names = list(weights.values()) if isinstance(weights, dict) else []
    if not names:
        raise ValueError(f"{index} must hold a weight_map that names a file for each tensor, got {weights!r:.80}")
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(rf"\w[\w.-]*\.{suffix}", name):
            raise ValueError(f"a file in {index} must be a .{suffix} in the same directory, got {name!r:.80}")
        if not (index.parent / name).is_file():
            raise ValueError(f"{index} names {name}, which must lie beside it, and does not")
    return [index.parent / name for name in sorted(set(names))]


def _variants(path: Path) -> set[Any]:
    """Return the variants of the weights in a directory; None stands for those without one."""
    patterns = (
        rf"{_STEM}(?:\.([\w-]+?))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)",
        rf"{_STEM}\.(?:safetensors|bin)\.index(?:\.([\w-]+))?\.json",
    )
    found = (re.fullmatch(pattern, file.name) for file in path.iterdir() for pattern in patterns)
    return {match[1] for match in found if match}


@contextmanager
def _settings_of_a_file() -> Iterator[None]:
    """Make a wrong type an error of the file, not of the caller."""
    try:
        yield
    except TypeError as error:
        raise ValueError(str(error)) from error


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        refuse(f"{name} must be true or false", value)


def _check_betas(name: str, value: object) -> None:
    if value is not None and not isinstance(value, list):
        refuse(f"{name} must be a list of numbers", value)
    for beta in value or ():
        check_number(f"a number of {name}", beta)


_MOST_TIMESTEPS = 1_000_000
_CHECKS: dict[str, Any] = {
    "num_train_timesteps": lambda name, value: check_integer(name, value, at_least=1, at_most=_MOST_TIMESTEPS),
    "beta_start": check_number,
    "beta_end": check_number,
    "trained_betas": _check_betas,
    "prediction_type": lambda name, value: check_choice(name, value, DISCRETE_PREDICTIONS),
    "timestep_spacing": lambda name, value: check_choice(name, value, SPACINGS),
    "steps_offset": lambda name, value: check_integer(name, value, at_least=0),
    "set_alpha_to_one": _check_flag,
    "rescale_betas_zero_snr": _check_flag,
    "clip_sample": _check_flag,
    "thresholding": _check_flag,
}
"""The rule of each setting that is used."""


def _read_scheduler(file: Path) -> dict[str, Any]:
    """Read the settings in a scheduler's configuration, as arguments of ``LoadedModel``."""
    stored = _read_json(file)
    name = stored.get("_class_name")
    name = _ORIGINALS.get(name, name) if isinstance(name, str) else name
    if name not in SCHEDULERS:
        raise ValueError(
            f"a scheduler must be one for betas, which DDIM can replace ({', '.join(SCHEDULERS)}), got _class_name = {name!r} "
            f"in {file}. {_WHICH}"
        )
    _check_settings(stored, file, _CHECKS)
    # By diffusers, for its defaults of what the file leaves out.
    try:
        config = getattr(diffusers_module(), name).from_config({**stored, "_class_name": name}).config
    except NotImplementedError:  # not every scheduler has every schedule
        raise _unknown_betas(stored, file) from None
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"diffusers cannot make the {name} of {file}: {first_line(error)}") from error
    if config.get("use_flow_sigmas"):
        raise ValueError(f"a schedule must follow from betas, got use_flow_sigmas = True in {file}")
    options = {name: config[name] for name in _SAMPLER_OPTIONS if name in config}
    clips = config.get("clip_sample") and not config.get("thresholding")
    numbers: tuple[str, ...] = ("clip_sample_range",) if clips else ()
    if config.get("thresholding"):
        options |= {name: config[name] for name in _THRESHOLDING_OPTIONS}
        numbers = _THRESHOLDING_OPTIONS[1:]
    _check_settings(config, file, dict.fromkeys(numbers, check_number))
    return {
        "prediction_type": config.prediction_type,
        "schedule": schedule_of_config(config, str(file)),
        "clip_sample_range": float(config.get("clip_sample_range", 1.0)) if clips else None,
        "sampler_options": options,
    }


def _check_settings(config: Mapping[str, Any], file: Path, checks: Mapping[str, Any]) -> None:
    with _settings_of_a_file():
        for name, check in checks.items():
            if name in config:
                check(f"{name} in {file}", config[name])


def schedule_of_config(config: Mapping[str, Any], where: str) -> NoiseSchedule:
    """Return the noise schedule of a diffusers scheduler for betas, computed in float64; diffusers
    computes it in float32.

    Args:
        config: the scheduler's, complete.
        where: what to call it in errors.

    Raises:
        ValueError: its betas are unknown or out of range.
    """
    try:
        if config["trained_betas"] is not None:
            schedule = NoiseSchedule.from_betas(config["trained_betas"], "trained_betas")
        elif config["beta_schedule"] in ("linear", "scaled_linear", "sigmoid"):
            ends = {"beta_start": config["beta_start"], "beta_end": config["beta_end"]}
            schedule = make_schedule(config["beta_schedule"], config["num_train_timesteps"], **ends)
        elif config["beta_schedule"] == "squaredcos_cap_v2":
            schedule = NoiseSchedule.cosine(config["num_train_timesteps"])
        else:
            raise _unknown_betas(config, where)
        return schedule.rescale_zero_terminal_snr() if config.get("rescale_betas_zero_snr") else schedule
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} must give a noise schedule: {error}") from error


def _unknown_betas(config: Mapping[str, Any], where: object) -> ValueError:
    return ValueError(
        "beta_schedule must be linear, scaled_linear, sigmoid or squaredcos_cap_v2, or trained_betas given, got "
        f"beta_schedule = {config.get('beta_schedule')!r} in {where}"
    )


def diffusers_module() -> Any:
    """Return diffusers, or raise ImportError with the command that installs it."""
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(
            f"a diffusers directory is loaded by diffusers, which is missing ({error}): pip install diffusers"
        ) from error
    return diffusers


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"a diffusers directory must hold {path.name}, got none at {path}")
    return read_json_object(path)


# --- Archives ---------------------------------------------------------------------------------------------------------


def _archive_kind(path: Path) -> str:
    """Return the kind of archive, a key of ``_ARCHIVES``, by its bytes, not by its name; nothing in
    it is unpickled."""
    with open(path, "rb") as file:
        is_pickle = re.match(rb"\x80[\x02-\x05]", file.read(2), re.DOTALL) is not None
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] or name for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        names = set()
    if "constants.pkl" in names:
        return "TorchScript"
    if any("aotinductor" in name for name in names):
        raise ValueError(
            f"a model must be a program, got compiled code for one device in {path}: load it with "
            "torch._inductor.aoti_load_package, and use the result as the model"
        )
    if names & {"models/model.json", "archive_format", "serialized_exported_program.json"}:
        return "torch.export"
    if "data.pkl" in names or is_pickle:
        raise ValueError(
            f"{path} is a pickle (torch.save), which holds weights without a network, or can run code: build the network yourself, "
            "network.load_state_dict(torch.load(path, weights_only=True)), and use it as the model"
        )
    if path.suffix == ".safetensors":
        raise ValueError(f"{path} holds weights without a network: name the diffusers directory that it lies in")
    raise ValueError(
        f"a model must be a TorchScript archive, a torch.export archive or a diffusers directory, and {path} is none, or damaged"
    )


def _load_torchscript(path: Path, device: torch.device, dtype: torch.dtype | None) -> LoadedModel:
    try:
        with _without_deprecations():
            network = torch.jit.load(str(path), map_location=device)
    except RuntimeError as error:
        raise ValueError(f"torch cannot load the TorchScript archive {path}: {first_line(error)}") from error
    return LoadedModel(network.to(dtype))


def _load_exported(path: Path, device: torch.device, dtype: torch.dtype | None) -> LoadedModel:
    if dtype is not None:
        raise ValueError(
            f"an exported program computes in the dtype it was exported with, got dtype={dtype}: leave dtype out, or export it again"
        )
    try:
        program = torch.export.load(path)
    except Exception as error:
        raise ValueError(f"torch cannot load the torch.export archive {path}: {first_line(error)}") from error
    devices = {tensor.device for tensor in program.state_dict.values()}
    if wrong := [other for other in devices if other.type != device.type or device.index not in (None, other.index)]:
        raise ValueError(
            f"an exported program stays on the device it was exported for, {wrong[0]}, got device={str(device)!r}: pass "
            f"device={str(wrong[0])!r}, or export it again"
        )
    return LoadedModel(_Exported(program))


_ARCHIVES = {"TorchScript": _load_torchscript, "torch.export": _load_exported}


class _ScriptArchive:
    """A TorchScript module that is pickled as its archive."""

    def __init__(self, network: torch.jit.ScriptModule):
        self.network = network

    def __reduce__(self) -> tuple[Any, ...]:
        archive = io.BytesIO()
        with _without_deprecations():
            torch.jit.save(self.network, archive)
        return _script_from, (archive.getvalue(),)


def _script_from(archive: bytes) -> _ScriptArchive:
    with _without_deprecations():
        return _ScriptArchive(torch.jit.load(io.BytesIO(archive)))


@contextmanager
def _without_deprecations() -> Iterator[None]:
    """Keep newer torch from calling TorchScript deprecated: archives exist all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


class _Exported(nn.Module):
    """An exported program as a module, with an error that names the shapes it takes. It is pickled
    as its archive."""

    def __init__(self, program: torch.export.ExportedProgram):
        super().__init__()
        self._exported = program
        self.program = program.module()
        values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
        self._takes = ", ".join(
            f"{name} {tuple(value.shape)}"
            for name in program.graph_signature.user_inputs
            if isinstance(value := values.get(name), Tensor)
        )

    def forward(self, x: Tensor, t: Tensor, **conditioning: Any) -> Any:
        try:
            return self.program(x, t, **conditioning)
        except (AssertionError, RuntimeError) as error:
            # The messages of torch's check of the inputs, new and old. Any other error comes from
            # inside the program.
            if not str(error).startswith(("Guard failed", "Expected input at")):
                raise
            raise ValueError(
                f"an exported program takes the shapes it was exported with, {self._takes}, got x {tuple(x.shape)} "
                f"and t {tuple(t.shape)}: sample in that shape, or export it with dynamic_shapes ({first_line(error)})"
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        archive = io.BytesIO()
        torch.export.save(self._exported, archive)
        return _exported_from, (archive.getvalue(), self.training)

    def train(self, mode: bool = True) -> _Exported:
        """Set ``training`` only: an exported program has the mode in which it was exported."""
        self.training = mode
        return self


def _exported_from(archive: bytes, training: bool) -> _Exported:
    return _Exported(torch.export.load(io.BytesIO(archive))).requires_grad_(False).train(training)
