"""Token shards of random indices, for tests of what reads them."""

from pathlib import Path

import numpy as np

from tokenbridge_jax.autoencoder import AutoencoderConfig
from tokenbridge_jax.data import shards
from tokenbridge_jax.data.shards import DatasetInfo
from tokenbridge_jax.quantizer import ChannelStatistics, Quantizer


def make_info(*, levels: int = 16, flips: bool = False, samples: int = 1, **changes) -> DatasetInfo:
    """A description of shards of 4x4 positions with 3 channels."""
    autoencoder = AutoencoderConfig(
        image_size=16, image_channels=1, channels=32, multipliers=(1, 1, 1),
        attention_resolutions=(), latent_channels=3,
    )  # fmt: skip
    settings = {
        "quantizer": Quantizer.gaussian(levels),
        "autoencoder": autoencoder,
        "autoencoder_hash": "0" * 64,
        "channel_order": (2, 0, 1),
        "channel_order_rule": "given",
        "image_size": 16,
        "posterior_samples": samples,
        "flips": flips,
        "seed": 0,
        "dtype": "float32",
        "class_names": ("cat", "dog", "owl"),
        "records_per_shard": 10,
        "sources": {},
    }
    return DatasetInfo(**(settings | changes))


def random_records(info: DatasetInfo, images: range) -> np.ndarray:
    """One record an image; what it holds depends on its number alone."""
    records = np.empty(len(images), info.record)
    for record, image in zip(records, images, strict=True):
        rng = np.random.default_rng(image)
        record["image"] = image
        record["label"] = image % 3
        record["indices"] = rng.integers(0, info.quantizer.levels, record["indices"].shape)
    return records


def write_tokens(folder: Path, counts: dict[str, list[int]], **settings) -> DatasetInfo:
    """Writes shards of so many records a split, and their `dataset.json`."""
    info = make_info(**settings)
    splits = {}
    for split, sizes in counts.items():
        listed, start = [], 0
        for number, size in enumerate(sizes):
            path = folder / shards.shard_name(split, number, len(sizes))
            with shards.ShardWriter(path) as writer:
                writer.write(random_records(info, range(start, start + size)))
                statistics = ChannelStatistics(info.channels, info.quantizer.levels)
                summary = writer.commit([], statistics)
            listed.append({"file": path.name, "records": size, "bytes": summary.size})
            start += size
        splits[split] = {"images": start, "shards": listed}
    info = make_info(**settings, splits=splits)
    shards.write_info(folder, info)
    return info
