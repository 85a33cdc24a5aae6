"""Shared by tests of token shards: shards of random indices, and inputs for real ones."""

import contextlib
import os
import re
import signal
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from ml_collections import ConfigDict
from PIL import Image

from tokenbridge_jax.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    init_params,
    load_autoencoder,
    save_autoencoder,
)
from tokenbridge_jax.channels import ChannelStatistics
from tokenbridge_jax.data import shard_writer, shards
from tokenbridge_jax.data.shard_writer import ShardWriter
from tokenbridge_jax.data.shards import DatasetInfo
from tokenbridge_jax.quantizer import Quantizer
from tokenbridge_jax.training.metric_writer import read_metrics

AUTOENCODER = AutoencoderConfig(
    image_size=16, image_channels=3, channels=32, multipliers=(1, 2), blocks=1,
    attention_resolutions=(), latent_channels=4, scale=1.5,
)  # fmt: skip
SETTINGS = {
    "seed": 3,
    "data": {
        "source": "folder", "path": "", "split": "", "validation_split": "",
        "name": "",
        "image_size": 16, "image_channels": 3, "num_classes": 5, "flip": True,
        "workers": 0,
    },
    "quantizer": {
        "levels": 16, "range": 3.0, "channel_order": "identity", "calibration_images": 1000,
    },
    "tokenize": {
        "batch_size": 8, "store": "indices", "posterior_samples": 1, "records_per_shard": 10,
        "validation_fraction": 0.0, "precision": "float32",
    },
}  # fmt: skip


# Flags of a training run on `write_workdir`.
TRAINING = {
    "data.num_classes": 3,
    "quantizer.levels": 16,
    "quantizer.range": 5.0,
    "model.encoder_width": 16,
    "model.encoder_layers": 1,
    "model.decoder_width": 16,
    "model.decoder_layers": 1,
    "model.head_width": 16,
    "model.head_layers": 1,
    "training.batch_size": 16,
    "training.warmup_steps": 2,
    "training.log_every": 1,
    "sampling.num_iter": 2,
    "sampling.guidance": 1.0,
    "mesh.data": 2,
    "mesh.fsdp": 2,
}


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
        "precision": "float32",
        "class_names": ("cat", "dog", "owl"),
        "records_per_shard": 10,
        "sources": {},
    }
    return DatasetInfo(**(settings | changes))


def random_records(info: DatasetInfo, images: range) -> np.ndarray:
    """One record per image, whose content depends only on the image's number.

    Latents are about the image's class, with a deviation of 0.2 to 0.3.
    """
    records = np.empty(len(images), info.record)
    for record, image in zip(records, images, strict=True):
        rng = np.random.default_rng(image)
        record["image"] = image
        record["label"] = image % 3
        if info.holds_indices:
            record["indices"] = rng.integers(0, info.quantizer.levels, record["indices"].shape)
        if info.holds_latents:
            record["mean"] = image % 3 - 1 + 0.5 * rng.normal(size=record["mean"].shape)
            record["deviation"] = rng.uniform(0.2, 0.3, record["deviation"].shape)
    return records


def write_tokens(folder: Path, counts: dict[str, list[int]], **settings) -> DatasetInfo:
    """Writes shards with these numbers of records for every split, and `dataset.json`."""
    info = make_info(**settings)
    splits = {}
    for split, sizes in counts.items():
        listed = []
        for number, size in enumerate(sizes):
            path, start = folder / shards.shard_name(split, number, len(sizes)), sum(sizes[:number])
            with ShardWriter(path) as writer:
                writer.write(random_records(info, range(start, start + size)))
                statistics = ChannelStatistics(info.channels, info.quantizer.levels)
                summary = writer.commit([], statistics)
            listed.append({"file": path.name, "records": size, "bytes": summary.size})
        splits[split] = {"images": sum(sizes), "shards": listed}
    info = make_info(**settings, splits=splits)
    shards.write_info(folder, info)
    return info


@contextlib.contextmanager
def full_disk(name: str = "") -> Iterator[None]:
    """Lets shards whose names contain `name` be written to the device that is always full."""
    create = shard_writer.ArrayRecordWriter

    def on_full_disk(path, options):
        if name in path:
            os.symlink("/dev/full", path)
        return create(path, options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer, "ArrayRecordWriter", on_full_disk)
        yield


