"""Models from files: a diffusers directory, a TorchScript archive, a torch.export archive.

A module, a compiled module or any other callable needs no loading: ``DDIMSampler.sample`` takes it
as it is.
"""

from __future__ import annotations

import io
import json
import os
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..plans.coefficients import PREDICTION_TYPES
from ..plans.schedules import NoiseSchedule, make_schedule
from ..utils.checks import check_dtype, usable_device
from .protocol import output_tensor
from .shipped import SHIPPED, ShippedModel, load_shipped_model


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

    def forward(self, x: Tensor, t: Tensor, **conditioning: Any) -> Tensor:
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


def load_model(
    name: str | os.PathLike[str] = "fashion",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    trust_pickle: bool = False,
) -> ShippedModel | LoadedModel:
    """Load the model that ships with the package, or one from a file or directory.

    Args:
        name: "fashion": pictures of clothes, 28 x 28, ten classes (docs/MODEL_CARD.md); or a path,
            see ``load_model_from``.
        dtype: of the weights. None: float32 for the model that ships, else as stored.
        trust_pickle: see ``load_model_from``.

    Raises:
        FileNotFoundError: there is no such model or path.
        ImportError, TypeError, ValueError: see ``load_model_from``.
    """
    if isinstance(name, str) and name in SHIPPED:
        return load_shipped_model(name, device, torch.float32 if dtype is None else dtype)
    if not os.path.exists(name):
        raise FileNotFoundError(
            f"a model must be one of those that ship ({', '.join(SHIPPED)}), or the path of a local file or directory, got "
            f"{str(name)!r}, which does not exist: download a model from a hub first, for instance with "
            "huggingface_hub.snapshot_download"
        )
    return load_model_from(name, device=device, dtype=dtype, trust_pickle=trust_pickle)


def load_model_from(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    trust_pickle: bool = False,
) -> LoadedModel:
    """Load a model from a file or directory, in eval mode, its weights frozen. Nothing is
    downloaded.

    - A diffusers directory: of a pipeline (``model_index.json``, whose ``unet`` and ``scheduler``
      are read), or of one model (``config.json``). ``UNet2DModel`` and ``UNet2DConditionModel``.
      Needs diffusers. The samples of a latent pipeline are latents.
    - A TorchScript archive (``torch.jit.save``), called as ``module(x, t, **conditioning)``.
    - A torch.export archive (``torch.export.save``), called alike. It accepts the shapes that it
      was exported for.

    The last two contain a program that runs: load only what you would run.

    Args:
        device: of the model. An exported program stays on the device that it was exported for,
            which must be this one.
        dtype: of the weights. None: as stored, float32 for diffusers. That of an exported program
            cannot be changed.
        trust_pickle: also read a diffusers model's weights from a pickle (``.bin``) if there is no
            ``.safetensors``.

    Raises:
        FileNotFoundError: the path does not exist.
        ImportError: diffusers is needed.
        TypeError, ValueError: the file is of another kind, damaged, or has a setting that is not
            supported.
    """
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
        model = _load_diffusers(path, dtype, trust_pickle).to(device)
    else:
        kind = _archive_kind(path)
        model = (_load_torchscript if kind == "torchscript" else _load_exported)(path, device, dtype)
    return model.requires_grad_(False).eval()


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
_SAMPLER_OPTIONS = ("timestep_spacing", "steps_offset", "set_alpha_to_one")
_THRESHOLDING_OPTIONS = ("thresholding", "dynamic_thresholding_ratio", "sample_max_value")


def _load_diffusers(path: Path, dtype: torch.dtype | None, trust_pickle: bool) -> LoadedModel:
    if (path / "model_index.json").is_file():
        index = _read_json(path / "model_index.json")
        if missing := [part for part in ("unet", "scheduler") if part not in index]:
            parts = ", ".join(key for key in index if not key.startswith("_")) or "nothing"
            raise ValueError(
                f"a pipeline must have a unet and a scheduler, got one in {path} without {missing[0]}: {parts}"
            )
        stated = _read_scheduler(path / "scheduler")
        return _load_unet(path / "unet", dtype, trust_pickle, stated)
    if (path / "config.json").is_file():
        return _load_unet(path, dtype, trust_pickle, {})
    raise ValueError(
        f"a directory must be diffusers', with a model_index.json (a pipeline) or a config.json (a model), got {path}: "
        "name the directory that save_pretrained wrote"
    )


def _load_unet(path: Path, dtype: torch.dtype | None, trust_pickle: bool, stated: Mapping[str, Any]) -> LoadedModel:
    config = _read_json(path / "config.json")
    name = config.get("_class_name")
    if name not in UNETS:
        raise ValueError(f"a diffusers model must be one of {', '.join(UNETS)}, got _class_name = {name!r} in {path}")
    use_safetensors = _has_safetensors(path, trust_pickle)
    diffusers = _diffusers()
    try:
        network, found = getattr(diffusers, name).from_pretrained(
            path,
            local_files_only=True,
            use_safetensors=use_safetensors,
            output_loading_info=True,
            low_cpu_mem_usage=diffusers.utils.is_accelerate_available(),
        )
    except Exception as error:
        raise ValueError(
            f"diffusers cannot load the {name} in {path}, which may be damaged or incomplete: {_first_line(error)}"
        ) from error
    # diffusers itself only logs that such weights stay random.
    if missing := found["missing_keys"] or found["mismatched_keys"]:
        raise ValueError(
            f"the weights in {path} must be those of its config.json, got none that fit {sorted(missing)[0]}"
        )
    return LoadedModel(network.to(dtype), sample_shape=_sample_shape(network.config, path), **stated)


