"""Writes token shards (see `shards.py`), each with a summary that tells whether it is complete."""

import contextlib
import dataclasses
import errno
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from tokenbridge_jax.channels import ChannelStatistics
from tokenbridge_jax.runtime import storage
from tokenbridge_jax.runtime.errors import UserError


@dataclasses.dataclass
class ShardSummary:
    """Facts about a finished shard, kept in `statistics/`.

    Attributes:
      records: how many images it has.
      size: of its file in bytes.
      skipped: the pictures left out, each with `split`, `image` and `reason`.
      statistics: counts over its indices.
    """

    records: int
    size: int
    skipped: list[dict[str, Any]]
    statistics: ChannelStatistics


class ShardWriter:
    """Writes one shard, which appears under its name only when complete.

    It is a context manager. Its body calls `write` and ends with `commit`. Without `commit`, as
    after an exception, nothing is left on disk.

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
        # Group size 1, because single records are read in random order.
        self._writer = ArrayRecordWriter(str(self._temporary), "group_size:1")
        self._records = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._writer.is_open():
            # On a full disk closing fails too, after `write` has raised the error.
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
        """Finishes the shard: writes its summary, then gives the file its name.

        Raises:
          UserError: the disk is full or the folder not writable.
        """
        try:
            self._writer.close()
            with self._temporary.open("rb") as file:
                os.fsync(file.fileno())
            size = self._temporary.stat().st_size
            content = {"records": self._records, "bytes": size, "skipped": skipped}
            content["statistics"] = statistics.to_json()
            storage.write_json(_summary_path(self._path), content)
            self._temporary.replace(self._path)
        except (RuntimeError, OSError) as error:
            raise self._error(error) from error
        return ShardSummary(self._records, size, skipped, statistics)

    def _error(self, error: RuntimeError | OSError) -> UserError:
        if isinstance(error, FileNotFoundError):
            return UserError(
                f"cannot write {self._path}: its temporary file vanished; let only one run at a "
                "time write to this folder"
            )
        if isinstance(error, OSError):
            return storage.write_error(self._path, error)
        # ArrayRecord gives no error number, only a chain of messages.
        reason = str(error).split(";")[0]
        full = os.strerror(errno.ENOSPC)
        if full in reason:
            return storage.write_error(self._path, OSError(errno.ENOSPC, full))
        return UserError(f"cannot write {self._path}: {reason}")


def _summary_path(shard: Path) -> Path:
    return shard.parent / "statistics" / f"{shard.name.removesuffix('.array_record')}.json"


def read_summary(shard: Path) -> ShardSummary | None:
    """The summary of a complete shard; None if the shard has to be written, or written again.

    Raises:
      UserError: the system does not let one of the two files be read.
    """
    summary_path = _summary_path(shard)
    if not (storage.exists(shard) and storage.exists(summary_path)):
        return None
    with contextlib.suppress(UserError, OSError, KeyError, TypeError, ValueError):
        value = storage.read_json(summary_path)
        statistics = ChannelStatistics.from_json(value["statistics"])
        summary = ShardSummary(value["records"], value["bytes"], value["skipped"], statistics)
        if shard.stat().st_size == summary.size:
            reader = ArrayRecordReader(str(shard))
            if reader.ok() and reader.num_records() == summary.records:
                return summary
    for path in (shard, summary_path):
        if reason := storage.refusal(path):
            raise storage.read_error(path, reason)
    return None
