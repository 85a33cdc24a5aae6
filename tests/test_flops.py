"""FLOPs counted by hand, against those of the programs."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from tiny_model import program_flops, tiny

from tokenbridge_jax.autoencoder import Autoencoder, AutoencoderConfig
from tokenbridge_jax.autoencoder import abstract_params as abstract_autoencoder
from tokenbridge_jax.channels import KL16_CHANNEL_ORDER
from tokenbridge_jax.flops import decode_flops, encode_flops, sampling_flops
from tokenbridge_jax.model import TokenBridge, abstract_params
from tokenbridge_jax.model_config import SIZES, TokenBridgeConfig
from tokenbridge_jax.quantizer import Quantizer
from tokenbridge_jax.sampling.schedule import SamplingSettings


@pytest.mark.parametrize(("num_iter", "guided"), [(1, False), (3, True), (20, True)])
def test_sampling_flops_are_those_of_programs_without_padding(num_iter, guided):
    """At each step, the backbone gets exactly the visible slots, and the head what is revealed."""
    config = tiny(encoder_layers=2, decoder_layers=3, head_layers=2, head_width=32, buffer=5)
    positions, label = config.positions, jnp.zeros(1, jnp.int32)

    def apply(method, *arguments):
        def function(params):
            return TokenBridge(config).apply({"params": params}, *arguments, method=method)

        return program_flops(jax.make_jaxpr(function)(abstract_params(config)).jaxpr)

    total, hidden, all_hidden = 0, positions, 0
    for step in range(1, num_iter + 1):
        cosine = math.floor(positions * math.cos(math.pi / 2 * step / num_iter))
        left = max(1, min(hidden - 1, cosine)) if step < num_iter else 0
        if left < hidden:  # With more steps than positions, some steps reveal nothing.
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


def test_null_branches_that_rest_are_not_counted():
    """Three steps, with 8, 6 and 4 positions hidden before them."""
    config = tiny()
    plain, guided, rare = (
        sampling_flops(config, SamplingSettings(3, **settings))
        for settings in ({}, {"guidance": 2.0}, {"guidance": 2.0, "guidance_every": 2})
    )
    assert guided - rare == config.forward_flops(6, 0)
    assert guided - plain == sum(config.forward_flops(hidden, 0) for hidden in (8, 6, 4))


def test_published_counts():
    """TFLOP per image: sampling with guidance in 256 and 64 steps, encoding, decoding."""
    config = TokenBridgeConfig(Quantizer.gaussian(64), KL16_CHANNEL_ORDER, **SIZES["L"])
    for steps, tera in ((256, 111), (64, 26)):
        settings = SamplingSettings(steps, guidance=3.1)
        assert sampling_flops(config, settings) / 1e12 == pytest.approx(tera, abs=0.5)
    assert encode_flops(AutoencoderConfig.kl16()) / 1e12 == pytest.approx(0.138, abs=5e-4)
    assert decode_flops(AutoencoderConfig.kl16()) / 1e12 == pytest.approx(0.250, abs=5e-4)


def autoencoder_program(config: AutoencoderConfig, method: str, *shape: int):
    def function(params, x):
        return Autoencoder(config).apply({"params": params}, x, method=method)

    params = nn.unbox(abstract_autoencoder(config))
    return jax.jit(function).trace(params, jax.ShapeDtypeStruct((1, *shape), jnp.float32))


def test_autoencoder_flops_are_those_of_the_programs():
    config = AutoencoderConfig(
        image_size=32, image_channels=1, channels=8, multipliers=(1, 3, 2), blocks=3,
        attention_resolutions=(16, 32), latent_channels=5,
    )  # fmt: skip
    programs = (
        autoencoder_program(config, "moments", 32, 32, 1),
        autoencoder_program(config, "decode", 8, 8, 5),
    )
    found = [program_flops(program.jaxpr.jaxpr) for program in programs]
    assert found == [encode_flops(config), decode_flops(config)]


def test_autoencoder_flops_are_about_what_xla_counts():
    """XLA leaves out products with padding beyond the border, and counts elementwise work."""
    config = AutoencoderConfig(
        image_size=64, image_channels=3, channels=32, multipliers=(1, 2), blocks=1,
        attention_resolutions=(), latent_channels=4,
    )  # fmt: skip
    program = autoencoder_program(config, "moments", 64, 64, 3)
    counted = program.lower().compile().cost_analysis()["flops"]
    assert counted == pytest.approx(encode_flops(config), rel=0.04)
