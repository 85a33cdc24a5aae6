"""Batches from token shards, and batches of pictures for training an autoencoder.

The order of the pipelines is seed, shuffle, repeat, random view, batch. Element k of the endless
shuffled stream is then a function of the seed alone, and global batch s holds elements
`s B .. (s+1) B - 1`, of which process p of n reads the p-th n-th, a contiguous piece: put together
in the order of the processes, as JAX does, batches are the same on any number of them. The step
number is the whole state of the iterator, and a run resumes exactly, elsewhere too. Every epoch has
its own order and holds every image once; a batch may begin in one epoch and end in the next.
"""

import bisect
import itertools
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from tokenbridge_jax.data import shards
from tokenbridge_jax.data.images import ImageError
from tokenbridge_jax.data.shards import DatasetInfo
from tokenbridge_jax.data.sources import Source, load_prepared
from tokenbridge_jax.errors import UserError

# Threads wait for the disk, not for Python; a buffer counts batches.
_READ_OPTIONS = grain.ReadOptions(num_threads=8, prefetch_buffer_size=8)


class TokenRecords:
    """The records of a split by number, as numpy structured scalars (see `shards.py`).

    Raises:
      UserError: the split is unknown, or a shard is missing or damaged; the message names it.
    """

    def __init__(self, folder: str | os.PathLike[str], info: DatasetInfo, split: str):
        files = shards.shard_files(folder, info, split)
        # Shards without records (all their pictures were broken) have nothing to open.
        self._files = [(path, records) for path, records in files if records]
        self._ends = list(itertools.accumulate(records for _, records in self._files))
        self._dtype = info.record
        # With their ranges given, files are opened only when read.
        paths = [f"{path}[0:{records}]" for path, records in self._files]
        self._source = ArrayRecordDataSource(paths) if paths else None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, i: int) -> np.void:
        try:
            data = self._source[i]  # type: ignore[index]
        except RuntimeError as error:
            path = self._files[bisect.bisect_right(self._ends, i)][0]
            raise shards.damaged(path, f"is damaged ({str(error).split(';')[0]})") from error
        if len(data) != self._dtype.itemsize:
            path = self._files[bisect.bisect_right(self._ends, i)][0]
            raise shards.damaged(path, "holds records of another size than dataset.json says")
        return np.frombuffer(data, self._dtype)[0]


def make_loader(
    folder: str | os.PathLike[str],
    batch_size: int,
    seed: int,
    *,
    start_step: int = 0,
    process_index: int | None = None,
    process_count: int | None = None,
    split: str = "train",
) -> Iterator[dict[str, np.ndarray]]:
    """An endless, shuffled stream of batches for training.

    Args:
      folder: of the token shards.
      batch_size: B of the whole job; each process gets its share of every batch.
      seed: of the order and of the choice of views.
      start_step: batches to leave out at the beginning, at no cost.
      process_index: this process among `process_count`; both default to JAX's.
      process_count: number of processes of the job.
      split: which shards.

    Returns:
      An iterator of `indices` `[B / processes, L, C]`, uint8 or uint16, of a random view of each
      image, and `labels` `[B / processes]`, int32.

    Raises:
      UserError: shards are missing or damaged or hold less than a batch, or the batch does not
        divide over the processes.
    """
    info = shards.read_info(folder)
    records = TokenRecords(folder, info, split)
    if len(records) < batch_size:
        raise UserError(
            f"a batch of {batch_size} needs as many images, but split '{split}' of {folder} has "
            f"{len(records)}; use a smaller batch or more images"
        )

    def pick_view(record: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
        view = rng.integers(info.views) if info.views > 1 else 0
        return {"indices": record["indices"][view], "labels": record["label"]}

    stream = grain.MapDataset.source(records).seed(seed).shuffle().repeat().random_map(pick_view)
    return _batches(stream, batch_size, start_step, process_index, process_count)


def validation_batches(
    folder: str | os.PathLike[str],
    batch_size: int,
    *,
    process_index: int | None = None,
    process_count: int | None = None,
    split: str = "validation",
) -> Iterator[dict[str, np.ndarray]]:
    """One pass over a split in order, plain view only, every image once.

    Args: as for `make_loader`.

    Returns:
      An iterator of batches as of `make_loader`, with `weights` float32 `[B / processes]` beside
      them: the last batch is filled up with images of weight 0. All processes get equally many.

    Raises:
      UserError: as `make_loader`, but for the number of images.
    """
    info = shards.read_info(folder)
    records = TokenRecords(folder, info, split)
    share = _share(batch_size, process_index, process_count)

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, len(records), batch_size):
            numbers = [start + row for row in share]
            chosen = [records[min(i, len(records) - 1)] for i in numbers]
            yield {
                "indices": np.stack([record["indices"][0] for record in chosen]),
                "labels": np.array([record["label"] for record in chosen], np.int32),
                "weights": np.array([i < len(records) for i in numbers], np.float32),
            }

    return batches()


