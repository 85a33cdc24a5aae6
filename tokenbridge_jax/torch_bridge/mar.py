"""Name table of MAR's diffusion head, as in the state dict of its release."""

from collections.abc import Mapping
from typing import Any

from tokenbridge_jax.model_config import TokenBridgeConfig
from tokenbridge_jax.torch_bridge.table import Entry, count, linear, norm, size

# What MAR calls the positions of the backbone's features.
OUTPUT_POSITION = "diffusion_pos_embed_learned"
_NET = "diffloss.net"


def is_of_head(name: str) -> bool:
    """Whether a tensor is the head's."""
    return name.startswith("diffloss.")


def head_table(config: TokenBridgeConfig) -> list[Entry]:
    """Returns an entry for every parameter of the head."""
    entries = [
        *linear(f"{_NET}.time_embed.mlp.0", "head.time_fc1"),
        *linear(f"{_NET}.time_embed.mlp.2", "head.time_fc2"),
        *linear(f"{_NET}.cond_embed", "head.condition_proj"),
        *linear(f"{_NET}.input_proj", "head.input_proj"),
        *linear(f"{_NET}.final_layer.adaLN_modulation.1", "head.final_modulation"),
        *linear(f"{_NET}.final_layer.linear", "head.output"),
    ]
    for i in range(config.head_layers):
        name, path = f"{_NET}.res_blocks.{i}", "head.blocks"
        entries += norm(f"{name}.in_ln", f"{path}.norm", i)
        entries += linear(f"{name}.mlp.0", f"{path}.fc1", i)
        entries += linear(f"{name}.mlp.2", f"{path}.fc2", i)
        entries += linear(f"{name}.adaLN_modulation.1", f"{path}.modulation", i)
    return entries


def head_sizes(state: Mapping[str, Any]) -> dict[str, int | None]:
    """Infers the head's sizes from the shapes of a state dict; see `official.infer_sizes`."""
    return {
        "channels": size(state, ("z_proj.weight", 1), (f"{_NET}.input_proj.weight", 1)),
        "head_width": size(state, (f"{_NET}.input_proj.bias", 0), (f"{_NET}.cond_embed.bias", 0)),
        "head_layers": count(state, f"{_NET}.res_blocks"),
    }
