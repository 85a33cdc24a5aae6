r"""Compares trained codebooks with quantizing a trained autoencoder: the paper's Figure 5.

It needs a workdir with an autoencoder, such as that of launch/cifar10.sh, and reconstructs its
validation pictures. Its own autoencoder is used as it is, and with its latents quantized to several
numbers of levels. Autoencoders with a codebook are trained with the settings of the run, for as
many updates. If the script is stopped, the same command continues.

  python launch/codebooks.py --run runs/cifar10 --workdir runs/codebooks
  python launch/codebooks.py --run runs/mar --workdir runs/mar-levels --autoencoders kl \
    --config.data.path=/data/pictures

It prints a table and writes WORKDIR/codebooks.md, codebooks.json and codebooks.png;
docs/codebooks.md explains them. `--config.section.key=value` changes the settings of the run. If
they are those of autoencoders, all are trained, the run's own again.
"""

import argparse
import dataclasses
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ablations import checked_settings, link, once, row_names, run_logged
from cifar10_classifier import Classifier, classifier
from cifar10_features import Extract, check_rgb, lite0
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict
from score_cifar10 import Pictures, read
from scripts import run_script

from tokenbridge_jax.autoencoder import load_autoencoder, read_description
from tokenbridge_jax.bottleneck import code_use
from tokenbridge_jax.codec import Codec, in_batches
from tokenbridge_jax.commands import arguments
from tokenbridge_jax.data.sources import make_subsets
from tokenbridge_jax.data.tokenizing import quantizer_of
from tokenbridge_jax.evaluation import figures, pixels
from tokenbridge_jax.evaluation.metrics import frechet_distance
from tokenbridge_jax.evaluation.moments import Gaussian, gaussian
from tokenbridge_jax.evaluation.variants import sweep
from tokenbridge_jax.quantizer import AnyQuantizer, Unquantized
from tokenbridge_jax.runtime import meshes, storage
from tokenbridge_jax.runtime.errors import UserError

# Name -> the settings in which an autoencoder differs from the run's.
AUTOENCODERS: dict[str, tuple[str, ...]] = {
    "kl": (),
    # 12 bits a position, as 4 levels of 6 channels have.
    "vq": (
        "autoencoder.bottleneck=vq",
        "autoencoder.codes=4096",
        "autoencoder.latent_channels=8",
    ),
    "lfq": ("autoencoder.bottleneck=lfq", "autoencoder.latent_channels=12"),
    "fsq": (
        "autoencoder.bottleneck=fsq",
        "autoencoder.levels=8",
        "autoencoder.latent_channels=4",
    ),
    # The bits of 64 levels of the run's channels.
    "fsq_64_levels": ("autoencoder.bottleneck=fsq", "autoencoder.levels=64"),
}
LEVELS = (4, 8, 16, 32, 64)  # Of kl, besides those of the run.
CONTINUOUS_BITS = 16  # Of a latent that is not quantized.
SHOWN = 12  # Pictures of every row.
BATCH = 250  # Of PSNR and SSIM, whose arrays are of float64.
STEPS = "--config.vae_training.steps="

# Measures of a row: name in the results -> heading and format.
MEASURES = {
    "psnr": ("PSNR, dB", ".2f"),
    "ssim": ("SSIM", ".4f"),
    "frechet_distance": ("Frechet distance", ".2f"),
    "accuracy": ("class accuracy", ".3f"),
    "bits": ("bits an image", ",.0f"),
    "codes_used": ("codes used", ",.0f"),
    "perplexity": ("perplexity", ",.0f"),
}


