"""The autoencoder as a training task: reconstruction + KL; and its measurements.

The loss of an image of P pixel values is

    sum |x - y|^p / P  +  kl_weight * KL / P,        p = 1 or 2,

with x in [-1, 1], y decoded from a posterior sample, and KL in nats from the standard normal,
summed over the image's latents. Both terms are per pixel value. In LDM both are sums, so
`kl_weight` has the same effect there (KL-16: 1e-6), for any image size. LDM's perceptual and
adversarial terms need networks that were trained for other tasks, and are left out.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from tokenbridge_jax.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    Posterior,
    abstract_params,
    images_to_float,
    images_to_uint8,
    init_params,
)
from tokenbridge_jax.data.batches import ShardPlan, prepared_batches
from tokenbridge_jax.data.sources import Source
from tokenbridge_jax.flops import decode_flops, encode_flops
from tokenbridge_jax.runtime import meshes

Batch = Mapping[str, Any]
Images = UInt8[Array | np.ndarray, "B H W I"]

# The error of a pixel value. L1 is LDM's choice: its optimum is the median of the plausible values.
# The optimum of L2 is their mean, which blurs edges more; PSNR measures L2.
RECONSTRUCTION_ERRORS = {"l1": jnp.abs, "l2": jnp.square}


class AutoencoderTask:
    """Trains an autoencoder (see `step.Task`); the host draws nothing."""

    def __init__(
        self,
        config: AutoencoderConfig,
        precision: str,
        kl_weight: float,
        reconstruction: str = "l1",
    ):
        """Args:
        config: sizes; training does not use its scale.
        precision: one of `precision.PRECISIONS`.
        kl_weight: see the module.
        reconstruction: "l1" or "l2"; others are a KeyError.
        """
        self.module = Autoencoder(config, precision)
        self._kl_weight = kl_weight
        self._error = RECONSTRUCTION_ERRORS[reconstruction]

    def init(self, key: PRNGKeyArray) -> Any:
        """Boxed float32 parameters."""
        config = self.module.config
        return meta.replace_boxed(abstract_params(config), init_params(config, key))

    def examples(self, batch: Batch, key: PRNGKeyArray, draw: None) -> dict[str, Any]:
        """The images, and noise for the posterior sample of each."""
        images = batch["images"]
        config = self.module.config
        grid = [side // config.downsampling for side in images.shape[1:3]]
        noise = jax.random.normal(key, (len(images), *grid, config.latent_channels))
        return {"images": images, "noise": noise}

    def loss(
        self, params: Any, examples: Any, key: PRNGKeyArray, draw: None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """See the module; also reports both terms, `reconstruction` and `kl` in nats per image."""
        images = images_to_float(examples["images"])
        posterior = encode(self.module, params, examples["images"])
        # exp(logvar / 2) is finite: the posterior clips its log-variance.
        latents = posterior.mean + jnp.exp(0.5 * posterior.logvar) * examples["noise"]
        decoded: Any = self.module.apply({"params": params}, latents, method="decode")
        error = jnp.mean(self._error(decoded - images))
        kl = jnp.mean(posterior.kl())
        pixel_values = images[0].size
        loss = error + self._kl_weight * kl / pixel_values
        return loss, {"reconstruction": error, "kl": kl}


def encode(module: Autoencoder, params: Any, images: Images) -> Posterior:
    """The posterior of uint8 images."""
    posterior: Any = module.apply({"params": params}, images_to_float(images), method="encode")
    return posterior


def training_flops(config: AutoencoderConfig) -> float:
    """FLOPs of training on one image, forward and twice that backward, counted by hand.

    (For GPUs the compiler has no count before it has compiled.)
    """
    return 3.0 * (encode_flops(config) + decode_flops(config))


def picture_batches(
    source: Source,
    numbers: np.ndarray,
    size: int,
    channels: int,
    mesh: Mesh,
    batch_size: int,
    workers: int = 0,
) -> Iterator[dict[str, jax.Array]]:
    """One pass over some pictures of a source, in order.

    Args:
      source: the pictures.
      numbers: which of them.
      size: the side in pixels after the centre crop.
      channels: 3 or 1.
      mesh: the devices.
      batch_size: rounded up to a multiple of the batch shards; the last batch is padded.
      workers: processes that decode pictures; see `workers.count_workers`.

    Yields:
      `images` uint8 `[B, H, W, I]` and `weights` float32 `[B]`, 0 for padding and broken pictures.
    """
    batch_size = meshes.round_up_batch(batch_size, mesh)
    rows = meshes.local_rows(mesh, batch_size)
    last = len(numbers) - 1
    # This process's rows of every batch. The last picture also stands for missing ones.
    mine = np.arange(0, last + 1, batch_size)[:, None] + rows
    plan = ShardPlan(Path(), "", source, numbers[np.minimum(mine, last).ravel()])
    prepared = prepared_batches([plan], len(rows), size, channels, workers=workers)
    for places, batch in zip(mine, prepared, strict=True):
        weights = np.zeros(len(rows), np.float32)
        weights[batch.good] = 1
        arrays = {"images": batch.pixels, "weights": weights * (places <= last)}
        yield meshes.to_global(arrays, mesh)


def latent_std(module: Autoencoder, params: Any, batches: Iterator[Batch], mesh: Mesh) -> float:
    """Standard deviation of unscaled posterior samples, over all latents of all images.

    Its inverse is the scale that gives latents unit variance, as KL-16's 0.2325 does. The
    expectation over samples is exact: E z^2 = mean^2 + variance.
    """

    def moments(params: Any, batch: Batch) -> Float[Array, "3"]:
        posterior = encode(module, params, batch["images"])
        weights = batch["weights"][:, None, None, None]
        square = jnp.square(posterior.mean) + jnp.exp(posterior.logvar)
        count = jnp.sum(weights) * posterior.mean[0].size
        return jnp.stack([jnp.sum(weights * posterior.mean), jnp.sum(weights * square), count])

    jitted = jax.jit(moments, out_shardings=meshes.replicated(mesh))
    total, square, count = _sum(jitted(params, batch) for batch in batches)
    return float(np.sqrt(square / count - np.square(total / count)))


def make_reconstruction(module: Autoencoder, mesh: Mesh) -> Callable[[Any, Any], Any]:
    """Makes the jitted `(params, uint8 images) -> uint8 images` through the posterior mean.

    Every process gets the whole result.
    """

    def reconstruct(params: Any, images: Images) -> UInt8[Array, "B H W I"]:
        latents = encode(module, params, images).mean
        decoded: Any = module.apply({"params": params}, latents, method="decode")
        return images_to_uint8(decoded)

    return jax.jit(reconstruct, out_shardings=meshes.replicated(mesh))


def make_psnr(
    reconstruct: Callable[[Any, Any], Any], mesh: Mesh
) -> Callable[[Any, Iterator[Batch]], float]:
    """Makes the pass `(params, batches) -> decibels`, the mean PSNR of the reconstructed images."""

    def decibels(params: Any, batch: Batch) -> Float[Array, "2"]:
        images = batch["images"].astype(jnp.float32)
        decoded = reconstruct(params, batch["images"]).astype(jnp.float32)
        # A perfect image would have an infinite ratio: the smallest error is half a level in one
        # pixel value.
        least = 0.25 / images[0].size
        error = jnp.maximum(jnp.mean(jnp.square(decoded - images), axis=(1, 2, 3)), least)
        ratio = 10 * jnp.log10(255.0**2 / error)
        weights = batch["weights"]
        return jnp.stack([jnp.sum(weights * ratio), jnp.sum(weights)])

    jitted = jax.jit(decibels, out_shardings=meshes.replicated(mesh))

    def psnr(params: Any, batches: Iterator[Batch]) -> float:
        total, weight = _sum(jitted(params, batch) for batch in batches)
        return float(total / weight)

    return psnr


def _sum(parts: Iterator[jax.Array]) -> np.ndarray:
    """The sum over batches in float64; it waits for each batch after the next one has started."""
    previous = next(parts)
    total = np.zeros(previous.shape, np.float64)
    for part in parts:
        total += np.asarray(previous)
        previous = part
    return total + np.asarray(previous)
