"""`tokenbridge evaluate features`: the metrics of features from files."""

import json

import numpy as np
import pytest
from scipy import linalg
from scipy.spatial import distance

from tokenbridge_jax.commands import runner
from tokenbridge_jax.evaluation import scores
from tokenbridge_jax.evaluation.feature_files import read_features


def random_features(count: int, size: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(seed, 1 + seed, (count, size)).astype(np.float32)


@pytest.fixture
def run(tmp_path, capsys):
    def run(*flags: str) -> tuple[dict, str]:
        """The result, and the last line on stderr."""
        where = f"--output={tmp_path / 'out'}"
        status = runner.run("evaluate", ["features", *flags, where])
        error = capsys.readouterr().err
        assert status == (runner.EXIT_USER_ERROR if error else 0), error
        if status:
            (line,) = error.splitlines()
            return {}, line
        (path,) = (tmp_path / "out").glob("features_*/result.json")
        result = json.loads(path.read_text())
        path.unlink()
        return result, ""

    return run


def test_metrics_are_those_of_the_arrays(run, tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "KID_SUBSET", 40)
    fake, real = random_features(40, seed=1), random_features(40)
    np.savez(tmp_path / "fake.npz", features=fake, labels=np.arange(40))
    np.savez(tmp_path / "real.npz", real)
    files = [f"--samples={tmp_path / 'fake.npz'}", f"--reference={tmp_path / 'real.npz'}"]
    result, _ = run(*files)

    found = result["metrics"]
    root = linalg.sqrtm(np.cov(fake.T) @ np.cov(real.T)).real
    expected = ((fake.mean(axis=0) - real.mean(axis=0)) ** 2).sum()
    expected += np.trace(np.cov(fake.T) + np.cov(real.T) - 2 * root)
    assert found["frechet_distance"] == pytest.approx(expected, rel=1e-5)
    # Every subset holds all rows.
    kernels = [(np.float64(a) @ b.T / 5 + 1) ** 3 for a, b in ((fake, fake), (real, real))]
    within = sum(kernel.sum() - np.trace(kernel) for kernel in kernels) / (40 * 39)
    between = ((np.float64(fake) @ real.T / 5 + 1) ** 3).mean()
    assert found["kid"] == pytest.approx(within - 2 * between, rel=1e-5)
    radii = [np.sort(distance.cdist(x, x), axis=1)[:, 3] for x in (real, fake)]
    inside = [distance.cdist(fake, real) <= radii[0], distance.cdist(real, fake) <= radii[1]]
    for name, near in zip(("precision", "recall"), inside, strict=True):
        assert found[name] == pytest.approx(near.any(axis=1).mean())
    assert found.keys() == {"frechet_distance", "kid", "kid_std", "precision", "recall"}
    facts = result["facts"]
    assert (facts["samples"], facts["reference_images"], facts["reference"]) == (40, 40, "real.npz")

    # The order of the rows does not matter; nor does the name, or a pickle beside the array.
    np.savez(tmp_path / "fake.npz", reps=fake[::-1], hparams=np.array({"depth": 0}))
    again, _ = run(*files)
    assert again["metrics"] == pytest.approx(found, rel=1e-9)
    fewer, _ = run(*files, "--num_images=20")
    assert fewer["facts"]["samples"] == 20
    assert fewer["metrics"].keys() == {"frechet_distance", "precision", "recall"}


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4"])
def test_other_types_are_read(tmp_path, dtype):
    rows = random_features(9).astype(dtype)
    np.savez_compressed(tmp_path / "x.npz", features=rows)
    found = read_features(tmp_path / "x.npz")
    np.testing.assert_array_equal(found.kept, rows)
    np.testing.assert_allclose(found.pool.covariance, np.cov(rows.astype(np.float64).T))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"pool": np.zeros((3, 5))},
            "x.npz holds pool: features are one array [images, features] n",
        ),
        ({}, "x.npz holds nothing: features are one array"),
        (
            {"features": np.eye(5), "reps": np.eye(5)},
            "x.npz holds features, reps: features are one",
        ),
        (
            {"features": np.zeros((3, 8, 5))},
            "features must be floats of shape [images, features], n",
        ),
        ({"features": np.array([["a"]])}, "x.npz: features must be floats of shape [images, fea"),
        (
            {"arr_0": np.zeros((3, 5), np.uint8)},
            "arr_0 must be floats of shape [images, features], n",
        ),
        ({"features": np.zeros((3, 0))}, "not float64 [3, 0]"),
        ({"features": np.zeros((1, 5))}, "x.npz: statistics need at least 2 images, not 1"),
        ({"features": np.full((4, 5), np.nan)}, "x.npz: 4 of 4 images have features that are NaN"),
        ({"features": np.array([{}, {}])}, "x.npz cannot be read: "),
        ({"features": np.ones((4, 6))}, "x.npz has 6 features of an image, "),
    ],
)
def test_files_that_cannot_be_used_give_one_line(run, tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    np.savez(tmp_path / "real.npz", random_features(9))
    pair = [f"--samples={tmp_path / 'x.npz'}", f"--reference={tmp_path / 'real.npz'}"]
    assert message in run(*pair)[1]


def test_files_that_are_missing_or_damaged_give_one_line(run, tmp_path):
    np.savez(tmp_path / "x.npz", random_features(9))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:200])
    samples = f"--samples={tmp_path / 'x.npz'}"
    assert (
        "name files and a folder: --samples FILE --reference FILE --output DIR" in run(samples)[1]
    )
    assert "cut.npz cannot be read: " in run(samples, f"--reference={tmp_path / 'cut.npz'}")[1]
    assert "none.npz does not exist" in run(samples, f"--reference={tmp_path / 'none.npz'}")[1]
    assert "--images belongs to `tokenbridge evaluate gen" in run(samples, "--images=x")[1]
