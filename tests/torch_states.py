"""Shared by the tests of the PyTorch bridge: state dicts, an autoencoder, a PyTorch module."""

from pathlib import Path

import numpy as np
import torch

from tokenbridge_jax.autoencoder import AutoencoderConfig
from tokenbridge_jax.torch_bridge.official import BUFFERS

GOLDENS = Path(__file__).parent / "goldens"

# The state dict in the golden file of the model.
with np.load(GOLDENS / "tokenbridge_tiny.npz") as golden:
    STATE = {k.removeprefix("state/"): golden[k] for k in golden if k.startswith("state/")}

# Two levels of different widths, with attention at the coarser one.
TINY = AutoencoderConfig(
    image_size=8,
    channels=8,
    multipliers=(1, 2),
    blocks=1,
    attention_resolutions=(4,),
    latent_channels=4,
    scale=1.0,
)

# Parts of TINY that LDM and diffusers name differently. Diffusers counts the decoder's levels from
# the other end.
DIFFUSERS = {
    "encoder.down.0.block.0": "encoder.down_blocks.0.resnets.0",
    "encoder.down.0.downsample.conv": "encoder.down_blocks.0.downsamplers.0.conv",
    "encoder.down.1.block.0": "encoder.down_blocks.1.resnets.0",
    "encoder.down.1.attn.0": "encoder.down_blocks.1.attentions.0",
    "encoder.mid.block_1": "encoder.mid_block.resnets.0",
    "encoder.mid.attn_1": "encoder.mid_block.attentions.0",
    "encoder.mid.block_2": "encoder.mid_block.resnets.1",
    "encoder.norm_out": "encoder.conv_norm_out",
    "decoder.mid.block_1": "decoder.mid_block.resnets.0",
    "decoder.mid.attn_1": "decoder.mid_block.attentions.0",
    "decoder.mid.block_2": "decoder.mid_block.resnets.1",
    "decoder.up.1.block.0": "decoder.up_blocks.0.resnets.0",
    "decoder.up.1.block.1": "decoder.up_blocks.0.resnets.1",
    "decoder.up.1.upsample.conv": "decoder.up_blocks.0.upsamplers.0.conv",
    "decoder.up.0.block.0": "decoder.up_blocks.1.resnets.0",
    "decoder.up.0.block.1": "decoder.up_blocks.1.resnets.1",
    "decoder.norm_out": "decoder.conv_norm_out",
}
# Names of the layers of attention in current diffusers, and in its first versions.
ATTENTION = {
    "now": {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm"},
    "first": {
        "q": "query",
        "k": "key",
        "v": "value",
        "proj_out": "proj_attn",
        "norm": "group_norm",
    },
}


def in_diffusers(state, names="now", linear=True):
    """LDM's state dict of TINY in the layout of diffusers."""
    renamed = {}
    for name, array in state.items():
        part = next((part for part in DIFFUSERS if name.startswith(f"{part}.")), "")
        theirs = DIFFUSERS.get(part, "") + name.removeprefix(part)
        theirs = theirs.replace("nin_shortcut", "conv_shortcut")
        if ".attentions." in theirs:
            prefix, layer, kind = theirs.rsplit(".", 2)
            theirs = f"{prefix}.{ATTENTION[names][layer]}.{kind}"
            array = array[:, :, 0, 0] if linear and array.ndim == 4 else array
        renamed[theirs] = array
    assert len(renamed) == len(state)
    return renamed


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array, err_msg=name, strict=True)


def module_of(state):
    """A module whose parameters and buffers have these names and shapes, and hold NaN."""
    root = torch.nn.Module()
    for name, array in state.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        empty = torch.full(tuple(array.shape), float("nan"))
        if name in BUFFERS:
            module.register_buffer(last, empty)
        else:
            module.register_parameter(last, torch.nn.Parameter(empty))
    return root
