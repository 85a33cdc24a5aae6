"""Scores the digits that a quickstart run sampled, with a classifier trained on real digits only.

A support vector machine is trained on the real training digits (8x8 pixels). The script prints its
accuracy for real held-out digits, for their reconstructions by the autoencoder, and for the samples
(the share in which it finds the requested class). The last line is JSON.

  python launch/score_digits.py --workdir runs/quickstart
"""

import argparse
import json
import time

import numpy as np
from sklearn.svm import SVC

from tokenbridge_jax import Pipeline
from tokenbridge_jax.data.images import prepare
from tokenbridge_jax.data.sources import DigitsSource
from tokenbridge_jax.runtime import pictures, storage
from tokenbridge_jax.training.metric_writer import read_metrics


def main() -> None:
    """Prints the table and the JSON line; writes `WORKDIR/samples/reconstruction.png`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=storage.as_path, required=True)
    parser.add_argument("--started", type=float, help="when the run began, in Unix seconds")
    args = parser.parse_args()
    started = time.time() if args.started is None else args.started

    train, held_out = DigitsSource("train"), DigitsSource("validation")
    classifier = SVC(gamma=0.001).fit(_features(train.images), train.labels)

    pipeline = Pipeline.load(args.workdir)
    size = pipeline.codec.config.image_size
    real = np.stack([prepare(held_out.load(i)[0], size, 1) for i in range(len(held_out))])
    encoded = pipeline.codec.encode(real)
    continuous = np.asarray(pipeline.codec.decode_latents(encoded.latents))
    quantized = np.asarray(pipeline.codec.decode(encoded.indices))
    columns = [real[:10], continuous[:10], quantized[:10]]
    picture = pictures.grid(np.concatenate(columns), columns=10)
    pictures.write_png(args.workdir / "samples" / "reconstruction.png", picture)

    samples = np.load(args.workdir / "samples" / "samples.npz")
    accuracies = {
        "real, held out": classifier.score(_features(held_out.images), held_out.labels),
        "reconstructed": classifier.score(_features(continuous), held_out.labels),
        "reconstructed from indices": classifier.score(_features(quantized), held_out.labels),
        "sampled": classifier.score(_features(samples["arr_0"]), samples["labels"]),
    }
    print(f"  {len(samples['labels'])} samples, {len(real)} real held-out digits:")
    for name, accuracy in accuracies.items():
        print(f"  {name:28}{accuracy:.1%} in the right class")
    print(f"  look at {args.workdir / 'samples'}/grid.png and reconstruction.png")
    metrics = read_metrics(args.workdir / "metrics.jsonl")
    name = "val_nll_bits_per_index"
    nll = [row[name] for row in metrics if name in row]
    result = {
        "class_accuracy": round(accuracies["sampled"], 4),
        "real_accuracy": round(accuracies["real, held out"], 4),
        "reconstruction_accuracy": round(accuracies["reconstructed"], 4),
        "quantized_reconstruction_accuracy": round(accuracies["reconstructed from indices"], 4),
        "val_nll_bits_per_index": round(nll[-1], 4),
        "seconds": round(time.time() - started),
    }
    print(json.dumps(result))


def _features(images: np.ndarray) -> np.ndarray:
    """uint8 images of any multiple of 8 pixels -> 64 values in 0..16, as in scikit-learn."""
    count, size = len(images), images.shape[1]
    cells = images[..., 0].reshape(count, 8, size // 8, 8, size // 8).astype(np.float64)
    return cells.mean(axis=(2, 4)).reshape(count, 64) * (16 / 255)


if __name__ == "__main__":
    main()
