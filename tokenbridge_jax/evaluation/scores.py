"""Samples against a reference: all numbers of generation at once."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float
from ml_collections import ConfigDict

from tokenbridge_jax.errors import UserError
from tokenbridge_jax.evaluation import metrics
from tokenbridge_jax.evaluation.features import Extractor, SetFeatures, extract
from tokenbridge_jax.evaluation.images import (
    ARRAY,
    ImageSet,
    data_images,
    open_images,
    write_npz,
)
from tokenbridge_jax.evaluation.moments import Gaussian

# Names of mean and covariance in files of statistics: ADM's, the release's, and those of JAX ports.
_POOL_NAMES = (("mu", "sigma"), ("ref_mu", "ref_sigma"))
_SPATIAL_NAMES = ("mu_s", "sigma_s")
_FEATURES = "pool_features"
_FACTS = "facts"

# A reference that is no file.
OF_DATA = "data"

# Reference images of precision and recall, as in ADM's figures.
MANIFOLD_IMAGES = 10_000

KID_SUBSET = 1000
NEIGHBOURS = 3
SPLITS = 10


class Reference(NamedTuple):
    """What samples are compared with.

    Attributes:
      pool: mean and covariance of the features.
      spatial: those of the spatial features, if they are known.
      features: of images, at most 10,000, if they are known; statistics alone have none.
      facts: what a figure has to state of it.
    """

    pool: Gaussian
    spatial: Gaussian | None
    features: Float[np.ndarray, "N D"] | None
    facts: dict[str, Any]


def find_reference(
    path: str, config: ConfigDict, extractor: Extractor, *, progress: bool = False
) -> Reference:
    """`load_reference(path)`, or with "data" the statistics of the config's training images."""
    if path == OF_DATA:
        return reference_of(data_images(config, "train"), extractor, progress=progress)
    return load_reference(path, extractor, progress=progress)


def load_reference(path: str | Path, extractor: Extractor, *, progress: bool = False) -> Reference:
    """Statistics from a file of them, or from images.

    Args:
      path: `.npz` with `mu` and `sigma` (or `ref_mu`, `ref_sigma`), perhaps `mu_s` and `sigma_s`,
        perhaps images as `arr_0`, as ADM publishes them; what `save_reference` wrote; or images as
        `images.open_images` takes them.
      extractor: of features of images.
      progress: print rate and ETA to stderr.

    Raises:
      UserError: there are neither statistics nor images, or the statistics are of other features.
    """
    path = Path(path)
    arrays = _statistics(path) if path.suffix == ".npz" and path.is_file() else {}
    names = next((pair for pair in _POOL_NAMES if set(pair) <= set(arrays)), None)
    if names is None:
        return reference_of(open_images(path), extractor, progress=progress)
    pool = _gaussian(path, arrays, names)
    if len(pool.mean) != extractor.size:
        raise UserError(
            f"{path} has statistics of {len(pool.mean)} features, not of the {extractor.size} "
            "compared here; check --features"
        )
    facts: dict[str, Any] = {"reference": path.name, "reference_sha256": _sha256(path)}
    if _FACTS in arrays:
        facts |= json.loads(str(arrays[_FACTS]))
    features = arrays.get(_FEATURES)
    if features is None and arrays[ARRAY]:
        images = open_images(path)
        features = extract(images, extractor, keep=MANIFOLD_IMAGES, progress=progress).kept
    if features is not None:
        facts["reference_manifold_images"] = len(features)
    has_spatial = set(_SPATIAL_NAMES) <= set(arrays)
    spatial = _gaussian(path, arrays, _SPATIAL_NAMES) if has_spatial else None
    return Reference(pool, spatial, features, facts)


def reference_of(images: ImageSet, extractor: Extractor, *, progress: bool = False) -> Reference:
    """Statistics of all images, and features of 10,000 of them, chosen by their content."""
    found = extract(images, extractor, keep=MANIFOLD_IMAGES, progress=progress)
    facts = {
        "reference": images.path.name,
        "reference_sha256": _sha256(images.path) if images.path.is_file() else found.digest,
        "reference_images": found.count,
        "reference_manifold_images": len(found.kept),
        **{f"reference_{name}": value for name, value in images.facts.items()},
    }
    return Reference(found.pool, found.spatial, found.kept, facts)


