"""Batches of prepared pictures, which other processes decode while the device works."""

import dataclasses
from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np

from tokenbridge_jax.data.images import ImageError
from tokenbridge_jax.data.sources import Source, load_prepared
from tokenbridge_jax.data.workers import NOTE_BYTES, count_workers, in_order
from tokenbridge_jax.runtime.errors import UserError


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
    plans: Sequence[ShardPlan],
    batch_size: int,
    image_size: int,
    image_channels: int,
    *,
    workers: int = 0,
    strict: bool = False,
) -> Generator[Batch]:
    """Prepares the pictures of shards in order; a batch never spans two shards.

    Args:
      plans: the shards.
      batch_size: B.
      image_size: pixels a side after the centre crop.
      image_channels: 3 or 1.
      workers: processes that decode pictures; see `workers.count_workers`.
      strict: raise on a broken picture instead of listing it in the batch.

    Raises:
      UserError: a picture is broken and `strict` is set, or the storage fails.
    """
    cuts = [
        (number, start)
        for number, plan in enumerate(plans)
        for start in range(0, len(plan.images), batch_size)
    ]
    prepare = _Prepare(plans, (batch_size, image_size, image_size, image_channels))
    workers = count_workers(workers, sum(len(plan.images) for plan in plans))
    size = batch_size * (image_size**2 * image_channels + NOTE_BYTES)
    prepared = in_order(cuts, prepare, workers, size)
    for (number, start), (pixels, labels, broken) in zip(cuts, prepared, strict=True):
        if broken and strict:
            raise UserError(f"broken image {next(iter(broken.values()))} (--strict is set)")
        images = plans[number].images[start : start + batch_size]
        yield Batch(plans[number], images, labels[: len(images)], pixels, broken)


@dataclasses.dataclass(frozen=True)
class _Prepare:
    """Decodes the pictures of a batch; worker processes have a copy of it.

    Attributes:
      plans: the shards.
      shape: of a batch, `[B, size, size, channels]`.
    """

    plans: Sequence[ShardPlan]
    shape: tuple[int, int, int, int]

    def __call__(self, cut: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
        """Pixels, labels int32 `[B]` and `broken`, of the batch at (shard, place)."""
        number, start = cut
        batch_size, size, _, channels = self.shape
        plan = self.plans[number]
        pixels, labels = np.zeros(self.shape, np.uint8), np.zeros(batch_size, np.int32)
        broken = {}
        for place, i in enumerate(plan.images[start : start + batch_size].tolist()):
            try:
                pixels[place], labels[place] = load_prepared(plan.source, i, size, channels)
            except ImageError as error:
                broken[place] = str(error)
        return pixels, labels, broken
