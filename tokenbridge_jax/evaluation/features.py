"""Images -> features for the metrics, on the devices of all processes."""

import abc
import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float, Int, Shaped, UInt8, UInt64

from tokenbridge_jax.evaluation import dinov2, inception
from tokenbridge_jax.evaluation.image_sets import ImageSet
from tokenbridge_jax.evaluation.moments import Gaussian, Moments
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.progress import Progress

# Images per process between exchanges of features: 20 MB of Inception's features.
_SHARE = 1024

THUMBNAIL = 8


class Features(NamedTuple):
    """Features of a batch of N images.

    Attributes:
      pool: for Frechet distance, KID, precision and recall; D is 2048 for Inception, 1024 for
        DINOv2.
      spatial: for sFID; None if the extractor has no such features.
      logits: of classes, for the inception score; None if the extractor has none.
    """

    pool: Float[np.ndarray, "N D"]
    spatial: Float[np.ndarray, "N 2023"] | None = None
    logits: Float[np.ndarray, "N 1008"] | None = None


class Extractor(abc.ABC):
    """Computes features of images.

    Attributes:
      name: one of `networks.FEATURES`.
      distance: the name of its Frechet distance: FID is Inception's, FD_DINOv2 is DINOv2's.
      facts: the settings to report with any result.
      batch_size: the largest batch.
      size: D, the number of features that the Frechet distance compares.
    """

    name: str
    distance: str
    facts: Mapping[str, Any]
    batch_size: int
    size: int

    @abc.abstractmethod
    def __call__(self, images: UInt8[np.ndarray, "N H W 3"]) -> Features:
        """Features of at most `batch_size` images."""


class NetworkExtractor(Extractor):
    """A network on the devices of this process.

    Attributes:
      network: computes the arrays of `Features` from parameters, images and a precision.
      settings: facts about the network, without its weights.
    """

    network: Callable[..., tuple[jax.Array, ...]]
    settings: Mapping[str, str]

    def __init__(
        self,
        params: Mapping[str, Mapping[str, Any]],
        *,
        batch_size: int = 64,
        precision: str = "high",
        facts: Mapping[str, Any] | None = None,
    ):
        """Copies the parameters to the devices.

        Args:
          params: as `network` takes them.
          batch_size: images per batch over all devices, rounded up to a multiple of their number.
          precision: of the products, one of `inception.PRECISIONS`.
          facts: about the weights.
        """
        self._mesh = meshes.make_mesh(devices=jax.local_devices())
        self.batch_size = meshes.round_up_batch(batch_size, self._mesh)
        self.facts = {**self.settings, "features_precision": precision, **(facts or {})}
        self._compiled = jax.jit(functools.partial(self.network, precision=precision))
        self._params = jax.device_put(dict(params), meshes.replicated(self._mesh))

    def __call__(self, images: UInt8[np.ndarray, "N H W 3"]) -> Features:
        """See `Extractor`."""
        count = len(images)
        full = np.pad(images, [(0, self.batch_size - count), (0, 0), (0, 0), (0, 0)])
        # The mesh of a training run, which may call this, has the devices of other processes too.
        with meshes.use_mesh(self._mesh):
            batch = jax.device_put(full, meshes.batch_sharding(self._mesh))
            found = self._compiled(self._params, batch)
        return Features(*(np.asarray(x)[:count] for x in found))


class InceptionExtractor(NetworkExtractor):
    """The network of FID, with parameters of `inception.import_inception`."""

    name = "inception"
    distance = "fid"
    size = inception.POOL_FEATURES
    network = staticmethod(inception.features)
    settings = MappingProxyType(
        {
            "features": "inception-2015-12-05 (pool 2048, mixed_6/conv 7 x 17 x 17, logits 1008)",
            "resize": "bilinear to 299 x 299 as TensorFlow 1, without half-pixel centres",
            "resize_rounding": "none",
        }
    )


