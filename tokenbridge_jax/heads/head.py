"""What a channel head must give.

A head works on N positions side by side. Channels come in *channel order*: place c of the sequence
holds channel `channel_order[c]`. Outside the head, indices are always in autoencoder order.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Integer, Key


class Head(nn.Module):
    """A distribution over one position's C indices, given the backbone's feature.

    A new head has `logits` and `sample`. `model.make_head` makes it, and
    `TokenBridgeConfig.forward_flops` counts its products. It is called with layers scanned, as
    parameters are stored, or unrolled (see `transformer.unstack`), as it samples.
    """

    channel_order: tuple[int, ...]
    levels: int

    def logits(
        self,
        feature: Float[Array, "N Z"],
        indices: Integer[Array, "N C"],
        as_sampled: bool = False,
    ) -> Float[Array, "N C V"]:
        """Teacher-forced float32 logits, channels in channel order.

        Their softmax is the distribution of a channel, given the feature and of the channels before
        it those that the head looks at: log-probabilities of the channels add up to the position's.

        Args:
          feature: what the backbone says of each position.
          indices: all C indices, in autoencoder order; place c sees none but those of places
            before c.
          as_sampled: of the distribution that `sample` draws from, where a head has one of its own
            for training.
        """
        raise NotImplementedError

    def nll(
        self,
        feature: Float[Array, "N Z"],
        indices: Integer[Array, "N C"],
        as_sampled: bool = False,
    ) -> Float[Array, "N C"]:
        """Negative log-likelihood of every index in nats, in autoencoder order; see `logits`."""
        order = np.array(self.channel_order)
        nll = optax.softmax_cross_entropy_with_integer_labels(
            self.logits(feature, indices, as_sampled), indices[:, order].astype(jnp.int32)
        )
        return nll[:, np.argsort(order)]

    def sample(
        self,
        feature: Float[Array, "N Z"],
        keys: Key[Array, " N"],
        temperature: Float[Array, ""],
        log_probs: bool = False,
    ) -> Int[Array, "N C"] | tuple[Int[Array, "N C"], Float[Array, " N"]]:
        """Draws the C indices of every position; for an unrolled model.

        Args:
          feature: what the backbone says of each position, guidance included.
          keys: a random key a position; what is drawn depends on nothing else that is random.
          temperature: divides the logits; 0 takes what is most likely at every place.
          log_probs: whether the positions' log-probabilities are asked for.

        Returns:
          Indices in autoencoder order; with `log_probs` also the log-probability of each position's
          indices, in nats and float32, among those that this temperature draws. Where it is 0 and
          draws one outcome only, it is that of temperature 1.
        """
        raise NotImplementedError
