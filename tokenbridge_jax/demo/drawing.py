"""Checks the requests of the page, and draws them in a thread with previews."""

import dataclasses
import io as bytes_io
import json
import queue
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from ml_collections import ConfigDict
from PIL import Image

from tokenbridge_jax.config import sampling_settings
from tokenbridge_jax.data.class_names import class_at
from tokenbridge_jax.data.images import ImageError, open_picture, prepare
from tokenbridge_jax.pipeline import Pipeline
from tokenbridge_jax.pipeline.description import ClassId
from tokenbridge_jax.runtime import pictures
from tokenbridge_jax.runtime.checks import MAX_SEED
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.sampling.batches import Preview

NO_CLASS = -1
# Each number of images needs its own compiled program.
NUMBERS_OF_IMAGES = (1, 4, 9, 16)
MAX_TEMPERATURE = 2.0
# If the config has a larger guidance, that is the maximum.
MAX_GUIDANCE = 10.0
MAX_KEEP = 0.95
MAX_UPLOAD_PIXELS = 2**26
# Decoding a preview takes time.
MAX_PREVIEWS = 16
# Seconds without a new image after which an iterator yields None.
TICK = 1.0


class Choices(NamedTuple):
    """The settings on the page, in the same order as there.

    Attributes:
      class_id: number of a class, or NO_CLASS for unconditional images.
      second: number of a class to mix in, or NO_CLASS.
      share: weight of the second class, from 0 to 1.
      images: number of images, one of NUMBERS_OF_IMAGES.
      seed: from 0 to MAX_SEED.
      guidance: this and the following are fields of `SamplingSettings`.
      temperature: at most MAX_TEMPERATURE.
      num_iter: at most L.
      order: one of ORDERS.
    """

    class_id: int
    second: int
    share: float
    images: int
    seed: int
    guidance: float
    temperature: float
    num_iter: int
    order: str

    def mixture(self, names: tuple[str, ...]) -> ClassId:
        """Returns the class, or two classes with their weights, given the names of all classes."""
        if self.class_id == NO_CLASS:
            return None
        first = class_at(self.class_id, names)
        if self.second in (NO_CLASS, self.class_id):
            return first
        return {first: 1 - self.share, class_at(self.second, names): self.share}


class Frame(NamedTuple):
    """Images after some steps: steps done, number of all steps, uint8 `[B, H, W, I]`."""

    done: int
    steps: int
    images: np.ndarray


