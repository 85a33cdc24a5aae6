"""The sizes of an autoencoder, and what follows from them."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from tokenbridge_jax.bottleneck import Bottleneck, make_bottleneck
from tokenbridge_jax.runtime.errors import UserError


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
