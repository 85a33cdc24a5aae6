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

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from etils import epath

from tokenbridge_jax.autoencoder import load_autoencoder, read_description
from tokenbridge_jax.codec import Codec
from tokenbridge_jax.commands import runner
from tokenbridge_jax.commands.arguments import define_path
from tokenbridge_jax.config import sampling_settings
from tokenbridge_jax.data.shards import read_info
from tokenbridge_jax.data.tokenizing import make_quantizer
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
from tokenbridge_jax.evaluation.image_sets import ImageSet, data_images, open_images, write_images
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
from tokenbridge_jax.pipeline import Pipeline
from tokenbridge_jax.pipeline.description import MODEL_FILE, ModelDescription
from tokenbridge_jax.runtime import meshes, pictures, processes, storage
from tokenbridge_jax.runtime.errors import UserError

NEEDS_WORKDIR = False

# As published figures have it.
NUM_SAMPLES = 50_000

# Pictures of samples that `samples.png` shows.
IN_GRID = 100

# The flags that not every --what looks at, and which do.
_IMAGES = ("generation", "reconstruction", "reference")
_USED_BY = {
    "reference": ("generation", "reconstruction"),
    "images": _IMAGES,
    "labels": ("generation",),
    "seed": ("generation", "reconstruction", "likelihood"),
    "step": ("generation", "likelihood"),
    "features": _IMAGES,
    "precision": _IMAGES,
    "batch_size": _IMAGES,
    "networks": _IMAGES,
    "write_samples": ("generation",),
    "split": ("reconstruction", "likelihood", "tokens", "reference"),
    "levels": ("reconstruction",),
    "ranges": ("reconstruction",),
    "perturb": ("reconstruction",),
    "posterior": ("reconstruction",),
    "num_orders": ("likelihood",),
    "all_views": ("tokens",),
}
# Those of new samples, which --images takes the place of.
_OF_SAMPLING = ("labels", "seed", "step", "write_samples")


def define_flags(flag_values: flags.FlagValues) -> None:
    """Adds the flags of this command."""
    kinds: dict[str, Callable[..., Any]] = {
        "string": flags.DEFINE_string,
        "integer": flags.DEFINE_integer,
        "bool": flags.DEFINE_bool,
        "list": flags.DEFINE_list,
        "path": lambda name, _, text, flag_values: define_path(name, text, flag_values),
    }

    def define(kind: str, name: str, default: Any, text: str, values: Sequence[str] = ()) -> None:
        users = f" (--what {'|'.join(_USED_BY[name])})" if name in _USED_BY else ""
        if values:
            flags.DEFINE_enum(name, default, list(values), text + users, flag_values=flag_values)
        else:
            kinds[kind](name, default, text + users, flag_values=flag_values)

    define("enum", "what", None, "What to measure.", list(_WHAT))
    define(
        "path",
        "reference",
        None,
        f"What to compare with: statistics (.npz), images (.npz, a folder), or '{OF_DATA}', the "
        "config's training images. By default config.evaluation.reference.",
    )
    define(
        "path",
        "images",
        None,
        "A folder or an .npz: samples to score in place of new ones; images to reconstruct, or to "
        "make a reference of, in place of the config's.",
    )
    define(
        "integer",
        "num_images",
        None,
        f"How many images: by default {NUM_SAMPLES:,} new samples, of all else all there are.",
    )
    policies = generation.LABEL_POLICIES
    define("enum", "labels", "balanced", "Every class as often, or random draws.", policies)
    define("integer", "seed", 0, "Fixes all randomness.")
    define("integer", "step", None, "Which checkpoint; the latest by default.")
    define(
        "enum",
        "features",
        None,
        "Feature space: FID's network, or 8 x 8 area means, which need no weights. By default "
        "config.evaluation.features, and without --workdir inception.",
        FEATURES,
    )
    precisions = inception.PRECISIONS
    define("enum", "precision", "high", "Of convolutions: see docs/evaluation.md.", precisions)
    define(
        "integer",
        "batch_size",
        None,
        "Images at once in networks, over a process's devices; by default 64 an accelerator.",
    )
    define("path", "networks", None, "Folder of `tokenbridge import-metrics`.")
    define("bool", "write_samples", False, "Write samples.npz, as ADM's evaluator reads it.")
    define(
        "string",
        "split",
        None,
        "Of the config's images or the token shards; by default the training split for reference "
        "and tokens, for the others the held-out one if there is one.",
    )
    define("list", "levels", ["8", "16", "32", "64"], "Numbers of levels to reconstruct from.")
    define("list", "ranges", ["2", "3", "4", "5"], "Ranges of latents to reconstruct from.")
    define(
        "list",
        "perturb",
        ["0.1:1", "0.1:4", "0.5:4"],
        "pFID, SHARE:LEVELS: the share of the indices that is moved, by up to so many levels.",
    )
    posteriors = ["sample", "mean"]
    define("enum", "posterior", "sample", "A draw from it is encoded, or its mean.", posteriors)
    define("integer", "num_orders", 1, "Random orders an image's likelihood is averaged over.")
    define("bool", "all_views", False, "Count all views of an image, not only the first.")
    define("path", "output", None, "Folder to write to in place of WORKDIR/evaluation.")


