"""What is evaluated by several real processes is what one finds."""

import sys

import numpy as np
from jobs import start_job

from tokenbridge_jax import processes
from tokenbridge_jax.evaluation import features
from tokenbridge_jax.evaluation.features import ThumbnailExtractor, extract
from tokenbridge_jax.evaluation.images import open_images


def process(path: str) -> None:
    """What every process of a job runs."""
    processes.join(False)
    for count in (37, 1):  # The second leaves processes without a share.
        images = open_images(path)
        images.count = count
        found = next(iter(features._blocks(images, ThumbnailExtractor())))
        print(count, *(f"{x.shape} {np.float64(x).sum()}" for x in (found[0].pool, found[1])))
    images.count = 37
    print(extract(images, ThumbnailExtractor(), keep=9).pool.covariance.tobytes().hex()[:200])
    processes.leave(0)


def test_processes_have_the_same_features_to_the_bit(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 20, 20, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images)
    told = []
    for count in (1, 3):
        job = start_job([__file__, tmp_path / "x.npz"], [[]] * count, devices=1)
        outputs = [process.communicate(timeout=120)[0] for process in job]
        assert [process.returncode for process in job] == [0] * count, outputs
        told += outputs
    assert "37 (37, 192)" in told[0]
    assert len(set(told)) == 1


if __name__ == "__main__":
    process(sys.argv[1])
