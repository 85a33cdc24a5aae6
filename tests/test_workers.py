"""Ordered work in worker processes: results, errors, and how the processes end."""

import collections
import contextlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

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
    return in_order(range(10**9), work, 2, MEGABYTE)


def shared_memory():
    """The files of shared memory of this process."""
    mapped = Path("/proc/self/maps").read_text().split()
    return [Path(word) for word in mapped if word.startswith("/dev/shm/psm_")]


def test_results_are_in_order_until_closed():
    """Signals for a whole group of processes end no worker."""
    with contextlib.closing(endless(squares)) as results:
        seen = set()
        for number, (pid, large, small) in enumerate(results):
            assert large.shape == (MEGABYTE,)
            assert (large == number % 256).all()
            assert small == [number**2]
            if pid not in seen:
                os.kill(pid, signal.SIGTERM)
                os.kill(pid, signal.SIGINT)
            seen.add(pid)
            if number >= 20 and len(seen) == 2:
                break
        assert os.getpid() not in seen
    assert not multiprocessing.active_children()


def test_shared_memory_is_bounded_and_used_again():
    """Results that are kept stay as they are, also if the next ones wait for a slow consumer."""
    with contextlib.closing(endless(squares)) as results:
        kept = list(itertools.islice(results, 3 * workers._AHEAD))
        time.sleep(0.5)
        kept += itertools.islice(results, 3 * workers._AHEAD)
        (file,) = shared_memory()
        slots = 2 * workers._AHEAD
        assert file.stat().st_size == slots * (MEGABYTE + workers._MARGIN)
    assert not shared_memory()
    assert not file.exists()
    for number, (_, large, _) in enumerate(kept):
        large += 1
        assert (large == number + 1).all()


def kinds(number):
    """Arrays of several layouts, among them empty ones, and long text."""
    table = np.arange(12.0).reshape(3, 4) + number
    return [table, table.T, table[:, ::2], np.zeros((0, 3)), np.array("word"), "x" * 1000]


def test_all_kinds_of_results_come_back():
    for number, found in enumerate(in_order(range(5), kinds, 2, 2000)):
        for one, other in zip(found, kinds(number), strict=True):
            np.testing.assert_array_equal(one, other)
        found[0] += 1  # They can be written to.


def test_results_above_the_announced_size_are_refused():
    """In whole, with all that is beside the large array."""
    with pytest.raises(ValueError, match=r"a result has 1\d{6} bytes, and its slot 900000"):
        list(in_order(range(9), squares, 2, 900_000 - workers._MARGIN))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(("megabytes", "processes"), [(12, 4), (9, 3), (5, 1), (2, 1)])
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
        assert f"has {megabytes} MiB of shared memory and not 12; Docker" in line


def test_an_error_of_the_work_is_raised_here():
    with pytest.raises(UserError, match="picture 3 is no picture"):
        list(endless(mistaken))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("seed", range(4))
def test_a_killed_worker_gives_one_line(seed):
    """At any moment, also while it hands over a result."""
    with contextlib.closing(endless(squares)) as results:
        pid = next(results)[0]
        delay = np.random.default_rng(seed).uniform(0, 0.2)
        killer = threading.Timer(delay, os.kill, (pid, signal.SIGKILL))
        killer.start()
        message = "was killed or could not start; if memory is short, .*workers=1"
        with pytest.raises(UserError, match=message):
            collections.deque(results, maxlen=0)
    assert not multiprocessing.active_children()


HEADER = """
import os, signal, sys
sys.path.insert(0, "tests")
from test_workers import *
"""
KILLED = """
if __name__ == "__main__":
    results = endless(squares)
    pids = set()
    while len(pids) < 2:
        pids.add(next(results)[0])
    print(*pids, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
FINITE = """
if __name__ == "__main__":
    results = in_order(range(8), squares, 2, MEGABYTE)
    print(*(int(small[0]) for _, _, small in results))
"""
UNGUARDED = """
try:
    next(endless(squares))
except UserError as error:
    print(error)
"""
COMMAND = """
import types
from tokenbridge_jax.commands import runner

def main(args):
    for _, _, small in endless(squares):
        print(*small, flush=True)

if __name__ == "__main__":
    module = types.ModuleType("tokenbridge_jax.commands.work")
    vars(module).update(NEEDS_WORKDIR=False, define_flags=lambda values: None, main=main)
    sys.modules[module.__name__] = module
    runner.COMMANDS["work"] = ("work", "works")
    sys.exit(runner.run("work", []))
"""
INTERRUPTED = """
def main():
    for _, _, small in endless(squares):
        print(*small, flush=True)

if __name__ == "__main__":
    print("starting", flush=True)
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted")
"""


@pytest.fixture
def start(tmp_path):
    """Starts a script in a process group of its own."""

    def start(script):
        path = tmp_path / "script.py"
        path.write_text(HEADER + script)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, path]
        return subprocess.Popen(command, cwd=ROOT, env=environment, process_group=0, **pipes)

    return start


def test_a_finite_pass_leaves_no_shared_memory(start):
    """Python would warn of it at the end."""
    process = start(FINITE)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (0, "0 1 4 9 16 25 36 49\n", "")


def test_a_script_without_a_guard_is_told(start):
    process = start(UNGUARDED)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "was killed or could not start" in out
    assert '`if __name__ == "__main__":`' in out


@pytest.mark.parametrize("lines", [1, 3])
def test_workers_say_nothing_when_the_group_is_interrupted(start, lines):
    """While they start, and after their first results."""
    process = start(INTERRUPTED)
    first = [process.stdout.readline() for _ in range(lines)]
    assert first[0] == "starting\n"
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert out.endswith("interrupted\n")


def test_sigterm_ends_a_command_with_workers(start):
    process = start(COMMAND)
    first = [process.stdout.readline() for _ in range(3)]
    assert first[2] == "4\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (143, "tokenbridge work: terminated\n")


def test_workers_end_when_their_parent_is_killed(start):
    process = start(KILLED)
    out, err = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, err
    pids = list(map(int, out.split()))
    assert len(pids) == 2
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_few_pictures_need_few_processes(monkeypatch):
    monkeypatch.setattr(workers, "host_cores", lambda: 16)
    pictures = (10, 999, 1000, 7999, 10**6)
    assert [count_workers(0, number) for number in pictures] == [0, 0, 2, 15, 16]
    # A number that the user gives is taken as it is; one process is this one.
    assert [count_workers(asked, 10) for asked in (1, 2, 64)] == [0, 2, 64]
    monkeypatch.setattr(workers, "host_cores", lambda: 128)
    assert count_workers(0, 10**6) == 32
    with pytest.raises(UserError, match=r"data.workers is -1, must be at least 0"):
        count_workers(-1, 10)
