"""Images to be scored, a batch at a time: folders of pictures, and `.npz` files as ADM's.

Of a file with 50,000 images no more than a batch is ever in memory, read or written.
"""

import abc
import contextlib
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
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

ARRAY = "arr_0"
_BLOCK_BYTES = 2**20


class ImageSet(abc.ABC):
    """RGB images of one size, in an order of their own.

    Attributes:
      path: where they are.
      count: how many.
      shape: height, width, 3.
      facts: what a figure of them has to state.
    """

    path: Path
    count: int
    shape: tuple[int, ...]
    facts: Mapping[str, Any] = {}

    @abc.abstractmethod
    def take(self, count: int) -> None:
        """Leaves `count` of the images, or all if there are fewer: spread evenly if they can be.

        Of a compressed `.npz`, which is read from its beginning, it is the first.
        """

    @abc.abstractmethod
    def batches(self, size: int, first: int, last: int) -> Iterator[UInt8[np.ndarray, "n H W 3"]]:
        """The images from `first` to before `last`, `size` at a time."""


def open_images(path: str | Path) -> ImageSet:
    """A folder of pictures (folders within it included) or a `.npz` with `arr_0`.

    Raises:
      UserError: there are no images, or they cannot be used.
    """
    path = Path(storage.expand(path))
    if path.is_dir():
        return _Folder(path)
    if path.is_file() and path.suffix == ".npz":
        return _Npz(path)
    found = "is neither a folder nor an .npz file" if path.exists() else "does not exist"
    raise UserError(f"{path} {found}; give a folder of pictures or an .npz with {ARRAY}")


class _Folder(ImageSet):
    def __init__(self, path: Path):
        self.path = path
        self._files = [path / name for name in list_pictures(path)]
        self.count = len(self._files)
        if not self._files:
            raise UserError(f"{path} holds no pictures ({', '.join(sorted(EXTENSIONS))})")
        self.shape = self._read(self._files[0]).shape
        self.facts = {"image_size": _size(self.shape)}

    def take(self, count: int) -> None:
        """See `ImageSet`."""
        self._files = [self._files[i] for i in _spread(self.count, count)]
        self.count = len(self._files)

    def batches(self, size: int, first: int, last: int) -> Iterator[UInt8[np.ndarray, "n H W 3"]]:
        # Pillow releases the interpreter's lock while it decodes.
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for start in range(first, last, size):
                files = self._files[start : min(start + size, last)]
                images = list(threads.map(self._read, files))
                for file, image in zip(files, images, strict=True):
                    if image.shape != self.shape:
                        sizes = " and ".join(
                            f"{name.name} {shape[1]}x{shape[0]}"
                            for name, shape in ((self._files[0], self.shape), (file, image.shape))
                        )
                        raise UserError(
                            f"{self.path} holds pictures of several sizes ({sizes}); crop them to "
                            "one (`evaluate reference` crops the config's images)"
                        )
                yield np.stack(images)

    def _read(self, file: Path) -> UInt8[np.ndarray, "H W 3"]:
        try:
            with open_picture(file) as image:
                return np.asarray(decode(image, 3))
        except (OSError, SyntaxError, ValueError, ImageError) as error:
            raise UserError(f"{file} cannot be read as a picture: {error}") from error


class _Npz(ImageSet):
    def __init__(self, path: Path):
        self.path = path
        self._checked = False
        with self._open() as file:
            version = np.lib.format.read_magic(file)
            shape, fortran, dtype = (
                np.lib.format.read_array_header_1_0(file)
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0(file)
            )
            self._offset = file.tell()
            mapped = self._place_in_file(file)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or fortran:
            raise UserError(
                f"{path}: {ARRAY} must be uint8 of shape [N, H, W, 3] or [N, H, W, 1], not {dtype} "
                f"{list(shape)}"
            )
        self.count, self.shape, self._stored = shape[0], (*shape[1:3], 3), shape[1:]
        self.facts = {"image_size": _size(self.shape)}
        # A file that `np.savez` wrote is not compressed: any of its images can be read at once.
        self._images: np.ndarray | None = None
        self._chosen = np.arange(self.count)
        if mapped is not None and self.count:
            if mapped + np.prod(shape, dtype=object) > path.stat().st_size:
                raise UserError(f"{path} is damaged: {ARRAY} ends too early")
            with storage.npy_errors(path):
                self._images = np.memmap(path, np.uint8, "r", mapped, shape)
        if not self.count:
            raise UserError(f"{path}: {ARRAY} holds no images")

    def take(self, count: int) -> None:
        """See `ImageSet`."""
        self._chosen = _spread(self.count, count)
        self.count = len(self._chosen)

    def batches(self, size: int, first: int, last: int) -> Iterator[UInt8[np.ndarray, "n H W 3"]]:
        if self._images is not None:
            self._check()
            for start in range(first, last, size):
                yield rgb(self._images[self._chosen[start : min(start + size, last)]])
            return
        bytes_each = int(np.prod(self._stored))
        with self._open() as file:
            file.seek(self._offset + first * bytes_each)
            for start in range(first, last, size):
                count = min(size, last - start)
                data = file.read(count * bytes_each)
                if len(data) < count * bytes_each:
                    raise UserError(f"{self.path} is damaged: {ARRAY} ends too early")
                if start + count == last and not self._checked:
                    self._read_to_end(file)
                yield rgb(np.frombuffer(data, np.uint8).reshape(count, *self._stored))

    def _check(self) -> None:
        """Compares the images with their CRC, once: a memory map checks nothing."""
        if not self._checked:
            with self._open() as file:
                self._read_to_end(file)

    def _read_to_end(self, file: Any) -> None:
        while file.read(_BLOCK_BYTES):
            pass  # Raises where the end does not agree with the CRC.
        self._checked = True

    def _place_in_file(self, file: Any) -> int | None:
        """Where the array's data begin in the file, if they are not compressed."""
        with zipfile.ZipFile(self.path) as archive, self.path.open("rb") as raw:
            info = archive.getinfo(f"{ARRAY}.npy")
            if info.compress_type != zipfile.ZIP_STORED:
                return None
            raw.seek(info.header_offset + 26)  # Behind it: the lengths of a name and of extras.
            lengths = np.frombuffer(raw.read(4), "<u2")
            return info.header_offset + 30 + int(lengths.sum()) + file.tell()

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        with storage.open_npz(self.path) as archive:
            if f"{ARRAY}.npy" not in archive.namelist():
                raise UserError(f"{self.path} has no array {ARRAY}")
            with archive.open(f"{ARRAY}.npy") as file:
                yield file


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"