def _sample_shape(config: Any, path: Path) -> tuple[int, ...] | None:
    """Return (C, H, W) of the network's input, or None where its configuration leaves the size
    open."""
    channels, returned = config.in_channels, config.out_channels
    if returned not in (channels, 2 * channels):
        raise ValueError(
            f"a model must return as many channels as it takes (or twice, with a learned variance), got in_channels = {channels} "
            f"and out_channels = {returned} in {path}: load it with diffusers, and wrap it in a function that adds the others"
        )
    size = config.sample_size
    if size is None:
        return None
    return (channels, size, size) if isinstance(size, int) else (channels, *size)


def _has_safetensors(path: Path, trust_pickle: bool) -> bool:
    if any(path.glob("*.safetensors")):
        return True
    pickles = sorted(path.glob("*.bin"))
    if not pickles:
        raise ValueError(f"a model's directory must hold its weights as .safetensors, got none in {path}")
    if not trust_pickle:
        raise ValueError(
            f"weights must be .safetensors, got only {pickles[0].name} in {path}, a pickle, which can run code: "
            "pass trust_pickle=True if you trust where it came from"
        )
    return False


def _read_scheduler(path: Path) -> dict[str, Any]:
    """Read the settings in a scheduler's configuration, as arguments of ``LoadedModel``."""
    stored = _read_json(path / "scheduler_config.json")
    name = stored.get("_class_name")
    if name not in SCHEDULERS:
        raise ValueError(
            f"a scheduler must be one for betas, which DDIM can replace ({', '.join(SCHEDULERS)}), got _class_name = {name!r} "
            f"in {path}"
        )
    # By diffusers, for its defaults of what the file leaves out.
    try:
        config = getattr(_diffusers(), name).from_config(stored).config
    except NotImplementedError:  # not every scheduler has every schedule
        raise _unknown_betas(stored, path) from None
    if config.get("use_flow_sigmas"):
        raise ValueError(f"a schedule must follow from betas, got use_flow_sigmas = True in {path}")
    if config.prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {config.prediction_type!r} in {path}"
        )
    options = {name: config[name] for name in _SAMPLER_OPTIONS if name in config}
    if config.get("thresholding"):
        options |= {name: config[name] for name in _THRESHOLDING_OPTIONS}
    clips = config.get("clip_sample") and not config.get("thresholding")
    return {
        "prediction_type": config.prediction_type,
        "schedule": _schedule(config, path),
        "clip_sample_range": float(config.get("clip_sample_range", 1.0)) if clips else None,
        "sampler_options": options,
    }


def _schedule(config: Mapping[str, Any], path: Path) -> NoiseSchedule:
    """Return the noise schedule, from betas in float64; diffusers computes them in float32."""
    if config["trained_betas"] is not None:
        schedule = NoiseSchedule.from_betas(config["trained_betas"], "trained_betas")
    elif config["beta_schedule"] in ("linear", "scaled_linear", "sigmoid"):
        ends = {"beta_start": config["beta_start"], "beta_end": config["beta_end"]}
        schedule = make_schedule(config["beta_schedule"], config["num_train_timesteps"], **ends)
    elif config["beta_schedule"] == "squaredcos_cap_v2":
        schedule = NoiseSchedule.cosine(config["num_train_timesteps"])
    else:
        raise _unknown_betas(config, path)
    return schedule.rescale_zero_terminal_snr() if config.get("rescale_betas_zero_snr") else schedule


def _unknown_betas(config: Mapping[str, Any], path: Path) -> ValueError:
    return ValueError(
        "beta_schedule must be linear, scaled_linear, sigmoid or squaredcos_cap_v2, or trained_betas given, got "
        f"beta_schedule = {config.get('beta_schedule')!r} in {path}"
    )


def _diffusers() -> Any:
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
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, and is not: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


# --- Archives ---------------------------------------------------------------------------------------------------------


def _archive_kind(path: Path) -> str:
    """Return "torchscript" or "export", by the contents of the archive, not by its name."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] or name for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError):
        names = set()
    if "constants.pkl" in names:
        return "torchscript"
    if any("aotinductor" in name for name in names):
        raise ValueError(
            f"a model must be a program, got compiled code for one device in {path}: load it with "
            "torch._inductor.aoti_load_package, and use the result as the model"
        )
    if names & {"models/model.json", "archive_format", "serialized_exported_program.json"}:
        return "export"
    if "data.pkl" in names:
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
        raise ValueError(f"torch cannot load the TorchScript archive {path}: {_first_line(error)}") from error
    return LoadedModel(network.to(dtype))


def _load_exported(path: Path, device: torch.device, dtype: torch.dtype | None) -> LoadedModel:
    if dtype is not None:
        raise ValueError(
            f"an exported program computes in the dtype it was exported with, got dtype={dtype}: leave dtype out, or export it again"
        )
    try:
        program = torch.export.load(path)
    except Exception as error:
        raise ValueError(f"torch cannot load the torch.export archive {path}: {_first_line(error)}") from error
    devices = {tensor.device for tensor in program.state_dict.values()}
    if wrong := [other for other in devices if other.type != device.type or device.index not in (None, other.index)]:
        raise ValueError(
            f"an exported program stays on the device it was exported for, {wrong[0]}, got device={str(device)!r}: pass "
            f"device={str(wrong[0])!r}, or export it again"
        )
    return LoadedModel(_Exported(program))


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
                f"and t {tuple(t.shape)}: sample in that shape, or export it with dynamic_shapes ({_first_line(error)})"
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


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
