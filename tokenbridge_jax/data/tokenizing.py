"""Images -> latents -> token shards: the work of `tokenbridge tokenize`.

Every picture has a fixed place. Shard k of a split holds `records_per_shard` neighbouring pictures
of its source. It is encoded in the same batches every time, and the posterior noise depends only on
the seed, the picture's number and its source. A shard appears only when complete. A run that was
killed is therefore finished by running it again: it skips the complete shards and writes the same
content into the others.

Host and device overlap: processes decode the pictures of the next batches while the device encodes
one batch and this process stores the one before. The processes of a job divide the shards among
themselves. Each works on its own devices. If one fails, all stop.
"""

import contextlib
import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from tokenbridge_jax.autoencoder import AutoencoderConfig, autoencoder_hash, load_autoencoder
from tokenbridge_jax.channels import ChannelSpectrum, ChannelStatistics, resolve_channel_order
from tokenbridge_jax.codec import Codec
from tokenbridge_jax.data import shards
from tokenbridge_jax.data.batches import Batch, ShardPlan, prepared_batches
from tokenbridge_jax.data.records import EncodedBatch, start_encoding
from tokenbridge_jax.data.shard_writer import ShardWriter, read_summary
from tokenbridge_jax.data.shards import DatasetInfo
from tokenbridge_jax.data.sources import Subset, make_subsets
from tokenbridge_jax.data.workers import count_workers
from tokenbridge_jax.ops.precision import check_precision
from tokenbridge_jax.quantizer import Codebook, Quantizer
from tokenbridge_jax.runtime import meshes, processes, storage
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.progress import Progress, say

# How many labels of a split are checked before the long work. An archive's labels are read together
# with its pictures, so the others are checked when the pictures are encoded.
LABELS_CHECKED_FIRST = 200

# Makes the batches of shards, with the strictness, sizes and workers of the run.
Prepare = Callable[[list[ShardPlan]], Iterator[Batch]]


@dataclasses.dataclass(frozen=True)
class Result:
    """The finished shards, and how many images this process encoded in how many seconds."""

    info: DatasetInfo
    folder: Path
    images: int
    seconds: float


def tokenize(
    config: ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    strict: bool = False,
    begin: Callable[[], None] = lambda: None,
) -> Result:
    """Writes `WORKDIR/tokens` from the images of `config.data` and `WORKDIR/autoencoder`.

    Args:
      config: sections `data`, `quantizer`, `tokenize`, and `seed`.
      workdir: holds `autoencoder/`; gets `tokens/`.
      strict: stop at the first broken picture instead of leaving it out.
      begin: called on process 0 after all settings are accepted, before the long work.

    Raises:
      UserError: a file is missing, settings do not fit together, or they differ from those that the
        folder was begun with; the disk is full; or another process failed.
    """
    first = jax.process_index() == 0
    with _all_or_none():
        folder = shards.local_folder(workdir) / "tokens"
        _check_settings(config)
        autoencoder, params = _load_autoencoder(storage.as_path(workdir) / "autoencoder", config)
        subsets = make_subsets(config)
        for split, subset in subsets.items():
            images = subset.spread(LABELS_CHECKED_FIRST).images
            labels = [subset.source.label(int(i)) for i in images]
            _check_labels(split, subset, images, labels)
        info = _describe(config, autoencoder, params, subsets)
        mesh = meshes.make_mesh(devices=jax.local_devices())
        codec = Codec(autoencoder, params, info.quantizer, mesh, info.precision)

    def prepare(plans: list[ShardPlan]) -> Iterator[Batch]:
        data, batch_size = config.data, config.tokenize.batch_size
        sizes = data.image_size, data.image_channels
        return prepared_batches(plans, batch_size, *sizes, workers=data.workers, strict=strict)

    def measure() -> ChannelSpectrum:
        calibration = subsets["train"].spread(config.quantizer.calibration_images)
        return _measure_spectrum(calibration, codec, prepare)

    # Process 0 goes first, and the others read its description.
    for turn in (True, False):
        with _all_or_none():
            if turn == first:
                info = _agree_on_making(folder, info, config.quantizer.channel_order, measure)
                if first:
                    begin()
                    say(f"tokenize: {_describe_sizes(config, info)}")
    with _all_or_none():
        planned = plan_shards(folder, info, subsets)
        mine = planned[jax.process_index() :: jax.process_count()]
        todo = [plan for plan in mine if read_summary(plan.path) is None]
        start = time.monotonic()
        _write_shards(todo, sum(len(plan.images) for plan in mine), info, codec, prepare)
        seconds = time.monotonic() - start
    with _all_or_none():
        if first:
            _finish(folder, info, planned)
    encoded = sum(len(plan.images) for plan in todo)
    return Result(shards.read_info(folder), folder, encoded, seconds)


