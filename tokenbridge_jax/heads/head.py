"""The interface of a head.

A head processes N positions in parallel. It orders channels in *channel order*: place c of its
sequence is channel `channel_order[c]`. Outside the head, indices are always in autoencoder order.
"""

from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, Key, Shaped

from tokenbridge_jax.layers import pick
from tokenbridge_jax.runtime.errors import UserError


class Guidance(NamedTuple):
    """What classifier-free guidance adds to the feature of the class (paper section 3.3).

    Attributes:
      null: the backbone's features without a class.
      scale: of guidance; 1 is none.
    """

    null: Float[Array, "*N Z"]
    scale: Float[Array, ""]


class Activations(NamedTuple):
    """Numbers of one position.

    Attributes:
      hidden: width x layers, summed over everything that goes through the layers.
      outputs: what the last layer gives.
    """

    hidden: int
    outputs: int


class Head(nn.Module):
    """A distribution over one position's C values, given the backbone's feature.

    `model.make_head` builds a head.

    Attributes:
      of_latents: whether the values are latents; otherwise they are indices.
      least_places: the fewest channels, or groups of them, that it takes.
      has_groups: whether it can predict groups of channels as joint classes.
      is_published: whether weights of it were released; `torch_bridge` reads and writes them.
      has_quirk: whether it knows `first_token_quirk`.
      float32_params: parts of the names of parameters that it computes with in float32, whatever
        the dtype.
    """

    of_latents: ClassVar[bool] = False
    least_places: ClassVar[int] = 1
    has_groups: ClassVar[bool] = False
    is_published: ClassVar[bool] = False
    has_quirk: ClassVar[bool] = False
    float32_params: ClassVar[tuple[str, ...]] = ()

    @property
    def has_probabilities(self) -> bool:
        """Whether it knows the probability of values, or their density.

        Confidence order and likelihoods need it.
        """
        return True

    @classmethod
    def check_config(cls, config: Any) -> None:
        """Raises `UserError` if a `TokenBridgeConfig` has settings that this head cannot have."""

    @classmethod
    def check_drawing(cls, trained: Any, drawing: Any) -> None:
        """Raises `UserError` if a model of one `TokenBridgeConfig` cannot draw with another.

        They differ in `model_config.DRAWING_FIELDS`.
        """

    @classmethod
    def summary(cls, config: Any) -> str:
        """The sizes of the head of a `TokenBridgeConfig`, for the card of a model."""
        raise NotImplementedError

    @classmethod
    def position_flops(cls, config: Any) -> int:
        """Matmul FLOPs of the forward pass of one position in training.

        Args:
          config: a `TokenBridgeConfig`; see its `forward_flops`.
        """
        raise NotImplementedError

    @classmethod
    def drawing_flops(cls, config: Any, branches: int) -> int:
        """Matmul FLOPs of drawing one position, with one branch, or two where guidance acts."""
        del branches  # They are mixed before the head.
        return cls.position_flops(config)

    @classmethod
    def activations(cls, config: Any) -> Activations:
        """What training keeps of one position, which the choice of `auto` settings goes by.

        Args:
          config: a `TokenBridgeConfig`.
        """
        raise NotImplementedError

    def loss(
        self, feature: Float[Array, "N Z"], targets: Shaped[Array, "N C"], keys: Key[Array, " N"]
    ) -> Float[Array, "N C"]:
        """What training minimises, for each channel of each position, in autoencoder order.

        Args:
          feature: the backbone's feature of each position.
          targets: the values, in autoencoder order.
          keys: one for each position, of what the loss draws, if it draws anything.
        """
        raise NotImplementedError

    def logits(
        self, feature: Float[Array, "N Z"], indices: Shaped[Array, "N C"], as_sampled: bool = False
    ) -> Float[Array, "N C V"]:
        """See `IndexHead.logits`.

        Raises:
          UserError: the head draws latents.
        """
        raise NotImplementedError

    def nll(
        self, feature: Float[Array, "N Z"], values: Shaped[Array, "N C"], as_sampled: bool = False
    ) -> Float[Array, "N C"]:
        """Negative log-likelihood of every value in nats, in autoencoder order.

        It is -log p of an index, and of a latent -log of its density. The value of a channel is
        predicted from those of the channels before it, so the channels add up to the position's.

        Args:
          feature: the backbone's feature of each position.
          values: all C values, in autoencoder order.
          as_sampled: use the distribution that `sample` draws from, if training has another one.

        Raises:
          UserError: the head has no probabilities.
        """
        raise NotImplementedError

    def sample(
        self,
        feature: Float[Array, "N Z"],
        keys: Key[Array, " N"],
        temperature: Float[Array, ""],
        guidance: Guidance | None = None,
    ) -> tuple[Shaped[Array, "N C"], Float[Array, " N"] | None]:
        """Draws the C values of every position.

        Args:
          feature: the backbone's feature of each position.
          keys: one random key per position, the only source of randomness.
          temperature: 1 is the distribution itself, 0 its mode or what comes nearest to it.
          guidance: None is none. Each head says what it mixes.

        Returns:
          Values in autoencoder order, and the float32 log-probability (or log-density) of each
          position's values, in nats; None if the head does not know it.
        """
        raise NotImplementedError


