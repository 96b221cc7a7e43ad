"""A text-to-image pipeline of diffusers as a class-conditional model: its classes are prompts.

The prompts are encoded once, when the model is loaded. So whatever samples a model with classes, a
grid, a set of any size or a search, samples prompts.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.checks import check_text, refuse
from ..utils.files import first_line, read_json_object
from .class_labels import ClassConditional, check_labels, check_range
from .loading import LoadedModel, diffusers_module, load_model_from

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
"""Pipelines whose UNet is told the prompt alone, and a size where it asks for one."""
_PARTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")


class TextToImage(ClassConditional, LoadedModel):
    """A UNet with embeddings of prompts: ``model(x, t, class_labels)`` returns a tensor.

    Samples are latents; ``decode`` makes pictures of them, ``encode`` latents of pictures.

    Attributes:
        class_names: the prompts.
        num_classes: the label that stands for the negative prompt, which guidance leads away from.
        picture_shape: (C, H, W) of a decoded sample.
    """

    vae: Any
    embeddings: Tensor
    pooled: Tensor | None
    sizes: Tensor | None

    def __init__(
        self,
        model: LoadedModel,
        vae: nn.Module,
        prompts: Sequence[str],
        embeddings: Tensor,
        pooled: Tensor | None = None,
    ):
        super().__init__(
            model.network,
            prediction_type=model.prediction_type,
            schedule=model.schedule,
            clip_sample_range=model.clip_sample_range,
            sample_shape=model.sample_shape,
            sampler_options=model.sampler_options,
        )
        if model.sample_shape is None:
            refuse(
                "a text-to-image UNet must state the size of its latents", None, "add sample_size to its config.json"
            )
        self.vae = vae
        self.class_names, self.num_classes = tuple(prompts), len(prompts)
        config = self.vae.config
        scale = 2 ** (len(config.block_out_channels) - 1)
        _, height, width = model.sample_shape
        self.picture_shape = (config.out_channels, scale * height, scale * width)
        self.register_buffer("embeddings", embeddings)
        self.register_buffer("pooled", pooled)
        whole = self.picture_shape[1:]  # as drawn, not cropped, as wanted
        sizes = torch.tensor([*whole, 0, 0, *whole], dtype=embeddings.dtype, device=embeddings.device)
        self.register_buffer("sizes", None if pooled is None else sizes)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None, **conditioning: Any) -> Tensor:
        if class_labels is None:
            class_labels = torch.full((len(x),), self.num_classes, dtype=torch.int64, device=x.device)
        check_labels(class_labels, x.shape[0], self.num_classes)
        if not torch.compiler.is_compiling():
            check_range(class_labels, self.num_classes)  # -1 would be a prompt's embedding, too
        more = dict(conditioning)
        if self.pooled is not None and self.sizes is not None:
            time_ids = self.sizes.expand(len(x), -1)
            more["added_cond_kwargs"] = {"text_embeds": self.pooled[class_labels], "time_ids": time_ids}
        return super().forward(x, t, encoder_hidden_states=self.embeddings[class_labels], **more)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return the pictures ``(B, *picture_shape)``, about in [-1, 1], of latents ``(B,
        *sample_shape)``, one at a time: a picture takes far more memory than its latents."""
        latents = latents.to(self.embeddings.dtype)
        shift, scale = self._range_of_latents(latents)
        return torch.cat([self.vae.decode(one[None], return_dict=False)[0] for one in latents * scale + shift])

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Return the most probable latents ``(B, *sample_shape)`` of pictures in [-1, 1]."""
        shift, scale = self._range_of_latents(pictures)
        modes = [self.vae.encode(one[None]).latent_dist.mode() for one in pictures]
        return (torch.cat(modes) - shift) / scale

    def _range_of_latents(self, like: Tensor) -> tuple[Any, Any]:
        """Return the shift and the scale from the UNet's latents to the VAE's."""
        config = self.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        scale = 1 / config.scaling_factor
        if mean is None or std is None:
            return config.get("shift_factor") or 0.0, scale
        numbers = (torch.tensor(v, dtype=like.dtype, device=like.device).view(1, -1, 1, 1) for v in (mean, std))
        shift, std_devs = numbers
        return shift, std_devs * scale


def load_text_to_image(
    path: str | os.PathLike[str],
    prompts: Sequence[str],
    negative_prompt: str | None = None,
    *,
    device: str | torch.device = "cpu",
    trust_pickle: bool = False,
    variant: str | None = None,
) -> TextToImage:
    """Load a text-to-image pipeline of diffusers from a directory, with the prompts to draw, in
    eval mode, its weights frozen. Nothing is downloaded.

    Args:
        path: of a Stable Diffusion (1, 2 or XL), with its tokenizer and text encoder.
        prompts: one or more: the classes of the model.
        negative_prompt: what guidance leads away from. None: what the pipeline uses.
        device, trust_pickle, variant: see ``load_model_from``.

    Raises:
        ImportError: diffusers or transformers is needed.
        TypeError, ValueError: the directory has no such pipeline, or is damaged.
    """
    prompts = [check_text("a prompt", prompt) for prompt in prompts]
    path = Path(path)
    if lacking := [name for name in ("diffusers", "transformers") if importlib.util.find_spec(name) is None]:
        raise ImportError(
            f"a text-to-image pipeline is loaded by diffusers and transformers, got no {' and no '.join(lacking)}: "
            f"pip install {' '.join(lacking)}"
        )
    kind = _checked_kind(path)
    diffusers = diffusers_module()
    model = load_model_from(path, device=device, trust_pickle=trust_pickle, variant=variant)
    pipeline_class = getattr(diffusers, kind)
    unused = {"safety_checker": None, "requires_safety_checker": False, "feature_extractor": None}
    known = inspect.signature(pipeline_class).parameters
    try:
        pipeline = pipeline_class.from_pretrained(
            path,
            unet=model.network,
            local_files_only=True,
            use_safetensors=None if trust_pickle else True,
            variant=variant,
            low_cpu_mem_usage=diffusers.utils.is_accelerate_available(),
            **{name: value for name, value in unused.items() if name in known},
        ).to(device)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.float()  # newer versions load what is stored
        with torch.no_grad():
            embeddings, pooled = _encoded(pipeline, prompts, negative_prompt)
    except Exception as error:
        raise ValueError(
            f"diffusers cannot load the {kind} in {path}, which may be damaged or incomplete: {first_line(error)}"
        ) from error
    text_to_image = TextToImage(model, pipeline.vae, prompts, embeddings, pooled)
    return text_to_image.requires_grad_(False).eval()


def _checked_kind(path: Path) -> str:
    """Return the class of the pipeline in a directory."""
    if not (path / "model_index.json").is_file():
        raise ValueError(
            f"a prompt needs the directory of a pipeline, with a model_index.json, got {path}: name the directory that "
            "DiffusionPipeline.save_pretrained wrote"
        )
    index = read_json_object(path / "model_index.json")
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        raise ValueError(
            f"a prompt is for a {' or '.join(PIPELINES)}, got a {kind} in {path}: call this one in Python, with "
            "pipe.scheduler = fast_scheduler(pipe.scheduler) (docs/MODELS.md)"
        )
    lacking = [name for name in _PARTS if not isinstance(index.get(name), list) or index[name][0] is None]
    if lacking:
        raise ValueError(
            f"a prompt needs a pipeline with {', '.join(_PARTS)}, got one without {', '.join(lacking)} in {path}: save the whole "
            "pipeline, or give encoder_hidden_states as conditioning in Python"
        )
    return kind


def _encoded(pipeline: Any, prompts: list[str], negative_prompt: str | None) -> tuple[Tensor, Tensor | None]:
    """Return the embeddings of the prompts, and of the negative one at the end, and their pooled
    embeddings where the pipeline has some."""
    found = pipeline.encode_prompt(
        [*prompts, negative_prompt or ""],
        device=pipeline.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
    )
    embeddings, pooled = found[0], found[2] if len(found) == 4 else None
    if negative_prompt is None and pooled is not None and pipeline.config.get("force_zeros_for_empty_prompt"):
        embeddings[-1], pooled[-1] = 0, 0
    return embeddings, pooled
