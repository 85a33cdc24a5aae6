"""Metrics of features against scipy and loops over pairs, in float64."""

import itertools

import numpy as np
import pytest
import torch
from scipy import linalg, special, stats
from scipy.spatial import distance

from tokenbridge_jax.evaluation.metrics import (
    adm_inception_score,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from tokenbridge_jax.evaluation.moments import Gaussian, gaussian
from tokenbridge_jax.runtime.errors import UserError


def features(count: int, size: int, shift: float = 0.0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(9).normal(size=(size, size)) / size**0.5
    return (rng.normal(size=(count, size)) @ mix + shift).astype(np.float32)


# --- Moments --------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_mean_and_covariance_are_numpys(offset: float, monkeypatch):
    monkeypatch.setattr("tokenbridge_jax.evaluation.moments._BLOCK", 40)
    rows = features(101, 6).astype(np.float64) + offset
    found = gaussian(rows)
    np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(rows.T), rtol=1e-9, atol=1e-12)


def test_features_without_moments_are_refused():
    rows = features(5, 3)
    with pytest.raises(UserError, match="at least 2 images, not 1"):
        gaussian(rows[:1])
    rows[1, 2], rows[4, 0] = np.nan, np.inf
    with pytest.raises(UserError, match="2 of 5 images have features that are NaN"):
        gaussian(rows)
    with pytest.raises(UserError, match="do not belong together"):
        Gaussian(np.zeros(3), np.zeros((2, 2)))
    with pytest.raises(UserError, match="contain NaN or infinity"):
        Gaussian(np.zeros(2), np.full((2, 2), np.nan))


# --- FID ------------------------------------------------------------------------------------------


def test_frechet_distance_is_scipys():
    a, b = gaussian(features(80, 12)), gaussian(features(90, 12, shift=0.3, seed=1))
    root = linalg.sqrtm(a.covariance @ b.covariance)
    expected = ((a.mean - b.mean) ** 2).sum()
    expected += np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.trace(root).real
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)


def test_frechet_distance_of_singular_covariances():
    """For commuting matrices, it is the sum of (root of a - root of b)^2 over the eigenvalues."""
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))
    one, other = np.array([4.0, 1, 0, 0, 9]), np.array([1.0, 0, 0, 16, 9])
    a, b = (Gaussian(np.zeros(5), turn * values @ turn.T) for values in (one, other))
    expected = ((one**0.5 - other**0.5) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-7)
    same = gaussian(features(4, 12))
    assert frechet_distance(same, same) == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match="of 3 features cannot be compared with those of 4"):
        frechet_distance(gaussian(features(9, 3)), gaussian(features(9, 4)))


# --- Inception score ------------------------------------------------------------------------------


def predictions(count: int, classes: int = 7) -> np.ndarray:
    return (3 * np.random.default_rng(0).normal(size=(count, classes))).astype(np.float32)


def test_inception_score_equals_its_definition():
    logits = predictions(60)
    logits[3, 2] = 1000
    scores = []
    for part in np.split(special.softmax(np.float64(logits), axis=1), 4):
        divergences = [stats.entropy(row, part.mean(axis=0)) for row in part]
        scores.append(np.exp(np.mean(divergences)))
    expected = np.mean(scores), np.std(scores)
    assert inception_score(logits, splits=4) == pytest.approx(expected, rel=1e-12)


def test_inception_score_with_keys_does_not_depend_on_the_order():
    logits = predictions(60)
    by_class = logits[np.argsort(logits.argmax(axis=1), kind="stable")]
    keys = {row.tobytes(): i for i, row in enumerate(logits)}

    def score(rows: np.ndarray) -> tuple[float, float]:
        return inception_score(rows, keys=np.array([keys[row.tobytes()] for row in rows]))

    assert score(by_class) == score(logits) == inception_score(logits)
    assert inception_score(by_class)[0] < 0.7 * inception_score(logits)[0]
    with pytest.raises(UserError, match="9 images cannot be divided into 10 splits"):
        inception_score(logits[:9])


