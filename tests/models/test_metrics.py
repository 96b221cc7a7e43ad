"""The Frechet distance against closed forms and an independent square root; the shipped classifier and statistics."""

from __future__ import annotations

import hashlib
import importlib
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors import safe_open
from torch import Tensor

from ddim_fast.models import metrics
from ddim_fast.models.metrics import (
    FeatureStatistics,
    PictureClassifier,
    class_agreement,
    classifier_features,
    classifier_frechet_distance,
    feature_statistics,
    frechet_distance,
    load_classifier,
    load_statistics,
)
from ddim_fast.models.shipped import SHIPPED, ModelCard, load_shipped_model
from ddim_fast.sampler import DDIMSampler

MAXIMUM_FILE_SIZE = 300_000
GARMENT_LOGITS = [4.112, 3.8699, 4.2483, 3.1426, 3.1602]
GARMENT_DISTANCE = 6.86558


def gaussian(mean: Tensor, covariance: Tensor) -> FeatureStatistics:
    return FeatureStatistics(mean.double(), covariance.double(), 1000)


def centered(covariance: Tensor) -> FeatureStatistics:
    return gaussian(torch.zeros(len(covariance)), covariance)


def random_covariance(dimension: int, rank: int, seed: int) -> Tensor:
    factor = torch.randn(dimension, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return factor @ factor.T / rank


def random_pictures(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def drawn(*rectangles: tuple[int, int, int, int]) -> Tensor:
    """A picture ``(1, 28, 28)`` of light grey rectangles (top, bottom, left, right) on black."""
    image = torch.full((1, 28, 28), -1.0)
    for top, bottom, left, right in rectangles:
        image[0, top:bottom, left:right] = 0.2
    return image


# The Frechet distance


def test_equal_gaussians_have_distance_zero():
    a = gaussian(torch.randn(64, generator=torch.Generator().manual_seed(0)), random_covariance(64, 200, 1))
    assert 0 <= frechet_distance(a, a) < 1e-20


def test_shifted_mean_gives_the_squared_shift():
    covariance = random_covariance(8, 20, 0)
    shift = torch.tensor([3.0, 0, 0, -4.0, 0, 0, 0, 12.0])
    distance = frechet_distance(gaussian(torch.ones(8), covariance), gaussian(torch.ones(8) + shift, covariance))
    assert distance == pytest.approx(169.0, rel=1e-13)


def test_diagonal_covariances_give_the_squared_differences_of_the_standard_deviations():
    a, b = torch.tensor([1.0, 4.0, 9.0, 0.25]), torch.tensor([16.0, 1.0, 9.0, 0.01])
    assert frechet_distance(centered(a.diag()), centered(b.diag())) == pytest.approx(9 + 1 + 0 + 0.16, rel=1e-7)
    wanted = (a.double().sqrt() - b.double().sqrt()).square().sum().item()
    assert frechet_distance(centered(a.diag()), centered(b.diag())) == pytest.approx(wanted, rel=1e-12)


def test_commuting_covariances_give_the_squared_differences_of_the_square_roots():
    rotation, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((12, 12)))
    a, b = np.linspace(0.1, 5, 12), np.linspace(4, 0.2, 12) ** 2
    matrices = [torch.from_numpy(rotation * values @ rotation.T) for values in (a, b)]
    wanted = np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert frechet_distance(*map(centered, matrices)) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("dimension", [1, 2, 7, 64])
def test_random_covariances_agree_with_a_square_root_of_the_unsymmetric_product(dimension):
    a, b = random_covariance(dimension, 3 * dimension, 10), 2.5 * random_covariance(dimension, 2 * dimension, 11)
    # scipy's Schur method on A B: another matrix and another algorithm. trace sqrt(A B) = trace sqrt(A^1/2 B A^1/2).
    root = scipy.linalg.sqrtm(a.numpy() @ b.numpy())
    wanted = (a.trace() + b.trace()).item() - 2 * np.trace(root).real
    assert frechet_distance(centered(a), centered(b)) == pytest.approx(wanted, rel=1e-9)


def test_is_symmetric_and_scales_with_the_square_of_the_features():
    a, b = random_covariance(16, 40, 0), random_covariance(16, 40, 1)
    forwards, backwards = frechet_distance(centered(a), centered(b)), frechet_distance(centered(b), centered(a))
    assert forwards == pytest.approx(backwards, rel=1e-12)
    assert frechet_distance(centered(9 * a), centered(9 * b)) == pytest.approx(9 * forwards, rel=1e-12)


def test_rank_deficient_covariances_have_the_distance_of_their_projections():
    """A of rank one, v v^T: sqrt(A^1/2 B A^1/2) has the one eigenvalue sqrt(v^T B v)."""
    v = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    a, b = torch.outer(v, v), random_covariance(32, 64, 4)
    wanted = (a.trace() + b.trace() - 2 * (v @ b @ v).sqrt()).item()
    assert frechet_distance(centered(a), centered(b)) == pytest.approx(wanted, rel=1e-11)
    assert frechet_distance(centered(b), centered(a)) == pytest.approx(wanted, rel=1e-11)


def test_rank_deficient_equal_and_zero_covariances():
    a = random_covariance(64, 5, 5)
    assert 0 <= frechet_distance(centered(a), centered(a)) < 1e-20
    zero = torch.zeros(64, 64)
    assert frechet_distance(centered(a), centered(zero)) == pytest.approx(a.trace().item(), rel=1e-12)
    assert frechet_distance(centered(zero), centered(zero)) == 0


def test_small_distances_do_not_drown_in_rounding():
    """The textbook difference of traces loses this: its rounding error alone is about 1e-14 of the traces."""
    a = random_covariance(64, 200, 6)
    wanted = a.trace().item() * (math.sqrt(1 + 1e-8) - 1) ** 2
    assert frechet_distance(centered(a), centered(a * (1 + 1e-8))) == pytest.approx(wanted, rel=1e-4, abs=0)


# Statistics of features


def test_feature_statistics_are_numpys_mean_and_unbiased_covariance():
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7) + 100
    statistics = feature_statistics(features)
    np.testing.assert_allclose(statistics.mean, features.double().numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(statistics.covariance, np.cov(features.double().numpy(), rowvar=False), rtol=1e-12)
    assert statistics.mean.dtype == statistics.covariance.dtype == torch.float64
    assert statistics.count == 50


def test_feature_statistics_are_frozen():
    statistics = feature_statistics(torch.eye(3))
    with pytest.raises(AttributeError):
        statistics.count = 7


# The shipped files


PICTURES = {"fashion": 60_000, "scenes": 39_600}
"""By model: how many training pictures its statistics describe."""


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("kind", ["classifier", "statistics", "features"])
def test_shipped_files_are_small(kind, name):
    assert (metrics.WEIGHTS_DIRECTORY / f"{name}_{kind}.safetensors").stat().st_size <= MAXIMUM_FILE_SIZE


@pytest.mark.parametrize("name", SHIPPED)
def test_the_statistics_were_taken_with_the_shipped_classifier(name):
    digest = hashlib.sha256((metrics.WEIGHTS_DIRECTORY / f"{name}_classifier.safetensors").read_bytes()).hexdigest()
    with safe_open(metrics.WEIGHTS_DIRECTORY / f"{name}_statistics.safetensors", "pt") as file:
        assert file.metadata()["classifier_sha256"] == digest


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_statistics_describe_all_training_pictures(name):
    statistics = load_statistics(name)
    dimension = PictureClassifier.num_features
    assert statistics.count == PICTURES[name]
    assert statistics.mean.shape == (dimension,)
    assert statistics.covariance.shape == (dimension, dimension)
    assert (statistics.mean >= 0).all()  # averages of activations after a ReLU
    assert torch.linalg.eigvalsh(statistics.covariance).min() > -1e-9
    assert statistics.covariance.trace() > 0.01


def test_the_mean_training_feature_is_undecided_between_classes():
    """Ten classes of equal size: no logit of the mean feature may stand out. Statistics of another classifier would."""
    probabilities = load_classifier().head(load_statistics().mean.float()).softmax(0)
    assert probabilities.max() < 0.3


def test_classifier_is_frozen_float32_and_in_evaluation_mode():
    model = load_classifier()
    assert not model.training
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_classifier_shapes():
    model, images = load_classifier(), random_pictures(3)
    assert model.features(images).shape == (3, PictureClassifier.num_features)
    assert model(images).shape == (3, 10)
    torch.testing.assert_close(model(images), model.head(model.features(images)), rtol=0, atol=0)


def test_classifier_is_deterministic_and_ignores_the_other_pictures_of_a_batch():
    images = random_pictures(40)
    first = classifier_features(images)
    torch.testing.assert_close(classifier_features(images), first, rtol=0, atol=0)
    torch.testing.assert_close(classifier_features(images[7:8]), first[7:8], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(classifier_features(images.flip(0)), first.flip(0), rtol=1e-4, atol=1e-5)


def test_more_pictures_than_a_batch_keep_their_order(monkeypatch):
    images = random_pictures(23)
    whole = classifier_features(images)
    monkeypatch.setattr(metrics, "_BATCH_SIZE", 5)
    torch.testing.assert_close(classifier_features(images), whole, rtol=1e-4, atol=1e-5)


def test_loading_leaves_the_random_state_and_default_dtype_alone():
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        model = load_classifier()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.head.weight.dtype == torch.float32


def garments() -> tuple[Tensor, Tensor]:
    """Five drawn pictures ``(5, 1, 28, 28)`` and their labels ``(5,)``; no data set and no random generator needed."""
    drawings = {
        0: drawn((2, 26, 8, 20), (3, 10, 3, 25)),  # T-shirt
        1: drawn((1, 8, 9, 19), (8, 27, 9, 13), (8, 27, 15, 19)),  # trousers
        3: drawn((1, 27, 11, 17), (14, 27, 10, 18)),  # dress
        8: drawn((10, 25, 3, 25), (4, 10, 8, 10), (4, 10, 18, 20), (4, 6, 8, 20)),  # bag
        9: drawn((3, 25, 14, 24), (17, 25, 3, 24)),  # ankle boot
    }
    return torch.stack(list(drawings.values())), torch.tensor(list(drawings))


def test_classifier_knows_garments_drawn_with_a_few_rectangles():
    """Fails for pictures scaled another way, permuted labels or untrained weights."""
    images, labels = garments()
    assert class_agreement(images, labels) == 1.0


def test_the_classifier_of_scenes_knows_scenes_that_it_never_saw(monkeypatch):
    """Rendered anew, from another seed than its training data."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "training"))
    scenes = importlib.import_module("scenes")
    assert SHIPPED["scenes"].class_names == scenes.KINDS
    rendered, labels = scenes.render(96, seed=12345)
    pictures = rendered.float() / 127.5 - 1
    assert class_agreement(pictures, labels, "scenes") > 0.6
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    near, far = (classifier_frechet_distance(some, "scenes") for some in (pictures, noise))
    assert near < far / 10


def test_the_model_of_scenes_draws_what_its_classifier_sees():
    model, labels = load_shipped_model("scenes"), torch.arange(60) % 6
    pictures = DDIMSampler(model.schedule, 10).sample(
        model, (60, *model.sample_shape), seed=0, conditioning={"class_labels": labels}
    )
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    near, far = (classifier_frechet_distance(some.clamp(-1, 1), "scenes") for some in (pictures, noise))
    assert near < far / 4
    assert class_agreement(pictures.clamp(-1, 1), labels, "scenes") > 0.28  # one in six, +- 0.05, by chance


def test_features_are_those_that_the_published_distances_were_measured_with():
    """Recorded from the shipped weights: another network, other weights or other statistics change every number."""
    images, labels = garments()
    logits = load_classifier()(images)[torch.arange(5), labels]
    torch.testing.assert_close(logits, torch.tensor(GARMENT_LOGITS), rtol=1e-3, atol=1e-3)
    assert classifier_frechet_distance(images) == pytest.approx(GARMENT_DISTANCE, rel=1e-3)


# The two measures


def test_distance_is_that_of_the_features_to_the_shipped_statistics():
    images = random_pictures(100)
    model, statistics = load_classifier(), load_statistics()
    features = model.features(images).double().numpy()
    covariance = np.cov(features, rowvar=False)
    root = scipy.linalg.sqrtm(covariance @ statistics.covariance.numpy())
    wanted = np.square(features.mean(0) - statistics.mean.numpy()).sum() + np.trace(covariance)
    wanted += statistics.covariance.trace().item() - 2 * np.trace(root).real
    assert classifier_frechet_distance(images) == pytest.approx(wanted, rel=1e-5)


def test_distance_of_half_precision_pictures_is_close_to_that_of_single_precision():
    images = random_pictures(100)
    assert classifier_frechet_distance(images.half()) == pytest.approx(classifier_frechet_distance(images), rel=1e-2)


def test_class_agreement_counts_the_labels_that_the_classifier_gives():
    images = random_pictures(20)
    predicted = load_classifier()(images).argmax(1)
    assert class_agreement(images, predicted) == 1.0
    wrong = (predicted + 1) % 10
    assert class_agreement(images, wrong) == 0.0
    assert class_agreement(images, torch.cat([predicted[:5], wrong[5:]])) == 0.25


# Errors: each states the rule, the value given and the remedy


@pytest.mark.parametrize("load", [load_classifier, load_statistics])
def test_unknown_name(load):
    with pytest.raises(ValueError, match=r"name must be one of fashion.*, got 'imagenet'"):
        load("imagenet")


@pytest.mark.parametrize("load", [load_classifier, load_statistics])
def test_missing_file(load, monkeypatch, tmp_path):
    monkeypatch.setattr(metrics, "WEIGHTS_DIRECTORY", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"fashion_.*install the package again"):
        load()


def with_nan() -> Tensor:
    images = random_pictures(3)
    images[1, 0, 5, 5] = float("nan")
    return images


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (random_pictures(4)[:, 0], r"\(N, 1, 28, 28\).*got shape \(4, 28, 28\).*reshape"),
        (random_pictures(4).expand(4, 3, 28, 28), r"got shape \(4, 3, 28, 28\)"),
        (random_pictures(1), r"N >= 2, got shape \(1, 1, 28, 28\)"),
        (torch.zeros(3, 1, 28, 28, dtype=torch.uint8), r"floating point.*torch.uint8.*127\.5"),
        (random_pictures(3) * 127.5 + 127.5, r"in \[-1, 1\], got values from .* to 255: .*clamp.*127\.5"),
        (random_pictures(3) * 1.1, r"in \[-1, 1\], got values"),
        (with_nan(), r"got values from nan to nan"),
    ],
)
def test_pictures_that_break_a_rule(images, message):
    with pytest.raises(ValueError, match=message):
        classifier_frechet_distance(images)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"\(4,\) integers, got \(3,\)"),
        (torch.zeros(4), r"got \(4,\) torch.float32"),
        (torch.zeros(4, 10, dtype=torch.int64), r"got \(4, 10\).*one-hot"),
        (torch.tensor([0, 1, 2, 10]), r"\[0, 10\), got values from 0 to 10"),
        (torch.tensor([0, 1, 2, -1]), r"\[0, 10\), got values from -1 to 2"),
    ],
)
def test_labels_that_break_a_rule(labels, message):
    with pytest.raises(ValueError, match=message):
        class_agreement(random_pictures(4), labels)


@pytest.mark.parametrize("images", [torch.zeros(2, 28, 28), torch.zeros(2, 1, 28, 28, dtype=torch.float64)])
def test_classifier_refuses_other_shapes_and_types(images):
    with pytest.raises(ValueError, match=r"\(N, 1, 28, 28\) float32, got"):
        load_classifier()(images)


@pytest.mark.parametrize("features", [torch.zeros(1, 4), torch.zeros(4), torch.zeros(3, 4, dtype=torch.int64)])
def test_features_that_break_a_rule(features):
    with pytest.raises(ValueError, match=r"features must be \(N, D\).*got"):
        feature_statistics(features)


DOUBLE_EYE = torch.eye(2, dtype=torch.float64)
DOUBLE_ZEROS = torch.zeros(2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("mean", "covariance", "count", "message"),
    [
        (DOUBLE_ZEROS[None], DOUBLE_EYE, 5, r"mean must be \(D,\)"),
        (DOUBLE_ZEROS, torch.eye(3, dtype=torch.float64), 5, r"covariance must be \(D, D\) with D = 2"),
        (DOUBLE_ZEROS.float(), DOUBLE_EYE, 5, r"mean must be float64, got torch.float32"),
        (DOUBLE_ZEROS, DOUBLE_EYE.float(), 5, r"covariance must be float64"),
        (DOUBLE_ZEROS / 0, DOUBLE_EYE, 5, r"mean must be finite"),
        (DOUBLE_ZEROS, torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=torch.float64), 5, r"symmetric"),
        (DOUBLE_ZEROS, DOUBLE_EYE, 1, r"count must be an integer, at least 2, got 1"),
    ],
)
def test_statistics_that_break_a_rule(mean, covariance, count, message):
    with pytest.raises(ValueError, match=message):
        FeatureStatistics(mean, covariance, count)


def test_distance_refuses_other_lengths_and_negative_variances():
    with pytest.raises(ValueError, match="same length, got 2 and 3"):
        frechet_distance(centered(torch.eye(2)), centered(torch.eye(3)))
    with pytest.raises(ValueError, match="positive semi-definite, got one with the eigenvalue -1"):
        frechet_distance(centered(torch.diag(torch.tensor([1.0, -1.0]))), centered(torch.eye(2)))


def test_a_classifier_of_other_pictures():
    card = ModelCard("solids", (3, 32, 32), "epsilon", None, ("cube", "cone"))
    model = PictureClassifier(card).eval()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert model(images).shape == (2, 2)
    with pytest.raises(ValueError, match=r"images must be \(N, 3, 32, 32\) float32, got \(3, 1, 28, 28\)"):
        model(random_pictures(3))
