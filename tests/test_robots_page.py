"""The examples of docs/ROBOTS.md run as written, with tiny random policies and a stand-in for graphs, and act as without graphs."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from page_examples import examples
from torch import nn

import ddim_fast as df
from ddim_fast.gpu_lab import Replay
from ddim_fast.sampling.capture import GraphCache

LOOP, FLOW, OWN_LOOP = examples("ROBOTS.md")


class Network(nn.Module):
    """As lerobot's ``DiffusionConditionalUnet1d`` is called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4 + 5 + 1, 16), nn.Mish(), nn.Linear(16, 4))
        self.requires_grad_(False)

    def forward(self, x, timestep, global_cond=None):
        told = torch.cat([global_cond, timestep[:, None] / 100], dim=-1)[:, None].expand(-1, x.shape[1], -1)
        return self.layers(torch.cat([x, told], dim=-1))


class FlowPolicy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Linear(6 + 1, 6).requires_grad_(False)

    def denoise_step(self, prefix_pad_masks, past_key_values, x_t, timestep):
        y = self.network(torch.cat([x_t, timestep[:, None, None].expand(*x_t.shape[:2], 1)], dim=-1))
        for keys, values in past_key_values:
            y = y + torch.softmax(y @ keys.mT, dim=-1) @ (values * prefix_pad_masks[..., None])
        return y.tanh()


BATCHES = [torch.full((1, 5), value) for value in (0.1, -0.7, 1.3)]


def graphs():
    return GraphCache(backend=lambda device: Replay(), device_types=("cpu",))


def diffusion_policy():
    unet = Network()

    def select_action(batch):
        sample = torch.zeros(1, 16, 4)
        for t in (30, 20, 10):
            sample = sample - 0.1 * unet(sample, torch.tensor([t]), global_cond=batch)
        return sample[:, 0]

    policy = SimpleNamespace(diffusion=SimpleNamespace(unet=unet), select_action=torch.no_grad()(select_action))
    return {"policy": policy, "observe": lambda batch: batch * 2}


def encode(batch):
    generator = torch.Generator().manual_seed(0)
    layers = [tuple(batch.mean() + torch.randn(1, 3, 6, generator=generator) for _ in range(2)) for _ in range(2)]
    return {"masks": torch.ones(1, 3), "layers": layers}


def flow_policy():
    return {"model": FlowPolicy(), "encode": encode}


GIVEN = {"diffusion_policy": diffusion_policy, "flow_policy": flow_policy}


def outcome(example, **more):
    names = {
        **GIVEN[example.given](),
        "graphs": graphs(),
        "device": "cpu",
        "batch": BATCHES[0],
        "batches": BATCHES,
        **more,
    }
    example.run(names)
    return names


def test_the_loop_of_a_diffusion_policy_is_one_graph_with_the_actions_of_each_observation():
    for n, batch in enumerate(BATCHES):
        names = outcome(LOOP, batches=BATCHES[: n + 1])
        s, unet = names["sampler"], names["policy"].diffusion.unet
        expected = s.sample(
            unet, (1, 16, 4), seed=n, conditioning={"global_cond": names["observe"](batch)}, capture="off"
        )
        assert torch.equal(names["actions"], expected)
        assert float(expected.std()) > 0.1, "these actions must do something"
    other = s.sample(
        unet, (1, 16, 4), seed=n, conditioning={"global_cond": names["observe"](BATCHES[0])}, capture="off"
    )
    assert not torch.equal(names["actions"], other)


def test_the_loop_of_a_flow_policy_follows_keys_and_values():
    for n, batch in enumerate(BATCHES):
        names = outcome(FLOW, batches=BATCHES[: n + 1])
        expected = names["sampler"].sample(
            names["velocity"], (1, 8, 6), seed=n, conditioning=encode(batch), capture="off"
        )
        assert torch.equal(names["actions"], expected)
    other = names["sampler"].sample(
        names["velocity"], (1, 8, 6), seed=n, conditioning=encode(BATCHES[0]), capture="off"
    )
    assert not torch.equal(expected, other)
    with pytest.raises(RuntimeError, match="until it is closed"):
        names["loop"].sample(seed=0)


def test_what_a_function_closes_over_would_be_stale():
    """Which is why the page makes it conditioning."""
    model, held = FlowPolicy(), {"layers": encode(BATCHES[0])}
    s = df.DDIMSampler(df.FlowSchedule(), 10, graphs=graphs())

    def velocity(x_t, time):
        kept = held["layers"]
        return model.denoise_step(kept["masks"], kept["layers"], x_t, time)

    first = held["layers"]
    with s.capture(velocity, (1, 8, 6), capture="loop") as loop:
        before = loop.sample(seed=0)
        held["layers"] = encode(BATCHES[1])
        assert torch.equal(loop.sample(seed=0), before)
        assert not torch.equal(s.sample(velocity, (1, 8, 6), seed=0, capture="off"), before)
    assert first


def test_the_network_alone_is_a_graph_in_the_policys_own_loop():
    names = outcome(OWN_LOOP)
    policy = names["policy"]
    assert torch.equal(names["action"], policy.select_action(BATCHES[0]))
    assert names["graphs"].stats().misses == 1
    assert "forward" not in vars(policy.diffusion.unet)


def test_the_schedule_is_that_of_the_policys_scheduler():
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(100, beta_schedule="squaredcos_cap_v2").alphas_cumprod
    ours = torch.tensor(df.NoiseSchedule.cosine(100).alphas_cumprod, dtype=torch.float64)
    assert torch.allclose(theirs.double(), ours, rtol=0, atol=100 * torch.finfo(torch.float32).eps)
    assert list(inspect.signature(Network.forward).parameters) == ["self", "x", "timestep", "global_cond"]
