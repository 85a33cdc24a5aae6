"""Name table of the TokenBridge model (the official release's state dict)."""

from tokenbridge_jax.model import TokenBridgeConfig
from tokenbridge_jax.torch_bridge.table import Entry

# State-dict entries that are not parameters: they follow from the configuration.
BUFFERS = ("channel_mask", "reconstruction_values", "boundaries")


def table(config: TokenBridgeConfig) -> list[Entry]:
    """Every parameter of the release and where it lives here."""
    c = config
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
        *_linear("z_proj", (*backbone, "z_proj")),
        *_norm("z_proj_ln", (*backbone, "z_proj_norm")),
        *_norm("encoder_norm", (*backbone, "encoder_norm")),
        *_linear("decoder_embed", (*backbone, "decoder_embed")),
        *_norm("decoder_norm", (*backbone, "decoder_norm")),
        _reshaped("channel_embed", (*head, "channel_embed"), (1, c.channels, c.head_width)),
        _reshaped("timesteps_embeddings", (*head, "timestep_embed"), (1, c.channels, c.head_width)),
        *_linear("condition_proj", (*head, "condition_proj")),
        *_norm("channel_norm", (*head, "norm")),
        *_modulation("channel_final", (*head, "final_modulation"), c.head_width, chunks=2),
    ]
    for i in range(c.channels - 1):
        entries.append(Entry(f"token_embeddings.{i}.weight", (*head, "token_embeddings"), index=i))
    for i in range(c.channels):
        entries += _linear(f"channel_heads.{i}", (*head, "classifier"), index=i)
    for i in range(c.encoder_layers):
        entries += _block(f"encoder_blocks.{i}", (*backbone, "encoder_blocks"), i, c.encoder_width)
    for i in range(c.decoder_layers):
        entries += _block(f"decoder_blocks.{i}", (*backbone, "decoder_blocks"), i, c.decoder_width)
    for i in range(c.head_layers):
        name, path = f"channel_blocks.{i}", (*head, "blocks")
        entries += _block(name, path, i, c.head_width)
        entries += _norm(f"{name}.attn.q_norm", (*path, "attn", "q_norm"), i)
        entries += _norm(f"{name}.attn.k_norm", (*path, "attn", "k_norm"), i)
        entries += _modulation(name, (*path, "modulation"), c.head_width, chunks=6, index=i)
    return entries


def _reshaped(name: str, path: tuple[str, ...], shape: tuple[int, ...]) -> Entry:
    return Entry(name, path, torch_shape=shape)


def _linear(name: str, path: tuple[str, ...], index: int | None = None) -> list[Entry]:
    return [
        Entry(f"{name}.weight", (*path, "kernel"), "linear", index),
        Entry(f"{name}.bias", (*path, "bias"), index=index),
    ]


def _norm(name: str, path: tuple[str, ...], index: int | None = None) -> list[Entry]:
    return [
        Entry(f"{name}.weight", (*path, "scale"), index=index),
        Entry(f"{name}.bias", (*path, "bias"), index=index),
    ]


def _modulation(
    name: str, path: tuple[str, ...], width: int, chunks: int, index: int | None = None
) -> list[Entry]:
    name = f"{name}.adaLN_modulation.1"
    shape = (chunks * width, width)
    return [
        Entry(f"{name}.weight", (*path, "kernel"), "linear", index, torch_shape=shape),
        Entry(f"{name}.bias", (*path, "bias"), index=index, torch_shape=shape[:1]),
    ]


def _block(name: str, path: tuple[str, ...], index: int, width: int) -> list[Entry]:
    qkv, proj = f"{name}.attn.qkv", f"{name}.attn.proj"
    return [
        *_norm(f"{name}.norm1", (*path, "norm1"), index),
        Entry(
            f"{qkv}.weight",
            (*path, "attn", "qkv", "kernel"),
            "linear",
            index,
            torch_shape=(3 * width, width),
        ),
        Entry(f"{qkv}.bias", (*path, "attn", "qkv", "bias"), index=index, torch_shape=(3 * width,)),
        Entry(
            f"{proj}.weight",
            (*path, "attn", "proj", "kernel"),
            "linear",
            index,
            torch_shape=(width, width),
        ),
        Entry(f"{proj}.bias", (*path, "attn", "proj", "bias"), index=index),
        *_norm(f"{name}.norm2", (*path, "norm2"), index),
        *_linear(f"{name}.mlp.fc1", (*path, "mlp", "fc1"), index),
        *_linear(f"{name}.mlp.fc2", (*path, "mlp", "fc2"), index),
    ]