@contextlib.contextmanager
def _all_or_none() -> Iterator[None]:
    """Ends its body on all processes together: if it fails on one of them, all raise.

    Without this the others would wait forever for the one that failed.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() > 1:
            reason = str(error) or type(error).__name__
            index = jax.process_index()
            print(f"process {index} failed, the others follow: {reason}", file=sys.stderr)
        processes.gather("failed")
        raise
    outcomes = processes.gather("succeeded")
    if "failed" in outcomes:
        raise UserError(
            f"process {outcomes.index('failed')} of this job failed (its own output says why); "
            "correct that and run again: it continues where it stopped"
        )


def _check_labels(
    split: str, subset: Subset | ShardPlan, images: np.ndarray, labels: Sequence[int] | np.ndarray
) -> None:
    """Refuses pictures without a class (TFDS labels them -1) among some pictures of a subset."""
    classes = len(subset.source.class_names)
    wrong = [pair for pair in zip(images, labels, strict=True) if not 0 <= pair[1] < classes]
    if wrong:
        image, label = wrong[0]
        checked = "" if len(labels) == len(subset.images) else " checked"
        raise UserError(
            f"{split} split: {len(wrong)} of {len(labels)} pictures{checked} have no class, such "
            f"as {subset.source.name(int(image))} with label {label} of {classes} classes; name "
            "splits without such pictures in --config.data.split and --config.data.validation_split"
        )


def plan_shards(folder: Path, info: DatasetInfo, subsets: dict[str, Subset]) -> list[ShardPlan]:
    """Assigns every picture to a shard, neighbours together.

    Shards hold `records_per_shard` pictures. If a split would get fewer than about eight shards,
    they hold fewer (a multiple of 64), because a killed run has to repeat one of them.
    """
    planned = []
    for split, subset in subsets.items():
        images = len(subset.images)
        size = min(info.records_per_shard, -(-images // (8 * 64)) * 64)
        count = -(-images // size)
        for number in range(count):
            path = folder / shards.shard_name(split, number, count)
            chosen = subset.images[number * size : (number + 1) * size]
            planned.append(ShardPlan(path, split, subset.source, chosen))
    return planned


def make_quantizer(config: ConfigDict) -> Quantizer:
    """The quantizer that `config.quantizer` asks for."""
    return Quantizer.gaussian(config.quantizer.levels, config.quantizer.range)


def quantizer_of(
    config: ConfigDict, autoencoder: AutoencoderConfig, params: Mapping[str, Any]
) -> Quantizer | Codebook:
    """The quantizer for an autoencoder's latents: its own, or that of `make_quantizer`."""
    if autoencoder.codebook is None:
        return make_quantizer(config)
    codes = params["codebook"]["codes"] if autoencoder.codebook.has_codes else None
    return autoencoder.codebook.quantizer(codes)


def _check_settings(config: ConfigDict) -> None:
    for section, name, minimum in [
        ("tokenize", "batch_size", 1),
        ("tokenize", "records_per_shard", 1),
        ("tokenize", "posterior_samples", 0),
        ("quantizer", "calibration_images", 1),
    ]:
        if config[section][name] < minimum:
            raise UserError(
                f"config.{section}.{name} is {config[section][name]}, must be at least {minimum}"
            )
    count_workers(config.data.workers, 0)
    if config.tokenize.store not in shards.STORES:
        raise UserError(
            f"config.tokenize.store is '{config.tokenize.store}', must be one of "
            f"{', '.join(shards.STORES)}"
        )
    check_precision(config.tokenize.precision, "config.tokenize.precision")


