"""The training loader, from shards on disk."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from tokenbridge_jax.benchmark import inputs
from tokenbridge_jax.benchmark.measure import Call, Case
from tokenbridge_jax.channels import ChannelStatistics
from tokenbridge_jax.config import of_latents
from tokenbridge_jax.data import shards
from tokenbridge_jax.data.loader import make_loader
from tokenbridge_jax.data.shard_writer import ShardWriter
from tokenbridge_jax.data.shards import DatasetInfo
from tokenbridge_jax.runtime.errors import UserError

# The loader reads several batches at once, so a call takes several too.
BATCHES_PER_CALL = 8


def cases(
    config: ConfigDict, batches: Sequence[int], records: int, folder: Path | None = None
) -> list[Case]:
    """Cases that load batches of the split `train`.

    Args:
      config: the experiment, which determines the size of a record.
      batches: batch sizes of this process.
      records: images in temporary shards of random values, which are written before the timing.
      folder: shards to read instead.

    Raises:
      UserError: the folder has no shards, or there are fewer records than in a batch.
    """
    info = inputs.make_info(config) if folder is None else shards.read_info(folder)
    latents = of_latents(config)
    held = records if folder is None else info.splits["train"]["images"]
    if held < max(batches):
        raise UserError(f"--batch={max(batches)} is more than the {held} images of the shards")

    def case(batch: int) -> Case:
        def prepare(stack: contextlib.ExitStack) -> Call:
            tokens = folder
            if tokens is None:
                tokens = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                write_random_tokens(tokens, info, records)
            loader = make_loader(tokens, batch, config.seed, latents=latents)

            def call() -> None:
                for _ in range(BATCHES_PER_CALL):
                    next(loader)

            return call

        return Case(
            name=f"loader_batch{batch}",
            settings={
                "batch": batch,
                "batches_per_call": BATCHES_PER_CALL,
                "folder": None if folder is None else str(folder),
                "records": held,
                "values": "latents" if latents else "indices",
                "views": info.latent_views if latents else info.views,
                "positions": info.positions,
                "channels": info.channels,
            },
            prepare=prepare,
            work={"images": BATCHES_PER_CALL * batch},
        )

    return [case(batch) for batch in batches]


def write_random_tokens(folder: Path, info: DatasetInfo, records: int) -> None:
    """Writes shards of random indices, or latents, as `tokenize` does."""
    rng = np.random.default_rng(0)
    starts = range(0, records, info.records_per_shard)
    listed = []
    for number, start in enumerate(starts):
        shard = np.empty(min(info.records_per_shard, records - start), info.record)
        shard["image"] = np.arange(start, start + len(shard))
        shard["label"] = rng.integers(len(info.class_names), size=len(shard))
        if info.holds_indices:
            shard["indices"] = rng.integers(info.quantizer.levels, size=shard["indices"].shape)
        if info.holds_latents:
            shard["mean"] = rng.standard_normal(shard["mean"].shape, np.float32)
            shard["deviation"] = 0.1
        path = folder / shards.shard_name("train", number, len(starts))
        with ShardWriter(path) as writer:
            writer.write(shard)
            summary = writer.commit([], ChannelStatistics(info.channels, info.quantizer.levels))
        listed.append({"file": path.name, "records": len(shard), "bytes": summary.size})
    split = {"train": {"images": records, "shards": listed}}
    shards.write_info(folder, dataclasses.replace(info, splits=split))
