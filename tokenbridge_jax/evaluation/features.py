"""Images -> what the metrics need of them, over the devices of all processes."""

import functools
import hashlib
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float, Shaped, UInt8, UInt64

from tokenbridge_jax import parallel
from tokenbridge_jax.evaluation import inception
from tokenbridge_jax.evaluation.images import ImageSet
from tokenbridge_jax.progress import Progress

_SIZES = (
    inception.POOL_FEATURES,
    inception.SPATIAL_CHANNELS * inception.SPATIAL_CELLS,
    inception.CLASSES,
)


class SetFeatures(NamedTuple):
    """A set of images as the metrics see it, in the images' order: 20 kB an image.

    Attributes:
      pool: Inception's features.
      spatial: its spatial features, for sFID.
      logits: its logits without bias.
      keys: of an image's content alone, to bring images into an order that is always the same.
    """

    pool: Float[np.ndarray, "N 2048"]
    spatial: Float[np.ndarray, "N 2023"]
    logits: Float[np.ndarray, "N 1008"]
    keys: UInt64[np.ndarray, " N"]


def extract(
    images: ImageSet,
    params: inception.Params,
    *,
    batch_size: int = 64,
    dtype: Any = None,
    progress: bool = False,
) -> SetFeatures:
    """Runs images through Inception; every process takes its share of them and gets all results.

    Args:
      images: the same in every process.
      params: from `inception.import_inception`.
      batch_size: images at once, over the devices of a process.
      dtype: of Inception's convolutions; see there.
      progress: print rate and ETA to stderr.
    """
    mesh = parallel.make_mesh(devices=jax.local_devices())
    batch_size = -(-batch_size // mesh.size) * mesh.size
    network = jax.jit(functools.partial(inception.features, dtype=dtype))
    params = jax.device_put(dict(params), parallel.replicated(mesh))
    process, processes = jax.process_index(), jax.process_count()
    first, last = (images.count * p // processes for p in (process, process + 1))
    parts = []
    with Progress(last - first, desc="inception", visible=progress and process == 0) as bar:
        for batch in images.batches(batch_size, first, last):
            full = np.pad(batch, [(0, batch_size - len(batch)), (0, 0), (0, 0), (0, 0)])
            found = network(params, jax.device_put(full, parallel.batch_sharding(mesh)))
            features = (np.asarray(x)[: len(batch)] for x in found)
            parts.append((*features, _keys(batch)))
            bar.update(len(batch))
    empty = [np.zeros((0, size), np.float32) for size in _SIZES] + [np.zeros(0, np.uint64)]
    pool, spatial, logits, keys = (
        _gather(np.concatenate(part)) for part in zip(empty, *parts, strict=True)
    )
    return SetFeatures(pool, spatial, logits, keys)


def _gather(rows: Shaped[np.ndarray, "n ..."]) -> Shaped[np.ndarray, "N ..."]:
    """The rows of all processes, one process after another."""
    if jax.process_count() == 1:
        return rows
    counts = multihost_utils.process_allgather(np.int32(len(rows)))
    # As bytes: without x64 JAX would halve wider numbers.
    data = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1)
    padded = np.pad(data, [(0, counts.max() - len(rows)), (0, 0)])
    everything = multihost_utils.process_allgather(padded)
    whole = np.concatenate([part[:n] for part, n in zip(everything, counts, strict=True)])
    return np.ascontiguousarray(whole).view(rows.dtype).reshape(-1, *rows.shape[1:])


def _keys(images: UInt8[np.ndarray, "N H W C"]) -> UInt64[np.ndarray, " N"]:
    digests = (hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in images)
    return np.frombuffer(b"".join(digests), np.uint64)
