"""`metrics.jsonl`, which holds every step once, also after a kill; TensorBoard."""

import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from object_store import ObjectStore, register

from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.training import metric_writer
from tokenbridge_jax.training.metric_writer import MetricWriter, read_metrics


def write(folder, start, steps):
    writer = MetricWriter(folder, start)
    for step in steps:
        writer.write(step, {"loss": 1 / step})
    writer.close()


def test_each_step_is_written_once_after_a_resume(tmp_path):
    write(tmp_path, 0, range(1, 6))
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # A kill in the middle of a line.
    write(tmp_path, 3, range(4, 8))
    expected = [{"step": step, "loss": 1 / step} for step in range(1, 8)]
    assert [json.loads(line) for line in path.read_text().splitlines()] == expected
    assert read_metrics(path) == expected


def test_an_object_store_has_every_line_before_a_checkpoint(monkeypatch):
    register()
    files, path = ObjectStore(), "bucket/run/metrics.jsonl"
    files.store.clear()
    writer = MetricWriter("gs://bucket/run", 0)
    writer.write(1, {"loss": 1.0})
    assert not files.exists(path)  # Not every line is uploaded at once.
    writer.flush()
    assert files.cat(path) == b'{"step": 1, "loss": 1.0}\n'
    writer.write(2, {"loss": 1 / 2})
    monkeypatch.setattr(metric_writer, "UPLOAD_SECONDS", 0)
    writer.write(3, {"loss": 1 / 3})
    # Killed here, after a checkpoint of step 2.
    write("gs://bucket/run", 2, range(3, 5))
    assert [row["step"] for row in read_metrics("gs://bucket/run/metrics.jsonl")] == [1, 2, 3, 4]
    writer.close()
    events = [files.cat(name) for name in files.find("bucket/run/tensorboard")]
    assert any(b"loss" in data for data in events)


def test_tensorboard_gets_scalars_and_pictures(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    writer.write(1, {"loss": 2.0})
    writer.image(1, "grid", np.zeros((4, 6, 3), np.uint8))
    writer.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    data = events.read_bytes()
    assert all(text in data for text in (b"loss", b"grid", b"\x89PNG"))


def test_a_workdir_that_is_a_file_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/run: Not a directory"):
        MetricWriter(tmp_path / "file" / "run", 0)


def test_a_full_disk_is_reported(tmp_path):
    write(tmp_path, 0, range(1, 1000))
    writer = MetricWriter(tmp_path, 999)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl: File too large"):
            writer.write(1000, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writer.close()


def test_pytorch_is_not_imported_and_still_can_be(tmp_path):
    """A run of a process that has not imported it: here a module that takes its place."""
    (tmp_path / "torch.py").write_text("print('imported')\n")
    code = (
        "import sys\n"
        "from tokenbridge_jax.training.metric_writer import MetricWriter\n"
        "writer = MetricWriter(sys.argv[1], 0)\n"
        "writer.write(1, {'loss': 2.0})\n"
        "writer.close()\n"
        "print('written')\n"
        "import torch\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, check=True, text=True
    )
    assert done.stdout.split() == ["written", "imported"]
    assert any((tmp_path / "run" / "tensorboard").iterdir())
