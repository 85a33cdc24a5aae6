"""The token shard format: quantized images in ArrayRecord files, described by `dataset.json`.

A folder of tokens holds

    dataset.json                            what everything else means; written last
    train-00000-of-00002.array_record       one record an image
    statistics/train-00000-of-00002.json    what each shard counted; only `tokenize` reads it

A record is the raw bytes of one numpy structured scalar, and `dataset.json` carries its dtype:

    image    int64                 the picture's index in its source
    label    int32                 its class
    indices  uint8 or uint16       [views, L, C]: positions row-major, channels in autoencoder order

The views of an image are `posterior_samples` draws of its latents (a single one, the mean, if that
is 0) and, if `flips`, each of them again for the mirrored picture: sample 0, sample 0 flipped,
sample 1, sample 1 flipped, ... Every shard opens from plain Python in five lines:

    import json, numpy as np
    from array_record.python.array_record_module import ArrayRecordReader
    info = json.load(open("dataset.json"))
    reader = ArrayRecordReader(info["splits"]["train"]["shards"][0]["file"])
    records = np.frombuffer(b"".join(reader.read_all()), np.dtype(info["record"]))

`records["indices"]` is then an array `[images, views, L, C]`. An index i stands for the latent
`(v + 3) / 6 * (maximum - minimum) + minimum` with `v = quantizer.level_values[i]`, and a latent
divided by `autoencoder.scale` is what the autoencoder decodes.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from tokenbridge_jax.autoencoder import AutoencoderConfig
from tokenbridge_jax.channels import ChannelStatistics
from tokenbridge_jax.data.local_copy import INFO_FILE, local_copy
from tokenbridge_jax.data.readers import damaged
from tokenbridge_jax.quantizer import Quantizer
from tokenbridge_jax.runtime import storage
from tokenbridge_jax.runtime.errors import UserError

FORMAT = "tokenbridge index shards"
FORMAT_VERSION = 1
# The description of shards still being written; a resumed run must match it.
PARTIAL_INFO_FILE = "dataset.json.partial"

# The precision of shards from before there was a setting, whose description says dtype = float32:
# the platform's, whichever it was.
UNSTATED = "unstated"

# Depends on where the pictures lie, not on what they are.
_NOT_COMPARED = {"path"}


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """Everything needed to decode the shards of a folder: the content of `dataset.json`.

    Attributes:
      quantizer: what the indices mean.
      autoencoder: sizes of the autoencoder whose latents were quantized.
      autoencoder_hash: its content hash (`autoencoder.autoencoder_hash`).
      channel_order: order in which a head should predict the channels; the shards themselves are
        in the autoencoder's order.
      channel_order_rule: where that order comes from.
      image_size: pixels a side.
      posterior_samples: draws an image; 0 stands for the posterior mean.
      flips: whether every draw is followed by one of the mirrored picture.
      seed: of the posterior draws.
      precision: of the encoder, one of `precision.PRECISIONS`, or `UNSTATED`.
      class_names: by label.
      records_per_shard: most images in a shard.
      sources: for every split, where its pictures came from.
      split_noise: whether splits of different sources differ in posterior noise. Where they do not,
        as in earlier versions, picture k of one has that of picture k of another.
      splits: for every split `images` and the `shards` with `file`, `records` and `bytes`.
      statistics: for every split, `ChannelStatistics.summary()`.
      skipped: pictures left out, each with `split`, `image` and `reason`.
    """

    quantizer: Quantizer
    autoencoder: AutoencoderConfig
    autoencoder_hash: str
    channel_order: tuple[int, ...]
    channel_order_rule: str
    image_size: int
    posterior_samples: int
    flips: bool
    seed: int
    precision: str
    class_names: tuple[str, ...]
    records_per_shard: int
    sources: Mapping[str, Any]
    split_noise: bool = False
    splits: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    statistics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    skipped: tuple[Mapping[str, Any], ...] = ()

    @property
    def channels(self) -> int:
        """C."""
        return self.autoencoder.latent_channels

    @property
    def grid(self) -> int:
        """Positions a side."""
        return self.image_size // self.autoencoder.downsampling

    @property
    def positions(self) -> int:
        """L."""
        return self.grid**2

    @property
    def views(self) -> int:
        """Index arrays an image."""
        return max(1, self.posterior_samples) * (2 if self.flips else 1)

    @functools.cached_property
    def record(self) -> np.dtype:
        """The dtype of one record."""
        return np.dtype(_record_spec(self))

    @property
    def sha256(self) -> str:
        """Names the content of the shards; where their images came from plays no part."""
        described = self.to_json() | {"sources": None}
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The content of `dataset.json`: every field, and what follows from them."""
        views = [
            {"sample": sample, "flipped": flipped}
            for sample in range(max(1, self.posterior_samples))
            for flipped in ((False, True) if self.flips else (False,))
        ]
        described = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "record": _record_spec(self),
            "views": views,
            "levels": self.quantizer.levels,
            "positions": self.positions,
            "grid": [self.grid, self.grid],
            "channels": self.channels,
            "crop": "centre, as in ADM",
        }
        for field in dataclasses.fields(self):
            described[field.name] = getattr(self, field.name)
        # Shards that are as they have always been keep their name, `sha256`.
        if not self.split_noise:
            del described["split_noise"]
        if self.precision == UNSTATED:
            described["dtype"] = "float32"
            del described["precision"]
        described["quantizer"] = self.quantizer.to_json()
        described["autoencoder"] = self.autoencoder.to_json()
        # Tuples become lists, so that it equals what is read back.
        return json.loads(json.dumps(described))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "DatasetInfo":
        """Inverse of `to_json`.

        Raises:
          UserError: it is something else, or from a later version of the format.
        """
        if value.get("format") != FORMAT or value.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"it says format '{value.get('format')}', version {value.get('format_version')}; "
                f"this program reads '{FORMAT}', version {FORMAT_VERSION}"
            )
        # Before there was a precision there was a dtype, whose bfloat16 meant what it means now.
        earlier = "bfloat16" if value.get("dtype") == "bfloat16" else UNSTATED
        value = {"precision": earlier, "split_noise": False} | dict(value)
        try:
            fields: dict[str, Any] = {
                field.name: value[field.name] for field in dataclasses.fields(cls)
            }
        except KeyError as error:
            raise UserError(f"its field {error} is missing") from error
        for name in ("channel_order", "class_names", "skipped"):
            fields[name] = tuple(fields[name])
        fields["quantizer"] = Quantizer.from_json(fields["quantizer"])
        fields["autoencoder"] = AutoencoderConfig.from_json(fields["autoencoder"])
        return cls(**fields)

    def check(self, **expected: Any) -> None:
        """Compares fields by the names they have in `dataset.json`, such as `levels=64`.

        Raises:
          UserError: one differs; the message names it and both values.
        """
        described = self.to_json()
        for name, value in expected.items():
            value = value.to_json() if hasattr(value, "to_json") else value
            self._check(described[name], json.loads(json.dumps(value)), name)

    def check_same_making(self, other: "DatasetInfo") -> None:
        """Checks that shards made for `other` are those made for this, whatever is done so far.

        Raises:
          UserError: a setting differs; the message names it and both values.
        """
        ours, theirs = self.to_json(), other.to_json()
        for field in dataclasses.fields(self):
            if field.name not in ("splits", "statistics", "skipped"):
                self._check(ours.get(field.name), theirs.get(field.name), field.name)

    def _check(self, ours: Any, theirs: Any, name: str) -> None:
        difference = _first_difference(ours, theirs, name)
        if difference:
            name, ours, theirs = difference
            other = "put the autoencoder" if name == "autoencoder_hash" else "set it"
            raise UserError(
                f"the token shards have {name} = {_short(ours)} but this run has {_short(theirs)}; "
                f"tokenize again with another --workdir, or {other} back"
            )


