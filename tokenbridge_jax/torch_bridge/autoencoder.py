"""Name table of the KL autoencoder: LDM/MAR state dicts (`kl16.ckpt`) <-> our parameters."""

from collections.abc import Iterator

from tokenbridge_jax.autoencoder import AutoencoderConfig
from tokenbridge_jax.torch_bridge.table import Entry

Path = tuple[str, ...]


def table(config: AutoencoderConfig) -> list[Entry]:
    """Every tensor of the state dict, in the published order, and where it lives here."""
    return [*_encoder(config), *_decoder(config), *_conv("quant_conv"), *_conv("post_quant_conv")]


def _encoder(config: AutoencoderConfig) -> Iterator[Entry]:
    yield from _conv("encoder.conv_in")
    width = config.channels
    for level, multiplier in enumerate(config.multipliers):
        theirs, ours = f"encoder.down.{level}", f"level_{level}"
        for i in range(config.blocks):
            wider = width != config.channels * multiplier
            yield from _block(f"{theirs}.block.{i}", ("encoder", f"{ours}_block_{i}"), wider)
            width = config.channels * multiplier
        if config.has_attention(level):
            for i in range(config.blocks):
                yield from _attention(f"{theirs}.attn.{i}", ("encoder", f"{ours}_attention_{i}"))
        if level < len(config.multipliers) - 1:
            yield from _conv(f"{theirs}.downsample.conv", ("encoder", f"{ours}_downsample"))
    yield from _middle("encoder")
    yield from _end("encoder")


def _decoder(config: AutoencoderConfig) -> Iterator[Entry]:
    yield from _conv("decoder.conv_in")
    yield from _middle("decoder")
    # Published order: finest level first, although the decoder runs from the coarsest.
    for level, multiplier in enumerate(config.multipliers):
        theirs, ours = f"decoder.up.{level}", f"level_{level}"
        coarser = config.multipliers[min(level + 1, len(config.multipliers) - 1)]
        for i in range(config.blocks + 1):
            narrower = i == 0 and coarser != multiplier
            yield from _block(f"{theirs}.block.{i}", ("decoder", f"{ours}_block_{i}"), narrower)
        if level > 0:
            yield from _conv(f"{theirs}.upsample.conv", ("decoder", f"{ours}_upsample"))
    yield from _end("decoder")


def _middle(half: str) -> Iterator[Entry]:
    yield from _block(f"{half}.mid.block_1", (half, "middle", "block_1"))
    yield from _attention(f"{half}.mid.attn_1", (half, "middle", "attention"))
    yield from _block(f"{half}.mid.block_2", (half, "middle", "block_2"))


def _end(half: str) -> Iterator[Entry]:
    yield from _norm(f"{half}.norm_out", (half, "norm_out"))
    yield from _conv(f"{half}.conv_out")


def _block(name: str, path: Path, shortcut: bool = False) -> Iterator[Entry]:
    for i in (1, 2):
        yield from _norm(f"{name}.norm{i}", (*path, f"norm{i}"))
        yield from _conv(f"{name}.conv{i}", (*path, f"conv{i}"))
    if shortcut:
        yield from _conv(f"{name}.nin_shortcut", (*path, "shortcut"))


def _attention(name: str, path: Path) -> Iterator[Entry]:
    yield from _norm(f"{name}.norm", (*path, "norm"))
    for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("proj_out", "out")):
        yield from _conv(f"{name}.{theirs}", (*path, ours))


def _conv(name: str, path: Path | None = None) -> Iterator[Entry]:
    path = path or tuple(name.split("."))
    yield Entry(f"{name}.weight", (*path, "kernel"), "conv")
    yield Entry(f"{name}.bias", (*path, "bias"))


def _norm(name: str, path: Path) -> Iterator[Entry]:
    yield Entry(f"{name}.weight", (*path, "scale"))
    yield Entry(f"{name}.bias", (*path, "bias"))
