"""The models that ``--model`` names, the same for every command."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..generation.settings import file_digest
from ..models.loading import LoadedModel, load_model
from ..models.text_to_image import load_text_to_image
from ..utils.checks import refuse
from ..utils.import_string import exits_refused, import_string
from ..utils.warn import warn_caller
from .choices import CLOSED_FORM, SHIPPED

_TOLD_BY_TEXT = "UNet2DConditionModel"
_PROMPTS = "--prompt is for the directory of a text-to-image pipeline"


def named_model(
    name: str,
    device: torch.device,
    *,
    trust_pickle: bool = False,
    variant: str | None = None,
    prompts: tuple[str, ...] = (),
    negative_prompt: str | None = None,
) -> nn.Module:
    """Return the model of this name, on this device.

    Args:
        name: of a model that ships, "closed-form", a path, or module:attribute.
        prompts, negative_prompt: of a text-to-image pipeline.

    Raises:
        TypeError: what is named is no model.
        ValueError: there is no such model, or it needs a prompt, or takes none.
    """
    if prompts and os.path.isdir(name):
        return load_text_to_image(
            name, prompts, negative_prompt, device=device, trust_pickle=trust_pickle, variant=variant
        )
    if negative_prompt is not None and not prompts:
        raise ValueError(f"{_PROMPTS}, got --negative-prompt alone: add --prompt")
    model = _model_without_text(name, device, trust_pickle=trust_pickle, variant=variant)
    if prompts:  # after the model: one that does not exist is said first
        raise ValueError(f"{_PROMPTS}, got --model {name}: leave it out")
    return model


def _model_without_text(name: str, device: torch.device, **options: Any) -> nn.Module:
    if name == CLOSED_FORM:
        from ..tradeoff import ClosedForm

        return ClosedForm().to(device).eval()
    if ":" in name and not os.path.exists(name):
        return _own_model(name).to(device)
    file = Path(name if name.endswith(".py") else f"{name}.py")
    if file.is_file() and not os.path.isdir(name) and name not in SHIPPED:
        module = ".".join(file.with_suffix("").parts)
        refuse("--model of a file of Python must be module:attribute", name, f"for instance {module}:model")
    model = load_model(name, device, **options)
    if isinstance(model, LoadedModel) and type(model.network).__name__ == _TOLD_BY_TEXT:
        raise ValueError(
            f"a text-to-image model needs a prompt, got none for {name}: pass --prompt TEXT with the directory of a pipeline that "
            "has its tokenizer and text_encoder, or give encoder_hidden_states (and what else it needs, as Stable Diffusion XL "
            "does added_cond_kwargs) as conditioning in Python"
        )
    return model


class FunctionModel(nn.Module):
    """A function ``eps(x, t)`` of one's own, with the attributes that it has."""

    def __init__(self, function: Callable[..., Any], name: str):
        super().__init__()
        self.function, self.name = function, name

    def forward(self, x: Tensor, t: Tensor, **conditioning: Any) -> Any:
        return self.function(x, t, **conditioning)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "function":
                raise
            return getattr(self.function, name)

    def extra_repr(self) -> str:
        """Return what the function is: sets of samples and searches are resumed with the same one
        only."""
        file = getattr(sys.modules.get(self.name.partition(":")[0]), "__file__", None)
        return f"{self.name}, sha256 {None if file is None else file_digest(Path(file))}"


def _own_model(name: str) -> nn.Module:
    """Import ``module:attribute``: a module, a function of x and t, or what returns one."""
    model = import_string(name, "the model")
    with exits_refused(name, "the model"):
        if isinstance(model, type):
            model = _made_by_class(model, name)
        elif _returns_a_model(model):
            model = model()
    if not callable(model):
        raise TypeError(
            "--model module:attribute must be a torch.nn.Module, a function of x and t, or what returns one, got "
            f"{type(model).__name__} from {name}"
        )
    return (model if isinstance(model, nn.Module) else FunctionModel(model, name)).eval().requires_grad_(False)


def _made_by_class(made: type, name: str) -> Any:
    """Return an instance of a class, and say that its weights are random if it drew any."""
    before = torch.random.get_rng_state()
    model = made()
    drew = not torch.equal(before, torch.random.get_rng_state())
    if drew and isinstance(model, nn.Module) and any(True for _ in model.parameters()):
        warn_caller(
            f"--model {name} is a class, so its weights are new random ones in every run unless it loads some: name an instance, "
            "or a function that loads the weights and returns one"
        )
    return model


def _returns_a_model(value: Any) -> bool:
    """Return whether a function is to be called for the model: it needs no arguments, and has no
    shape of samples."""
    if isinstance(value, nn.Module) or not callable(value) or hasattr(value, "sample_shape"):
        return False
    try:
        inspect.signature(value).bind()
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        return True
    return True