def _spread(length: int, count: int) -> Integer[np.ndarray, " n"]:
    """Places of `count` of so many items, or of all, evenly over them."""
    return np.linspace(0, length - 1, min(length, count)).round().astype(int)


def rgb(images: UInt8[np.ndarray, "N H W C"]) -> UInt8[np.ndarray, "N H W 3"]:
    """Grey images with their channel three times."""
    return images.repeat(3, axis=-1) if images.shape[-1] == 1 else images


class MadeImages(ImageSet):
    """Images that are made when they are asked for, such as samples from their indices."""

    def __init__(
        self,
        path: epath.PathLike,
        make: Callable[[np.ndarray], UInt8[np.ndarray, "n H W 3"]],
        recipes: Shaped[np.ndarray, "N ..."],
        side: int,
        facts: Mapping[str, Any],
    ):
        """`make` turns some of the N recipes into images of `side` pixels; `path` names them."""
        self.path, self._make, self._recipes, self.facts = Path(str(path)), make, recipes, facts
        self.count, self.shape = len(recipes), (side, side, 3)

    def take(self, count: int) -> None:
        """See `ImageSet`."""
        self._recipes = self._recipes[_spread(self.count, count)]
        self.count = len(self._recipes)

    def batches(self, size: int, first: int, last: int) -> Iterator[UInt8[np.ndarray, "n H W 3"]]:
        """See `ImageSet`."""
        for start in range(first, last, size):
            yield self._make(self._recipes[start : min(start + size, last)])


def data_images(
    config: ConfigDict, *splits: str, tokens: epath.PathLike | None = None
) -> MadeImages:
    """The images of `config.data`, of the first of these splits that it has, as for training.

    Args:
      config: of the data.
      *splits: names of splits.
      tokens: folder of token shards: images that were found broken when these were made are left
        out, and stated in `facts`.

    Raises:
      UserError: the config has no such split; on reading, an image is broken.
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
        "image_size": f"{size}x{size}",
        "crop": "as ADM, to a square",
    } | ({"broken_left_out": len(broken)} if broken else {})
    return MadeImages(f"config.data, {split}", make, chosen, size, facts)


def _left_out(tokens: epath.PathLike, split: str, source: Mapping[str, Any]) -> list[int]:
    """The images of a split that token shards of the same images lack."""
    if not storage.exists(storage.as_path(tokens) / INFO_FILE):
        return []
    info = read_info(tokens)
    found = info.sources.get(split, {})
    if any(found.get(key) != value for key, value in source.items() if key != "path"):
        return []  # Numbers of other images.
    return [item["image"] for item in info.skipped if item["split"] == split]


def write_images(
    path: epath.PathLike,
    images: Iterator[UInt8[np.ndarray, "n H W C"]],
    shape: tuple[int, ...],
    labels: Integer[np.ndarray, " N"],
) -> None:
    """Writes `.npz` as `np.savez(path, arr_0=images, labels=labels)` would, a batch at a time.

    The file is whole or not there.

    Args:
      path: of the file.
      images: batches of all N images.
      shape: of all images together, [N, H, W, C].
      labels: the class of every image.

    Raises:
      UserError: it cannot be written.
    """
    with storage.replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open(f"{ARRAY}.npy", "w", force_zip64=True) as array:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(array, header)
            for batch in images:
                array.write(np.ascontiguousarray(batch).data)
        with archive.open("labels.npy", "w") as array:
            np.lib.format.write_array(array, np.asarray(labels))
