"""Jobs that are killed and told to stop; `soak.py` does it many times."""

import random
import shutil
import signal
import time

import soak
from jobs import start_job

from tokenbridge_jax.processes import EXIT_LOST

# Waits for the others, which wait for it, unless it is the one to die.
MEMBER = """
import os, signal, sys
from tokenbridge_jax import processes
processes.join(True)
assert processes.gather(sys.argv[1]) == ["a", "dies", "b"]
if sys.argv[1] == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
processes.gather("never")
"""


def test_where_one_process_dies_the_others_end_and_say_so(tmp_path):
    with (tmp_path / "log.txt").open("w") as log:
        job = start_job(
            ["-c", MEMBER],
            [["a"], ["dies"], ["b"]],
            output=log,
            TOKENBRIDGE_HEARTBEAT_SECONDS="10",
        )
    begun = time.monotonic()
    assert soak.end(job) == [EXIT_LOST, -signal.SIGKILL, EXIT_LOST]
    assert time.monotonic() - begun < 60  # The processes start within the time, too.
    log = (tmp_path / "log.txt").read_text()
    for index in (0, 2):
        assert f"process {index} ends: another process of this job is gone or did not" in log
    assert "unhealthy (stopped sending heartbeats):\n1\n" in log


def test_a_run_killed_and_stopped_ends_with_the_losses_of_one_left_alone(tmp_path):
    killed, alone = tmp_path / "killed", tmp_path / "alone"
    soak.write_workdir(killed)
    shutil.copytree(killed, alone)
    config = {"training.steps": 40, "training.checkpoint_every": 5, "training.eval_every": 0}
    undisturbed = soak.start(alone, 2, tmp_path / "alone.txt", **config)
    job = {"processes": 2, "log": tmp_path / "log.txt", **config}
    ways = ("writing", "term")
    assert list(soak.lives(ways, killed, random.Random(0), **job)) == []
    assert soak.end(undisturbed) == [0, 0]
    assert soak.results(killed) == soak.results(alone)
    assert soak.saved(killed) == 40
    assert "stopped and saved at step" in (tmp_path / "log.txt").read_text()
