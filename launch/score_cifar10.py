"""Scores the pictures that a run of launch/cifar10.sh sampled, and writes WORKDIR/index.html.

All features are those of EfficientNet-Lite0, trained on ImageNet. Three sets are compared with the
training pictures: test pictures (what a perfect model would reach), test pictures that went through
the autoencoder and the quantizer, and samples. A classifier trained on the real training pictures
tells in how many of each set it finds the class. The last line is JSON.

It needs the first four stages: train-vae, tokenize, train and sample.

  python launch/score_cifar10.py --workdir runs/cifar10
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from cifar10_classifier import classifier
from cifar10_features import Extract, cached, digest, lite0
from cifar10_page import HELD_OUT, write_page
from jaxtyping import Float, Integer, UInt8
from ml_collections import ConfigDict
from scripts import run_script

from tokenbridge_jax import Pipeline
from tokenbridge_jax.codec import in_batches
from tokenbridge_jax.data.images import ImageError
from tokenbridge_jax.data.sources import Subset, load_prepared, make_source, make_subsets
from tokenbridge_jax.evaluation import feature_files
from tokenbridge_jax.evaluation.pixels import psnr
from tokenbridge_jax.runtime import storage
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.progress import say
from tokenbridge_jax.training.metric_writer import read_metrics

BATCH = 250
TEST = "test"  # The split.
# The sets that are compared with the training pictures, and their headings.
COMPARED = {
    "test": "real test pictures",
    "reconstructions": "their reconstructions",
    "samples": "samples",
}
MEASURES = {"frechet_distance": 3, "kid": 5, "precision": 3, "recall": 3, "accuracy": 4}


class Pictures(NamedTuple):
    """Pictures and their classes."""

    images: UInt8[np.ndarray, "N H W 3"]
    labels: Integer[np.ndarray, " N"]


def main() -> int:
    """Prints the table and the JSON line, and writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=storage.local_path, required=True, help="of the run")
    parser.add_argument(
        "--pictures",
        type=int,
        help="most pictures of each set, training pictures too; all by default",
    )
    parser.add_argument("--started", type=float, help="when the run began, in Unix seconds")
    args = parser.parse_args()
    started = time.time() if args.started is None else args.started
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too.
    pipeline = Pipeline.load(args.workdir)
    sets = read_sets(args.workdir, pipeline, args.pictures)
    features = extract_all(args.workdir, sets, lite0())
    scores, notes = measure(args.workdir, sets, features, args.pictures)
    metrics = read_metrics(args.workdir / "metrics.jsonl")
    # The last of each.
    scores |= {key: row[key] for row in metrics for key in HELD_OUT if key in row}
    rows = table(scores)
    shown = {name: (part.images, part.labels) for name, part in sets.items()}
    write_page(args.workdir, pipeline, shown, features, scores, rows, notes)
    for row in rows:
        print(f"  {row[0]:24}" + "".join(f"{cell:>18}" for cell in row[1:]))
    print(f"  reconstructions: PSNR {scores['psnr']:.2f} dB")
    for key, text in HELD_OUT.items():
        print(f"  {text}: {scores[key]:.3f}\n" if key in scores else "", end="")
    print("".join(f"  {note}\n" for note in notes), end="")
    print(f"  look at {args.workdir / 'index.html'}")
    rounded = {name: round(value, 5) for name, value in scores.items()}
    print(json.dumps(rounded | {"seconds": round(time.time() - started)}))
    return 0


# --- Pictures -------------------------------------------------------------------------------------


