"""Samples against a reference: all numbers of generation at once, and where they come from."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from tokenbridge_jax.errors import UserError
from tokenbridge_jax.evaluation import inception, metrics
from tokenbridge_jax.evaluation.features import SetFeatures, extract
from tokenbridge_jax.evaluation.images import ARRAY, open_images
from tokenbridge_jax.evaluation.moments import Gaussian, gaussian

# Names of mean and covariance in files of statistics: ADM's, the release's, and those of JAX ports.
_POOL_NAMES = (("mu", "sigma"), ("ref_mu", "ref_sigma"))
_SPATIAL_NAMES = ("mu_s", "sigma_s")
_FEATURES = "pool_features"

# Reference images of precision and recall, as in ADM's figures.
MANIFOLD_IMAGES = 10_000

KID_SUBSET = 1000


class Reference(NamedTuple):
    """What samples are compared with.

    Attributes:
      path: of the file or folder.
      sha256: of the file's content; of a folder, of its images' keys.
      pool: mean and covariance of Inception's features.
      spatial: those of its spatial features, if they are known.
      features: Inception's features of images, if they are known; statistics alone have none.
    """

    path: Path
    sha256: str
    pool: Gaussian
    spatial: Gaussian | None
    features: Float[np.ndarray, "N 2048"] | None


def load_reference(path: str | Path, params: inception.Params, **arguments: Any) -> Reference:
    """Statistics from a file of them, or from images.

    Args:
      path: `.npz` with `mu` and `sigma` (or `ref_mu`, `ref_sigma`), perhaps `mu_s` and `sigma_s`,
        perhaps images as `arr_0`, as ADM publishes them; or images as `images.open_images` takes
        them.
      params: of Inception.
      **arguments: of `features.extract`.

    Raises:
      UserError: there are neither statistics nor images.
    """
    path = Path(path)
    if path.suffix != ".npz" or not path.is_file():
        return _from_features(path, extract(open_images(path), params, **arguments))
    try:
        with np.load(path, allow_pickle=False) as file:
            small = set(file.files) - {ARRAY}
            arrays = {name: file[name] for name in small}
            has_images = ARRAY in file.files
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    names = next((pair for pair in _POOL_NAMES if set(pair) <= small), None)
    if names is None:
        return _from_features(path, extract(open_images(path), params, **arguments))
    features = arrays.get(_FEATURES)
    if features is None and has_images:
        features = extract(open_images(path), params, **arguments).pool
    spatial = _gaussian(arrays, _SPATIAL_NAMES) if set(_SPATIAL_NAMES) <= small else None
    return Reference(path, _sha256(path), _gaussian(arrays, names), spatial, features)


def _gaussian(arrays: dict[str, np.ndarray], names: tuple[str, str]) -> Gaussian:
    mean, covariance = (arrays[name].astype(np.float64) for name in names)
    return Gaussian(mean, covariance)


def _from_features(path: Path, found: SetFeatures) -> Reference:
    digest = (
        _sha256(path)
        if path.is_file()
        else hashlib.sha256(np.sort(found.keys).tobytes()).hexdigest()
    )
    return Reference(path, digest, gaussian(found.pool), gaussian(found.spatial), found.pool)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def generation_scores(
    samples: SetFeatures, reference: Reference, neighbours: int = 3
) -> dict[str, float]:
    """FID, sFID, IS, KID, precision and recall, as far as the reference tells; by name.

    `inception_score` does not depend on the images' order, `inception_score_adm` is of neighbours,
    as ADM's evaluator computes it. FID and KID compare with all of the reference, precision and
    recall with its first 10,000 images in an order that follows from their content.
    """
    mean, deviation = metrics.inception_score(samples.logits, keys=samples.keys)
    scores = {
        "fid": metrics.frechet_distance(gaussian(samples.pool), reference.pool),
        "inception_score": mean,
        "inception_score_std": deviation,
        "inception_score_adm": metrics.inception_score(samples.logits)[0],
    }
    if reference.spatial is not None:
        scores["sfid"] = metrics.frechet_distance(gaussian(samples.spatial), reference.spatial)
    if reference.features is not None:
        real = reference.features
        if min(len(real), len(samples.pool)) >= KID_SUBSET:
            scores["kid"], scores["kid_std"] = metrics.kernel_distance(
                samples.pool, real, subset_size=KID_SUBSET
            )
        scores["precision"], scores["recall"] = metrics.precision_recall(
            real[:MANIFOLD_IMAGES], samples.pool, neighbours
        )
    return scores
