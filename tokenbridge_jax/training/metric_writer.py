"""Writes the numbers and pictures of a run to `metrics.jsonl` and TensorBoard."""

import json
import sys
import time
import types
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import UInt8

from tokenbridge_jax.runtime import storage

# Time between two uploads of a growing file: an object store takes only whole files.
UPLOAD_SECONDS = 60


class MetricWriter:
    """Writes one line of JSON for each step, and the same to TensorBoard; only process 0 writes.

    `metrics.jsonl` holds every step once, in order: on resume, lines of steps after the checkpoint
    (and an incomplete last line) are removed before new ones are appended. In an object store, the
    file is uploaded every UPLOAD_SECONDS and before every checkpoint.

    tensorboardX writes for TensorBoard, because clu's metric writers import TensorFlow.
    """

    def __init__(self, workdir: epath.PathLike, start_step: int):
        """Opens `WORKDIR/metrics.jsonl` and `WORKDIR/tensorboard/` to continue after `start_step`.

        Raises:
          UserError: the disk is full or the folder is not writable.
        """
        self._path = epath.Path(workdir) / "metrics.jsonl"
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            kept = _drop_steps_after(self._path, start_step)
            stored = storage.in_object_store(self._path)
            self._file = StoredFile(self._path, kept) if stored else self._path.open("ab")
            tensorboard = _tensorboard_x()
            # TensorboardX's own way to write to an object store needs another package.
            stores = types.SimpleNamespace(open=StoredFile, directory_check=lambda path: None)
            tensorboard.record_writer.register_writer_factory("gs", stores)
            self._tensorboard = tensorboard.SummaryWriter(
                str(epath.Path(workdir) / "tensorboard"), purge_step=start_step + 1
            )
        except OSError as error:
            raise storage.write_error(self._path.parent, error) from error

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """Appends `{"step": step, **values}`.

        Raises:
          UserError: the disk is full.
        """
        if not self._writes:
            return
        try:
            self._file.write((json.dumps({"step": step, **values}) + "\n").encode())
            if not isinstance(self._file, StoredFile):
                self._file.flush()
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        except OSError as error:
            raise storage.write_error(self._path, error) from error

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "H W I"]) -> None:
        """Shows a picture in TensorBoard."""
        if self._writes:
            self._tensorboard.add_image(name, image, step, dataformats="HWC")

    def flush(self) -> None:
        """Writes out all lines, before a checkpoint from which a run may continue."""
        if self._writes:
            self._file.flush()

    def close(self) -> None:
        """Writes out all lines and pictures, and closes the files."""
        if self._writes:
            self._tensorboard.close()
            try:
                self._file.close()
            except OSError as error:
                raise storage.write_error(self._path, error) from error


def _tensorboard_x() -> Any:
    """The module, imported as if there were no PyTorch, which it would import for nothing.

    That takes seconds. Meanwhile no other thread can import PyTorch.
    """
    is_hidden = "torch" not in sys.modules
    if is_hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import tensorboardX
    finally:
        if is_hidden:
            del sys.modules["torch"]
    return tensorboardX


class StoredFile:
    """A file in an object store that can be appended to."""

    def __init__(self, path: epath.PathLike, content: bytes = b""):
        self._path, self._content, self._uploaded = path, content, time.monotonic()

    def write(self, data: bytes) -> None:
        """Appends `data`, which is uploaded UPLOAD_SECONDS after the last upload, or by `flush`."""
        self._content += data
        if time.monotonic() - self._uploaded > UPLOAD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Uploads the whole file."""
        storage.write_bytes(self._path, self._content)
        self._uploaded = time.monotonic()

    close = flush


def read_metrics(path: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, without an incomplete last line."""
    rows = []
    for line in epath.Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _drop_steps_after(path: epath.Path, step: int) -> bytes:
    """Removes lines of later steps; returns the content that is left."""
    if not path.exists():
        return b""
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    content = "".join(json.dumps(row) + "\n" for row in kept).encode()
    if content != path.read_bytes():
        storage.write_bytes(path, content)
    return content
