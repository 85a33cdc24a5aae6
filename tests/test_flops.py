"""FLOPs counted by hand, against those of the programs."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from tiny_model import equations, tiny

from tokenbridge_jax.autoencoder import Autoencoder, AutoencoderConfig
from tokenbridge_jax.autoencoder import abstract_params as abstract_autoencoder
from tokenbridge_jax.channels import KL16_CHANNEL_ORDER
from tokenbridge_jax.flops import decode_flops, encode_flops, sampling_flops
from tokenbridge_jax.model import SIZES, TokenBridge, TokenBridgeConfig, abstract_params
from tokenbridge_jax.quantizer import Quantizer
from tokenbridge_jax.sampling.schedule import SamplingSettings


def program_flops(function, *arguments) -> int:
    """FLOPs of every product and convolution in a program."""
    flops = 0
    for times, eqn in equations(jax.make_jaxpr(function)(*arguments).jaxpr):
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
        elif eqn.primitive.name == "conv_general_dilated":
            _, *summed = eqn.params["dimension_numbers"].rhs_spec
            inner = math.prod(eqn.invars[1].aval.shape[axis] for axis in summed)
        else:
            continue
        flops += times * 2 * inner * math.prod(eqn.outvars[0].aval.shape)
    return flops


@pytest.mark.parametrize(("num_iter", "guided"), [(1, False), (3, True), (20, True)])
def test_sampling_flops_are_those_of_programs_without_padding(num_iter, guided):
    """Step by step: the backbone with exactly the visible slots, the head on what is revealed."""
    config = tiny(encoder_layers=2, decoder_layers=3, head_layers=2, head_width=32, buffer=5)
    positions, label = config.positions, jnp.zeros(1, jnp.int32)

    def apply(method, *arguments):
        def function(params):
            return TokenBridge(config).apply({"params": params}, *arguments, method=method)

        return program_flops(function, abstract_params(config))

    total, hidden, all_hidden = 0, positions, 0
    for step in range(1, num_iter + 1):
        cosine = math.floor(positions * math.cos(math.pi / 2 * step / num_iter))
        left = max(1, min(hidden - 1, cosine)) if step < num_iter else 0
        if left < hidden:  # With more steps than positions, some have nothing to do.
            indices = jnp.zeros((1, positions - hidden, config.channels), jnp.int32)
            arguments = label, jnp.arange(positions)[None], jnp.int32(hidden), label == 1
            total += apply(TokenBridge.features, indices, *arguments) * (2 if guided else 1)
            all_hidden += hidden
        hidden = left
    feature = jnp.zeros((positions, config.decoder_width))
    indices = jnp.zeros((positions, config.channels), jnp.int32)
    head = apply(lambda model, *arguments: model.head.logits(*arguments), feature, indices)
    settings = SamplingSettings(num_iter, guidance=2.0 if guided else 1.0)
    assert sampling_flops(config, settings) == total + head
    settings = dataclasses.replace(settings, order="confidence")
    assert sampling_flops(config, settings) == total + head * all_hidden // positions


def test_published_counts():
    """TFLOP an image: sampling with guidance in 256 and 64 steps, encoding, decoding."""
    sizes = SIZES["L"]
    config = TokenBridgeConfig(Quantizer.gaussian(64), KL16_CHANNEL_ORDER, **sizes)
    for steps, tera in ((256, 111), (64, 26)):
        settings = SamplingSettings(steps, guidance=3.1)
        assert sampling_flops(config, settings) / 1e12 == pytest.approx(tera, abs=0.5)
    assert encode_flops(AutoencoderConfig.kl16()) / 1e12 == pytest.approx(0.138, abs=5e-4)
    assert decode_flops(AutoencoderConfig.kl16()) / 1e12 == pytest.approx(0.250, abs=5e-4)


def autoencoder_program(config: AutoencoderConfig, method: str, shape: tuple[int, ...]):
    params = nn.unbox(abstract_autoencoder(config))

    def function(params, x):
        return Autoencoder(config).apply({"params": params}, x, method=method)

    return function, params, jax.ShapeDtypeStruct((1, *shape), jnp.float32)


def test_autoencoder_flops_are_those_of_the_programs():
    config = AutoencoderConfig(
        image_size=32, image_channels=1, channels=8, multipliers=(1, 3, 2), blocks=3,
        attention_resolutions=(16, 32), latent_channels=5,
    )  # fmt: skip
    assert encode_flops(config) == program_flops(
        *autoencoder_program(config, "moments", (32, 32, 1))
    )
    assert decode_flops(config) == program_flops(*autoencoder_program(config, "decode", (8, 8, 5)))


def test_autoencoder_flops_are_about_what_xla_counts():
    """XLA leaves out what a kernel does beyond the border, and counts elementwise work."""
    config = AutoencoderConfig(
        image_size=64, image_channels=3, channels=32, multipliers=(1, 2), blocks=1,
        attention_resolutions=(), latent_channels=4,
    )  # fmt: skip
    function, *shapes = autoencoder_program(config, "moments", (64, 64, 3))
    counted = jax.jit(function).lower(*shapes).compile().cost_analysis()["flops"]
    assert counted == pytest.approx(encode_flops(config), rel=0.04)
