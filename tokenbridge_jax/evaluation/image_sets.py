"""Sets of images to score: folders of pictures, `.npz` files in ADM's format, images of the data.

They are read and written in batches, so a file of 50,000 images is never in memory as a whole.
"""

import contextlib
import functools
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Integer, Shaped, UInt8
from ml_collections import ConfigDict

from tokenbridge_jax.data.images import ImageError, decode, open_picture
from tokenbridge_jax.data.listing import EXTENSIONS, list_pictures
from tokenbridge_jax.data.shards import INFO_FILE, read_info
from tokenbridge_jax.data.sources import load_prepared, make_subsets
from tokenbridge_jax.runtime import storage
from tokenbridge_jax.runtime.errors import UserError

# Name of the array of images in an `.npz` file.
ARRAY = "arr_0"
_BLOCK_BYTES = 2**20


class ImageSet:
    """RGB images of one size, which are loaded when they are needed.

    Attributes:
      path: where they are; it names them in messages.
      load: returns the images of some of the items, in their order.
      count: N, the number of images.
      shape: height, width, 3.
      facts: the settings to report with any result about these images.
    """

    def __init__(
        self,
        path: epath.PathLike,
        load: Callable[[np.ndarray], UInt8[np.ndarray, "n H W 3"]],
        items: Shaped[np.ndarray, "N ..."],
        shape: tuple[int, ...],
        facts: Mapping[str, Any] | None = None,
    ):
        """`load` returns the images of some of the N items, such as file names or indices.

        `shape` begins with height and width. By default, `facts` has only the size of the images.
        """
        self.path, self.load, self._items = Path(str(path)), load, items
        self.shape = (*shape[:2], 3)
        self.facts = facts or {"image_size": _size(shape)}

    @property
    def count(self) -> int:
        return len(self._items)

    def take(self, count: int) -> None:
        """Keeps only `count` images, evenly spaced; all images if there are fewer.

        Of a compressed `.npz`, which must be read from its start, it keeps the first ones.
        """
        chosen = np.linspace(0, self.count - 1, min(self.count, count))
        self._items = self._items[chosen.round().astype(int)]

    def batches(self, size: int, first: int, last: int) -> Iterator[UInt8[np.ndarray, "n H W 3"]]:
        """The images from `first` to before `last`, in batches of `size`; the last may be smaller.

        Raises:
          UserError: an image cannot be read.
        """
        for start in range(first, last, size):
            yield self.load(self._items[start : min(start + size, last)])


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"


def open_images(path: str | Path) -> ImageSet:
    """Opens a folder of pictures (including its subfolders) or a `.npz` with `arr_0`.

    A folder without pictures may hold such `.npz` files, which are read in the order of their
    names: those that the shards of `sample` wrote are then the images of one call, in its order.

    Raises:
      UserError: there are no images, or they cannot be used.
    """
    path = Path(storage.expand(path))
    if path.is_dir():
        return _open_folder(path)
    if path.is_file() and path.suffix == ".npz":
        return _open_npz(path)
    found = "is neither a folder nor an .npz file" if path.exists() else "does not exist"
    raise UserError(f"{path} {found}; give a folder of pictures or an .npz with {ARRAY}")


def _open_folder(path: Path) -> ImageSet:
    files = [path / name for name in list_pictures(path)]
    if not files and (parts := sorted(path.glob("*.npz"))):
        return _open_parts(path, parts)
    if not files:
        raise UserError(f"{path} holds no pictures ({', '.join(sorted(EXTENSIONS))}) and no .npz")
    shape = _read_picture(files[0]).shape

    def load(some: np.ndarray) -> UInt8[np.ndarray, "n H W 3"]:
        # Pillow releases the interpreter's lock while it decodes.
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            images = list(threads.map(_read_picture, some))
        for file, image in zip(some, images, strict=True):
            if image.shape != shape:
                raise UserError(
                    f"{path} holds pictures of several sizes ({files[0].name} {_size(shape)} and "
                    f"{file.name} {_size(image.shape)}); crop them to one (`evaluate reference` "
                    "crops the config's images)"
                )
        return np.stack(images)

    return ImageSet(path, load, np.array(files), shape)