def _load_autoencoder(folder: epath.Path, config: ConfigDict) -> tuple[AutoencoderConfig, Any]:
    if not (folder / "config.json").exists():
        raise UserError(
            f"there is no autoencoder in {folder}; run `tokenbridge train-vae` or `import-torch` "
            "with this --workdir first, or copy autoencoder/ of another one"
        )
    autoencoder, params = load_autoencoder(folder)
    autoencoder.check_image_size(config.data.image_size, config.data.image_size)
    if autoencoder.image_channels != config.data.image_channels:
        raise UserError(
            f"the autoencoder in {folder} takes {autoencoder.image_channels} image channels but "
            f"config.data.image_channels is {config.data.image_channels}"
        )
    if config.tokenize.store != "indices":
        user = f"tokenize.store={config.tokenize.store}"
        autoencoder.check_posterior(user, "set --config.tokenize.store=indices")
    return autoencoder, params


def _describe(
    config: ConfigDict, autoencoder: AutoencoderConfig, params: Any, subsets: dict[str, Subset]
) -> DatasetInfo:
    """The description of the shards, without the channel order."""
    rule = config.quantizer.channel_order
    if rule == "frequency":
        calibration = subsets["train"].spread(config.quantizer.calibration_images)
        rule = f"frequency, over {len(calibration.images)} images"
    elif rule not in ("kl16", "identity"):
        rule = "given"
    store = config.tokenize.store
    samples = _drawn_samples(config, autoencoder, store)
    return DatasetInfo(
        quantizer=quantizer_of(config, autoencoder, params),
        autoencoder=autoencoder,
        autoencoder_hash=autoencoder_hash(autoencoder, params),
        channel_order=(),
        channel_order_rule=rule,
        image_size=config.data.image_size,
        posterior_samples=samples,
        flips=config.data.flip,
        seed=config.seed,
        precision=config.tokenize.precision,
        class_names=subsets["train"].source.class_names,
        records_per_shard=config.tokenize.records_per_shard,
        store=store,
        split_noise=samples > 0
        and any(subset.source is not subsets["train"].source for subset in subsets.values()),
        sources={
            split: {**subset.source.describe(), "chosen": len(subset.images)}
            for split, subset in subsets.items()
        },
    )


def _drawn_samples(config: ConfigDict, autoencoder: AutoencoderConfig, store: str) -> int:
    """How many samples of the posterior a record has.

    Latents are stored as mean and deviation: only indices are of drawn samples. With a codebook all
    samples would be the same.
    """
    drawn = store != "latents" and autoencoder.codebook is None
    return config.tokenize.posterior_samples if drawn else 0


def _describe_sizes(config: ConfigDict, info: DatasetInfo) -> str:
    """A line with the bytes of a record for each possible choice of `tokenize.store`."""
    sizes = {}
    for store in shards.STORES if info.autoencoder.codebook is None else ("indices",):
        samples = _drawn_samples(config, info.autoencoder, store)
        described = dataclasses.replace(info, store=store, posterior_samples=samples)
        sizes[store] = described.record.itemsize
    listed = ", ".join(f"{size:,} with tokenize.store={store}" for store, size in sizes.items())
    return f"stores {info.store}; bytes an image, before compression: {listed}"


def _measure_spectrum(subset: Subset, codec: Codec, prepare: Prepare) -> ChannelSpectrum:
    """Measures the channels' spectrum on the posterior means of some pictures."""
    spectrum = ChannelSpectrum(codec.config.latent_channels)
    plan = ShardPlan(Path(), "train", subset.source, subset.images)
    with Progress(len(subset.images), desc="channel order") as progress:
        for batch in prepare([plan]):
            latents = np.asarray(codec.encode(batch.pixels).latents)[batch.good]
            if len(latents):
                spectrum.update(latents)
            progress.update(len(batch.images))
    return spectrum


