"""Autoencoder: images to latents and back (KL-16 of LDM/MAR, and its family).

The encoder halves the image once per level and returns the mean and log-variance of a diagonal
normal. The decoder mirrors it, with one more residual block per level. Arrays are NHWC. In the
vocabulary of this package, a latent is `posterior sample x config.scale`; `Autoencoder` itself
never applies the scale. A trained codebook takes the place of the normal distribution if
`config.bottleneck` is not "kl" (see `bottleneck`).
"""

import functools
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from jaxtyping import Array, Float, Key, Shaped, UInt8

from tokenbridge_jax.autoencoder_blocks import AttentionBlock, Middle, ResidualBlock
from tokenbridge_jax.autoencoder_config import AutoencoderConfig
from tokenbridge_jax.bottleneck import Quantized
from tokenbridge_jax.layers import Conv, GroupNorm
from tokenbridge_jax.ops.precision import compute_dtype
from tokenbridge_jax.runtime import safetensors_file, storage
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.meshes import constrain, named_axes

LOGVAR_RANGE = (-30.0, 20.0)


class Posterior(NamedTuple):
    """Diagonal normal over unscaled latents, float32; `logvar` is clipped to [-30, 20].

    Of a trained codebook it is certain: `logvar` is -infinity.
    """

    mean: Float[Array, "B h w C"]
    logvar: Float[Array, "B h w C"]

    @classmethod
    def from_moments(cls, moments: Float[Array, "B h w CC"]) -> "Posterior":
        """Splits the encoder's output, mean then log-variance along the last axis."""
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return cls(mean, jnp.clip(logvar, *LOGVAR_RANGE))

    def sample(self, key: Key[Array, ""]) -> Float[Array, "B h w C"]:
        """One draw for the whole batch from one key."""
        return self.mean + jnp.exp(0.5 * self.logvar) * jax.random.normal(key, self.mean.shape)

    def kl(self) -> Float[Array, " B"]:
        """The divergence in nats from the standard normal, summed over an image's latents."""
        terms = jnp.square(self.mean) + jnp.exp(self.logvar) - 1.0 - self.logvar
        return 0.5 * jnp.sum(terms, axis=(1, 2, 3))


class Encoder(nn.Module):
    """Images to moments [B, h, w, 2C]: levels of residual blocks from fine to coarse."""

    config: AutoencoderConfig
    precision: str

    @nn.compact
    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B h w CC"]:
        config, precision = self.config, self.precision
        x = Conv(config.channels, 3, precision, name="conv_in")(x)
        for level, multiplier in enumerate(config.multipliers):
            x = constrain(x, "batch", None, None, None)
            for i in range(config.blocks):
                width = config.channels * multiplier
                x = ResidualBlock(width, precision, name=f"level_{level}_block_{i}")(x)
                if config.has_attention(level):
                    x = AttentionBlock(precision, name=f"level_{level}_attention_{i}")(x)
            if level < len(config.multipliers) - 1:
                # Pads only the right and bottom by one pixel, like LDM.
                name = f"level_{level}_downsample"
                x = Conv(x.shape[-1], 3, precision, (2, 2), ((0, 1), (0, 1)), name=name)(x)
        x = Middle(precision, name="middle")(x)
        x = nn.swish(GroupNorm(name="norm_out")(x))
        return Conv(config.moments, 3, precision, name="conv_out")(x)


class Codes(nn.Module):
    """The learned codes of a bottleneck, `[V, D]`."""

    shape: tuple[int, int]

    @nn.compact
    def __call__(self) -> Float[Array, "V D"]:
        return self.param("codes", named_axes(nn.initializers.normal(), None, None), self.shape)


class Decoder(nn.Module):
    """Unscaled latents to images: levels of residual blocks from coarse to fine."""

    config: AutoencoderConfig
    precision: str

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B H W I"]:
        config, precision = self.config, self.precision
        x = Conv(config.channels * config.multipliers[-1], 3, precision, name="conv_in")(x)
        x = Middle(precision, name="middle")(x)
        for level, multiplier in reversed(list(enumerate(config.multipliers))):
            x = constrain(x, "batch", None, None, None)
            for i in range(config.blocks + 1):
                width = config.channels * multiplier
                x = ResidualBlock(width, precision, name=f"level_{level}_block_{i}")(x)
            if level > 0:
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
                x = Conv(x.shape[-1], 3, precision, name=f"level_{level}_upsample")(x)
        x = nn.swish(GroupNorm(name="norm_out")(x))
        return Conv(config.image_channels, 3, precision, name="conv_out")(x)


