"""Train the classifier of a shipped model's data, and compute the training set's feature
statistics.

    python training/train_classifier.py fashion --out runs/classifier
    python training/train_classifier.py scenes --data scenes.npz --out runs/scenes_classifier

Writes a checkpoint after each epoch. A restarted run resumes from it, with the same result as an
uninterrupted one, since each epoch has its own seed. At the end, the averaged weights are written
to ``--weights`` in float16, and the statistics are computed with the stored weights. Reference
values of the Frechet distance are printed.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from data_sets import DATASETS
from safetensors.torch import save_file
from torch import Tensor, nn

from ddim_fast.models import metrics
from ddim_fast.models.shipped import SHIPPED

MAXIMUM_SHIFT = 2
LABEL_SMOOTHING = 0.1
WARM_UP_SHARE = 0.2
AVERAGE_DECAY = 0.999
COLOUR_WEIGHT = 1.0
"""The weight of a second task beside the classes: to tell the mean and standard deviation of each
channel of pictures in colour from the features, so that these notice colours, which do not decide
the class."""


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image ``(N, C, H, W)`` by up to two pixels; mirror it with probability 1/2."""
    count, _, height, width = images.shape
    # A border of black for pictures on black, and of the nearest pixel for others.
    how = {"mode": "constant", "value": -1.0} if images.shape[1] == 1 else {"mode": "replicate"}
    padded = F.pad(images, [MAXIMUM_SHIFT] * 4, **how).movedim(1, 3)
    top, left = torch.randint(2 * MAXIMUM_SHIFT + 1, (2, count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, torch.arange(width - 1, -1, -1), torch.arange(width)) + left
    rows = torch.arange(height) + top
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]].movedim(3, 1)


def learning_rate_factor(progress: float) -> float:
    """Return the one-cycle factor of the learning rate at ``progress`` in [0, 1].

    It rises linearly to 1 over the first fifth, then falls to 0 along half a cosine.
    """
    if progress < WARM_UP_SHARE:
        return progress / WARM_UP_SHARE
    return 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP_SHARE) / (1 - WARM_UP_SHARE)))


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int) -> None:
    """Update the exponential moving average of the weights and batch statistics."""
    decay = min(AVERAGE_DECAY, (1 + step) / (10 + step))
    for target, source in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if target.is_floating_point():
            target.lerp_(source, 1 - decay)
        else:
            target.copy_(source)


def colours(images: Tensor) -> Tensor:
    """Return the mean and standard deviation of each channel, ``(N, 2 C)``."""
    return torch.cat([images.mean((2, 3)), images.std((2, 3))], dim=1)


