"""The interface of a channel head.

A head processes N positions in parallel. It orders channels in *channel order*: place c of its
sequence is channel `channel_order[c]`. Outside the head, indices are always in autoencoder order.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, Key

from tokenbridge_jax.layers import pick


class Guidance(NamedTuple):
    """What classifier-free guidance adds to the feature of the class (paper section 3.3).

    Attributes:
      null: the backbone's features without a class.
      scale: of guidance; 1 is none.
    """

    null: Float[Array, "*N Z"]
    scale: Float[Array, ""]


class Head(nn.Module):
    """A distribution over one position's C indices, given the backbone's feature.

    A new head implements `logits` and `sample`. `model.make_head` builds it, and
    `TokenBridgeConfig.forward_flops` counts its products. `logits` must work with `scan_layers` on
    and off; `sample` is only called with `scan_layers` off.
    """

    channel_order: tuple[int, ...]
    levels: int

    def logits(
        self, feature: Float[Array, "N Z"], indices: Integer[Array, "N C"], as_sampled: bool = False
    ) -> Float[Array, "N C V"]:
        """Teacher-forced float32 logits, channels in channel order.

        Their softmax is the distribution of a channel, given the feature and the earlier channels
        that the head uses. So the log-probabilities of the channels add up to the position's.

        Args:
          feature: the backbone's feature of each position.
          indices: all C indices, in autoencoder order; place c only sees those of earlier places.
          as_sampled: use the distribution that `sample` draws from, if training has another one.
        """
        raise NotImplementedError

    def nll(
        self, feature: Float[Array, "N Z"], indices: Integer[Array, "N C"], as_sampled: bool = False
    ) -> Float[Array, "N C"]:
        """Negative log-likelihood of every index in nats, in autoencoder order; see `logits`."""
        order = np.array(self.channel_order)
        logits = self.logits(feature, indices, as_sampled)
        nll = jax.nn.logsumexp(logits, axis=-1) - pick(logits, indices[:, order])
        return jnp.take(nll, np.argsort(order), axis=1, unique_indices=True)

    def sample(
        self,
        feature: Float[Array, "N Z"],
        keys: Key[Array, " N"],
        temperature: Float[Array, ""],
        guidance: Guidance | None = None,
    ) -> tuple[Int[Array, "N C"], Float[Array, " N"]]:
        """Draws the C indices of every position.

        Args:
          feature: the backbone's feature of each position.
          keys: one random key per position, the only source of randomness.
          temperature: divides the logits; 0 takes the most likely index at every place.
          guidance: None is none. Heads of indices mix features; see `guided`.

        Returns:
          Indices in autoencoder order, and the float32 log-probability of each position's indices,
          in nats, at this temperature. Temperature 0 has only one outcome, so there it is the
          log-probability at temperature 1.
        """
        raise NotImplementedError


def guided(feature: Float[Array, "N Z"], guidance: Guidance | None) -> Float[Array, "N Z"]:
    """The features null + scale (feature - null), in float32; without guidance `feature`."""
    if guidance is None:
        return feature
    # In float32: a difference of near equals is about to be magnified.
    null = guidance.null.astype(jnp.float32)
    return null + guidance.scale * (feature.astype(jnp.float32) - null)