def _read_picture(file: Path) -> UInt8[np.ndarray, "H W 3"]:
    try:
        with open_picture(file) as image:
            return np.asarray(decode(image, 3))
    except (OSError, SyntaxError, ValueError, ImageError) as error:
        raise UserError(f"{file} cannot be read as a picture: {error}") from error


def _open_parts(path: Path, files: Sequence[Path]) -> ImageSet:
    """The images of several files that `np.savez` or `sample` wrote, as one set."""
    _check_complete(files)
    parts = [_open_npz(file) for file in files]
    for file, part in zip(files, parts, strict=True):
        if isinstance(part, _CompressedNpz):
            raise UserError(f"{file} is compressed: write the files of a folder with np.savez")
        if part.shape != parts[0].shape:
            raise UserError(
                f"{path} holds images of several sizes ({files[0].name} {_size(parts[0].shape)} "
                f"and {file.name} {_size(part.shape)}); move them apart"
            )
    ends = np.cumsum([part.count for part in parts])

    def load(numbers: np.ndarray) -> UInt8[np.ndarray, "n H W 3"]:
        of = np.searchsorted(ends, numbers, side="right")
        images = np.empty((len(numbers), *parts[0].shape), np.uint8)
        for i in np.unique(of):
            images[of == i] = parts[i].load(numbers[of == i] - ends[i] + parts[i].count)
        return images

    return ImageSet(path, load, np.arange(ends[-1]), parts[0].shape)


def _check_complete(files: Sequence[Path]) -> None:
    """Checks that of files named NAME-00000-of-00004.npz all are there."""
    shards = [re.fullmatch(r"(.*-)\d{5}(-of-(\d{5})\.npz)", file.name) for file in files]
    for name, of, count in {(shard[1], shard[2], int(shard[3])) for shard in shards if shard}:
        wanted = {f"{name}{number:05d}{of}" for number in range(count)}
        if missing := sorted(wanted - {file.name for file in files}):
            raise UserError(
                f"{files[0].parent / missing[0]} is missing ({len(missing)} of {count} are); "
                "draw it, or remove the others"
            )


def _open_npz(path: Path) -> ImageSet:
    with _open_array(path) as file:
        version = np.lib.format.read_magic(file)
        shape, fortran, dtype = (
            np.lib.format.read_array_header_1_0(file)
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0(file)
        )
        start = file.tell()
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or fortran:
        raise UserError(
            f"{path}: {ARRAY} must be uint8 of shape [N, H, W, 3] or [N, H, W, 1], not {dtype} "
            f"{list(shape)}"
        )
    if not shape[0]:
        raise UserError(f"{path}: {ARRAY} holds no images")
    offset = _stored_offset(path)
    if offset is None:
        return _CompressedNpz(path, shape, start)
    # The array is not compressed, as `np.savez` writes it: any image can be read directly.
    if offset + start + np.prod(shape, dtype=object) > path.stat().st_size:
        raise UserError(f"{path} is damaged: {ARRAY} ends too early")
    with storage.npy_errors(path):
        images = np.memmap(path, np.uint8, "r", offset + start, shape)

    @functools.cache
    def check() -> None:
        """Compares all images with their CRC, once: a memory map does not check it."""
        with _open_array(path) as file:
            _read_to_end(file)

    def load(numbers: np.ndarray) -> UInt8[np.ndarray, "n H W 3"]:
        check()
        return rgb(images[numbers])

    return ImageSet(path, load, np.arange(shape[0]), shape[1:])


class _CompressedNpz(ImageSet):
    """Images of a compressed array, which is always read from its start."""

    def __init__(self, path: Path, shape: tuple[int, ...], start: int):
        super().__init__(path, lambda images: images, np.arange(shape[0]), shape[1:])
        self._stored, self._start, self._checked = shape[1:], start, False

    def take(self, count: int) -> None:
        """See `ImageSet`."""
        self._items = self._items[:count]

    def batches(self, size: int, first: int, last: int) -> Iterator[UInt8[np.ndarray, "n H W 3"]]:
        """See `ImageSet`."""
        bytes_each = int(np.prod(self._stored))
        with _open_array(self.path) as file:
            file.seek(self._start + first * bytes_each)
            for start in range(first, last, size):
                count = min(size, last - start)
                data = file.read(count * bytes_each)
                if len(data) < count * bytes_each:
                    raise UserError(f"{self.path} is damaged: {ARRAY} ends too early")
                if start + count == last and not self._checked:
                    _read_to_end(file)
                    self._checked = True
                yield rgb(np.frombuffer(data, np.uint8).reshape(count, *self._stored))


