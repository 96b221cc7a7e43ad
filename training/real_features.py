"""Write the shipped classifier's features of 2,000 Fashion-MNIST test images.

    python training/real_features.py

Precision and recall use them (``ddim_fast.models.metrics.load_features``). They are those of the
first 200 test images of each class, in float16.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from fashion import DEFAULT_DIRECTORY, load_split
from safetensors.torch import save_file

from ddim_fast.models import metrics

OF_EACH_CLASS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_DIRECTORY)
    parser.add_argument("--weights", type=Path, default=metrics.WEIGHTS_DIRECTORY)
    arguments = parser.parse_args()
    images, labels = load_split("test", arguments.data)
    chosen = torch.cat([torch.nonzero(labels == k)[:OF_EACH_CLASS, 0] for k in range(metrics.NUM_CLASSES)])
    features = metrics.classifier_features(images[chosen])
    path = arguments.weights / "fashion_features.safetensors"
    save_file({"features": features.half()}, path)
    print(f"{path}: {tuple(features.shape)}, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
