"""Batches from token shards, and batches of pictures for training an autoencoder.

Training reads an endless stream of epochs. Each has every image once, in an order of its own.
Global batch s holds elements `s B .. (s+1) B - 1` of the stream, so a batch may begin in one epoch
and end in the next. A process reads the rows of it that its devices hold (`meshes.local_rows`), so
global batches are the same on any mesh and with any number of processes. The order depends on the
seed and the epoch. The choice among an image's views depends on the seed and the step. The step
number is therefore the whole state of the iterator, and a run resumes exactly on any machine.

Latents are drawn from the posterior whose mean and deviation are stored. Their noise depends on the
seed, the step and the row.
"""

import dataclasses
import functools
import itertools
import operator
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
from jaxtyping import Int64, Shaped

from tokenbridge_jax.data import shards
from tokenbridge_jax.data.batches import ShardPlan, prepared_batches
from tokenbridge_jax.data.images import ImageError
from tokenbridge_jax.data.readers import ShardReaders, damaged
from tokenbridge_jax.data.shards import DatasetInfo
from tokenbridge_jax.data.sources import Subset, load_prepared
from tokenbridge_jax.data.workers import NOTE_BYTES, count_workers, in_order
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.progress import Progress

# Threads mostly wait for the disk. The buffer counts batches.
_READ_OPTIONS = grain.ReadOptions(num_threads=8, prefetch_buffer_size=8)
# Pictures for training an autoencoder stay in memory, decoded, if they take no more; so many are
# decoded together.
_DECODED_BYTES, _DECODED_TOGETHER = 2 * 2**30, 64
_MANY = 2000  # So many pictures show progress.
# Random generators of a seed, by what they draw.
_ORDER, _CHOICES, _NOISE, _VALIDATION_NOISE = 0, 1, 2, 3
# So many rows share a generator of noise, because making one takes longer than drawing a row's.
_DRAWN_TOGETHER = 16


class TokenRecords:
    """Reads the records of a split by their numbers (see `shards.py`).

    Raises:
      UserError: the split is unknown, or a shard is missing or damaged; the message names it.
    """

    def __init__(self, folder: str | os.PathLike[str], info: DatasetInfo, split: str):
        self._files = shards.shard_files(folder, info, split)
        sizes = np.array([records for _, records in self._files], np.int64)
        self._ends = np.cumsum(sizes)
        self._starts = self._ends - sizes
        self._dtype, self._classes = info.record, len(info.class_names)
        self._readers = ShardReaders(self._files)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, numbers: Int64[np.ndarray, " B"]) -> Shaped[np.ndarray, " B"]:
        """The records of these numbers, in this order, as a numpy structured array.

        Raises:
          UserError: a shard is damaged, belongs to another dataset, has a label without a class, or
            cannot be read; the message names it.
        """
        # Read shard by shard, so that a shard that does not stay open is opened only once.
        order = np.argsort(numbers, kind="stable")
        shard = np.searchsorted(self._ends, numbers[order], side="right")
        place = numbers[order] - self._starts[shard]
        data: list[bytes] = []
        pairs = zip(shard.tolist(), place.tolist(), strict=True)
        for s, of_shard in itertools.groupby(pairs, key=operator.itemgetter(0)):
            found = self._readers.read(s, [place for _, place in of_shard])
            if any(len(record) != self._dtype.itemsize for record in found):
                path, _ = self._files[s]
                raise damaged(path, "holds records of another size than dataset.json says")
            data += found
        records = np.empty(len(numbers), self._dtype)
        records[order] = np.frombuffer(b"".join(data), self._dtype)
        wrong = (records["label"] < 0) | (records["label"] >= self._classes)
        if wrong.any():
            row = int(np.argmax(wrong))
            path, _ = self._files[int(np.searchsorted(self._ends, numbers[row], side="right"))]
            raise UserError(
                f"token shard {path} holds label {records['label'][row]}, but there are "
                f"{self._classes} classes: a picture without a class was tokenized; tokenize again "
                "with another --workdir, without the split it is from"
            )
        return records


