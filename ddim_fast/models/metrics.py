"""How close generated pictures are to real ones, judged by small classifiers that ship with the
package, one for the data of each shipped model.

    distance = classifier_frechet_distance(images)   # 0 is perfect; see the function for what the number does not mean
    share = class_agreement(images, labels)          # 1 is perfect

Pictures are ``(N, C, H, W)``, in [-1, 1], of the shape of that model's: Fashion-MNIST's if no name
is given. Nothing here needs a GPU or the data set. The weights and the statistics of the training
sets were made by ``training/train_classifier.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..utils.brief import brief_fields
from ..utils.checks import check_choice, check_integer
from ..utils.devices import widened
from .shipped import SHIPPED, ModelCard

__all__ = [
    "FeatureStatistics",
    "PictureClassifier",
    "class_agreement",
    "classifier_features",
    "classifier_frechet_distance",
    "feature_statistics",
    "frechet_distance",
    "load_classifier",
    "load_features",
    "load_statistics",
    "sample_distances",
]

WEIGHTS_DIRECTORY = Path(__file__).parent.parent / "weights"
_BATCH_SIZE = 500  # bounds the memory of an activation to 13 MB, whatever the number of pictures


def _convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class PictureClassifier(nn.Module):
    """Five convolutions, an average over the picture, and a linear layer: about 100,000 weights.

    Pictures are folded into 2 x 2 patches first (28 x 28 x 1 becomes 14 x 14 x 4), which halves the
    time on a CPU. ``features`` gives what the linear layer reads: ``num_features`` averages of
    non-negative activations per picture.

    Args:
        card: of the model whose data it classifies.
    """

    num_features = 64

    def __init__(self, card: ModelCard = SHIPPED["fashion"]):
        super().__init__()
        self.card = card
        self.body = nn.Sequential(
            nn.PixelUnshuffle(2),
            _convolution(4 * card.sample_shape[0], 32),
            _convolution(32, 32),
            nn.MaxPool2d(2),
            _convolution(32, 64),
            _convolution(64, 64),
            _convolution(64, self.num_features),
        )
        self.head = nn.Linear(self.num_features, len(card.class_names))

    def features(self, images: Tensor) -> Tensor:
        """Return the penultimate features ``(N, 64)`` float32 of ``images`` ``(N, C, H, W)``
        float32 in [-1, 1]."""
        if images.ndim != 4 or tuple(images.shape[1:]) != self.card.sample_shape or images.dtype != torch.float32:
            raise ValueError(
                f"images must be {_shape_text(self.card)} float32, got {tuple(images.shape)} {images.dtype}: "
                "reshape them, or convert them with images.float()"
            )
        return self.body(images).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(N, classes)`` float32 of ``images`` ``(N, C, H, W)`` float32 in [-1,
        1]."""
        return self.head(self.features(images))


def _shape_text(card: ModelCard) -> str:
    return f"(N, {', '.join(map(str, card.sample_shape))})"


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """The Gaussian fitted to a set of features.

    Args:
        mean: ``(D,)`` float64.
        covariance: ``(D, D)`` float64, symmetric; the unbiased estimate (divided by ``count - 1``).
        count: how many features it was fitted to; 2 or more.
    """

    mean: Tensor
    covariance: Tensor
    count: int

    __repr__ = brief_fields

    def __post_init__(self) -> None:
        dimension = self.mean.numel()
        if dimension == 0 or tuple(self.mean.shape) != (dimension,):
            raise ValueError(f"mean must be (D,) with D >= 1, got shape {tuple(self.mean.shape)}: flatten it")
        if tuple(self.covariance.shape) != (dimension, dimension):
            raise ValueError(
                f"covariance must be (D, D) with D = {dimension}, the mean's length, got shape "
                f"{tuple(self.covariance.shape)}: compute mean and covariance from the same features"
            )
        for name, values in (("mean", self.mean), ("covariance", self.covariance)):
            if values.dtype != torch.float64:
                raise ValueError(f"{name} must be float64, got {values.dtype}: compute it from features.double()")
            if not torch.isfinite(values).all():
                raise ValueError(f"{name} must be finite, got NaN or infinity: look for NaN in the features")
        asymmetry = (self.covariance - self.covariance.T).abs().max().item()
        if asymmetry > 1e-9 * self.covariance.abs().max().item():
            raise ValueError(
                f"covariance must be symmetric, got one that differs from its transpose by {asymmetry:.3g}: "
                "use feature_statistics, or (covariance + covariance.T) / 2"
            )
        check_integer("count", self.count, at_least=2, remedy="one feature has no covariance")


