"""Autoencoder: images to latents and back (KL-16 of LDM/MAR, and its family).

The encoder halves the image once per level and returns the mean and log-variance of a diagonal
normal. The decoder mirrors it, with one more residual block per level. Arrays are NHWC. In the
vocabulary of this package, a latent is `posterior sample x config.scale`; `Autoencoder` itself
never applies the scale. A trained codebook takes the place of the normal distribution if
`config.bottleneck` is not "kl" (see `bottleneck`).
"""

import dataclasses
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
from tokenbridge_jax.bottleneck import Bottleneck, Quantized, make_bottleneck
from tokenbridge_jax.layers import Conv, GroupNorm
from tokenbridge_jax.ops.precision import compute_dtype
from tokenbridge_jax.runtime import safetensors_file, storage
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.meshes import constrain, named_axes

LOGVAR_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of an autoencoder; the defaults are KL-16.

    Attributes:
      image_size: the side of the training images in pixels. The network is convolutional and takes
        any multiple of `downsampling`; this nominal size decides which levels have attention.
      image_channels: 3, or 1 for grey images.
      channels: the width of the first level.
      multipliers: the width of every level as a multiple of `channels`; images are halved between
        two levels.
      blocks: residual blocks per encoder level; the decoder has one more.
      attention_resolutions: encoder levels of these nominal sizes have attention after each block.
      latent_channels: C.
      scale: the factor from a posterior sample to a latent; 0.2325 gives KL-16's unit variance.
      bottleneck: "kl", or a trained codebook: one of `bottleneck.BOTTLENECKS`.
      codes: V of the bottleneck "vq".
      levels: V of the bottleneck "fsq", for every channel.
    """

    image_size: int = 256
    image_channels: int = 3
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    latent_channels: int = 16
    scale: float = 0.2325
    bottleneck: str = "kl"
    codes: int = 1024
    levels: int = 8

    def __post_init__(self):
        make_bottleneck(self.bottleneck, self.codes, self.levels)
        if not self.multipliers or min(self.multipliers) < 1:
            raise UserError(f"autoencoder multipliers {self.multipliers} must be positive numbers")
        for name in ("image_size", "image_channels", "channels", "blocks", "latent_channels"):
            if getattr(self, name) < 1:
                raise UserError(f"autoencoder {name} is {getattr(self, name)}, must be at least 1")
        if not self.scale > 0:
            raise UserError(f"autoencoder scale is {self.scale}, must be positive")
        self.check_image_size(self.image_size, self.image_size)
        for width in sorted({self.channels * multiplier for multiplier in self.multipliers}):
            if width % min(32, width):
                raise UserError(
                    f"autoencoder width {width} (channels x multiplier) must be below 32 or a "
                    "multiple of 32, for its 32 normalisation groups"
                )

    @classmethod
    def kl16(cls) -> "AutoencoderConfig":
        """The 66,456,019-parameter autoencoder that TokenBridge and MAR build on."""
        return cls()

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "AutoencoderConfig":
        """From the fields by name, as in the result of `to_json` or in a config file.

        Raises:
          UserError: a field is unknown or its value makes no sense.
        """
        unknown = sorted(set(value) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise UserError(f"unknown autoencoder setting {', '.join(unknown)}")
        fields = dict(value)
        for name in {"multipliers", "attention_resolutions"} & set(fields):
            values = fields[name] = tuple(fields[name])  # JSON has lists only
            if not all(isinstance(value, int) for value in values):
                raise UserError(
                    f"autoencoder {name} {values} must be whole numbers, such as "
                    f"--config.autoencoder.{name}=1,2,4, or () for none"
                )
        return cls(**fields)

    def to_json(self) -> dict[str, Any]:
        """Plain dict of numbers and lists.

        Without a codebook's fields if they have their default values: the hash of an autoencoder
        that was trained before there were codebooks stays the same.
        """
        value = dataclasses.asdict(self)
        for field in dataclasses.fields(self):
            of_codebook = field.name in ("bottleneck", "codes", "levels")
            if of_codebook and value[field.name] == field.default:
                del value[field.name]
        return json.loads(json.dumps(value))

    @property
    def codebook(self) -> Bottleneck | None:
        """What takes the place of the posterior; None without a trained codebook."""
        return make_bottleneck(self.bottleneck, self.codes, self.levels)

    def check_posterior(self, user: str, mend: str) -> None:
        """Checks that there is a posterior, for what needs one.

        Args:
          user: what needs it, as the subject of the message.
          mend: what the user of the program can do.

        Raises:
          UserError: a trained codebook takes its place.
        """
        if self.codebook is not None:
            raise UserError(
                f"{user} needs an autoencoder with a posterior, but this one has a trained "
                f"codebook ({self.bottleneck}); {mend}"
            )

    @property
    def moments(self) -> int:
        """The channels of the encoder's output."""
        return self.latent_channels * (2 if self.codebook is None else 1)

    @property
    def index_channels(self) -> int:
        """C of the indices: 1 if an index stands for a whole vector, or that of the latents."""
        return 1 if self.codebook and self.codebook.has_codes else self.latent_channels

    @property
    def downsampling(self) -> int:
        """The side of one position in pixels."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def grid(self) -> int:
        """The side of an image of the nominal size in positions."""
        return self.image_size // self.downsampling

    @property
    def positions(self) -> int:
        """L, the number of positions of an image of the nominal size."""
        return self.grid**2

    def has_attention(self, level: int) -> bool:
        """Whether encoder level `level` has attention after each of its blocks."""
        return self.image_size // 2**level in self.attention_resolutions

    def check_image_size(self, height: int, width: int) -> None:
        """Raises `UserError` unless both sides are multiples of `downsampling`."""
        if height % self.downsampling or width % self.downsampling:
            raise UserError(
                f"image size {height}x{width} is not divisible by the autoencoder's downsampling, "
                f"{self.downsampling}; use a multiple of it or fewer autoencoder multipliers"
            )


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


def abstract_params(config: AutoencoderConfig) -> dict[str, Any]:
    """The parameters as `jax.ShapeDtypeStruct`s, boxed with their logical axis names."""
    side = config.downsampling
    images = jax.ShapeDtypeStruct((1, side, side, config.image_channels), jnp.float32)
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
