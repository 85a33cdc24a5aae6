"""Sources of pictures: random access to (picture, label) by index, in a fixed order.

The order must not change: a shard stores the indices of its pictures, and a resumed `tokenize`
relies on index i meaning the same picture as before.
"""

import dataclasses
import hashlib
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict
from PIL import Image

from tokenbridge_jax.data import images
from tokenbridge_jax.data.class_names import readable_names
from tokenbridge_jax.data.images import ImageError
from tokenbridge_jax.data.listing import EXTENSIONS, list_classes
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.storage import expand

# Errors that concern a single picture. Others mean that the storage fails.
_FILE_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


@runtime_checkable
class Source(Protocol):
    """Pictures with labels, by index."""

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """The name of picture i in messages. `hold_out` chooses pictures by their names."""
        ...

    def load(self, i: int) -> tuple[Image.Image, int]:
        """Picture i, which may not be decoded yet, and its label."""
        ...

    def label(self, i: int) -> int:
        """The label of picture i; of a picture without a class, a number that is no class."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON that differs between sources, except that `path` may change."""
        ...


class FolderSource:
    """A tree with one folder per class: `root/CLASS/**/picture.jpg`.

    Labels follow the sorted folder names; names that are all whole numbers are sorted as numbers.
    Pictures are sorted by path. `listing.py` defines what a picture and a class folder are. A file
    `root/classes.txt` gives classes readable names (see `class_names.py`).

    Args:
      root: the folder.
      every_class: refuse class folders without pictures, as an interrupted download leaves them.

    Raises:
      UserError: the folder is missing or cannot be listed, or has no class folders or no pictures;
        or `classes.txt` gives a folder two names.
    """

    def __init__(self, root: str | os.PathLike[str], *, every_class: bool = True):
        self.root = Path(expand(root))
        if not self.root.is_dir():
            raise UserError(
                f"image folder {self.root} does not exist; set --config.data.path and "
                "--config.data.split (a subfolder, or empty)"
            )
        classes = list_classes(self.root)
        if not classes:
            raise UserError(f"{self.root} holds no class folders; pictures go into ROOT/CLASS/")
        self._files = [name for files in classes.values() for name in files]
        if not self._files:
            raise UserError(
                f"{self.root} holds {len(classes)} class folders but no pictures "
                f"({', '.join(sorted(EXTENSIONS))})"
            )
        empty = [name for name, files in classes.items() if not files]
        if empty and every_class:
            more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
            raise UserError(
                f"{self.root} has class folders without pictures: {', '.join(empty[:3])}{more}; "
                "fill them, or remove them if they are not classes"
            )
        self._labels = [label for label, files in enumerate(classes.values()) for _ in files]
        self.class_names = readable_names(self.root / "classes.txt", list(classes))

    def __len__(self) -> int:
        return len(self._files)

    def name(self, i: int) -> str:
        return self._files[i]

    def load(self, i: int) -> tuple[Image.Image, int]:
        return images.open_picture(self.root / self._files[i]), self.label(i)

    def label(self, i: int) -> int:
        return self._labels[i]

    def describe(self) -> dict[str, Any]:
        names = "".join(f"{name}\0" for name in self._files).encode("utf-8", "surrogateescape")
        return {
            "kind": "folder",
            "path": str(self.root),
            "images": len(self),
            "names_sha256": hashlib.sha256(names).hexdigest(),
        }


