"""GIVT's head (Tschannen et al., 2023, arXiv 2312.02116): a mixture of normal distributions.

A linear layer on the backbone's feature gives a mixture of k normal distributions of the position's
C latents. Within a component the channels are independent. So the density of a position is exact.
"""

import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from tokenbridge_jax.heads.head import Activations, Guidance, LatentHead
from tokenbridge_jax.layers import Dense
from tokenbridge_jax.runtime import meshes

# The smallest deviation. Without one, a latent that is the same in all images, as where images
# have a uniform border, would have an unbounded density.
MIN_DEVIATION = 1e-3


class Mixture(NamedTuple):
    """A mixture of k normal distributions for each position, float32.

    Attributes:
      log_weights: log-probabilities of the components.
      means: of their channels.
      deviations: of their channels.
    """

    log_weights: Float[Array, "*N k"]
    means: Float[Array, "*N k C"]
    deviations: Float[Array, "*N k C"]

    def log_density(self, x: Float[Array, "N draws C"]) -> Float[Array, "N draws"]:
        """Of several draws for each position; components one by one, which takes less memory."""

        def add(total: Float[Array, "N draws"], component: Any) -> tuple[jax.Array, None]:
            log_weight, mean, deviation = (x[:, None] for x in component)
            of_channels = _log_normal(x, mean, deviation)
            return jnp.logaddexp(total, log_weight + of_channels.sum(axis=-1)), None

        components = jax.tree.map(lambda x: x.swapaxes(0, 1), tuple(self))
        return jax.lax.scan(add, jnp.full(x.shape[:2], -jnp.inf), components)[0]

    def draw(self, key: Key[Array, ""], temperature: Float[Array, ""]) -> Float[Array, " C"]:
        """Draws the latents of one position, whose mixture this is; see `MixtureHead.sample`."""
        component_key, noise_key = jax.random.split(key)
        # As in heads of indices, this divides the logits and also works for temperature 0.
        gumbel = temperature * jax.random.gumbel(component_key, self.log_weights.shape)
        component = jnp.argmax(self.log_weights + gumbel)
        noise = temperature * jax.random.normal(noise_key, self.means.shape[-1:])
        return self.means[component] + self.deviations[component] * noise


class MixtureHead(LatentHead):
    """Draws latents from a mixture, which is computed in float32.

    The deviations are softplus of what the layer gives, plus `MIN_DEVIATION`.

    Attributes:
      channels: C.
      components: k.
      proposals: draws that guidance chooses from.
    """

    channels: int
    components: int = 16
    proposals: int = 256

    float32_params: ClassVar[tuple[str, ...]] = ("mixture_proj",)

    @property
    def has_probabilities(self) -> bool:
        """See `Head.has_probabilities`."""
        return True

    @classmethod
    def from_config(cls, config: Any) -> "MixtureHead":
        """See `LatentHead.from_config`."""
        return cls(config.channels, config.head_components, config.head_proposals)

    @classmethod
    def summary(cls, config: Any) -> str:
        """See `Head.summary`."""
        return f"{config.head_components} components"

    @classmethod
    def position_flops(cls, config: Any) -> int:
        """See `Head.position_flops`."""
        return 2 * config.decoder_width * config.head_components * (1 + 2 * config.channels)

    @classmethod
    def drawing_flops(cls, config: Any, branches: int) -> int:
        """See `Head.drawing_flops`; densities are no products."""
        return branches * cls.position_flops(config)

    @classmethod
    def activations(cls, config: Any) -> Activations:
        """See `Head.activations`: the components of all channels."""
        return Activations(0, config.head_components * (1 + 2 * config.channels))

    def setup(self) -> None:
        features = self.components, 1 + 2 * self.channels
        self.mixture_proj = Dense(features, ("embed", None, None))

    def mixture(self, feature: Float[Array, "N Z"]) -> Mixture:
        """The mixtures of positions."""
        # Positions stay on the devices of their images, whatever the parameters' layout suggests.
        numbers = meshes.constrain(self.mixture_proj(feature), "batch", None, None)
        logits, means, raw = jnp.split(numbers, [1, 1 + self.channels], axis=-1)
        log_weights = jax.nn.log_softmax(logits[..., 0])
        return Mixture(log_weights, means, jax.nn.softplus(raw) + MIN_DEVIATION)

    def loss(
        self, feature: Float[Array, "N Z"], targets: Float[Array, "N C"], keys: Key[Array, " N"]
    ) -> Float[Array, "N C"]:
        """See `nll`; nothing is drawn."""
        return self.nll(feature, targets)

    def nll(
        self, feature: Float[Array, "N Z"], values: Float[Array, "N C"], as_sampled: bool = False
    ) -> Float[Array, "N C"]:
        """See `Head.nll`: -log p(channel c | channels 0..c-1), in the autoencoder's order.

        The sum over the components of the joint density of the first c channels is exact, and a
        channel's density is the ratio of two such sums. Their logarithms add up to the position's.
        """
        mixture = self.mixture(feature)
        of_channels = _log_normal(values[:, None], mixture.means, mixture.deviations)
        joint = mixture.log_weights[..., None] + jnp.cumsum(of_channels, axis=-1)
        log_density = jax.nn.logsumexp(joint, axis=1)
        return -jnp.diff(log_density, axis=1, prepend=0)

    def sample(
        self,
        feature: Float[Array, "N Z"],
        keys: Key[Array, " N"],
        temperature: Float[Array, ""],
        guidance: Guidance | None = None,
    ) -> tuple[Float[Array, "N C"], Float[Array, " N"]]:
        """Draws latents; see `Head.sample`.

        The temperature multiplies the deviations, as in GIVT, and divides the logits of the
        components; 0 gives the mean of the likeliest one. Guidance draws from the density
        p (p / null)**(scale - 1), as in GIVT, but by importance resampling: of `proposals` draws
        from p, it takes one with a probability proportional to (p / null)**(scale - 1). The more
        proposals, the closer the result is to this density.

        The log-density returned is that of p, at temperature 1 and without guidance. The guided one
        has no known constant, and at temperature 0 there is none.
        """
        mixture = self.mixture(feature)
        count = 1 if guidance is None else self.proposals
        proposal_keys, choice_keys = jax.vmap(jax.random.split, out_axes=1)(keys)

        def propose(mixture: Mixture, key: Key[Array, ""]) -> Float[Array, "proposals C"]:
            return jax.vmap(mixture.draw, (0, None))(jax.random.split(key, count), temperature)

        proposed = jax.vmap(propose)(mixture, proposal_keys)
        log_density = mixture.log_density(proposed)
        if guidance is None:
            return proposed[:, 0], log_density[:, 0]
        null_density = self.mixture(guidance.null).log_density(proposed)
        log_weights = (guidance.scale - 1) * (log_density - null_density)
        gumbel = jax.vmap(lambda key: jax.random.gumbel(key, (count,)))(choice_keys)
        chosen = jnp.argmax(log_weights + gumbel, axis=1)[:, None]
        latents = jnp.take_along_axis(proposed, chosen[..., None], axis=1)[:, 0]
        return latents, jnp.take_along_axis(log_density, chosen, axis=1)[:, 0]


def _log_normal(x: jax.Array, mean: jax.Array, deviation: jax.Array) -> jax.Array:
    """The log-density of a normal distribution."""
    standard = (x - mean) / deviation
    return -0.5 * (jnp.square(standard) + math.log(2 * math.pi)) - jnp.log(deviation)
