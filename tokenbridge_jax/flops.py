"""The mathematically necessary matmul FLOPs, counted by hand as in `forward_flops` of the config.

A product of [m, k] with [k, n] is 2mkn. A convolution is such a product, with k the kernel's places
times the input channels, borders included. Embeddings, norms, the softmax, padding and
recomputation are not counted.
"""

from tokenbridge_jax.autoencoder import AutoencoderConfig
from tokenbridge_jax.model_config import HEADS, TokenBridgeConfig
from tokenbridge_jax.sampling.schedule import (
    SamplingSettings,
    guidance_scales,
    hidden_counts,
    null_steps,
)


def head_flops(config: TokenBridgeConfig, branches: int = 1) -> int:
    """The head drawing one position, with one branch or with the two of guidance."""
    flops: int = HEADS[config.head].drawing_flops(config, branches)
    return flops


def backbone_flops(config: TokenBridgeConfig, hidden: int) -> int:
    """The backbone on one image: the encoder on visible positions, the decoder on all."""
    return int(config.forward_flops(hidden, 0))


def sampling_flops(config: TokenBridgeConfig, settings: SamplingSettings) -> int:
    """One image: the backbone at every step (twice where the null branch runs) and the head.

    The head draws every position once, or in confidence order all hidden positions at every step.
    """
    before = [config.positions, *hidden_counts(config.positions, settings.num_iter)[:-1].tolist()]
    copies = 1 + null_steps(config.positions, settings)
    branches = 1 + (guidance_scales(config.positions, settings) != 1)
    by_confidence = settings.order == "confidence"
    total = 0
    for i, (hidden, left) in enumerate(zip(before, [*before[1:], 0], strict=True)):
        drawn = hidden if by_confidence else hidden - left
        total += int(copies[i]) * backbone_flops(config, hidden)
        total += drawn * head_flops(config, int(branches[i]))
    return total


def encode_flops(config: AutoencoderConfig) -> int:
    """The autoencoder on one image of the nominal size, to the moments of its latents."""
    side, width = config.image_size, config.channels
    total = _conv(side, 3, config.image_channels, width)
    for level, multiplier in enumerate(config.multipliers):
        if level:
            side //= 2
            total += _conv(side, 3, width, width)
        for _ in range(config.blocks):
            total += _residual(side, width, config.channels * multiplier)
            width = config.channels * multiplier
            total += _attention(side, width) * config.has_attention(level)
    moments = config.moments
    total += _middle(side, width)
    codes = 2 * side**2 * config.codes * config.latent_channels
    total += codes * bool(config.codebook and config.codebook.has_codes)
    return total + _conv(side, 3, width, moments) + _conv(side, 1, moments, moments)


def decode_flops(config: AutoencoderConfig) -> int:
    """The autoencoder from the latents of one image to its pixels."""
    side, width = config.grid, config.channels * config.multipliers[-1]
    latents = config.latent_channels
    total = _conv(side, 1, latents, latents) + _conv(side, 3, latents, width)
    total += _middle(side, width)
    for level, multiplier in reversed(list(enumerate(config.multipliers))):
        for _ in range(config.blocks + 1):
            total += _residual(side, width, config.channels * multiplier)
            width = config.channels * multiplier
        if level:
            side *= 2
            total += _conv(side, 3, width, width)
    return total + _conv(side, 3, width, config.image_channels)


def _conv(side: int, kernel: int, inputs: int, outputs: int) -> int:
    """`side` is the output's side in pixels."""
    return 2 * side**2 * kernel**2 * inputs * outputs


def _residual(side: int, inputs: int, outputs: int) -> int:
    shortcut = _conv(side, 1, inputs, outputs) if inputs != outputs else 0
    return _conv(side, 3, inputs, outputs) + _conv(side, 3, outputs, outputs) + shortcut


def _attention(side: int, width: int) -> int:
    return 4 * _conv(side, 1, width, width) + 4 * side**4 * width


def _middle(side: int, width: int) -> int:
    return 2 * _residual(side, width, width) + _attention(side, width)
