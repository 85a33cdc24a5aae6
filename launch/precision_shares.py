"""Compares the indices of each precision of the autoencoder with float32 on this machine's CPU.

  python launch/precision_shares.py --images FOLDER

The autoencoder has KL-16's size and random weights, scaled so that each channel of the latents has
mean 0 and deviation 1 over the images. `--autoencoder WORKDIR/autoencoder` uses a trained one
unchanged. Indices are those of the posterior's mean.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tokenbridge_jax.autoencoder import AutoencoderConfig, init_params, load_autoencoder
from tokenbridge_jax.codec import Codec, in_batches
from tokenbridge_jax.data.images import prepare
from tokenbridge_jax.data.sources import FolderSource
from tokenbridge_jax.ops.precision import PRECISIONS
from tokenbridge_jax.quantizer import Quantizer
from tokenbridge_jax.runtime import meshes


def main() -> None:
    """Prints a line for each precision: the share of indices that differ, and images a second."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, help="a folder of class folders")
    parser.add_argument(
        "--autoencoder", help="folder of a trained autoencoder; default: random weights"
    )
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--levels", type=int, default=64)
    parser.add_argument("--range", type=float, default=5.0)
    args = parser.parse_args()
    quantizer = Quantizer.gaussian(args.levels, args.range)
    cpu = meshes.make_mesh(devices=jax.devices("cpu")[:1])
    on_cpu = functools.partial(Codec, quantizer=quantizer, mesh=cpu)
    config = AutoencoderConfig(scale=1.0)
    if args.autoencoder:
        config, params = load_autoencoder(args.autoencoder)
    source = FolderSource(args.images)
    pictures = (source.load(i)[0] for i in range(len(source)))
    images = np.stack([prepare(picture, config.image_size) for picture in pictures])
    if not args.autoencoder:
        params = jax.tree.map(np.asarray, init_params(config, jax.random.key(0)))
        encode = on_cpu(config, params).encode
        latents = np.asarray(in_batches(lambda x: np.asarray(encode(x).latents), images, 16))
        params = standardized(params, latents.mean((0, 1, 2)), latents.std((0, 1, 2)))
    codec = on_cpu(config, params)
    expected = in_batches(functools.partial(encoded, codec), images, 16)
    mesh = meshes.make_mesh(devices=jax.local_devices()[:1])
    device = jax.local_devices()[0].device_kind
    for precision in PRECISIONS:
        codec = Codec(config, params, quantizer, mesh, precision)
        indices = in_batches(functools.partial(encoded, codec), images, args.batch_size)
        batch = np.resize(images, (args.batch_size, *images.shape[1:]))
        of_batch = jax.block_until_ready(codec.encode(batch).latents)
        rates = [args.batch_size / seconds(codec.encode, batch)]
        rates += [args.batch_size / seconds(codec.decode_latents, of_batch)]
        moved = np.count_nonzero(indices != expected)
        print(
            f"{precision}: {moved} of {indices.size} indices moved ({moved / indices.size:.4%}), "
            f"encode {rates[0]:.0f} img/s, decode {rates[1]:.0f} img/s ({device}, batch "
            f"{args.batch_size}, jax {jax.__version__})",
            flush=True,
        )


def encoded(codec: Codec, images: np.ndarray) -> np.ndarray:
    """Indices of posterior means, on the host."""
    return np.asarray(codec.encode(images).indices)


def standardized(params: dict, mean: np.ndarray, deviation: np.ndarray) -> dict:
    """Parameters whose posterior means have mean 0 and deviation 1 a channel."""
    conv = params["quant_conv"]
    kernel, bias = conv["kernel"].copy(), conv["bias"].copy()
    channels = len(mean)
    kernel[..., :channels] /= deviation
    bias[:channels] = (bias[:channels] - mean) / deviation
    return params | {"quant_conv": {"kernel": kernel, "bias": bias}}


def seconds(run: Callable[[Any], Any], x: Any) -> float:
    """Median of eight calls, after one that compiles."""
    times = []
    for _ in range(9):
        started = time.perf_counter()
        jax.block_until_ready(run(x))
        times.append(time.perf_counter() - started)
    return float(np.median(times[1:]))


if __name__ == "__main__":
    main()
