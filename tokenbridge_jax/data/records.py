"""Batches of pictures -> records of shards (see `shards.py`): indices, means and deviations."""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from tokenbridge_jax.codec import Codec, Encoded
from tokenbridge_jax.data.batches import Batch
from tokenbridge_jax.data.shards import DatasetInfo
from tokenbridge_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class EncodedBatch:
    """A batch that the device encodes, with the mirrored pictures if they are stored.

    Attributes:
      batch: the pictures.
      samples: the posterior samples, or the mean alone; each of `[B x flips]` pictures.
      posterior: mean and deviation of `[B x flips]` pictures, if they are stored.
    """

    batch: Batch
    samples: list[Encoded]
    posterior: Encoded | None

    def of_samples(self, name: str) -> np.ndarray:
        """A field of the samples of the usable pictures: `[pictures, samples x flips, ...]`."""
        return self._by_picture([getattr(sample, name) for sample in self.samples])

    def records(self, info: DatasetInfo) -> np.ndarray:
        """The records of the usable pictures, as a numpy structured array.

        Raises:
          UserError: latents are NaN, or too large for float16; the message names the picture.
        """
        batch, good = self.batch, self.batch.good
        self._refuse(np.any(self.of_samples("broken"), axis=1), "hold NaN")
        records = np.empty(len(good), info.record)
        records["image"] = batch.images[good]
        records["label"] = batch.labels[good]
        if info.holds_indices:
            records["indices"] = self.of_samples("indices")
        if self.posterior is not None:
            records["mean"] = self._float16(self.posterior.latents, info)
            records["deviation"] = self._float16(self.posterior.deviation, info)
        return records

    def _by_picture(self, samples: Sequence[Any]) -> np.ndarray:
        """`[B x flips, ...]` for each sample -> `[pictures, samples x flips, ...]`."""
        size = len(self.batch.pixels)
        arrays = [np.asarray(x).reshape(size, -1, *x.shape[1:]) for x in samples]
        return np.concatenate(arrays, axis=1)[self.batch.good]

    def _float16(
        self, values: Any, info: DatasetInfo
    ) -> Float[np.ndarray, "pictures latent_views L C"]:
        found = self._by_picture([values])
        fits = np.abs(found) <= np.finfo(np.float16).max
        self._refuse(~fits.all(axis=(1, 2, 3, 4)), "or their deviations do not fit into float16")
        shape = len(found), info.latent_views, info.positions, info.channels
        return found.astype(np.float16).reshape(shape)

    def _refuse(self, wrong: Any, what: str) -> None:
        if wrong.any():
            image = int(self.batch.images[self.batch.good[np.argmax(wrong)]])
            raise UserError(
                f"the latents of {self.batch.shard.source.name(image)} {what}: the autoencoder's "
                "weights are damaged, or overflow in config.tokenize.precision"
            )


def start_encoding(batch: Batch, codec: Codec, info: DatasetInfo) -> EncodedBatch:
    """Starts encoding a batch on the device."""
    pixels = batch.pixels
    if info.flips:
        pixels = np.stack([pixels, pixels[:, :, ::-1]], axis=1).reshape(-1, *pixels.shape[1:])
    posterior = codec.encode(pixels, deviation=True) if info.holds_latents else None
    if info.posterior_samples:
        samples = [
            codec.encode(pixels, _noise_ids(batch, info, sample), info.seed, _stream(batch, info))
            for sample in range(info.posterior_samples)
        ]
    else:
        samples = [posterior or codec.encode(pixels)]
    return EncodedBatch(batch, samples, posterior)


def _noise_ids(batch: Batch, info: DatasetInfo, sample: int) -> Int64[np.ndarray, " views"]:
    """Every view of every picture has its own noise, in any batch."""
    numbers = np.zeros(len(batch.pixels), np.int64)
    numbers[: len(batch.images)] = batch.images
    views = numbers[:, None] * info.views + np.arange(info.latent_views)
    return (views + sample * info.latent_views).ravel()


def _stream(batch: Batch, info: DatasetInfo) -> int:
    split = batch.shard.split
    return zlib.crc32(split.encode()) if info.split_noise and split != "train" else 0