class TfdsSource:
    """A split of a dataset that TensorFlow Datasets prepared as ArrayRecord, such as ImageNet.

    Prepare it once, on a machine with TensorFlow: `tfds build imagenet2012
    --file_format=array_record`. Reading needs no TensorFlow, because the archive's JPEGs are
    decoded here.

    Args:
      path: the data directory (`.../tensorflow_datasets`), or the version folder in it that holds
        `dataset_info.json`.
      split: `train`, `validation`, or any TFDS split expression such as `train[:10%]`.
      name: the dataset, if `path` is the data directory: `imagenet2012`, `name/config`, ...
      num_classes: how many classes there are if labels are plain integers: 0, 1, ...

    Raises:
      UserError: the archive or split does not exist, has another format, or holds no pictures or no
        classes; or the package is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        split: str = "train",
        name: str = "imagenet2012",
        num_classes: int = 0,
    ):
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise UserError(
                "reading a TFDS archive needs its package: pip install tensorflow-datasets"
            ) from error
        folder = _tfds_version_folder(Path(expand(path)), name)
        try:
            builder = tfds.builder_from_directory(str(folder))
            self.class_names = _tfds_classes(folder, builder.info.features, num_classes)
            size = builder.info.splits[split].num_examples
            if not size:
                raise UserError(f"split '{split}' of {folder} holds no pictures; name a larger one")
            self._records = builder.as_data_source(
                split, decoders={"image": tfds.decode.SkipDecoding()}
            )
        except UserError:
            raise
        except (ValueError, NotImplementedError, RuntimeError, KeyError) as error:
            reason = str(error).strip("'\"").splitlines()[0]
            raise UserError(f"cannot read split '{split}' of {folder}: {reason}") from error
        self._size, self._split, self._folder = size, split, folder
        self._dataset = builder.info.full_name

    def __len__(self) -> int:
        return self._size

    def name(self, i: int) -> str:
        # Using the file names in the records would mean reading the whole archive.
        return f"{self._dataset}/{self._split}[{i}]"

    def load(self, i: int) -> tuple[Image.Image, int]:
        record = self._records[i]
        return images.open_picture(io.BytesIO(record["image"])), int(record["label"])

    def label(self, i: int) -> int:
        return int(self._records[i]["label"])

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "tfds",
            "path": str(self._folder),
            "dataset": self._dataset,
            "split": self._split,
            "images": len(self),
        }


def _tfds_classes(folder: Path, features: Any, num_classes: int) -> tuple[str, ...]:
    """Checks that an archive holds pictures with classes, and returns the names of the classes."""
    import tensorflow_datasets as tfds

    named = dict(features) if isinstance(features, tfds.features.FeaturesDict) else {}
    image, label = named.get("image"), named.get("label")
    if not isinstance(image, tfds.features.Image):
        raise UserError(f"{folder} has no feature 'image' of pictures, only {_list(named)}")
    if label is None:
        raise UserError(
            f"{folder} has no feature 'label', only {_list(named)}: its pictures have no classes; "
            "put them into class folders and set --config.data.source=folder"
        )
    if isinstance(label, tfds.features.ClassLabel) and label.names:
        return tuple(label.names)
    if label.shape != () or not np.issubdtype(label.np_dtype, np.integer):
        raise UserError(f"the labels of {folder} are not classes but {type(label).__name__}")
    return tuple(map(str, range(num_classes)))


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _tfds_version_folder(path: Path, name: str) -> Path:
    """The folder with `dataset_info.json`: `path` itself or the newest version in `path/name`."""
    if (path / "dataset_info.json").is_file():
        return path
    versions = [found.parent for found in (path / name).glob("*/dataset_info.json")]
    if not versions:
        raise UserError(
            f"no TFDS archive at {path / name}/VERSION/dataset_info.json; set --config.data.path "
            f"to the TFDS data directory or to the version folder"
        )

    def by_number(folder: Path) -> tuple[int, ...]:
        return tuple(int(part) if part.isdigit() else 0 for part in folder.name.split("."))

    return max(versions, key=by_number)


class DigitsSource:
    """The 1,797 handwritten digits that come with scikit-learn: 8x8 pixels, 10 classes.

    Their values 0..16 become 0..255. In the order of the data set, the first 80% of every class
    (rounded down) are the split "train", the others "validation".
    """

    class_names = tuple("0123456789")

    def __init__(self, split: str = "train"):
        if split not in ("train", "validation"):
            raise UserError(f"digits have the splits 'train' and 'validation', not '{split}'")
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        classes = [np.flatnonzero(labels == label) for label in range(10)]
        parts = [np.split(rows, [len(rows) * 4 // 5])[split != "train"] for rows in classes]
        self._rows = np.sort(np.concatenate(parts))
        self._split = split
        scaled = np.round(pixels[self._rows] * (255 / 16)).astype(np.uint8)
        self.images: UInt8[np.ndarray, "n 8 8 1"] = scaled.reshape(-1, 8, 8, 1)
        self.labels = labels[self._rows].astype(np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        return f"digit {self._rows[i]}"

    def load(self, i: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[i, :, :, 0]), self.label(i)

    def label(self, i: int) -> int:
        return int(self.labels[i])

    def describe(self) -> dict[str, Any]:
        return {"kind": "digits", "split": self._split, "images": len(self)}


def make_source(data: ConfigDict, split: str | None = None) -> Source:
    """The source that `config.data` describes, or another split of it.

    Args:
      data: has `source` ("folder", "tfds", "digits"), `path`, `split`, `name` (of a TFDS dataset),
        `num_classes` and `image_channels`. For a folder, `split` is a subfolder of `path`, or empty
        if `path` holds the class folders. Without a subfolder `train`, `path` takes its place.
      split: in place of `data.split`. It may lack pictures of some classes.

    Raises:
      UserError: the source is unknown, missing or empty, or has more classes than
        `data.num_classes`; or `data.image_channels` is neither 1 nor 3.
    """
    if data.image_channels not in (1, 3):
        raise UserError(
            f"config.data.image_channels is {data.image_channels}; it must be 3 (RGB) or 1 (grey)"
        )
    every_class, kind = split is None, data.source
    split = data.split if split is None else split
    if kind in ("folder", "tfds") and not data.path:
        raise UserError(f"--config.data.path is not set; data.source '{kind}' is read from there")
    source: Source
    if kind == "folder":
        root = Path(expand(data.path))
        only_train = split == "train" and not (root / split).is_dir()
        source = FolderSource(root if only_train else root / split, every_class=every_class)
    elif kind == "tfds":
        source = TfdsSource(data.path, split or "train", data.name, data.num_classes)
    elif kind == "digits":
        if data.path:
            raise UserError(
                f"config.data.path='{data.path}' has no effect on data.source='digits'; name the "
                "experiment of your pictures with --config, or set data.source=folder"
            )
        source = DigitsSource(split or "train")
    else:
        raise UserError(f"config.data.source is '{kind}'; it must be folder, tfds or digits")
    if len(source.class_names) > data.num_classes:
        raise UserError(
            f"the images have {len(source.class_names)} classes but config.data.num_classes is "
            f"{data.num_classes}; set --config.data.num_classes={len(source.class_names)}"
        )
    return source


def load_prepared(
    source: Source, i: int, size: int, channels: int
) -> tuple[UInt8[np.ndarray, "size size c"], int]:
    """Picture i as a square (see `images.prepare`), and its label. Safe to call from threads.

    Raises:
      ImageError: this picture cannot be used; the message names it.
      UserError: the storage failed.
    """
    try:
        image, label = source.load(i)
        with image:
            return images.prepare(image, size, channels), label
    except OSError as error:
        if error.errno is None or isinstance(error, _FILE_ERRORS):
            raise ImageError(f"{source.name(i)}: {error.strerror or error}") from error
        raise UserError(f"cannot read {source.name(i)}: {error.strerror}") from error
    except MemoryError:
        raise
    except Exception as error:
        raise ImageError(f"{source.name(i)}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Subset:
    """The pictures of one split: indices into a source."""

    source: Source
    images: np.ndarray

    def spread(self, count: int) -> "Subset":
        """At most `count` of the pictures, evenly spaced, because sources are sorted by class."""
        places = np.linspace(0, len(self.images) - 1, min(count, len(self.images)))
        return Subset(self.source, self.images[places.astype(np.int64)])


def make_subsets(config: ConfigDict) -> dict[str, Subset]:
    """The pictures of the splits "train" and, if the config asks for it, "validation".

    Validation pictures are the source's split `data.validation_split`, or else the share
    `tokenize.validation_fraction` of the training pictures, chosen by a hash of their names.

    Raises:
      UserError: a source is missing or empty, or the two have different classes.
    """
    source = make_source(config.data)
    own, fraction = config.data.validation_split, config.tokenize.validation_fraction
    if not 0 <= fraction < 1:
        raise UserError(
            f"config.tokenize.validation_fraction is {fraction}; it must be 0 or more and below 1"
        )
    whole = Subset(source, np.arange(len(source)))
    if own:
        other = make_source(config.data, own)
        if other.class_names != source.class_names:
            raise UserError(
                f"validation split '{own}' has {len(other.class_names)} classes whose names are "
                f"not those of the {len(source.class_names)} training classes"
            )
        return {"train": whole, "validation": Subset(other, np.arange(len(other)))}
    if not fraction:
        return {"train": whole}
    train, validation = hold_out(source, fraction)
    if not len(train):
        raise UserError(
            f"tokenize.validation_fraction = {fraction} leaves none of {len(source)} images for "
            "training; lower it"
        )
    return {"train": Subset(source, train), "validation": Subset(source, validation)}


def hold_out(source: Source, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Splits a source's indices into (train, validation) by a hash of each picture's name.

    At least one picture is held out. A picture of a folder stays in its split when others are added
    or removed. In a TFDS archive and among the digits, a picture's name is its number, so its split
    may change if pictures are added or removed.
    """
    names = (source.name(i).encode("utf-8", "surrogateescape") for i in range(len(source)))
    scores = np.array([int.from_bytes(hashlib.sha256(name).digest()[:6]) for name in names])
    held_out = scores < max(fraction * 2**48, scores.min() + 1)
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
