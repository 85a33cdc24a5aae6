"""Writes and reads pictures: single images, and grids of images."""

import io as bytes_io
import math
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from tokenbridge_jax.runtime import storage
from tokenbridge_jax.runtime.errors import UserError

# Files without loss, and their options in Pillow.
KINDS: dict[str, dict[str, Any]] = {"png": {}, "webp": {"lossless": True}}

GAP = 2
GAP_VALUE = 96
# Smaller images are enlarged by a whole factor until their side is at least this.
SMALLEST_SIDE = 48


def grid(
    images: UInt8[np.ndarray, "B H W I"], columns: int | None = None
) -> UInt8[np.ndarray, "gridH gridW I"]:
    """Arranges images in rows with thin lines between them. Small images are enlarged.

    Args:
      images: uint8, 1 or 3 channels.
      columns: images per row; by default about the square root of B.
    """
    factor = -(-SMALLEST_SIDE // images.shape[1])
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    canvas = np.full(
        (rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels), GAP_VALUE, np.uint8
    )
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + GAP), (i % columns) * (width + GAP)
        canvas[top : top + height, left : left + width] = image
    return canvas


def to_pil(image: UInt8[np.ndarray, "H W I"]) -> Image.Image:
    """Turns an image of 1 or 3 channels into Pillow's."""
    return Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)


def write_png(path: epath.PathLike, image: UInt8[np.ndarray, "H W I"]) -> None:
    """Writes an image of 1 or 3 channels as PNG, completely or not at all.

    Raises:
      UserError: it cannot be written.
    """
    write(path, image, "png")


def write(path: epath.PathLike, image: UInt8[np.ndarray, "H W I"], kind: str) -> None:
    """Writes an image of 1 or 3 channels as one of `KINDS`, completely or not at all.

    Raises:
      UserError: it cannot be written.
    """
    buffer = bytes_io.BytesIO()
    to_pil(image).save(buffer, kind.upper(), **KINDS[kind])
    storage.write_bytes(path, buffer.getvalue())


def write_batches(
    batches: Iterable[Iterable[tuple[epath.PathLike, UInt8[np.ndarray, "H W I"]]]], kind: str
) -> None:
    """Writes batches of images (see `write`) in threads, while `batches` makes the next one.

    A batch is taken only when all images before the last batch are written, so that few wait.

    Raises:
      UserError: one cannot be written; no image that waits is written then.
    """
    pool = ThreadPoolExecutor()  # Pillow releases the interpreter's lock while it compresses.
    writing: list[Future[None]] = []
    try:
        for batch in batches:
            _wait(writing)
            writing = [pool.submit(write, path, image, kind) for path, image in batch]
        _wait(writing)
    finally:
        pool.shutdown(cancel_futures=True)


def _wait(writing: Iterable[Future[None]]) -> None:
    for written in writing:
        written.result()


def read(path: epath.PathLike, channels: int) -> UInt8[np.ndarray, "H W I"]:
    """Reads an image that `write` wrote, of 1 or 3 channels.

    Raises:
      UserError: it cannot be read.
    """
    path = epath.Path(path)
    try:
        with Image.open(bytes_io.BytesIO(path.read_bytes())) as picture:
            image = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it and run again") from error
    return image.reshape(*image.shape[:2], channels)
