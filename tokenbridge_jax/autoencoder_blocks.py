"""The blocks of an autoencoder's encoder and decoder."""

import flax.linen as nn
from jaxtyping import Array, Float

from tokenbridge_jax.layers import Conv, GroupNorm
from tokenbridge_jax.ops.attention import plain_attention


class ResidualBlock(nn.Module):
    """Twice (norm, swish, 3x3 convolution), plus the input (after a 1x1 if the widths differ)."""

    channels: int
    precision: str

    @nn.compact
    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w E"]:
        residual = x
        for i in (1, 2):
            x = nn.swish(GroupNorm(name=f"norm{i}")(x))
            x = Conv(self.channels, 3, self.precision, name=f"conv{i}")(x)
        if residual.shape[-1] != self.channels:
            residual = Conv(self.channels, 1, self.precision, name="shortcut")(residual)
        return residual + x


class AttentionBlock(nn.Module):
    """Single-head attention over all places of the feature map, with a residual connection."""

    precision: str

    @nn.compact
    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        batch, height, width, channels = x.shape
        normed = GroupNorm(name="norm")(x)
        # [B, places, one head, D]
        q, k, v = (
            Conv(channels, 1, self.precision, name=name)(normed).reshape(batch, -1, 1, channels)
            for name in ("query", "key", "value")
        )
        attended = plain_attention(q, k, v, None).reshape(batch, height, width, channels)
        return x + Conv(channels, 1, self.precision, name="out")(attended)


class Middle(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution of either half."""

    precision: str

    @nn.compact
    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        x = ResidualBlock(x.shape[-1], self.precision, name="block_1")(x)
        x = AttentionBlock(self.precision, name="attention")(x)
        return ResidualBlock(x.shape[-1], self.precision, name="block_2")(x)
