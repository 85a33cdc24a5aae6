"""Measures what a workdir holds: WORKDIR -> WORKDIR/evaluation and a table.

  tokenbridge evaluate --workdir W --what generation --reference VIRTUAL_imagenet256_labeled.npz
  tokenbridge evaluate --workdir W --what reconstruction
  tokenbridge evaluate --workdir W --what likelihood
  tokenbridge evaluate --workdir W --what tokens
  tokenbridge evaluate --what generation --images samples.npz --reference real/ --output scores
  tokenbridge evaluate --workdir W --what reference

generation: samples 50,000 images (or takes --images: a folder or an .npz with arr_0) and compares
them with --reference: FID, sFID, IS, KID, precision, recall. Stopped, it goes on where it was.
reconstruction: images through the autoencoder, continuous and at several levels and ranges: rFID,
PSNR, SSIM, LPIPS; pFID of perturbed indices. likelihood: bits an index and a pixel of held-out
images, and the head's calibration. tokens: entropies, Zipf's law, mutual information of the shards.
reference: statistics of the config's images (or of --images), for --reference.

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

from tokenbridge_jax import parallel, processes
from tokenbridge_jax.autoencoder import load_autoencoder, read_description
from tokenbridge_jax.codec import Codec
from tokenbridge_jax.commands import runner
from tokenbridge_jax.data.shards import read_info
from tokenbridge_jax.errors import UserError
from tokenbridge_jax.evaluation import (
    generation,
    inception,
    likelihood,
    lpips,
    networks,
    reconstruction,
    report,
    tokens,
)
from tokenbridge_jax.evaluation.features import Extractor, extract
from tokenbridge_jax.evaluation.images import ImageSet, data_images, open_images, write_images
from tokenbridge_jax.evaluation.networks import FEATURES, load_network, make_extractor
from tokenbridge_jax.evaluation.scores import (
    OF_DATA,
    Reference,
    find_reference,
    generation_scores,
    reference_of,
    remarks,
    save_reference,
)
from tokenbridge_jax.pipeline import MODEL_FILE, ModelDescription, Pipeline
from tokenbridge_jax.schedule import SamplingSettings
from tokenbridge_jax.tokenizing import make_quantizer, make_subsets

NEEDS_WORKDIR = False

# What needs no workdir.
OF_IMAGES = ("generation", "reference")

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
    define("string", "images", None, "Images to score, in place of new samples.")
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
    define(
        "string",
        "split",
        None,
        "Of the config's images and the token shards: by default the training split for reference "
        "and tokens, the held-out one (if there is one) for reconstruction and likelihood.",
    )
    define("list", "levels", ["8", "16", "32", "64"], "Numbers of levels to reconstruct from.")
    define("list", "ranges", ["2", "3", "4", "5"], "Ranges of latents to reconstruct from.")
    define(
        "list",
        "perturb",
        ["0.1:1", "0.1:4", "0.5:4"],
        "pFID: the share of the indices that is moved, and by up to how many levels.",
    )
    flags.DEFINE_enum(
        "posterior",
        "sample",
        ["sample", "mean"],
        "What is reconstructed: a draw from the autoencoder's posterior, or its mean.",
        flag_values=flag_values,
    )
    define("integer", "num_orders", 1, "Random orders an image's likelihood is averaged over.")
    define("bool", "all_views", False, "Count all views of an image in tokens, not the first.")
    define("string", "output", None, "Folder to write to in place of WORKDIR/evaluation.")


def _define(flag_values: flags.FlagValues, kind: str, name: str, default: Any, text: str) -> None:
    kinds: dict[str, Callable[..., Any]] = {
        "string": flags.DEFINE_string,
        "integer": flags.DEFINE_integer,
        "bool": flags.DEFINE_bool,
        "list": flags.DEFINE_list,
    }
    kinds[kind](name, default, text, flag_values=flag_values)


def main(args: flags.FlagValues) -> None:
    """Measures, writes JSON and prints the table."""
    if args.what is None:
        raise UserError(f"say what to measure: --what {'|'.join(_WHAT)}")
    if args.num_images is not None and args.num_images < 1:
        raise UserError(f"--num_images={args.num_images} must be at least 1")
    if not args.workdir and not (args.what in OF_IMAGES and args.images and args.output):
        raise UserError(
            "--workdir is not set; name the folder to work in (images alone are scored with "
            "--images and --output)"
        )
    if args.workdir and not epath.Path(args.workdir).exists():
        raise UserError(f"workdir {args.workdir} does not exist; check --workdir")
    _WHAT[args.what](args)


def measure_generation(args: flags.FlagValues) -> None:
    """FID and its kin, of new samples or of those given."""
    extractor = _extractor(args)
    if args.images:
        images = open_images(args.images)
        images.take(args.num_images or images.count)
        reference = _reference(args, extractor)
        folder = _output(args)
        found = extract(images, extractor, progress=_first())
        facts = {
            "samples": found.count,
            "samples_from": images.path.name,
            "samples_digest": found.digest,
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
    if _first():
        shape = (images.count, *images.shape)
        write_images(path, images.batches(64, 0, images.count), shape, labels)
        print(f"wrote {path}")
    # What comes next the devices do together, and they do not wait for as long as this can take.
    processes.gather("written")


def measure_reference(args: flags.FlagValues) -> None:
    """Statistics of real images, for others to be compared with."""
    extractor = _extractor(args)
    split = args.split or "train"
    images = open_images(args.images) if args.images else data_images(args.config, split)
    images.take(args.num_images or images.count)
    reference = reference_of(images, extractor, progress=_first())
    path = _output(args) / f"reference_{Path(args.images).stem if args.images else args.split}.npz"
    if _first():
        save_reference(path, reference, extractor)
        print(report.table({}, reference.facts | dict(extractor.facts)))
        print(f"wrote {path}")


def load_pipeline(args: flags.FlagValues) -> Pipeline:
    """The workdir's, on the config's mesh."""
    mesh = parallel.make_mesh(**args.config.mesh)
    return Pipeline.load(args.workdir, step=args.step, mesh=mesh)


def measure_reconstruction(args: flags.FlagValues) -> None:
    """What the autoencoder and the quantizer cost: the paper's Table 1."""
    workdir = epath.Path(args.workdir)
    extractor = _extractor(args)
    reference = _reference(args, extractor) if args.reference else None
    config, params = load_autoencoder(workdir / "autoencoder")
    trained = (workdir / MODEL_FILE).exists()
    quantizer = (
        ModelDescription.load(workdir).config.quantizer if trained else make_quantizer(args.config)
    )
    codec = Codec(config, params, quantizer, parallel.make_mesh(devices=jax.local_devices()))
    images = open_images(args.images) if args.images else data_images(args.config, _split(args))
    images.take(args.num_images or images.count)
    perceptual = {name: load_network(f"lpips_{name}", _networks(args)) for name in lpips.NETWORKS}
    found = reconstruction.reconstruction(
        codec,
        images,
        reconstruction.sweep(
            quantizer,
            _numbers("levels", args.levels, int),
            _numbers("ranges", args.ranges, float),
            [_perturbation(text) for text in args.perturb],
        ),
        extractor=extractor,
        reference=reference and reference.pool,
        perceptual={name: network.params for name, network in perceptual.items() if network},
        posterior=args.posterior,
        seed=args.seed,
        progress=_first(),
    )
    facts = {
        "autoencoder_sha256": read_description(workdir / "autoencoder")["hash"],
        "posterior": args.posterior,
        "seed": args.seed,
        "images": images.count,
        "images_from": images.path.name,
        **images.facts,
        **(reference.facts if reference else {}),
        **extractor.facts,
        "rounding": generation.ROUNDING,
    }
    for network in filter(None, perceptual.values()):
        facts |= network.facts
    folder = _output(args)
    if _first():
        shown = [name for name in found["rows"][0] if any(row[name] for row in found["rows"])]
        print(report.columns([{name: row[name] for name in shown} for row in found["rows"]]))
        _tell(folder / "reconstruction.json", found, facts)
        _list(reconstruction.plot(found, folder))


