"""Batches of prepared pictures, which threads decode while the device works."""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from tokenbridge_jax.data.images import ImageError
from tokenbridge_jax.data.sources import Source, load_prepared
from tokenbridge_jax.runtime.errors import UserError

# Batches being decoded while the device works on another.
_BATCHES_AHEAD = 3


@dataclasses.dataclass(frozen=True, eq=False)
class ShardPlan:
    """A shard that will be written: its file, and its pictures as indices into a source."""

    path: Path
    split: str
    source: Source
    images: np.ndarray


@dataclasses.dataclass
class Batch:
    """Prepared pictures of one shard.

    Attributes:
      shard: to which they belong.
      images: indices into the source, `[n]` with n <= B.
      labels: int32 `[n]`.
      pixels: uint8 `[B, size, size, channels]`; black from n on, and for broken pictures.
      broken: why a picture cannot be used, by its place in `images`.
    """

    shard: ShardPlan
    images: np.ndarray
    labels: np.ndarray
    pixels: np.ndarray
    broken: dict[int, str]

    @property
    def good(self) -> np.ndarray:
        """Places of the pictures that can be used."""
        return np.array([i for i in range(len(self.images)) if i not in self.broken], np.int64)


def prepared_batches(
    plans: Iterable[ShardPlan],
    batch_size: int,
    image_size: int,
    image_channels: int,
    pool: ThreadPoolExecutor,
    *,
    strict: bool = False,
) -> Iterator[Batch]:
    """Prepares the pictures of shards in order; a batch never spans two shards.

    Args:
      plans: the shards.
      batch_size: B.
      image_size: pixels a side after the centre crop.
      image_channels: 3 or 1.
      pool: decodes single pictures; Pillow releases the interpreter lock for that.
      strict: raise on a broken picture instead of listing it in the batch.

    Raises:
      UserError: a picture is broken and `strict` is set, or the storage fails.
    """
    cuts = (
        (plan, plan.images[start : start + batch_size])
        for plan in plans
        for start in range(0, len(plan.images), batch_size)
    )
    waiting = collections.deque[tuple[ShardPlan, np.ndarray, list[Future[Any]]]]()
    while True:
        for plan, images in itertools.islice(cuts, _BATCHES_AHEAD - len(waiting)):
            futures = [
                pool.submit(load_prepared, plan.source, int(i), image_size, image_channels)
                for i in images
            ]
            waiting.append((plan, images, futures))
        if not waiting:
            return
        plan, images, futures = waiting.popleft()
        pixels = np.zeros((batch_size, image_size, image_size, image_channels), np.uint8)
        batch = Batch(plan, images, np.zeros(len(images), np.int32), pixels, {})
        for place, future in enumerate(futures):
            try:
                batch.pixels[place], batch.labels[place] = future.result()
            except ImageError as error:
                if strict:
                    raise UserError(f"broken image {error} (--strict is set)") from error
                batch.broken[place] = str(error)
        yield batch
