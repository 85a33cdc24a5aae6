"""Images <-> indices in batches on a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenbridge_jax.autoencoder import Autoencoder, AutoencoderConfig, Posterior, init_params
from tokenbridge_jax.codec import Codec, padded_size
from tokenbridge_jax.quantizer import Quantizer
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.meshes import make_mesh

CONFIG = AutoencoderConfig(
    image_size=8,
    image_channels=1,
    channels=8,
    multipliers=(1, 2),
    blocks=1,
    attention_resolutions=(),
    latent_channels=4,
    scale=2.0,
)
QUANTIZER = Quantizer.gaussian(16, range=3.0)
PARAMS = init_params(CONFIG, jax.random.key(0))
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)


def encode_alone(images: np.ndarray) -> Posterior:
    """The posterior that the autoencoder itself gives."""
    encode = jax.jit(lambda p, x: Autoencoder(CONFIG).apply({"params": p}, x, method="encode"))
    return encode(PARAMS, jnp.asarray(images / 127.5 - 1, jnp.float32))


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec(CONFIG, PARAMS, QUANTIZER, make_mesh(data=2, fsdp=2, tensor=2))


@pytest.fixture(scope="module")
def single() -> Codec:
    mesh = make_mesh(data=1, devices=jax.devices()[:1])
    return Codec(CONFIG, PARAMS, QUANTIZER, mesh)


def test_encode_is_the_scaled_mean_quantized(codec: Codec):
    encoded = codec.encode(IMAGES)
    latents = np.asarray(encode_alone(IMAGES).mean) * np.float32(2)
    np.testing.assert_allclose(encoded.latents, latents, atol=1e-5)

    latents = np.asarray(encoded.latents)
    assert encoded.indices.shape == (5, 16, 4)
    assert encoded.indices.dtype == np.uint8
    np.testing.assert_array_equal(
        np.asarray(encoded.indices)[3, 4 * 2 + 1], QUANTIZER.quantize(latents[3, 2, 1])
    )
    clipped = (np.abs(latents) > 3).sum(axis=(1, 2))
    assert 0 < clipped.sum() < latents.size
    np.testing.assert_array_equal(encoded.clipped, clipped)
    assert not np.asarray(encoded.broken).any()


def test_noise_belongs_to_the_image(codec: Codec, single: Codec):
    ids = np.arange(5) + 100
    drawn = codec.encode(IMAGES, ids, seed=1)
    shuffled = single.encode(IMAGES[[4, 2]], ids[[4, 2]], seed=1)
    np.testing.assert_allclose(
        shuffled.latents, np.asarray(drawn.latents)[[4, 2]], rtol=1e-5, atol=1e-5
    )
    for arguments in ((None,), (ids, 2), (ids + 1, 1)):
        other = codec.encode(IMAGES, *arguments)
        assert np.abs(np.asarray(other.latents) - np.asarray(drawn.latents)).max() > 0.1

    # The draws of many ids have the posterior's mean and variance.
    same = np.repeat(IMAGES[:1], 768, axis=0)
    samples = np.asarray(codec.encode(same, np.arange(768)).latents) / 2
    posterior = encode_alone(IMAGES[:1])
    np.testing.assert_allclose(samples.var(axis=0), np.exp(posterior.logvar[0]), rtol=0.3)
    standard_error = np.exp(0.5 * posterior.logvar[0]) / np.sqrt(768)
    assert (np.abs(samples.mean(axis=0) - posterior.mean[0]) < 4.5 * standard_error).all()


def test_decode_is_the_decoder_on_dequantized_latents(codec: Codec, single: Codec):
    indices = np.asarray(codec.encode(IMAGES).indices)
    decoded = codec.decode(indices)
    latents = jnp.asarray(QUANTIZER.dequantized_levels[indices].reshape(5, 4, 4, 4)) / 2
    decode = jax.jit(lambda p, x: Autoencoder(CONFIG).apply({"params": p}, x, method="decode"))
    images = decode(PARAMS, latents)
    expected = np.rint((np.clip(images, -1, 1) + 1) * 127.5).astype(int)
    assert decoded.shape == IMAGES.shape
    assert decoded.dtype == np.uint8
    assert np.abs(np.asarray(decoded).astype(int) - expected).max() <= 1  # rounding of a float32
    alone = single.decode(indices[2:3])
    assert np.abs(np.asarray(alone).astype(int) - expected[2:3]).max() <= 1


def test_broken_images_are_flagged(single: Codec):
    params = jax.tree.map(lambda x: x, PARAMS)
    params["quant_conv"]["bias"] = params["quant_conv"]["bias"].at[0].set(jnp.nan)
    codec = Codec(CONFIG, params, QUANTIZER, single.mesh)
    assert np.asarray(codec.encode(IMAGES[:2]).broken).all()


def test_wrong_shapes_are_refused(single: Codec):
    with pytest.raises(UserError, match="3 channels"):
        single.encode(np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="not divisible"):
        single.encode(np.zeros((1, 8, 7, 1), np.uint8))
    for shape in ((1, 15, 4), (1, 16, 5)):
        with pytest.raises(UserError, match="do not fit"):
            single.decode(np.zeros(shape, np.uint8))


def test_bfloat16_codec_is_close(single: Codec):
    codec = Codec(CONFIG, PARAMS, QUANTIZER, single.mesh, "bfloat16")
    exact, rough = single.encode(IMAGES).latents, codec.encode(IMAGES).latents
    assert rough.dtype == jnp.float32
    assert float(jnp.abs(exact - rough).max() / jnp.abs(exact).max()) < 0.05


def test_padded_sizes_are_few_and_close():
    sizes = [padded_size(n, make_mesh()) for n in range(1, 2000)]
    assert all(n <= size and size % 8 == 0 for n, size in enumerate(sizes, 1))
    assert all(size <= 1.5 * (n + 8) for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) < 20


def test_config_is_not_shared_between_codecs(single: Codec):
    other = Codec(dataclasses.replace(CONFIG, scale=1.0), PARAMS, QUANTIZER, single.mesh)
    np.testing.assert_allclose(
        np.asarray(other.encode(IMAGES).latents) * 2, single.encode(IMAGES).latents, rtol=1e-5
    )