def save_reference(path: epath.PathLike, reference: Reference, extractor: Extractor) -> None:
    """Writes statistics that `load_reference` reads, and so do other evaluators (`mu`, `sigma`)."""
    arrays = {
        "mu": reference.pool.mean,
        "sigma": reference.pool.covariance,
        _FACTS: np.array(json.dumps(reference.facts | dict(extractor.facts))),
    }
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mean, "sigma_s": reference.spatial.covariance}
    if reference.features is not None:
        arrays[_FEATURES] = reference.features
    write_npz(path, arrays)


def _statistics(path: Path) -> dict[str, Any]:
    """The arrays of a file but for its images, of which is told only whether there are any."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name != ARRAY}
            return arrays | {ARRAY: ARRAY in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _gaussian(path: Path, arrays: dict[str, np.ndarray], names: tuple[str, str]) -> Gaussian:
    mean, covariance = (np.asarray(arrays[name], np.float64) for name in names)
    if mean.ndim != 1 or covariance.ndim != 2:
        raise UserError(
            f"{path}: {names[0]} and {names[1]} must be a vector and a matrix, not of shapes "
            f"{mean.shape} and {covariance.shape}"
        )
    try:
        return Gaussian(mean, covariance)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def generation_scores(samples: SetFeatures, reference: Reference) -> dict[str, float]:
    """FID, sFID, IS, KID, precision and recall, as far as extractor and reference tell; by name.

    `inception_score` does not depend on the images' order, `inception_score_adm` is of neighbours,
    as ADM's evaluator computes it. FID and KID compare with all of the reference, precision and
    recall with its (at most) 10,000 images: precision is the share of samples within the
    reference's manifold, recall that of the reference within the samples'.
    """
    scores = {"fid": metrics.frechet_distance(samples.pool, reference.pool)}
    if samples.spatial is not None and reference.spatial is not None:
        scores["sfid"] = metrics.frechet_distance(samples.spatial, reference.spatial)
    if samples.logits is not None and samples.count >= SPLITS:
        mean, deviation = metrics.inception_score(samples.logits, SPLITS, samples.keys)
        scores["inception_score"], scores["inception_score_std"] = mean, deviation
        scores["inception_score_adm"], _ = metrics.inception_score(samples.logits, SPLITS)
    if reference.features is not None:
        fewest = min(len(reference.features), len(samples.kept))
        if fewest >= KID_SUBSET:
            scores["kid"], scores["kid_std"] = metrics.kernel_distance(
                samples.kept, reference.features, subset_size=KID_SUBSET
            )
        if fewest > NEIGHBOURS:
            scores["precision"], scores["recall"] = metrics.precision_recall(
                reference.features, samples.kept, NEIGHBOURS
            )
    return scores


def remarks(scores: dict[str, float], samples: SetFeatures, reference: Reference) -> list[str]:
    """What a reader of the scores must know, in sentences."""
    said = []
    size = len(samples.pool.mean)
    if samples.count <= size:
        said.append(
            f"{samples.count} samples have a singular covariance of {size} features: FID is biased "
            f"upwards; published figures take 50,000"
        )
    adm, shuffled = (scores.get(f"inception_score{name}", 0.0) for name in ("_adm", ""))
    if adm and abs(adm - shuffled) > max(3 * scores["inception_score_std"], 0.01 * shuffled):
        said.append(
            f"ADM's inception score depends on the images' order: {adm:.2f} as they come, "
            f"{shuffled:.2f} in an order that follows from their content; shuffle sorted files"
        )
    if reference.features is None:
        said.append("the reference has statistics but no images: no KID, precision and recall")
    elif len(reference.features) < MANIFOLD_IMAGES:
        said.append(
            f"precision and recall see {len(reference.features)} reference images; published "
            f"figures take {MANIFOLD_IMAGES:,}"
        )
    if reference.features is not None and "kid" not in scores:
        said.append(f"KID needs {KID_SUBSET} samples and reference images")
    if samples.logits is not None and "inception_score" not in scores:
        said.append(f"the inception score needs {SPLITS} samples, there are {samples.count}")
    return said
