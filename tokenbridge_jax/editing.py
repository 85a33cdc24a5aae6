"""Editing images: some positions are drawn anew, the others stay.

A mask of pixels says what is drawn anew; a position is hidden where any pixel of its patch is.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Shaped, UInt8
from scipy.ndimage import distance_transform_edt

from tokenbridge_jax.errors import UserError
from tokenbridge_jax.sampling import Preview

if TYPE_CHECKING:
    from tokenbridge_jax.pipeline import ClassId, Pipeline


def edit(
    pipeline: "Pipeline",
    images: np.ndarray,
    mask: np.ndarray | None,
    class_id: "ClassId | Sequence[ClassId]",
    *,
    keep: float | None = None,
    blend: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
    preview: Preview | None = None,
    preview_every: int = 1,
    **settings: Any,
) -> UInt8[np.ndarray, "*B H W I"]:
    """Draws the masked part of images anew, given the rest of them and a class.

    For every number of hidden positions there is a program to compile.

    Args:
      pipeline: draws them.
      images: uint8 `[B, H, W, I]` or one `[H, W, I]`, of the size the model draws.
      mask: bool `[H, W]`, or `[B, H, W]` with one for each image; True where something new is to be
        drawn. None draws variations of whole images, with `keep`.
      class_id: of the new part, as `Pipeline.labels` takes them: one for all, or a list with one
        for each image.
      keep: share of the masked positions, above 0 and below 1, to keep all the same, at random.
      blend: None gives what the autoencoder decodes, kept parts included. A number puts the
        original pixels back outside the mask, with a ramp so many pixels wide; 0 is a hard edge.
      seed: image i is the same for the same seed, whatever else is edited beside it.
      batch_size: images at once.
      progress: print rate and ETA to stderr.
      preview: called with the steps done, their number, and the decoded images of a batch, which
        has images with equally many hidden positions. What is hidden still is that of the original.
      preview_every: so many steps.
      **settings: fields of `SamplingSettings`.

    Returns:
      As many images. The indices of kept positions are those of `Pipeline.encode`.

    Raises:
      UserError: an image, a mask or a setting does not fit, or a mask hides nothing or everything.
    """
    single = images.ndim == 3
    images = images[None] if single else images
    _check_images(pipeline, images)
    if blend is not None and blend < 0:
        raise UserError(f"blend={blend} must be 0 or more pixels")
    hidden = hidden_positions(mask, images.shape[:3], _patch(pipeline), keep, seed)
    one_each = isinstance(class_id, Sequence | np.ndarray) and not isinstance(class_id, str)
    class_ids: Any = class_id if one_each else [class_id] * len(images)
    if len(class_ids) != len(images):
        raise UserError(f"there are {len(class_ids)} classes for {len(images)} images")

    indices = pipeline.generate_indices(
        class_ids,
        known=_in_batches(pipeline.encode, images, batch_size),
        hidden=hidden,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
        preview=preview and (lambda done, steps, x: preview(done, steps, pipeline.decode(x))),
        preview_every=preview_every,
        **settings,
    )
    edited = _in_batches(pipeline.decode, indices, batch_size)
    if blend is not None:
        redrawn = _pixels(hidden, images.shape[:3], _patch(pipeline))
        if mask is not None:
            redrawn &= mask
        edited = blend_images(images, edited, redrawn, blend)
    return edited[0] if single else edited


def hidden_positions(
    mask: np.ndarray | None,
    shape: tuple[int, int, int],
    patch: int,
    keep: float | None = None,
    seed: int = 0,
) -> Bool[np.ndarray, "B L"]:
    """The positions that a mask hides, row-major.

    Args:
      mask: as for `edit`.
      shape: number, height and width of the images.
      patch: pixels a side of one position.
      keep: as for `edit`.
      seed: with an image's number, of the choice of what to keep.

    Raises:
      UserError: a mask does not fit, or hides nothing or everything.
    """
    count, height, width = shape
    if mask is None:
        if keep is None:
            raise UserError("nothing says what to draw anew: give a mask, or keep for variations")
        mask = np.ones((height, width), bool)
    if keep is not None and not 0 < keep < 1:
        raise UserError(f"keep={keep} must be a share above 0 and below 1")
    if mask.dtype != bool:
        raise UserError(f"the mask must be bool, True where to draw anew, not {mask.dtype}")
    if mask.shape not in ((height, width), (count, height, width)):
        raise UserError(
            f"the mask's shape {mask.shape} is neither that of an image, {(height, width)}, nor "
            f"that of all, {(count, height, width)}"
        )
    patches = (count, height // patch, patch, width // patch, patch)
    hidden = np.broadcast_to(mask, shape).reshape(patches).any(axis=(2, 4)).reshape(count, -1)
    for image, row in enumerate(hidden):
        if not row.any():
            raise UserError(f"the mask of image {image} is empty: there is nothing to draw anew")
        if keep is not None:
            masked = np.flatnonzero(row)
            kept = min(max(round(keep * len(masked)), 1), len(masked) - 1)
            rng = np.random.default_rng([seed % 2**32, image])
            row[rng.permutation(masked)[:kept]] = False
        elif row.all():
            raise UserError(
                f"the mask covers all positions of image {image}: nothing would be kept; generate "
                "draws whole images, and keep=0.1 keeps a share"
            )
    return hidden


def blend_images(
    original: UInt8[np.ndarray, "B H W I"],
    edited: UInt8[np.ndarray, "B H W I"],
    redrawn: Bool[np.ndarray, "B H W"],
    ramp: int,
) -> UInt8[np.ndarray, "B H W I"]:
    """Edited pixels where redrawn, original ones elsewhere, mixed over `ramp` pixels outside."""
    distance = np.stack([np.asarray(distance_transform_edt(~image)) for image in redrawn])
    share = np.clip(1 - distance / (ramp + 1), 0, 1)[..., None]
    return np.round(share * edited + (1 - share) * original).astype(np.uint8)


def _check_images(pipeline: "Pipeline", images: np.ndarray) -> None:
    if images.ndim != 4 or images.dtype != np.uint8 or not len(images):
        raise UserError(
            "images must be uint8 of shape [B, H, W, channels] or [H, W, channels], not "
            f"{images.dtype} {list(images.shape)}"
        )
    pipeline.codec.config.check_image_size(*images.shape[1:3])
    side = round(pipeline.config.positions**0.5) * _patch(pipeline)
    if images.shape[1:3] != (side, side):
        raise UserError(
            f"images are {images.shape[1]}x{images.shape[2]}, the model draws {side}x{side} pixels"
        )


def _patch(pipeline: "Pipeline") -> int:
    return pipeline.codec.config.downsampling


def _pixels(
    hidden: Bool[np.ndarray, "B L"], shape: tuple[int, int, int], patch: int
) -> Bool[np.ndarray, "B H W"]:
    count, height, width = shape
    grid = hidden.reshape(count, height // patch, width // patch)
    return grid.repeat(patch, axis=1).repeat(patch, axis=2)


def _in_batches(
    function: Callable[[np.ndarray], np.ndarray], values: Shaped[np.ndarray, "B ..."], size: int
) -> Shaped[np.ndarray, "B ..."]:
    return np.concatenate([function(values[i : i + size]) for i in range(0, len(values), size)])