def write_workdir(workdir: Path, **settings) -> None:
    """Writes random shards of three classes, and the autoencoder that their description names."""
    config = make_info().autoencoder
    params = init_params(config, jax.random.key(0))
    autoencoder_hash = save_autoencoder(workdir / "autoencoder", config, params)
    (workdir / "tokens").mkdir(parents=True)
    write_tokens(
        workdir / "tokens",
        {"train": [20, 13], "validation": [11]},
        autoencoder_hash=autoencoder_hash,
        channel_order_rule="frequency, over 33 images",
        **settings,
    )


def results(workdir: Path) -> list[dict[str, float]]:
    """The lines of `metrics.jsonl` without the fields that depend on time."""
    rows = read_metrics(workdir / "metrics.jsonl")
    for row in rows:
        row.pop("images_per_second", None)
        row.pop("share_of_peak", None)
    return rows


@contextlib.contextmanager
def stopped_at_the_third_batch(command: Any, loader: str) -> Iterator[None]:
    """Sends SIGTERM to a training command when it asks for its third batch."""
    make_loader = getattr(command, loader)

    def stopping_loader(*args, **kwargs):
        for step, batch in enumerate(make_loader(*args, **kwargs)):
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, loader, stopping_loader)
        yield


def write_autoencoder(workdir: Path) -> Path:
    """Writes a random autoencoder whose latents have a variance of about 1; returns `workdir`."""
    params = jax.tree.map(np.array, init_params(AUTOENCODER, jax.random.key(0)))
    # Posterior noise with a deviation of about 0.1, which is large enough to change indices.
    params["quant_conv"]["bias"][AUTOENCODER.latent_channels :] = -4.0
    save_autoencoder(workdir / "autoencoder", AUTOENCODER, params)
    return workdir


def make_config(images: Path, **changes) -> ConfigDict:
    """The settings above with changes such as `data__flip=False`."""
    config = ConfigDict(SETTINGS)
    config.data.path = str(images)
    named = {name.replace("__", "."): value for name, value in changes.items()}
    with config.ignore_type():  # A channel order is a name or a tuple.
        config.update_from_flattened_dict(named)
    return config


def write_pictures(root: Path) -> Path:
    """Writes 27 smooth pictures in 3 class folders; returns `root`."""
    for i in range(27):
        rng = np.random.default_rng(i)
        path = root / f"class{i % 3}" / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3)).astype(np.uint8))
        coarse.resize((30, 24), Image.Resampling.BICUBIC).save(path)
    return root


def contents(workdir: Path) -> dict[str, bytes]:
    files = filter(Path.is_file, (workdir / "tokens").rglob("*"))
    return {str(path.relative_to(workdir / "tokens")): path.read_bytes() for path in files}


def read_split(workdir: Path, split: str = "train") -> np.ndarray:
    info = shards.read_info(workdir / "tokens")
    files = shards.shard_files(workdir / "tokens", info, split)
    records = [record for path, _ in files for record in ArrayRecordReader(str(path)).read_all()]
    return np.frombuffer(b"".join(records), info.record)


@jax.jit
def encode(params, pixels):
    return Autoencoder(AUTOENCODER).apply({"params": params}, pixels / 127.5 - 1, method="encode")


def documented_records(folder: Path) -> np.ndarray:
    """The records of the first training shard, by the five lines in the documentation."""
    code = re.search(r"open a shard:\n\n((?:    .*\n)+)", shards.__doc__).group(1)
    assert len(code.splitlines()) == 5
    code = textwrap.dedent(code).replace('open("dataset.json")', "file")
    found = {}
    # The documented line does not close the file.
    with contextlib.chdir(folder), open("dataset.json") as file:
        exec(code, {"file": file}, found)
    return found["records"]


def posterior_of(workdir: Path, picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation `[L, C]` of the posterior of one picture, encoded alone."""
    _, params = load_autoencoder(workdir / "autoencoder")
    posterior = encode(params, jnp.asarray(picture[None], jnp.float32))
    mean, logvar = np.asarray(posterior.mean), np.asarray(posterior.logvar)
    return mean.reshape(-1, 4), np.exp(logvar / 2).reshape(-1, 4)


def nearest(latents: np.ndarray, level_values: list[float], limit: float) -> np.ndarray:
    scaled = np.clip(latents / limit * 3, -3, 3)
    return np.abs(scaled[..., None] - np.array(level_values)).argmin(axis=-1)
