"""Quality metrics of a set of samples, each with its standard error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.metrics import (
    FeatureStatistics,
    feature_statistics,
    frechet_distance,
    load_classifier,
    load_features,
    load_statistics,
)
from ..utils.devices import widened
from .results import Measure

BOOTSTRAPS = 40
"""Bootstrap resamples for the standard error of a Frechet distance, which is then known to 11 %."""
ENOUGH = 5
"""Samples per feature that a Frechet distance needs. With fewer, the covariance estimate is too
poor for the distance to mean much."""
NEIGHBOURS = 3
"""k of precision and recall (arXiv 1904.06991, section 3)."""
_BATCH_SIZE = 500


@dataclass(frozen=True, eq=False)
class Judge:
    """A feature extractor and the features of real data.

    Args:
        name: of the features, for the report.
        features: samples ``(B, C, ...)`` float32 on the CPU -> ``(B, D)``.
        statistics: of the features of real data; None: no Frechet distance.
        real_features: ``(N, D)``, of real data; None: no precision and recall.
        classify: samples -> logits ``(B, classes)``; None: no class agreement.
        clamp: clamp samples to [-1, 1] first, as when they are written as images.
    """

    name: str
    features: Callable[[Tensor], Tensor]
    statistics: FeatureStatistics | None = None
    real_features: Tensor | None = None
    classify: Callable[[Tensor], Tensor] | None = None
    clamp: bool = True

    def measures(self, samples: Tensor, labels: Tensor | None) -> dict[str, Measure]:
        """Return every metric that applies to samples ``(N, C, ...)`` and their labels ``(N,)``."""
        samples = samples.clamp(-1, 1) if self.clamp else samples
        features = widened(in_batches(self.features, samples))
        found: dict[str, Measure] = {}
        if self.statistics is not None and len(samples) >= ENOUGH * features.shape[1]:
            found["frechet"] = frechet_measure(features, self.statistics)
        if self.real_features is not None and len(samples) > NEIGHBOURS:
            precision, recall = precision_and_recall(features, widened(self.real_features))
            found |= {"precision": precision, "recall": recall}
        if self.classify is not None and labels is not None:
            right = in_batches(self.classify, samples).argmax(1) == labels
            found["class_agreement"] = share(right)
        return found


def shipped_judge(name: str = "fashion") -> Judge:
    """Return the shipped classifier of a shipped model's data, with the features of these data, as
    a judge."""
    classifier = load_classifier(name)
    return Judge("shipped classifier", classifier.features, load_statistics(name), load_features(name), classifier)


def judge_of(features: Callable[[Tensor], Tensor], real: Tensor | None, name: str) -> Judge:
    """Return a judge with a custom feature extractor and, if given, real data ``(N, C, ...)``."""
    if real is None:
        return Judge(name, features)
    seen = in_batches(features, real)
    return Judge(name, features, feature_statistics(seen), seen)


@torch.no_grad()
def in_batches(function: Callable[[Tensor], Tensor], samples: Tensor) -> Tensor:
    """Apply ``function`` to the float32 samples in batches; return ``(N, ...)`` on the CPU."""
    return torch.cat([function(batch.float()).cpu() for batch in samples.split(_BATCH_SIZE)])


def frechet_measure(features: Tensor, real: FeatureStatistics) -> Measure:
    """Return the Frechet distance between features ``(N, D)`` and real data.

    Its standard error is a bootstrap estimate (Efron 1979).
    """
    distance = frechet_distance(feature_statistics(features), real)
    draws = torch.Generator().manual_seed(0)
    again = [
        frechet_distance(
            feature_statistics(features[torch.randint(len(features), (len(features),), generator=draws, device="cpu")]),
            real,
        )
        for _ in range(BOOTSTRAPS)
    ]
    return Measure(distance, torch.tensor(again, dtype=torch.float32, device="cpu").std().item())


def share(is_so: Tensor) -> Measure:
    """Return the share of True in a boolean ``(N,)``, with its binomial standard error."""
    p = widened(is_so).mean().item()
    return Measure(p, math.sqrt(p * (1 - p) / len(is_so)))


def mean(values: Tensor) -> Measure:
    """Return the mean of ``(N,)`` with its standard error, which is NaN for a single value."""
    values = widened(values)
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Measure(values.mean().item(), error)


def precision_and_recall(samples: Tensor, real: Tensor, k: int = NEIGHBOURS) -> tuple[Measure, Measure]:
    """Return the improved precision and recall of features ``(N, D)`` and real ones ``(M, D)``.

    See Kynkaanniemi et al. 2019, arXiv 1904.06991, equation 2.
    """
    between = torch.cdist(samples, real)
    within_real = between <= _radii(real, k)[None, :]
    within_samples = between <= _radii(samples, k)[:, None]
    return share(within_real.any(1)), share(within_samples.any(0))


def _radii(features: Tensor, k: int) -> Tensor:
    """Return each feature's distance to its k-th nearest neighbour, itself excluded, ``(N,)``."""
    return torch.cdist(features, features).kthvalue(k + 1, dim=1).values