def _record_spec(info: DatasetInfo) -> Any:
    kind = info.quantizer.index_dtype.newbyteorder("<").str.strip("|")
    shape = (info.views, info.positions, info.channels)
    return {
        "names": ["image", "label", "indices"],
        "formats": ["<i8", "<i4", f"{shape}{kind}"],
    }


def _first_difference(ours: Any, theirs: Any, name: str) -> tuple[str, Any, Any] | None:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            if key not in _NOT_COMPARED:
                found = _first_difference(ours.get(key), theirs.get(key), f"{name}.{key}")
                if found:
                    return found
        return None
    return None if ours == theirs else (name, ours, theirs)


def _short(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return value[:12]  # Of a hash that is enough to tell two apart.
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def write_info(folder: str | os.PathLike[str], info: DatasetInfo, *, partial: bool = False) -> None:
    """Writes `dataset.json`, or its forerunner while shards are still being written."""
    storage.write_json(Path(folder) / (PARTIAL_INFO_FILE if partial else INFO_FILE), info.to_json())


def read_info(folder: str | os.PathLike[str]) -> DatasetInfo:
    """Reads the description of a finished folder of tokens.

    Raises:
      UserError: there is none, it is unfinished, or it cannot be read.
    """
    path = storage.as_path(folder) / INFO_FILE
    if not storage.exists(path):
        state = (
            "is not finished; run `tokenbridge tokenize` again, it goes on where it stopped"
            if (path.parent / PARTIAL_INFO_FILE).exists()
            else "holds no token shards; run `tokenbridge tokenize` first"
        )
        raise UserError(f"{folder} {state}")
    return _read_info_file(path)


def read_begun_info(folder: str | os.PathLike[str]) -> DatasetInfo | None:
    """Reads the description of shards that are finished or being written, if there are any."""
    for name in (INFO_FILE, PARTIAL_INFO_FILE):
        if storage.exists(Path(folder) / name):
            return _read_info_file(Path(folder) / name)
    return None


def _read_info_file(path: epath.PathLike) -> DatasetInfo:
    try:
        return DatasetInfo.from_json(storage.read_json(path))
    except UserError as error:
        raise UserError(f"cannot read {path}: {error}") from error


def local_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder as a path that ArrayRecord can write to.

    Raises:
      UserError: it is in an object store, which ArrayRecord cannot write to.
    """
    if storage.in_object_store(folder):
        raise UserError(
            f"token shards are written to a folder of the file system, not to {folder}: mount the "
            "bucket (gcsfuse), or tokenize into a local --workdir and copy its `tokens` there"
        )
    return Path(storage.expand(folder))


def shard_name(split: str, number: int, count: int) -> str:
    """File name of shard `number` of `count`."""
    return f"{split}-{number:05d}-of-{count:05d}.array_record"


@dataclasses.dataclass
class ShardSummary:
    """What is known of one finished shard without opening it; kept in `statistics/`.

    Attributes:
      records: images in it.
      size: bytes of the file.
      skipped: pictures left out, each with `split`, `image` and `reason`.
      statistics: counts over its indices.
    """

    records: int
    size: int
    skipped: list[dict[str, Any]]
    statistics: ChannelStatistics


class ShardWriter:
    """Writes one shard, which appears under its name only when complete.

    Use as a context manager around `write` calls that ends in `commit`; leaving it without
    `commit` (an exception, say) leaves nothing behind.

    Raises:
      UserError: the folder cannot be made.
    """

    def __init__(self, path: Path):
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage.write_error(path, error) from error
        self._temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
        # Group size 1: single records are read in random order.
        self._writer = ArrayRecordWriter(str(self._temporary), "group_size:1")
        self._records = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._writer.is_open():
            # A full disk again; what matters was raised by `write` already.
            with contextlib.suppress(RuntimeError):
                self._writer.close()
        self._temporary.unlink(missing_ok=True)

    def write(self, records: np.ndarray) -> None:
        """Adds a structured array of records.

        Raises:
          UserError: the disk is full or the folder not writable.
        """
        try:
            for record in records:
                self._writer.write(record.tobytes())
        except RuntimeError as error:
            raise self._error(error) from error
        self._records += len(records)

    def commit(self, skipped: list[dict[str, Any]], statistics: ChannelStatistics) -> ShardSummary:
        """Finishes the shard: its file gets its name, after its summary was written.

        Raises:
          UserError: the disk is full or the folder not writable.
        """
        try:
            self._writer.close()
            descriptor = os.open(self._temporary, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            size = self._temporary.stat().st_size
            summary = ShardSummary(self._records, size, skipped, statistics)
            storage.write_json(
                _summary_path(self._path),
                {
                    "records": summary.records,
                    "bytes": summary.size,
                    "skipped": skipped,
                    "statistics": statistics.to_json(),
                },
            )
            os.replace(self._temporary, self._path)
        except (RuntimeError, OSError) as error:
            raise self._error(error) from error
        return summary

    def _error(self, error: RuntimeError | OSError) -> UserError:
        if isinstance(error, FileNotFoundError):
            return UserError(
                f"cannot write {self._path}: its temporary file vanished; let only one run at a "
                "time write to this folder"
            )
        if isinstance(error, OSError):
            return storage.write_error(self._path, error)
        # ArrayRecord has no error numbers, only a chain of messages.
        reason = str(error).split(";")[0]
        full = os.strerror(errno.ENOSPC)
        if full in reason:
            return storage.write_error(self._path, OSError(errno.ENOSPC, full))
        return UserError(f"cannot write {self._path}: {reason}")


def _summary_path(shard: Path) -> Path:
    return shard.parent / "statistics" / f"{shard.name.removesuffix('.array_record')}.json"


def read_summary(shard: Path) -> ShardSummary | None:
    """The summary of a complete shard; None if it has to be written (again).

    Raises:
      UserError: the system does not let one of its two files be read.
    """
    try:
        for path in (shard, _summary_path(shard)):
            path.open("rb").close()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise storage.read_error(path, error) from error
    try:
        value = storage.read_json(_summary_path(shard))
        summary = ShardSummary(
            value["records"],
            value["bytes"],
            value["skipped"],
            ChannelStatistics.from_json(value["statistics"]),
        )
        if shard.stat().st_size != summary.size:
            return None
    except (UserError, OSError, KeyError, TypeError, ValueError):
        return None
    reader = ArrayRecordReader(str(shard))
    complete = reader.ok() and reader.num_records() == summary.records
    return summary if complete else None


def shard_files(
    folder: str | os.PathLike[str], info: DatasetInfo, split: str
) -> list[tuple[Path, int]]:
    """The shards of a split with their numbers of records, checked to be there in full length.

    Raises:
      UserError: there is no such split, or a shard is missing or truncated.
    """
    if split not in info.splits:
        raise UserError(
            f"the token shards in {folder} have no split '{split}', only "
            f"{', '.join(info.splits)}; set --config.tokenize.validation_fraction or "
            "--config.data.validation_split and tokenize again"
        )
    files, folder = [], local_copy(folder)
    for shard in info.splits[split]["shards"]:
        path = folder / shard["file"]
        if not storage.exists(path):
            raise UserError(
                f"token shard {path} is missing; put it back, or run `tokenbridge tokenize` again, "
                "which writes only what is missing"
            )
        size = path.stat().st_size
        if size != shard["bytes"]:
            raise damaged(path, f"has {size} bytes, not {shard['bytes']}")
        files.append((path, shard["records"]))
    return files
