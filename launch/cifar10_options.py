"""Prices the options of sampling on the model of a CIFAR-10 run: quality against time.

One option at a time differs from the run's own settings. For every value it draws the same classes
with the same seed, and measures the time (without compiling), the Frechet distance and KID to the
training pictures in the features of EfficientNet-Lite0, and the share in which a classifier finds
the class. It compares with the training pictures that launch/score_cifar10.py has scored. If it
is stopped, the same command continues.

  python launch/cifar10_options.py --workdir runs/cifar10

It prints a Markdown table and writes WORKDIR/options/: options.md, options.png and options.json.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cifar10_classifier import Classifier, classifier
from cifar10_features import Extract, check_rgb, lite0
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict
from score_cifar10 import extract_all, read
from scripts import run_script

from tokenbridge_jax import Pipeline
from tokenbridge_jax.config import sampling_settings
from tokenbridge_jax.data.sources import make_subsets
from tokenbridge_jax.evaluation import figures
from tokenbridge_jax.evaluation.generation import make_labels, weights_sha256
from tokenbridge_jax.evaluation.metrics import frechet_distance, kernel_distance
from tokenbridge_jax.evaluation.moments import Gaussian, gaussian
from tokenbridge_jax.runtime import storage
from tokenbridge_jax.runtime.progress import say

OPTIONS: dict[str, Sequence[Any]] = {
    "num_iter": (4, 8, 16, 32, 64),
    "guidance": (1.0, 3.0, 6.0, 10.0, 15.0),
    "guidance_schedule": ("linear", "constant"),
    "guidance_interval": ((0.0, 1.0), (0.0, 0.5), (0.25, 0.75), (0.5, 1.0)),
    "guidance_every": (1, 2, 4, 8),
    "temperature": (0.8, 0.86, 0.92, 0.96, 1.0),
    "order": ("random", "raster", "halton", "confidence"),
}
# Pictures of a set in each of KID's comparisons; fewer if there are fewer training pictures.
SUBSET = 1000


def main() -> int:
    """Measures what has no result yet; prints and writes the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=storage.local_path, required=True, help="of the run")
    parser.add_argument(
        "--samples",
        type=int,
        default=10_000,
        help=f"pictures for every value, at least {SUBSET} (%(default)s)",
    )
    parser.add_argument(
        "--options", default=",".join(OPTIONS), help="which, with commas; by default %(default)s"
    )
    args = parser.parse_args()
    names = args.options.split(",")
    if wrong := [name for name in names if name not in OPTIONS]:
        parser.error(f"{wrong[0]} is not one of {', '.join(OPTIONS)}")
    if args.samples < SUBSET:
        parser.error(f"--samples={args.samples} must be {SUBSET} or more")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too.
    results = measure_all(args.workdir, names, args.samples)
    folder = args.workdir / "options"
    text = table(results)
    storage.write_bytes(folder / "options.md", text.encode())
    draw(folder / "options.png", results)
    print(text, end="")
    return 0


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Measures samples by their features.

    Attributes:
      extract: pictures -> features.
      real: the features of the training pictures.
      distribution: of these features.
      judge: tells whether a sample shows its class.
    """

    extract: Extract
    real: Float[np.ndarray, "N D"]
    distribution: Gaussian
    judge: Classifier

    @classmethod
    def of(cls, workdir: Path, config: ConfigDict) -> "Scorer":
        """For the training pictures that launch/score_cifar10.py has scored, or else for all.

        What it has kept of them is not computed again.

        Raises:
          UserError: the pictures are grey, or there are none, or a package is missing.
        """
        check_rgb(config)
        most = most_pictures(workdir) or sys.maxsize
        train = read(make_subsets(config)["train"].spread(most), config.data.image_size)
        extract = lite0()
        real = extract_all(workdir, {"train": train}, extract)["train"]
        return cls(extract, real, gaussian(real), classifier(workdir / "scores", *train))

    def distance(self, features: Float[np.ndarray, "N D"]) -> float:
        """The Frechet distance of features from those of the training pictures."""
        return frechet_distance(gaussian(features), self.distribution)

    def __call__(self, images: UInt8[np.ndarray, "N H W 3"], labels: Any) -> dict[str, float]:
        """The scores of samples that were asked for with these classes."""
        features, subset = self.extract(images), min(SUBSET, len(self.real))
        return {
            "frechet_distance": self.distance(features),
            "kid": kernel_distance(features, self.real, subset_size=subset)[0],
            "accuracy": self.judge.accuracy(images, labels),
        }


def most_pictures(workdir: Path) -> int | None:
    """The limit of the training pictures that launch/score_cifar10.py has scored, if there is one.

    Files of earlier versions do not have it, but they have the number of the pictures.
    """
    path = workdir / "scores" / "scores.json"
    if not path.exists():
        return None
    known = storage.read_json(path)
    return known.get("most_pictures", known["scores"]["train_pictures"])


def measure_all(workdir: Path, names: Sequence[str], samples: int) -> list[dict[str, Any]]:
    """The results of all values of some options, with the run's own value of each.

    Raises:
      UserError: the run has no model or no scores.
    """
    pipeline = Pipeline.load(workdir)
    config = ConfigDict(pipeline.facts["config"])
    own = sampling_settings(config.sampling).to_json()
    model = {
        "weights": weights_sha256(pipeline.params, pipeline.step),
        "autoencoder": pipeline.description.autoencoder_hash,
    }
    most = most_pictures(workdir)
    given = {"samples": samples} | ({} if most is None else {"train_pictures": most})
    path = workdir / "options" / "options.json"
    known = storage.read_json(path) if path.exists() else {}
    # Made when it is needed: it trains the classifier.
    scorer = functools.cache(lambda: Scorer.of(workdir, config))
    results = []
    for name in names:
        values = [list(value) if isinstance(value, tuple) else value for value in OPTIONS[name]]
        for value in values + [own[name]] * (own[name] not in values):
            settings = own | {name: value}
            key = json.dumps(settings | model | given)
            if key not in known:
                score = scorer()  # Before any sample is drawn: it may raise an error.
                say(f"{name}={value}")
                images, labels, seconds = sample(
                    pipeline, samples, dict(settings, batch_size=config.sampling.batch_size)
                )
                known[key] = {"images_per_second": samples / seconds} | score(images, labels)
                storage.write_json(path, known)
                say(f"{name}={value}: {json.dumps(known[key])}")
            results.append({"option": name, "value": value, "own": value == own[name]} | known[key])
    return results


def sample(
    pipeline: Pipeline, samples: int, settings: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray, float]:
    """Samples, their classes, and the seconds that they took, without compiling."""
    draw_samples(pipeline, min(samples, settings["batch_size"]), settings, seed=1)
    started = time.perf_counter()
    images, labels = draw_samples(pipeline, samples, settings)
    return images, labels, time.perf_counter() - started


def draw_samples(
    pipeline: Pipeline, samples: int, settings: Mapping[str, Any], seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Samples and their classes."""
    labels = make_labels("balanced", samples, pipeline.config.classes, seed=0)
    return pipeline.generate(labels.tolist(), seed=seed, **settings), labels


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The results in Markdown; the run's own values are bold."""
    lines = ["| option | value | images/s | Frechet distance | KID | class accuracy |"]
    lines.append("|---" * 6 + "|")
    for row in results:
        value = row["value"]
        text = " to ".join(map(str, value)) if isinstance(value, list) else str(value)
        cells = [
            f"`{row['option']}`",
            f"**{text}**" if row["own"] else text,
            f"{row['images_per_second']:,.0f}",
            f"{row['frechet_distance']:.2f}",
            f"{row['kid']:.4f}",
            f"{row['accuracy']:.1%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Draws quality against time, a colour for each option; and both scores against numbers.

    The panels of numbers have the same vertical axes, so that what is small looks small.
    """
    groups = {name: [row for row in results if row["option"] == name] for name in OPTIONS}
    groups = {name: rows for name, rows in groups.items() if rows}
    numeric = {
        name: rows for name, rows in groups.items() if isinstance(rows[0]["value"], int | float)
    }
    from matplotlib.ticker import PercentFormatter

    first, *others = figures.make_axes(1 + len(numeric), width=4.2, columns=3)
    own = (figures.BLUE, figures.ORANGE, figures.GREEN, figures.RED, figures.GREY)
    for colour, (name, rows) in zip((*own, "black", "purple"), groups.items(), strict=False):
        x = [1000 / row["images_per_second"] for row in rows]
        y = [row["frechet_distance"] for row in rows]
        first.plot(x, y, "o-" if name == "num_iter" else "o", color=colour, label=name, ms=4)
    if ours := next((row for row in results if row["own"]), None):
        here = 1000 / ours["images_per_second"], ours["frechet_distance"]
        first.plot(*here, "o", color="none", markeredgecolor="black", ms=9)
    first.set(xlabel="milliseconds an image", ylabel="Frechet distance")
    first.legend(frameon=False, fontsize="small")
    shares = [ax.twinx() for ax in others]
    for ax, share in zip(others[1:], shares[1:], strict=True):
        ax.sharey(others[0])
        share.sharey(shares[0])
    for ax, share, (name, rows) in zip(others, shares, numeric.items(), strict=True):
        rows = sorted(rows, key=lambda row: row["value"])
        values = [row["value"] for row in rows]
        ax.plot(values, [row["frechet_distance"] for row in rows], "o-", color=figures.BLUE, ms=4)
        ax.set_xlabel(name)
        ax.set_ylabel("Frechet distance", color=figures.BLUE)
        share.plot(values, [row["accuracy"] for row in rows], "s--", color=figures.ORANGE, ms=4)
        share.set_ylabel("class accuracy", color=figures.ORANGE)
        share.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figures.save(first, path)


if __name__ == "__main__":
    sys.exit(run_script(main))
