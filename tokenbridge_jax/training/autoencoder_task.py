"""The autoencoder as a training task (LDM, arXiv 2112.10752, appendix G); and its measurements.

The loss of an image of P pixel values is

    sum |x - y|^p / P  +  perceptual_weight * LPIPS(x, y)  +  kl_weight * KL / P,    p = 1 or 2,

with x in [-1, 1], y decoded from a posterior sample, and KL in nats from the standard normal,
summed over the image's latents. The terms are per pixel value. In LDM they are sums, so
`kl_weight` has the same effect there (KL-16: 1e-6), for any image size. A trained codebook has, in
place of the last term, the terms of `bottleneck.Quantized`: the commitment (of vq and lfq) and the
entropy penalty times their weights, and the codes' own term.

From some step on, a discriminator D takes part, which learns to tell images from reconstructions:

    generator        -w mean D(y), added to the loss above
    discriminator    mean(relu(1 - D(x)) + relu(1 + D(y))) / 2

    w = weight * |G(error + LPIPS)| / (|G(-mean D(y))| + 1e-4), at most 1e4 / P * weight,

where G is the gradient by the kernel of the decoder's last convolution. (LDM's bound is 1e4, for
sums over the P values.) Both networks are updated
at the same time, by one optimizer. With accumulation each micro-batch has its own w.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
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
from tokenbridge_jax.bottleneck import code_use
from tokenbridge_jax.data.batches import ShardPlan, prepared_batches
from tokenbridge_jax.data.sources import Source
from tokenbridge_jax.flops import decode_flops, encode_flops
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.training.discriminator import Adversary, Discriminator, init_discriminator

Batch = Mapping[str, Any]
Report = dict[str, Float[Array, ""]]
Images = UInt8[Array | np.ndarray, "B H W I"]

# The error of a pixel value. L1 is LDM's choice: its optimum is the median of the plausible values.
# The optimum of L2 is their mean, which blurs edges more; PSNR measures L2.
RECONSTRUCTION_ERRORS = {"l1": jnp.abs, "l2": jnp.square}

# The discriminator's parameters, beside those of the parts of the autoencoder.
DISCRIMINATOR = "discriminator"


@dataclasses.dataclass(frozen=True)
class Perceptual:
    """A perceptual distance and its part in the loss.

    Attributes:
      weight: LDM's is 1.
      distance: of every pair of float images in [-1, 1], `[B, H, W, I]` twice -> `[B]`. Programs
        contain its parameters.
    """

    weight: float
    distance: Callable[[Array, Array], Array]


@flax.struct.dataclass
class AdversarialDraw:
    """Selects the program of the updates in which the discriminator takes part."""


class AutoencoderTask:
    """Trains an autoencoder (see `step.Task`).

    The host draws nothing before the discriminator's start, and an `AdversarialDraw` from then on.
    """

    def __init__(
        self,
        config: AutoencoderConfig,
        precision: str,
        kl_weight: float,
        reconstruction: str = "l1",
        *,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.1,
        perceptual: Perceptual | None = None,
        adversary: Adversary | None = None,
    ):
        """Args:
          config: sizes; training does not use its scale.
          precision: one of `precision.PRECISIONS`.
          kl_weight: see the module.
          reconstruction: "l1" or "l2"; others are a KeyError.
          commitment_weight: of a trained codebook.
          entropy_weight: of a trained codebook.
          perceptual: adds a perceptual distance to the loss.
          adversary: adds a discriminator.

        Raises:
          UserError: the discriminator does not fit the images.
        """
        self.module = Autoencoder(config, precision)
        self._kl_weight = kl_weight
        # fsq's own gradient takes the encoder to its levels: it has no commitment.
        committed = config.codebook is not None and config.codebook.commits
        self._weights = {
            "commitment": commitment_weight * committed,
            "codebook": 1.0,
            "entropy": entropy_weight,
        }
        self._error = RECONSTRUCTION_ERRORS[reconstruction]
        self._perceptual, self.adversary = perceptual, adversary
        if adversary:
            adversary.check_image_size(config.image_size)
            self._discriminator = Discriminator(adversary, precision)

    def init(self, key: PRNGKeyArray) -> Any:
        """Boxed float32 parameters."""
        config = self.module.config
        params = meta.replace_boxed(abstract_params(config), init_params(config, key))
        if self.adversary:
            key = jax.random.fold_in(key, 1)
            params |= {
                DISCRIMINATOR: init_discriminator(self.adversary, config.image_channels, key)
            }
        return params

    def draw(self, step: int) -> AdversarialDraw | None:
        """What the host decides for the update after `step` updates."""
        return AdversarialDraw() if self.adversary and step >= self.adversary.start else None

    def examples(self, batch: Batch, key: PRNGKeyArray, draw: Any) -> dict[str, Any]:
        """The images, and noise for the posterior sample of each."""
        images = batch["images"]
        config = self.module.config
        grid = [side // config.downsampling for side in images.shape[1:3]]
        noise = jax.random.normal(key, (len(images), *grid, config.latent_channels))
        return {"images": images, "noise": noise}

    def loss(
        self, params: Any, examples: Any, key: PRNGKeyArray, draw: AdversarialDraw | None
    ) -> tuple[Float[Array, ""], Report]:
        """See the module; also reports its terms.

        `kl` is in nats per image. A codebook has `codes_used` and `perplexity` (`code_use`).
        """
        images = images_to_float(examples["images"])
        of_latents = self._sampled if self.module.config.codebook is None else self._quantized
        latents, penalty, terms = of_latents(params, examples)
        if draw is None:
            decoded: Any = self.module.apply({"params": params}, latents, method="decode")
            loss, report = self._fidelity(decoded, images)
        else:
            loss, report = self._adversarial(params, latents, images)
        return loss + penalty, report | terms

    def _sampled(self, params: Any, examples: Any) -> tuple[Array, Float[Array, ""], Report]:
        """A sample of each posterior, their part in the loss, and what to report of them."""
        posterior = encode(self.module, params, examples["images"])
        # exp(logvar / 2) is finite: the posterior clips its log-variance.
        latents = posterior.mean + jnp.exp(0.5 * posterior.logvar) * examples["noise"]
        kl = jnp.mean(posterior.kl())
        return latents, self._kl_weight * kl / examples["images"][0].size, {"kl": kl}

    def _quantized(self, params: Any, examples: Any) -> tuple[Array, Float[Array, ""], Report]:
        """The codes, likewise."""
        images = images_to_float(examples["images"])
        found: Any = self.module.apply({"params": params}, images, method="quantized")
        penalty = sum(self._weights[name] * term for name, term in found.terms.items())
        return found.latents, jnp.asarray(penalty), found.terms | code_use(found.latents)

    def _fidelity(self, decoded: Array, images: Array) -> tuple[Float[Array, ""], Report]:
        """The terms that compare each reconstruction with its image."""
        loss = jnp.mean(self._error(decoded - images))
        report = {"reconstruction": loss}
        if self._perceptual:
            report["perceptual"] = jnp.mean(self._perceptual.distance(decoded, images))
            loss += self._perceptual.weight * report["perceptual"]
        return loss, report

    def _adversarial(
        self, params: Any, latents: Array, images: Array
    ) -> tuple[Float[Array, ""], Report]:
        """Fidelity, and the losses of the decoder as a generator and of the discriminator."""
        assert self.adversary is not None

        def decode(kernel: Array) -> Array:
            last = params["decoder"]["conv_out"] | {"kernel": kernel}
            decoder = params["decoder"] | {"conv_out": last}
            variables = {"params": params | {"decoder": decoder}}
            decoded: Any = self.module.apply(variables, latents, method="decode")
            return decoded

        def judge(discriminator: Any, images: Array) -> Array:
            logits: Any = self._discriminator.apply({"params": discriminator}, images)
            return logits

        def realism_error(decoded: Array) -> Array:
            return -jnp.mean(judge(jax.lax.stop_gradient(params[DISCRIMINATOR]), decoded))

        decoded, to_kernel = jax.vjp(decode, params["decoder"]["conv_out"]["kernel"])
        fixed = jax.lax.stop_gradient(decoded)
        with_gradient = jax.value_and_grad(self._fidelity, has_aux=True)
        (fidelity, report), fidelity_gradient = with_gradient(fixed, images)
        realism, realism_gradient = jax.value_and_grad(realism_error)(fixed)
        sizes = [optax.tree.norm(to_kernel(x)) for x in (fidelity_gradient, realism_gradient)]
        most = 1e4 / images[0].size
        weight = self.adversary.weight * jnp.minimum(sizes[0] / (sizes[1] + 1e-4), most)
        # The gradients by the decoded images are known already: neither network runs again.
        value, gradient = jax.lax.stop_gradient(
            (fidelity + weight * realism, fidelity_gradient + weight * realism_gradient)
        )
        generator = value + jnp.sum(gradient * (decoded - fixed))
        logits = [judge(params[DISCRIMINATOR], x) for x in (images, fixed)]
        discriminator = jnp.mean(jax.nn.relu(1 - logits[0]) + jax.nn.relu(1 + logits[1])) / 2
        report |= {
            "generator": realism,
            "discriminator": discriminator,
            "adversarial_weight": weight,
        }
        return generator + discriminator, report


def without_discriminator(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of the autoencoder alone."""
    return {name: part for name, part in params.items() if name != DISCRIMINATOR}


def encode(module: Autoencoder, params: Any, images: Images) -> Posterior:
    """The posterior of uint8 images."""
    posterior: Any = module.apply({"params": params}, images_to_float(images), method="encode")
    return posterior


def training_flops(config: AutoencoderConfig) -> float:
    """FLOPs of training on one image, forward and twice that backward, counted by hand.

    Those of LPIPS and of a discriminator are not counted. (For GPUs the compiler has no count
    before it has compiled.)
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
    parts = one_behind(jitted(params, batch) for batch in batches)
    total, square, count = np.sum([np.asarray(part, np.float64) for part in parts], axis=0)
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


def one_behind(results: Iterator[Any]) -> Iterator[Any]:
    """The results, each after the next one was started: no device waits for the host."""
    previous = next(results)
    for result in results:
        yield previous
        previous = result
    yield previous
