"""Batches from token shards, and batches of pictures for training an autoencoder.

Training reads an endless stream: epoch after epoch, each in its own order and with every image
once. Global batch s holds elements `s B .. (s+1) B - 1` of it, so a batch may begin in one epoch
and end in the next, and a process reads the rows of it that its devices hold
(`parallel.local_rows`): global batches are the same on any mesh and any number of processes.
The order is a function of the seed and the epoch, the choice among an image's views of the seed and
the step. The step number is thus the whole state of the iterator, and a run resumes exactly,
elsewhere too.
"""

import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Int64, Shaped

from tokenbridge_jax.data import shards
from tokenbridge_jax.data.images import ImageError
from tokenbridge_jax.data.shards import DatasetInfo
from tokenbridge_jax.data.sources import Source, load_prepared
from tokenbridge_jax.errors import UserError

# Threads wait for the disk, not for Python; a buffer counts batches.
_READ_OPTIONS = grain.ReadOptions(num_threads=8, prefetch_buffer_size=8)
# What a seed's generators draw.
_ORDER, _CHOICES = 0, 1


class TokenRecords:
    """The records of a split by number, as a numpy structured array (see `shards.py`).

    Raises:
      UserError: the split is unknown, or a shard is missing or damaged; the message names it.
    """

    def __init__(self, folder: str | os.PathLike[str], info: DatasetInfo, split: str):
        self._files = shards.shard_files(folder, info, split)
        sizes = np.array([records for _, records in self._files], np.int64)
        self._ends = np.cumsum(sizes)
        self._starts = self._ends - sizes
        self._dtype, self._classes = info.record, len(info.class_names)
        self._readers: list[ArrayRecordReader | None] = [None] * len(self._files)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, numbers: Int64[np.ndarray, " B"]) -> Shaped[np.ndarray, " B"]:
        """The records of these numbers, in this order.

        Raises:
          UserError: a shard is damaged, of another dataset, or holds a label of no class; the
            message names it.
        """
        shard = np.searchsorted(self._ends, numbers, side="right")
        place = numbers - self._starts[shard]
        data = map(self._read, shard.tolist(), place.tolist())
        records = np.frombuffer(b"".join(data), self._dtype)
        wrong = np.flatnonzero((records["label"] < 0) | (records["label"] >= self._classes))
        if len(wrong):
            path, _ = self._files[shard[wrong[0]]]
            raise UserError(
                f"token shard {path} holds label {records['label'][wrong[0]]}, but there are "
                f"{self._classes} classes: a picture without a class was tokenized; tokenize again "
                "with another --workdir, without the split it is from"
            )
        return records

    def _read(self, shard: int, place: int) -> bytes:
        path, _ = self._files[shard]
        try:
            reader = self._readers[shard] or self._open(shard)
            # A range of one: a list of places costs several times as much, for it goes through the
            # reader's thread pool and a table of all the shard's records.
            (record,) = reader.read(place, place + 1)
        except RuntimeError as error:
            raise shards.damaged(path, f"is damaged ({str(error).split(';')[0]})") from error
        if len(record) != self._dtype.itemsize:
            raise shards.damaged(path, "holds records of another size than dataset.json says")
        return record

    def _open(self, shard: int) -> ArrayRecordReader:
        """Opens a shard when it is first read, for all threads."""
        path, records = self._files[shard]
        # With a buffer smaller than a record, no more than the record is read from the file.
        reader = ArrayRecordReader(
            str(path), "readahead_buffer_size:0", file_reader_buffer_size=1024
        )
        if reader.num_records() != records:
            raise shards.damaged(
                path, f"is damaged (it lists {reader.num_records()} records, not {records})"
            )
        self._readers[shard] = reader
        return reader


def make_loader(
    folder: str | os.PathLike[str],
    batch_size: int,
    seed: int,
    *,
    start_step: int = 0,
    rows: Int64[np.ndarray, " b"] | None = None,
    split: str = "train",
) -> Iterator[dict[str, np.ndarray]]:
    """An endless, shuffled stream of batches for training.

    Args:
      folder: of the token shards.
      batch_size: B of the whole job.
      seed: of the order and of the choice of views.
      start_step: batches to leave out at the beginning, at no cost.
      rows: which of every batch to read; all by default, which only suits a single process.
      split: which shards.

    Returns:
      An iterator of `indices` `[b, L, C]`, uint8 or uint16, of a random view of each image, and
      `labels` `[b]`, int32.

    Raises:
      UserError: shards are missing or damaged or hold less than a batch.
    """
    info = shards.read_info(folder)
    records = TokenRecords(folder, info, split)
    if len(records) < batch_size:
        raise UserError(
            f"a batch of {batch_size} needs as many images, but split '{split}' of {folder} has "
            f"{len(records)}; use a smaller batch or more images"
        )

    def read(numbers: np.ndarray, views: np.ndarray) -> dict[str, np.ndarray]:
        chosen = records.read(numbers)
        return {
            "indices": chosen["indices"][np.arange(len(chosen)), views],
            "labels": chosen["label"].astype(np.int32),
        }

    return _shuffled(read, len(records), info.views, batch_size, rows, seed, start_step)