def read_sets(workdir: Path, pipeline: Pipeline, most: int | None) -> dict[str, Pictures]:
    """The training pictures, and equally many test pictures, reconstructions and samples.

    Raises:
      UserError: there are no samples, or no pictures.
    """
    config = ConfigDict(pipeline.facts["config"])
    source = make_source(config.data, TEST)
    train, test = make_subsets(config)["train"], Subset(source, np.arange(len(source)))
    if source.class_names != train.source.class_names:
        raise UserError(
            f"{config.data.path} has other class folders in {TEST} than in {config.data.split}: "
            "make them equal"
        )
    drawn = storage.read_npz(workdir / "drawn" / "samples.npz")
    samples = Pictures(drawn["arr_0"], drawn["labels"])
    most = most or sys.maxsize
    count = min(len(source), len(samples.labels), most)
    sets = {
        "train": read(train.spread(most), config.data.image_size),
        "test": read(test.spread(count), config.data.image_size),
    }
    codec = pipeline.codec

    def reconstruct() -> dict[str, np.ndarray]:
        def of_batch(images: np.ndarray) -> np.ndarray:
            return np.asarray(codec.decode(codec.encode(images).indices))

        return {"images": in_batches(of_batch, sets["test"].images, BATCH)}

    inputs = digest(sets["test"].images, pipeline.description.autoencoder_hash)
    again = cached(workdir / "scores" / "reconstructed.npz", inputs, reconstruct)["images"]
    sets["reconstructions"] = Pictures(again, sets["test"].labels)
    count = len(again)  # Without broken pictures.
    sets["samples"] = Pictures(samples.images[:count], samples.labels[:count])
    return sets


def read(subset: Subset, size: int) -> Pictures:
    """The colour pictures of a subset, cropped to `size` pixels, without those that are broken.

    Raises:
      UserError: there is none.
    """
    found = []
    for number in map(int, subset.images):
        try:
            found.append(load_prepared(subset.source, number, size, 3))
        except ImageError as error:
            say(f"broken image left out: {error}")
    if not found:
        raise UserError("there are no pictures to score; look at data.path")
    images, labels = zip(*found, strict=True)
    return Pictures(np.stack(images), np.array(labels))


# --- Scores ---------------------------------------------------------------------------------------


def extract_all(
    workdir: Path, sets: dict[str, Pictures], extract: Extract
) -> dict[str, Float[np.ndarray, "N D"]]:
    """The features of each set, which files keep."""

    def features(name: str, images: np.ndarray) -> np.ndarray:
        def make() -> dict[str, np.ndarray]:
            say(f"features of {len(images):,} pictures: {name}")
            return {"features": extract(images)}

        return cached(workdir / "scores" / f"{name}.npz", digest(images), make)["features"]

    return {name: features(name, part.images) for name, part in sets.items()}


def measure(
    workdir: Path,
    sets: dict[str, Pictures],
    features: dict[str, Float[np.ndarray, "N D"]],
    most: int | None = None,
) -> tuple[dict[str, float], list[str]]:
    """All scores by name, and remarks. What is known of the same pictures is not computed again.

    `most` is the limit of `--pictures`; the file of the scores tells it to other scripts.
    """
    folder = workdir / "scores"
    inputs = digest(*(array for part in sets.values() for array in part))
    known = folder / "scores.json"
    if known.exists() and (found := storage.read_json(known))["inputs"] == inputs:
        if found.get("most_pictures") != most:
            storage.write_json(known, found | {"most_pictures": most})
        return found["scores"], found["remarks"]
    judge = classifier(folder, *sets["train"])
    scores: dict[str, float] = {
        "pictures": len(features["test"]),
        "train_pictures": len(features["train"]),
    }
    remarks: list[str] = []
    for name in COMPARED:
        paths = [str(folder / f"{part}.npz") for part in (name, "train")]
        compared, _, remarks = feature_files.compare(samples=paths[0], reference=paths[1])
        compared["accuracy"] = judge.accuracy(*sets[name])
        scores |= {f"{name}_{key}": compared[key] for key in MEASURES if key in compared}
    ratios = psnr(sets["test"].images, sets["reconstructions"].images)
    scores["psnr"] = float(ratios.mean())
    made = {"inputs": inputs, "most_pictures": most, "scores": scores, "remarks": remarks}
    storage.write_json(known, made)
    return scores, remarks


def table(scores: dict[str, float]) -> list[list[str]]:
    """The scores as rows of text; the first row is the heading."""
    headings = ["Frechet distance", "KID", "precision", "recall", "class accuracy"]
    rows = [["against training pictures", *headings]]
    for name, heading in COMPARED.items():
        values = ((scores.get(f"{name}_{key}"), places) for key, places in MEASURES.items())
        rows.append([heading, *("-" if v is None else _decimals(v, p) for v, p in values)])
    return rows


def _decimals(value: float, places: int) -> str:
    return f"{round(value, places) + 0.0:.{places}f}"  # Zero instead of -0.0000.


if __name__ == "__main__":
    sys.exit(run_script(main))
