"""The sampling and the log-probabilities of DPPO (irom-princeton/dppo, ``model/diffusion/diffusion_vpg.py``).

    from ddim_fast.integrations.dppo import use_fast_steps

    use_fast_steps(model)  # from now on, model.forward and model.get_logprobs compute their steps with ddim_fast

Works on the objects ``VPGDiffusion`` and ``PPODiffusion``, without importing them.
docs/drop_ins/log_probs.md lists every difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..kernels.contract import StepCoefficients
from ..kernels.dispatch import ddim_step
from ..plans.coefficients import (
    check_eta,
    ddim_coefficients,
    ddpm_posterior_coefficients,
    ddpm_variance,
    variance_with_room,
)
from ..utils.checks import check_number, refuse
from .host_copy import HostCopy
from .outputs import check_output
from .scored_steps import log_prob_of_elements

DETERMINISTIC_STD = 1e-3
"""The least noise of a deterministic run with DDPM's steps, in the original."""


class Chain(NamedTuple):
    """What the original calls ``Sample``.

    Attributes:
        trajectories: ``(B, Ta, Da)``, the actions.
        chains: ``(B, K + 1, Ta, Da)``, the states of the K fine-tuned steps, or None.
    """

    trajectories: Tensor
    chains: Tensor | None


@torch.no_grad()
def sample_chain(
    model: Any,
    cond: dict[str, Tensor],
    deterministic: bool = False,
    return_chain: bool = True,
    use_base_policy: bool = False,
) -> Chain:
    """Sample as ``VPGDiffusion.forward``: each step is one pass, and calls one network.

    Args:
        model: a ``VPGDiffusion``; its settings are read at each call.
        cond: the observations, by name, ``(B, ...)`` each.
        deterministic: without noise (DDIM), or with little (DDPM).
        return_chain: also return the states of the fine-tuned steps.
        use_base_policy: take the network before fine-tuning in every step.

    Returns:
        (trajectories, chains). torch's generator ends in the same state as after the original.

    Raises:
        TypeError, ValueError: a setting of the model has no such steps.
    """
    steps = _Steps.of(model)
    observed = cond["state"] if "state" in cond else cond["rgb"]
    eta = steps.eta(cond, deterministic)
    least = float(model.get_min_sampling_denoising_std())
    device = model.betas.device
    x = torch.randn((len(observed), model.horizon_steps, model.action_dim), dtype=model.betas.dtype, device=device)
    rows = [steps.sampling_row(index, eta, least, deterministic) for index in range(steps.count)]
    states = [x] if steps.first_tuned == 0 else []
    for index, row in enumerate(rows):
        t = torch.full((len(x),), steps.timesteps[index], dtype=torch.int64, device=device)
        tuned = index >= steps.first_tuned and not use_base_policy
        network = model.actor_ft if tuned else model.actor
        output = check_output("the output of the actor", network(x, t, cond=cond), x)
        noise = torch.randn_like(x).clamp_(-model.randn_clip_value, model.randn_clip_value)
        x = ddim_step(x, output, row, noise=noise)
        if index == steps.count - 1 and (bound := _final_bound(model)) is not None:
            x = x.clamp(-bound, bound)
        if index >= steps.first_tuned - 1:
            states.append(x)
    return Chain(x, torch.stack(states, dim=1) if return_chain else None)