@contextlib.contextmanager
def _open_array(path: Path) -> Iterator[Any]:
    with storage.open_npz(path) as archive:
        if f"{ARRAY}.npy" not in archive.namelist():
            raise UserError(f"{path} has no array {ARRAY}")
        with archive.open(f"{ARRAY}.npy") as file:
            yield file


def _read_to_end(file: Any) -> None:
    while file.read(_BLOCK_BYTES):
        pass  # At the end, zipfile raises an error if the CRC is wrong.


def _stored_offset(path: Path) -> int | None:
    """Where the `.npy` of the array begins in the file; None if it is compressed."""
    with storage.open_npz(path) as archive, path.open("rb") as raw:
        info = archive.getinfo(f"{ARRAY}.npy")
        if info.compress_type != zipfile.ZIP_STORED:
            return None
        raw.seek(info.header_offset + 26)  # The lengths of the name and of the extra field.
        lengths = np.frombuffer(raw.read(4), "<u2")
        return info.header_offset + 30 + int(lengths.sum())


def rgb(images: UInt8[np.ndarray, "N H W C"]) -> UInt8[np.ndarray, "N H W 3"]:
    """Repeats the channel of grey images three times; RGB images are returned unchanged."""
    return images.repeat(3, axis=-1) if images.shape[-1] == 1 else images


def data_images(config: ConfigDict, *splits: str, tokens: epath.PathLike | None = None) -> ImageSet:
    """The images of `config.data`, cropped as for training.

    Args:
      config: describes the data.
      *splits: names of splits; the first that the data has is used.
      tokens: folder of token shards. Images that were broken when these were made are left out,
        and `facts` gives their number.

    Raises:
      UserError: the config has no such split. Reading raises it if an image is broken.
    """
    subsets = make_subsets(config)
    split = next((name for name in splits if name in subsets), None)
    if split is None:
        raise UserError(f"the config's data have no split '{splits[0]}', only {', '.join(subsets)}")
    source, chosen = subsets[split].source, subsets[split].images
    broken = _left_out(tokens, split, source.describe()) if tokens else []
    chosen = chosen[~np.isin(chosen, broken)]
    size, channels = config.data.image_size, config.data.image_channels

    def load(number: int) -> UInt8[np.ndarray, "size size c"]:
        try:
            return load_prepared(source, number, size, channels)[0]
        except ImageError as error:
            raise UserError(f"broken image {error}; repair or remove it") from error

    def make(numbers: np.ndarray) -> UInt8[np.ndarray, "n size size 3"]:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            return rgb(np.stack(list(threads.map(load, numbers.tolist()))))

    facts = {
        "source": source.describe(),
        "image_size": _size((size, size)),
        "crop": "as ADM, to a square",
    } | ({"broken_left_out": len(broken)} if broken else {})
    return ImageSet(f"config.data, {split}", make, chosen, (size, size), facts)


def _left_out(tokens: epath.PathLike, split: str, source: Mapping[str, Any]) -> list[int]:
    """The images of a split that were left out of token shards of the same images."""
    if not storage.exists(storage.as_path(tokens) / INFO_FILE):
        return []
    info = read_info(tokens)
    found = info.sources.get(split, {})
    if any(found.get(key) != value for key, value in source.items() if key != "path"):
        return []  # The shards are of other images.
    return [item["image"] for item in info.skipped if item["split"] == split]


def write_images(path: epath.PathLike, images: ImageSet, labels: Integer[np.ndarray, " N"]) -> None:
    """Writes `.npz` as `np.savez(path, arr_0=images, labels=labels)` would, in batches.

    The file is written completely or not at all.

    Args:
      path: of the file.
      images: N images.
      labels: the class of every image.

    Raises:
      UserError: it cannot be written.
    """
    shape = (images.count, *images.shape)
    with storage.npz_in_parts(path, ARRAY, shape, labels=np.asarray(labels)) as append:
        for batch in images.batches(64, 0, images.count):
            append(batch)
