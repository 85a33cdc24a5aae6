"""Measures samples, reconstructions, likelihoods and tokens.

  tokenbridge evaluate generation --workdir W --reference VIRTUAL_imagenet256_labeled.npz
  tokenbridge evaluate generation --images samples.npz --reference real/ --output scores
  tokenbridge evaluate features --samples fake.npz --reference real.npz --output scores
  tokenbridge evaluate reconstruction|likelihood|tokens|reference --workdir W

  generation      FID or FD_DINOv2, sFID, IS, KID, precision and recall of new samples, or of
                  --images
  features        Frechet distance, KID, precision and recall of features computed elsewhere
  reconstruction  rFID, PSNR, SSIM and LPIPS of reconstructed images, with continuous latents and
                  with several numbers of levels and ranges; pFID of perturbed indices
  likelihood      bits per index and per pixel of held-out images; calibration of the head
  tokens          entropies, Zipf's law and mutual information of the token shards
  reference       statistics of the config's images, or of --images, to use as --reference

The command prints a table and writes JSON and pictures to WORKDIR/evaluation. `tokenbridge evaluate
WORD --help` lists the flags of a word. If `generation` is stopped, the same command continues it.
Inception, DINOv2 and LPIPS need weights: see `tokenbridge import-metrics --help`.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from etils import epath

from tokenbridge_jax.autoencoder import AutoencoderConfig, load_autoencoder, read_description
from tokenbridge_jax.codec import Codec
from tokenbridge_jax.commands import runner
from tokenbridge_jax.commands.evaluate_flags import FLAGS, NUM_SAMPLES
from tokenbridge_jax.commands.evaluate_flags import define_flags as define_flags
from tokenbridge_jax.commands.trained import load_pipeline
from tokenbridge_jax.config import sampling_settings
from tokenbridge_jax.data.shards import read_info
from tokenbridge_jax.data.tokenizing import quantizer_of
from tokenbridge_jax.evaluation import (
    feature_files,
    generation,
    likelihood,
    networks,
    reconstruction,
    report,
    scores,
    tokens,
)
from tokenbridge_jax.evaluation.features import Extractor, extract
from tokenbridge_jax.evaluation.image_sets import ImageSet, data_images, open_images, write_images
from tokenbridge_jax.evaluation.scores import OF_DATA, Reference
from tokenbridge_jax.evaluation.variants import perturbation, sweep
from tokenbridge_jax.pipeline import Pipeline
from tokenbridge_jax.pipeline.description import MODEL_FILE, ModelDescription
from tokenbridge_jax.quantizer import Codebook, Quantizer, Unquantized
from tokenbridge_jax.runtime import checks, meshes, pictures, processes, storage
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.progress import say

# How many samples `samples.png` shows.
IN_GRID = 100

# Flags that apply to new samples only, so not together with --images.
_OF_SAMPLING = ("labels", "seed", "step", "write_samples")


def main(args: flags.FlagValues, word: str) -> None:
    """Measures what `word` names, writes JSON and prints the table."""
    _check(args, word)
    storage.check_folder(_output(args))
    _MEASURES[word](args)


def _check(args: flags.FlagValues, word: str) -> None:
    if args.num_images is not None:
        checks.at_least("--num_images", args.num_images, 2 if "features" in args else 1)
    if "seed" in args:
        checks.seed(args.seed, "--seed")
    if args.workdir and not epath.Path(args.workdir).exists():
        raise UserError(f"workdir {args.workdir} does not exist; check --workdir")
    if word == "features":
        if not (args.samples and args.reference and (args.output or args.workdir)):
            raise UserError("name files and a folder: --samples FILE --reference FILE --output DIR")
        return
    alone = word in ("generation", "reference") and args.images and args.output
    if not (args.workdir or alone):
        raise UserError(
            "--workdir is not set; name the folder to work in (to score images alone: "
            "tokenbridge evaluate generation --images FILE --reference FILE --output DIR)"
        )
    path = _reference_path(args) if "reference" in args else ""
    if word == "generation" and (not path or (path == OF_DATA and not args.workdir)):
        raise UserError(
            "name what to compare with: --reference FILE (statistics, .npz or a folder of "
            f"pictures), or --reference {OF_DATA} for the training images of a --workdir's config"
        )
    named = "reference" in args and args.reference and path != OF_DATA
    if named and not Path(path).exists():
        raise UserError(
            f"--reference {path} does not exist; it takes statistics (.npz), images (.npz or a "
            f"folder) or '{OF_DATA}', the config's training images"
        )
    for name in _OF_SAMPLING if word == "generation" and args.images else ():
        if args[name].present:
            raise UserError(f"--{name} applies to new samples: remove it, or remove --images")


def measure_generation(args: flags.FlagValues) -> None:
    """FID and related metrics of new samples, or of --images."""
    extractor = _extractor(args)
    source = _images(args) if args.images else load_pipeline(args)
    reference = _reference(args, extractor)
    images = source if isinstance(source, ImageSet) else _samples(args, source)
    found = extract(images, extractor, progress=True)
    facts: dict[str, Any] = {"samples": found.count}
    if args.images:
        facts |= {"samples_from": images.path.name, "samples_digest": found.digest}
    facts |= {**images.facts, **reference.facts, **extractor.facts}
    if _first():
        metrics = scores.generation_scores(found, reference, extractor.distance)
        notes = scores.remarks(metrics, found, reference, facts)
        _report(args, "generation", metrics, facts, notes)


def measure_features(args: flags.FlagValues) -> None:
    """The metrics of generation for features that another program computed."""
    _report(args, "features", *feature_files.compare(args.samples, args.reference, args.num_images))


def _samples(args: flags.FlagValues, pipeline: Pipeline) -> ImageSet:
    """New samples; those that an earlier call drew are read."""
    settings = sampling_settings(args.config.sampling)
    classes = len(pipeline.description.class_names)
    policy = {"label_policy": args.labels, "label_classes": classes}
    facts = generation.describe(pipeline, settings, labels=policy, seed=args.seed)
    folder = generation.sample_folder(_output(args), facts)
    count = args.num_images or NUM_SAMPLES
    labels = generation.make_labels(args.labels, count, classes, args.seed)
    size = args.config.sampling.batch_size
    with runner.locked(str(folder)):
        indices = generation.draw(
            pipeline, folder, labels, settings, seed=args.seed, batch_size=size
        )
    images = generation.decoded_images(pipeline.codec, indices, folder, facts)
    if _first():
        shown = next(images.batches(IN_GRID, 0, min(IN_GRID, count)))
        pictures.write_png(folder / "samples.png", pictures.grid(shown, columns=10))
        print(f"wrote {folder / 'samples.png'}")
        if args.write_samples:
            path = folder / "samples.npz"
            write_images(path, images, labels)
            print(f"wrote {path}")
    # Next, the devices compute together, and they wait for each other only for a limited time.
    processes.gather("written")
    return images


def _images(args: flags.FlagValues, *splits: str) -> ImageSet:
    """The images of --images, or of the first of these splits that the config's data has."""
    if args.images:
        images = open_images(args.images)
    else:
        images = data_images(args.config, *splits, tokens=_tokens(args))
    if args.num_images and args.num_images > images.count:
        say(f"{images.path} has only {images.count} images")
    images.take(args.num_images or images.count)
    return images


