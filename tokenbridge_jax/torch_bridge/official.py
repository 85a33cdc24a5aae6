"""Name table of the TokenBridge model (the official release's state dict), and its buffers."""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from tokenbridge_jax.model import TokenBridgeConfig, abstract_params
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.torch_bridge.parts import Network
from tokenbridge_jax.torch_bridge.table import (
    Entry,
    from_torch,
    linear,
    norm,
    problems,
    size,
    to_torch,
)

# State-dict entries that are not parameters: they follow from the configuration.
BUFFERS = ("channel_mask", "reconstruction_values", "boundaries")

# By what it is known among a file's tensors.
NETWORK = Network(
    (
        "class_emb.weight",
        "z_proj.weight",
        "z_proj_ln.weight",
        "encoder_pos_embed_learned",
        "decoder_pos_embed_learned",
        "output_pos_embed",
        "channel_embed",
        "timesteps_embeddings",
    )
)

State = Mapping[str, np.ndarray]


def table(config: TokenBridgeConfig) -> list[Entry]:
    """Every parameter of the release and where it lives here.

    Raises:
      UserError: the release has no such head.
    """
    c = config
    if not c.is_published:
        raise UserError(
            "PyTorch files hold model.head='channel_ar' with one channel a group; the head of this "
            f"model is '{c.head}' with {c.channels_per_group}"
        )
    length = c.buffer + c.positions
    backbone, head = ("backbone",), ("head",)
    entries = [
        Entry("class_emb.weight", (*backbone, "class_embedding")),
        _reshaped("fake_latent", (*backbone, "null_latent"), (1, c.encoder_width)),
        _reshaped(
            "encoder_pos_embed_learned",
            (*backbone, "encoder_position"),
            (1, length, c.encoder_width),
        ),
        _reshaped("mask_token", (*backbone, "mask_token"), (1, 1, c.decoder_width)),
        _reshaped(
            "decoder_pos_embed_learned",
            (*backbone, "decoder_position"),
            (1, length, c.decoder_width),
        ),
        _reshaped(
            "output_pos_embed", (*backbone, "output_position"), (1, c.positions, c.decoder_width)
        ),
        *linear("z_proj", (*backbone, "z_proj")),
        *norm("z_proj_ln", (*backbone, "z_proj_norm")),
        *norm("encoder_norm", (*backbone, "encoder_norm")),
        *linear("decoder_embed", (*backbone, "decoder_embed")),
        *norm("decoder_norm", (*backbone, "decoder_norm")),
        _reshaped("channel_embed", (*head, "channel_embed"), (1, c.channels, c.head_width)),
        _reshaped("timesteps_embeddings", (*head, "timestep_embed"), (1, c.channels, c.head_width)),
        *linear("condition_proj", (*head, "condition_proj")),
        *norm("channel_norm", (*head, "norm")),
        *_modulation("channel_final", (*head, "final_modulation"), c.head_width, chunks=2),
    ]
    for i in range(c.channels - 1):
        entries.append(Entry(f"token_embeddings.{i}.weight", (*head, "token_embeddings"), index=i))
    for i in range(c.channels):
        entries += linear(f"channel_heads.{i}", (*head, "classifier"), index=i)
    for i in range(c.encoder_layers):
        entries += _block(f"encoder_blocks.{i}", (*backbone, "encoder_blocks"), i, c.encoder_width)
    for i in range(c.decoder_layers):
        entries += _block(f"decoder_blocks.{i}", (*backbone, "decoder_blocks"), i, c.decoder_width)
    for i in range(c.head_layers):
        name, path = f"channel_blocks.{i}", (*head, "blocks")
        entries += _block(name, path, i, c.head_width)
        entries += norm(f"{name}.attn.q_norm", (*path, "attn", "q_norm"), i)
        entries += norm(f"{name}.attn.k_norm", (*path, "attn", "k_norm"), i)
        entries += _modulation(name, (*path, "modulation"), c.head_width, chunks=6, index=i)
    return entries


def buffers(config: TokenBridgeConfig) -> dict[str, np.ndarray]:
    """The state dict's entries that are not parameters: causal mask, level values, bin edges."""
    future = np.triu(np.ones((config.channels, config.channels), bool), 1)
    return {
        "channel_mask": np.where(future, np.float32(-np.inf), np.float32(0)),
        "reconstruction_values": np.asarray(config.quantizer.level_values, np.float32),
        "boundaries": config.quantizer.boundaries(),
    }


def level_values(state: State, exact: np.ndarray) -> np.ndarray:
    """The level values of an imported model, on the +-3 scale.

    Those of its buffer, `reconstruction_values`, bit for bit. Only where that buffer is in float16
    or bfloat16 and is `exact` rounded to it, they are `exact`: the weights were then saved, or
    converted, with fewer bits than they were trained with.

    Args:
      state: the state dict; without that buffer, or with one of another length, they are `exact`.
      exact: float32 `[V]`, those of the paper.

    Returns:
      Float32 `[V]`.
    """
    values = state.get("reconstruction_values", exact)
    if values.shape != exact.shape:
        return exact
    rounding = _rounding(values)
    return exact if rounding and _agree(values, exact, rounding) else values


