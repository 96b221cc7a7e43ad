"""Write the shipped classifier's features of test pictures of a shipped model's data.

    python training/real_features.py fashion
    python training/real_features.py scenes --data scenes.npz

Precision and recall use them (``ddim_fast.models.metrics.load_features``). They are those of the
first test pictures of each class, 200 at most, in float16.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from data_sets import DATASETS
from safetensors.torch import save_file

from ddim_fast.models import metrics
from ddim_fast.models.shipped import SHIPPED

OF_EACH_CLASS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=SHIPPED)
    parser.add_argument("--data", type=Path, help="default: where the dataset is expected")
    parser.add_argument("--weights", type=Path, default=metrics.WEIGHTS_DIRECTORY)
    arguments = parser.parse_args()
    dataset = DATASETS[arguments.dataset]
    images, labels = dataset.load_split("test", arguments.data or dataset.path)
    chosen = torch.cat([torch.nonzero(labels == k)[:OF_EACH_CLASS, 0] for k in labels.unique()])
    features = metrics.classifier_features(images[chosen], arguments.dataset)
    path = arguments.weights / f"{arguments.dataset}_features.safetensors"
    save_file({"features": features.half()}, path)
    path.chmod(0o644)  # safetensors makes files readable by the owner only; these are packaged
    print(f"{path}: {tuple(features.shape)}, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
