"""Measure what a fitted solver does where it was not fitted: with other noise, guidance and classes.

    python tools/solver_transfer.py fashion docs/transfer.json
    python tools/tradeoff_tables.py write

Each number is the distance to converged samples (root mean square, mean over samples) from the same
noise, with its standard error. A test checks that docs/TRADEOFF.md has the table of the file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from tqdm.auto import tqdm

import ddim_fast as df
from ddim_fast.models.metrics import sample_distances

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
SEED, COUNT, BATCH, CONVERGED = 4242, 128, 64, 200


@dataclass(frozen=True)
class Setting:
    """How samples are drawn: x_T times ``scale``, with ``guidance``, of all classes in turn or of none."""

    title: str
    scale: float = 1.0
    guidance: float | None = None
    labelled: bool = True


SETTINGS = (
    Setting("as fitted, other noise"),
    Setting("x_T times 0.9", scale=0.9),
    Setting("x_T times 1.1", scale=1.1),
    Setting("without labels", labelled=False),
    Setting("guidance 1.5", guidance=1.5),
    Setting("guidance 2", guidance=2.0),
    Setting("guidance 4", guidance=4.0),
)


@dataclass
class Judge:
    """Draws samples of one model in one setting."""

    model: Any
    setting: Setting
    progress: tqdm
    converged: Tensor = field(init=False)

    def __post_init__(self) -> None:
        many = self.sampler(num_inference_steps=CONVERGED, order=2, timestep_spacing="log_snr")
        self.converged = self.draw(many)

    def sampler(self, **steps: Any) -> df.DDIMSampler:
        return df.DDIMSampler(self.model.schedule, clip_sample=False, **steps)

    @property
    def labels(self) -> Tensor:
        return torch.arange(COUNT) % self.model.num_classes

    def draw(self, sampler: df.DDIMSampler) -> Tensor:
        x_T = torch.randn(COUNT, *self.model.sample_shape, generator=torch.Generator().manual_seed(SEED))
        parts = []
        for first in range(0, COUNT, BATCH):
            part = slice(first, first + BATCH)
            labels = {"class_labels": self.labels[part]} if self.setting.labelled else {}
            parts.append(
                sampler.sample(
                    self.model,
                    x_T=x_T[part] * self.setting.scale,
                    conditioning=labels,
                    guidance_scale=self.setting.guidance,
                )
            )
            self.progress.update()
        return torch.cat(parts)

    def distances(self, sampler: df.DDIMSampler) -> Tensor:
        return sample_distances(self.draw(sampler), self.converged)


def measure_of(distances: Tensor) -> dict[str, float]:
    return {"value": distances.mean().item(), "error": (distances.std() / len(distances) ** 0.5).item()}


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("name")
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
def main(name: str, out: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    model = df.load_model(name)
    solvers = {
        "DDIM, 50 steps": {"num_inference_steps": 50},
        "DDIM, 8 steps": {"num_inference_steps": 8},
        "order 2, 8 steps": {"num_inference_steps": 8, "order": 2, "timestep_spacing": "log_snr"},
        "fitted, 8 steps": {"timesteps": EXAMPLES / f"{name}-8.json"},
    }
    guided = EXAMPLES / f"{name}-8-guidance-2.json"
    if guided.exists():
        solvers["fitted with guidance 2, 8 steps"] = {"timesteps": guided}
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(SETTINGS) * (len(solvers) + 1) * -(-COUNT // BATCH), unit="batch") as progress:
        for setting in SETTINGS:
            judge = Judge(model, setting, progress)
            found = {title: judge.distances(judge.sampler(**steps)) for title, steps in solvers.items()}
            rows.append({"setting": setting.title, **{title: measure_of(values) for title, values in found.items()}})
            if setting is SETTINGS[0]:
                rows += [
                    {
                        "setting": f"class {model.class_names[label]} alone",
                        **{title: measure_of(values[judge.labels == label]) for title, values in found.items()},
                    }
                    for label in range(model.num_classes)
                ]
    found = {"model": name, "count": COUNT, "seed": SEED, "solvers": list(solvers), "rows": rows}
    out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
