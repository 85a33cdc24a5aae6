"""Models as state dicts of the official releases: names, buffers, import and export.

TokenBridge's release has the head `channel_ar`, MAR's has `diffusion`. The backbone is the same.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from tokenbridge_jax.model import abstract_params
from tokenbridge_jax.model_config import TokenBridgeConfig
from tokenbridge_jax.quantizer import Quantizer
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.torch_bridge import mar
from tokenbridge_jax.torch_bridge.parts import Network
from tokenbridge_jax.torch_bridge.table import (
    Entry,
    count,
    from_torch,
    linear,
    norm,
    problems,
    size,
    to_torch,
)

# Entries of the state dict that are not parameters. The configuration determines them.
BUFFERS = ("channel_mask", "reconstruction_values", "boundaries")

# Names that identify the model in a file.
NETWORK = Network(
    (
        "class_emb.weight",
        "z_proj.weight",
        "z_proj_ln.weight",
        "encoder_pos_embed_learned",
        "decoder_pos_embed_learned",
        "output_pos_embed",
        mar.OUTPUT_POSITION,
        "channel_embed",
        "timesteps_embeddings",
    )
)

State = Mapping[str, np.ndarray]


class Release(NamedTuple):
    """What differs between the official releases.

    Attributes:
      output_position: the name of the positions of the backbone's features.
      head_table: an entry for every parameter of the head.
      head_sizes: fields of `TokenBridgeConfig` from a state dict; None where no shape tells.
      buffers: the entries that are not parameters.
    """

    output_position: str
    head_table: Callable[[TokenBridgeConfig], list[Entry]]
    head_sizes: Callable[[Mapping[str, Any]], dict[str, int | None]]
    buffers: Callable[[TokenBridgeConfig], dict[str, np.ndarray]]


def table(config: TokenBridgeConfig) -> list[Entry]:
    """Returns an entry for every parameter of the release.

    Raises:
      UserError: no release has the head of this config.
    """
    release = _release(config)
    return [*_backbone_table(config, release.output_position), *release.head_table(config)]


def buffers(config: TokenBridgeConfig) -> dict[str, np.ndarray]:
    """Returns the entries that are not parameters: causal mask, level values and bin edges."""
    return _release(config).buffers(config)


def _release(config: TokenBridgeConfig) -> Release:
    if not config.is_published:
        raise UserError(
            "PyTorch files hold model.head='channel_ar' with one channel per group, or "
            f"'diffusion'; this model has head='{config.head}' with {config.channels_per_group} "
            "channels per group"
        )
    return RELEASES[config.head]


def _backbone_table(config: TokenBridgeConfig, output_position: str) -> list[Entry]:
    entries = [
        Entry("class_emb.weight", "backbone.class_embedding"),
        Entry("fake_latent", "backbone.null_latent"),
        Entry("encoder_pos_embed_learned", "backbone.encoder_position", "batched"),
        Entry("mask_token", "backbone.mask_token", "batched"),
        Entry("decoder_pos_embed_learned", "backbone.decoder_position", "batched"),
        Entry(output_position, "backbone.output_position", "batched"),
        *linear("z_proj", "backbone.z_proj"),
        *norm("z_proj_ln", "backbone.z_proj_norm"),
        *norm("encoder_norm", "backbone.encoder_norm"),
        *linear("decoder_embed", "backbone.decoder_embed"),
        *norm("decoder_norm", "backbone.decoder_norm"),
    ]
    for part, layers in (
        ("encoder_blocks", config.encoder_layers),
        ("decoder_blocks", config.decoder_layers),
    ):
        for i in range(layers):
            entries += _block(f"{part}.{i}", f"backbone.{part}", i)
    return entries


def _channel_table(config: TokenBridgeConfig) -> list[Entry]:
    entries = [
        Entry("channel_embed", "head.channel_embed", "batched"),
        Entry("timesteps_embeddings", "head.timestep_embed", "batched"),
        *linear("condition_proj", "head.condition_proj"),
        *norm("channel_norm", "head.norm"),
        *linear("channel_final.adaLN_modulation.1", "head.final_modulation"),
    ]
    for i in range(config.channels - 1):
        entries.append(Entry(f"token_embeddings.{i}.weight", "head.token_embeddings", index=i))
    for i in range(config.channels):
        entries += linear(f"channel_heads.{i}", "head.classifier", i)
    for i in range(config.head_layers):
        name, path = f"channel_blocks.{i}", "head.blocks"
        entries += _block(name, path, i)
        entries += norm(f"{name}.attn.q_norm", f"{path}.attn.q_norm", i)
        entries += norm(f"{name}.attn.k_norm", f"{path}.attn.k_norm", i)
        entries += linear(f"{name}.adaLN_modulation.1", f"{path}.modulation", i)
    return entries


def _channel_buffers(config: TokenBridgeConfig) -> dict[str, np.ndarray]:
    quantizer = config.quantizer
    assert isinstance(quantizer, Quantizer)
    future = np.triu(np.ones((config.channels, config.channels), bool), 1)
    return {
        "channel_mask": np.where(future, np.float32(-np.inf), np.float32(0)),
        "reconstruction_values": np.asarray(quantizer.level_values, np.float32),
        "boundaries": quantizer.boundaries(),
    }


def level_values(state: State, exact: np.ndarray) -> np.ndarray:
    """Returns the level values of an imported model, on the +-3 scale.

    These are the values of the buffer `reconstruction_values`, bit for bit. There is one exception:
    if they are `exact` rounded to float16 or bfloat16, the result is `exact`. The model was then
    saved or converted with fewer bits than it was trained with.

    Args:
      state: the state dict. Without that buffer, or with one of another length, the result is
        `exact`.
      exact: float32 `[V]`, the level values of the paper.

    Returns:
      Float32 `[V]`.
    """
    values = state.get("reconstruction_values", exact)
    if values.shape != exact.shape or (_rounding(values) and _agree(values, exact)):
        return exact
    return values


def infer_sizes(state: Mapping[str, Any]) -> dict[str, Any]:
    """Infers a model's sizes from the shapes of a state dict.

    Returns:
      Fields of `TokenBridgeConfig` by name, "channels" and "levels". Fields that no shape
      determines are left out, such as the number of heads of the backbone. Empty if the state dict
      is of no model.
    """
    head = "diffusion" if any(mar.is_of_head(name) for name in state) else "channel_ar"
    release = RELEASES[head]
    positions = size(state, (release.output_position, 1))
    length = size(state, ("encoder_pos_embed_learned", 1), ("decoder_pos_embed_learned", 1))
    found = {
        "positions": positions,
        "buffer": length - positions if length and positions else None,
        "classes": size(state, ("class_emb.weight", 0)),
        "encoder_width": size(
            state, ("encoder_norm.bias", 0), ("z_proj.bias", 0), ("class_emb.weight", 1)
        ),
        "encoder_layers": count(state, "encoder_blocks"),
        "decoder_width": size(
            state, ("decoder_norm.bias", 0), ("decoder_embed.bias", 0), ("mask_token", 2)
        ),
        "decoder_layers": count(state, "decoder_blocks"),
    }
    sizes = {name: value for name, value in (found | release.head_sizes(state)).items() if value}
    return sizes | {"head": head} if sizes else {}


def _channel_sizes(state: Mapping[str, Any]) -> dict[str, int | None]:
    width = size(state, ("channel_embed", 2), ("channel_norm.bias", 0), ("condition_proj.bias", 0))
    of_head = size(
        state,
        ("channel_blocks.0.attn.q_norm.weight", 0),
        ("channel_blocks.0.attn.k_norm.weight", 0),
        ("channel_blocks.0.attn.q_norm.bias", 0),
    )
    return {
        "channels": size(
            state, ("channel_embed", 1), ("z_proj.weight", 1), ("timesteps_embeddings", 1)
        ),
        "levels": size(
            state,
            ("token_embeddings.0.weight", 0),
            ("channel_heads.0.bias", 0),
            ("channel_heads.1.bias", 0),
        ),
        "head_width": width,
        "head_layers": count(state, "channel_blocks"),
        "head_heads": width // of_head if width and of_head else None,
    }


def import_model(
    config: TokenBridgeConfig, parts: Mapping[str, State]
) -> dict[str, dict[str, Any]]:
    """Converts state dicts of the official release to our parameters, under the same keys.

    Args:
      config: the model's config; its quantizer has the level values of the release.
      parts: state dicts by name ("model", "model_ema"), with all buffers or none. Buffers in half
        precision may differ from ours by rounding.

    Raises:
      UserError: tensors are missing, unexpected or misshapen, or buffers have other values than
        this model's. The message names all of them, in all parts.
    """
    entries, target, own = table(config), abstract_params(config), buffers(config)
    found = []
    for part, state in parts.items():
        expected = own if any(name in state for name in own) else {}
        held = [Entry(name, name) for name in expected]
        wrong = problems([*entries, *held], state, target | expected)
        wrong += [
            f"{name} holds other values than this model's quantizer or mask"
            for name, ours in expected.items()
            if name in state and state[name].shape == ours.shape and not _agree(state[name], ours)
        ]
        found += [f"{part}: {line}" if len(parts) > 1 else line for line in wrong]
    if found:
        raise UserError("; ".join(found))
    return {
        part: from_torch(entries, {k: v for k, v in state.items() if k not in BUFFERS}, target)
        for part, state in parts.items()
    }


def export_model(config: TokenBridgeConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Converts our parameters to a state dict of the official release, with its buffers."""
    return to_torch(table(config), params) | buffers(config)


