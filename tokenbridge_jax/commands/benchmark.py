"""Measures speed. Prints JSON lines to stdout: first the best rates of the device, then each case.

  tokenbridge benchmark train --config configs/imagenet256.py:size=L --batch 64,256
  tokenbridge benchmark sample --config configs/imagenet256.py:size=L --batch 256 --steps 64,256
  tokenbridge benchmark head|autoencoder|quantize|loader --config configs/imagenet256.py
  tokenbridge benchmark images --config configs/imagenet256.py --config.data.path=/data/imagenet

  train        the training step; --hidden or --all_buckets choose its programs
  sample       indices of whole images
  head         the channel head drawing single positions
  autoencoder  images -> indices, latents -> images
  quantize     latents -> indices and back
  loader       batches from shards
  images       batches of decoded and cropped images, by --workers processes

Weights and data are random, except the pictures of `images`.
`tokenbridge_jax/benchmark/measure.py` explains the fields.
If a case does not fit into memory, its line has an `error`, and the exit status is still 0.
"""

import sys
from pathlib import Path

import jax
from absl import flags

from tokenbridge_jax.benchmark import (
    codec_speed,
    images_speed,
    loader_speed,
    sampling_speed,
    training_speed,
)
from tokenbridge_jax.benchmark.ceilings import measure_ceilings
from tokenbridge_jax.benchmark.measure import Case, Reporter
from tokenbridge_jax.commands import runner
from tokenbridge_jax.commands.arguments import define_path
from tokenbridge_jax.config import filled, make_mesh
from tokenbridge_jax.ops.precision import PRECISIONS
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.hardware import host_cores

WORDS = ("train", "sample", "head", "autoencoder", "quantize", "loader", "images")

# Default sizes: on an accelerator, and on a CPU.
DEFAULT_BATCH = {
    "train": ([64, 256], [8]),
    "sample": ([256, 1], [8]),
    "autoencoder": ([64], [8]),
    "loader": ([2048], [2048]),
    "images": ([64], [64]),
}
DEFAULT_STEPS = ([64], [4])
DEFAULT_POSITIONS = ([1, 64, 256, 1024], [1, 16])
QUANTIZED_VALUES = (2**28, 2**20)


def define_flags(flag_values: flags.FlagValues, word: str | None) -> None:
    """Adds the flags of this command, which are the same for every word."""
    del word

    def define(kind, name, default, help_text, **options):
        kind(name, default, help=help_text, flag_values=flag_values, **options)

    define(flags.DEFINE_list, "batch", None, "Batch sizes; not of head and quantize.")
    define(flags.DEFINE_integer, "hidden", None, "train: this many hidden positions, not the mean.")
    define(flags.DEFINE_bool, "all_buckets", False, "train: every program, and the expected step.")
    define(
        flags.DEFINE_list,
        "workers",
        None,
        "images: numbers of processes, 1 is a thread. Default: 1, all cores.",
    )
    define(flags.DEFINE_list, "steps", None, "sample: numbers of reveal steps.")
    help_text = "sample, head: scale; 1 is off. Default: sample the config's, head off."
    define(flags.DEFINE_float, "guidance", None, help_text)
    define(flags.DEFINE_list, "positions", None, "head: numbers of positions.")
    help_text = "autoencoder: precision of its products, as tokenize.precision."
    define(flags.DEFINE_enum, "precision", "float32", help_text, enum_values=PRECISIONS)
    define_path("data", "loader: folder of shards to read, instead of random ones.", flag_values)
    define(flags.DEFINE_integer, "records", 50_000, "loader: images in the random shards.")
    define(flags.DEFINE_integer, "repeats", 10, "Timings of every case.")
    define_path("profile", "Folder for tables of device time, one for each case.", flag_values)
    define_path("out", "File to append the lines to, besides stdout.", flag_values)


def main(args: flags.FlagValues, what: str) -> None:
    """Measures the cases of benchmark `what`."""
    for name, value in (("repeats", args.repeats), ("records", args.records)):
        if value < 1:
            raise UserError(f"--{name}={value} must be at least 1")
    cases = make_cases(args, what)
    reporter = Reporter(
        measure_ceilings(args.repeats),
        args.repeats,
        profile_folder=Path(args.profile) if args.profile else None,
        out=Path(args.out) if args.out else None,
    )
    lines = [reporter.measure(case) for case in cases]
    if what == "train" and args.all_buckets:
        for line in training_speed.expectations(lines):
            reporter.emit(line)
    if what == "images":
        reporter.emit(images_speed.efficiencies(lines))


def make_cases(args: flags.FlagValues, what: str) -> list[Case]:
    """Returns the cases of benchmark `what`; their weights and data are not made yet.

    Raises:
      UserError: a flag or the config makes no sense.
    """
    config = filled(args.config)
    platform = int(jax.local_devices()[0].platform == "cpu")

    def numbers(name: str, defaults: tuple[list[int], list[int]]) -> list[int]:
        given = args[name].value
        if given is None:
            return defaults[platform]
        if not given or not all(text.isdecimal() and int(text) > 0 for text in given):
            raise UserError(f"--{name}={','.join(given)} must be numbers from 1, such as 1,64")
        return [int(text) for text in given]

    if what == "head":
        guidance = 1.0 if args.guidance is None else args.guidance
        return sampling_speed.head_cases(config, numbers("positions", DEFAULT_POSITIONS), guidance)
    if what == "quantize":
        return codec_speed.quantize_cases(config, QUANTIZED_VALUES[platform])
    batches = numbers("batch", DEFAULT_BATCH[what])
    if what == "autoencoder":
        return codec_speed.autoencoder_cases(config, batches, args.precision)
    if what == "loader":
        return loader_speed.cases(
            config, batches, args.records, Path(args.data) if args.data else None
        )
    if what == "images":
        workers = sorted({1, host_cores()})
        return images_speed.cases(config, batches, numbers("workers", (workers, workers)))
    mesh = make_mesh(config)
    if what == "sample":
        steps = numbers("steps", DEFAULT_STEPS)
        return sampling_speed.sample_cases(config, mesh, batches, steps, args.guidance)
    return training_speed.cases(
        config, mesh, batches, hidden=args.hidden, all_buckets=args.all_buckets
    )


if __name__ == "__main__":
    sys.exit(runner.main(["benchmark", *sys.argv[1:]]))