class Autoencoder(nn.Module):
    """The two halves and the 1x1 convolutions between them.

    Attributes:
      config: sizes.
      precision: one of `precision.PRECISIONS`, for everything except parameters and normalisation
        statistics; moments and decoded images are always float32.
    """

    config: AutoencoderConfig
    precision: str = "float32"

    def setup(self):
        self.encoder = Encoder(self.config, self.precision)
        self.decoder = Decoder(self.config, self.precision)
        channels = self.config.latent_channels
        self.quant_conv = Conv(self.config.moments, 1, self.precision)
        self.post_quant_conv = Conv(channels, 1, self.precision)
        if self.config.codebook and self.config.codebook.has_codes:
            self.codebook = Codes((self.config.codes, channels))

    def moments(self, images: Float[Array, "B H W I"]) -> Float[Array, "B h w CC"]:
        """Mean and unclipped log-variance, or what a codebook quantizes, float32.

        The images are in [-1, 1].
        """
        self.config.check_image_size(*images.shape[1:3])
        hidden = self.encoder(images.astype(compute_dtype(self.precision)))
        return self.quant_conv(hidden).astype(jnp.float32)

    def encode(self, images: Float[Array, "B H W I"]) -> Posterior:
        """Images in [-1, 1] -> distribution of their unscaled latents.

        Raises:
          UserError: height or width is not a multiple of the downsampling.
        """
        if self.config.codebook is None:
            return Posterior.from_moments(self.moments(images))
        latents = self.quantized(images).latents
        return Posterior(latents, jnp.full_like(latents, -jnp.inf))

    def quantized(self, images: Float[Array, "B H W I"]) -> Quantized:
        """Codes of images in [-1, 1], where there is a trained codebook; NaN for an output of NaN.

        Raises:
          UserError: height or width is not a multiple of the downsampling.
        """
        assert self.config.codebook is not None
        z = self.moments(images)
        codes = self.codebook() if self.config.codebook.has_codes else None
        found = self.config.codebook.quantize(z, codes)
        broken = jnp.isnan(z).any(axis=-1, keepdims=True)
        return found._replace(latents=jnp.where(broken, jnp.nan, found.latents))

    def decode(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B H W I"]:
        """Unscaled latents -> float32 images, about [-1, 1] and not clipped."""
        hidden = self.post_quant_conv(latents.astype(compute_dtype(self.precision)))
        return self.decoder(hidden).astype(jnp.float32)

    def __call__(
        self, images: Float[Array, "B H W I"], key: Key[Array, ""]
    ) -> tuple[Float[Array, "B H W I"], Posterior]:
        """Reconstruction through a posterior sample, and the posterior: what training needs."""
        posterior = self.encode(images)
        return self.decode(posterior.sample(key)), posterior


@functools.cache
def abstract_params(config: AutoencoderConfig) -> dict[str, Any]:
    """The parameters as `jax.ShapeDtypeStruct`s, boxed with their logical axis names.

    Every call returns the same tree: do not change it.
    """
    side = config.downsampling
    images = jax.ShapeDtypeStruct((1, side, side, config.image_channels), jnp.float32)
    with jax.enable_x64(False):
        key = jax.random.key(0)
        return jax.eval_shape(Autoencoder(config).init, key, images, key)["params"]


def init_params(config: AutoencoderConfig, key: Key[Array, ""]) -> dict[str, Any]:
    """Random unboxed float32 parameters: LeCun-normal kernels, normal codes, biases 0, norms 1.

    All kernels are slices of one draw. Flax makes one draw per kernel, and compiling those takes
    minutes for KL-16 on a CPU.
    """
    shapes: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(
        nn.unbox(abstract_params(config))
    )
    kernels = {path: leaf for path, leaf in shapes.items() if path[-1] in ("kernel", "codes")}
    draws = jax.random.normal(key, (sum(leaf.size for leaf in kernels.values()),))
    params = {
        path: jnp.full(leaf.shape, path[-1] == "scale", leaf.dtype) for path, leaf in shapes.items()
    }
    start = 0
    for path, leaf in kernels.items():
        # Codes get a length of about 1.
        fan_in = leaf.shape[-1] if path[-1] == "codes" else math.prod(leaf.shape[:-1])
        draw = jax.lax.slice(draws, (start,), (start + leaf.size,))
        params[path] = draw.reshape(leaf.shape) / math.sqrt(fan_in)
        start += leaf.size
    return traverse_util.unflatten_dict(params)


def images_to_float(images: UInt8[Array | np.ndarray, "..."]) -> Float[Array, "..."]:
    """uint8 -> float32 in [-1, 1], `x / 127.5 - 1`."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1.0


def images_to_uint8(images: Float[Array | np.ndarray, "..."]) -> UInt8[Array, "..."]:
    """[-1, 1] -> uint8: clipped, then rounded to the nearest level (half to even)."""
    scaled = (jnp.clip(jnp.asarray(images, jnp.float32), -1.0, 1.0) + 1.0) * 127.5
    return jnp.round(scaled).astype(jnp.uint8)


def flatten_positions(latents: Shaped[Array, "B h w C"]) -> Shaped[Array, "B L C"]:
    """Feature map -> positions, row-major."""
    return latents.reshape(latents.shape[0], -1, latents.shape[-1])


def unflatten_positions(
    latents: Shaped[Array | np.ndarray, "B L C"], height: int
) -> Shaped[Array | np.ndarray, "B h w C"]:
    """Inverse of `flatten_positions`, for maps of `height` rows."""
    return latents.reshape(latents.shape[0], height, -1, latents.shape[-1])


def autoencoder_hash(config: AutoencoderConfig, params: Mapping[str, Any]) -> str:
    """sha256 over the config and every parameter's name, shape, dtype and bytes, in name order.

    It identifies an autoencoder in token shards and checkpoints, whatever file it comes from.
    """
    return safetensors_file.sha256(params, json.dumps(config.to_json(), sort_keys=True).encode())


def save_autoencoder(
    directory: epath.PathLike,
    config: AutoencoderConfig,
    params: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
) -> str:
    """Writes `params.safetensors`, then `config.json`, each one atomically.

    Args:
      directory: created if missing.
      config: sizes.
      params: unboxed parameter tree.
      extra: any JSON value, stored next to the config for people (for example, how it was trained).

    Returns:
      The content hash, which `config.json` also has.
    """
    directory = storage.as_path(directory)
    content_hash = autoencoder_hash(config, params)
    safetensors_file.write(directory / "params.safetensors", params)
    described = {"config": config.to_json(), "hash": content_hash, "extra": dict(extra or {})}
    storage.write_json(directory / "config.json", described)
    return content_hash


def autoencoder_exists(directory: epath.PathLike) -> bool:
    """Whether there is a saved autoencoder in `directory`."""
    return (storage.as_path(directory) / "config.json").exists()


def read_description(directory: epath.PathLike) -> dict[str, Any]:
    """Reads the `config.json` of a saved autoencoder: `config`, `hash` and `extra`.

    Raises:
      UserError: it is missing or damaged.
    """
    path = storage.as_path(directory) / "config.json"
    if not storage.exists(path):
        raise UserError(
            f"there is no autoencoder in {directory}: `tokenbridge train-vae` trains one, "
            "`import-torch` imports one"
        )
    described = storage.read_json(path)
    if not isinstance(described, dict) or not {"config", "hash", "extra"} <= described.keys():
        raise UserError(f"{path} does not describe an autoencoder; it may be damaged")
    return described


def load_autoencoder(directory: epath.PathLike) -> tuple[AutoencoderConfig, dict[str, Any]]:
    """Reads a saved autoencoder.

    Returns:
      The config and the parameters as numpy arrays.

    Raises:
      UserError: a file is missing or damaged, or the two do not belong together.
    """
    directory = storage.as_path(directory)
    described = read_description(directory)
    config = AutoencoderConfig.from_json(described["config"])
    path = directory / "params.safetensors"
    params = safetensors_file.read(path)
    if autoencoder_hash(config, params) != described["hash"]:
        raise UserError(f"{path} is not the file that {directory / 'config.json'} describes")
    return config, params