def validation_batches(
    folder: str | os.PathLike[str],
    batch_size: int,
    *,
    rows: Int64[np.ndarray, " b"] | None = None,
    split: str = "validation",
) -> Iterator[dict[str, np.ndarray]]:
    """One pass over a split in order, plain view only, every image once.

    Args: as for `make_loader`.

    Returns:
      An iterator of batches as of `make_loader`, with `weights` float32 `[b]` beside them: the last
      batch is filled up with images of weight 0. All processes get equally many.

    Raises:
      UserError: as `make_loader`, but for the number of images.
    """
    info = shards.read_info(folder)
    records = TokenRecords(folder, info, split)
    mine = np.arange(batch_size) if rows is None else rows

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, len(records), batch_size):
            numbers = start + mine
            chosen = records.read(np.minimum(numbers, len(records) - 1))
            yield {
                "indices": chosen["indices"][:, 0].copy(),
                "labels": chosen["label"].astype(np.int32),
                "weights": (numbers < len(records)).astype(np.float32),
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
    rows: Int64[np.ndarray, " b"] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """An endless, shuffled stream of pictures, for training an autoencoder.

    Args: as for `make_loader`, and
      source: pictures.
      image_size: pixels a side after the centre crop.
      image_channels: 3 or 1.
      subset: indices into the source that take part; all by default.
      flip: mirror half of the pictures, at random.

    Returns:
      An iterator of `images` uint8 `[b, image_size, image_size, image_channels]` and `labels` int32
      `[b]`. A broken picture is named on stderr, once, and its successor taken instead.

    Raises:
      UserError: fewer pictures than a batch.
    """
    chosen = np.arange(len(source)) if subset is None else subset
    if len(chosen) < batch_size:
        raise UserError(
            f"a batch of {batch_size} needs as many images, but there are {len(chosen)}; use a "
            "smaller batch or more images"
        )
    pictures = _Pictures(source, chosen, image_size, image_channels)

    def read(numbers: np.ndarray, mirrored: np.ndarray) -> dict[str, np.ndarray]:
        loaded, labels = zip(*map(pictures.load, numbers.tolist()), strict=True)
        images = np.stack(loaded)
        images[mirrored == 1] = images[mirrored == 1, :, ::-1]
        return {"images": images, "labels": np.array(labels, np.int32)}

    return _shuffled(read, len(chosen), 2 if flip else 1, batch_size, rows, seed, start_step)


class _Pictures:
    """Prepared pictures with labels, by number, broken ones replaced by the next that is not."""

    def __init__(self, source: Source, chosen: np.ndarray, size: int, channels: int):
        self._source, self._chosen, self._size, self._channels = source, chosen, size, channels
        self._named: set[int] = set()
        self._lock = threading.Lock()

    def load(self, i: int) -> tuple[np.ndarray, int]:
        for step in range(len(self._chosen)):
            picture = int(self._chosen[(i + step) % len(self._chosen)])
            try:
                return load_prepared(self._source, picture, self._size, self._channels)
            except ImageError as error:
                with self._lock:
                    if picture not in self._named:
                        print(f"broken image left out: {error}", file=sys.stderr)
                    self._named.add(picture)
        raise UserError("none of the images can be read")


def _shuffled(
    read: Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]],
    elements: int,
    choices: int,
    batch_size: int,
    rows: np.ndarray | None,
    seed: int,
    start_step: int,
) -> Iterator[dict[str, np.ndarray]]:
    """The stream that the module describes, over the numbers below `elements`.

    Args:
      read: makes the batch of these numbers with, for each, one of `choices` variants; both `[b]`.
    """
    mine = np.arange(batch_size) if rows is None else rows

    # The batches in work touch two epochs, more only if epochs are short: then orders are cheap.
    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, _ORDER, epoch)).permutation(elements)

    def batch(step: int) -> dict[str, np.ndarray]:
        epochs, places = np.divmod(step * batch_size + mine, elements)
        numbers = [order(epoch)[places[epochs == epoch]] for epoch in np.unique(epochs).tolist()]
        rng = np.random.default_rng((seed, _CHOICES, step))
        return read(np.concatenate(numbers), rng.integers(choices, size=batch_size)[mine])

    batches = grain.MapDataset.range(sys.maxsize // batch_size).map(batch)
    iterator = iter(batches.to_iter_dataset(_READ_OPTIONS))
    iterator.set_state({"next_index": start_step})
    return iterator
