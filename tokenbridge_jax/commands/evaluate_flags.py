"""The flags of `evaluate`: those of all its words, and those of each."""

from typing import Any

from absl import flags

from tokenbridge_jax.commands.arguments import define_path
from tokenbridge_jax.evaluation import feature_files, generation, inception, networks
from tokenbridge_jax.evaluation.scores import OF_DATA

# The number of samples that published figures use.
NUM_SAMPLES = 50_000

_REFERENCE = (
    f"What to compare with: statistics (.npz), images (.npz or a folder), or '{OF_DATA}' for the "
    "config's training images"
)


def define_flags(flag_values: flags.FlagValues, word: str | None) -> None:
    """Adds the flags of a word; without a word, the flags that all words share."""
    define_path("output", "Folder to write to, instead of WORKDIR/evaluation.", flag_values)
    text = f"Number of images; by default all images, or {NUM_SAMPLES:,} new samples."
    _define(flag_values, "num_images", None, text)
    if word is not None:
        FLAGS[word](flag_values)


def _define(values: flags.FlagValues, name: str, default: Any, text: str, *choices: str) -> None:
    """Adds a flag whose type is that of its default; None stands for an integer."""
    if choices:
        flags.DEFINE_enum(name, default, choices, text, flag_values=values)
        return
    kinds: Any = {str: flags.DEFINE_string, bool: flags.DEFINE_bool, list: flags.DEFINE_list}
    kinds.get(type(default), flags.DEFINE_integer)(name, default, text, flag_values=values)


def _generation_flags(values: flags.FlagValues) -> None:
    _feature_flags(values, "samples to score, instead of new samples")
    define_path("reference", f"{_REFERENCE}; by default config.evaluation.reference.", values)
    text = "Classes of new samples: every class equally often, or random classes."
    _define(values, "labels", "balanced", text, *generation.LABEL_POLICIES)
    _checkpoint_flags(values)
    _define(values, "write_samples", False, "Write samples.npz for ADM's evaluator.")


def _features_flags(values: flags.FlagValues) -> None:
    text = f"in an .npz: floats [images, features], named {' or '.join(feature_files.ARRAYS)}."
    define_path("samples", f"Features of generated images {text}", values)
    define_path("reference", f"Features of real images {text}", values)


def _reconstruction_flags(values: flags.FlagValues) -> None:
    _feature_flags(values, "images to reconstruct, instead of the config's")
    define_path("reference", f"{_REFERENCE}, in addition to the originals.", values)
    _split_flag(values, "the held-out split if there is one")
    _define(values, "seed", 0, "Determines all random numbers.")
    _define(values, "levels", ["8", "16", "32", "64"], "Numbers of levels to compare.")
    _define(values, "ranges", ["2", "3", "4", "5"], "Ranges of latents to compare.")
    text = "SHARE:LEVELS for pFID: the share of indices to move, and by how many levels at most."
    _define(values, "perturb", ["0.1:1", "0.1:4", "0.5:4"], text)
    text = "What to encode: a sample of the posterior, or its mean."
    _define(values, "posterior", "sample", text, "sample", "mean")


def _likelihood_flags(values: flags.FlagValues) -> None:
    _split_flag(values, "the held-out split if there is one")
    _checkpoint_flags(values)
    _define(values, "num_orders", 1, "Number of random orders per image; the result is their mean.")


def _tokens_flags(values: flags.FlagValues) -> None:
    _split_flag(values, "the training split")
    _define(values, "all_views", False, "Count all views of an image, not only the first.")


def _reference_flags(values: flags.FlagValues) -> None:
    _feature_flags(values, "images to compute the statistics of, instead of the config's")
    _split_flag(values, "the training split")


def _feature_flags(values: flags.FlagValues, images: str) -> None:
    define_path("images", f"A folder or an .npz of {images}.", values)
    text = (
        "Features to compare: Inception's, DINOv2's, or means over an 8 x 8 grid, which need no "
        "weights. By default config.evaluation.features, or inception without --workdir."
    )
    _define(values, "features", None, text, *networks.FEATURES)
    text = "Precision of the network's products: see docs/evaluation.md."
    _define(values, "precision", "high", text, *inception.PRECISIONS)
    text = "Images per batch of the network in a process; by default 64 per accelerator."
    _define(values, "batch_size", None, text)
    define_path("networks", "Folder that `tokenbridge import-metrics` wrote to.", values)


def _checkpoint_flags(values: flags.FlagValues) -> None:
    _define(values, "step", None, "Step of the checkpoint; by default the latest.")
    _define(values, "seed", 0, "Determines all random numbers.")


def _split_flag(values: flags.FlagValues, default: str) -> None:
    _define(values, "split", "", f"Split of the data; by default {default}.")


# For every word, the function that adds its flags.
FLAGS = {
    "generation": _generation_flags,
    "features": _features_flags,
    "reconstruction": _reconstruction_flags,
    "likelihood": _likelihood_flags,
    "tokens": _tokens_flags,
    "reference": _reference_flags,
}
