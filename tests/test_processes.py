"""Jobs of several real processes, killed or not, against one process: losses and images."""

import random
import shutil
import signal
import time

import numpy as np
import pytest
import soak
from jobs import start_job
from PIL import Image

from tokenbridge_jax.runtime.processes import EXIT_LOST

STEPS = 15
CONFIG = {"training.steps": STEPS, "training.checkpoint_every": 5, "training.eval_every": 5}
# Waits for the other processes, unless it is the one that dies.
MEMBER = """
import os, signal, sys
from tokenbridge_jax.runtime import processes
processes.join(True)
assert processes.gather(sys.argv[1]) == ["a", "dies", "b"]
if sys.argv[1] == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
processes.gather("never")
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Workdirs of the same training on four devices, by number of processes."""
    root = tmp_path_factory.mktemp("trained")
    soak.write_workdir(root / "1")
    shutil.copytree(root / "1", root / "2")
    jobs = {
        count: soak.start(root / str(count), count, root / f"{count}.txt", **CONFIG)
        for count in (1, 2)
    }
    for count, job in jobs.items():
        assert soak.end(job) == [0] * count, (root / f"{count}.txt").read_text()
    return {count: root / str(count) for count in jobs}


def test_training_gives_the_losses_of_one_process(trained):
    """Up to float32 rounding: another library sums over devices, in another order."""
    one = soak.results(trained[1])
    assert [row["step"] for row in one] == list(range(1, STEPS + 1))
    assert "val_nll_bits_per_index" in one[-1]
    two = soak.results(trained[2])
    assert [row.keys() for row in two] == [row.keys() for row in one]
    for ours, theirs in zip(two, one, strict=True):
        assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-4)


def test_a_run_killed_and_stopped_has_the_losses_of_an_undisturbed_run(trained, tmp_path):
    """`soak.py` does this many times."""
    soak.write_workdir(tmp_path / "killed")
    job = {"processes": 2, "log": tmp_path / "log.txt", **CONFIG}
    ways = ("writing", "term")
    assert list(soak.lives(ways, tmp_path / "killed", random.Random(0), **job)) == []
    assert soak.results(tmp_path / "killed") == soak.results(trained[2])
    assert soak.saved(tmp_path / "killed") == STEPS
    assert "stopped and saved at step" in (tmp_path / "log.txt").read_text()


def test_if_one_process_dies_the_others_end_with_a_message(tmp_path):
    with (tmp_path / "log.txt").open("w") as log:
        job = start_job(
            ["-c", MEMBER], [["a"], ["dies"], ["b"]], output=log, TOKENBRIDGE_HEARTBEAT_SECONDS="10"
        )
    begun = time.monotonic()
    assert soak.end(job) == [EXIT_LOST, -signal.SIGKILL, EXIT_LOST]
    assert time.monotonic() - begun < 60  # This includes their start.
    log = (tmp_path / "log.txt").read_text()
    for index in (0, 2):
        assert f"process {index} ends: another process of this job is gone or did not" in log
    assert "unhealthy (stopped sending heartbeats):\n1\n" in log


def test_sampling_gives_every_image_once_for_any_number_of_processes(trained, tmp_path):
    """Also, a checkpoint of two processes is restored on one and on four."""
    command = ["-m", "tokenbridge_jax.commands.sample", "--distributed", "--workdir", trained[2]]
    command += ["--num_images=22", "--config.sampling.batch_size=8"]
    jobs = {}
    for count in (1, 4):
        # Four processes share the writing.
        output = ["--output", tmp_path / str(count), "--format", "npz" if count == 1 else "png"]
        jobs[count] = start_job([*command, *output], [[]] * count, devices=4 // count)
    for count, job in jobs.items():
        outputs = [process.communicate(timeout=soak.LIMIT_SECONDS)[0] for process in job]
        assert [process.returncode for process in job] == [0] * count
        assert ["(22 images)" in output for output in outputs] == [True] + [False] * (count - 1)
    with np.load(tmp_path / "1" / "samples.npz") as file:
        one = dict(file)
    assert one["arr_0"].shape == (22, 16, 16, 1)
    assert len({image.tobytes() for image in one["arr_0"]}) == 22
    *files, last, _ = sorted((tmp_path / "4" / "images").iterdir())  # The last is settings.json.
    assert [file.name for file in files] == [f"{number:07d}.png" for number in range(22)]
    four = np.stack([np.asarray(Image.open(file))[..., None] for file in files])
    for labels in (one["labels"], np.load(last)):
        np.testing.assert_array_equal(labels, np.resize([0, 1, 2], 22))
    # The same indices. Devices decode batches of another size, which moves a value at the edge
    # between two pixel levels.
    difference = np.abs(four.astype(int) - one["arr_0"].astype(int))
    assert difference.max() <= 1
    assert np.count_nonzero(difference) <= 5


def test_processes_that_find_different_folders_are_refused(trained, tmp_path):
    shutil.copytree(trained[2], tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "checkpoints")
    command = ["-m", "tokenbridge_jax.commands.train", "--distributed"]
    with (tmp_path / "log.txt").open("w") as log:
        folders = [["--workdir", trained[2]], ["--workdir", tmp_path / "other"]]
        job = start_job(command, folders, devices=2, output=log)
    assert soak.end(job) == [2, 2]
    assert (
        f"checkpoints: {STEPS}, none; give all of them the same"
        in (tmp_path / "log.txt").read_text()
    )
