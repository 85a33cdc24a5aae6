"""The training loss and likelihoods: backbone once, head chunk by chunk (paper eq. 6).

The head has three quarters of the FLOPs and nearly all activations: sixteen tokens per hidden
position. They never exist for more than a chunk of positions.

Shapes are static: of the L slots of an order (see `backbone.py`), the last S go to the encoder and
the first M to the head. A batch hides `num_hidden` positions, a traced number with
`L - S <= num_hidden <= M`. All other slots are padding, which attention and the loss ignore.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from tokenbridge_jax.model import TokenBridge
from tokenbridge_jax.model_config import TokenBridgeConfig
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.transformer import unstack


@flax.struct.dataclass
class Examples:
    """Images with every random choice made, except how many positions are hidden.

    Attributes:
      indices: `[B, L, C]`, positions row-major, channels in autoencoder order; or latents, which
        heads of latents take.
      labels: `[B]` classes, or `[B, classes]` weights of them (see `Backbone.class_latent`).
      order: `[B, L]`, a permutation of the positions per image; the first ones are hidden.
      drop_class: `[B]`, true for images that get the null latent instead of their class.
    """

    indices: Any
    labels: Any
    order: Any
    drop_class: Any


@flax.struct.dataclass
class MaskDraw:
    """How many positions are hidden. The slots are static: each pair has its own program.

    Attributes:
      num_hidden: hidden positions of every image, traced: one number, or one per image for
        `map_slots`.
      hidden_slots: M, at least `num_hidden`.
      visible_slots: S, at least L - `num_hidden`.
    """

    num_hidden: Any
    hidden_slots: int = flax.struct.field(pytree_node=False)
    visible_slots: int = flax.struct.field(pytree_node=False)

    def share(self, fraction: float) -> "MaskDraw":
        """The same draw, with only this share of the hidden slots (at least one) in the head."""
        slots = max(1, round(fraction * self.hidden_slots))
        return dataclasses.replace(self, hidden_slots=slots)


def training_loss(
    config: TokenBridgeConfig,
    params: dict[str, Any],
    examples: Examples,
    draw: MaskDraw,
    dropout_key: Key[Array, ""] | None = None,
    head_fraction: float = 1.0,
) -> Float[Array, ""]:
    """The mean of the head's loss over hidden positions and channels.

    It is the cross-entropy in nats for heads of indices (paper eq. 6).

    Args:
      config: the model.
      params: its parameters, as stored.
      examples: the batch.
      draw: how many positions are hidden.
      dropout_key: of dropout and of what the head's loss draws. None turns dropout off, and the
        loss always draws the same.
      head_fraction: the share of the hidden slots that goes through the head. Orders are random, so
        the first slots are a random choice and their mean is an unbiased estimate of the loss.
    """
    draw, params = draw.share(head_fraction), _layout(config, params)
    backbone_key, head_key = (None, None) if dropout_key is None else jax.random.split(dropout_key)
    # The first two folds may be the two keys of the split.
    drawn = jax.random.key(0) if dropout_key is None else jax.random.fold_in(dropout_key, 2)
    feature_BMD, indices_BMC = _hidden_slots(config, params, examples, draw, backbone_key)
    batch, slots, channels = indices_BMC.shape
    weight = 1 / (batch * channels * jnp.minimum(draw.num_hidden, slots))
    weights_1M = jnp.where(jnp.arange(slots) < draw.num_hidden, weight, 0)[None]
    slots_1M = jnp.arange(slots)[None]
    features, *targets = split_slots(config, feature_BMD, indices_BMC, weights_1M, slots_1M)
    dropout_keys = None if head_key is None else jax.random.split(head_key, len(features))
    # One key for all chunks: what the loss draws for a slot does not depend on the chunks.
    draw_keys = jnp.repeat(drawn[None], len(features))

    def chunk_loss(head_params: Any, feature_BmD: jax.Array, rest: Any) -> jax.Array:
        indices_BmC, weights_1m, slots_1m, dropout_key, draw_key = rest
        arguments = feature_BmD, indices_BmC, slots_1m[0], draw_key
        variables, rngs = {"params": {"head": head_params}}, _rngs(dropout_key)
        loss_BmC: Any = TokenBridge(config).apply(variables, *arguments, rngs=rngs, method="loss")
        return jnp.sum(loss_BmC * weights_1m[..., None])

    rest = (*targets, dropout_keys, draw_keys)
    return sum_over_chunks(chunk_loss, params["head"], features, rest)


def image_nll(
    config: TokenBridgeConfig, params: dict[str, Any], examples: Examples, draw: MaskDraw
) -> Float[Array, "B C"]:
    """Every image's cross-entropy in nats, without dropout: its mean over hidden positions.

    As in training: without `first_token_quirk`. The arguments are those of `training_loss`.
    """
    return _hidden_mean(map_slots(TokenBridge.nll, config, params, examples, draw), draw)


def image_loss(
    config: TokenBridgeConfig,
    params: dict[str, Any],
    examples: Examples,
    draw: MaskDraw,
    key: Key[Array, ""],
) -> Float[Array, "B C"]:
    """Every image's training loss, without dropout: its mean over hidden positions.

    The arguments are those of `training_loss`; `key` is of what the head's loss draws, which also
    depends on the image's place in the batch and on the slot.
    """

    def loss(
        model: TokenBridge, feature_BmD: jax.Array, values_BmC: jax.Array, slots_1m: jax.Array
    ) -> jax.Array:
        return model.loss(feature_BmD, values_BmC, slots_1m[0], key)

    slots_1M = jnp.arange(draw.hidden_slots)[None]
    return _hidden_mean(map_slots(loss, config, params, examples, draw, slots_1M), draw)


def _hidden_mean(values_BMC: Float[Array, "B M C"], draw: MaskDraw) -> Float[Array, "B C"]:
    hidden = (jnp.arange(draw.hidden_slots) < draw.num_hidden)[None, :, None]
    return jnp.sum(jnp.where(hidden, values_BMC, 0), axis=1) / draw.num_hidden


def position_nll(
    config: TokenBridgeConfig,
    params: dict[str, Any],
    indices: Shaped[Array, "B L C"],
    labels: Int[Array, " B"] | Float[Array, "B classes"],
    hidden: Bool[Array, "B L"],
) -> Float[Array, "B L C"]:
    """Cross-entropy in nats of every index at a hidden position; NaN at visible ones.

    As in sampling: with `first_token_quirk` if it is on.

    Args:
      config: the model.
      params: its parameters, as stored.
      indices: of whole images, positions row-major, channels in autoencoder order.
      labels: classes, or weights of them (see `Backbone.class_latent`).
      hidden: the positions to predict from the others; their number may differ between images.
    """
    order = jnp.argsort(~hidden, axis=1, stable=True)
    examples = Examples(indices, labels, order, jnp.zeros(len(indices), bool))
    draw = MaskDraw(jnp.sum(hidden, axis=1), config.positions, config.positions)
    method = functools.partial(TokenBridge.nll, as_sampled=True)
    nll_BLC = map_slots(method, config, params, examples, draw)
    nll_BLC = jnp.take_along_axis(nll_BLC, jnp.argsort(order, axis=1)[:, :, None], axis=1)
    return jnp.where(hidden[:, :, None], nll_BLC, jnp.nan)


def map_slots(
    method: Callable[..., Any],
    config: TokenBridgeConfig,
    params: dict[str, Any],
    examples: Examples,
    draw: MaskDraw,
    *more: Shaped[Array, "b M ..."],
) -> Any:
    """What the model's head says of the first M slots, chunk by chunk, without dropout.

    Args:
      method: `(model, feature [B, m, D], indices [B, m, C], ...) -> tree of arrays [B, m, ...]`.
      config: the model.
      params: its parameters, as stored.
      examples: the images.
      draw: how many positions are hidden, and M.
      *more: other arguments of the method, split as `split_slots` does.

    Returns:
      The tree of arrays `[B, M, ...]`; visible slots among them have a result too.
    """
    params = _layout(config, params)
    chunks = split_slots(config, *_hidden_slots(config, params, examples, draw, None), *more)

    def on_chunk(chunk: list[jax.Array]) -> Any:
        return TokenBridge(config).apply({"params": params}, *chunk, method=method)

    def join(x: jax.Array) -> jax.Array:
        x = x.swapaxes(0, 1)
        return x.reshape(len(x), -1, *x.shape[3:])[:, : draw.hidden_slots]

    return jax.tree.map(join, jax.lax.map(on_chunk, chunks))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sum_over_chunks(
    function: Callable[[Any, Any, Any], jax.Array], params: Any, inputs: Any, rest: Any
) -> Float[Array, ""]:
    """The sum over i of `function(params, inputs[i], rest[i])`, in the memory of one chunk.

    The gradient of a sum is a sum of independent gradients. So each chunk goes forward and backward
    before the next one starts. Rematerialising chunks would save the same memory, but compute the
    forward pass twice.

    Args:
      function: returns a scalar.
      params: a tree; differentiable.
      inputs: a tree of arrays `[chunks, B, ...]`; differentiable.
      rest: a tree of arrays whose first axis counts chunks, not differentiable. An array whose
        second axis has the size B is split over devices as `inputs` are.
    """

    def add(total: jax.Array, chunk: tuple[Any, Any]) -> tuple[jax.Array, None]:
        return total + function(params, *chunk), None

    return jax.lax.scan(add, jnp.float32(0), (inputs, rest))[0]


def _sum_and_gradients(
    function: Callable[[Any, Any, Any], jax.Array], params: Any, inputs: Any, rest: Any
) -> tuple[jax.Array, Any]:
    def over_chunks(params: Any, inputs: Any, rest: Any) -> tuple[Any, Any]:
        def add(carry: Any, chunk: tuple[Any, Any]) -> tuple[Any, Any]:
            value, gradients = jax.value_and_grad(function, argnums=(0, 1))(params, *chunk)
            return jax.tree.map(jnp.add, carry, (value, gradients[0])), gradients[1]

        start = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
        return jax.lax.scan(add, start, (inputs, rest))

    batch = jax.tree.leaves(inputs)[0].shape[1]
    if not meshes.splits_only_batch(batch):
        (total, d_params), d_inputs = over_chunks(params, inputs, rest)
        return total, (d_params, d_inputs)

    def on_shard(*arguments: Any) -> tuple[Any, Any]:
        sums, d_inputs = over_chunks(*arguments)
        # Devices add their gradients here, not in every iteration.
        return meshes.sum_over_shards(sums), d_inputs

    axes = [1 if x.shape[1:2] == (batch,) else -1 for x in jax.tree.leaves(rest)]
    of_rest = jax.tree.unflatten(jax.tree.structure(rest), axes)
    run = meshes.on_batch_shards(on_shard, (-1, 1, of_rest), (-1, 1))
    (total, d_params), d_inputs = run(params, inputs, rest)
    return total, (d_params, d_inputs)


def _scale_gradients(
    function: Callable[[Any, Any, Any], jax.Array], gradients: Any, d_total: jax.Array
) -> tuple[Any, Any, None]:
    del function
    d_params, d_inputs = jax.tree.map(lambda x: x * d_total.astype(x.dtype), gradients)
    return d_params, d_inputs, None


sum_over_chunks.defvjp(_sum_and_gradients, _scale_gradients)


def split_slots(config: TokenBridgeConfig, *arrays: jax.Array) -> list[jax.Array]:
    """Arrays `[B, M, ...]` as `[chunks, B, M / chunks, ...]`, padded with zeros.

    It splits slots, not images, so that every chunk has the same share of every device's images.
    The first array has the batch size; others may have 1 image.
    """
    batch, slots = arrays[0].shape[:2]
    count, size = head_chunks(config.head_chunk, slots, batch, meshes.batch_shards_in_use())

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, count * size - slots), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(len(x), count, size, *x.shape[2:]).swapaxes(0, 1)

    return [split(x) for x in arrays]


def head_chunks(head_chunk: int, slots: int, batch: int, batch_shards: int) -> tuple[int, int]:
    """The number of chunks that the head's work is split into, and the slots of an image in each.

    Args:
      head_chunk: positions of a device in a chunk, at most; but a slot of every image at least.
      slots: of an image, in all chunks together.
      batch: images over all devices.
      batch_shards: the number of parts that the mesh splits a batch into.
    """
    most = max(1, head_chunk * batch_shards // batch)
    count = -(-slots // most)
    return count, -(-slots // count)


def _hidden_slots(
    config: TokenBridgeConfig,
    params: dict[str, Any],
    examples: Examples,
    draw: MaskDraw,
    dropout_key: Key[Array, ""] | None,
) -> tuple[Float[Array, "B M D"], Shaped[Array, "B M C"]]:
    """The backbone's features of the first M slots, and their values."""
    slots_BLC = jnp.take_along_axis(examples.indices, examples.order[:, :, None], axis=1)
    feature_BLD: Any = TokenBridge(config).apply(
        {"params": params},
        slots_BLC[:, config.positions - draw.visible_slots :],
        examples.labels,
        examples.order,
        draw.num_hidden,
        examples.drop_class,
        rngs=_rngs(dropout_key),
        method="features",
    )
    return feature_BLD[:, : draw.hidden_slots], slots_BLC[:, : draw.hidden_slots]


def _layout(config: TokenBridgeConfig, params: dict[str, Any]) -> dict[str, Any]:
    """Stored parameters as the model of a config takes them."""
    return params if config.scan_layers else unstack(params)


def _rngs(dropout_key: Key[Array, ""] | None) -> dict[str, Any] | None:
    return None if dropout_key is None else {"dropout": dropout_key}