def train_epoch(
    model, colour_head, colour_weight, average, optimizer, images: Tensor, labels: Tensor, epoch: int, args
) -> float:
    """Train for one epoch; return the mean loss."""
    generator = torch.Generator().manual_seed(1000 + epoch)
    steps = len(images) // args.batch_size
    order = torch.randperm(len(images), generator=generator)[: steps * args.batch_size].view(steps, args.batch_size)
    total = 0.0
    model.train()
    for i, index in enumerate(order):
        step = epoch * steps + i
        optimizer.param_groups[0]["lr"] = args.lr * learning_rate_factor((step + 1) / (args.epochs * steps))
        batch = augment(images[index], generator).contiguous(memory_format=torch.channels_last)
        features = model.features(batch)
        loss = F.cross_entropy(model.head(features), labels[index], label_smoothing=LABEL_SMOOTHING)
        loss = loss + colour_weight * F.mse_loss(colour_head(features), colours(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_average(average, model, step)
        total += loss.item()
    return total / steps


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    predicted = torch.cat([model(batch).argmax(1) for batch in images.split(500)])
    return (predicted == labels).double().mean().item()


def train(args, images: Tensor, labels: Tensor, test_images: Tensor, test_labels: Tensor) -> nn.Module:
    """Train for ``args.epochs`` epochs and return the averaged model.

    Resumes from the checkpoint in ``args.out`` if there is one.
    """
    torch.manual_seed(0)
    card = SHIPPED[args.dataset]
    model = metrics.PictureClassifier(card).to(memory_format=torch.channels_last)
    colour_head = nn.Linear(model.num_features, 2 * card.sample_shape[0])
    average = copy.deepcopy(model).requires_grad_(False)
    colour_weight = COLOUR_WEIGHT if card.sample_shape[0] > 1 else 0.0
    parameters = [*model.parameters(), *(colour_head.parameters() if colour_weight else ())]
    optimizer = torch.optim.SGD(parameters, lr=args.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    settings = {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr}
    checkpoint, first_epoch = args.out / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["settings"] != settings:
            raise ValueError(
                f"{checkpoint} must have the settings of this run, {settings}, got "
                f"{state['settings']}: pass those settings, or another --out"
            )
        model.load_state_dict(state["model"])
        colour_head.load_state_dict(state["colour_head"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first_epoch = state["epoch"] + 1
    for epoch in range(first_epoch, args.epochs):
        started = time.monotonic()
        loss = train_epoch(model, colour_head, colour_weight, average, optimizer, images, labels, epoch, args)
        entry = {"epoch": epoch, "seconds": time.monotonic() - started, "train_loss": loss,
                     "test_accuracy": accuracy(average, test_images, test_labels)}  # fmt: skip
        print(json.dumps(entry), flush=True)
        temporary = checkpoint.with_suffix(".tmp")
        modules = {"model": model, "colour_head": colour_head, "average": average, "optimizer": optimizer}
        state = {name: module.state_dict() for name, module in modules.items()}
        torch.save({"settings": settings, "epoch": epoch, **state}, temporary)
        temporary.replace(checkpoint)
    return average


def export(name: str, model: nn.Module, images: Tensor, directory: Path) -> None:
    """Write the weights in float16, then the statistics of ``images`` with the stored weights."""
    directory.mkdir(parents=True, exist_ok=True)
    classifier_path = directory / f"{name}_classifier.safetensors"
    halves = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in model.state_dict().items()}
    save_file(halves, classifier_path)
    metrics.WEIGHTS_DIRECTORY = directory
    statistics = metrics.feature_statistics(metrics.classifier_features(images, name))
    statistics_path = directory / f"{name}_statistics.safetensors"
    save_file(
        {"mean": statistics.mean, "covariance": statistics.covariance, "count": torch.tensor(statistics.count)},
        statistics_path,
        # The statistics are only valid for these weights: a test compares this with their file.
        metadata={"classifier_sha256": hashlib.sha256(classifier_path.read_bytes()).hexdigest()},
    )
    for path in (classifier_path, statistics_path):
        path.chmod(0o644)  # safetensors makes files readable by the owner only; these are packaged


def blur(images: Tensor, std: float = 1.0) -> Tensor:
    """Blur ``images`` ``(N, C, H, W)`` with a Gaussian of ``std`` pixels."""
    weights = torch.exp(-0.5 * (torch.arange(-4, 5) / std) ** 2)
    weights = weights / weights.sum()
    channels = F.pad(images, [4] * 4, mode="replicate").flatten(0, 1)[:, None]
    blurred = F.conv2d(F.conv2d(channels, weights.view(1, 1, 1, 9)), weights.view(1, 1, 9, 1))
    return blurred.view(images.shape).clamp(-1, 1)


def measure(name: str, images: Tensor, labels: Tensor, test_images: Tensor, test_labels: Tensor) -> dict[str, float]:
    """Measure the stored classifier's accuracy, and reference values of the Frechet distance."""
    generator = torch.Generator().manual_seed(0)
    some, some_test = (torch.randperm(len(some), generator=generator) for some in (images, test_images))
    noise = torch.randn(test_images.shape, generator=generator)
    blurred, half = blur(test_images), len(test_images) // 2
    half_blurred = torch.cat([test_images[:half], blurred[half:]])
    left_out = int(test_labels.max()) - 1
    pictures = {
        f"{len(images):,} training pictures": images,
        f"{len(test_images):,} training pictures": images[some[: len(test_images)]],
        f"{len(test_images):,} test pictures (the floor)": test_images,
        "1,000 training pictures": images[some[:1000]],
        "1,000 test pictures": test_images[some_test[:1000]],
        "100 training pictures": images[some[:100]],
        "test pictures, mirrored": test_images.flip(3),
        "test pictures, rounded to 16 levels": ((test_images + 1) * 7.5).round() / 7.5 - 1,
        "test pictures, their channels exchanged": test_images.flip(1),
        "test pictures + normal noise of standard deviation 0.1, clamped": (test_images + 0.1 * noise).clamp(-1, 1),
        "test pictures, half of them blurred (Gaussian, 1 pixel)": half_blurred,
        "test pictures, each the mean of itself and its blur": (test_images + blurred) / 2,
        "test pictures, all blurred": blurred,
        f"test pictures without class {left_out}": test_images[test_labels != left_out],
        f"test pictures of class {left_out} only": test_images[test_labels == left_out],
        "normal noise, clamped": noise.clamp(-1, 1),
        "uniform noise": torch.rand(test_images.shape, generator=generator) * 2 - 1,
    }
    results = {"test accuracy": metrics.class_agreement(test_images, test_labels, name),
               "training accuracy": metrics.class_agreement(images, labels, name)}  # fmt: skip
    return results | {what: metrics.classifier_frechet_distance(value, name) for what, value in pictures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=SHIPPED)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="default: where the dataset is expected")
    parser.add_argument("--weights", type=Path, default=metrics.WEIGHTS_DIRECTORY)
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1, help="peak learning rate of the cycle")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    dataset = DATASETS[args.dataset]
    path = args.data or dataset.path
    images, labels = dataset.load_split("train", path)
    test_images, test_labels = dataset.load_split("test", path)
    model = train(args, images, labels, test_images, test_labels)
    print(f"test accuracy with float32 weights: {accuracy(model, test_images, test_labels):.4f}")
    export(args.dataset, model, images, args.weights)
    for name, value in measure(args.dataset, images, labels, test_images, test_labels).items():
        print(f"{value:10.4f}  {name}")


if __name__ == "__main__":
    main()
