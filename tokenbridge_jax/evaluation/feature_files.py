"""Features that another program computed, as arrays in `.npz` files."""

from pathlib import Path
from typing import Any

import numpy as np

from tokenbridge_jax.evaluation import scores
from tokenbridge_jax.evaluation.features import SetFeatures, content_keys
from tokenbridge_jax.evaluation.moments import gaussian
from tokenbridge_jax.evaluation.scores import MANIFOLD_IMAGES, Reference
from tokenbridge_jax.runtime import storage
from tokenbridge_jax.runtime.errors import UserError

# Names of the array in a file: ours, that of an array that `np.savez` got without a name, and that
# of the evaluator of Stein et al. (2023), dgm-eval.
ARRAYS = ("features", "arr_0", "reps")
DISTANCE = "frechet_distance"


def compare(
    samples: str, reference: str, count: int | None = None
) -> tuple[dict[str, float], dict[str, Any], list[str]]:
    """Frechet distance, KID, precision and recall of two files.

    Args:
      samples: the file with features of generated images.
      reference: the file with features of real images, from the same network.
      count: the number of samples to use, evenly spaced; by default all.

    Returns:
      The metrics of `scores.generation_scores`, the facts they depend on, and remarks.

    Raises:
      UserError: a file cannot be used (see `read_features`), or the numbers of features differ.
    """
    found, real = read_features(samples, count), read_features(reference)
    sizes = [part.kept.shape[1] for part in (found, real)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{samples} has {sizes[0]} features of an image, {reference} {sizes[1]}: they are of "
            "different networks"
        )
    chosen = np.argsort(real.keys, kind="stable")[:MANIFOLD_IMAGES]
    facts = {
        "samples": found.count,
        "samples_from": Path(samples).name,
        "samples_digest": found.digest,
        "reference": Path(reference).name,
        "reference_sha256": storage.sha256(storage.expand(reference)),
        "reference_images": real.count,
        "reference_manifold_images": len(chosen),
        "features": f"{sizes[0]} numbers of an image, from the files",
    }
    compared = Reference(real.pool, None, real.kept[chosen], facts)
    metrics = scores.generation_scores(found, compared, DISTANCE)
    return metrics, facts, scores.remarks(metrics, found, compared, facts)


def read_features(path: str | Path, count: int | None = None) -> SetFeatures:
    """Reads the features of a set of images.

    Args:
      path: an `.npz` with one of `ARRAYS`: floats of shape [N, D], a row for every image.
      count: the number of rows to use, evenly spaced; by default all.

    Raises:
      UserError: the file cannot be read, has no such array or several, or the array has another
        shape or type, fewer than two rows, NaN or infinity.
    """
    path = Path(storage.expand(path))
    with storage.open_npz(path) as archive:
        held = [name.removesuffix(".npy") for name in archive.namelist()]
    names = [name for name in ARRAYS if name in held]
    if len(names) != 1:
        raise UserError(
            f"{path} holds {', '.join(sorted(held)) or 'nothing'}: features are one array "
            f"[images, features] named {' or '.join(ARRAYS)}"
        )
    # Other arrays may be of any kind, even pickles.
    rows = storage.read_npz(path, without=set(held) - set(names))[names[0]]
    if rows.ndim != 2 or rows.dtype.kind != "f" or not rows.shape[1]:
        raise UserError(
            f"{path}: {names[0]} must be floats of shape [images, features], not {rows.dtype} "
            f"{list(rows.shape)}"
        )
    if count is not None and count < len(rows):
        rows = rows[np.linspace(0, len(rows) - 1, count).round().astype(int)]
    try:
        moments = gaussian(rows)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return SetFeatures(len(rows), moments, None, rows, None, content_keys(rows))
