"""Inception and LPIPS, against the public PyTorch networks with the same weights."""

import sys

import jax
import numpy as np
import pytest
import torch
import torch_networks
import torchvision_stand_in
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch_networks import lpips_network, random_inception_state, torch_fidelity_extractor

from tokenbridge_jax.evaluation import inception, lpips, pixels
from tokenbridge_jax.runtime.errors import UserError


def pictures(*shape: int) -> np.ndarray:
    """Noise; only the first image is smooth."""
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    images[0] = np.add.outer(np.arange(shape[1]), 2 * np.arange(shape[2]))[..., None] % 256
    return images


def noisy(images: np.ndarray, scale: float) -> np.ndarray:
    noise = np.random.default_rng(1).normal(scale=scale, size=images.shape)
    return np.clip(images + noise, 0, 255).astype(np.uint8)


def nchw(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


@pytest.fixture(scope="module")
def state() -> dict[str, np.ndarray]:
    return random_inception_state()


def test_inception_is_torch_fidelitys_layer_by_layer(state, tmp_path):
    """From uint8 images of another size, so resizing is compared too."""
    images = pictures(2, 256, 190, 3)
    extractor = torch_fidelity_extractor(state, tmp_path / "inception.pth")
    theirs = {}
    for name, module in extractor.named_modules():
        module.register_forward_hook(lambda *call, name=name: theirs.update({name: call[2]}))
    with torch.no_grad():
        pool, logits = extractor(nchw(images))
    theirs = {
        name: x.permute(0, 2, 3, 1) for name, x in theirs.items() if getattr(x, "ndim", 0) == 4
    }
    params = inception.import_inception(state)
    spatial = theirs[inception.SPATIAL][..., :7].reshape(2, -1)
    found = jax.jit(inception.features)(params, images)
    for mine, expected in zip(found, (pool, spatial, logits), strict=True):
        assert mine.shape == expected.shape
        np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-5)
    layers = jax.jit(lambda images: dict(inception.activations(params, images)))(images)
    compared = layers.keys() & theirs.keys()
    assert compared == {name for name, _, _ in inception.convolutions()} | set(inception.BLOCKS)
    for name in compared:
        np.testing.assert_allclose(layers[name], theirs[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_inceptions_weights_are_checked(state):
    wrong = state | {"fc.weight": state["fc.weight"][:1000]}
    del wrong["Mixed_7c.branch1x1.bn.bias"]
    message = r"\(2 of 471 tensors differ\): fc.weight: \(1000, 2048\) instead"
    with pytest.raises(UserError, match=message):
        inception.import_inception(wrong)


@pytest.mark.parametrize("name", ["vgg", "alex"])
def test_lpips_is_that_of_its_package(name: str):
    network, backbone, linear = lpips_network(name)
    one = pictures(3, 64, 80, 3)
    other = noisy(one, 30)
    other[2] = one[2]
    with torch.no_grad():
        expected = network(*(nchw(x).float() / 127.5 - 1 for x in (one, other))).flatten()
    params = lpips.import_lpips(backbone, linear, name)
    found = jax.jit(lpips.distance, static_argnames="network")(params, one, other, network=name)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-8)
    assert found[2] == 0
    del linear["lin2.model.1.weight"]
    with pytest.raises(UserError, match=f"LPIPS's {name} .*: lin2.model.1.weight: missing"):
        lpips.import_lpips(backbone, linear, name)


def test_psnr_and_ssim_are_scikit_images():
    one = pictures(3, 40, 50, 3)
    other = noisy(one, 20)
    pairs = list(zip(one, other, strict=True))
    expected = [peak_signal_noise_ratio(a, b) for a, b in pairs]
    np.testing.assert_allclose(pixels.psnr(one, other), expected, rtol=1e-12)
    expected = [structural_similarity(a, b, channel_axis=2) for a, b in pairs]
    np.testing.assert_allclose(pixels.ssim(one, other), expected, rtol=1e-10)
    assert np.isinf(pixels.psnr(one, one)).all()
    np.testing.assert_allclose(pixels.ssim(one, one), 1)


def test_no_reference_loads_torchvisions_binary():
    """Whether it is installed or not: with some builds of PyTorch it stops the interpreter."""
    assert torch_networks.lpips.pretrained_networks.tv.vgg16 is torchvision_stand_in.VGG16
    files = [getattr(module, "__file__", None) or "" for module in sys.modules.values()]
    assert not [path for path in (*files, *torch.ops.loaded_libraries) if "/torchvision/" in path]
