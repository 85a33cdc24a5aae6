"""Where numbers and pictures of a run go: `metrics.jsonl`, TensorBoard, PNG files."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import UInt8
from tensorboardX import SummaryWriter

from tokenbridge_jax import io


class MetricWriter:
    """Writes one line of JSON a step, and the same to TensorBoard; process 0 alone writes.

    `metrics.jsonl` holds every step once, in order: on resume, lines of steps after the checkpoint
    (and a last line that a kill cut short) are dropped before new ones are appended.
    """

    def __init__(self, workdir: epath.PathLike, start_step: int):
        """Opens `WORKDIR/metrics.jsonl` and `WORKDIR/tensorboard/` to go on after `start_step`.

        Raises:
          UserError: the disk is full or the folder is not writable.
        """
        self._path = epath.Path(workdir) / "metrics.jsonl"
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _drop_steps_after(self._path, start_step)
            self._file = self._path.open("a")
            self._tensorboard = SummaryWriter(
                str(epath.Path(workdir) / "tensorboard"), purge_step=start_step + 1
            )
        except OSError as error:
            raise io.write_error(self._path.parent, error) from error

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """Appends `{"step": step, **values}` and flushes it.

        Raises:
          UserError: the disk is full.
        """
        if not self._writes:
            return
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        except OSError as error:
            raise io.write_error(self._path, error) from error

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "H W I"]) -> None:
        """Shows a picture in TensorBoard."""
        if self._writes:
            self._tensorboard.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Writes out what is buffered."""
        if self._writes:
            self._tensorboard.close()
            try:
                self._file.close()
            except OSError as error:
                raise io.write_error(self._path, error) from error


def read_metrics(path: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line cut short by a kill is left out."""
    rows = []
    for line in epath.Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _drop_steps_after(path: epath.Path, step: int) -> None:
    if not path.exists():
        return
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    text = "".join(json.dumps(row) + "\n" for row in kept)
    if text != path.read_text():
        io.write_bytes(path, text.encode())
