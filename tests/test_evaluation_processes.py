"""Two processes with one device each get the result of one process with eight devices."""

import hashlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
from jobs import start_job

from tokenbridge_jax.commands import runner
from tokenbridge_jax.evaluation import features
from tokenbridge_jax.evaluation.features import ThumbnailExtractor, extract
from tokenbridge_jax.evaluation.image_sets import open_images
from tokenbridge_jax.runtime import processes


def found_in(folder: Path) -> list[str]:
    """Hashes of features and of their sums."""
    lines = []
    for count in (37, 1):  # With one image, the second process has no share.
        images = open_images(folder / "real")
        images.take(count)
        (found,) = features.blocks(
            images, 40, 16, lambda batch, numbers: (features.thumbnails(batch), numbers)
        )
        lines.append(" ".join([str(found[1][0].shape), *map(digest, jax.tree.leaves(found))]))
    kept = extract(open_images(folder / "real"), ThumbnailExtractor(), keep=9)
    return [*lines, digest(kept.pool.covariance), digest(kept.kept)]


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def evaluate(folder: Path, output: Path) -> int:
    paths = [f"--workdir={folder / 'model'}", f"--reference={folder / 'real'}"]
    settings = "--features=thumbnails --write_samples --num_images=13 --config.sampling.num_iter=3"
    return runner.run("evaluate", ["generation", f"--output={output}", *paths, *settings.split()])


def process(folder: Path) -> None:
    """What every process of the job runs."""
    processes.join(True)
    print("\n".join(["found", *found_in(folder)]), flush=True)
    evaluate(folder, folder / "together")


def scores(folder: Path) -> dict:
    (path,) = folder.glob("generation_*/result.json")
    return json.loads(path.read_text())


def test_two_processes_get_the_result_of_one(tmp_path):
    # Not in the processes of the job: it makes a key, and they must join before JAX is used.
    from evaluated import save_tiny, write_pictures

    save_tiny(tmp_path / "model")
    write_pictures(tmp_path / "real")
    job = start_job([__file__, tmp_path], [[], []], devices=1)
    outputs = [process.communicate(timeout=120)[0].splitlines() for process in job]
    assert [process.returncode for process in job] == [0, 0], outputs
    expected = found_in(tmp_path)
    for lines in outputs:
        start = lines.index("found") + 1
        assert lines[start : start + len(expected)] == expected
    assert evaluate(tmp_path, tmp_path / "alone") == 0
    together, alone = scores(tmp_path / "together"), scores(tmp_path / "alone")
    assert together["metrics"] == alone["metrics"]
    assert (together["machine"]["processes"], alone["machine"]["processes"]) == (2, 1)
    indices = [
        np.concatenate([np.load(p) for p in sorted(tmp_path.glob(f"{name}/samples_*/*.npy"))])
        for name in ("together", "alone")
    ]
    np.testing.assert_array_equal(*indices)


if __name__ == "__main__":
    process(Path(sys.argv[1]))
