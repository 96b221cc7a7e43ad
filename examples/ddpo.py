"""Train the shipped model to draw what a reward asks for: DDPO (arXiv 2305.13301) on rollouts.

    python examples/ddpo.py --want "Ankle boot" --minutes 4 --seeds 0 1 2 --out runs/ddpo

The model draws clothes of all ten classes when it is told none. The reward of a picture is the
probability that the shipped classifier gives to one class, so what is learned is to draw that class
unasked. Weights of the linear layers get low-rank additions (LoRA, arXiv 2106.09685); the others
stay as they are. Each iteration draws one batch, with noise in the first steps alone, and takes one
step of gradient ascent for each half of it. No step of it needs a GPU.

For each seed ``OUT/SEED.json`` has the reward of every iteration, and that of held-out pictures
before and after; ``OUT/SEED-before.png`` and ``OUT/SEED-after.png`` show some of them, and
``OUT/reward.png`` the rewards of all seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm.auto import tqdm

import ddim_fast as df
from ddim_fast.models import ShippedModel, load_shipped_model
from ddim_fast.models.metrics import load_classifier
from ddim_fast.utils.pictures import grid

Reward = Callable[[Tensor], Tensor]
ETA = (1.0,) * 5 + (0.0,) * 5
"""Of each step. The class of a picture is settled in the first ones. The others are deterministic,
and cost no training."""
CLIP = 1e-4
"""How far a ratio of mean densities may leave 1 before its gradient is cut off: that of DDPO."""
HELD_OUT = 1_000_000
"""The seeds of held-out pictures begin here; those of training are below."""


class Mean(NamedTuple):
    """A mean with its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Tensor) -> Mean:
        return cls(values.mean().item(), values.std().item() / math.sqrt(len(values)))


class LowRank(nn.Module):
    """A weight plus a matrix of low rank, 0 at first."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        rows, columns = weight.shape
        self.down = nn.Parameter(torch.randn(rank, columns) / math.sqrt(columns))
        self.up = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def add_low_rank(model: nn.Module, rank: int) -> list[nn.Parameter]:
    """Give each linear layer a low-rank addition; return what is trained."""
    added = []
    for layer in [module for module in model.modules() if isinstance(module, nn.Linear)]:
        addition = LowRank(layer.weight, rank)
        parametrize.register_parametrization(layer, "weight", addition)
        added += list(addition.parameters())
    return added


def probability_of(class_name: str, model: ShippedModel) -> Reward:
    """Return the reward of pictures ``(B, 1, 28, 28)``, ``(B,)`` in [0, 1]."""
    if class_name not in model.class_names:
        raise SystemExit(f"--want must be one of {', '.join(model.class_names)}, got {class_name!r}")
    classifier, index = load_classifier(), model.class_names.index(class_name)
    return lambda pictures: classifier(pictures).softmax(1)[:, index]


def draw(sampler: df.DDIMSampler, model: ShippedModel, count: int) -> Tensor:
    """Return held-out pictures ``(count, 1, 28, 28)``, the same noise each time."""
    seeds = torch.arange(HELD_OUT, HELD_OUT + count)
    return torch.cat([sampler.sample(model, (len(part), *model.sample_shape), seeds=part) for part in seeds.split(100)])


def update(rollout: df.Rollout, model: nn.Module, advantages: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take one step of gradient ascent on the clipped objective of PPO (arXiv 1707.06347)."""
    optimizer.zero_grad()
    for i, old in enumerate(rollout.log_probs):
        ratio = torch.exp(rollout.log_prob(model, i) - old)
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        objective = torch.minimum(ratio * advantages, clipped * advantages).mean()
        (-objective).backward()  # one step at a time: memory for one graph
    optimizer.step()


def train(reward: Reward, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train for ``args.minutes`` of processor time; return the rewards, and write pictures of before and after."""
    torch.manual_seed(seed)
    model = load_shipped_model("fashion")
    sampler = df.DDIMSampler(model.schedule, len(ETA), eta=ETA)
    before = draw(sampler, model, args.held_out)
    optimizer = torch.optim.Adam(add_low_rank(model, args.rank), lr=args.lr)
    rewards: list[Mean] = []
    started = time.process_time()
    with tqdm(total=round(60 * args.minutes), unit="s", desc=f"seed {seed}", disable=args.quiet) as bar:
        while (seconds := time.process_time() - started) < 60 * args.minutes and len(rewards) != args.iterations:
            bar.update(round(seconds) - bar.n)
            seeds = torch.randint(HELD_OUT, (args.batch_size,))
            rollout = sampler.rollout(model, (args.batch_size, *model.sample_shape), seeds=seeds)
            with torch.no_grad():
                found = reward(rollout.samples)
            advantages = (found - found.mean()) / (found.std() + 1e-4)
            for half in torch.arange(args.batch_size).chunk(2):
                part = slice(int(half[0]), int(half[-1]) + 1)
                update(rollout.select(part), model, advantages[part], optimizer)
            rewards.append(Mean.of(found))
            bar.set_postfix(reward=f"{rewards[-1].value:.2f}")
    after = draw(sampler, model, args.held_out)
    for name, pictures in (("before", before), ("after", after)):
        grid(pictures[:40], columns=10).save(args.out / f"{seed}-{name}.png")
    with torch.no_grad():
        held_out = {"before": Mean.of(reward(before)), "after": Mean.of(reward(after))}
    return {"minutes": (time.process_time() - started) / 60, "rewards": rewards, **held_out}


def plot(runs: dict[int, dict[str, Any]], want: str, path: Path) -> None:
    """Draw the reward of each iteration, with the untrained model's as a band of two standard errors."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=150)
    for seed, run in runs.items():
        means, errors = (torch.tensor(column) for column in zip(*run["rewards"], strict=True))
        iterations = torch.arange(1, len(means) + 1)
        (line,) = axes.plot(iterations, means, label=f"seed {seed}")
        axes.fill_between(iterations, means - 2 * errors, means + 2 * errors, color=line.get_color(), alpha=0.15, lw=0)
    value, error = next(iter(runs.values()))["before"]
    axes.axhspan(value - 2 * error, value + 2 * error, color="0.5", alpha=0.5, label="untrained")
    axes.set(xlabel="iterations", ylabel=f'mean probability of "{want}"', ylim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> dict[int, dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--want", default="Ankle boot", help="the class that is rewarded")
    parser.add_argument("--minutes", type=float, default=4.0, help="processor time of each seed")
    parser.add_argument("--iterations", type=int, default=0, help="stop earlier, after so many (0: by time alone)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=500, help="pictures that are judged before and after")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    args.iterations = args.iterations or -1
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    reward, runs = probability_of(args.want, load_shipped_model("fashion")), {}
    for seed in args.seeds:
        runs[seed] = train(reward, seed, args)
        (args.out / f"{seed}.json").write_text(json.dumps(runs[seed]) + "\n")
        (before, e0), (after, e1) = runs[seed]["before"], runs[seed]["after"]
        print(
            f"seed {seed}: reward of held-out pictures {before:.3f} +- {e0:.3f} -> {after:.3f} +- {e1:.3f}, "
            f"{len(runs[seed]['rewards'])} iterations, {runs[seed]['minutes']:.1f} minutes"
        )
    plot(runs, args.want, args.out / "reward.png")
    return runs


if __name__ == "__main__":
    main()
