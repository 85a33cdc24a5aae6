"""Turns images into token shards: WORKDIR/autoencoder + config.data -> WORKDIR/tokens.

--config.tokenize.store=indices, latents or both says what to store; heads of latents need latents.
If it is killed and started again, it continues where it stopped. It names broken images, leaves
them out, and lists them in `dataset.json`.
"""

import sys

import numpy as np
from absl import flags

from tokenbridge_jax.commands import runner
from tokenbridge_jax.data import tokenizing


def define_flags(flag_values: flags.FlagValues) -> None:
    """Adds the flags of this command."""
    flags.DEFINE_bool(
        "strict",
        False,
        "Stop at the first broken image instead of leaving it out.",
        flag_values=flag_values,
    )


def main(args: flags.FlagValues) -> None:
    """Writes the shards and prints a table about them."""
    with runner.locked(args.workdir):
        result = tokenizing.tokenize(
            args.config,
            args.workdir,
            strict=args.strict,
            begin=lambda: runner.remember_config(args),
        )
    if not result.images:
        print("all shards exist already: nothing to do")
    print(format_table(result))


def format_table(result: tokenizing.Result) -> str:
    """A table about the shards, for people."""
    info = result.info
    images = sum(split["images"] for split in info.splits.values())
    stored = sum(shard["bytes"] for split in info.splits.values() for shard in split["shards"])
    counts = ", ".join(f"{name} {split['images']}" for name, split in info.splits.items())
    statistics = info.statistics["train"]
    bits = statistics["bits_by_channel"]
    used = statistics["levels_used_by_channel"]
    levels, size = info.quantizer.levels, info.record.itemsize
    views = [f"{info.views} views of indices"] * info.holds_indices
    views += [f"{info.latent_views} of latents"] * info.holds_latents
    rows = {
        "folder": result.folder,
        "images": f"{images} ({counts})",
        "broken, left out": len(info.skipped),
        "rate": f"{result.images / result.seconds:.1f} img/s" if result.images else "-",
        "bytes an image": f"{size} ({', '.join(views)}), {stored / images:.0f} on disk",
        "clipped": f"{statistics['clipped_share']:.4%}",
        "bits a channel": f"{statistics['bits_per_channel']:.3f} of {np.log2(levels):.3f}",
        "  by channel": " ".join(f"{value:.2f}" for value in bits),
        "levels used": f"{min(used)} to {max(used)} of {levels}",
    }
    return "\n".join(f"{name:18}{value}" for name, value in rows.items())


if __name__ == "__main__":
    sys.exit(runner.main(["tokenize", *sys.argv[1:]]))
