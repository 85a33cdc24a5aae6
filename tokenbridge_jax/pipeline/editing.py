"""Editing images: the model redraws some positions and keeps the others.

A mask of pixels says what to redraw. A position is hidden if the mask touches any pixel of its
patch. The encoder looks beyond a position's own pixels, so the pixels of hidden positions are
filled from visible ones before an image is encoded. Two images that differ only in hidden positions
therefore have the same edits.

Images larger than the model's are drawn in overlapping *windows* of the model's size. Each window
is an edit; its known part includes what earlier windows have drawn. The autoencoder is
convolutional, so it encodes and decodes the large image at once.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import scipy
from jaxtyping import Bool, Shaped, UInt8

from tokenbridge_jax.codec import Codec, check_images, in_batches
from tokenbridge_jax.data.images import MAX_PIXELS
from tokenbridge_jax.model_config import TokenBridgeConfig
from tokenbridge_jax.pipeline.description import ClassId
from tokenbridge_jax.pipeline.filling import fill_hidden
from tokenbridge_jax.runtime import checks
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.progress import Progress
from tokenbridge_jax.sampling.batches import BATCH_SIZE, Preview


@runtime_checkable
class Drawer(Protocol):
    """The part of a `Pipeline` that editing uses; `edit` and `outpaint` are methods of one."""

    config: TokenBridgeConfig
    codec: Codec
    grid: int
    patch_size: int
    image_size: int

    def decode(self, indices: Any) -> np.ndarray:
        """As `Pipeline.decode`."""

    def generate_indices(self, class_ids: Any, **arguments: Any) -> np.ndarray:
        """As `Pipeline.generate_indices`."""


def edit(
    pipeline: Drawer,
    images: UInt8[np.ndarray, "*B H W I"] | Any,
    mask: Bool[np.ndarray, "*B H W"] | Any,
    class_id: ClassId | Sequence[ClassId] | Any,
    *,
    keep: float | Any = None,
    encode_hidden: bool | None = None,
    blend: int | Any = None,
    seed: int | Any = 0,
    batch_size: int | Any = BATCH_SIZE,
    progress: bool = False,
    preview: Preview | Any = None,
    preview_every: int | Any = 1,
    **settings: Any,
) -> UInt8[np.ndarray, "*B H W I"]:
    """Redraws the masked part of images, given their other parts and a class.

    Masks that hide up to an eighth, a quarter, half, or all positions share a compiled program.

    Args:
      pipeline: draws the positions.
      images: uint8 `[B, H, W, I]` or one `[H, W, I]`, of the size the model draws.
      mask: bool `[H, W]`, or `[B, H, W]` with one mask for each image; True where to redraw. None
        redraws whole images except for the share `keep`, which gives variations.
      class_id: class of the new part, as in `Pipeline.labels`: one class for all images, or a list
        with one for each image.
      keep: share of the masked positions to keep, chosen at random; above 0 and below 1.
      encode_hidden: True shows the encoder the whole image, so that the edit resembles it: for
        touch-ups. False shows it only visible pixels, and fills the others from them. None is True
        if `keep` is given, because variations should resemble the image, and False otherwise.
      blend: None returns what the autoencoder decodes, including kept parts. A number puts the
        original pixels back outside the mask, with a ramp of that many pixels; 0 is a hard edge.
      seed: the edit of image i depends on the seed and on i, but not on the other images.
      batch_size: images at once.
      progress: print rate and ETA to stderr.
      preview: called with the steps done, the number of steps, and the decoded images of a batch.
        All images of a batch have equally many hidden positions. Positions that are still hidden
        show what was encoded.
      preview_every: number of steps between two calls.
      **settings: fields of `SamplingSettings`.

    Returns:
      As many images. With `encode_hidden`, kept positions have the indices of `Pipeline.encode`.

    Raises:
      UserError: an image, a mask or a setting does not fit, or a mask hides nothing or everything.
    """
    images, single = _batch(pipeline, images, pipeline.image_size)
    batch_size, seed, blend = _check(batch_size, seed, blend, preview)
    mask = None if mask is None else np.asarray(checks.to_array("mask", mask))
    hidden = hidden_positions(mask, images.shape[:3], pipeline.patch_size, keep, seed)
    encode_hidden = keep is not None if encode_hidden is None else encode_hidden
    indices = pipeline.generate_indices(
        _class_list(class_id, len(images)),
        known=_encode(pipeline, images, hidden, encode_hidden, batch_size),
        hidden=hidden.reshape(len(images), -1),
        seed=seed,
        batch_size=batch_size,
        progress=progress,
        preview=preview and (lambda done, steps, x: preview(done, steps, pipeline.decode(x))),
        preview_every=preview_every,
        **settings,
    )
    edited = in_batches(pipeline.decode, indices, batch_size)
    if blend is not None:
        edited = blend_images(images, edited, _redrawn(hidden, mask, pipeline.patch_size), blend)
    return edited[0] if single else edited


def outpaint(
    pipeline: Drawer,
    images: UInt8[np.ndarray, "*B H W I"] | Any,
    class_id: ClassId | Sequence[ClassId] | Any,
    *,
    left: int | Any = 0,
    top: int | Any = 0,
    right: int | Any = 0,
    bottom: int | Any = 0,
    mask: Bool[np.ndarray, "*B H W"] | Any = None,
    overlap: float | Any = 0.5,
    encode_hidden: bool = False,
    blend: int | Any = None,
    seed: int | Any = 0,
    batch_size: int | Any = BATCH_SIZE,
    progress: bool = False,
    preview: Preview | Any = None,
    **settings: Any,
) -> UInt8[np.ndarray, "*B height width I"]:
    """Draws margins around images, window by window, from the known part outwards.

    Args:
      pipeline: draws the windows.
      images: uint8 `[B, H, W, I]` or one `[H, W, I]`. Height and width are multiples of the
        autoencoder's downsampling and, with the margins, at least the size the model draws.
      class_id: class of the new part, as in `edit`.
      left: pixels to add at this side, a multiple of the downsampling.
      top: likewise.
      right: likewise.
      bottom: likewise.
      mask: bool `[H, W]` or `[B, H, W]`: the part of the images themselves to redraw.
      overlap: share of a window's side that it has in common with the next window; at least 0 and
        below 1.
      encode_hidden: as in `edit`, for positions that the mask hides.
      blend: as in `edit`; margins count as masked.
      seed: the result for image i depends on the seed and on i, but not on the other images.
      batch_size: windows at once, each of another image.
      progress: print windows done, rate and ETA to stderr.
      preview: called after every window with the number of windows done in each image, the largest
        number of windows of an image, and the decoded images.
      **settings: fields of `SamplingSettings`.

    Returns:
      As many images, with their margins.

    Raises:
      UserError: an image, a margin, the mask or a setting does not fit.
    """
    images, single = _batch(pipeline, images)
    batch_size, seed, blend = _check(batch_size, seed, blend, preview)
    margins = _margins(pipeline, images, left=left, top=top, right=right, bottom=bottom)
    if not 0 <= checks.number("overlap", overlap) < 1:
        raise UserError(f"overlap={overlap} must be a share from 0 to below 1")
    patch = pipeline.patch_size
    count, height, width = images.shape[:3]
    if mask is None:
        if not np.any(margins):
            raise UserError("nothing is to be redrawn: give left, top, right, bottom or mask")
        hidden = np.zeros((count, height // patch, width // patch), bool)
    else:
        mask = np.asarray(checks.to_array("mask", mask))
        hidden = hidden_positions(mask, images.shape[:3], patch)
        mask = np.pad(
            np.broadcast_to(mask, images.shape[:3]), [(0, 0), *margins], constant_values=True
        )
    class_ids = _class_list(class_id, count)

    border = [(0, 0), *((before // patch, after // patch) for before, after in margins)]
    to_draw = np.pad(hidden, border, constant_values=True)
    # The autoencoder takes as many positions at once as the model does.
    batch = max(1, batch_size * pipeline.config.positions // to_draw[0].size)
    indices = _encode(pipeline, images, hidden, encode_hidden, batch).reshape(*hidden.shape, -1)
    nothing = pipeline.config.quantizer.blank
    canvas = np.pad(indices, [*border, (0, 0)], constant_values=nothing)
    decode = functools.partial(in_batches, pipeline.codec.decode_maps, canvas, batch)
    settings |= dict(overlap=overlap, seed=seed, progress=progress, batch_size=batch_size)
    for done, most in draw_windows(pipeline, class_ids, canvas, to_draw, **settings):
        if preview is not None:
            preview(done, most, decode())
    drawn = decode()
    if blend is not None:
        original = np.pad(images, [(0, 0), *margins, (0, 0)])
        drawn = blend_images(original, drawn, _redrawn(to_draw, mask, patch), blend)
    return drawn[0] if single else drawn


def draw_windows(
    pipeline: Drawer,
    class_ids: Sequence[ClassId],
    canvas: Shaped[np.ndarray, "B height width C"],
    hidden: Bool[np.ndarray, "B height width"],
    *,
    overlap: float,
    seed: int,
    progress: bool = False,
    **arguments: Any,
) -> Iterator[tuple[int, int]]:
    """Draws the hidden positions of a canvas in place, each in the first window that contains it.

    Args:
      pipeline: draws the k-th windows of all images together, with the k-th seed.
      class_ids: one for each image.
      canvas: indices, with at least as many positions on a side as the model has.
      hidden: the positions to draw.
      overlap: as in `outpaint`.
      seed: for the first windows; the seeds of the others are derived from it.
      progress: as in `outpaint`.
      **arguments: for `Pipeline.generate_indices`.

    Yields:
      After every window, the number of windows done in each image, and the largest number of
      windows of an image.
    """
    grid = pipeline.grid
    stride = max(1, round(grid * (1 - overlap)))
    visits = [list(_windows(image, grid, stride)) for image in hidden]
    most = max(map(len, visits))
    # With one seed for all windows, all would have the same noise.
    others = np.random.SeedSequence(seed).generate_state(most - 1).tolist()
    left = hidden.copy()
    with Progress(sum(map(len, visits)), "windows", "outpaint", visible=progress) as bar:
        for done, window_seed in enumerate([seed, *others], 1):
            images = [image for image, windows in enumerate(visits) if len(windows) >= done]
            at = {image: (image, *visits[image][done - 1]) for image in images}
            known = np.zeros((len(visits), grid, grid, canvas.shape[-1]), canvas.dtype)
            to_draw = np.zeros((len(visits), grid, grid), bool)
            for image, window in at.items():
                known[image], to_draw[image] = canvas[window], left[window]
            drawn = pipeline.generate_indices(
                class_ids,
                known=known.reshape(len(visits), grid * grid, -1),
                hidden=to_draw.reshape(len(visits), -1),
                seed=window_seed,
                **arguments,
            ).reshape(known.shape)
            for image, window in at.items():
                canvas[window], left[window] = drawn[image], False
            bar.update(len(images))
            yield done, most


def _windows(
    hidden: Bool[np.ndarray, "height width"], grid: int, stride: int
) -> Iterator[tuple[slice, slice]]:
    """Windows in drawing order: next is always one with the fewest (but some) hidden positions."""
    left = hidden.copy()
    starts = [[*range(0, extent - grid, stride), extent - grid] for extent in hidden.shape]
    windows = [np.s_[y : y + grid, x : x + grid] for y, x in itertools.product(*starts)]
    while left.any():
        window = min((w for w in windows if left[w].any()), key=lambda w: left[w].sum())
        left[window] = False
        yield window


def hidden_positions(
    mask: np.ndarray | None,
    shape: tuple[int, int, int],
    patch: int,
    keep: float | Any = None,
    seed: int = 0,
) -> Bool[np.ndarray, "B h w"]:
    """Finds the positions that a mask hides.

    Args:
      mask: as in `edit`.
      shape: number, height and width of the images.
      patch: side of one position in pixels.
      keep: as in `edit`.
      seed: with an image's number, determines which positions are kept.

    Raises:
      UserError: a mask does not fit, or hides nothing or everything.
    """
    count, height, width = shape
    if mask is None:
        if keep is None:
            raise UserError("nothing is to be redrawn: give a mask, or keep for variations")
        mask = np.ones((height, width), bool)
    if keep is not None and not 0 < checks.number("keep", keep) < 1:
        raise UserError(f"keep={keep} must be a share above 0 and below 1")
    if mask.dtype != bool:
        raise UserError(f"the mask must be bool, True where to redraw, not {mask.dtype}")
    if mask.shape not in ((height, width), (count, height, width)):
        raise UserError(
            f"the mask's shape {mask.shape} is neither that of an image, {(height, width)}, nor "
            f"that of all, {(count, height, width)}"
        )
    patches = (count, height // patch, patch, width // patch, patch)
    hidden = np.broadcast_to(mask, shape).reshape(patches).any(axis=(2, 4)).reshape(count, -1)
    for image, row in enumerate(hidden):
        if not row.any():
            raise UserError(f"the mask of image {image} is empty: there is nothing to redraw")
        if keep is not None:
            masked = np.flatnonzero(row)
            kept = min(max(round(keep * len(masked)), 1), len(masked) - 1)
            rng = np.random.default_rng([seed, image])
            row[rng.permutation(masked)[:kept]] = False
        elif row.all():
            raise UserError(
                f"the mask covers all positions of image {image}: nothing would be kept; generate "
                "draws whole images, and keep=0.1 keeps a share"
            )
    return hidden.reshape(count, height // patch, width // patch)


def blend_images(
    original: UInt8[np.ndarray, "B H W I"],
    edited: UInt8[np.ndarray, "B H W I"],
    redrawn: Bool[np.ndarray, "B H W"],
    ramp: int,
) -> UInt8[np.ndarray, "B H W I"]:
    """Returns edited pixels where redrawn, and original ones elsewhere.

    Over a ramp of `ramp` pixels outside the redrawn part, the two are mixed.
    """
    transform = scipy.ndimage.distance_transform_edt
    distance = np.stack([np.asarray(transform(~image)) for image in redrawn])
    share = np.clip(1 - distance / (ramp + 1), 0, 1)[..., None]
    return np.round(share * edited + (1 - share) * original).astype(np.uint8)


def _batch(
    pipeline: Drawer, images: Any, side: int | None = None
) -> tuple[UInt8[np.ndarray, "B H W I"], bool]:
    """Checks images; returns them as a batch on the host, and whether a single one was given."""
    images = np.asarray(check_images(images, pipeline.codec.config, single=True, side=side))
    single = images.ndim == 3
    return (images[None] if single else images), single


def _check(batch_size: Any, seed: Any, blend: Any, preview: Any) -> tuple[int, int, int | None]:
    checks.preview(preview)
    if blend is not None and (blend := checks.whole("blend", blend)) < 0:
        raise UserError(f"blend={blend} must be 0 or more pixels")
    return checks.at_least("sampling.batch_size", batch_size, 1), checks.seed(seed), blend


def _margins(
    pipeline: Drawer, images: np.ndarray, **pixels: Any
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Checks margins; returns the pixels above and below, and left and right."""
    patch, side = pipeline.patch_size, pipeline.image_size
    pixels = {name: checks.whole(name, value) for name, value in pixels.items()}
    for name, value in pixels.items():
        if value < 0 or value % patch:
            raise UserError(f"{name}={value} must be a multiple of {patch} pixels, 0 or more")
    margins = (pixels["top"], pixels["bottom"]), (pixels["left"], pixels["right"])
    height, width = (
        size + sum(margin) for size, margin in zip(images.shape[1:3], margins, strict=True)
    )
    if min(height, width) < side:
        raise UserError(
            f"{height}x{width} pixels with the margins are less than the {side}x{side} that the "
            "model draws: give larger margins"
        )
    if height * width > MAX_PIXELS:
        raise UserError(
            f"{height}x{width} pixels with the margins are more than the {MAX_PIXELS} allowed"
        )
    return margins


