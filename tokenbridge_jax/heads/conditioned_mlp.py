"""MAR's small network (Li et al., 2024, arXiv 2406.11838), which heads of latents share.

It sees the noisy latents of one position, the time and the backbone's feature. Positions are
independent of each other, given their features.
"""

import functools
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Shaped

from tokenbridge_jax.heads.head import Activations, Guidance, LatentHead, guided
from tokenbridge_jax.layers import Dense, LayerNorm, copies
from tokenbridge_jax.ops.norm import normalize
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.transformer import Modulation, embedding_init, modulate, stack_layers

SINUSOIDS = 256


class ResidualBlock(nn.Module):
    """A linear layer, SiLU and another one, with a modulated norm before and a gate after."""

    dtype: Any = jnp.float32
    float8: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "*N D"], condition: Float[Array, "*N D"]
    ) -> tuple[Float[Array, "*N D"], None]:
        """Runs the block; `condition` is after its SiLU."""
        width = x.shape[-1]
        modulation = Modulation(3, self.dtype, self.float8, name="modulation")(condition)
        shift, scale, gate = jnp.split(modulation, 3, axis=-1)
        h = modulate(LayerNorm(self.dtype, name="norm")(x), shift, scale)
        fc1 = Dense((width,), ("embed", "mlp"), self.dtype, float8=self.float8, name="fc1")
        fc2 = Dense((width,), ("mlp", "embed"), self.dtype, float8=self.float8, name="fc2")
        return x + gate * fc2(nn.silu(fc1(h))), None


class ConditionedMLP(LatentHead):
    """Draws latents from noise, by many runs of the network.

    Attributes:
      channels: C.
      width: of the network.
      layers: residual blocks of the network.
      draws: times and noises that the loss draws for each position.
      steps: of sampling.
      dtype: of the network's activations.
      scan_layers, float8: see `TokenBridgeConfig`.
      outputs: numbers that the network predicts for each channel.
    """

    channels: int
    width: int
    layers: int
    draws: int = 4
    steps: int = 100
    dtype: Any = jnp.float32
    scan_layers: bool = True
    float8: bool = False

    outputs: ClassVar[int] = 1

    @classmethod
    def from_config(cls, config: Any, **more: Any) -> "ConditionedMLP":
        """See `LatentHead.from_config`; `more` are the fields that a subclass adds."""
        return cls(
            config.channels,
            config.head_width,
            config.head_layers,
            config.head_draws,
            config.head_steps,
            jnp.dtype(config.dtype),
            config.scan_layers,
            config.float8,
            **more,
        )

    @classmethod
    def summary(cls, config: Any) -> str:
        """See `Head.summary`."""
        blocks = f"{config.head_layers} blocks of width {config.head_width}"
        return f"{blocks}, {config.head_steps} steps"

    @classmethod
    def position_flops(cls, config: Any) -> int:
        """See `Head.position_flops`."""
        width = config.head_width
        time = 2 * (SINUSOIDS * width + width * width)
        condition = 2 * config.decoder_width * width
        return condition + config.head_draws * (time + cls._network_flops(config))

    @classmethod
    def drawing_flops(cls, config: Any, branches: int) -> int:
        """See `Head.drawing_flops`: the branches share nothing; all positions share the times."""
        condition = 2 * config.decoder_width * config.head_width
        return branches * (condition + cls.runs(config) * cls._network_flops(config))

    @classmethod
    def activations(cls, config: Any) -> Activations:
        """See `Head.activations`: of all draws."""
        hidden = config.head_width * config.head_layers
        return Activations(
            config.head_draws * hidden, config.head_draws * cls.outputs * config.channels
        )

    @classmethod
    def runs(cls, config: Any) -> int:
        """How often the network runs to draw a position."""
        return int(config.head_steps)

    @classmethod
    def _network_flops(cls, config: Any) -> int:
        """Of one run of the network, without the embeddings of condition and time."""
        width, channels = config.head_width, config.channels
        block = (3 + 2) * width * width  # Modulation and two linear layers.
        final = 2 * width * width + cls.outputs * channels * width
        return 2 * (channels * width + config.head_layers * block + final)

    def setup(self) -> None:
        of_width = functools.partial(Dense, (self.width,), (None, "embed"), self.dtype)
        self.input_proj = of_width()
        self.condition_proj = of_width()
        self.time_fc1 = of_width(init=embedding_init)
        self.time_fc2 = of_width(init=embedding_init)
        stack = stack_layers(ResidualBlock, self.layers, scan_layers=self.scan_layers)
        self.blocks = stack(self.dtype, self.float8)
        self.final_modulation = Modulation(2, self.dtype)
        features, zeros = (self.outputs * self.channels,), nn.initializers.zeros
        self.output = Dense(features, ("embed", None), self.dtype, init=zeros)

    def network(
        self, noisy: Float[Array, "*N C"], condition: Float[Array, "*N D"]
    ) -> Float[Array, "*N {self.outputs}*C"]:
        """Runs the network; `condition` is the sum of the embeddings of feature and time."""
        condition = nn.silu(condition)
        x, _ = self.blocks(self.input_proj(noisy), condition)
        shift, scale = jnp.split(self.final_modulation(condition), 2, axis=-1)
        x = modulate(normalize(x).astype(self.dtype), shift, scale)
        return self.output(x).astype(jnp.float32)

    def condition(
        self, feature: Float[Array, "N Z"], time: Shaped[Array, "draws N"]
    ) -> Float[Array, "draws N D"]:
        """The sum of the embeddings of features and times, for the loss."""
        times = self.time_embedding(time)
        return copies(self.condition_proj(feature)[None], times.shape, self.dtype) + times

    def branches(
        self, feature: Float[Array, "N Z"], guidance: Guidance | None
    ) -> Float[Array, "N branches D"]:
        """The embeddings of the features of class and, with guidance, null.

        They are side by side, so that a position's two branches stay on one device.
        """
        features = [feature] if guidance is None else [feature, guidance.null]
        condition = self.condition_proj(jnp.stack(features, axis=1))
        return meshes.constrain(condition, "batch", None, None)

    def time_embedding(self, time: Shaped[Array, "*N"]) -> Float[Array, "*N D"]:
        """Of times 0 to 1000: sinusoids, cosines first, and two linear layers with SiLU between."""
        half = SINUSOIDS // 2
        frequencies = np.exp(-math.log(10000) * np.arange(half) / half).astype(np.float32)
        angles = jnp.multiply.outer(time.astype(jnp.float32), frequencies)
        sinusoids = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        return self.time_fc2(nn.silu(self.time_fc1(sinusoids)))


def draw_noise(
    keys: Key[Array, " N"], i: Int[Array, ""] | int, channels: int
) -> Float[Array, "N C"]:
    """Normal noise of every position, number i of its key."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), (channels,)))(keys)


def mixed(
    predicted: Float[Array, "N branches C"], guidance: Guidance | None
) -> Float[Array, "N C"]:
    """The prediction for the class, or the one that guidance mixes of both branches."""
    if guidance is None:
        return predicted[:, 0]
    return guided(predicted[:, 0], guidance._replace(null=predicted[:, 1]))