def main(args: flags.FlagValues) -> None:
    """Measures, writes JSON and prints the table."""
    _check(args)
    _WHAT[args.what](args)


def _check(args: flags.FlagValues) -> None:
    if args.what is None:
        raise UserError(f"say what to measure: --what {'|'.join(_WHAT)}")
    for name, users in _USED_BY.items():
        if args[name].present and args.what not in users:
            raise UserError(f"--{name} is for --what {'|'.join(users)}, not for {args.what}")
    scored = args.what == "generation" and args.images
    for name in _OF_SAMPLING if scored else ():
        if args[name].present:
            raise UserError(f"--{name} is about new samples: leave it out, or leave out --images")
    fewest = 2 if args.what in _IMAGES else 1
    if args.num_images is not None and args.num_images < fewest:
        raise UserError(f"--num_images={args.num_images} must be at least {fewest}")
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch_size={args.batch_size} must be at least 1")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed={args.seed} must be from 0 to 2**32 - 1")
    path = args.reference
    if path and path != OF_DATA and not Path(path).exists():
        raise UserError(
            f"--reference {path} does not exist; it takes statistics (.npz), images (.npz or a "
            f"folder) or '{OF_DATA}', the config's training images"
        )
    if args.workdir:
        if not epath.Path(args.workdir).exists():
            raise UserError(f"workdir {args.workdir} does not exist; check --workdir")
    elif args.what not in ("generation", "reference") or not args.images or not args.output:
        raise UserError(
            "--workdir is not set; name the folder to work in (to score images alone: "
            "--what generation --images FILE --reference FILE --output DIR)"
        )
    elif path == OF_DATA or (not args.reference and args.what == "generation"):
        raise UserError(
            "name what to compare with: --reference FILE (statistics, .npz, or a folder of "
            f"pictures); '{OF_DATA}' are the images of a --workdir's config"
        )
    output = storage.check_folder(_output(args))
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage.write_error(output, error) from error


def measure_generation(args: flags.FlagValues) -> None:
    """FID and its kin, of new samples or of those given."""
    extractor = _extractor(args)
    if args.images:
        images = _images(args)
        reference = _reference(args, extractor)
        found = extract(images, extractor, progress=_first())
        facts = {
            "samples": found.count,
            "samples_from": images.path.name,
            "samples_digest": found.digest,
            **images.facts,
        }
    else:
        pipeline = load_pipeline(args)
        reference = _reference(args, extractor)
        images = _samples(args, pipeline)
        found = extract(images, extractor, progress=_first())
        facts = {"samples": found.count, **images.facts}
    if _first():
        scores = generation_scores(found, reference, extractor.distance)
        facts = facts | reference.facts | dict(extractor.facts)
        said = remarks(scores, found, reference, facts)
        _tell(args, scores, facts, said)


def _samples(args: flags.FlagValues, pipeline: Pipeline) -> ImageSet:
    """New samples, or those of an earlier call."""
    settings = sampling_settings(args.config.sampling)
    facts = generation.describe(pipeline, settings, policy=args.labels, seed=args.seed)
    folder = generation.sample_folder(_output(args), facts)
    count = args.num_images or NUM_SAMPLES
    labels = generation.make_labels(args.labels, count, facts["label_classes"], args.seed)
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
    images = generation.decoded_images(pipeline.codec, indices, folder, facts)
    if _first():
        shown = next(images.batches(IN_GRID, 0, min(IN_GRID, count)))
        pictures.write_png(folder / "samples.png", pictures.grid(shown, columns=10))
        print(f"wrote {folder / 'samples.png'}")
        if args.write_samples:
            batches = images.batches(64, 0, images.count)
            path = folder / "samples.npz"
            write_images(path, batches, (images.count, *images.shape), labels)
            print(f"wrote {path}")
    # What comes next the devices do together, and they do not wait for as long as this can take.
    processes.gather("written")
    return images


def _images(args: flags.FlagValues, *splits: str) -> ImageSet:
    """Those of --images, or of the config's data: of --split, or the first split there is."""
    chosen = (args.split,) if args.split else splits
    images = (
        open_images(args.images)
        if args.images
        else data_images(args.config, *chosen, tokens=_tokens(args))
    )
    if args.num_images and args.num_images > images.count and _first():
        print(f"{images.path} holds {images.count} images, no more", file=sys.stderr)
    images.take(args.num_images or images.count)
    return images


def measure_reference(args: flags.FlagValues) -> None:
    """Statistics of real images, for others to be compared with."""
    extractor = _extractor(args)
    name = Path(args.images).stem if args.images else args.split or "train"
    path = _output(args) / f"reference_{name}_{extractor.name}.npz"
    storage.check_name(path.name)
    images = _images(args, "train")
    reference = reference_of(images, extractor, progress=_first())
    if _first():
        save_reference(path, reference, extractor)
        print(report.table({}, reference.facts | dict(extractor.facts)))
        print(f"wrote {path}")


