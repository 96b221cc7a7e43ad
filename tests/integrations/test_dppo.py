"""DPPO's chains and log-probabilities: the original's formulas in float64, its draws, gradients and types."""

import copy
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from ddim_fast.integrations.dppo import get_logprobs, use_fast_steps, use_original_steps
from ddim_fast.verify.truth.tolerances import SCALED_EPS, SUM_ROUNDINGS

F = torch.float32
EPS = torch.finfo(F).eps
COND = {"state": torch.linspace(-1, 1, 15).reshape(3, 1, 5)}


class Actor(nn.Module):
    """A small network of the actions, the timestep and the observation."""

    def __init__(self, seed, dim):
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(dim + 6, dim)
        self.calls = 0

    def forward(self, x, t, cond):
        self.calls += 1
        state = cond["state"][:, 0].to(x).unsqueeze(1).expand(len(x), x.shape[1], 5)
        time = (t.to(x) / 20).reshape(-1, 1, 1).expand(len(x), x.shape[1], 1)
        return self.layer(torch.cat([x, state, time], dim=-1))


class Eta(nn.Module):
    """One number for each sample, or several, or a learned one."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def forward(self, cond):
        return self.values.to(torch.float32).expand(len(cond["state"]), -1)


class Original(nn.Module):
    """What the original computes, restated with torch's operations in the dtype of ``alphas_cumprod``."""

    def __init__(self, use_ddim=False, clip=1.0, eta=1.0, tuned=4, steps=20, ddim_steps=5, horizon=4, dim=3, **changes):
        super().__init__()
        self.use_ddim, self.predict_epsilon, self.denoised_clip_value = use_ddim, True, clip
        self.ft_denoising_steps, self.horizon_steps, self.action_dim = tuned, horizon, dim
        self.randn_clip_value, self.eps_clip_value, self.final_action_clip_value = 3.0, None, 1.0
        self.min_sampling_denoising_std, self.min_logprob_denoising_std = 0.1, 0.15
        self.actor, self.actor_ft = Actor(0, dim), Actor(1, dim)
        self.eta = Eta(torch.tensor([eta]))
        f = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        self.betas = torch.from_numpy(np.clip(1 - f[1:] / f[:-1], 0, 0.999)).float()
        self.alphas_cumprod = (1 - self.betas).cumprod(0)
        self.alphas_cumprod_prev = torch.cat([torch.ones(1), self.alphas_cumprod[:-1]])
        if use_ddim:
            visited = torch.arange(ddim_steps) * (steps // ddim_steps)
            self.ddim_t, self.ddim_alphas = visited.flip(0), self.alphas_cumprod[visited].flip(0)
            self.ddim_alphas_prev = torch.cat([torch.ones(1), self.alphas_cumprod[visited[:-1]]]).flip(0)
        vars(self).update(changes)

    def get_min_sampling_denoising_std(self):
        return self.min_sampling_denoising_std

    @property
    def levels(self):
        """The timesteps and the levels of each step, from the noisiest."""
        if self.use_ddim:
            return self.ddim_t, self.ddim_alphas, self.ddim_alphas_prev
        count = len(self.alphas_cumprod)
        return torch.arange(count).flip(0), self.alphas_cumprod.flip(0), self.alphas_cumprod_prev.flip(0)

    def gaussian(self, x, index, cond, deterministic=False, base=False, dtype=torch.float32):
        """Mean and own standard deviation at the indices of steps; the fine-tuned ones by another network."""
        timesteps, bars, before = self.levels
        tuned = index >= len(timesteps) - self.ft_denoising_steps
        m = self.actor(x, timesteps[index], cond).to(dtype)
        if not base:
            of_ft = self.actor_ft(x, timesteps[index], cond).to(dtype)
            m = torch.where(tuned.reshape(-1, 1, 1), of_ft, m)
        a, p = (levels.to(dtype)[index].reshape(-1, 1, 1) for levels in (bars, before))
        x = x.to(dtype)
        x0 = (x - (1 - a).sqrt() * m) / a.sqrt() if self.predict_epsilon else m
        if self.denoised_clip_value is not None:
            x0 = x0.clamp(-self.denoised_clip_value, self.denoised_clip_value)
            m = (x - a.sqrt() * x0) / (1 - a).sqrt()
        size = (p.sqrt() + (1 - p).sqrt()) * ((x.abs() + m.abs()) / a.sqrt() + m.abs())
        self.terms = size.detach()  # at least the magnitudes of the terms of the mean
        if self.use_ddim:
            eta = 0.0 if deterministic else self.eta(cond).to(dtype).unsqueeze(1)
            std = (eta * ((1 - p) / (1 - a) * (1 - a / p)).sqrt()).expand(len(x), 1, 1)
            return p.sqrt() * x0 + (1 - p - std**2).clamp(min=0).sqrt() * m, std
        beta = 1 - a / p
        mean = beta * p.sqrt() / (1 - a) * x0 + (1 - beta).sqrt() * (1 - p) / (1 - a) * x
        return mean, (beta * (1 - p) / (1 - a)).sqrt()

    @torch.no_grad()
    def forward(self, cond, deterministic=False, return_chain=True, use_base_policy=False):
        count = len(self.levels[0])
        x = torch.randn(len(cond["state"]), self.horizon_steps, self.action_dim)
        chain = [x] if self.ft_denoising_steps == count else []
        for i in range(count):
            index = torch.full((len(x),), i)
            mean, std = self.gaussian(x, index, cond, deterministic, use_base_policy)
            if deterministic and (self.use_ddim or i == count - 1):
                std = torch.zeros_like(std)
            else:
                std = std.clamp(min=1e-3 if deterministic else self.min_sampling_denoising_std)
            x = mean + std * torch.randn_like(x).clamp(-self.randn_clip_value, self.randn_clip_value)
            if i == count - 1 and self.final_action_clip_value is not None:
                x = x.clamp(-self.final_action_clip_value, self.final_action_clip_value)
            if i >= count - self.ft_denoising_steps - 1:
                chain.append(x)
        return SimpleNamespace(trajectories=x, chains=torch.stack(chain, 1) if return_chain else None)

    def density(self, x_t, x_prev, index, cond, base=False, dtype=torch.float32):
        mean, std = self.gaussian(x_t, index, cond, base=base, dtype=dtype)
        std = std.clamp(min=self.min_logprob_denoising_std)
        with torch.no_grad():
            deviation = (x_prev - mean).abs()
            off = SCALED_EPS[F] * EPS * self.terms + EPS * deviation
            squares = deviation**2 / (2 * std**2)
            self.allowed = (2 * deviation * off + off**2) / (2 * std**2)
            self.allowed = self.allowed + SUM_ROUNDINGS * EPS * (squares + std.log().abs() + 1)
        return torch.distributions.Normal(mean, std).log_prob(x_prev.to(dtype))

    def get_logprobs(self, cond, chains, get_ent=False, use_base_policy=False, dtype=torch.float32):
        k, count = self.ft_denoising_steps, len(self.levels[0])
        cond = {name: value.repeat_interleave(k, 0) for name, value in cond.items()}
        index = torch.arange(count - k, count).repeat(len(chains))
        x_t, x_prev = chains[:, :-1].flatten(0, 1), chains[:, 1:].flatten(0, 1)
        found = self.density(x_t, x_prev, index, cond, use_base_policy, dtype)
        return (found, self.eta(cond).unsqueeze(1) if self.use_ddim else torch.ones_like(found)) if get_ent else found

    def get_logprobs_subsample(
        self, cond, chains_prev, chains_next, denoising_inds, get_ent=False, use_base_policy=False
    ):
        index = denoising_inds + len(self.levels[0]) - self.ft_denoising_steps
        found = self.density(chains_prev, chains_next, index, cond, use_base_policy)
        return (found, self.eta(cond).unsqueeze(1) if self.use_ddim else torch.ones_like(found)) if get_ent else found


def pair(**options):
    """The original, and a copy with fast steps."""
    original = Original(**options)
    return original, use_fast_steps(copy.deepcopy(original))


cases = {
    "use_ddim": st.booleans(),
    "clip": st.sampled_from([1.0, None, 0.5]),
    "tuned": st.sampled_from([5, 4, 1]),
    "eta": st.sampled_from([1.0, 0.5]),
    "deterministic": st.booleans(),
    "base": st.booleans(),
    "all_steps": st.booleans(),
    "seed": st.integers(0, 2**20),
}


@given(options=st.fixed_dictionaries(cases))
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
def test_chains_and_log_probabilities_are_those_of_the_original(options):
    tuned = options["tuned"]
    if options["all_steps"]:
        tuned = 5 if options["use_ddim"] else 20
    original, fast = pair(use_ddim=options["use_ddim"], clip=options["clip"], tuned=tuned, eta=options["eta"])
    chains = []
    for model in (original, fast):
        torch.manual_seed(options["seed"])
        found = model(COND, deterministic=options["deterministic"], use_base_policy=options["base"])
        chains.append((found.trajectories, found.chains, torch.get_rng_state()))
    for theirs, ours in zip(*chains, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    given_chains = chains[0][1]
    assert given_chains.shape == (3, tuned + 1, 4, 3)
    call = {"get_ent": True, "use_base_policy": options["base"]}
    ours, eta = fast.get_logprobs(COND, given_chains, **call)
    exact, eta_there = original.get_logprobs(COND, given_chains, dtype=torch.float64, **call)
    assert ours.dtype == torch.float32
    assert torch.equal(eta, eta_there)
    assert ((ours.double() - exact).abs() <= original.allowed).all()
    again = fast.get_logprobs(COND, given_chains, use_base_policy=options["base"])
    assert torch.equal(again, ours)  # ratios of exactly 1


@pytest.mark.parametrize("use_ddim", [False, True])
def test_gradients_are_those_of_the_originals_formulas(use_ddim):
    original, fast = pair(use_ddim=use_ddim)
    torch.manual_seed(0)
    chains = original(COND).chains
    for model, dtype in ((original, {"dtype": torch.float64}), (fast, {})):
        model.get_logprobs(COND, chains, **dtype).clamp(-5, 2).mean().backward()
    for theirs, ours in zip(original.actor_ft.parameters(), fast.actor_ft.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5 * float(theirs.grad.abs().max()))
    assert all(parameter.grad is None for parameter in fast.actor.parameters())


@pytest.mark.parametrize("use_ddim", [False, True])
def test_single_steps_in_any_order(use_ddim):
    original, fast = pair(use_ddim=use_ddim)
    torch.manual_seed(0)
    x_t, x_prev = torch.randn(2, 6, 4, 3)
    inds = torch.tensor([3, 0, 3, 1, 0, 2])
    cond = {"state": torch.randn(6, 1, 5)}
    theirs, eta_there = original.get_logprobs_subsample(cond, x_t, x_prev, inds, get_ent=True)
    ours, eta = fast.get_logprobs_subsample(cond, x_t, x_prev, inds, get_ent=True)
    assert ((ours - theirs).abs() <= 2 * original.allowed).all()
    assert torch.equal(eta, eta_there)
    none = fast.get_logprobs_subsample({"state": cond["state"][:0]}, x_t[:0], x_prev[:0], inds[:0])
    assert none.shape == (0, 4, 3)


def test_one_network_is_called_for_each_step():
    _, fast = pair(use_ddim=True)
    fast(COND)
    assert (fast.actor.calls, fast.actor_ft.calls) == (1, 4)
    fast.get_logprobs(COND, torch.zeros(3, 5, 4, 3))
    assert (fast.actor.calls, fast.actor_ft.calls) == (1, 5)


def test_a_copy_is_bound_to_itself_and_the_original_comes_back():
    original, fast = pair()
    again = copy.deepcopy(fast)
    with torch.no_grad():
        again.actor_ft.layer.weight.zero_()
    chains = torch.zeros(3, 5, 4, 3)
    assert not torch.equal(again.get_logprobs(COND, chains), fast.get_logprobs(COND, chains))
    assert set(fast.state_dict()) == set(original.state_dict())
    assert use_original_steps(fast).get_logprobs.__func__ is Original.get_logprobs


REFUSED = {
    "bound of eps": ({"use_ddim": True, "eps_clip_value": 2.0}, ["eps_clip_value", "got 2.0"]),
    "several etas": (
        {"use_ddim": True, "eta": Eta(torch.tensor([0.5, 1.0, 0.7]))},
        ["eta must be one number", "EtaFixed"],
    ),
    "learned eta": ({"use_ddim": True, "eta": Eta(nn.Parameter(torch.tensor([0.5])))}, ["learn_eta=False"]),
    "no least std": (
        {"min_logprob_denoising_std": 0.0},
        ["min_logprob_denoising_std must be a finite number, above 0"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_refused(name):
    changes, parts = REFUSED[name]
    changes = dict(changes)
    eta = changes.pop("eta", None)
    model = Original(**changes)
    if eta is not None:
        model.eta = eta
    with pytest.raises(ValueError, match=re.escape(parts[0])) as error:
        use_fast_steps(model).get_logprobs(COND, torch.zeros(3, 5, 4, 3))
    assert all(part in str(error.value) for part in parts)


def test_shapes_and_objects_are_checked():
    _, fast = pair()
    with pytest.raises(ValueError, match=r"chains must have the shape \(B, 5, 4, 3\), got \(3, 6, 4, 3\)"):
        get_logprobs(fast, COND, torch.zeros(3, 6, 4, 3))
    with pytest.raises(ValueError, match="denoising_inds must be one for each of the 3 steps, from 0 to 3"):
        fast.get_logprobs_subsample(COND, *torch.zeros(2, 3, 4, 3), torch.tensor([0, 4, 1]))
    with pytest.raises(TypeError, match="VPGDiffusion"):
        use_fast_steps(nn.Linear(1, 1))
