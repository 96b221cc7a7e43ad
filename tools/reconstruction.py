"""Measure table 2 of the DDIM paper (reconstruction error) for the shipped model, as in
docs/INVERSION.md.

python tools/reconstruction.py --steps 50 --images 32
"""

import json
import sys
from pathlib import Path

import click
import torch
from tqdm.auto import tqdm

import ddim_fast as df
from ddim_fast.sampling.inversion import reconstruct, reconstruction_error

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
from fashion import DEFAULT_DIRECTORY, load_split

BATCH = 32
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def measure(model, x0, labels, steps: int, iterations: int, bar) -> dict:
    """Return the mean and maximum error of images encoded and decoded in ``steps`` steps each."""
    sampler = df.DDIMSampler(model.schedule, steps)
    errors = []
    for x, y in zip(x0.split(BATCH), labels.split(BATCH), strict=True):
        again = reconstruct(sampler, model, x, iterations=iterations, conditioning={"class_labels": y})
        errors.append(reconstruction_error(x, again))
        bar.update(len(x) * steps * (iterations + 1))
    error = torch.cat(errors)
    return {
        "steps": steps,
        "iterations": iterations,
        "images": len(x0),
        "mean": error.mean().item(),
        "max": error.max().item(),
    }


def table(results: list[dict]) -> str:
    """Return a Markdown table: rows by number of iterations, columns by number of steps."""
    found = {(r["iterations"], r["steps"]): r["mean"] for r in results}
    rows, columns = (list(dict.fromkeys(key[i] for key in found)) for i in (0, 1))
    lines = [["iterations", *(f"S = {steps}" for steps in columns)], ["---"] * (len(columns) + 1)]
    lines += [[str(k), *(f"{found[k, steps]:.1e}" for steps in columns)] for k in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--steps", multiple=True, type=int, default=(10, 20, 50, 100, 200, 500, 1000), show_default=True)
@click.option("--iterations", multiple=True, type=int, default=(1, 5), show_default=True, help="1: plain inversion.")
@click.option("--images", default=64, show_default=True, help="Number of test images, starting from the first.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True)
@click.option("--data", type=click.Path(path_type=Path), default=DEFAULT_DIRECTORY, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the results to this file, as JSON.")
def main(
    steps: tuple[int, ...],
    iterations: tuple[int, ...],
    images: int,
    dtype: str,
    data: Path,
    json_file: Path | None,
) -> None:
    model = df.load_model("fashion", dtype=DTYPES[dtype])
    x0, labels = (part[:images] for part in load_split("test", data))
    x0 = x0.to(DTYPES[dtype])
    total = len(x0) * sum(steps) * sum(k + 1 for k in iterations)
    with tqdm(total=total, unit="evaluation", smoothing=0.02) as bar:
        results = [measure(model, x0, labels, s, k, bar) for k in iterations for s in steps]
    click.echo(f"Mean squared error per dimension, pictures scaled to [0, 1]; {len(x0)} test pictures, {dtype}.\n")
    click.echo(table(results))
    if json_file is not None:
        json_file.write_text(json.dumps({"dtype": dtype, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
