"""The token shard format: encoded images in ArrayRecord files, described by `dataset.json`.

A folder of tokens holds

    dataset.json                            describes everything else; written last
    train-00000-of-00002.array_record       one record an image
    statistics/train-00000-of-00002.json    counts of each shard; only `tokenize` reads them

A record is the raw bytes of one numpy structured scalar. `dataset.json` holds its dtype:

    image      int64            the picture's index in its source
    label      int32            its class
    indices    uint8 or uint16  [views, L, C]: positions row-major, channels in autoencoder order
    mean       float16          [latent views, L, C]: of the posterior of the latents
    deviation  float16          [latent views, L, C]: of the posterior of the latents

Records have `indices`, or `mean` and `deviation`, or all three: `store` says which, and if it is
missing, they have indices. The views of an image are `posterior_samples` draws of its latents, or
their mean alone if that is 0. With `flips`, each view is followed by that of the mirrored picture:
sample 0, sample 0 flipped, sample 1, sample 1 flipped, ... The latent views are the picture and,
with `flips`, the mirrored one. Five lines of plain Python open a shard:

    import json, numpy as np
    from array_record.python.array_record_module import ArrayRecordReader
    info = json.load(open("dataset.json"))
    reader = ArrayRecordReader(info["splits"]["train"]["shards"][0]["file"])
    records = np.frombuffer(b"".join(reader.read_all()), np.dtype(info["record"]))

`records["indices"]` is then an array `[images, views, L, C]`. An index i stands for the latent
`(v + 3) / 6 * (maximum - minimum) + minimum` with `v = quantizer.level_values[i]`. The autoencoder
decodes latents divided by `autoencoder.scale`. If `quantizer` has `codes`, C is 1 and an index i
stands for the vector `quantizer.codes[i]`. `mean` and `deviation` are of scaled latents, too: a
draw of the posterior is `mean + deviation * n` with n from a standard normal.

Float16 rounds to 11 bits, a mean of 1 by 0.0005 at most. Deviations below 6e-5 are rounded by 3e-8
at most, so those below 3e-8 are stored as 0. The deviations of the autoencoder start at
`exp(-15) * scale`, 7e-8 for KL-16. Values above 65,504 are refused.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from tokenbridge_jax.autoencoder import AutoencoderConfig
from tokenbridge_jax.data.local_copy import INFO_FILE, local_copy
from tokenbridge_jax.data.readers import damaged
from tokenbridge_jax.quantizer import AnyQuantizer, quantizer_from_json
from tokenbridge_jax.runtime import storage
from tokenbridge_jax.runtime.differences import first_difference
from tokenbridge_jax.runtime.errors import UserError

# What records may hold, and the formats. Earlier versions refuse a format that they do not know.
STORES = ("indices", "latents", "both")
FORMAT, FORMAT_OF_LATENTS = "tokenbridge index shards", "tokenbridge latent shards"
FORMAT_VERSION = 1
# The description of shards that are still being written. A resumed run must match it.
PARTIAL_INFO_FILE = "dataset.json.partial"

# The precision of shards made before there was a setting for it. Their description says
# dtype = float32, and their precision was the platform's.
UNSTATED = "unstated"


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """Everything needed to decode the shards of a folder: the content of `dataset.json`.

    Attributes:
      quantizer: what the indices mean. Without indices, `statistics` are those of the quantized
        means.
      autoencoder: sizes of the autoencoder whose latents were quantized.
      autoencoder_hash: its content hash (`autoencoder.autoencoder_hash`).
      channel_order: the order in which a head should predict the channels. The shards themselves
        are in the autoencoder's order.
      channel_order_rule: where that order comes from.
      image_size: the side of an image in pixels.
      posterior_samples: draws of indices per image; 0 stands for the posterior mean.
      flips: whether every draw is followed by one of the mirrored picture.
      seed: of the posterior draws.
      precision: of the encoder, one of `precision.PRECISIONS`, or `UNSTATED`.
      class_names: by label.
      records_per_shard: how many images a shard has at most.
      sources: for every split, where its pictures came from.
      store: what the records hold, one of `STORES`.
      split_noise: whether splits of different sources have different posterior noise. In earlier
        versions picture k of one source has the noise of picture k of another.
      splits: for every split `images` and the `shards` with `file`, `records` and `bytes`.
      statistics: for every split, `ChannelStatistics.summary()`.
      skipped: the pictures left out, each with `split`, `image` and `reason`.
    """

    quantizer: AnyQuantizer
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
    store: str = "indices"
    split_noise: bool = False
    splits: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    statistics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    skipped: tuple[Mapping[str, Any], ...] = ()

    @property
    def channels(self) -> int:
        """C."""
        return self.autoencoder.index_channels

    @property
    def grid(self) -> int:
        """Positions along a side."""
        return self.image_size // self.autoencoder.downsampling

    @property
    def positions(self) -> int:
        """L."""
        return self.grid**2

    @property
    def views(self) -> int:
        """Index arrays per image."""
        return max(1, self.posterior_samples) * self.latent_views

    @property
    def latent_views(self) -> int:
        """Means and deviations per image: of the picture, and of the mirrored one."""
        return 2 if self.flips else 1

    @property
    def holds_indices(self) -> bool:
        """Whether records have indices."""
        return self.store != "latents"

    @property
    def holds_latents(self) -> bool:
        """Whether records have means and deviations of latents."""
        return self.store != "indices"

    @functools.cached_property
    def record(self) -> np.dtype:
        """The dtype of one record."""
        return np.dtype(_record_spec(self))

    @property
    def sha256(self) -> str:
        """Identifies the content of the shards, apart from where their images came from."""
        described = self.to_json() | {"sources": None}
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The content of `dataset.json`: every field, and values that follow from them."""
        flips = (False, True) if self.flips else (False,)
        views = [
            {"sample": sample, "flipped": flipped}
            for sample in range(max(1, self.posterior_samples))
            for flipped in flips
        ]
        described = {
            "format": FORMAT_OF_LATENTS if self.holds_latents else FORMAT,
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
        if self.holds_latents:
            described["latent_views"] = [{"flipped": flipped} for flipped in flips]
            described["record_bytes"] = self.record.itemsize
        else:
            del described["store"]  # Shards of indices are described as in earlier versions.
        if not self.holds_indices:
            del described["views"]
        # Shards made as in earlier versions keep their `sha256`.
        if not self.split_noise:
            del described["split_noise"]
        if self.precision == UNSTATED:
            described["dtype"] = "float32"
            del described["precision"]
        described["quantizer"] = self.quantizer.to_json()
        described["autoencoder"] = self.autoencoder.to_json()
        return json.loads(json.dumps(described))  # As read from a file: with lists, not tuples.

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "DatasetInfo":
        """Inverse of `to_json`.

        Raises:
          UserError: the value has another format or version, or lacks a field.
        """
        known = (FORMAT, FORMAT_OF_LATENTS)
        if value.get("format") not in known or value.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"it says format '{value.get('format')}', version {value.get('format_version')}; "
                f"this program reads '{FORMAT}' and '{FORMAT_OF_LATENTS}', version {FORMAT_VERSION}"
            )
        # Earlier versions had a dtype, whose bfloat16 meant the same as the precision's.
        earlier = "bfloat16" if value.get("dtype") == "bfloat16" else UNSTATED
        value = {"precision": earlier, "store": "indices", "split_noise": False} | dict(value)
        names = [field.name for field in dataclasses.fields(cls)]
        if missing := [name for name in names if name not in value]:
            raise UserError(f"its field '{missing[0]}' is missing")
        fields: dict[str, Any] = {name: value[name] for name in names}
        for name in ("channel_order", "class_names", "skipped"):
            fields[name] = tuple(fields[name])
        fields["quantizer"] = quantizer_from_json(fields["quantizer"])
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
            _refuse_difference(described[name], json.loads(json.dumps(value)), name)

    def check_same_making(self, other: "DatasetInfo") -> None:
        """Compares all settings that the content of the shards depends on.

        Raises:
          UserError: a setting differs; the message names it and both values.
        """
        ours, theirs = ({"store": info.store} | info.to_json() for info in (self, other))
        # Others follow from what is stored.
        names = ["store", *(field.name for field in dataclasses.fields(self))]
        for name in names:
            if name not in ("splits", "statistics", "skipped"):
                _refuse_difference(ours.get(name), theirs.get(name), name)

    def check_holds(self, values: str, user: str) -> None:
        """Checks that records have what something needs.

        Args:
          values: "indices" or "latents".
          user: what needs them, as the subject of the message.

        Raises:
          UserError: they have only the other.
        """
        if self.store not in (values, "both"):
            raise UserError(
                f"{user} needs {values}, but the token shards hold {self.store} only; copy "
                "autoencoder/ to another --workdir and tokenize there with "
                f"--config.tokenize.store={values} (or both)"
            )


