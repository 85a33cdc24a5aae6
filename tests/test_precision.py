"""The compiled programs state the precision of every product, so that platforms agree."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import correlate
from tiny_model import examples, random_batch, random_params, tiny
from torch_states import TINY as AUTOENCODER

from tokenbridge_jax.autoencoder import Autoencoder, abstract_params
from tokenbridge_jax.codec import Codec
from tokenbridge_jax.loss import MaskDraw, training_loss
from tokenbridge_jax.model import TokenBridge
from tokenbridge_jax.ops import precision
from tokenbridge_jax.quantizer import Quantizer
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.meshes import make_mesh
from tokenbridge_jax.transformer import unstack


def products(lowered: str) -> list[tuple[str, str]]:
    """The precision of every product in a program's text, and the dtype of its operands."""
    found = []
    for line in lowered.splitlines():
        if "stablehlo.convolution" in line or "stablehlo.dot_general" in line:
            stated = set(re.findall("DEFAULT|HIGHEST|HIGH", line)) or {"DEFAULT"}
            operands = set(re.findall(r"(f32|bf16)>", line.split(" : ")[-1].split("->")[0]))
            found.append((*stated, "+".join(sorted(operands))))
    return found


def lower(function, platform: str, *arguments) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("name", "platform", "allowed"),
    [
        ("float32", "tpu", {("HIGHEST", "f32")}),
        ("float32", "cuda", {("HIGHEST", "f32"), ("HIGH", "f32")}),
        ("tensorfloat32", "tpu", {("HIGHEST", "f32"), ("HIGH", "f32")}),
        ("bfloat16", "tpu", {("DEFAULT", "bf16")}),
    ],
)
def test_the_autoencoder_compiles_to_its_precision(name, platform, allowed):
    params = nn.unbox(abstract_params(AUTOENCODER))
    images, latents = jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 4, 4, 4))
    found = []
    for method, x in (("moments", images), ("decode", latents)):
        apply = functools.partial(Autoencoder(AUTOENCODER, name).apply, method=method)
        found += products(lower(apply, platform, {"params": params}, x))
    assert len(found) >= 20
    assert set(found) == allowed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whatever_the_model_computes_in_float32_is_float32_on_tpus(dtype):
    """In training's gradient and in sampling, and in the float32 parts of a bfloat16 model."""
    config = tiny(dtype=dtype, dropout=0.1)
    params, batch = random_params(config), examples(random_batch(config, 2))

    def mean(params):
        draw = MaskDraw(jnp.int32(6), 8, 4)
        return training_loss(config, params, batch, draw, jax.random.key(0))

    def sample(params, feature):
        variables, keys = {"params": unstack(params)}, jax.random.split(jax.random.key(0), (2, 3))
        model = TokenBridge(dataclasses.replace(config, scan_layers=False))
        return model.apply(variables, feature, keys, jnp.float32(1), method="sample_positions")[0]

    forward = products(lower(mean, "tpu", params))
    sampled = products(lower(sample, "tpu", params, jnp.zeros((2, 3, config.decoder_width), dtype)))
    backward = products(lower(jax.grad(mean), "tpu", params)) if dtype == "float32" else []
    exact = [stated for stated, kind in forward + sampled + backward if kind == "f32"]
    assert len(exact) >= (60 if dtype == "float32" else 1)
    assert set(exact) == {"HIGHEST"}


def test_an_unknown_precision_is_named():
    with pytest.raises(UserError, match="precision is 'half', must be one of float32, tensor"):
        Codec(AUTOENCODER, {}, Quantizer.gaussian(16, 3.0), make_mesh(), "half")


@pytest.mark.parametrize(
    ("channels", "size", "strides", "padding"),
    [(3, 3, (1, 1), "SAME"), (150, 3, (2, 2), ((0, 1), (0, 1))), (70, 1, (1, 1), "SAME")],
)
def test_three_passes_of_tensor_cores_give_float32(monkeypatch, channels, size, strides, padding):
    """Operands are rounded as tensor cores do it; the reference is scipy in float64."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 8, 6, channels)).astype(np.float32)
    kernel = rng.normal(size=(size, size, channels, 5)).astype(np.float32)
    pads = ((size // 2, size // 2),) * 2 if padding == "SAME" else padding
    padded = np.pad(x.astype(np.float64), ((0, 0), *pads, (0, 0)))
    expected = np.stack(
        [[correlate(image, kernel[..., e], "valid")[..., 0] for e in range(5)] for image in padded]
    )[..., :: strides[0], :: strides[1]].transpose(0, 2, 3, 1)
    exact = precision._convolve

    def on_tensor_cores(x, kernel, *others):
        return exact(*(jax.lax.reduce_precision(a, 8, 10) for a in (x, kernel)), *others)

    monkeypatch.setattr(precision, "_convolve", on_tensor_cores)
    once = np.asarray(on_tensor_cores(x, kernel, strides, padding, "high"))
    arrays = jnp.asarray(x), jnp.asarray(kernel)
    found = np.asarray(precision.three_passes(*arrays, strides, padding))
    scale = np.abs(expected).max()
    assert np.abs(once - expected).max() > 1e-4 * scale
    assert np.abs(found - expected).max() < 1e-6 * scale


def test_gradients_of_a_convolution_are_those_of_the_plain_one():
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 5, 5, 3), (3, 3, 3, 4)))

    def total(convolve, x, kernel):
        return jnp.sum(jnp.sin(convolve(x, kernel)))

    ours = functools.partial(
        precision.convolution, strides=(2, 2), padding=((0, 1), (0, 1)), precision="float32"
    )

    def plain(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        padding = ((0, 1), (0, 1))
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), padding, dimension_numbers=numbers, precision="highest"
        )

    gradients = (jax.grad(total, (1, 2))(f, x, kernel) for f in (ours, plain))
    for found, expected in zip(*gradients, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