def measure_reference(args: flags.FlagValues) -> None:
    """Writes statistics of real images, to compare samples with."""
    extractor = _extractor(args)
    name = Path(args.images).stem if args.images else args.split or "train"
    path = _output(args) / f"reference_{name}_{extractor.name}.npz"
    storage.check_name(path.name)
    images = _images(args, args.split or "train")
    reference = scores.reference_of(images, extractor, progress=True)
    if _first():
        scores.save_reference(path, reference, extractor)
        print(report.table({}, reference.facts | dict(extractor.facts)))
        print(f"wrote {path}")


def _quantizer(description: ModelDescription) -> Quantizer | Codebook:
    """The quantizer of a model of indices; an error for a model of latents."""
    config = description.config
    if isinstance(config.quantizer, Unquantized):
        raise UserError(
            f"model.head='{config.head}' draws latents: it has no quantizer and no likelihood of "
            "indices; `evaluate generation` scores its samples"
        )
    return config.quantizer


def measure_reconstruction(args: flags.FlagValues) -> None:
    """The loss of quality by the autoencoder and the quantizer: the paper's Table 1."""
    workdir = epath.Path(args.workdir)
    trained = (workdir / MODEL_FILE).exists()
    own = _quantizer(ModelDescription.load(workdir)) if trained else None
    config, params = load_autoencoder(workdir / "autoencoder")
    quantizer = own or quantizer_of(args.config, config, params)
    swept = _swept(args, config, quantizer)
    extractor = _extractor(args)
    codec = Codec(config, params, quantizer, meshes.make_mesh(devices=jax.local_devices()))
    images = _images(args, *([args.split] if args.split else ["validation", "train"]))
    reference = _reference(args, extractor) if args.reference else None
    perceptual = networks.load_lpips(_networks(args), min(images.shape[:2]))
    variants = sweep(
        quantizer,
        _parse("levels", swept["levels"], int, "numbers"),
        _parse("ranges", swept["ranges"], float, "numbers"),
        _parse("perturb", swept["perturb"], perturbation, "SHARE:LEVELS, such as 0.1:4"),
    )
    found = reconstruction.reconstruction(
        codec,
        images,
        variants,
        extractor=extractor,
        reference=reference and reference.pool,
        perceptual={name: network.params for name, network in perceptual.items()},
        posterior=args.posterior,
        seed=args.seed,
        progress=True,
    )
    facts = {
        "autoencoder_sha256": read_description(workdir / "autoencoder")["hash"],
        "quantizer": quantizer.description,
        "sweep": list(swept.values()),
        "images_from": images.path.name,
        **images.facts,
        **(reference.facts if reference else {}),
        **extractor.facts,
        "rounding": generation.ROUNDING,
    }
    for network in perceptual.values():
        facts |= network.facts
    _report(args, "reconstruction", found, facts, module=reconstruction)