def feature_statistics(features: Tensor) -> FeatureStatistics:
    """Return mean and unbiased covariance, in float64 on the CPU, of ``features`` ``(N, D)``,
    floating point, N >= 2."""
    if features.ndim != 2 or features.shape[0] < 2 or features.shape[1] < 1 or not features.is_floating_point():
        raise ValueError(
            f"features must be (N, D), floating point, with N >= 2 and D >= 1, got {tuple(features.shape)} "
            f"{features.dtype}: give one row per picture, and two pictures or more"
        )
    values = features.detach().to("cpu", torch.float64)
    mean = values.mean(0)
    centered = values - mean
    return FeatureStatistics(mean, centered.T @ centered / (len(values) - 1), len(values))


def _symmetric_square_root(covariance: Tensor) -> Tensor:
    """Return the positive semi-definite ``R`` ``(D, D)`` with ``R @ R = covariance``; float64.

    The zero eigenvalues of a rank-deficient matrix come back as rounding noise of either sign. The
    square root of that noise would be 1e8 times larger, not small at all, so eigenvalues within the
    rounding error of zero are set to zero.
    """
    eigenvalues, eigenvectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    largest = eigenvalues[-1].item()
    noise = len(covariance) * torch.finfo(torch.float64).eps * eigenvalues.abs().max().item()
    if eigenvalues[0].item() < -1e-6 * max(largest, 0.0) - noise:
        raise ValueError(
            f"covariance must be positive semi-definite, got one with the eigenvalue {eigenvalues[0].item():.3g}: "
            "compute it with feature_statistics"
        )
    kept = torch.where(eigenvalues > noise, eigenvalues, 0.0)
    return eigenvectors * kept.sqrt() @ eigenvectors.T


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Return the squared Frechet (2-Wasserstein) distance of two Gaussians, in float64; never
    negative.

    ``|mean_a - mean_b|^2 + trace(A + B - 2 sqrt(A^1/2 B A^1/2))`` for the covariances ``A`` and
    ``B``. The trace is computed as ``min |A^1/2 - B^1/2 Q|^2`` over all orthogonal ``Q`` (Frobenius
    norm), which is equal to it (orthogonal Procrustes problem, solved by one singular value
    decomposition): a sum of squares, so nothing cancels where the Gaussians are close, and neither
    matrix needs full rank.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"both statistics must have features of the same length, got {len(a.mean)} and {len(b.mean)}: "
            "compute both with the same classifier"
        )
    root_a, root_b = _symmetric_square_root(a.covariance), _symmetric_square_root(b.covariance)
    left, _, right = torch.linalg.svd(root_b @ root_a)
    spread = (root_a - root_b @ (left @ right)).square().sum()
    return ((a.mean - b.mean).square().sum() + spread).item()


def sample_distances(samples: Tensor, others: Tensor) -> Tensor:
    """Return the root mean square difference of each pair of samples ``(N, C, ...)``: ``(N,)``
    float64, float32 on a device that lacks it."""
    if samples.shape != others.shape:
        raise ValueError(
            f"both must have the same shape, got {tuple(samples.shape)} and {tuple(others.shape)}: give as many of each"
        )
    return (widened(samples) - widened(others)).flatten(1).square().mean(1).sqrt()


def _card(name: str) -> ModelCard:
    check_choice("name", name, SHIPPED, "only these ship with the package")
    return SHIPPED[name]


def _shipped_file(name: str, kind: str) -> Path:
    _card(name)
    path = WEIGHTS_DIRECTORY / f"{name}_{kind}.safetensors"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} ships with the package and must exist, got none: "
            "install the package again, or make the file with training/train_classifier.py"
        )
    return path


def _load(name: str, what: str) -> dict[str, Tensor]:
    return load_file(_shipped_file(name, what))


def load_classifier(name: str = "fashion") -> PictureClassifier:
    """Load the shipped classifier of a shipped model's data: on the CPU, float32, in evaluation
    mode, its weights frozen."""
    state = _load(name, "classifier")
    with torch.device("meta"):  # no random initialisation: a caller's random state stays as it was
        model = PictureClassifier(_card(name))
    float32 = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    model.load_state_dict(float32, assign=True)
    return model.eval().requires_grad_(False)