def _class_list(class_id: Any, count: int) -> Sequence[ClassId]:
    class_ids = checks.items(class_id)
    if class_ids is None:
        class_ids = [checks.item(class_id)] * count
    if len(class_ids) != count:
        raise UserError(f"there are {len(class_ids)} classes for {count} images")
    return class_ids


def _encode(
    pipeline: Drawer,
    images: UInt8[np.ndarray, "B H W I"],
    hidden: Bool[np.ndarray, "B h w"],
    encode_hidden: bool,
    batch_size: int,
) -> Shaped[np.ndarray, "B L C"]:
    """Encodes images; unless `encode_hidden`, the pixels of hidden positions are filled first."""
    if not encode_hidden:
        patch = pipeline.patch_size
        images = fill_hidden(images, _redrawn(hidden, None, patch), patch)
    return in_batches(lambda batch: pipeline.codec.encode(batch).indices, images, batch_size)


def _redrawn(
    hidden: Bool[np.ndarray, "B h w"], mask: Bool[np.ndarray, "*B H W"] | None, patch: int
) -> Bool[np.ndarray, "B H W"]:
    """The pixels of hidden positions, or those of them that a mask covers."""
    pixels = hidden.repeat(patch, axis=1).repeat(patch, axis=2)
    return pixels if mask is None else pixels & mask
