"""Samples images: WORKDIR/checkpoints + WORKDIR/autoencoder -> WORKDIR/samples.

Writes `samples.npz` (`arr_0`: uint8 NHWC, `labels`: int32) and `grid.png` with the first 100.
`config.sampling` has the settings: --config.sampling.num_iter=64, .guidance, .guidance_schedule,
.guidance_interval, .temperature, .order, .choice_temperature, .batch_size.
"""

import functools
import sys

import jax
import numpy as np
from absl import flags
from etils import epath

from tokenbridge_jax.commands import runner
from tokenbridge_jax.commands.arguments import define_path
from tokenbridge_jax.config import make_mesh
from tokenbridge_jax.pipeline import Pipeline
from tokenbridge_jax.runtime import pictures, storage
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
    define_path("output", "Folder to write to instead of WORKDIR/samples.", flag_values)


def main(args: flags.FlagValues) -> None:
    """Samples and writes the files."""
    if not 1 <= args.num_images < 2**31:
        raise UserError(f"--num_images={args.num_images} must be at least 1 and below 2**31")
    output = storage.check_folder(args.output or epath.Path(args.workdir) / "samples")
    pipeline = Pipeline.load(args.workdir, step=args.step, mesh=make_mesh(args.config))
    # By default the classes of the training images; the model may have room for more.
    classes = args.classes or pipeline.description.class_names
    class_ids = np.resize(np.array(classes, object), args.num_images).tolist()
    labels = pipeline.labels(class_ids)
    images = pipeline.generate(class_ids, seed=args.seed, progress=True, **args.config.sampling)
    if jax.process_index() > 0:
        return  # Every process has all images; one writes them.
    storage.write_npz(output / "samples.npz", {"arr_0": images, "labels": labels})
    columns = min(len(classes), 10)
    pictures.write_png(output / "grid.png", pictures.grid(images[:IN_GRID], columns))
    print(f"wrote {output / 'samples.npz'} ({len(images)} images) and {output / 'grid.png'}")


if __name__ == "__main__":
    sys.exit(runner.run("sample", sys.argv[1:]))