class IndexHead(Head):
    """A distribution over one position's C indices.

    A new one implements `from_config`, `summary`, `logits`, `sample`, `position_flops` and
    `activations`. `logits` must work with `scan_layers` on and off; `sample` is only called with
    `scan_layers` off.

    Guidance mixes features; see `guided`. Temperature divides the logits, and 0 takes the most
    likely index at every place. `sample` returns the log-probability at this temperature.
    Temperature 0 has only one outcome, so there it is the log-probability at temperature 1.
    """

    has_groups: ClassVar[bool] = True
    channel_order: tuple[int, ...]
    levels: int

    @classmethod
    def from_config(cls, config: Any, channel_order: tuple[int, ...], levels: int) -> "IndexHead":
        """The head of a `TokenBridgeConfig`.

        Args:
          config: the config.
          channel_order: of the head; that of the groups, if there are groups of channels.
          levels: of each place; the joint classes, if there are groups of channels.
        """
        raise NotImplementedError

    def loss(
        self, feature: Float[Array, "N Z"], targets: Integer[Array, "N C"], keys: Key[Array, " N"]
    ) -> Float[Array, "N C"]:
        """See `nll`; nothing is drawn."""
        return self.nll(feature, targets)

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
        self, feature: Float[Array, "N Z"], values: Integer[Array, "N C"], as_sampled: bool = False
    ) -> Float[Array, "N C"]:
        """See `Head.nll`; the order of the channels is the channel order."""
        order = np.array(self.channel_order)
        logits = self.logits(feature, values, as_sampled)
        nll = jax.nn.logsumexp(logits, axis=-1) - pick(logits, values[:, order])
        return jnp.take(nll, np.argsort(order), axis=1, unique_indices=True)

    def sample(
        self,
        feature: Float[Array, "N Z"],
        keys: Key[Array, " N"],
        temperature: Float[Array, ""],
        guidance: Guidance | None = None,
    ) -> tuple[Int[Array, "N C"], Float[Array, " N"] | None]:
        """Draws indices; see the class."""
        raise NotImplementedError


class LatentHead(Head):
    """A distribution over one position's C continuous latents.

    A new one implements `from_config`, `summary`, `loss`, `sample`, `position_flops`,
    `drawing_flops` and `activations`; and `nll`, if it has a density.
    """

    of_latents: ClassVar[bool] = True

    @property
    def has_probabilities(self) -> bool:
        """See `Head.has_probabilities`; not unless a head has a density."""
        return False

    @classmethod
    def from_config(cls, config: Any) -> "LatentHead":
        """The head of a `TokenBridgeConfig`."""
        raise NotImplementedError

    def logits(
        self, feature: Float[Array, "N Z"], indices: Shaped[Array, "N C"], as_sampled: bool = False
    ) -> Float[Array, "N C V"]:
        """Raises `UserError`: latents have no levels."""
        raise UserError("this model's head draws latents, which have no levels and no logits")

    def nll(
        self, feature: Float[Array, "N Z"], values: Float[Array, "N C"], as_sampled: bool = False
    ) -> Float[Array, "N C"]:
        """See `Head.nll`; raises `UserError` unless a head has a density."""
        raise UserError("this model's head gives no probabilities: there is no exact likelihood")


def guided(feature: Float[Array, "N Z"], guidance: Guidance | None) -> Float[Array, "N Z"]:
    """null + scale (feature - null), in float32; without guidance `feature`.

    It mixes features, or what a head predicts from them.
    """
    if guidance is None:
        return feature
    # In float32: a difference of near equals is about to be magnified.
    null = guidance.null.astype(jnp.float32)
    return null + guidance.scale * (feature.astype(jnp.float32) - null)
