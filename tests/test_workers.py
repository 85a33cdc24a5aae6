"""Ordered work in worker processes: results, errors, and how the processes end."""

import collections
import contextlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import grain
import numpy as np
import pytest

from tokenbridge_jax.data import workers
from tokenbridge_jax.data.workers import count_workers, in_order
from tokenbridge_jax.runtime.errors import UserError

ROOT = Path(__file__).parent.parent
MEGABYTE = 2**20


def squares(number):
    """The process, and a large and a small array."""
    return os.getpid(), np.full(MEGABYTE, number % 256, np.uint8), np.array([number**2])


def mistaken(number):
    if number == 3:
        raise UserError("picture 3 is no picture")
    return number


def endless(work):
    return in_order(grain.MapDataset.range(10**9), work, 2, MEGABYTE)


def test_results_are_in_order_until_closed():
    """Signals for a whole group of processes end no worker."""
    with contextlib.closing(endless(squares)) as results:
        pids = []
        for number, (pid, large, small) in enumerate(itertools.islice(results, 20)):
            assert large.shape == (MEGABYTE,)
            assert (large == number).all()
            assert small == [number**2]
            pids.append(pid)
            if number == 1:
                for pid in set(pids):
                    os.kill(pid, signal.SIGTERM)
                    os.kill(pid, signal.SIGINT)
        assert len(set(pids)) == 2
        assert os.getpid() not in pids
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(("megabytes", "processes"), [(64, 4), (20, 3), (11, 1), (5, 1)])
def test_workers_fit_shared_memory(monkeypatch, capsys, megabytes, processes):
    usage = collections.namedtuple("usage", "free")(megabytes * MEGABYTE)
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda folder: usage)
    found = workers._that_fit(4, MEGABYTE)
    assert max(found, 1) == processes
    line = capsys.readouterr().err
    if processes == 4:
        assert not line
    else:
        assert f"{processes} instead of 4 processes decode pictures, because /dev/shm" in line
        assert f"has {megabytes} MiB of shared memory and not 24; Docker" in line


def test_an_error_of_the_work_is_raised_here():
    with pytest.raises(UserError, match="picture 3 is no picture"):
        list(endless(mistaken))
    assert not multiprocessing.active_children()


def test_a_killed_worker_gives_one_line():
    with contextlib.closing(endless(squares)) as results:
        os.kill(next(results)[0], signal.SIGKILL)
        message = r"was killed \(Worker process .* exit code -9\); if memory is short, .*workers=1"
        with pytest.raises(UserError, match=message):
            list(results)
    assert not multiprocessing.active_children()


KILLED = """
import os, signal, sys
sys.path.insert(0, "tests")
from test_workers import endless, squares
if __name__ == "__main__":
    results = endless(squares)
    print(*sorted({next(results)[0] for _ in range(4)}), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_when_their_parent_is_killed(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = list(map(int, done.stdout.split()))
    assert len(pids) == 2
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_few_pictures_need_few_processes(monkeypatch):
    monkeypatch.setattr(workers, "cores", lambda: 16)
    pictures = (10, 999, 1000, 7999, 10**6)
    assert [count_workers(0, number) for number in pictures] == [0, 0, 2, 15, 16]
    # A number that the user gives is taken as it is; one process is this one.
    assert [count_workers(asked, 10) for asked in (1, 2, 64)] == [0, 2, 64]