def _swept(
    args: flags.FlagValues, autoencoder: AutoencoderConfig, quantizer: Quantizer | Codebook
) -> dict[str, list[str]]:
    """The values of --levels, --ranges and --perturb; none where they make no sense.

    Raises:
      UserError: the user gives such a flag.
    """
    names = "levels", "ranges", "perturb"
    senseless = {}
    if autoencoder.codebook is not None:
        senseless = dict.fromkeys(names[:2], "it has the levels that it was trained with")
    if not quantizer.has_order:
        senseless["perturb"] = "the numbers of its codes have no order"
    for name, reason in senseless.items():
        if args[name].present and args[name].value:
            raise UserError(
                f"--{name} does not suit a trained codebook ({autoencoder.bottleneck}): {reason}; "
                f"leave out --{name}"
            )
    return {name: [] if name in senseless else getattr(args, name) for name in names}


def _parse(name: str, texts: list[str], kind: Callable[[str], Any], form: str) -> list[Any]:
    """The values of a flag that is a list."""
    try:
        return [kind(text) for text in texts]
    except ValueError:
        raise UserError(f"--{name}={','.join(texts)} must be {form}") from None


def measure_likelihood(args: flags.FlagValues) -> None:
    """Likelihood of held-out images, and calibration of the head."""
    pipeline = load_pipeline(args)
    _quantizer(pipeline.description)  # Before the look for shards.
    folder = _tokens(args)
    found = likelihood.likelihood(
        pipeline,
        folder,
        num_iter=args.config.sampling.num_iter,
        order=args.config.sampling.order,
        num_orders=args.num_orders,
        seed=args.seed,
        split=args.split or None,
        max_images=args.num_images,
        batch_size=args.config.sampling.batch_size,
        progress=True,
    )
    facts = {
        "checkpoint_step": pipeline.step,
        "weights": "EMA",
        "weights_sha256": generation.weights_sha256(pipeline.params, pipeline.step),
        "autoencoder_sha256": pipeline.description.autoencoder_hash,
        "tokens_sha256": read_info(folder).sha256,
    }
    notes = [found.pop("classes")] if "classes" in found else []
    _report(args, "likelihood", found, facts, notes, module=likelihood)


