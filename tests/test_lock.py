"""Only one run may use a workdir, tested with real processes."""

import contextlib
import errno
import fcntl
import os
import socket
import subprocess
import sys
import time

import pytest
from jobs import start_job
from token_shards import TRAINING, write_workdir

from tokenbridge_jax.commands import runner
from tokenbridge_jax.runtime import locks
from tokenbridge_jax.runtime.errors import UserError

TRAIN = [f"--config.{name}={value}" for name, value in TRAINING.items()]
TRAIN += ["--config.mesh.data=-1", "--config.mesh.fsdp=1"]
TRAIN += ["--config.training.sample_every=0", "--config.training.eval_every=0"]

# The program of each process of a job.
MEMBER = """
import sys
from tokenbridge_jax.commands import runner
from tokenbridge_jax.runtime import locks, processes
from tokenbridge_jax.runtime.errors import UserError
locks.LOCK_SECONDS = 1
processes.join(True)
try:
    with runner.locked(sys.argv[1]):
        processes.leave(0)
except UserError:
    processes.leave(2)
"""

# Four processes fail again and again for a second while they have the same lock, which makes and
# removes the workdir. Each prints how often it had the lock.
FAILING = """
import os, sys, time
from tokenbridge_jax.runtime import locks
locks.time.sleep = lambda seconds: None
workdir, alone = sys.argv[1:]
end, had = time.monotonic() + 1, 0
first = all([os.fork() for _ in range(2)])
while time.monotonic() < end:
    try:
        with locks.lock(workdir):
            os.close(os.open(alone, os.O_CREAT | os.O_EXCL))
            os.remove(alone)
            raise KeyError
    except KeyError:
        had += 1
print(had, flush=True)
while first:
    try:
        _, status = os.wait()
    except ChildProcessError:
        break
    assert status == 0
"""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(locks, "LOCK_SECONDS", 1)


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path, capsys):
    write_workdir(tmp_path)
    command = [sys.executable, "-m", "tokenbridge_jax.commands.train", f"--workdir={tmp_path}"]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    endless = [*command, *TRAIN, "--config.training.steps=1000000"]
    endless.append("--config.training.checkpoint_every=1000000")
    with subprocess.Popen(endless, env=environment, stderr=subprocess.DEVNULL) as first:
        try:
            deadline = time.monotonic() + 120
            while not (tmp_path / "config.json").exists():
                assert time.monotonic() < deadline
                assert first.poll() is None
                time.sleep(0.1)
            config = (tmp_path / "config.json").read_bytes()
            again = [f"--workdir={tmp_path}", *TRAIN, "--config.training.steps=2"]
            for name in ("train", "tokenize"):
                assert runner.run(name, again) == 2
                (line,) = capsys.readouterr().err.splitlines()
                for named in (tmp_path, f"process {first.pid} ", socket.gethostname(), "since 20"):
                    assert str(named) in line
            assert (tmp_path / "config.json").read_bytes() == config
        finally:
            first.kill()
    with locks.lock(tmp_path):
        assert (tmp_path / "config.json").read_bytes() == config


@pytest.mark.parametrize(("held", "status"), [("this", 2), ("another", 0)])
def test_a_job_has_one_lock_and_is_refused_as_a_whole(tmp_path, held, status):
    with locks.lock(tmp_path / held), (tmp_path / "log.txt").open("w") as log:
        job = start_job(["-c", MEMBER], [[tmp_path / "this"]] * 2, devices=1, output=log)
        assert [process.wait(60) for process in job] == [status] * 2


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch, capsys, number):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with locks.lock(tmp_path):
        (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path) in line
    assert os.strerror(number) in line


def test_an_object_store_has_no_lock():
    with locks.lock("gs://bucket/run"):
        pass


def test_a_folder_that_cannot_be_written_to_is_reported(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"), locks.lock(tmp_path / "file" / "work"):
        pass


def tree(root):
    return {str(path.relative_to(root)) for path in root.rglob("*")}


@pytest.mark.parametrize("there", ["", "a", "a/b", "a/b/file", "a/b/.lock"])
def test_a_run_that_fails_before_it_does_anything_leaves_nothing(tmp_path, there):
    path = tmp_path / there
    if path.name in ("file", ".lock"):
        path.parent.mkdir(parents=True)
        path.touch()
    else:
        path.mkdir(parents=True, exist_ok=True)
    before = tree(tmp_path)
    work = tmp_path / "a" / "b"
    with contextlib.suppress(KeyError), locks.lock(work):
        assert (work / ".lock").exists()
        raise KeyError
    assert tree(tmp_path) == before
    # What a run wrote before it failed stays.
    with contextlib.suppress(KeyError), locks.lock(work):
        (work / "result").touch()
        raise KeyError
    assert tree(tmp_path) == before | {"a", "a/b", "a/b/result"}


def test_a_lock_that_is_removed_is_never_had_by_two(tmp_path):
    command = [sys.executable, "-c", FAILING, tmp_path / "a" / "b", tmp_path / "alone"]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    had = [int(line) for line in done.stdout.split()]
    assert len(had) == 4
    assert sum(had) > 20
    assert not (tmp_path / "alone").exists()
