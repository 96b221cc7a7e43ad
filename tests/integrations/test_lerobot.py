"""The examples of docs/MODELS.md for robots' policies, with those of lerobot: run by ``make test-robotics``."""

from types import SimpleNamespace

import pytest
import torch
from page_examples import examples

from ddim_fast.integrations.diffusers import FastDDIMScheduler, FastDDPMScheduler

pytestmark = [
    pytest.mark.robotics,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),  # lerobot's, of its libraries
]
DIFFUSION_POLICY, FLOW_POLICY = (
    next(example for example in examples("MODELS.md") if example.given == name)
    for name in ("diffusion_policy", "flow_policy")
)


def diffusion_policy(kind, prediction_type):
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    torch.manual_seed(0)
    config = DiffusionConfig(
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (3,)),
            "observation.environment_state": PolicyFeature(FeatureType.ENV, (2,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (4,))},
        down_dims=(8, 16), n_groups=4, diffusion_step_embed_dim=16, device="cpu", num_inference_steps=10,
        noise_scheduler_type=kind, prediction_type=prediction_type,
    )  # fmt: skip
    return DiffusionPolicy(config).eval()


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
@pytest.mark.parametrize(("kind", "fast"), [("DDIM", FastDDIMScheduler), ("DDPM", FastDDPMScheduler)])
def test_a_diffusion_policy_acts_the_same(kind, fast, prediction_type):
    unchanged = DIFFUSION_POLICY._replace(code=DIFFUSION_POLICY.code.replace("= fast_scheduler(", "= ("))
    actions = []
    for example in (unchanged, DIFFUSION_POLICY):
        policy = diffusion_policy(kind, prediction_type)
        batch = {"observation.state": torch.ones(2, 3), "observation.environment_state": torch.zeros(2, 2)}
        torch.manual_seed(1)
        names = {"policy": policy, "batch": batch}
        example.run(names)
        actions.append(torch.stack([names["action"], *(policy.select_action(batch) for _ in range(7))]))
    assert type(policy.diffusion.noise_scheduler) is fast
    assert float(actions[0].std()) > 0.1, "these actions must do something"
    torch.testing.assert_close(actions[1], actions[0], rtol=0, atol=1e-4)


class FlowPolicy(torch.nn.Module):
    """What lerobot's ``sample_actions`` uses of a policy, but for the large network: it has a small one."""

    rtc_processor = None

    def __init__(self, num_steps):
        super().__init__()
        self.config = SimpleNamespace(
            num_steps=num_steps, num_inference_steps=num_steps, chunk_size=8, max_action_dim=6, use_cache=True
        )
        self.network = torch.nn.Linear(7, 6)
        language_model = SimpleNamespace(config=SimpleNamespace())
        forward = lambda **computed_once: (None, "cache")  # noqa: E731
        self.vlm_with_expert = SimpleNamespace(forward=forward)
        self.paligemma_with_expert = SimpleNamespace(
            forward=forward, paligemma=SimpleNamespace(language_model=language_model)
        )

    def embed_prefix(self, images, image_masks, tokens, masks, state=None):
        return torch.zeros(2, 3, 6), torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.bool)

    def _prepare_attention_masks_4d(self, masks):
        return masks

    def _rtc_enabled(self):
        return False

    def denoise_step(self, prefix_pad_masks, past_key_values, x_t, timestep, state=None):
        assert past_key_values == "cache"
        assert (timestep.shape, timestep.dtype) == ((len(x_t),), torch.float32)
        return self.network(torch.cat([x_t, timestep[:, None, None].expand(*x_t.shape[:2], 1)], dim=-1)).tanh()


def loops_of_lerobot():
    from lerobot.policies.pi0.modeling_pi0 import PI0Pytorch
    from lerobot.policies.smolvla.modeling_smolvla import VLAFlowMatching

    return {"pi0": PI0Pytorch.sample_actions, "smolvla": VLAFlowMatching.sample_actions}


@pytest.mark.parametrize("name", ["pi0", "smolvla"])
def test_a_flow_policy_acts_the_same(name):
    torch.manual_seed(0)
    policy, noise = FlowPolicy(10), torch.randn(2, 8, 6)
    with torch.no_grad():
        loop = loops_of_lerobot()[name]
        expected = loop(policy, None, None, None, None, torch.zeros(2, 6), noise=noise)
    names = {"model": policy, "masks": torch.ones(2, 3), "cache": "cache", "noise": noise}
    FLOW_POLICY.run(names)
    assert float((expected - noise).abs().max()) > 0.1
    # Ten steps, in each of which both round the sum, and pass what they rounded to the model.
    atol = 10 * 4 * torch.finfo(torch.float32).eps * float(noise.abs().max())
    torch.testing.assert_close(names["actions"], expected, rtol=0, atol=atol)
