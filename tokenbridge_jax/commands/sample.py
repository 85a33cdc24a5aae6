"""Samples images: WORKDIR/checkpoints + WORKDIR/autoencoder -> WORKDIR/samples.

Images are written batch by batch, while the devices draw the next ones, so any number of them needs
little memory. Image i depends on the seed, on i and on its class.

  --format=npz   `samples.npz` (`arr_0`: uint8 NHWC, `labels`: int32), which appears when it is
                 complete and replaces that of an earlier call
  --format=png   `images/0000000.png`, ..., with `labels.npy` (int32) and `settings.json`. The same
                 command draws only what is missing, and a larger --num_images adds to it; other
                 settings are refused. The processes of a job share this work and the folder.
  --format=webp  the same as WebP without loss

`grid.png` shows the first 100 images, and with --shard those of shard 0.

--shard=I/N draws part I (from 0) of N, in a job that needs no other: N machines, each with its own
I, divide the images. They share the folder `images`; or each writes `shards/samples-I-of-N.npz`,
and a second start leaves a complete one as it is. Together the files hold what one job would write;
`evaluate --images` reads such a folder.

`config.sampling` has the settings: --config.sampling.num_iter=64, .guidance, .guidance_schedule,
.guidance_interval, .guidance_every, .temperature, .order, .choice_temperature, .batch_size.
"""

import contextlib
import functools
import hashlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from jaxtyping import Int, UInt8

from tokenbridge_jax.commands import runner
from tokenbridge_jax.commands.arguments import define_path
from tokenbridge_jax.commands.trained import load_pipeline
from tokenbridge_jax.config import sampling_settings
from tokenbridge_jax.evaluation import generation
from tokenbridge_jax.evaluation.image_sets import ARRAY
from tokenbridge_jax.pipeline import Pipeline
from tokenbridge_jax.pipeline.description import MODEL_FILE, ModelDescription
from tokenbridge_jax.runtime import pictures, processes, storage
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.progress import say

IN_GRID = 100


def define_flags(flag_values: flags.FlagValues) -> None:
    """Adds the flags of this command."""
    integer = functools.partial(flags.DEFINE_integer, flag_values=flag_values)
    flags.DEFINE_list(
        "classes",
        None,
        "Classes by number or name; the images cycle through them. All by default.",
        flag_values=flag_values,
    )
    integer("num_images", IN_GRID, "Number of images, of all shards together.")
    integer("seed", 0, "Fixes all randomness.")
    integer("step", None, "Step of the checkpoint; the latest by default.")
    flags.DEFINE_enum(
        "format",
        "npz",
        ["npz", *pictures.KINDS],
        "One .npz file, or a file for each image.",
        flag_values=flag_values,
    )
    flags.DEFINE_string(
        "shard", "0/1", "I/N: draw only part I, from 0, of N.", flag_values=flag_values
    )
    define_path("output", "Folder to write to instead of WORKDIR/samples.", flag_values)


