"""Features of sets of images: the same however they are divided."""

import jax
import numpy as np
import pytest
from torch_networks import random_inception_state

from tokenbridge_jax.evaluation import features, inception
from tokenbridge_jax.evaluation.images import open_images


@pytest.fixture(scope="module")
def params():
    return inception.import_inception(random_inception_state())


def test_features_do_not_depend_on_batches_and_devices(params, tmp_path, monkeypatch):
    """Nor does an image's key on anything but the image."""
    images = np.random.default_rng(0).integers(0, 256, (5, 20, 20, 3), dtype=np.uint8)
    images[4] = images[1]
    np.savez(tmp_path / "x.npz", images)
    found = features.extract(open_images(tmp_path / "x.npz"), params, batch_size=4)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    alone = features.extract(open_images(tmp_path / "x.npz"), params, batch_size=2)
    direct = jax.jit(inception.features)(params, images)
    for name in ("pool", "spatial", "logits"):
        mine, others = getattr(found, name), getattr(alone, name)
        np.testing.assert_allclose(mine, others, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(mine, getattr(direct, name), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.keys, alone.keys)
    assert len(set(found.keys.tolist())) == 4
    assert found.keys[4] == found.keys[1]