def main() -> int:
    """Trains and measures what has no result yet; prints and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", type=storage.local_path, required=True, help="a workdir with an autoencoder"
    )
    parser.add_argument(
        "--workdir", type=storage.local_path, required=True, help="of the comparison"
    )
    parser.add_argument(
        "--pictures", type=int, default=10_000, help="most that are reconstructed (%(default)s)"
    )
    parser.add_argument(
        "--autoencoders",
        default=",".join(AUTOENCODERS),
        help=f"{', '.join(AUTOENCODERS)}; all by default",
    )
    args, flags = parser.parse_known_args()
    names = row_names(parser, args.autoencoders, flags, AUTOENCODERS)
    if args.pictures < 2:
        parser.error(f"--pictures={args.pictures} must be 2 or more")
    if args.run.resolve() == args.workdir.resolve():
        parser.error("--workdir must be another folder than --run")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too.
    found = compare(args.run, args.workdir, names, args.pictures, flags)
    text = table(found)
    storage.write_json(args.workdir / "codebooks.json", found)
    storage.write_bytes(args.workdir / "codebooks.md", text.encode())
    draw(args.workdir, names, found["rows"])
    print(text, end="")
    return 0


def compare(
    run: Path, workdir: Path, names: Sequence[str], count: int, flags: Sequence[str]
) -> dict[str, Any]:
    """The results of the originals and of these autoencoders.

    Raises:
      UserError: the run has no autoencoder or no pictures, the folder has results of other
        settings, or a command failed.
    """
    config = run_config(run, *flags)
    kept = workdir / "comparison.json"
    settings = checked_settings(kept, {"run": run, "pictures": count, "flags": flags})
    workdir.mkdir(parents=True, exist_ok=True)
    known = run / "scores" / "classifier.npz"
    if known.exists() and not (workdir / known.name).exists():
        shutil.copy(known, workdir)  # Of other pictures, another one replaces the copy.
    originals = Originals.of(workdir, config, count)
    storage.write_json(kept, settings)
    storage.write_npz(workdir / "shown.npz", {"images": spread(originals.pictures.images)[None]})

    def of_autoencoder(name: str) -> dict[str, Any]:
        folder = workdir / name

        def make() -> dict[str, Any]:
            changes = [f"--config.{setting}" for setting in AUTOENCODERS[name]]
            make_autoencoder(run, folder, *changes, *flags)
            return measure(originals, config, folder, name)

        return once(folder / "result.json", make)

    found = [of_autoencoder(name) for name in names]
    return {
        "pictures": len(originals.pictures.labels),
        "split": originals.split,
        "updates": {name: one["updates"] for name, one in zip(names, found, strict=True)},
        "rows": [
            {"name": "originals", "accuracy": originals.accuracy(originals.pictures.images)},
            *(row for one in found for row in one["rows"]),
        ],
    }


# --- Autoencoders ---------------------------------------------------------------------------------


def run_config(run: Path, *flags: str) -> ConfigDict:
    """The config of a run, with changes.

    Raises:
      UserError: there is none, or a flag is wrong.
    """
    if not (run / arguments.CONFIG_FILE).exists():
        raise UserError(f"{run} has no {arguments.CONFIG_FILE}, so it is no workdir; check --run")
    return arguments.parse(
        "train-vae",
        [*flags, f"--workdir={run}"],
        lambda _: None,
        elsewhere={},
        default_config="base",
        needs_workdir=True,
    ).config


def make_autoencoder(run: Path, folder: Path, *flags: str) -> None:
    """Gives a folder the autoencoder of a run, or trains one there if flags change its settings.

    It is trained for as many updates as the run's own, unless a flag says how many.

    Raises:
      UserError: that number is not known, or training failed.
    """
    start_folder(run, folder)
    sections = "--config.autoencoder.", "--config.vae_training."
    if not any(flag.startswith(sections) for flag in flags):
        link(folder / "autoencoder", run / "autoencoder")
        return
    if not any(flag.startswith(STEPS) for flag in flags):
        updates = read_description(run / "autoencoder")["extra"].get("step")
        if updates is None:
            raise UserError(
                f"{run / 'autoencoder'} was not trained by train-vae, so others cannot be trained "
                f"for as many updates: set {STEPS}NUMBER"
            )
        flags = (f"{STEPS}{updates}", *flags)
    run_logged("train-vae", folder, *flags)


def start_folder(run: Path, folder: Path) -> None:
    """Makes a workdir with the config of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / arguments.CONFIG_FILE).exists():
        shutil.copy(run / arguments.CONFIG_FILE, folder / arguments.CONFIG_FILE)


# --- Measures -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Originals:
    """The pictures, and what their reconstructions are compared with.

    Attributes:
      pictures: of the validation split, or else of the training split.
      split: which of them.
      extract: pictures -> features.
      features: mean and covariance of those of the originals.
      judge: finds the class of a picture; None without a classifier.
    """

    pictures: Pictures
    split: str
    extract: Extract
    features: Gaussian
    judge: Classifier | None

    @classmethod
    def of(cls, workdir: Path, config: ConfigDict, count: int) -> "Originals":
        """At most `count` pictures, evenly spaced, and the classifier of `workdir` if it has one.

        Raises:
          UserError: there are none, or the network of the features is not installed.
        """
        check_rgb(config)
        extract, subsets = lite0(), make_subsets(config)
        split = "validation" if "validation" in subsets else "train"
        size = config.data.image_size
        pictures, judge = read(subsets[split].spread(count), size), None
        if (workdir / "classifier.npz").exists():
            judge = classifier(workdir, *read(subsets["train"], size))
        return cls(pictures, split, extract, gaussian(extract(pictures.images)), judge)

    def accuracy(self, images: UInt8[np.ndarray, "N H W 3"]) -> float | None:
        """The share in which the classifier finds the class of the original."""
        return self.judge and self.judge.accuracy(images, self.pictures.labels)

    def scores(self, images: UInt8[np.ndarray, "N H W 3"]) -> dict[str, float | None]:
        """Of reconstructions; PSNR and SSIM are means over the pictures."""

        def mean(of_pairs: Callable[..., Float[np.ndarray, " n"]]) -> float:
            parts = [slice(start, start + BATCH) for start in range(0, len(images), BATCH)]
            pairs = [of_pairs(self.pictures.images[part], images[part]) for part in parts]
            return float(np.concatenate(pairs).mean())

        return {
            "psnr": mean(pixels.psnr),
            "ssim": mean(pixels.ssim),
            "frechet_distance": frechet_distance(gaussian(self.extract(images)), self.features),
            "accuracy": self.accuracy(images),
        }