def _rounding(array: np.ndarray) -> float:
    """Returns the relative rounding error of the numbers, or 0 if they need float32.

    This depends on the values, not on the dtype: they may have been converted back to float32.
    """
    for dtype in (
        jnp.bfloat16,
        jnp.float16,
    ):  # The coarser first: float16 holds most of its values.
        with np.errstate(over="ignore"):
            is_rounded = np.array_equal(array, array.astype(dtype).astype(np.float32))
        if is_rounded:
            return float(jnp.finfo(dtype).eps)
    return 0.0


def _agree(theirs: np.ndarray, ours: np.ndarray) -> bool:
    return np.allclose(theirs, ours, rtol=_rounding(theirs), atol=1e-4)


def _block(name: str, path: str, index: int) -> list[Entry]:
    return [
        *norm(f"{name}.norm1", f"{path}.norm1", index),
        *linear(f"{name}.attn.qkv", f"{path}.attn.qkv", index),
        *linear(f"{name}.attn.proj", f"{path}.attn.proj", index, "projection"),
        *norm(f"{name}.norm2", f"{path}.norm2", index),
        *linear(f"{name}.mlp.fc1", f"{path}.mlp.fc1", index),
        *linear(f"{name}.mlp.fc2", f"{path}.mlp.fc2", index),
    ]


RELEASES = {
    "channel_ar": Release("output_pos_embed", _channel_table, _channel_sizes, _channel_buffers),
    "diffusion": Release(mar.OUTPUT_POSITION, mar.head_table, mar.head_sizes, lambda config: {}),
}
