"""One job of one, two and four real processes: the same losses, the same images."""

import shutil

import numpy as np
import pytest
import soak
from jobs import start_job

STEPS = 8


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Workdirs of the same training, by number of processes; each on the same four devices."""
    root = tmp_path_factory.mktemp("trained")
    soak.write_workdir(root / "1")
    shutil.copytree(root / "1", root / "4")
    config = {"training.steps": STEPS, "training.checkpoint_every": 5}
    jobs = {
        count: soak.start(root / str(count), count, root / f"{count}.txt", **config)
        for count in (1, 4)
    }
    for count, job in jobs.items():
        assert soak.end(job) == [0] * count, (root / f"{count}.txt").read_text()
    return {count: root / str(count) for count in jobs}


def test_training_gives_the_losses_of_one_process(trained):
    """Sums over devices are taken in another order, by another library: float32 rounding."""
    one = soak.results(trained[1])
    assert [row["step"] for row in one] == list(range(1, STEPS + 1))
    assert "val_nll_bits_per_index" in one[-1]
    four = soak.results(trained[4])
    assert [row.keys() for row in four] == [row.keys() for row in one]
    for ours, theirs in zip(four, one, strict=True):
        assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-4)


def test_sampling_gives_every_image_once_and_the_same_ones(trained, tmp_path):
    """Also: a checkpoint of four processes restores on one and two."""
    command = ["-m", "tokenbridge_jax.commands.sample", "--distributed", "--workdir", trained[4]]
    command += ["--num_images=22", "--config.sampling.batch_size=8"]
    jobs = {
        count: start_job(
            [*command, "--output", tmp_path / str(count)], [[]] * count, devices=4 // count
        )
        for count in (1, 2)
    }
    for count, job in jobs.items():
        outputs = [process.communicate(timeout=soak.LIMIT_SECONDS)[0] for process in job]
        assert [process.returncode for process in job] == [0] * count
        assert ["(22 images)" in output for output in outputs] == [True] + [False] * (count - 1)
    one, two = (np.load(tmp_path / str(count) / "samples.npz") for count in jobs)
    assert one["arr_0"].shape == (22, 16, 16, 1)
    assert len({image.tobytes() for image in one["arr_0"]}) == 22
    np.testing.assert_array_equal(two["labels"], np.resize([0, 1, 2], 22))
    np.testing.assert_array_equal(two["arr_0"], one["arr_0"])


def test_processes_that_see_different_folders_are_told(trained, tmp_path):
    shutil.copytree(trained[4], tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "checkpoints")
    command = ["-m", "tokenbridge_jax.commands.train", "--distributed"]
    with (tmp_path / "log.txt").open("w") as log:
        job = start_job(
            command,
            [["--workdir", trained[4]], ["--workdir", tmp_path / "other"]],
            devices=2,
            output=log,
        )
    assert soak.end(job) == [2, 2]
    assert "checkpoints: 8, none; give all of them the same" in (tmp_path / "log.txt").read_text()