def load_pipeline(args: flags.FlagValues) -> Pipeline:
    """The workdir's, on the config's mesh."""
    mesh = meshes.make_mesh(**args.config.mesh)
    return Pipeline.load(args.workdir, step=args.step, mesh=mesh)


def measure_reconstruction(args: flags.FlagValues) -> None:
    """What the autoencoder and the quantizer cost: the paper's Table 1."""
    workdir = epath.Path(args.workdir)
    extractor = _extractor(args)
    config, params = load_autoencoder(workdir / "autoencoder")
    trained = (workdir / MODEL_FILE).exists()
    quantizer = (
        ModelDescription.load(workdir).config.quantizer if trained else make_quantizer(args.config)
    )
    codec = Codec(config, params, quantizer, meshes.make_mesh(devices=jax.local_devices()))
    images = _images(args, "validation", "train")
    reference = _reference(args, extractor) if args.reference else None
    networks = {name: load_network(f"lpips_{name}", _networks(args)) for name in lpips.NETWORKS}
    lpips_networks = {
        name: network
        for name, network in networks.items()
        if network and min(images.shape[:2]) >= lpips.SMALLEST[name]
    }
    variants = reconstruction.sweep(
        quantizer,
        _numbers("levels", args.levels, int),
        _numbers("ranges", args.ranges, float),
        [_perturbation(text) for text in args.perturb],
    )
    found = reconstruction.reconstruction(
        codec,
        images,
        variants,
        extractor=extractor,
        reference=reference and reference.pool,
        perceptual={name: network.params for name, network in lpips_networks.items()},
        posterior=args.posterior,
        seed=args.seed,
        progress=_first(),
    )
    facts = {
        "autoencoder_sha256": read_description(workdir / "autoencoder")["hash"],
        "levels": quantizer.levels,
        "range": quantizer.maximum,
        "sweep": [args.levels, args.ranges, args.perturb],
        "posterior": args.posterior,
        "seed": args.seed,
        "images_from": images.path.name,
        **images.facts,
        **(reference.facts if reference else {}),
        **extractor.facts,
        "rounding": generation.ROUNDING,
    }
    for network in lpips_networks.values():
        facts |= network.facts
    if _first():
        print(reconstruction.table(found))
        _tell(args, found, facts, plot=reconstruction.plot)


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
    if _first():
        print(likelihood.table(found))
        said = [found.pop("classes")] if "classes" in found else []
        _tell(args, found, facts, said, plot=likelihood.plot)


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
    if _first():
        print(tokens.table(found))
        info = read_info(folder)
        facts = {
            "tokens_sha256": info.sha256,
            "autoencoder_sha256": info.autoencoder_hash,
            "range": info.quantizer.maximum,
        }
        _tell(args, found, facts, plot=tokens.plot)


def _extractor(args: flags.FlagValues) -> Extractor:
    return make_extractor(
        args.features or (args.config.evaluation.features if args.workdir else "inception"),
        _networks(args),
        batch_size=args.batch_size,
        precision=args.precision,
    )


def _networks(args: flags.FlagValues) -> Path | None:
    return Path(args.networks) if args.networks else networks.default_folder()


def _reference(args: flags.FlagValues, extractor: Extractor) -> Reference:
    path = args.reference or args.config.evaluation.reference
    if not path:
        raise UserError(
            "name what to compare with: --reference FILE (statistics, .npz or a folder of "
            f"pictures), or --reference {OF_DATA} for the config's training images"
        )
    return find_reference(path, args.config, extractor, tokens=_tokens(args), progress=_first())


def _tokens(args: flags.FlagValues) -> epath.Path | None:
    return epath.Path(args.workdir) / "tokens" if args.workdir else None


def _output(args: flags.FlagValues) -> epath.Path:
    return epath.Path(args.output or epath.Path(args.workdir) / "evaluation")


def _tell(
    args: flags.FlagValues,
    found: dict[str, Any],
    facts: dict[str, Any],
    said: Sequence[str] = (),
    plot: Callable[[dict[str, Any], epath.Path], list[epath.Path]] | None = None,
) -> None:
    """Writes a result into a folder of its own, named by what it depends on, and prints it."""
    # What was measured comes first; the rest of what was found are settings.
    metrics = {name: x for name, x in found.items() if isinstance(x, float | dict | list)}
    facts = {name: x for name, x in found.items() if name not in metrics} | facts
    folder = _output(args) / f"{args.what}_{generation.short_hash(facts)}"
    report.write(folder / "result.json", metrics, facts, said)
    single = {name: value for name, value in metrics.items() if isinstance(value, float)}
    print(report.table(single, facts, said))
    for path in [folder / "result.json", *(plot(found, folder) if plot else [])]:
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
