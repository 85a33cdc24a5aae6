"""Samples images: WORKDIR/checkpoints + WORKDIR/autoencoder -> WORKDIR/samples.

Writes `samples.npz` (`arr_0`: uint8 NHWC, `labels`: int32) and `grid.png` with the first 100. With
--format=png or webp (without loss) it writes `images/labels.npy`, `images/0000000.png`, ...;
the processes of a job share this work. Images are written batch by batch, while the devices draw
the next ones, so any number of them needs little memory.

`config.sampling` has the settings: --config.sampling.num_iter=64, .guidance, .guidance_schedule,
.guidance_interval, .temperature, .order, .choice_temperature, .batch_size.
"""

import functools
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from absl import flags
from etils import epath
from jaxtyping import UInt8

from tokenbridge_jax.commands import runner
from tokenbridge_jax.commands.arguments import define_path
from tokenbridge_jax.config import make_mesh
from tokenbridge_jax.pipeline import Pipeline
from tokenbridge_jax.runtime import pictures, processes, storage
from tokenbridge_jax.runtime.errors import UserError

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
    integer("num_images", IN_GRID, "Number of images.")
    integer("seed", 0, "Fixes all randomness.")
    integer("step", None, "Step of the checkpoint; the latest by default.")
    flags.DEFINE_enum(
        "format",
        "npz",
        ["npz", *pictures.KINDS],
        "One .npz file, or a file for each image.",
        flag_values=flag_values,
    )
    define_path("output", "Folder to write to instead of WORKDIR/samples.", flag_values)


def main(args: flags.FlagValues) -> None:
    """Samples and writes the files."""
    if not 1 <= args.num_images < 2**31:
        raise UserError(f"--num_images={args.num_images} must be at least 1 and below 2**31")
    output = storage.check_folder(args.output or epath.Path(args.workdir) / "samples")
    folder = output / "images"
    if args.format != "npz":
        _check_empty(folder)
    pipeline = Pipeline.load(args.workdir, step=args.step, mesh=make_mesh(args.config))
    # By default the classes of the training images; the model may have room for more.
    classes = args.classes or pipeline.description.class_names
    class_ids = np.resize(np.array(classes, object), args.num_images).tolist()
    labels = pipeline.labels(class_ids)
    shown: list[np.ndarray] = []
    parts = pipeline.stream(class_ids, seed=args.seed, progress=True, **args.config.sampling)
    parts = _keeping(shown, parts)
    if args.format == "npz":
        written = _write_npz(output / "samples.npz", parts, labels)
    else:
        written = _write_pictures(folder, parts, labels, args.format)
    if jax.process_index() > 0:
        return
    columns = min(len(classes), 10)
    grid = pictures.grid(np.concatenate(shown)[:IN_GRID], columns)
    pictures.write_png(output / "grid.png", grid)
    print(f"wrote {written} ({len(labels)} images) and {output / 'grid.png'}")


def _check_empty(folder: epath.Path) -> None:
    """Refuses a folder with files. Process 0 looks, because others may begin to write."""
    used = jax.process_index() == 0 and folder.exists() and any(folder.iterdir())
    if processes.gather(str(used))[0] == "True":
        raise UserError(f"{folder} holds files; remove it, or name another --output")


def _keeping(
    shown: list[np.ndarray], parts: Iterator[UInt8[np.ndarray, "b H W I"]]
) -> Iterator[UInt8[np.ndarray, "b H W I"]]:
    """The parts, of which `shown` gets those with the first images."""
    for part in parts:
        if sum(map(len, shown)) < IN_GRID:
            shown.append(part)
        yield part


def _write_npz(
    path: epath.Path, parts: Iterator[UInt8[np.ndarray, "b H W I"]], labels: np.ndarray
) -> epath.Path:
    """Process 0 writes the file."""
    if jax.process_index() > 0:
        for _ in parts:  # All processes draw.
            pass
        return path
    part = next(parts)
    shape = (len(labels), *part.shape[1:])
    with storage.npz_in_parts(path, "arr_0", shape, labels=labels) as append:
        append(part)
        for part in parts:
            append(part)
    return path


def _write_pictures(
    folder: epath.Path, parts: Iterator[UInt8[np.ndarray, "b H W I"]], labels: np.ndarray, kind: str
) -> epath.Path:
    """A file for each image; process p writes the images p, p + processes, p + 2 processes, ..."""
    if jax.process_index() == 0:
        storage.write_npy(folder / "labels.npy", labels)
    write = functools.partial(pictures.write, kind=kind)
    start = 0
    with ThreadPoolExecutor() as pool:  # Pillow releases the interpreter's lock.
        for part in parts:
            numbers = range(start, start + len(part))
            mine = [n for n in numbers if n % jax.process_count() == jax.process_index()]
            paths = [folder / f"{number:07d}.{kind}" for number in mine]
            list(pool.map(write, paths, [part[number - start] for number in mine]))
            start += len(part)
    return folder


if __name__ == "__main__":
    sys.exit(runner.run("sample", sys.argv[1:]))