def infer_sizes(state: Mapping[str, Any]) -> dict[str, int]:
    """Reads a model's sizes off the shapes of a state dict.

    Returns:
      Fields of `TokenBridgeConfig` by name, and "channels" and "levels"; without those that no
      tensor shows, such as the heads of the backbone.
    """
    positions = size(state, ("output_pos_embed", 1))
    length = size(state, ("encoder_pos_embed_learned", 1), ("decoder_pos_embed_learned", 1))
    head_width = size(
        state, ("channel_embed", 2), ("channel_norm.bias", 0), ("condition_proj.bias", 0)
    )
    head_size = size(
        state,
        ("channel_blocks.0.attn.q_norm.weight", 0),
        ("channel_blocks.0.attn.k_norm.weight", 0),
        ("channel_blocks.0.attn.q_norm.bias", 0),
    )
    sizes = {
        "positions": positions,
        "buffer": length - positions if length and positions else None,
        "classes": size(state, ("class_emb.weight", 0)),
        "channels": size(
            state, ("channel_embed", 1), ("z_proj.weight", 1), ("timesteps_embeddings", 1)
        ),
        "levels": size(
            state,
            ("token_embeddings.0.weight", 0),
            ("channel_heads.0.bias", 0),
            ("channel_heads.1.bias", 0),
        ),
        "encoder_width": size(
            state, ("encoder_norm.bias", 0), ("z_proj.bias", 0), ("class_emb.weight", 1)
        ),
        "encoder_layers": _layers(state, "encoder_blocks"),
        "decoder_width": size(
            state, ("decoder_norm.bias", 0), ("decoder_embed.bias", 0), ("mask_token", 2)
        ),
        "decoder_layers": _layers(state, "decoder_blocks"),
        "head_width": head_width,
        "head_layers": _layers(state, "channel_blocks"),
        "head_heads": head_width // head_size if head_width and head_size else None,
    }
    return {name: value for name, value in sizes.items() if value}


def _layers(state: Mapping[str, Any], prefix: str) -> int | None:
    found = [re.match(rf"{prefix}\.(\d+)\.", name) for name in state]
    return max((int(match[1]) + 1 for match in found if match), default=None)


def import_model(
    config: TokenBridgeConfig, parts: Mapping[str, State]
) -> dict[str, dict[str, Any]]:
    """State dicts of the official release -> parameters here, of the same names.

    Args:
      config: of the model, its quantizer with the level values of the release.
      parts: state dicts by name ("model", "model_ema"), with all buffers or none. Buffers in half
        precision may differ by what that rounds.

    Raises:
      UserError: naming every tensor, of all parts, that is missing, unexpected or misshapen, and
        buffers whose values are not those of this model.
    """
    entries, target, own = table(config), abstract_params(config), buffers(config)
    found = []
    for part, state in parts.items():
        parameters = {name: state[name] for name in state if name not in BUFFERS}
        wrong = problems(entries, parameters, target)
        given = {name: state[name] for name in own if name in state}
        wrong += [f"missing {name}" for name in own if given and name not in given]
        for name, theirs in given.items():
            ours = own[name]
            if theirs.shape != ours.shape:
                wrong.append(f"{name} has shape {list(theirs.shape)}, expected {list(ours.shape)}")
            elif not _agree(theirs, ours, _rounding(theirs)):
                wrong.append(f"{name} holds other values than this model's quantizer or mask")
        found += [f"{part}: {line}" if len(parts) > 1 else line for line in wrong]
    if found:
        raise UserError("; ".join(found))
    return {
        part: from_torch(entries, {k: v for k, v in state.items() if k not in BUFFERS}, target)
        for part, state in parts.items()
    }


def export_model(config: TokenBridgeConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Parameters here -> a state dict of the official release, its buffers included."""
    return to_torch(table(config), params) | buffers(config)


def _rounding(array: np.ndarray) -> float:
    """By which share of themselves numbers may be rounded: 0 where they need all of float32.

    The numbers tell, not their dtype, which a conversion back to float32 hides.
    """
    for dtype in (jnp.bfloat16, jnp.float16):  # The coarser first: most of its numbers are in both.
        with np.errstate(over="ignore"):
            is_rounded = np.array_equal(array, array.astype(dtype).astype(np.float32))
        if is_rounded:
            return float(jnp.finfo(dtype).eps)
    return 0.0


def _agree(theirs: np.ndarray, ours: np.ndarray, rounding: float) -> bool:
    return np.allclose(theirs, ours, rtol=rounding, atol=1e-4)


def _reshaped(name: str, path: tuple[str, ...], shape: tuple[int, ...]) -> Entry:
    return Entry(name, path, torch_shape=shape)


def _modulation(
    name: str, path: tuple[str, ...], width: int, chunks: int, index: int | None = None
) -> list[Entry]:
    return linear(f"{name}.adaLN_modulation.1", path, index, (chunks * width, width))


def _block(name: str, path: tuple[str, ...], index: int, width: int) -> list[Entry]:
    attention = (*path, "attn")
    return [
        *norm(f"{name}.norm1", (*path, "norm1"), index),
        *linear(f"{name}.attn.qkv", (*attention, "qkv"), index, (3 * width, width)),
        *linear(f"{name}.attn.proj", (*attention, "proj"), index, (width, width)),
        *norm(f"{name}.norm2", (*path, "norm2"), index),
        *linear(f"{name}.mlp.fc1", (*path, "mlp", "fc1"), index),
        *linear(f"{name}.mlp.fc2", (*path, "mlp", "fc2"), index),
    ]
