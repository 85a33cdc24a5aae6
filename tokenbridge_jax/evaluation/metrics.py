"""Metrics from features, in float64: FID and sFID, IS, KID, precision and recall.

Three depend on the order of the images: `adm_inception_score`, `inception_score` without keys, and
`kernel_distance`, which chooses random rows. For the last, sort the features by a key first.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Shaped
from scipy.special import log_softmax, logsumexp

from tokenbridge_jax.evaluation.moments import Gaussian
from tokenbridge_jax.runtime.errors import UserError

# Rows of distances that are computed together: with 50,000 columns, they take 0.4 GB.
_BLOCK = 1000


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """Squared Frechet distance of two normal distributions (Heusel et al., 2017, eq. 6).

    Tr (A B)^(1/2) is computed as the sum of the square roots of the eigenvalues of
    A^(1/2) B A^(1/2). This matrix is symmetric, so no iteration is needed, no imaginary part
    occurs, and the covariances may be singular.

    Raises:
      UserError: they have different numbers of features.
    """
    if one.mean.shape != other.mean.shape:
        raise UserError(
            f"statistics of {len(one.mean)} features cannot be compared with those of "
            f"{len(other.mean)}"
        )
    difference = one.mean - other.mean
    values, vectors = np.linalg.eigh(one.covariance)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    product = np.linalg.eigvalsh(root @ other.covariance @ root)
    trace = np.trace(one.covariance) + np.trace(other.covariance)
    return float(difference @ difference + trace - 2 * np.sqrt(np.maximum(product, 0)).sum())


def inception_score(
    logits: Shaped[np.ndarray, "N K"],
    splits: int = 10,
    keys: Shaped[np.ndarray, " N"] | None = None,
) -> tuple[float, float]:
    """exp of the mean KL divergence from the mean prediction (Salimans et al., 2016).

    Args:
      logits: of the classes, for every image.
      splits: the number of parts of (nearly) equal size that are scored separately.
      keys: a number for every image that depends on its content alone. The images are sorted by it,
        so that the splits do not depend on their order. Without keys they are not sorted.

    Returns:
      Mean and (population) standard deviation over the splits.

    Raises:
      UserError: there are fewer images than splits.
    """
    if len(logits) < splits:
        raise UserError(f"{len(logits)} images cannot be divided into {splits} splits")
    if keys is not None:
        logits = logits[np.argsort(keys, kind="stable")]
    return _score_parts(np.array_split(logits, splits))


def adm_inception_score(logits: Shaped[np.ndarray, "N K"], split_size: int = 5000) -> float:
    """The inception score of ADM's evaluator: consecutive parts of 5,000; the last may be shorter.

    It depends on the images' order: if they are sorted by class, it is far too low.
    """
    starts = range(0, len(logits), split_size)
    return _score_parts([logits[start : start + split_size] for start in starts])[0]


def _score_parts(parts: Sequence[np.ndarray]) -> tuple[float, float]:
    scores = []
    for part in parts:
        log_p = log_softmax(part.astype(np.float64), axis=1)
        log_mean = logsumexp(log_p, axis=0) - np.log(len(part))
        scores.append(np.exp((np.exp(log_p) * (log_p - log_mean)).sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(
    one: Shaped[np.ndarray, "N D"],
    other: Shaped[np.ndarray, "M D"],
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> tuple[float, float]:
    """KID: unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al., 2018).

    Args:
      one: features of the first set of images.
      other: features of the second set.
      subsets: the number of pairs of random subsets to compare, the same as in torch-fidelity.
      subset_size: the number of images in a subset.
      seed: of the random subsets.

    Returns:
      Mean and (population) standard deviation over the subsets.

    Raises:
      UserError: a set has fewer images than a subset.
    """
    fewest = min(len(one), len(other))
    if fewest < subset_size:
        raise UserError(f"KID compares subsets of {subset_size} images; there are only {fewest}")
    rng = np.random.RandomState(seed)
    found = []
    for _ in range(subsets):
        x = np.asarray(one[rng.choice(len(one), subset_size, replace=False)], np.float64)
        y = np.asarray(other[rng.choice(len(other), subset_size, replace=False)], np.float64)
        within = sum(kernel.sum() - np.trace(kernel) for kernel in (_cubic(x, x), _cubic(y, y)))
        between = _cubic(x, y).mean()
        found.append(within / (subset_size * (subset_size - 1)) - 2 * between)
    return float(np.mean(found)), float(np.std(found))


def _cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def precision_recall(
    reference: Shaped[np.ndarray, "N D"], samples: Shaped[np.ndarray, "M D"], neighbours: int = 3
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., 2019).

    Every image has a ball whose radius is the distance to its k-th nearest neighbour in its own
    set. Precision is the share of samples that lie in a ball of the reference. Recall is the share
    of reference images that lie in a ball of the samples. ADM uses 10,000 reference images and
    50,000 samples.

    Args:
      reference: features of real images.
      samples: features of generated images.
      neighbours: k.

    Raises:
      UserError: a set has no k-th neighbour.
    """
    for name, features in (("reference", reference), ("samples", samples)):
        if len(features) <= neighbours:
            raise UserError(
                f"precision and recall with {neighbours} neighbours need more than {neighbours} "
                f"images; the {name} has {len(features)}"
            )
    reference, samples = (np.asarray(a, np.float64) for a in (reference, samples))
    return (
        _share_inside(samples, reference, _radii(reference, neighbours)),
        _share_inside(reference, samples, _radii(samples, neighbours)),
    )


def _radii(features: Float[np.ndarray, "N D"], neighbours: int) -> Float[np.ndarray, " N"]:
    """Squared distance of every point to its k-th neighbour; a point is its own 0-th."""
    kth = [
        np.partition(block, neighbours, axis=1)[:, neighbours]
        for block in _distances(features, features)
    ]
    return np.concatenate(kth)


def _share_inside(
    points: Float[np.ndarray, "N D"], centres: Float[np.ndarray, "M D"], radii: np.ndarray
) -> float:
    inside = [(block <= radii).any(axis=1) for block in _distances(points, centres)]
    return float(np.concatenate(inside).mean())


def _distances(
    x: Float[np.ndarray, "N D"], y: Float[np.ndarray, "M D"]
) -> Iterator[Float[np.ndarray, "n M"]]:
    """Squared distances in blocks of rows."""
    # Without a common offset, the terms that nearly cancel are smaller, and so is their rounding.
    centre = y.mean(axis=0)
    x, y = x - centre, y - centre
    y_norms = (y * y).sum(axis=1)
    for start in range(0, len(x), _BLOCK):
        block = x[start : start + _BLOCK]
        squares = (block * block).sum(axis=1)[:, None] + y_norms[None] - 2 * block @ y.T
        yield np.maximum(squares, 0)
