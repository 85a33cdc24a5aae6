"""Editing images: some positions are drawn anew, the others stay.

A mask of pixels says what to draw anew. A position is hidden if the mask touches any pixel of its
patch. Hidden content stays unseen: the encoder sees beyond a position's own pixels, so the pixels
of hidden positions are filled from visible ones before anything is encoded. Two pictures that
differ only in hidden positions have the same edits.

Pictures larger than the model's are drawn in overlapping *windows* of its size. Every window is an
edit whose known part includes what earlier windows have drawn. The autoencoder is convolutional and
encodes and decodes such a picture whole.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Integer, UInt8
from scipy.ndimage import distance_transform_edt

from tokenbridge_jax.codec import Codec, check_images, in_batches
from tokenbridge_jax.data.images import MAX_PIXELS
from tokenbridge_jax.model import TokenBridgeConfig
from tokenbridge_jax.pipeline.description import ClassId
from tokenbridge_jax.pipeline.filling import fill_hidden
from tokenbridge_jax.runtime import checks
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.progress import Progress
from tokenbridge_jax.sampling.batches import Preview


@runtime_checkable
class Drawer(Protocol):
    """What editing needs of a `Pipeline`, which has `edit` and `outpaint` as methods."""

    config: TokenBridgeConfig
    codec: Codec
    grid: int
    patch_size: int
    image_size: int

    def encode(self, images: Any) -> np.ndarray:
        """As `Pipeline.encode`."""

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
    batch_size: int | Any = 64,
    progress: bool = False,
    preview: Preview | Any = None,
    preview_every: int | Any = 1,
    **settings: Any,
) -> UInt8[np.ndarray, "*B H W I"]:
    """Draws the masked part of images anew, given the rest of them and a class.

    Masks that hide up to an eighth, a quarter, half, or all of the positions share a program.

    Args:
      pipeline: draws the positions.
      images: uint8 `[B, H, W, I]` or one `[H, W, I]`, of the size the model draws.
      mask: bool `[H, W]`, or `[B, H, W]` with one for each image; True where something new is to be
        drawn. None draws variations of whole images, with `keep`.
      class_id: of the new part, as `Pipeline.labels` takes them: one for all, or a list with one
        for each image.
      keep: share of the masked positions, above 0 and below 1, that is kept, chosen at random.
      encode_hidden: True shows the encoder the pixels of hidden positions, so that visible
        positions have the indices of the whole image and the edits resemble it: for touch-ups.
        False shows it only visible pixels, with the others filled from them. None is True with
        `keep`, which asks for variations of the image, and False without.
      blend: None gives what the autoencoder decodes, kept parts included. A number puts the
        original pixels back outside the mask, with a ramp of that many pixels; 0 is a hard edge.
      seed: image i is the same for the same seed, whatever other images are edited with it.
      batch_size: images at once.
      progress: print rate and ETA to stderr.
      preview: called with the steps done, their number, and the decoded images of a batch, which
        has images with equally many hidden positions. Positions that are still hidden are shown as
        they were encoded.
      preview_every: number of steps between two calls.
      **settings: fields of `SamplingSettings`.

    Returns:
      As many images. With `encode_hidden`, the indices of kept positions are those of
      `Pipeline.encode`.

    Raises:
      UserError: an image, a mask or a setting does not fit, or a mask hides nothing or everything.
    """
    images, single = _batch(pipeline, images, pipeline.image_size)
    batch_size, seed, blend = _check(batch_size, seed, blend, preview)
    mask = None if mask is None else np.asarray(checks.to_array("mask", mask))
    hidden = hidden_positions(mask, images.shape[:3], pipeline.patch_size, keep, seed)
    class_ids = _class_list(class_id, len(images))
    if encode_hidden is None:
        encode_hidden = keep is not None
    indices = pipeline.generate_indices(
        class_ids,
        known=in_batches(pipeline.encode, _seen(images, hidden, encode_hidden), batch_size),
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
    batch_size: int | Any = 64,
    progress: bool = False,
    preview: Preview | Any = None,
    **settings: Any,
) -> UInt8[np.ndarray, "*B height width I"]:
    """Draws margins around images, window by window, from the known part outwards.

    Args:
      pipeline: draws the windows.
      images: uint8 `[B, H, W, I]` or one `[H, W, I]`, of any size that is a multiple of the
        autoencoder's downsampling; with the margins at least as large as the model's.
      class_id: of the new part, as for `edit`.
      left: pixels to add at that side, a multiple of the downsampling.
      top: likewise.
      right: likewise.
      bottom: likewise.
      mask: bool `[H, W]` or `[B, H, W]`: the part of the images themselves to draw anew.
      overlap: share of a window's side that the next window has in common with it, 0 or more and
        below 1.
      encode_hidden: as for `edit`, for positions that the mask hides.
      blend: as for `edit`; margins count as masked.
      seed: image i is the same for the same seed, whatever other images are drawn with it.
      batch_size: windows at once, of different images.
      progress: print windows done, rate and ETA to stderr.
      preview: called after every window with the windows done of an image, the largest number
        that an image has, and the decoded images.
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
            raise UserError("nothing says what to draw anew: give left, top, right, bottom or mask")
        hidden = np.zeros((count, height // patch, width // patch), bool)
    else:
        mask = np.asarray(checks.to_array("mask", mask))
        hidden = hidden_positions(mask, images.shape[:3], patch)
        mask = np.pad(
            np.broadcast_to(mask, images.shape[:3]), [(0, 0), *margins], constant_values=True
        )
    class_ids = _class_list(class_id, count)

    seen = _seen(images, hidden, encode_hidden)
    border = [(0, 0), *((before // patch, after // patch) for before, after in margins)]
    shape = hidden.shape
    hidden = np.pad(hidden, border, constant_values=True)
    batch = max(1, batch_size * pipeline.config.positions // hidden[0].size)
    indices = in_batches(lambda x: pipeline.codec.encode(x).indices, seen, batch)
    nothing = np.argmin(np.abs(pipeline.config.quantizer.dequantized_levels))
    canvas = np.pad(indices.reshape(*shape, -1), [*border, (0, 0)], constant_values=nothing)
    decode = functools.partial(in_batches, pipeline.codec.decode_maps, canvas, batch)
    arguments: dict[str, Any] = dict(
        overlap=overlap, seed=seed, progress=progress, batch_size=batch_size
    )
    for done, most in draw_windows(pipeline, class_ids, canvas, hidden, **arguments, **settings):
        if preview is not None:
            preview(done, most, decode())
    drawn = decode()
    if blend is not None:
        original = np.pad(images, [(0, 0), *margins, (0, 0)])
        drawn = blend_images(original, drawn, _redrawn(hidden, mask, patch), blend)
    return drawn[0] if single else drawn


def draw_windows(
    pipeline: Drawer,
    class_ids: Sequence[ClassId],
    canvas: Integer[np.ndarray, "B height width C"],
    hidden: Bool[np.ndarray, "B height width"],
    *,
    overlap: float = 0.5,
    seed: int = 0,
    progress: bool = False,
    **arguments: Any,
) -> Iterator[tuple[int, int]]:
    """Draws the hidden positions of a canvas, in place; each in the first window that holds it.

    Args:
      pipeline: draws the windows, an image's k-th one with the k-th seed and the image's number.
      class_ids: of the images.
      canvas: indices, with at least as many positions on a side as the model has.
      hidden: the positions to draw.
      overlap: as for `outpaint`.
      seed: of the first windows; the seeds of the others follow from it.
      progress: as for `outpaint`.
      **arguments: of `Pipeline.generate_indices`.

    Yields:
      After every window: the windows done of an image, and the largest number that an image has.
    """
    grid = pipeline.grid
    stride = max(1, round(grid * (1 - overlap)))
    visits = [list(_windows(image, grid, stride)) for image in hidden]
    most = max(map(len, visits))
    # With one seed for all, every window would hold the same noise.
    others = np.random.SeedSequence(seed % 2**32).generate_state(most - 1).tolist()
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
    """The windows to draw: each time one with the fewest hidden positions, until none is left."""
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
    """The positions that a mask hides.

    Args:
      mask: as for `edit`.
      shape: number, height and width of the images.
      patch: side of one position in pixels.
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
    if keep is not None and not 0 < checks.number("keep", keep) < 1:
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
    return hidden.reshape(count, height // patch, width // patch)


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


def _batch(
    pipeline: Drawer, images: Any, side: int | None = None
) -> tuple[UInt8[np.ndarray, "B H W I"], bool]:
    """Images on the host, and whether a single one was given, without a batch axis."""
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
    """Above and below, left and right."""
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


def _seen(
    images: UInt8[np.ndarray, "B H W I"], hidden: Bool[np.ndarray, "B h w"], encode_hidden: bool
) -> UInt8[np.ndarray, "B H W I"]:
    """The images as the encoder sees them."""
    patch = images.shape[1] // hidden.shape[1]
    return images if encode_hidden else fill_hidden(images, _redrawn(hidden, None, patch), patch)


def _redrawn(
    hidden: Bool[np.ndarray, "B h w"], mask: Bool[np.ndarray, "*B H W"] | None, patch: int
) -> Bool[np.ndarray, "B H W"]:
    """The pixels of hidden positions that a mask covers, if there is one."""
    pixels = hidden.repeat(patch, axis=1).repeat(patch, axis=2)
    return pixels if mask is None else pixels & mask