def _numbers(name: str, texts: list[str], kind: type) -> list[Any]:
    try:
        return [kind(text) for text in texts]
    except ValueError:
        raise UserError(f"--{name}={','.join(texts)} must be numbers") from None


def _perturbation(text: str) -> tuple[float, int]:
    share, _, delta = text.partition(":")
    try:
        return float(share), int(delta)
    except ValueError:
        raise UserError(f"--perturb={text} must be SHARE:LEVELS, 0.1:4 say") from None


def measure_likelihood(args: flags.FlagValues) -> None:
    """Bits of held-out images, and whether the head's confidence is right."""
    pipeline, folder = load_pipeline(args), epath.Path(args.workdir) / "tokens"
    found = likelihood.likelihood(
        pipeline,
        folder,
        num_iter=args.config.sampling.num_iter,
        order=args.config.sampling.order,
        num_orders=args.num_orders,
        seed=args.seed,
        split=args.split,
        max_images=args.num_images,
        batch_size=args.config.sampling.batch_size,
        progress=_first(),
    )
    facts = {
        "checkpoint_step": pipeline.step,
        "weights": "EMA",
        "weights_sha256": generation.weights_sha256(pipeline.params, pipeline.step),
        "autoencoder_sha256": pipeline.description.autoencoder_hash,
        "tokens_sha256": read_info(folder).sha256,
    }
    folder = _output(args)
    if _first():
        print(likelihood.table(found))
        _tell(folder / "likelihood.json", found, facts)
        _list(likelihood.plot(found, folder))


def measure_tokens(args: flags.FlagValues) -> None:
    """What the indices of the shards are like."""
    folder = epath.Path(args.workdir) / "tokens"
    found = tokens.token_statistics(
        folder,
        args.split or "train",
        all_views=args.all_views,
        max_images=args.num_images,
        progress=_first(),
    )
    facts = {"tokens_sha256": read_info(folder).sha256}
    folder = _output(args)
    if _first():
        print(tokens.table(found))
        _tell(folder / "tokens.json", found, facts)
        _list(tokens.plot(found, folder))


def _split(args: flags.FlagValues) -> str:
    """The split asked for, or the held-out one if there is one."""
    return args.split or ("validation" if "validation" in make_subsets(args.config) else "train")


def _extractor(args: flags.FlagValues) -> Extractor:
    return make_extractor(
        args.features or args.config.evaluation.features,
        _networks(args),
        batch_size=args.batch_size,
        precision=args.precision,
    )


def _networks(args: flags.FlagValues) -> Path:
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
    single = {name: value for name, value in metrics.items() if isinstance(value, float)}
    print(report.table(single, facts, said))
    print(f"wrote {path}")


def _list(paths: Sequence[epath.Path]) -> None:
    for path in paths:
        print(f"wrote {path}")


def _first() -> bool:
    return jax.process_index() == 0


_WHAT: dict[str, Callable[[flags.FlagValues], None]] = {
    "generation": measure_generation,
    "reconstruction": measure_reconstruction,
    "likelihood": measure_likelihood,
    "tokens": measure_tokens,
    "reference": measure_reference,
}

if __name__ == "__main__":
    sys.exit(runner.run("evaluate", sys.argv[1:]))