class Demo:
    """Draws the requests of the page, one at a time."""

    def __init__(self, pipeline: Pipeline, sampling: ConfigDict):
        """The page starts with the settings in `sampling`, a section of the config."""
        self.pipeline = pipeline
        self.defaults = sampling_settings(sampling)
        self._names = pipeline.description.class_names
        self.side = pipeline.image_size
        self.image_channels = pipeline.codec.config.image_channels
        self.max_guidance = max(MAX_GUIDANCE, self.defaults.guidance)
        self._sampler = ThreadPoolExecutor(1)
        self._closed = threading.Event()

    def close(self) -> None:
        """Stops the current request at its next step, and waits for that."""
        self._closed.set()
        self._sampler.shutdown(cancel_futures=True)

    def generate(self, choices: Choices) -> Iterator[Frame | None]:
        """Yields images while they are drawn, and at the end the result of `Pipeline.generate`.

        Without a new image, it yields None once a second, so that the caller can close it.

        Raises:
          UserError: a choice is out of range.
        """
        settings = self._settings(choices)
        class_ids = [choices.mixture(self._names)] * choices.images
        return self._frames(lambda preview: self.pipeline.generate(
            class_ids, preview=preview, **settings
        ))  # fmt: skip

    def edit(
        self,
        choices: Choices,
        image: UInt8[np.ndarray, "H W I"] | None,
        mask: Bool[np.ndarray, "H W"],
        keep: float | int,
        blend: int | None,
        encode_hidden: bool = False,
    ) -> Iterator[Frame | None]:
        """Like `generate`, for `Pipeline.edit`: several edits of one image.

        Args:
          choices: the settings.
          image: the image to edit, of the model's size.
          mask: True where the visitor painted; nowhere means the whole image.
          keep: share of the masked positions to keep; 0 redraws all of them.
          blend: as in `Pipeline.edit`.
          encode_hidden: as in `Pipeline.edit`; False stands for None.

        Raises:
          UserError: there is no image or nothing to redraw, or a choice is out of range.
        """
        settings = self._settings(choices)
        if image is None:
            raise UserError("there is no picture yet; upload one or take a generated one")
        if not mask.any() and not keep:
            raise UserError("paint over the part to redraw, or keep a share for variations")
        _check("keep", keep, 0, MAX_KEEP)
        if blend is not None:
            _check("blend", blend, 0, self.side // 4)
        images = np.stack([image] * choices.images)
        return self._frames(lambda preview: self.pipeline.edit(
            images,
            mask if mask.any() else None,
            choices.mixture(self._names),
            keep=keep or None,
            encode_hidden=encode_hidden or None,
            blend=blend,
            preview=preview,
            **settings,
        ))  # fmt: skip

    def read(self, path: str) -> UInt8[np.ndarray, "H W I"]:
        """Reads a picture of any size and crops it to the model's size, as `tokenize` does.

        Raises:
          UserError: the file is not a picture, or it is too large.
        """
        try:
            with open_picture(path) as picture:
                if picture.width * picture.height > MAX_UPLOAD_PIXELS:
                    raise ImageError(f"more than {MAX_UPLOAD_PIXELS} pixels")
                return prepare(picture, self.side, self.image_channels)
        except (ImageError, OSError) as error:
            reason = "not a picture" if isinstance(error, OSError) else error
            raise UserError(f"this file cannot be used: {reason}") from error

    def _settings(self, choices: Choices) -> dict[str, Any]:
        """Checks the choices; returns arguments for `Pipeline.generate` and `edit`."""
        for class_id in (choices.class_id, choices.second):
            if class_id != NO_CLASS:
                self.pipeline.class_id(class_at(class_id, self._names))
        if choices.class_id == NO_CLASS != choices.second:
            raise UserError("a second class needs a first one to be mixed with")
        if choices.images not in NUMBERS_OF_IMAGES:
            raise UserError(f"images={choices.images} is not one of {NUMBERS_OF_IMAGES}")
        _check("share", choices.share, 0, 1)
        _check("seed", choices.seed, 0, MAX_SEED)
        _check("guidance", choices.guidance, 0, self.max_guidance)
        _check("temperature", choices.temperature, 0, MAX_TEMPERATURE)
        _check("steps", choices.num_iter, 1, self.pipeline.config.positions)
        settings = dataclasses.replace(
            self.defaults,
            guidance=float(choices.guidance),
            temperature=float(choices.temperature),
            num_iter=int(choices.num_iter),
            order=choices.order,
        )
        return dataclasses.asdict(settings) | dict(
            seed=int(choices.seed),
            batch_size=choices.images,
            preview_every=-(-settings.num_iter // MAX_PREVIEWS),
        )

    def _frames(self, draw: Callable[[Preview], np.ndarray]) -> Iterator[Frame | None]:
        """Runs `draw` in the sampler's thread. Closing this iterator stops it at the next step."""
        frames: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        left = threading.Event()

        def preview(done: int, steps: int, images: np.ndarray) -> None:
            if left.is_set() or self._closed.is_set():
                raise UserError("stopped")
            frames.put(Frame(done, steps, images))

        drawing = self._sampler.submit(draw, preview)
        drawing.add_done_callback(lambda _: frames.put(None))
        steps = 0
        try:
            while True:
                try:
                    frame = frames.get(timeout=TICK)
                except queue.Empty:
                    yield None
                    continue
                if frame is None:
                    break
                steps = frame.steps
                yield frame
            yield Frame(steps, steps, drawing.result())
        finally:
            left.set()


def painted(layers: Sequence[np.ndarray], side: int) -> Bool[np.ndarray, "H W"]:
    """Returns the pixels of an image that a brush has covered by at least a quarter.

    Args:
      layers: RGBA, of any size; pixels that are not transparent were painted.
      side: side of the image, in pixels.
    """
    mask = np.zeros((side, side), bool)
    for layer in layers:
        opaque = Image.fromarray(np.where(layer[..., 3] > 0, 255, 0).astype(np.uint8))
        mask |= np.asarray(opaque.resize((side, side), Image.Resampling.BOX)) >= 64
    return mask


def write_archive(
    path: Path, images: UInt8[np.ndarray, "B H W I"], settings: dict[str, Any]
) -> None:
    """Writes a zip file: `0.png`, `1.png`, ..., `samples.npz` (`arr_0`) and `settings.json`."""
    with zipfile.ZipFile(path, "w") as archive:
        for i, image in enumerate(images):
            png = bytes_io.BytesIO()
            pictures.to_pil(image).save(png, "PNG")
            archive.writestr(f"{i}.png", png.getvalue())
        arrays = bytes_io.BytesIO()
        np.savez(arrays, arr_0=images)
        archive.writestr("samples.npz", arrays.getvalue())
        archive.writestr("settings.json", json.dumps(settings, indent=2))


def _check(name: str, value: Any, low: float | int, high: float | int) -> None:
    if not isinstance(value, int | float) or not low <= value <= high:
        raise UserError(f"{name}={value} must be a number from {low} to {high}")
