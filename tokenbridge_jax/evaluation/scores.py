"""Compares samples with a reference: all metrics of generation."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float
from ml_collections import ConfigDict

from tokenbridge_jax.evaluation import metrics
from tokenbridge_jax.evaluation.features import Extractor, SetFeatures, extract
from tokenbridge_jax.evaluation.image_sets import ARRAY, ImageSet, data_images, open_images
from tokenbridge_jax.evaluation.moments import Gaussian
from tokenbridge_jax.runtime import storage
from tokenbridge_jax.runtime.errors import UserError

# Names of mean and covariance in files of statistics: ADM's, and those of JAX ports.
_POOL_NAMES = (("mu", "sigma"), ("ref_mu", "ref_sigma"))
_SPATIAL_NAMES = ("mu_s", "sigma_s")
_FEATURES = "pool_features"
_FACTS = "facts"

# The value of --reference that stands for the config's training images.
OF_DATA = "data"

# Number of reference images for precision and recall, as in ADM's evaluator.
MANIFOLD_IMAGES = 10_000

PUBLISHED_SAMPLES = 50_000
KID_SUBSET = 1000
NEIGHBOURS = 3
SPLITS = 10


class Reference(NamedTuple):
    """What samples are compared with.

    Attributes:
      pool: mean and covariance of the features.
      spatial: the same for the spatial features, or None.
      features: of at most 10,000 images; None if only statistics are known.
      facts: the settings to report with any result.
    """

    pool: Gaussian
    spatial: Gaussian | None
    features: Float[np.ndarray, "N D"] | None
    facts: dict[str, Any]


def find_reference(
    path: str | Path,
    config: ConfigDict | None,
    extractor: Extractor,
    *,
    tokens: epath.PathLike | None = None,
    progress: bool = False,
) -> Reference:
    """Loads statistics, or computes them from images.

    Args:
      path: a file of `save_reference`; an `.npz` as ADM publishes them, with `mu` and `sigma` (or
        `ref_mu` and `ref_sigma`), optionally `mu_s` and `sigma_s`, and images as `arr_0`; images
        for `image_sets.open_images`; or "data" for the config's training images.
      config: describes the training images; needed only for "data".
      extractor: computes features of images.
      tokens: folder of token shards of the training images; see `image_sets.data_images`.
      progress: print rate and ETA to stderr.

    Raises:
      UserError: there are neither statistics nor images, or the statistics are of other features.
    """
    if path == OF_DATA and config is not None:
        images = data_images(config, "train", tokens=tokens)
        return reference_of(images, extractor, progress=progress)
    path = Path(storage.expand(path))
    arrays: dict[str, Any] = {}
    if path.suffix == ".npz" and path.is_file():
        with storage.open_npz(path) as archive:
            has_images = f"{ARRAY}.npy" in archive.namelist()
        # The images themselves are not read here.
        arrays = storage.read_npz(path, without=[ARRAY]) | {ARRAY: has_images}
    names = next((pair for pair in _POOL_NAMES if set(pair) <= set(arrays)), None)
    if names is None:
        if arrays and not arrays[ARRAY]:
            held = ", ".join(sorted(arrays.keys() - {ARRAY})) or "nothing"
            raise UserError(
                f"{path} holds {held}: a reference must have statistics, mu and sigma (or ref_mu "
                f"and ref_sigma), or images, {ARRAY}"
            )
        return reference_of(open_images(path), extractor, progress=progress)
    pool = _gaussian(path, arrays, names)
    if len(pool.mean) != extractor.size:
        raise UserError(
            f"{path} has statistics of {len(pool.mean)} features, not of {extractor.size}; check "
            "--features"
        )
    facts: dict[str, Any] = {"reference": path.name, "reference_sha256": storage.sha256(path)}
    if _FACTS in arrays:
        known = json.loads(str(arrays[_FACTS]))
        for name, value in extractor.facts.items():
            if (theirs := known["extractor"].get(name)) != value:
                raise UserError(
                    f"{path} was made with {name.replace('_', ' ')} {theirs}, not {value}: make it "
                    "again (tokenbridge evaluate reference)"
                )
        facts = known["images"] | facts | {"reference_of": known["images"]["reference"]}
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
    """Statistics of all images, and features of 10,000 of them, which their content determines."""
    found = extract(images, extractor, keep=MANIFOLD_IMAGES, progress=progress)
    facts = {
        "reference": images.path.name,
        "reference_sha256": storage.sha256(images.path) if images.path.is_file() else found.digest,
        "reference_images": found.count,
        "reference_manifold_images": len(found.kept),
        **{f"reference_{name}": value for name, value in images.facts.items()},
    }
    return Reference(found.pool, found.spatial, found.kept, facts)


def save_reference(path: epath.PathLike, reference: Reference, extractor: Extractor) -> None:
    """Writes statistics for `find_reference` and for other evaluators (`mu`, `sigma`)."""
    facts = json.dumps({"images": reference.facts, "extractor": dict(extractor.facts)})
    arrays = {"mu": reference.pool.mean, "sigma": reference.pool.covariance}
    arrays[_FACTS] = np.array(facts)
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mean, "sigma_s": reference.spatial.covariance}
    if reference.features is not None:
        arrays[_FEATURES] = reference.features
    storage.write_npz(path, arrays)


def _gaussian(path: Path, arrays: dict[str, np.ndarray], names: tuple[str, str]) -> Gaussian:
    try:
        mean, covariance = (np.asarray(arrays[name], np.float64) for name in names)
    except ValueError as error:
        raise UserError(f"{path}: {names[0]} and {names[1]} must be numbers") from error
    try:
        gaussian = Gaussian(mean, covariance)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    eigenvalues = np.linalg.eigvalsh(covariance)
    if eigenvalues[0] < -1e-4 * abs(eigenvalues[-1]):
        raise UserError(f"{path}: {names[1]} has negative eigenvalues, as no covariance has")
    return gaussian


def generation_scores(
    samples: SetFeatures, reference: Reference, distance: str = "fid"
) -> dict[str, float]:
    """Frechet distance, sFID, IS, KID, precision and recall, by name, if they can be computed.

    Frechet distance and sFID compare with the whole reference; KID, precision and recall with at
    most 10,000 of its images. Precision is the share of samples within the manifold of the
    reference, recall the share of the reference within the manifold of the samples. Only
    `inception_score_adm` depends on the order of the samples.

    Args:
      samples: from `features.extract`, with everything kept.
      reference: of the same extractor.
      distance: the name of the extractor's Frechet distance.
    """
    scores = {distance: metrics.frechet_distance(samples.pool, reference.pool)}
    if samples.spatial is not None and reference.spatial is not None:
        scores["sfid"] = metrics.frechet_distance(samples.spatial, reference.spatial)
    if samples.logits is not None and samples.count >= SPLITS:
        mean, deviation = metrics.inception_score(samples.logits, SPLITS, samples.keys)
        scores |= {"inception_score": mean, "inception_score_std": deviation}
        scores["inception_score_adm"] = metrics.adm_inception_score(samples.logits)
    if reference.features is not None:
        real, drawn = reference.features, samples.kept[np.argsort(samples.keys, kind="stable")]
        fewest = min(len(real), len(drawn))
        if fewest >= KID_SUBSET:
            mean, deviation = metrics.kernel_distance(drawn, real, subset_size=KID_SUBSET)
            scores |= {"kid": mean, "kid_std": deviation}
        if fewest > NEIGHBOURS:
            precision, recall = metrics.precision_recall(real, drawn, NEIGHBOURS)
            scores |= {"precision": precision, "recall": recall}
    return scores


def remarks(
    scores: Mapping[str, float],
    samples: SetFeatures,
    reference: Reference,
    facts: Mapping[str, Any],
) -> list[str]:
    """What a reader of the scores must know, as sentences."""
    notes = []
    size = len(samples.pool.mean)
    counts = {"samples": samples.count, "reference images": facts.get("reference_images")}
    for name, count in counts.items():
        if count is not None and count <= size:
            notes.append(
                f"{count} {name} have a singular covariance of {size} features: the Frechet "
                "distance is biased upwards"
            )
    sizes = [facts.get(f"{name}image_size") for name in ("", "reference_")]
    if None not in sizes and sizes[0] != sizes[1]:
        notes.append(f"samples of {sizes[0]} pixels are compared with references of {sizes[1]}")
    if "thumbnail_distance" in scores:
        notes.append("these scores use thumbnails: do not compare them with published ones")
        return notes
    if samples.count < PUBLISHED_SAMPLES:
        notes.append(
            f"published scores use {PUBLISHED_SAMPLES:,} samples; the Frechet distance of "
            f"{samples.count:,} samples is biased upwards"
        )
    if samples.logits is not None:
        notes += _remarks_on_inception_score(scores, samples.logits)
    if reference.features is None:
        notes.append("the reference has statistics but no images: no KID, precision and recall")
    elif len(reference.features) < MANIFOLD_IMAGES:
        notes.append(
            f"KID, precision and recall use {len(reference.features):,} reference images; "
            f"published precision and recall use {MANIFOLD_IMAGES:,}"
        )
    if reference.features is not None and "kid" not in scores:
        notes.append(f"no KID: it needs {KID_SUBSET:,} samples and reference images")
    return notes


def _remarks_on_inception_score(
    scores: Mapping[str, float], logits: Float[np.ndarray, "N 1008"]
) -> list[str]:
    if "inception_score" not in scores:
        return [f"no inception score: it needs {SPLITS} samples"]
    neighbours, _ = metrics.inception_score(logits, SPLITS)
    any_order, deviation = scores["inception_score"], scores["inception_score_std"]
    if abs(neighbours - any_order) <= max(3 * deviation, 0.01 * any_order):
        return []
    return [
        "these images are sorted, and ADM's inception score depends on their order "
        f"({scores['inception_score_adm']:.2f}; in ten splits {neighbours:.2f} as they are, "
        f"{any_order:.2f} in an order that does not depend on it): shuffle them"
    ]