def get_logprobs(
    model: Any, cond: dict[str, Tensor], chains: Tensor, get_ent: bool = False, use_base_policy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Evaluate chains as ``VPGDiffusion.get_logprobs``, with one network.

    Args:
        model, cond, use_base_policy: those of ``sample_chain``.
        chains: ``(B, K + 1, Ta, Da)``: constants.
        get_ent: also return eta, as the original.

    Returns:
        The log-density of each element, ``(B * K, Ta, Da)``; with ``get_ent`` also eta.

    Raises:
        TypeError, ValueError: a setting of the model has no such steps, or the shape is another.
    """
    steps = _Steps.of(model)
    shape = (steps.tuned + 1, model.horizon_steps, model.action_dim)
    if not isinstance(chains, Tensor) or chains.ndim != 4 or tuple(chains.shape[1:]) != shape:
        got = tuple(chains.shape) if isinstance(chains, Tensor) else type(chains)
        refuse(f"chains must have the shape (B, {shape[0]}, {shape[1]}, {shape[2]})", got)
    count = len(chains)
    repeated = {name: value.repeat_interleave(steps.tuned, dim=0) for name, value in cond.items()}
    indices = torch.arange(steps.first_tuned, steps.count, dtype=torch.int64, device=chains.device).repeat(count)
    x_t, x_prev = (part.reshape(-1, *shape[1:]) for part in (chains[:, :-1], chains[:, 1:]))
    evaluated = _Evaluated.of(model, steps, repeated, x_t, indices, use_base_policy)
    parts = [
        evaluated.log_prob(x_prev, slice(i, None, steps.tuned), index)
        for i, index in enumerate(range(steps.first_tuned, steps.count))
    ]
    log_prob = torch.stack(parts, dim=1).flatten(0, 1)
    return (log_prob, evaluated.eta) if get_ent else log_prob


def get_logprobs_subsample(
    model: Any,
    cond: dict[str, Tensor],
    chains_prev: Tensor,
    chains_next: Tensor,
    denoising_inds: Tensor,
    get_ent: bool = False,
    use_base_policy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Evaluate single steps as ``VPGDiffusion.get_logprobs_subsample``, with one network.

    Args:
        model, cond, get_ent, use_base_policy: those of ``get_logprobs``.
        chains_prev, chains_next: the states before and after a step, ``(B, Ta, Da)``.
        denoising_inds: which of the K fine-tuned steps each is, ``(B,)``.

    Returns:
        The log-density of each element, ``(B, Ta, Da)``; with ``get_ent`` also eta.

    Raises:
        TypeError, ValueError: a setting of the model has no such steps, or an index is none of
            theirs.
    """
    steps = _Steps.of(model)
    each = denoising_inds.tolist()
    if len(each) != len(chains_prev) or any(not 0 <= one < steps.tuned for one in each):
        refuse(
            f"denoising_inds must be one for each of the {len(chains_prev)} steps, from 0 to {steps.tuned - 1}", each
        )
    indices = denoising_inds.to(chains_prev.device) + steps.first_tuned
    evaluated = _Evaluated.of(model, steps, cond, chains_prev, indices, use_base_policy)
    parts, places = [], []
    for one in sorted(set(each)):
        chosen = torch.tensor([i for i, other in enumerate(each) if other == one], dtype=torch.int64, device="cpu")
        places.append(chosen)
        parts.append(evaluated.log_prob(chains_next, chosen.to(chains_prev.device), one + steps.first_tuned))
    log_prob = torch.zeros_like(chains_prev) if not parts else torch.cat(parts)
    if parts:
        log_prob = log_prob[torch.cat(places).argsort().to(log_prob.device)]
    return (log_prob, evaluated.eta) if get_ent else log_prob


class _Evaluated(NamedTuple):
    """Steps whose network has been called.

    Attributes:
        steps: of the model.
        x_t, output: ``(N, Ta, Da)``.
        eta: of each, as the original returns it.
        number: eta, where it is one.
        least: the least standard deviation of their densities.
    """

    steps: _Steps
    x_t: Tensor
    output: Tensor
    eta: Tensor
    number: float
    least: float

    @classmethod
    def of(
        cls, model: Any, steps: _Steps, cond: dict[str, Tensor], x_t: Tensor, indices: Tensor, use_base_policy: bool
    ) -> _Evaluated:
        number = steps.eta(cond, deterministic=False)
        least = check_number("min_logprob_denoising_std", model.min_logprob_denoising_std, above=0)
        t = torch.tensor(steps.timesteps, dtype=torch.int64, device="cpu").to(x_t.device)[indices]
        network = model.actor if use_base_policy else model.actor_ft
        output = check_output("the output of the actor", network(x_t, t, cond=cond), x_t)
        eta = model.eta(cond).unsqueeze(1) if steps.is_ddim else torch.ones_like(x_t)
        return cls(steps, x_t, output, eta, number, least)

    def log_prob(self, x_prev: Tensor, chosen: Any, index: int) -> Tensor:
        """Return the log-density of each element of the steps that are chosen, all at one index."""
        row = self.steps.row(index, self.number)
        return log_prob_of_elements(x_prev[chosen], self.x_t[chosen], self.output[chosen], row, self.least)


# --- Steps of a model -------------------------------------------------------------------------------------------------

_on_host: WeakKeyDictionary[Any, tuple[HostCopy, ...]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class _Steps:
    """The steps of a model, by their index from the noisiest.

    Attributes:
        model: a ``VPGDiffusion``.
        timesteps: what the networks are told.
        levels: (alpha_bar_t, alpha_bar_prev) of each.
        tuned: how many of them are fine-tuned: the last ones.
    """

    model: Any
    timesteps: list[int]
    levels: list[tuple[float, float]]
    tuned: int

    @classmethod
    def of(cls, model: Any) -> _Steps:
        """Read them off a model.

        Raises:
            ValueError: it has a setting whose steps are no rows.
        """
        if model.use_ddim:
            if model.eps_clip_value is not None:
                refuse(
                    "eps_clip_value bounds the predicted noise, which a step here does not",
                    model.eps_clip_value,
                    "None",
                )
            timesteps, bars, before = _values(model, "ddim_t", "ddim_alphas", "ddim_alphas_prev")
            return cls(model, timesteps, list(zip(bars, before, strict=True)), model.ft_denoising_steps)
        bars, before = _values(model, "alphas_cumprod", "alphas_cumprod_prev")
        levels = list(zip(bars, before, strict=True))[::-1]
        return cls(model, list(range(len(bars)))[::-1], levels, model.ft_denoising_steps)

    @property
    def is_ddim(self) -> bool:
        return bool(self.model.use_ddim)

    @property
    def count(self) -> int:
        return len(self.timesteps)

    @property
    def first_tuned(self) -> int:
        return self.count - self.tuned

    def eta(self, cond: dict[str, Tensor], deterministic: bool) -> float:
        """Return eta: one number; 1 where steps are DDPM's.

        Raises:
            ValueError: it is learned, or differs between samples or actions.
        """
        if not self.is_ddim:
            return 1.0
        if deterministic:
            return 0.0
        found = self.model.eta(cond)
        if found.requires_grad:
            raise ValueError("eta must be a number that is not learned, got one with a gradient: use learn_eta=False")
        values = found.unique().tolist()
        if len(values) > 1:
            refuse("eta must be one number", values, "use EtaFixed")
        eta = values[0] if values else 0.0  # of no samples
        check_eta(eta)
        return float(eta)

    def row(self, index: int, eta: float) -> StepCoefficients:
        """Return a step with its own noise."""
        model = self.model
        clip = None if model.denoised_clip_value is None else float(model.denoised_clip_value)
        if self.is_ddim:
            return _ddim_row(*self.levels[index], eta, clip)
        return _ddpm_row(*self.levels[index], bool(model.predict_epsilon), clip)

    def sampling_row(self, index: int, eta: float, least: float, deterministic: bool) -> StepCoefficients:
        """Return a step with the noise that sampling adds."""
        row = self.row(index, eta)
        if not deterministic:
            return _with_noise(row, max(row.prev_noise, least))
        if self.is_ddim or self.timesteps[index] == 0:
            return _with_noise(row, 0.0)
        return _with_noise(row, max(row.prev_noise, DETERMINISTIC_STD))


def _values(model: Any, *names: str) -> list[list[Any]]:
    """Return the values of tensors of a model, copied to the host once."""
    tensors = [getattr(model, name) for name in names]
    found = _on_host.get(model)
    if found is None or len(found) != len(tensors) or not all(c.is_of(t) for c, t in zip(found, tensors, strict=True)):
        found = _on_host[model] = tuple(HostCopy.of(tensor) for tensor in tensors)
    return [copy.values for copy in found]


@lru_cache(4096)
def _ddim_row(alpha_bar_t: float, alpha_bar_prev: float, eta: float, clip: float | None) -> StepCoefficients:
    return ddim_coefficients(
        alpha_bar_t,
        alpha_bar_prev,
        variance=variance_with_room(alpha_bar_t, alpha_bar_prev, eta),
        clip_sample_range=clip,
        use_clipped_model_output=clip is not None,
    )


@lru_cache(4096)
def _ddpm_row(alpha_bar_t: float, alpha_bar_prev: float, predict_epsilon: bool, clip: float | None) -> StepCoefficients:
    return ddpm_posterior_coefficients(
        alpha_bar_t,
        alpha_bar_prev,
        "epsilon" if predict_epsilon else "sample",
        std_dev_added=ddpm_variance(alpha_bar_t, alpha_bar_prev) ** 0.5,
        clip_sample_range=clip,
    )


@lru_cache(4096)
def _with_noise(row: StepCoefficients, std_dev: float) -> StepCoefficients:
    return replace(row, prev_noise=std_dev)


def _final_bound(model: Any) -> float | None:
    """Return what the last step's actions are clamped to; the name of it differs between versions."""
    if getattr(model, "clamp_action", False):
        return 1.0
    bound = getattr(model, "final_action_clip_value", None)
    return None if bound is None else float(bound)


# --- The change of an object ------------------------------------------------------------------------------------------

_METHODS: dict[str, Callable[..., Any]] = {
    "forward": sample_chain,
    "get_logprobs": get_logprobs,
    "get_logprobs_subsample": get_logprobs_subsample,
}
_NEEDED = ("actor", "actor_ft", "use_ddim", "ft_denoising_steps", "min_logprob_denoising_std", "alphas_cumprod")


def use_fast_steps(model: Any) -> Any:
    """Make ``model(...)`` and ``model.get_logprobs(...)`` compute their steps with ddim_fast, on this
    object only.

    Args:
        model: a ``VPGDiffusion`` or ``PPODiffusion`` with a fixed eta, or with DDPM's steps.

    Returns:
        The object itself.

    Raises:
        TypeError: it is something else.
        ValueError: a setting of it has no such steps.
    """
    if missing := [name for name in _NEEDED if not hasattr(model, name)]:
        refuse("the model must be DPPO's VPGDiffusion", type(model), f"it lacks {', '.join(missing)}", TypeError)
    _Steps.of(model)
    for name, function in _METHODS.items():
        if hasattr(type(model), name):
            setattr(model, name, partial(function, model))
    return model


def use_original_steps(model: Any) -> Any:
    """Undo ``use_fast_steps``; return the object itself."""
    for name in _METHODS:
        vars(model).pop(name, None)
    return model


__all__ = ["Chain", "get_logprobs", "get_logprobs_subsample", "sample_chain", "use_fast_steps", "use_original_steps"]