class DinoExtractor(NetworkExtractor):
    """The network of FD_DINOv2, with parameters of `dinov2.import_dinov2`."""

    name = "dinov2"
    distance = "fd_dinov2"
    size = dinov2.VIT_L.width
    network = staticmethod(dinov2.features)
    settings = MappingProxyType(
        {
            "features": "DINOv2 ViT-L/14 (class token after the last LayerNorm, 1024)",
            "resize": "bicubic to 224 x 224 as Pillow, smoothing when it shrinks",
            "resize_rounding": "to uint8",
            "position_embeddings": "bicubic from 37 x 37 to 16 x 16, as transformers",
        }
    )


class ThumbnailExtractor(Extractor):
    """`thumbnails` as features: they need no weights, and depend on layout and colour only."""

    name = "thumbnails"
    distance = "thumbnail_distance"
    batch_size = 256
    size = THUMBNAIL * THUMBNAIL * 3
    facts = MappingProxyType({"features": "pixels of 8 x 8 area means, 0 to 1"})

    def __call__(self, images: UInt8[np.ndarray, "N H W 3"]) -> Features:
        """See `Extractor`."""
        return Features(thumbnails(images))


def thumbnails(images: UInt8[np.ndarray, "N H W C"]) -> Float[np.ndarray, "N 64*C"]:
    """Means over the cells of an 8 x 8 grid, float32 from 0 to 1, row-major, channels last.

    If 8 does not divide the size, a pixel belongs to the cell that contains its centre.

    Raises:
      UserError: the images are smaller than the grid.
    """
    count, height, width, _ = images.shape
    if min(height, width) < THUMBNAIL:
        raise UserError(f"thumbnails need images of {THUMBNAIL} pixels a side: {width}x{height}")
    sums, cells = images, np.ones((THUMBNAIL, THUMBNAIL), int)
    for axis, side in ((1, height), (2, width)):
        starts = np.floor(np.arange(THUMBNAIL) * side / THUMBNAIL + 0.5).astype(int)
        sums = np.add.reduceat(sums, starts, axis=axis, dtype=np.int32)
        # Transposed each time: the numbers of rows, which are first, end up along the first axis.
        cells = cells.T * np.diff([*starts, side])[None]
    means = sums / (255 * cells[None, :, :, None])
    return means.astype(np.float32).reshape(count, -1)


@dataclasses.dataclass(frozen=True)
class SetFeatures:
    """Features of a set of images.

    Attributes:
      count: N, the number of images.
      pool: mean and covariance of the features of all images.
      spatial: the same for the spatial features, or None.
      kept: features of all images in their order, or of the images with the smallest keys.
      logits: of all images in their order; None if the extractor has none or not all are kept.
      keys: a number for every image in `kept` that depends only on its pixels. Sorting by it gives
        an order that does not depend on the original order.
    """

    count: int
    pool: Gaussian
    spatial: Gaussian | None
    kept: Float[np.ndarray, "K D"]
    logits: Float[np.ndarray, "K 1008"] | None
    keys: UInt64[np.ndarray, " K"]

    @property
    def digest(self) -> str:
        """A SHA-256 of the number of images and their keys; it does not depend on their order."""
        content = np.sort(self.keys).astype("<u8").tobytes()
        return hashlib.sha256(f"{self.count} ".encode() + content).hexdigest()


