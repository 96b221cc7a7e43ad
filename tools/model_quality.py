"""Measure the numbers of docs/MODEL_CARD.md: samples, equally many per class, evaluated by the
shipped classifier.

python tools/model_quality.py --steps 20 --pictures 1000
"""

import click
import torch
from safetensors.torch import load_file
from tqdm.auto import tqdm

import ddim_fast as df
from ddim_fast.models import SHIPPED
from ddim_fast.models.metrics import class_agreement, classifier_frechet_distance


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--model", "name", type=click.Choice(list(SHIPPED)), default="fashion", show_default=True)
@click.option("--steps", multiple=True, type=int, default=(20, 50), show_default=True)
@click.option("--pictures", default=1000, show_default=True)
@click.option("--weights", type=click.Path(exists=True), help="A different weights file for the same network.")
def main(name: str, steps: tuple[int, ...], pictures: int, weights: str | None) -> None:
    model = df.load_model(name)
    if weights is not None:
        model.unet.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
    labels = torch.arange(pictures) % model.num_classes
    seeds = torch.from_numpy(df.sample_seeds(0, pictures))
    for count in steps:
        sampler = df.DDIMSampler(df.NoiseSchedule.linear(), count)
        parts = [slice(first, first + 50) for first in range(0, pictures, 50)]
        images = torch.cat(
            [
                sampler.sample(
                    model,
                    (len(labels[part]), *model.sample_shape),
                    seeds=seeds[part],
                    conditioning={"class_labels": labels[part]},
                )
                for part in tqdm(parts, desc=f"{count} steps")
            ]
        ).clamp(-1, 1)
        click.echo(
            f"{count} steps, {pictures} pictures: classifier Frechet distance {classifier_frechet_distance(images, name):.3f}, "
            f"class agreement {class_agreement(images, labels, name):.1%}"
        )
        of_class = [class_agreement(images[labels == k], labels[labels == k], name) for k in range(model.num_classes)]
        click.echo(
            "  " + ", ".join(f"{kind} {share:.0%}" for kind, share in zip(model.class_names, of_class, strict=True))
        )


if __name__ == "__main__":
    main()