def measure_tokens(args: flags.FlagValues) -> None:
    """Statistics of the indices in the token shards."""
    folder, split = _tokens(args), args.split or "train"
    found = tokens.token_statistics(
        folder, split, all_views=args.all_views, max_images=args.num_images, progress=True
    )
    info = read_info(folder)
    assert not isinstance(info.quantizer, Unquantized)
    facts = {"tokens_sha256": info.sha256, "quantizer": info.quantizer.description}
    facts["autoencoder_sha256"] = info.autoencoder_hash
    _report(args, "tokens", found, facts, module=tokens)


def _extractor(args: flags.FlagValues) -> Extractor:
    return networks.make_extractor(
        args.features or (args.config.evaluation.features if args.workdir else "inception"),
        _networks(args),
        batch_size=args.batch_size,
        precision=args.precision,
    )


def _networks(args: flags.FlagValues) -> Path | None:
    return Path(args.networks) if args.networks else networks.default_folder()


def _reference_path(args: flags.FlagValues) -> str:
    """--reference, or the reference that the workdir's config names, or neither."""
    return args.reference or (args.workdir and args.config.evaluation.reference) or ""


def _reference(args: flags.FlagValues, extractor: Extractor) -> Reference:
    path, folder = _reference_path(args), _tokens(args)
    return scores.find_reference(path, args.config, extractor, tokens=folder, progress=True)


def _tokens(args: flags.FlagValues) -> epath.Path:
    """The folder of token shards; only used with --workdir."""
    return epath.Path(args.workdir or ".") / "tokens"


def _output(args: flags.FlagValues) -> epath.Path:
    return epath.Path(args.output or epath.Path(args.workdir) / "evaluation")


def _report(
    args: flags.FlagValues,
    word: str,
    found: dict[str, Any],
    facts: dict[str, Any],
    notes: Sequence[str] = (),
    module: Any = None,
) -> None:
    """Prints a result, and writes it to a folder named by a hash of everything it depends on.

    `module`, if given, has a `table` and a `plot` of it. Only the first process does anything.
    """
    if not _first():
        return
    if module:
        print(module.table(found))
    # Floats, lists and dicts are measurements; everything else is a setting.
    metrics = {name: x for name, x in found.items() if isinstance(x, float | dict | list)}
    facts = {name: x for name, x in found.items() if name not in metrics} | facts
    folder = _output(args) / f"{word}_{generation.short_hash(facts)}"
    report.write(folder / "result.json", metrics, facts, notes)
    single = {name: value for name, value in metrics.items() if isinstance(value, float)}
    print(report.table(single, facts, notes))
    for path in [folder / "result.json", *(module.plot(found, folder) if module else [])]:
        print(f"wrote {path}")


def _first() -> bool:
    return jax.process_index() == 0


# For every word, the function that measures.
_MEASURES: dict[str, Callable[[flags.FlagValues], None]] = {
    "generation": measure_generation,
    "features": measure_features,
    "reconstruction": measure_reconstruction,
    "likelihood": measure_likelihood,
    "tokens": measure_tokens,
    "reference": measure_reference,
}
WORDS = tuple(FLAGS)

if __name__ == "__main__":
    sys.exit(runner.main(["evaluate", *sys.argv[1:]]))
