"""The patch discriminator that trains an autoencoder against blur (LDM, arXiv 2112.10752, G)."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokenbridge_jax.layers import Conv, GroupNorm
from tokenbridge_jax.ops.precision import compute_dtype
from tokenbridge_jax.runtime.errors import UserError

# Convolutions with strides 2 and 1, both with a border of one pixel, as in pix2pix.
_KERNEL, _BORDER = 4, ((1, 1), (1, 1))


@dataclasses.dataclass(frozen=True)
class Adversary:
    """A discriminator and its part in the loss of an autoencoder.

    Attributes:
      weight: of the discriminator's gradient, relative to that of the reconstruction (LDM: 0.5).
      start: number of updates before the discriminator takes part (LDM: 50,001).
      channels: of its first layer; the next ones have twice as many each, up to eight times.
      layers: number of its convolutions with stride 2.

    Raises:
      UserError: a value makes no sense.
    """

    weight: float
    start: int = 0
    channels: int = 64
    layers: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise UserError(f"the discriminator's weight is {self.weight}, must be positive")
        if self.start < 0:
            raise UserError(f"the discriminator's start is {self.start}, must be at least 0")
        if self.layers < 1:
            raise UserError(f"the discriminator has {self.layers} layers, must have at least 1")
        if self.channels < 1:
            raise UserError(f"the discriminator has {self.channels} channels, must have at least 1")
        for width in map(self.width, range(1, self.layers + 1)):
            if width % min(32, width):
                raise UserError(
                    f"a discriminator of {self.channels} channels has a layer of {width}, which "
                    "must be below 32 or a multiple of 32, for its 32 normalisation groups; set "
                    "vae_training.discriminator_channels to 32 or 64"
                )

    def width(self, layer: int) -> int:
        """Number of channels of a layer."""
        return self.channels * min(2**layer, 8)

    def check_image_size(self, side: int) -> None:
        """Raises `UserError` if no patch is left of an image of this side."""
        smallest = 3 * 2**self.layers
        if side < smallest:
            raise UserError(
                f"a discriminator of {self.layers} layers needs images of {smallest} pixels or "
                f"more, not {side}; set vae_training.discriminator_layers lower"
            )


class Discriminator(nn.Module):
    """Images in [-1, 1] -> float32 logits of their patches, positive for real ones.

    LDM normalises over the batch. This network normalises each image by itself, in groups of
    channels, so that images do not depend on the others of their batch.
    """

    adversary: Adversary
    precision: str

    @nn.compact
    def __call__(self, images: Float[Array, "B H W I"]) -> Float[Array, "B h w 1"]:
        x = images.astype(compute_dtype(self.precision))
        for layer in range(self.adversary.layers + 1):
            strides = (2, 2) if layer < self.adversary.layers else (1, 1)
            x = self._conv(self.adversary.width(layer), strides, f"conv_{layer}")(x)
            if layer:
                x = GroupNorm(name=f"norm_{layer}")(x)
            x = nn.leaky_relu(x, 0.2)
        return self._conv(1, (1, 1), "logits")(x).astype(jnp.float32)

    def _conv(self, channels: int, strides: tuple[int, int], name: str) -> Conv:
        return Conv(channels, _KERNEL, self.precision, strides, _BORDER, name=name)


def init_discriminator(adversary: Adversary, image_channels: int, key: jax.Array) -> Any:
    """Boxed float32 parameters."""
    side = 3 * 2**adversary.layers
    images = jnp.zeros((1, side, side, image_channels), jnp.float32)
    return Discriminator(adversary, "float32").init(key, images)["params"]