# --- KID ------------------------------------------------------------------------------------------


def test_kernel_distance_equals_its_definition():
    """Every subset has all images, so that the random choice changes nothing."""
    x, y = features(12, 5), features(12, 5, shift=0.5, seed=1)

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (np.float64(a) @ np.float64(b) / 5 + 1) ** 3

    pairs = list(itertools.permutations(range(12), 2))
    expected = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs) / len(pairs)
    expected -= 2 * np.mean([kernel(a, b) for a in x for b in y])
    found = kernel_distance(x, y, subsets=3, subset_size=12)
    assert found == pytest.approx((expected, 0), rel=1e-10, abs=1e-12)


def test_metrics_are_torch_fidelitys():
    """The same features, and the same subsets for KID."""
    import torch_networks  # noqa: F401  (It replaces torchvision.)
    from torch_fidelity import metric_fid, metric_kid, metric_prc

    x, y = features(130, 12), features(150, 12, shift=0.2, seed=1)
    ours = {"kernel_inception_distance_mean": None, "kernel_inception_distance_std": None}
    ours = dict(zip(ours, kernel_distance(x, y, subsets=20, subset_size=60), strict=True))
    ours["frechet_inception_distance"] = frechet_distance(gaussian(x), gaussian(y))
    ours["precision"], ours["recall"] = precision_recall(y, x)
    tensors = [torch.from_numpy(a) for a in (x, y)]
    settings = dict(verbose=False, kid_subsets=20, kid_subset_size=60)
    theirs = metric_kid.kid_features_to_metric(*tensors, **settings)
    statistics = [metric_fid.fid_features_to_statistics(a) for a in tensors]
    theirs |= metric_fid.fid_statistics_to_metric(*statistics, verbose=False)
    theirs |= metric_prc.prc_features_to_metric(*tensors, verbose=False)
    for name, value in ours.items():
        assert value == pytest.approx(theirs[name], rel=1e-4), name


def test_adm_scores_consecutive_parts_of_5000():
    logits = predictions(10_500)
    parts = [inception_score(logits[i : i + 5000], splits=1)[0] for i in (0, 5000, 10_000)]
    assert adm_inception_score(logits) == pytest.approx(np.mean(parts), rel=1e-12)


def test_kernel_distance_is_unbiased():
    x, y = features(400, 5), features(400, 5, seed=1)
    mean, deviation = kernel_distance(x, y, subsets=200, subset_size=50)
    assert abs(mean) < 0.2 * deviation
    with pytest.raises(UserError, match="subsets of 1000 images; there are only 400"):
        kernel_distance(x, y)


# --- Precision and recall -------------------------------------------------------------------------


def inside(points: np.ndarray, centres: np.ndarray, k: int) -> float:
    radii = np.sort(distance.cdist(centres, centres), axis=1)[:, k]
    return (distance.cdist(points, centres) <= radii).any(axis=1).mean()


@pytest.mark.parametrize("neighbours", [1, 3])
def test_precision_and_recall_equal_scipys(neighbours: int, monkeypatch):
    monkeypatch.setattr("tokenbridge_jax.evaluation.metrics._BLOCK", 13)
    reference, samples = features(60, 3), features(45, 3, shift=0.7, seed=1)[:, :3] * 0.7
    expected = inside(samples, reference, neighbours), inside(reference, samples, neighbours)
    assert precision_recall(reference, samples, neighbours) == pytest.approx(expected)
    assert expected[0] != expected[1]
    with pytest.raises(UserError, match="the samples has 3"):
        precision_recall(reference, samples[:3])


def test_precision_and_recall_of_a_subset():
    """All samples are reference images, but they cover only half of the reference."""
    reference = np.concatenate([features(50, 4), features(50, 4, shift=20)])
    assert precision_recall(reference, reference[:50]) == (1.0, 0.5)