def measure(originals: Originals, config: ConfigDict, folder: Path, name: str) -> dict[str, Any]:
    """The rows of an autoencoder: one for each quantizer of its latents.

    Some reconstructions of each row are written to `folder`/shown.npz.
    """
    autoencoder, params = load_autoencoder(folder / "autoencoder")
    mesh = meshes.make_mesh(devices=jax.local_devices())
    codec = Codec(autoencoder, params, Unquantized(), mesh)
    own = quantizer_of(config, autoencoder, params)
    quantizers: dict[str, AnyQuantizer] = {name: own}
    if autoencoder.codebook is None:
        quantizers = {
            f"{name}, {v.quantizer.levels} levels" if v.quantizer else f"{name}, continuous": (
                v.quantizer or Unquantized()
            )
            for v in sweep(own, LEVELS, ranges=())
        }
    size = config.tokenize.batch_size
    latents = in_batches(
        lambda x: np.asarray(codec.encode(x).latents), originals.pictures.images, size
    )
    rows, shown = [], []
    for row, quantizer in quantizers.items():
        values = quantizer.quantize(latents)
        changed = np.asarray(quantizer.dequantize(values))
        images = in_batches(lambda x: np.asarray(codec.decode_latents(x)), changed, size)
        used = {key: float(value) for key, value in code_use(jnp.asarray(changed)).items()}
        bits = np.log2(quantizer.levels) if quantizer.levels else CONTINUOUS_BITS
        rows.append(
            {"name": row, "bits": values[0].size * float(bits)}
            | originals.scores(images)
            | (used if quantizer.levels else {})
        )
        shown.append(spread(images))
    storage.write_npz(folder / "shown.npz", {"images": np.stack(shown)})
    return {"updates": read_description(folder / "autoencoder")["extra"].get("step"), "rows": rows}


def spread(images: UInt8[np.ndarray, "N H W 3"]) -> UInt8[np.ndarray, "n H W 3"]:
    """Some of the pictures, evenly spaced."""
    return images[np.linspace(0, len(images) - 1, min(SHOWN, len(images))).astype(int)]


# --- Results --------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> str:
    """The results in Markdown."""
    headings = [heading for heading, _ in MEASURES.values()]
    lines = [f"| latents | {' | '.join(headings)} |", "|---" * (1 + len(headings)) + "|"]
    for row in found["rows"]:
        values = ((row.get(key), form) for key, (_, form) in MEASURES.items())
        cells = ("-" if value is None else format(value, form) for value, form in values)
        lines.append(f"| {' | '.join([row['name'], *cells])} |")
    updates = ", ".join(f"{name} {number or '?'}" for name, number in found["updates"].items())
    lines += ["", f"{found['pictures']:,} {found['split']} pictures. Updates: {updates}."]
    return "\n".join(lines) + "\n"


def draw(workdir: Path, names: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Draws some originals, and below them their reconstructions by every row."""
    files = [folder / "shown.npz" for folder in (workdir, *(workdir / name for name in names))]
    shown = np.concatenate([storage.read_npz(file)["images"] for file in files])
    count, columns, side = shown.shape[:3]
    [axis] = figures.make_axes(1, width=1.5 + 0.7 * columns, height=0.7 * count)
    axis.imshow(np.concatenate(list(np.concatenate(list(shown.swapaxes(0, 1)), axis=2))))
    axis.set_yticks((np.arange(count) + 0.5) * side, [row["name"] for row in rows])
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.grid(False)
    axis.spines[:].set_visible(False)
    figures.save(axis, workdir / "codebooks.png")


if __name__ == "__main__":
    sys.exit(run_script(main))