def load_statistics(name: str = "fashion") -> FeatureStatistics:
    """Load the shipped classifier's ``FeatureStatistics`` over the pictures of the training set."""
    state = _load(name, "statistics")
    return FeatureStatistics(state["mean"], state["covariance"], int(state["count"]))


def load_features(name: str = "fashion") -> Tensor:
    """Load the shipped classifier's features ``(N, 64)`` float32 of the first test pictures of each
    class."""
    return _load(name, "features")["features"].float()


def _check_pictures(images: Tensor, minimum_count: int, card: ModelCard) -> None:
    if images.ndim != 4 or tuple(images.shape[1:]) != card.sample_shape or len(images) < minimum_count:
        raise ValueError(
            f"images must be {_shape_text(card)} with N >= {minimum_count}, got shape {tuple(images.shape)}: "
            f"use images.reshape(-1, {', '.join(map(str, card.sample_shape))}), and enough pictures"
        )
    if not images.is_floating_point():
        raise ValueError(
            f"images must be floating point in [-1, 1], got {images.dtype}: "
            "convert bytes with images.float() / 127.5 - 1"
        )
    lowest, highest = images.min().item(), images.max().item()
    if not (lowest >= -1 and highest <= 1):  # NaN fails both comparisons
        raise ValueError(
            f"images must be in [-1, 1], got values from {lowest:.4g} to {highest:.4g}: "
            "use images.clamp(-1, 1) for a sampler's output, images / 127.5 - 1 for pictures in [0, 255]; "
            "NaN means that the sampler or the model failed"
        )


@torch.no_grad()
def _in_batches(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Apply ``function`` to the float32 pictures on the CPU, a batch at a time."""
    return torch.cat([function(batch.to("cpu", torch.float32)) for batch in images.split(_BATCH_SIZE)])


def classifier_features(images: Tensor, name: str = "fashion") -> Tensor:
    """Return the shipped classifier's features ``(N, 64)`` float32 on the CPU of ``images`` ``(N,
    C, H, W)`` in [-1, 1]."""
    _check_pictures(images, 1, _card(name))
    return _in_batches(load_classifier(name).features, images)


def classifier_frechet_distance(images: Tensor, name: str = "fashion") -> float:
    """Return the Frechet distance of ``images`` to the training set of a shipped model, in the
    features of OUR small classifier.

    This is not FID: the features are not those of the Inception network. The number cannot be
    compared with any published FID, nor with distances from other weights; only with this
    function's own values for sets of the same size. It is biased upwards for few pictures, since
    few features estimate a covariance poorly: compare equal counts, 10,000 where you can. The
    features change little when a picture is shifted by two pixels or mirrored, because the
    classifier was trained so.

    Measured for Fashion-MNIST, for a sense of scale: 10,000 test pictures 0.0018 (the floor), all
    blurred by one pixel 0.91, noise 14; the bias: 10,000 training pictures 0.0016, 1,000 of them
    0.023, 100 of them 0.45.

    Args:
        images: ``(N, C, H, W)``, any floating point type, in [-1, 1], N >= 2. Pictures in [0, 1]
            must be mapped with ``2 * images - 1`` first: they pass every check, and get a large
            distance.
        name: of the shipped model.
    """
    _check_pictures(images, 2, _card(name))
    return frechet_distance(feature_statistics(classifier_features(images, name)), load_statistics(name))


def class_agreement(images: Tensor, labels: Tensor, name: str = "fashion") -> float:
    """Return the share of the pictures to which the shipped classifier gives the label asked for.

    Args:
        images: ``(N, C, H, W)``, any floating point type, in [-1, 1], N >= 1.
        labels: ``(N,)``, integers from 0 to the number of classes - 1.
        name: of the shipped model.
    """
    _check_pictures(images, 1, _card(name))
    classes = len(_card(name).class_names)
    if tuple(labels.shape) != (len(images),) or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"labels must be ({len(images)},) integers, got {tuple(labels.shape)} {labels.dtype}: "
            "give class numbers, not one-hot rows"
        )
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= classes:
        raise ValueError(
            f"labels must be in [0, {classes}), got values from {lowest} to {highest}: "
            "leave out pictures made without a label"
        )
    predicted = _in_batches(load_classifier(name), images).argmax(1)
    return (predicted == labels.to("cpu")).double().mean().item()