def _record_spec(info: DatasetInfo) -> Any:
    formats = {"image": "<i8", "label": "<i4"}
    of_view = info.positions, info.channels
    if info.holds_indices:
        kind = info.quantizer.index_dtype.newbyteorder("<").str.strip("|")
        formats["indices"] = f"{(info.views, *of_view)}{kind}"
    if info.holds_latents:
        formats |= dict.fromkeys(("mean", "deviation"), f"{(info.latent_views, *of_view)}<f2")
    return {"names": list(formats), "formats": list(formats.values())}


def _refuse_difference(ours: Any, theirs: Any, name: str) -> None:
    if difference := first_difference(ours, theirs, name):
        where, has, wanted = difference
        other = "put the autoencoder" if name == "autoencoder_hash" else "set it"
        raise UserError(
            f"the token shards have {where} = {has} but this run has {wanted}; tokenize again with "
            f"another --workdir, or {other} back"
        )


def write_info(folder: str | os.PathLike[str], info: DatasetInfo, *, partial: bool = False) -> None:
    """Writes `dataset.json`, or `dataset.json.partial` while shards are still being written."""
    storage.write_json(Path(folder) / (PARTIAL_INFO_FILE if partial else INFO_FILE), info.to_json())


def read_info(folder: str | os.PathLike[str]) -> DatasetInfo:
    """Reads the description of a finished folder of tokens.

    Raises:
      UserError: there is none, the folder is not finished, or it cannot be read.
    """
    path = storage.as_path(folder) / INFO_FILE
    if not storage.exists(path):
        state = (
            "is not finished; run `tokenbridge tokenize` again to continue where it stopped"
            if (path.parent / PARTIAL_INFO_FILE).exists()
            else "holds no token shards; run `tokenbridge tokenize` first"
        )
        raise UserError(f"{folder} {state}")
    return _read_info_file(path)


def read_begun_info(folder: str | os.PathLike[str]) -> DatasetInfo | None:
    """Reads the description of shards that are finished or being written; None without one."""
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


def shard_files(
    folder: str | os.PathLike[str], info: DatasetInfo, split: str
) -> list[tuple[Path, int]]:
    """The shards of a split with their numbers of records. Checks that each has its full length.

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