def _agree_on_making(
    folder: Path, info: DatasetInfo, setting: Any, measure: Callable[[], ChannelSpectrum]
) -> DatasetInfo:
    """Adds the channel order, and compares with the description of a folder that was begun."""
    begun = shards.read_begun_info(folder)
    if begun is not None and setting == "frequency":
        order = begun.channel_order
    else:
        measured = setting == "frequency" and info.channels > 1
        spectrum = measure() if measured else None
        order = resolve_channel_order(setting, info.channels, spectrum)
    info = dataclasses.replace(info, channel_order=order)
    if begun is not None:
        # A folder that an earlier version began is finished in the same way.
        precision = shards.UNSTATED if begun.precision == shards.UNSTATED else info.precision
        info = dataclasses.replace(info, split_noise=begun.split_noise, precision=precision)
        try:
            begun.check_same_making(info)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error
    elif any(folder.glob("*.array_record")):
        raise UserError(
            f"{folder} holds shards without a {shards.INFO_FILE}; put that file back, or use "
            "another --workdir"
        )
    else:
        shards.write_info(folder, info, partial=True)
    return info


def _write_shards(
    todo: list[ShardPlan], total: int, info: DatasetInfo, codec: Codec, prepare: Prepare
) -> None:
    """Writes the shards `todo`; `total` also counts the pictures of the complete ones."""
    if not todo:
        return
    done = total - sum(len(plan.images) for plan in todo)
    with Progress(total, desc="tokenize", done=done) as progress:
        encoded = _encoded_batches(prepare(todo), codec, info)
        for plan, of_shard in itertools.groupby(encoded, key=lambda found: found.batch.shard):
            _write_shard(plan, of_shard, info, progress)


def _encoded_batches(
    batches: Iterator[Batch], codec: Codec, info: DatasetInfo
) -> Iterator[EncodedBatch]:
    """Starts every batch on the device before the results of the previous one are read."""
    started = (start_encoding(batch, codec, info) for batch in batches)
    previous = next(started, None)
    while previous is not None:
        following = next(started, None)
        yield previous
        previous = following


def _write_shard(
    plan: ShardPlan,
    batches: Iterator[EncodedBatch],
    info: DatasetInfo,
    progress: Progress,
) -> None:
    statistics = ChannelStatistics(info.channels, info.quantizer.levels)
    skipped: list[dict[str, Any]] = []
    with ShardWriter(plan.path) as writer:
        for encoded in batches:
            batch, good = encoded.batch, encoded.batch.good
            records = encoded.records(info)
            _check_labels(plan.split, plan, batch.images[good], batch.labels[good])
            writer.write(records)
            statistics.update(encoded.of_samples("indices"), encoded.of_samples("clipped"))
            for place, reason in batch.broken.items():
                progress.note(f"broken image left out: {reason}")
                image = int(batch.images[place])
                skipped.append({"split": plan.split, "image": image, "reason": reason})
            progress.update(len(batch.images))
        writer.commit(skipped, statistics)


def _finish(folder: Path, info: DatasetInfo, planned: list[ShardPlan]) -> None:
    """Writes `dataset.json` with the sum of the shards' counts. It marks the folder as finished."""
    splits: dict[str, Any] = {}
    totals: dict[str, ChannelStatistics] = {}
    skipped: list[dict[str, Any]] = []
    for plan in planned:
        summary = read_summary(plan.path)
        if summary is None:
            raise UserError(f"shard {plan.path} is missing; do all processes see the same folder?")
        split = splits.setdefault(plan.split, {"images": 0, "shards": []})
        split["images"] += summary.records
        split["shards"].append(
            {"file": plan.path.name, "records": summary.records, "bytes": summary.size}
        )
        empty = ChannelStatistics(info.channels, info.quantizer.levels)
        totals.setdefault(plan.split, empty).merge(summary.statistics)
        skipped += summary.skipped
    if not splits["train"]["images"]:
        raise UserError(f"none of the images could be used; the first: {skipped[0]['reason']}")
    info = dataclasses.replace(
        info,
        splits=splits,
        statistics={split: statistics.summary() for split, statistics in totals.items()},
        skipped=tuple(skipped),
    )
    shards.write_info(folder, info)
    (folder / shards.PARTIAL_INFO_FILE).unlink(missing_ok=True)
    for temporary in [*folder.glob(".*.tmp"), *folder.glob("statistics/.*.tmp")]:
        temporary.unlink(missing_ok=True)  # Left by runs that were killed.
