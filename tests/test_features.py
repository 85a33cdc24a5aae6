"""Features of sets of images do not depend on batches, devices or the order."""

from pathlib import Path

import jax
import numpy as np
import pytest
from torch_networks import random_inception_state

from tokenbridge_jax.evaluation import features, inception
from tokenbridge_jax.evaluation.features import InceptionExtractor, ThumbnailExtractor, extract
from tokenbridge_jax.evaluation.image_sets import open_images
from tokenbridge_jax.runtime import meshes


@pytest.fixture(scope="module")
def params():
    return inception.import_inception(random_inception_state())


def write_images(path: Path, count: int = 5, size: int = 20) -> np.ndarray:
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    images[4] = images[1]
    np.savez(path, images)
    return images


def test_features_do_not_depend_on_batches_and_devices(params, tmp_path, monkeypatch):
    """The key of an image depends only on the image."""
    images = write_images(tmp_path / "x.npz")
    found = extract(open_images(tmp_path / "x.npz"), InceptionExtractor(params, batch_size=4))
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    # As in training, whose mesh has all devices.
    with meshes.use_mesh(meshes.make_mesh()):
        alone = extract(open_images(tmp_path / "x.npz"), InceptionExtractor(params, batch_size=2))
    pool, spatial, logits = jax.jit(inception.features)(params, images)
    for mine, others, expected in (
        (found.kept, alone.kept, pool),
        (found.logits, alone.logits, logits),
        (found.pool.mean, alone.pool.mean, pool.mean(axis=0)),
        (found.spatial.mean, alone.spatial.mean, spatial.mean(axis=0)),
        (found.spatial.covariance, alone.spatial.covariance, np.cov(spatial.T)),
    ):
        np.testing.assert_allclose(mine, others, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.keys, alone.keys)
    assert len(set(found.keys.tolist())) == 4
    assert found.keys[4] == found.keys[1]


def test_kept_features_do_not_depend_on_the_order(tmp_path):
    images = write_images(tmp_path / "x.npz", count=40)
    np.savez(tmp_path / "y.npz", images[::-1])
    sets = (open_images(tmp_path / name) for name in ("x.npz", "y.npz"))
    one, other = (extract(images, ThumbnailExtractor(), keep=7) for images in sets)
    assert (one.count, len(one.kept), one.logits) == (40, 7, None)
    np.testing.assert_array_equal(one.kept, other.kept)
    whole = extract(open_images(tmp_path / "x.npz"), ThumbnailExtractor())
    np.testing.assert_array_equal(one.kept, whole.kept[np.argsort(whole.keys, kind="stable")[:7]])
    np.testing.assert_allclose(one.pool.mean, whole.kept.mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize(("height", "width", "channels"), [(16, 24, 3), (8, 8, 1), (20, 30, 3)])
def test_thumbnails_are_means_of_cells(height: int, width: int, channels: int):
    images = np.random.default_rng(0).integers(0, 256, (3, height, width, channels), np.uint8)
    rows, columns = (
        np.ceil((np.arange(side) + 0.5) / side * 8).astype(int) - 1 for side in (height, width)
    )
    found = features.thumbnails(images).reshape(3, 8, 8, channels)
    assert found.dtype == np.float32
    for row, column in np.ndindex(8, 8):
        mean = images[:, rows == row][:, :, columns == column].mean(axis=(1, 2)) / 255
        np.testing.assert_allclose(found[:, row, column], mean, atol=1e-6)
