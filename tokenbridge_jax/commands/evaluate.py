"""Measures what a workdir holds: WORKDIR -> WORKDIR/evaluation and a table.

  tokenbridge evaluate --workdir W --what generation --reference VIRTUAL_imagenet256_labeled.npz
  tokenbridge evaluate --workdir W --what reconstruction
  tokenbridge evaluate --workdir W --what likelihood
  tokenbridge evaluate --workdir W --what tokens
  tokenbridge evaluate --what generation --samples samples.npz --reference real/ --output scores
  tokenbridge evaluate --workdir W --what reference

generation: samples 50,000 images (or takes --samples: a folder or an .npz with arr_0) and compares
them with --reference: FID, sFID, IS, KID, precision, recall. Stopped, it goes on where it was.
reconstruction: images through the autoencoder, continuous and at several levels and ranges: rFID,
PSNR, SSIM, LPIPS; pFID of perturbed indices. likelihood: bits an index and a pixel of held-out
images, and the head's calibration. tokens: entropies, Zipf's law, mutual information of the shards.
reference: statistics of the config's images (or of --samples), for --reference.

Inception and LPIPS need weights: `tokenbridge import-metrics --help`.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath

from tokenbridge_jax import parallel
from tokenbridge_jax.commands import runner
from tokenbridge_jax.errors import UserError
from tokenbridge_jax.evaluation import generation, inception, networks, report
from tokenbridge_jax.evaluation.features import Extractor, extract
from tokenbridge_jax.evaluation.images import ImageSet, data_images, open_images, write_images
from tokenbridge_jax.evaluation.networks import FEATURES, make_extractor
from tokenbridge_jax.evaluation.scores import (
    OF_DATA,
    Reference,
    find_reference,
    generation_scores,
    reference_of,
    remarks,
    save_reference,
)
from tokenbridge_jax.pipeline import Pipeline
from tokenbridge_jax.schedule import SamplingSettings

NEEDS_WORKDIR = False

# As published figures have it.
NUM_SAMPLES = 50_000


def define_flags(flag_values: flags.FlagValues) -> None:
    """Adds the flags of this command."""
    define = functools.partial(_define, flag_values)
    flags.DEFINE_enum("what", None, list(_WHAT), "What to measure.", flag_values=flag_values)
    define(
        "string",
        "reference",
        None,
        f"Images or statistics to compare with; '{OF_DATA}': the "
        "config's training images. By default config.evaluation.reference.",
    )
    define("string", "samples", None, "Images to score, in place of new samples.")
    define("integer", "num_images", None, "How many; 50,000 samples, or all there are.")
    flags.DEFINE_enum(
        "labels",
        "balanced",
        list(generation.LABEL_POLICIES),
        "Classes of samples: each as often, or at random.",
        flag_values=flag_values,
    )
    define("integer", "seed", 0, "Fixes all randomness.")
    define("integer", "step", None, "Which checkpoint; the latest by default.")
    flags.DEFINE_enum(
        "features",
        None,
        list(FEATURES),
        "Feature space: FID's network, or 8 x 8 area means, which need no weights. By default "
        "config.evaluation.features.",
        flag_values=flag_values,
    )
    flags.DEFINE_enum(
        "precision",
        "high",
        list(inception.PRECISIONS),
        "Of Inception's convolutions: float32, TF32 on GPUs, or bfloat16.",
        flag_values=flag_values,
    )
    define("integer", "batch_size", None, "Images at once in networks, over a process's devices.")
    define("string", "networks", None, "Folder of `tokenbridge import-metrics`.")
    define("bool", "write_samples", False, "Write samples.npz, as ADM's evaluator reads it.")
    define("string", "split", "train", "Images of --what reference.")
    define("string", "output", None, "Folder to write to in place of WORKDIR/evaluation.")


def _define(flag_values: flags.FlagValues, kind: str, name: str, default: Any, text: str) -> None:
    kinds: dict[str, Callable[..., Any]] = {
        "string": flags.DEFINE_string,
        "integer": flags.DEFINE_integer,
        "bool": flags.DEFINE_bool,
    }
    kinds[kind](name, default, text, flag_values=flag_values)


def main(args: flags.FlagValues) -> None:
    """Measures, writes JSON and prints the table."""
    if args.what is None:
        raise UserError(f"say what to measure: --what {'|'.join(_WHAT)}")
    if args.num_images is not None and args.num_images < 1:
        raise UserError(f"--num_images={args.num_images} must be at least 1")
    if not args.workdir and not (args.samples and args.output):
        raise UserError(
            "--workdir is not set; name the folder to work in, or --samples and --output"
        )
    _WHAT[args.what](args)


def measure_generation(args: flags.FlagValues) -> None:
    """FID and its kin, of new samples or of those given."""
    extractor = _extractor(args)
    if args.samples:
        images = open_images(args.samples)
        reference = _reference(args, extractor)
        folder = _output(args)
        found = extract(images, extractor, progress=_first())
        facts = {"samples": found.count, "samples_from": images.path.name} | {
            "samples_digest": found.digest
        }
    else:
        count = args.num_images or NUM_SAMPLES
        pipeline = load_pipeline(args)
        reference = _reference(args, extractor)
        settings = SamplingSettings.from_section(args.config.sampling)
        facts = generation.describe(
            pipeline, settings, count=count, policy=args.labels, seed=args.seed
        )
        folder = generation.sample_folder(_output(args), facts)
        images, labels = _sampled(args, pipeline, settings, folder, facts)
        if args.write_samples:
            _write_samples(folder / "samples.npz", images, labels)
        found = extract(images, extractor, progress=_first())
    if not _first():
        return
    scores = generation_scores(found, reference)
    said = remarks(scores, found, reference)
    facts = facts | reference.facts | dict(extractor.facts)
    _tell(folder / "generation.json", scores, facts, said)


def _sampled(
    args: flags.FlagValues,
    pipeline: Pipeline,
    settings: SamplingSettings,
    folder: epath.Path,
    facts: dict[str, Any],
) -> tuple[ImageSet, np.ndarray]:
    labels = generation.make_labels(
        args.labels, facts["samples"], facts["label_classes"], args.seed
    )
    with runner.locked(str(folder)):
        indices = generation.draw(
            pipeline,
            folder,
            labels,
            settings,
            seed=args.seed,
            batch_size=args.config.sampling.batch_size,
            progress=_first(),
        )
    return generation.decoded_images(pipeline.codec, indices, folder, facts), labels


def _write_samples(path: epath.Path, images: ImageSet, labels: np.ndarray) -> None:
    if not _first():
        return
    shape = (images.count, *images.shape)
    write_images(path, images.batches(64, 0, images.count), shape, labels)
    print(f"wrote {path}")


def measure_reference(args: flags.FlagValues) -> None:
    """Statistics of real images, for others to be compared with."""
    extractor = _extractor(args)
    images = open_images(args.samples) if args.samples else data_images(args.config, args.split)
    if args.num_images:
        images.count = min(images.count, args.num_images)
    reference = reference_of(images, extractor, progress=_first())
    path = (
        _output(args) / f"reference_{Path(args.samples).stem if args.samples else args.split}.npz"
    )
    if _first():
        save_reference(path, reference, extractor)
        print(report.table({}, reference.facts | dict(extractor.facts)))
        print(f"wrote {path}")


def load_pipeline(args: flags.FlagValues) -> Pipeline:
    """The workdir's, on the config's mesh."""
    mesh = parallel.make_mesh(**args.config.mesh)
    return Pipeline.load(args.workdir, step=args.step, mesh=mesh)


def _extractor(args: flags.FlagValues) -> Extractor:
    return make_extractor(
        args.features or args.config.evaluation.features,
        networks_folder(args),
        batch_size=args.batch_size,
        precision=args.precision,
    )


def networks_folder(args: flags.FlagValues) -> Path:
    """Where imported networks are."""
    return Path(args.networks) if args.networks else networks.default_folder()


def _reference(args: flags.FlagValues, extractor: Extractor) -> Reference:
    path = args.reference or args.config.evaluation.reference
    if not path:
        raise UserError(
            "name what to compare with: --reference FILE (statistics, .npz or a folder of "
            f"pictures), or --reference {OF_DATA} for the config's training images"
        )
    return find_reference(path, args.config, extractor, progress=_first())


def _output(args: flags.FlagValues) -> epath.Path:
    return epath.Path(args.output or epath.Path(args.workdir) / "evaluation")


def _tell(
    path: epath.Path, metrics: dict[str, Any], facts: dict[str, Any], said: Sequence[str] = ()
) -> None:
    report.write(path, metrics, facts, said)
    print(report.table(metrics, facts, said))
    print(f"wrote {path}")


def _first() -> bool:
    return jax.process_index() == 0


_WHAT: dict[str, Callable[[flags.FlagValues], None]] = {
    "generation": measure_generation,
    "reference": measure_reference,
}

if __name__ == "__main__":
    sys.exit(runner.run("evaluate", sys.argv[1:]))