def make_image_loader(
    source: Source,
    image_size: int,
    image_channels: int,
    batch_size: int,
    seed: int,
    *,
    subset: np.ndarray | None = None,
    flip: bool = True,
    start_step: int = 0,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """An endless, shuffled stream of pictures, for training an autoencoder.

    Args: as for `make_loader`, and
      source: pictures.
      image_size: pixels a side after the centre crop.
      image_channels: 3 or 1.
      subset: indices into the source that take part; all by default.
      flip: mirror half of the pictures, at random.

    Returns:
      An iterator of `images` uint8 `[B / processes, image_size, image_size, image_channels]` and
      `labels` int32. A broken picture is named on stderr, once, and its successor taken instead.

    Raises:
      UserError: fewer pictures than a batch, or the batch does not divide over the processes.
    """
    chosen = np.arange(len(source)) if subset is None else subset
    if len(chosen) < batch_size:
        raise UserError(
            f"a batch of {batch_size} needs as many images, but there are {len(chosen)}; use a "
            "smaller batch or more images"
        )
    pictures = _Pictures(source, chosen, image_size, image_channels)

    def mirror(element: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        if flip and rng.integers(2):
            element = {**element, "images": element["images"][:, ::-1]}
        return element

    stream = grain.MapDataset.source(pictures).seed(seed).shuffle().repeat().random_map(mirror)
    return _batches(stream, batch_size, start_step, process_index, process_count)


class _Pictures:
    """Prepared pictures by number, broken ones replaced by the next that is not."""

    def __init__(self, source: Source, chosen: np.ndarray, size: int, channels: int):
        self._source, self._chosen, self._size, self._channels = source, chosen, size, channels
        self._named: set[int] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        for step in range(len(self)):
            picture = int(self._chosen[(i + step) % len(self)])
            try:
                image, label = load_prepared(self._source, picture, self._size, self._channels)
            except ImageError as error:
                with self._lock:
                    if picture not in self._named:
                        print(f"broken image left out: {error}", file=sys.stderr)
                    self._named.add(picture)
            else:
                return {"images": image, "labels": np.int32(label)}  # type: ignore[dict-item]
        raise UserError("none of the images can be read")


def _batches(
    stream: grain.MapDataset,
    batch_size: int,
    start_step: int,
    process_index: int | None,
    process_count: int | None,
) -> Iterator[dict[str, np.ndarray]]:
    share = _share(batch_size, process_index, process_count)

    def read(step: int) -> dict[str, np.ndarray]:
        elements = [stream[step * batch_size + row] for row in share]
        return {name: np.stack([x[name] for x in elements]) for name in elements[0]}

    batches = grain.MapDataset.range(len(stream) // batch_size).map(read)
    iterator = iter(batches.to_iter_dataset(_READ_OPTIONS))
    iterator.set_state({"next_index": start_step})
    return iterator


def _share(batch_size: int, process_index: int | None, process_count: int | None) -> range:
    """The rows of every global batch that are this process's."""
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    if batch_size < 1 or batch_size % count:
        raise UserError(
            f"a batch of {batch_size} does not divide over {count} processes; use a multiple"
        )
    size = batch_size // count
    return range(index * size, (index + 1) * size)
