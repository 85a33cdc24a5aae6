"""Name table of the KL autoencoder: LDM/MAR state dicts (`kl16.ckpt`) <-> our parameters.

The `diffusers` library uses other names for the same network (`AutoencoderKL`). Its state dicts can
be read but not written.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from tokenbridge_jax.autoencoder import AutoencoderConfig, abstract_params
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.torch_bridge.parts import Network
from tokenbridge_jax.torch_bridge.table import Entry, from_torch, linear, norm, size

State = Mapping[str, np.ndarray]

# Names that identify the autoencoder in a file, in either layout. LDM also saves the loss (with a
# discriminator and LPIPS) and averaged parameters, whose names have no dots.
NETWORK = Network(
    (
        "encoder.conv_in.weight",
        "encoder.conv_out.weight",
        "decoder.conv_in.weight",
        "decoder.conv_out.weight",
    ),
    extras=("loss", "model_ema"),
)

# Names of LDM -> names of diffusers, which counts the decoder's levels from the coarsest.
_DIFFUSERS = (
    (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.down\.(\d+)\.attn\.", r".down_blocks.\1.attentions."),
    (r"\.(down|up)\.(\d+)\.(down|up)sample\.", r".\1_blocks.\2.\3samplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
)
_ENCODER_BLOCK = re.compile(
    r"encoder\.down(?:_blocks)?\.(\d+)\.(block|attn|resnets|attentions)\.(\d+)\."
)
# Names of the attention's projections in current diffusers, and in its first versions.
_NEW = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OLD = {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}


def table(config: AutoencoderConfig) -> list[Entry]:
    """Returns an entry for every tensor of the state dict, in the published order."""
    return [*_encoder(config), *_decoder(config), *_conv("quant_conv"), *_conv("post_quant_conv")]


def is_diffusers(state: Mapping[str, Any]) -> bool:
    """Whether a state dict uses the names of diffusers."""
    return any(".down_blocks." in name or ".up_blocks." in name for name in state)


def diffusers_table(config: AutoencoderConfig, old: bool = False) -> list[Entry]:
    """Like `table`, with the names of diffusers; `old` selects those of its first versions."""
    levels, projections = len(config.multipliers), _OLD if old else _NEW

    def rename(name: str) -> str:
        name = re.sub(r"\.up\.(\d+)", lambda match: f".up.{levels - 1 - int(match[1])}", name)
        for pattern, replacement in _DIFFUSERS:
            name = re.sub(pattern, replacement, name)
        return re.sub(
            r"(attentions\.\d+)\.(q|k|v|proj_out)\.",
            lambda match: f"{match[1]}.{projections[match[2]]}.",
            name,
        )

    return [dataclasses.replace(e, torch_name=rename(e.torch_name)) for e in table(config)]


def infer_config(
    state: Mapping[str, Any], image_size: int, grid: int | None = None
) -> AutoencoderConfig:
    """Infers an autoencoder's sizes from the shapes of a state dict in either layout.

    Args:
      state: the state dict.
      image_size: side of the training images in pixels, which no tensor shows.
      grid: side of the grid of positions, if known; it replaces `image_size`.

    Returns:
      The config, with scale 1, because no tensor shows the scale.

    Raises:
      UserError: the state dict belongs to another network.
    """
    widths: dict[int, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    blocks, attention = 0, set()
    for name, tensor in state.items():
        if not (place := _ENCODER_BLOCK.match(name)):
            continue
        level = int(place[1])
        if place[2].startswith("att"):
            attention.add(level)
            continue
        blocks = max(blocks, int(place[3]) + 1)
        if name.endswith(("conv1.bias", "norm2.bias", "conv2.bias")):
            widths[level][tensor.shape[0]] += 1
    channels = size(
        state,
        ("encoder.conv_in.bias", 0),
        ("encoder.conv_in.weight", 0),
        ("decoder.conv_out.weight", 1),
    )
    image_channels = size(state, ("encoder.conv_in.weight", 1), ("decoder.conv_out.bias", 0))
    latents = size(state, ("decoder.conv_in.weight", 1), ("post_quant_conv.bias", 0))
    if not (widths and channels and image_channels and latents):
        few = ", ".join(list(state)[:3]) or "nothing"
        raise UserError(f"these tensors are not those of a KL autoencoder: {few}, ...")
    if grid is not None:
        image_size = grid * 2 ** (len(widths) - 1)
    by_level = [widths[level].most_common(1)[0][0] for level in sorted(widths)]
    return AutoencoderConfig(
        image_size=image_size,
        image_channels=image_channels,
        channels=channels,
        multipliers=tuple(max(1, width // channels) for width in by_level),
        blocks=blocks,
        attention_resolutions=tuple(image_size // 2**level for level in sorted(attention)),
        latent_channels=latents,
        scale=1.0,
    )


def import_autoencoder(
    config: AutoencoderConfig, state: State, shift: float = 0.0
) -> dict[str, Any]:
    """Converts a state dict in either layout to our parameters.

    Args:
      config: from `infer_config`.
      state: the state dict. Some autoencoders (SD3, FLUX) have no 1x1 convolutions between encoder
        and decoder; they get identity convolutions.
      shift: subtracted from a posterior sample before it is scaled. It is added to the biases of
        those convolutions, so that a latent is `sample x scale` here as well.

    Raises:
      UserError: tensors are missing, unexpected or misshapen; the message names all of them.
    """
    state = dict(state)
    if not any(name.startswith(("quant_conv.", "post_quant_conv.")) for name in state):
        for name, width in (("quant_conv", 2), ("post_quant_conv", 1)):
            identity = np.eye(width * config.latent_channels, dtype=np.float32)
            state[f"{name}.weight"] = identity[:, :, None, None]
            state[f"{name}.bias"] = np.zeros(len(identity), np.float32)
    entries = table(config)
    if is_diffusers(state):
        # Attention in diffusers has linear layers, in LDM 1x1 convolutions.
        state = {k: v[:, :, None, None] if v.ndim == 2 else v for k, v in state.items()}
        old = any(".mid_block.attentions.0.query." in name for name in state)
        entries = diffusers_table(config, old)
    params = from_torch(entries, state, nn.unbox(abstract_params(config)))
    if shift:
        params["quant_conv"]["bias"][: config.latent_channels] -= shift
        post = params["post_quant_conv"]
        post["bias"] += shift * post["kernel"].sum(axis=(0, 1, 2))
    return params


def _encoder(config: AutoencoderConfig) -> Iterator[Entry]:
    yield from _conv("encoder.conv_in")
    width = config.channels
    for level, multiplier in enumerate(config.multipliers):
        theirs, ours = f"encoder.down.{level}", f"encoder.level_{level}"
        for i in range(config.blocks):
            wider = width != config.channels * multiplier
            yield from _block(f"{theirs}.block.{i}", f"{ours}_block_{i}", wider)
            width = config.channels * multiplier
        if config.has_attention(level):
            for i in range(config.blocks):
                yield from _attention(f"{theirs}.attn.{i}", f"{ours}_attention_{i}")
        if level < len(config.multipliers) - 1:
            yield from _conv(f"{theirs}.downsample.conv", f"{ours}_downsample")
    yield from _middle("encoder")
    yield from _end("encoder")


def _decoder(config: AutoencoderConfig) -> Iterator[Entry]:
    yield from _conv("decoder.conv_in")
    yield from _middle("decoder")
    # The published order begins with the finest level, although the decoder runs it last.
    for level, multiplier in enumerate(config.multipliers):
        theirs, ours = f"decoder.up.{level}", f"decoder.level_{level}"
        coarser = config.multipliers[min(level + 1, len(config.multipliers) - 1)]
        for i in range(config.blocks + 1):
            narrower = i == 0 and coarser != multiplier
            yield from _block(f"{theirs}.block.{i}", f"{ours}_block_{i}", narrower)
        if level > 0:
            yield from _conv(f"{theirs}.upsample.conv", f"{ours}_upsample")
    yield from _end("decoder")


def _middle(half: str) -> Iterator[Entry]:
    yield from _block(f"{half}.mid.block_1", f"{half}.middle.block_1")
    yield from _attention(f"{half}.mid.attn_1", f"{half}.middle.attention")
    yield from _block(f"{half}.mid.block_2", f"{half}.middle.block_2")


def _end(half: str) -> Iterator[Entry]:
    yield from norm(f"{half}.norm_out", f"{half}.norm_out")
    yield from _conv(f"{half}.conv_out")


def _block(name: str, path: str, shortcut: bool = False) -> Iterator[Entry]:
    for i in (1, 2):
        yield from norm(f"{name}.norm{i}", f"{path}.norm{i}")
        yield from _conv(f"{name}.conv{i}", f"{path}.conv{i}")
    if shortcut:
        yield from _conv(f"{name}.nin_shortcut", f"{path}.shortcut")


def _attention(name: str, path: str) -> Iterator[Entry]:
    yield from norm(f"{name}.norm", f"{path}.norm")
    for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("proj_out", "out")):
        yield from _conv(f"{name}.{theirs}", f"{path}.{ours}")


def _conv(name: str, path: str = "") -> list[Entry]:
    return linear(name, path or name, layout="conv")
