"""The examples of docs/MODELS.md run as written, with a tiny random model of each family, and draw the original's pictures."""

import atexit
import re
import shutil
import tempfile
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_pipelines
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from monai.inferers import DiffusionInferer
from monai.networks.nets import DiffusionModelUNet
from monai.networks.schedulers import DDIMScheduler
from page_examples import DOCS, examples
from readers import networks

EXAMPLES = examples("MODELS.md")
DROPPED_IN = [example for example in EXAMPLES if "fast_scheduler(" in example.code]
ACTIONS = (2, 8, 6)


# --- What the page says that the reader has ---------------------------------------------------------------------------


def monai():
    network = DiffusionModelUNet(
        spatial_dims=2, in_channels=1, out_channels=1, num_res_blocks=1, channels=(8, 8), attention_levels=(False, True),
        norm_num_groups=4, num_head_channels=4,
    )  # fmt: skip
    for parameter in network.out.parameters():  # they are 0 in a new network
        torch.nn.init.normal_(parameter, std=0.3)
    return {"inferer": DiffusionInferer(DDIMScheduler()), "network": network}


class Policy:
    """What the page uses of a ``DiffusionPolicy``; tests/integrations/test_lerobot.py has the real one."""

    def __init__(self):
        self.diffusion = SimpleNamespace(noise_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
        self.network = torch.nn.Linear(ACTIONS[-1], ACTIONS[-1])

    @torch.no_grad()
    def select_action(self, batch):
        scheduler, sample = self.diffusion.noise_scheduler, torch.randn(len(batch["observation.state"]), *ACTIONS[1:])
        scheduler.set_timesteps(20)
        for t in scheduler.timesteps:
            sample = scheduler.step(self.network(sample).tanh(), t, sample).prev_sample
        return sample[:, 0]


def diffusion_policy():
    return {"policy": Policy(), "batch": {"observation.state": torch.zeros(ACTIONS[0], 3)}}


class FlowPolicy(torch.nn.Module):
    """Half of a flow policy: a step's velocity, from what was computed once."""

    def __init__(self):
        super().__init__()
        self.network = torch.nn.Linear(ACTIONS[-1] + 1, ACTIONS[-1])

    def denoise_step(self, prefix_pad_masks, past_key_values, x_t, timestep):
        assert timestep.shape == (len(x_t),)
        assert timestep.dtype == torch.float32
        times = timestep[:, None, None].expand(*x_t.shape[:2], 1)
        return self.network(torch.cat([x_t, times], dim=-1)).tanh() * prefix_pad_masks[..., None] + past_key_values


def flow_policy():
    model = FlowPolicy()
    given = {"masks": torch.ones(ACTIONS[:2]), "cache": torch.randn(1), "noise": torch.randn(ACTIONS), "model": model}
    upwards = lambda x_t, time: -model.denoise_step(given["masks"], given["cache"], x_t, 1 - time)  # noqa: E731
    return {**given, "upwards": upwards}


def latent_diffusion():
    return {
        "unet": lambda x, t: 0.3 * x * torch.cos(t / 500).view(-1, 1, 1, 1),
        "vae": AutoencoderKL(**tiny_pipelines.VAE, latent_channels=4).requires_grad_(False),
    }


def directory():
    where = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, where)
    tiny_pipelines.unconditional()[0].save_pretrained(where)
    return {"directory": where}


GIVEN = {f.__name__: f for f in (monai, diffusion_policy, flow_policy, latent_diffusion, directory)} | {"edm": networks}


def given(example):
    """What the reader has, by name; the same for each call."""
    torch.manual_seed(0)
    if not example.given or example.given in GIVEN:
        return GIVEN[example.given]() if example.given else {}
    pipeline, call = getattr(tiny_pipelines, example.given)()
    return {"pipe": pipeline, "call": call}


# --- The tests --------------------------------------------------------------------------------------------------------


def outcome(example):
    """What is left in the names after a run, from the same random state."""
    names = given(example)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' own, of its own defaults
        example.run(names)
    return names


def pictures(names):
    """Pictures or actions as an array; of pictures, black is 0 and white 1."""
    found = names.get("images", names.get("action"))
    if torch.is_tensor(found):
        return found.numpy()
    array = np.asarray([np.stack(video) for video in found] if isinstance(found[0], list) else np.stack(found))
    return array / 255 if array.dtype == np.uint8 else array


@pytest.mark.parametrize("example", DROPPED_IN, ids=lambda example: example.given)
def test_the_pictures_are_those_of_the_original_scheduler(example):
    without = example._replace(code=example.code.replace("fast_scheduler(", "unchanged("))
    without = without._replace(code=f"unchanged = lambda scheduler: scheduler\n{without.code}")
    expected, names = pictures(outcome(without)), outcome(example)
    owner = names.get("pipe") or names.get("inferer") or names["policy"].diffusion
    scheduler = getattr(owner, "scheduler", None) or owner.noise_scheduler
    assert type(scheduler).__module__.startswith("ddim_fast")
    assert np.ptp(expected) > 0.05, "these pictures must show something"
    assert np.abs(pictures(names) - expected).max() <= 1 / 255 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.given == "flow_policy"], ids=["downwards", "upwards"])
def test_the_actions_are_those_of_the_loop_of_lerobot(example):
    names = outcome(example)
    x_t, steps = names["noise"].double(), 10
    policy = names["model"].double()
    with torch.no_grad():
        for step in range(steps):
            time = torch.full(ACTIONS[:1], 1.0 - step / steps, dtype=torch.float32)
            x_t = x_t - policy.denoise_step(names["masks"], names["cache"], x_t, time) / steps
    exact = x_t
    # Each of ten steps rounds the model's output and the sum.
    assert (names["actions"] - exact).abs().max() <= 4 * steps * torch.finfo(torch.float32).eps * exact.abs().max()


@pytest.mark.parametrize(
    "example",
    [e for e in EXAMPLES if e.given in ("edm", "", "latent_diffusion", "directory")],
    ids=lambda example: example.given,
)
def test_the_others_run(example):
    found = outcome(example)["images"]
    assert found.isfinite().all()
    assert found.shape in [(4, 3, 16, 16), (4, 1, 28, 28), (2, 3, 16, 16)]


def test_no_example_is_left_out_and_every_family_of_the_table_has_one():
    assert len(DROPPED_IN) == 10
    assert len(EXAMPLES) == 19
    page = (DOCS / "MODELS.md").read_text()
    headings = {
        re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^## (.*)$", page, re.MULTILINE)
    }
    linked = set(re.findall(r"\]\(#([\w-]+)\)", page))
    assert linked == headings
