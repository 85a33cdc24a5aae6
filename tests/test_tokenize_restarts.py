"""Interrupted, repeated or divided among processes, tokenizing gives the same shards."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import start_job
from token_shards import contents, full_disk, make_config

from tokenbridge_jax.data import shards, tokenizing
from tokenbridge_jax.data.tokenizing import tokenize
from tokenbridge_jax.runtime.errors import UserError

REPOSITORY = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("programs")


def test_second_run_does_nothing(finished, images, monkeypatch):
    before = contents(finished)
    times = {path: path.stat().st_mtime_ns for path in (finished / "tokens").glob("*.array_record")}

    def no_encoding(*_):
        raise AssertionError("encoded something")

    monkeypatch.setattr(tokenizing.Codec, "encode", no_encoding)
    assert tokenize(make_config(images), finished).images == 0
    assert contents(finished) == before
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_lost_and_damaged_shards_are_made_again(finished, workdir, images):
    shutil.copytree(finished / "tokens", workdir / "tokens")
    damaged = workdir / "tokens" / "train-00002-of-00003.array_record"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert tokenize(make_config(images), workdir).images == 7
    assert contents(workdir) == contents(finished)


KILLED_RUN = """
import os, signal, sys
from token_shards import make_config
from tokenbridge_jax.data import shard_writer, shards, tokenizing

images, workdir, moment = sys.argv[1:]

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if moment == "in the middle of a shard":
    write, calls = shard_writer.ShardWriter.write, []
    def write_some(self, records):
        write(self, records)
        calls.append(1)
        if len(calls) == 3:
            die()
    shard_writer.ShardWriter.write = write_some
elif moment == "between summary and shard":
    os.replace = die
elif moment == "before the description":
    tokenizing._finish = die
elif moment == "after the description":
    write_info = shards.write_info
    def write_and_die(folder, info, partial=False):
        write_info(folder, info, partial=partial)
        if not partial:
            die()
    shards.write_info = write_and_die
elif moment == "first description":
    shards.write_info = lambda *_, partial: die()
tokenizing.tokenize(make_config(images), workdir)
"""


@pytest.mark.parametrize(
    "moments",
    [
        ["first description", "in the middle of a shard", "between summary and shard"],
        ["before the description", "after the description"],
    ],
)
def test_killed_runs_end_as_if_undisturbed(finished, workdir, images, moments):
    for moment in moments:
        done = subprocess.run(
            [sys.executable, "-c", KILLED_RUN, str(images), str(workdir), moment],
            env=os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"},
            check=False,
        )
        assert done.returncode == -signal.SIGKILL, moment
    assert tokenize(make_config(images), workdir).images == (
        0 if "after the description" in moments else 17
    )
    assert contents(workdir) == contents(finished)


def test_full_disk_leaves_nothing_half_written(workdir, images, finished):
    message = r"train-00001-of-00003\.array_record: the disk is full"
    with full_disk("train-00001"), pytest.raises(UserError, match=message):
        tokenize(make_config(images), workdir)
    left = contents(workdir)
    partial = left.pop(shards.PARTIAL_INFO_FILE)
    assert set(left) == {
        "train-00000-of-00003.array_record",
        "statistics/train-00000-of-00003.json",
    }
    assert json.loads(partial)["splits"] == {}
    assert tokenize(make_config(images), workdir).images == 17
    assert contents(workdir) == contents(finished)


PROCESS = """
import sys
from token_shards import make_config
from tokenbridge_jax.data import tokenizing
from tokenbridge_jax.runtime import processes
from tokenbridge_jax.runtime.errors import UserError
images, workdir = sys.argv[1:]
processes.join(True)
try:
    print(tokenizing.tokenize(make_config(images), workdir, begin=lambda: print("begun")).images)
except UserError as error:
    print(error)
processes.leave(0)
"""


def run_two(images, workdirs) -> list[list[str]]:
    """What two processes print that tokenize together."""
    started = start_job(["-c", PROCESS, images], [[workdir] for workdir in workdirs])
    return [process.communicate(timeout=120)[0].splitlines() for process in started]


def test_two_processes_share_the_work(workdir, images, finished):
    printed = run_two(images, [workdir, workdir])
    # Gloo, which connects the processes, prints other lines.
    assert [lines[-1] for lines in printed] == ["17", "10"]
    assert ["begun" in lines for lines in printed] == [True, False]
    assert contents(workdir) == contents(finished)


def test_where_one_process_fails_all_stop(workdir, images, tmp_path):
    printed = run_two(images, [workdir, tmp_path / "nowhere"])
    # The libraries may print lines of their own before or after.
    assert any(line.startswith("process 1 of this job failed") for line in printed[0])
    assert any(line.startswith("there is no autoencoder in") for line in printed[1])
    assert not (workdir / "tokens").exists()