def make_loader(
    folder: str | os.PathLike[str],
    batch_size: int,
    seed: int,
    *,
    latents: bool = False,
    start_step: int = 0,
    rows: Int64[np.ndarray, " b"] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """An endless, shuffled stream of batches from the split "train".

    Args:
      folder: of the token shards.
      batch_size: B of the whole job.
      seed: of the order, of the choice of views and of the draws of latents.
      latents: draw latents from the posterior; they take the place of indices.
      start_step: how many batches to skip at the beginning, at no cost.
      rows: which rows of every batch to read; by default all, for a single process.

    Returns:
      An iterator of `indices` `[b, L, C]`, uint8 or uint16, of a random view of each image, and
      `labels` `[b]`, int32. With `latents`, `indices` are float32 latents.

    Raises:
      UserError: shards are missing or damaged, have fewer images than a batch, or hold no indices,
        or no latents.
    """
    info = shards.read_info(folder)
    fields, views = _fields_of(info, latents)
    records = TokenRecords(folder, info, "train")
    if len(records) < batch_size:
        raise UserError(
            f"a batch of {batch_size} needs as many images, but split 'train' of {folder} has "
            f"{len(records)}; use a smaller batch or more images"
        )

    def read(numbers: np.ndarray, views: np.ndarray) -> dict[str, np.ndarray]:
        return _views(records.read(numbers), views, fields)

    mine = np.arange(batch_size) if rows is None else rows
    batches = _Batches(read, len(records), views, batch_size, mine, seed)

    def with_latents(step: int) -> dict[str, np.ndarray]:
        return _draw_latents(batches(step), (seed, _NOISE, step), mine)

    return _in_threads(with_latents if latents else batches, batches.steps(start_step))


def validation_batches(
    folder: str | os.PathLike[str],
    batch_size: int,
    *,
    latents: bool = False,
    rows: Int64[np.ndarray, " b"] | None = None,
    split: str = "validation",
) -> Iterator[dict[str, np.ndarray]]:
    """One pass over a split: the first view of every image, in order.

    The draw of an image's latents is the same in every pass.

    Args: as for `make_loader`, and
      split: which shards.

    Returns:
      An iterator of batches as from `make_loader`, with `weights` float32 `[b]`. The last batch is
      filled with images of weight 0. All processes get the same number of batches.

    Raises:
      UserError: shards are missing or damaged, or hold no indices, or no latents.
    """
    info = shards.read_info(folder)
    fields, _ = _fields_of(info, latents)
    records = TokenRecords(folder, info, split)
    mine = np.arange(batch_size) if rows is None else rows

    def batch(start: int) -> dict[str, np.ndarray]:
        weights = (start + mine < len(records)).astype(np.float32)
        numbers = np.minimum(start + mine, len(records) - 1)
        found = _views(records.read(numbers), np.zeros(len(numbers), np.int64), fields)
        if latents:
            found = _draw_latents(found, (0, _VALIDATION_NOISE, 0), numbers)
        return found | {"weights": weights}

    return map(batch, range(0, len(records), batch_size))


def _fields_of(info: DatasetInfo, latents: bool) -> tuple[tuple[str, ...], int]:
    """What to read of a record, and how many views of it there are."""
    if latents:
        info.check_holds("latents", "this loader")
        return ("mean", "deviation"), info.latent_views
    info.check_holds("indices", "this loader")
    return ("indices",), info.views


def _views(
    chosen: Shaped[np.ndarray, " b"], views: Int64[np.ndarray, " b"], fields: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """These fields of a view of each record, `[b, L, C]`, and `labels`."""
    rows = np.arange(len(chosen))
    found = {field: chosen[field][rows, views] for field in fields}
    return found | {"labels": chosen["label"].astype(np.int32)}


def _draw_latents(
    batch: dict[str, np.ndarray], key: tuple[int, ...], rows: Int64[np.ndarray, " b"]
) -> dict[str, np.ndarray]:
    """The batch with draws of the posterior in place of its mean and deviation.

    The noise of a row depends on the key and the row's number, and not on the other rows.
    """
    mean, deviation = batch.pop("mean"), batch.pop("deviation")
    noise = np.empty(mean.shape, np.float32)
    groups, places = np.divmod(rows, _DRAWN_TOGETHER)
    for group in np.unique(groups).tolist():
        rng = np.random.default_rng((*key, group))
        drawn = rng.standard_normal((_DRAWN_TOGETHER, *mean.shape[1:]), np.float32)
        noise[groups == group] = drawn[places[groups == group]]
    return batch | {"indices": mean + deviation * noise}


def make_image_loader(
    subset: Subset,
    image_size: int,
    image_channels: int,
    batch_size: int,
    seed: int,
    *,
    flip: bool = True,
    start_step: int = 0,
    rows: Int64[np.ndarray, " b"] | None = None,
    workers: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """An endless, shuffled stream of pictures, for training an autoencoder.

    If all pictures take at most 2 GiB, they are decoded once, before the first batch.

    Args: as for `make_loader`, and
      subset: the pictures.
      image_size: pixels a side after the centre crop.
      image_channels: 3 or 1.
      flip: mirror half of the pictures, at random.
      workers: processes that decode pictures; see `workers.count_workers`.

    Returns:
      An iterator of `images` uint8 `[b, image_size, image_size, image_channels]` and `labels` int32
      `[b]`. A broken picture is replaced by the next one, and named on stderr once.

    Raises:
      UserError: there are fewer pictures than a batch.
    """
    count = len(subset.images)
    if count < batch_size:
        raise UserError(
            f"a batch of {batch_size} needs as many images, but there are {count}; use a smaller "
            "batch or more images"
        )
    mine = np.arange(batch_size) if rows is None else rows
    size = image_size**2 * image_channels
    make = functools.partial(
        _Batches,
        elements=count,
        choices=2 if flip else 1,
        batch_size=batch_size,
        rows=mine,
        seed=seed,
    )
    if count * size <= _DECODED_BYTES:
        batches = make(_Decoded(subset, image_size, image_channels, workers))
        return _in_threads(batches, batches.steps(start_step))
    batches = make(_Pictures(subset, image_size, image_channels))
    result_bytes = len(mine) * (size + NOTE_BYTES)
    steps, processes = batches.steps(start_step), count_workers(workers, count)
    return _named(in_order(steps, batches, processes, result_bytes))


class _Decoded:
    """The pictures of a subset, decoded once and kept in memory."""

    def __init__(self, subset: Subset, image_size: int, image_channels: int, workers: int):
        count = len(subset.images)
        self._images = np.empty((count, image_size, image_size, image_channels), np.uint8)
        self._labels = np.empty(count, np.int32)
        plan = ShardPlan(Path(), "", subset.source, subset.images)
        sizes = _DECODED_TOGETHER, image_size, image_channels
        start, broken = 0, list[int]()
        with Progress(count, desc="decode", visible=count >= _MANY) as progress:
            for batch in prepared_batches([plan], *sizes, workers=workers):
                stop = start + len(batch.images)
                self._images[start:stop] = batch.pixels[: stop - start]
                self._labels[start:stop] = batch.labels
                for place, reason in batch.broken.items():
                    progress.note(f"broken image left out: {reason}")
                    broken.append(start + place)
                progress.update(stop - start)
                start = stop
        good = np.setdiff1d(np.arange(count), broken)
        if not len(good):
            raise UserError("none of the images can be read")
        next_good = good[np.searchsorted(good, broken) % len(good)]
        for array in (self._images, self._labels):
            array[broken] = array[next_good]

    def __call__(self, places: np.ndarray, mirrored: np.ndarray) -> dict[str, np.ndarray]:
        """A batch of the pictures at these places."""
        return _mirrored(self._images[places], self._labels[places], mirrored)


@dataclasses.dataclass(frozen=True)
class _Pictures:
    """The pictures of a subset, which are decoded for every batch. Worker processes copy it."""

    subset: Subset
    image_size: int
    image_channels: int

    def __call__(self, places: np.ndarray, mirrored: np.ndarray) -> dict[str, Any]:
        """A batch, with `broken`: why pictures cannot be used, by their places."""
        broken: dict[int, str] = {}
        loaded = [self._load(place, broken) for place in places.tolist()]
        images, labels = map(np.array, zip(*loaded, strict=True))
        return _mirrored(images, labels.astype(np.int32), mirrored) | {"broken": broken}

    def _load(self, place: int, broken: dict[int, str]) -> tuple[np.ndarray, int]:
        """The picture at a place, or the next one that is not broken, and its label."""
        chosen = self.subset.images
        for following in itertools.chain(range(place, len(chosen)), range(place)):
            picture = int(chosen[following])
            try:
                return load_prepared(
                    self.subset.source, picture, self.image_size, self.image_channels
                )
            except ImageError as error:
                broken[following] = str(error)
        raise UserError("none of the images can be read")


def _mirrored(images: np.ndarray, labels: np.ndarray, mirrored: np.ndarray) -> dict[str, Any]:
    images[mirrored == 1] = images[mirrored == 1, :, ::-1]
    return {"images": images, "labels": labels}


def _named(batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, np.ndarray]]:
    """The batches; their broken pictures are named on stderr, each once."""
    named = set[int]()
    for batch in batches:
        broken = batch.pop("broken")
        for place in broken.keys() - named:
            print(f"broken image left out: {broken[place]}", file=sys.stderr)
        named |= broken.keys()
        yield batch


@dataclasses.dataclass(frozen=True)
class _Batches:
    """The stream that the module describes. Worker processes copy it.

    Attributes:
      read: makes a batch from its numbers, and from the variant of each, which is below `choices`;
        both are `[b]`.
      elements: the numbers are those below it.
      choices: how many variants each has.
      batch_size: B of the whole job.
      rows: this process's rows, `[b]`.
      seed: as for `make_loader`.
    """

    read: Callable[[np.ndarray, np.ndarray], dict[str, Any]]
    elements: int
    choices: int
    batch_size: int
    rows: np.ndarray
    seed: int

    def steps(self, start: int) -> range:
        """The steps from `start` on, without an end."""
        return range(start, sys.maxsize // self.batch_size)

    def __call__(self, step: int) -> dict[str, Any]:
        """This process's rows of global batch `step`."""
        epochs, places = np.divmod(step * self.batch_size + self.rows, self.elements)
        numbers = [
            _order(self.seed, epoch, self.elements)[places[epochs == epoch]]
            for epoch in np.unique(epochs).tolist()
        ]
        rng = np.random.default_rng((self.seed, _CHOICES, step))
        choices = rng.integers(self.choices, size=self.batch_size)[self.rows]
        return self.read(np.concatenate(numbers), choices)


def _in_threads(
    make: Callable[[int], dict[str, Any]], steps: Iterable[int]
) -> Iterator[dict[str, Any]]:
    """The batches of these steps, in order, which threads of this process make."""
    return iter(grain.MapDataset.source(steps).map(make).to_iter_dataset(_READ_OPTIONS))


# Batches being read belong to two epochs, or to more if epochs are short and orders cheap.
@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, elements: int) -> np.ndarray:
    return np.random.default_rng((seed, _ORDER, epoch)).permutation(elements)