def main(args: flags.FlagValues) -> None:
    """Samples and writes the files."""
    count = args.num_images
    if not 1 <= count < 2**31:
        raise UserError(f"--num_images={count} must be at least 1 and below 2**31")
    shard, shards = _shard(args.shard, count)
    output = storage.check_folder(args.output or epath.Path(args.workdir) / "samples")
    pipeline = load_pipeline(args, ahead=_ahead(args, output))
    # By default the classes of the training images; the model may have room for more.
    classes = pipeline.labels(args.classes or pipeline.description.class_names)
    labels = np.resize(classes, count)
    # Adjacent images: the shards' files, one after the other, hold what a single file would.
    share = np.arange(count * shard // shards, count * (shard + 1) // shards)
    missing = share
    if args.format != "npz":
        written = output / "images"
        generation.claim_folder(written, _facts(args, pipeline, classes))
        missing = _missing(written, share, args.format)
    elif shards == 1:
        written = output / "samples.npz"
    else:
        written = output / "shards" / f"samples-{shard:05d}-of-{shards:05d}.npz"
        division = {"num_images": count, "shards": shards}
        generation.claim_folder(written.parent, _facts(args, pipeline, classes, **division))
        if processes.gather(str(storage.exists(written)))[0] == "True":
            say(f"{written} is there already: nothing to do")
            return
    for folder in {output, written if args.format != "npz" else written.parent}:
        storage.remove_leftovers(folder)
    stream = pipeline.stream(
        labels.tolist(), numbers=missing, seed=args.seed, progress=True, **args.config.sampling
    )
    draws_grid = shard == 0 and jax.process_index() == 0
    in_grid: dict[int, np.ndarray | None] = dict.fromkeys(share[: IN_GRID * draws_grid].tolist())
    parts = _numbered(stream, missing, in_grid)
    channels = pipeline.codec.config.image_channels
    with contextlib.closing(stream):  # After an error, the line of progress comes first.
        if args.format == "npz":
            shape = (len(share), pipeline.image_size, pipeline.image_size, channels)
            _write_npz(written, parts, shape, labels[share])
        else:
            _write_pictures(written, parts, args.format, classes, count)
    if jax.process_index() > 0:
        return
    wrote = [f"{written} ({len(missing)} images)"] if len(missing) else []
    if draws_grid:
        images = [
            # An earlier call wrote the others.
            _kept(_path(written, number, args.format), pipeline) if image is None else image
            for number, image in in_grid.items()
        ]
        grid = pictures.grid(np.stack(images), columns=min(len(classes), 10))
        pictures.write_png(output / "grid.png", grid)
        wrote.append(f"{output / 'grid.png'}")
    if wrote:
        print(f"wrote {' and '.join(wrote)}")


def _ahead(args: flags.FlagValues, output: epath.Path) -> dict[str, Any] | None:
    """What to compile while the weights are read; nothing if an earlier call may have drawn all.

    Raises:
      UserError: a class does not exist. It is known before anything is compiled.
    """
    workdir = storage.as_path(args.workdir)
    if args.classes and storage.exists(workdir / MODEL_FILE):  # `load_pipeline` says if not.
        ModelDescription.load(workdir).labels(args.classes)
    if any(storage.exists(output / name) for name in ("images", "shards")):
        return None
    return {"count": args.num_images, **args.config.sampling}


def _shard(text: str, count: int) -> tuple[int, int]:
    """I and N of --shard=I/N, for `count` images."""
    form = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
    shard, shards = map(int, form.groups()) if form else (0, 0)
    if shard >= shards:
        raise UserError(f"--shard={text} must be I/N with I from 0 to N - 1, such as 0/4")
    if shards > count:
        raise UserError(f"--shard={text} must have at most --num_images={count} parts")
    return shard, shards


def _facts(
    args: flags.FlagValues, pipeline: Pipeline, classes: Int[np.ndarray, " c"], **others: int
) -> dict[str, Any]:
    """What determines the files of a folder."""
    labels = {"classes": classes.tolist()}
    settings = sampling_settings(args.config.sampling)
    drawn = generation.describe(pipeline, settings, labels=labels, seed=args.seed)
    return {"format": args.format, **others, **drawn}


def _missing(folder: epath.Path, share: Int[np.ndarray, " n"], kind: str) -> Int[np.ndarray, " m"]:
    """The images of this share that are not in the folder yet."""
    held = _held(folder, kind)
    missing = np.setdiff1d(share, held)
    # No process writes before all have looked.
    seen = processes.gather(hashlib.sha256(missing.tobytes()).hexdigest())
    if len(set(seen)) > 1:
        raise UserError(f"the processes of this job see different files in {folder}: share it")
    if not len(missing):  # There may be more, of an earlier call or of other shards.
        say(f"{folder} holds {len(held)} images, {len(share)} are asked for: nothing to draw")
    elif len(missing) < len(share):
        done = len(share) - len(missing)
        say(f"{folder} holds {done} of {len(share)} images: drawing the others")
    return missing


def _held(folder: epath.Path, kind: str) -> Int[np.ndarray, " n"]:
    """The numbers of the images in the folder. All of them are complete."""
    names = [path.stem for path in folder.glob(f"*.{kind}")]
    # Other files are not of this command.
    return np.array([int(x) for x in names if re.fullmatch(r"\d{7,}", x)], np.int64)


def _path(folder: epath.Path, number: int, kind: str) -> epath.Path:
    return folder / f"{number:07d}.{kind}"


def _kept(path: epath.Path, pipeline: Pipeline) -> UInt8[np.ndarray, "H W I"]:
    """An image that an earlier call wrote."""
    side = pipeline.image_size
    image = pictures.read(path, pipeline.codec.config.image_channels)
    if image.shape[:2] != (side, side):
        raise UserError(f"{path} is not {side}x{side} pixels; remove it and run again")
    return image


def _numbered(
    stream: Iterator[UInt8[np.ndarray, "b H W I"]],
    numbers: Int[np.ndarray, " n"],
    in_grid: dict[int, np.ndarray | None],
) -> Iterator[tuple[list[int], UInt8[np.ndarray, "b H W I"]]]:
    """The batches with the numbers of their images. `in_grid` keeps the images that it names."""
    start = 0
    for images in stream:
        some = numbers[start : start + len(images)].tolist()
        in_grid |= {
            number: image.copy()  # A view would keep the whole batch.
            for number, image in zip(some, images, strict=True)
            if number in in_grid
        }
        yield some, images
        start += len(images)


def _write_npz(
    path: epath.Path,
    parts: Iterator[tuple[list[int], UInt8[np.ndarray, "b H W I"]]],
    shape: tuple[int, ...],
    labels: Int[np.ndarray, " n"],
) -> None:
    """Process 0 writes the file."""
    if jax.process_index() > 0:
        for _ in parts:  # All processes draw.
            pass
        return
    with storage.npz_in_parts(path, ARRAY, shape, labels=labels) as append:
        for _, images in parts:
            append(images)


def _write_pictures(
    folder: epath.Path,
    parts: Iterator[tuple[list[int], UInt8[np.ndarray, "b H W I"]]],
    kind: str,
    classes: Int[np.ndarray, " c"],
    count: int,
) -> None:
    """A file for each image; process p writes the images p, p + processes, p + 2 processes, ..."""
    if jax.process_index() == 0:
        # An earlier call may have drawn more images than this one.
        count = max(count, _held(folder, kind).max(initial=-1) + 1)
        storage.write_npy(folder / "labels.npy", np.resize(classes, count))
    mine = (
        [
            (_path(folder, number, kind), image)
            for number, image in zip(numbers, images, strict=True)
            if number % jax.process_count() == jax.process_index()
        ]
        for numbers, images in parts
    )
    pictures.write_batches(mine, kind)


if __name__ == "__main__":
    sys.exit(runner.main(["sample", *sys.argv[1:]]))
