"""The training loss: backbone once, head chunk by chunk (paper eq. 6).

The head holds three quarters of the FLOPs and nearly all of the activations: sixteen tokens a
hidden position. They never exist for more than a chunk of positions.

Shapes are static: of the L slots of an order (see `backbone.py`), the last S go to the encoder and
the first M to the head. A batch hides `num_hidden` positions, a traced number with
`L - S <= num_hidden <= M`; slots beyond it are padding, which no attention and no loss counts.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from tokenbridge_jax.model import TokenBridge, TokenBridgeConfig, make_head, merge
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.transformer import unstack


def loss(
    config: TokenBridgeConfig,
    params: dict[str, Any],
    indices: Integer[Array, "B L C"],
    labels: Int[Array, " B"],
    order: Int[Array, "B L"],
    num_hidden: Int[Array, ""],
    drop_class: Bool[Array, " B"],
    dropout_key: Key[Array, ""] | None = None,
    *,
    hidden_slots: int,
    visible_slots: int,
    head_fraction: float = 1.0,
) -> Float[Array, ""]:
    """Mean cross-entropy in nats over hidden positions and channels (paper eq. 6).

    Args:
      config: the model.
      params: its parameters.
      indices: of whole images, positions row-major, channels in autoencoder order.
      labels: classes.
      order: a permutation of the positions for each image.
      num_hidden: how many slots at the front of `order` are hidden.
      drop_class: where the null latent takes the place of the class.
      dropout_key: without it there is no dropout.
      hidden_slots: M, at least `num_hidden`.
      visible_slots: S, at least `L - num_hidden`.
      head_fraction: the share of the hidden slots that goes through the head. Orders are random,
        so the first slots are a random choice and their mean is an unbiased estimate of the loss.
    """
    if not config.scan_layers:
        params = unstack(params)
    backbone_key, head_key = (None, None) if dropout_key is None else jax.random.split(dropout_key)
    scored = max(1, round(head_fraction * hidden_slots))
    feature, slots = scored_slots(
        config,
        params,
        indices,
        labels,
        order,
        num_hidden,
        drop_class,
        backbone_key,
        scored,
        visible_slots,
    )
    batch, _, channels = slots.shape
    weight = 1 / (batch * channels * jnp.minimum(num_hidden, scored))
    weights = jnp.where(jnp.arange(scored) < num_hidden, weight, 0)[None]
    chunks = split_slots(config, batch, feature, slots, weights)
    keys = None if head_key is None else jax.random.split(head_key, len(chunks[0]))

    def chunk_loss(head_params: Any, feature: jax.Array, rest: Any) -> jax.Array:
        indices, weights, key = rest
        return jnp.sum(_nll(config, head_params, feature, indices, key) * weights[..., None])

    return sum_over_chunks(chunk_loss, params["head"], chunks[0], (*chunks[1:], keys))


def image_nll(
    config: TokenBridgeConfig,
    params: dict[str, Any],
    indices: Integer[Array, "B L C"],
    labels: Int[Array, " B"],
    order: Int[Array, "B L"],
    num_hidden: Int[Array, ""],
    drop_class: Bool[Array, " B"],
    *,
    hidden_slots: int,
    visible_slots: int,
) -> Float[Array, "B C"]:
    """Every image's cross-entropy in nats: its mean over hidden positions, for each channel.

    As in training: without `first_token_quirk`.

    Args: as for `loss`. There is no dropout.
    """
    nll = _slot_nll(
        config,
        params,
        indices,
        labels,
        order,
        num_hidden,
        drop_class,
        hidden_slots=hidden_slots,
        visible_slots=visible_slots,
    )
    hidden = (jnp.arange(hidden_slots) < num_hidden)[None, :, None]
    return jnp.sum(jnp.where(hidden, nll, 0), axis=1) / num_hidden


def position_nll(
    config: TokenBridgeConfig,
    params: dict[str, Any],
    indices: Integer[Array, "B L C"],
    labels: Int[Array, " B"] | Float[Array, "B classes"],
    hidden: Bool[Array, "B L"],
) -> Float[Array, "B L C"]:
    """Cross-entropy in nats of every index at a hidden position; NaN at visible ones.

    It is that of what the model samples, with `first_token_quirk` where that is on.

    Args:
      config: the model.
      params: its parameters.
      indices: of whole images, positions row-major, channels in autoencoder order.
      labels: classes, or weights of them (see `Backbone.class_latent`).
      hidden: which positions are predicted from the others, in any image any number.
    """
    order = jnp.argsort(~hidden, axis=1, stable=True)
    nll = _slot_nll(
        config,
        params,
        indices,
        labels,
        order,
        jnp.sum(hidden, axis=1),
        jnp.zeros(len(indices), bool),
        hidden_slots=config.positions,
        visible_slots=config.positions,
        as_sampled=True,
    )
    nll = jnp.take_along_axis(nll, jnp.argsort(order, axis=1)[:, :, None], axis=1)
    return jnp.where(hidden[:, :, None], nll, jnp.nan)


def _slot_nll(
    config: TokenBridgeConfig,
    params: dict[str, Any],
    indices: Integer[Array, "B L C"],
    labels: Int[Array, " B"] | Float[Array, "B classes"],
    order: Int[Array, "B L"],
    num_hidden: Int[Array, "*b"],
    drop_class: Bool[Array, " B"],
    *,
    hidden_slots: int,
    visible_slots: int,
    as_sampled: bool = False,
) -> Float[Array, "B M C"]:
    """Cross-entropy of the first M slots, those that are visible included; without dropout."""
    if not config.scan_layers:
        params = unstack(params)
    feature, slots = scored_slots(
        config,
        params,
        indices,
        labels,
        order,
        num_hidden,
        drop_class,
        None,
        hidden_slots,
        visible_slots,
    )
    batch, _, channels = slots.shape
    chunks = split_slots(config, batch, feature, slots)

    def chunk_nll(chunk: list[jax.Array]) -> jax.Array:
        feature, indices = chunk
        return _nll(config, params["head"], feature, indices, None, as_sampled)

    nll = jax.lax.map(chunk_nll, chunks)
    return nll.swapaxes(0, 1).reshape(batch, -1, channels)[:, :hidden_slots]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sum_over_chunks(
    function: Callable[[Any, Any, Any], jax.Array], params: Any, inputs: Any, rest: Any
) -> Float[Array, ""]:
    """The sum over i of `function(params, inputs[i], rest[i])`, in the memory of one chunk.

    The gradient of a sum needs nothing of the other summands: differentiated, each chunk goes
    forward and backward before the next one begins. Rematerialising chunks would save as much
    memory but compute the forward pass twice.

    Args:
      function: gives a scalar.
      params: a tree; differentiable.
      inputs: a tree of arrays whose first axis counts chunks; differentiable.
      rest: another, not differentiable.
    """

    def add(total: jax.Array, chunk: tuple[Any, Any]) -> tuple[jax.Array, None]:
        return total + function(params, *chunk), None

    return jax.lax.scan(add, jnp.float32(0), (inputs, rest))[0]


def _sum_and_gradients(
    function: Callable[[Any, Any, Any], jax.Array], params: Any, inputs: Any, rest: Any
) -> tuple[jax.Array, Any]:
    def add(carry: Any, chunk: tuple[Any, Any]) -> tuple[Any, Any]:
        value, gradients = jax.value_and_grad(function, argnums=(0, 1))(params, *chunk)
        return jax.tree.map(jnp.add, carry, (value, gradients[0])), gradients[1]

    start = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
    (total, d_params), d_inputs = jax.lax.scan(add, start, (inputs, rest))
    return total, (d_params, d_inputs)


def _scale_gradients(
    function: Callable[[Any, Any, Any], jax.Array], gradients: Any, d_total: jax.Array
) -> tuple[Any, Any, None]:
    del function
    d_params, d_inputs = jax.tree.map(lambda x: x * d_total.astype(x.dtype), gradients)
    return d_params, d_inputs, None


sum_over_chunks.defvjp(_sum_and_gradients, _scale_gradients)


def scored_slots(
    config: TokenBridgeConfig,
    params: Any,
    indices: jax.Array,
    labels: jax.Array,
    order: jax.Array,
    num_hidden: jax.Array,
    drop_class: jax.Array,
    dropout_key: jax.Array | None,
    scored: int,
    visible_slots: int,
) -> tuple[Float[Array, "B M D"], Integer[Array, "B M C"]]:
    """The backbone's features of the first `scored` slots, and their indices."""
    slots = jnp.take_along_axis(indices, order[:, :, None], axis=1)
    feature: Any = TokenBridge(config, unrolled=not config.scan_layers).apply(
        {"params": params},
        slots[:, config.positions - visible_slots :],
        labels,
        order,
        num_hidden,
        drop_class,
        rngs=_rngs(dropout_key),
        method=TokenBridge.features,
    )
    return feature[:, :scored], slots[:, :scored]


