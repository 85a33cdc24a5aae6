"""Scores of an autoencoder's reconstructions while it is trained: one pass over some images."""

import collections
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from tokenbridge_jax.autoencoder import images_to_float
from tokenbridge_jax.evaluation.features import Extractor
from tokenbridge_jax.evaluation.image_sets import rgb
from tokenbridge_jax.evaluation.metrics import frechet_distance
from tokenbridge_jax.evaluation.moments import Moments
from tokenbridge_jax.evaluation.pixels import WINDOW, similarity
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.training.autoencoder_task import one_behind

Images = UInt8[Array, "B H W I"]


def make_scores(
    reconstruct: Callable[[Any, Any], Any],
    mesh: Mesh,
    extractor: Extractor | None = None,
    perceptual: Callable[[Array, Array], Array] | None = None,
) -> Callable[[Any, Iterator[Any]], dict[str, float]]:
    """Makes the pass over batches of `autoencoder_task.picture_batches`.

    Args:
      reconstruct: parameters and uint8 images -> uint8 images.
      mesh: the devices.
      extractor: of features, for a Frechet distance between originals and reconstructions; not
        every process needs one.
      perceptual: as in `autoencoder_task.Perceptual`, for LPIPS.

    Returns:
      A function of parameters and batches. Its result has the means over images of `psnr` in
      decibels, `ssim` (as `pixels.ssim`, for images of 7 pixels or more) and `lpips`, and the
      extractor's `distance`.
    """

    def compare(params: Any, batch: Any) -> tuple[Any, dict[str, Float[Array, ""]]]:
        images, weights = batch["images"], batch["weights"]
        decoded = reconstruct(params, images)
        found = {"weight": jnp.ones_like(weights), "psnr": _psnr(decoded, images)}
        if min(images.shape[1:3]) >= WINDOW:
            found["ssim"] = _ssim(decoded, images)
        if perceptual:
            found["lpips"] = perceptual(images_to_float(decoded), images_to_float(images))
        sums = {name: jnp.sum(weights * values) for name, values in found.items()}
        return (images, decoded, weights), sums

    jitted = jax.jit(compare, out_shardings=meshes.replicated(mesh))

    def run(params: Any, batches: Iterator[Any]) -> dict[str, float]:
        moments = [Moments(extractor.size) for _ in range(2)] if extractor else []
        total = collections.Counter[str]()
        for compared, sums in one_behind(jitted(params, batch) for batch in batches):
            total.update({name: float(value) for name, value in sums.items()})
            if extractor:
                *pair, weights = map(np.asarray, compared)
                for found, images in zip(moments, pair, strict=True):
                    _extract(extractor, rgb(images[weights > 0]), found)
        weight = total.pop("weight")
        result = {name: value / weight for name, value in total.items()}
        if extractor:
            result[extractor.distance] = frechet_distance(*(x.gaussian() for x in moments))
        return result

    return run


def _extract(extractor: Extractor, images: UInt8[np.ndarray, "N H W 3"], moments: Moments) -> None:
    for start in range(0, len(images), extractor.batch_size):
        moments.update(extractor(images[start : start + extractor.batch_size]).pool)


def _psnr(one: Images, other: Images) -> Float[Array, " B"]:
    one, other = one.astype(jnp.float32), other.astype(jnp.float32)
    # A perfect image would have an infinite ratio: the smallest error is half a level in one pixel
    # value.
    least = 0.25 / one[0].size
    error = jnp.maximum(jnp.mean(jnp.square(one - other), axis=(1, 2, 3)), least)
    return 10 * jnp.log10(255.0**2 / error)


def _ssim(one: Images, other: Images) -> Float[Array, " B"]:
    """`pixels.ssim` on the devices, in float32."""

    def mean(x: Array) -> Array:
        window = (1, WINDOW, WINDOW, 1)
        total = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, (1,) * 4, "VALID")
        return total / WINDOW**2

    grey = 127.5
    a, b = one.astype(jnp.float32) - grey, other.astype(jnp.float32) - grey
    return jnp.mean(similarity(a, b, mean, grey), axis=(1, 2, 3))