def extract(
    images: ImageSet, extractor: Extractor, *, keep: int | None = None, progress: bool = False
) -> SetFeatures:
    """Extracts features. Every process takes a share of the images; all get the same result.

    Moments are summed in float64 in the images' order, so the result does not depend on the number
    of processes. Only one batch of images is in memory at a time.

    Args:
      images: the same in every process.
      extractor: computes the features.
      keep: the number of images whose features to keep, chosen by their content; all by default.
      progress: print rate and ETA to stderr; of several processes the first does.

    Raises:
      UserError: there are fewer than two images, or features are NaN or infinite.
    """
    if images.count < 2:
        raise UserError(f"{images.path}: statistics need at least 2 images, not {images.count}")
    moments: list[Moments] = []
    kept: list[list[np.ndarray]] = []
    with (
        Progress(
            images.count, desc="features", visible=progress and not jax.process_index()
        ) as bar,
        ThreadPoolExecutor(1) as thread,
    ):

        def of_batch(batch: UInt8[np.ndarray, "n H W 3"], _: Any) -> tuple[Features, np.ndarray]:
            keys = thread.submit(content_keys, batch)  # While the devices compute.
            return extractor(batch), keys.result()

        size = _SHARE * jax.process_count()
        for _, found in blocks(images, size, extractor.batch_size, of_batch):
            (pool, spatial, logits), keys = found
            summed = [x for x in (pool, spatial) if x is not None]
            moments = moments or [Moments(x.shape[1]) for x in summed]
            for sums, new in zip(moments, summed, strict=True):
                sums.update(new)
            rows = (keys, pool, logits if keep is None else None)
            kept.append([x for x in rows if x is not None])
            if keep is not None:
                joined = [np.concatenate(part) for part in zip(*kept, strict=True)]
                chosen = np.argsort(joined[0], kind="stable")[:keep]
                kept = [[part[chosen] for part in joined]]
            bar.update(len(keys))
    arrays = [np.concatenate(part) for part in zip(*kept, strict=True)]
    gaussians = [sums.gaussian() for sums in moments]
    return SetFeatures(
        count=images.count,
        pool=gaussians[0],
        spatial=gaussians[1] if len(gaussians) > 1 else None,
        kept=arrays[1],
        logits=arrays[2] if len(arrays) > 2 else None,
        keys=arrays[0],
    )


def blocks(
    images: ImageSet, size: int, batch_size: int, of_batch: Callable[..., Any]
) -> Iterator[tuple[Int[np.ndarray, " n"], Any]]:
    """Applies a function to all images, block by block. The processes share each block.

    Args:
      images: the same in every process.
      size: the number of images in a block.
      batch_size: the largest batch for `of_batch`.
      of_batch: takes a batch and the numbers of its images; returns a tree of arrays with one row
        per image.

    Yields:
      For every block, the numbers of its images, and the tree of all their rows, in the images'
      order. All processes get the same.
    """
    process, processes = jax.process_index(), jax.process_count()
    for start in range(0, images.count, size):
        count = min(size, images.count - start)
        first, last = (start + count * p // processes for p in (process, process + 1))
        # A process without a share takes one image, to know the shapes of its empty arrays.
        taken = (first, last) if first < last else (0, 1)
        parts, number = [], taken[0]
        for batch in _ahead(images.batches(batch_size, *taken)):
            parts.append(of_batch(batch, np.arange(number, number + len(batch))))
            number += len(batch)

        def join(*rows: np.ndarray, mine: int = last - first) -> np.ndarray:
            return gather_rows(np.concatenate(rows)[:mine])

        yield np.arange(start, start + count), jax.tree.map(join, *parts)


def _ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The same items; the next one is prepared in a thread while one is used."""
    with ThreadPoolExecutor(1) as thread:
        item = thread.submit(next, items, None)
        while (ready := item.result()) is not None:
            item = thread.submit(next, items, None)
            yield ready


def gather_rows(rows: Shaped[np.ndarray, "n ..."]) -> Shaped[np.ndarray, "N ..."]:
    """The rows of all processes, one process after another."""
    if jax.process_count() == 1:
        return rows
    counts = multihost_utils.process_allgather(np.int32(len(rows)))
    # As bytes, because JAX without x64 would convert 64-bit numbers to 32 bits.
    data = np.ascontiguousarray(rows).reshape(len(rows), int(np.prod(rows.shape[1:])))
    padded = np.pad(data.view(np.uint8), [(0, counts.max() - len(rows)), (0, 0)])
    everything = multihost_utils.process_allgather(padded)
    whole = np.concatenate([part[:n] for part, n in zip(everything, counts, strict=True)])
    return np.ascontiguousarray(whole).view(rows.dtype).reshape(-1, *rows.shape[1:])


def content_keys(images: Shaped[np.ndarray, "N ..."]) -> UInt64[np.ndarray, " N"]:
    """A number for every image, a hash of its pixels (or of other numbers that stand for it)."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # Hashing releases the interpreter's lock.
        digests = threads.map(
            lambda image: hashlib.blake2b(image.tobytes(), digest_size=8).digest(), images
        )
        return np.frombuffer(b"".join(digests), np.uint64)