def split_slots(config: TokenBridgeConfig, batch: int, *arrays: jax.Array) -> list[jax.Array]:
    """Arrays `[B, M, ...]` as `[chunks, B, M / chunks, ...]`, padded with zeros.

    Slots are cut, not images: every chunk has its share of every device's images.
    """
    slots = arrays[0].shape[1]
    count, size = head_chunks(config, slots, batch, meshes.batch_shards_in_use())

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, count * size - slots), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(len(x), count, size, *x.shape[2:]).swapaxes(0, 1)

    return [split(x) for x in arrays]


def head_chunks(
    config: TokenBridgeConfig, slots: int, batch: int, batch_shards: int
) -> tuple[int, int]:
    """Into how many chunks, of how many slots of an image, the head's work is cut."""
    most = max(1, config.head_chunk * batch_shards // batch)
    count = -(-slots // most)
    return count, -(-slots // count)


def _nll(
    config: TokenBridgeConfig,
    head_params: Any,
    feature: Float[Array, "B m D"],
    indices: Integer[Array, "B m C"],
    dropout_key: Key[Array, ""] | None,
    as_sampled: bool = False,
) -> Float[Array, "B m C"]:
    nll: Any = make_head(config, unrolled=not config.scan_layers).apply(
        {"params": head_params},
        merge(feature),
        merge(indices),
        as_sampled,
        rngs=_rngs(dropout_key),
        method="nll",
    )
    return nll.reshape(indices.shape)


def _rngs(dropout_key: Key[Array, ""] | None) -> dict[str, Any] | None:
    return None if dropout_key is None else {"dropout": dropout_key}
