"""The model as a training task: the random choices of a batch, its loss, its validation."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float64, Int, PRNGKeyArray

from tokenbridge_jax.loss import (
    Examples,
    MaskDraw,
    head_chunks,
    image_loss,
    image_nll,
    training_loss,
)
from tokenbridge_jax.model import init_params
from tokenbridge_jax.model_config import TokenBridgeConfig
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.training.masking import MaskSampler, draw_orders

Batch = Mapping[str, Any]


class ModelTask:
    """Trains a TokenBridge (see `step.Task`); the host draws a `MaskDraw` per step."""

    def __init__(self, config: TokenBridgeConfig, class_dropout: float, head_fraction: float = 1.0):
        """Args:
        config: the model.
        class_dropout: the share of images trained with the null latent instead of their class.
        head_fraction: the share of hidden slots in the loss; see `loss.training_loss`.
        """
        self._config = config
        self._class_dropout = class_dropout
        self._head_fraction = head_fraction

    def init(self, key: PRNGKeyArray) -> Any:
        """Boxed float32 parameters."""
        return init_params(self._config, key)

    def examples(self, batch: Batch, key: PRNGKeyArray, draw: MaskDraw) -> Examples:
        """The images, a random order for each, and the choice of images that lose their class."""
        del draw
        indices, labels = batch["indices"], batch["labels"]
        order_key, drop_key = jax.random.split(key)
        return Examples(
            indices=indices,
            labels=labels,
            order=draw_orders(order_key, len(indices), self._config.positions),
            drop_class=jax.random.bernoulli(drop_key, self._class_dropout, labels.shape),
        )

    def loss(
        self, params: Any, examples: Examples, key: PRNGKeyArray, draw: MaskDraw
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The mean of the head's loss over hidden positions and channels, with dropout."""
        return training_loss(self._config, params, examples, draw, key, self._head_fraction), {}


def training_flops(
    config: TokenBridgeConfig, masks: MaskSampler, head_fraction: float = 1.0
) -> float:
    """Expected matmul FLOPs of training on one image: forward, and twice that backward.

    It is the mathematically necessary work, without padded slots and recomputation.
    """
    forward = sum(
        probability * config.forward_flops(float(num_hidden), head_fraction * num_hidden)
        for num_hidden, probability in masks.probabilities().items()
    )
    return 3 * forward


def abstract_batch(config: TokenBridgeConfig, size: int, mesh: Mesh) -> dict[str, Any]:
    """Shapes, dtypes and shardings of a batch of `size` images on a mesh, as a loader gives it."""
    sharding = meshes.batch_sharding(mesh)
    shape = (size, config.positions, config.channels)
    return {
        "indices": jax.ShapeDtypeStruct(shape, config.quantizer.index_dtype, sharding=sharding),
        "labels": jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=sharding),
    }


def largest_draw(
    config: TokenBridgeConfig, masks: MaskSampler, head_fraction: float, images: int, shards: int
) -> MaskDraw:
    """The draw whose program needs the most memory; if it fits, all of them fit.

    Args:
      config: the model.
      masks: the numbers of hidden positions.
      head_fraction: see `ModelTask`.
      images: in a micro-batch, over all devices.
      shards: the number of parts that the mesh splits a batch into.
    """

    def activations(draw: MaskDraw) -> int:
        """Tokens x layers x width of the encoder, and the numbers of one chunk of the head."""
        slots = draw.share(head_fraction).hidden_slots
        _, chunk = head_chunks(config.head_chunk, slots, images, shards)
        head = chunk * sum(config.head_activations)
        return head + draw.visible_slots * config.encoder_layers * config.encoder_width

    return max(map(masks.slots, masks.probabilities()), key=activations)


def make_validation(
    config: TokenBridgeConfig, masks: MaskSampler, mesh: Mesh, *, ratios: int = 4
) -> Callable[[Any, Iterable[Batch]], float]:
    """Makes the validation pass: `(params, batches) -> nats per index`, the same at every call.

    If the head has no probabilities, it is the training loss instead, with noise that depends on
    the image's place in the split, the sizes of the batches and the slot.

    Nothing in it is random. Every image has its own order, which depends on its place in the split,
    and no class is dropped. Each image is measured at `ratios` fixed mask ratios, the middles of
    equally likely ranges of the training distribution. The mean over hidden positions and channels,
    then images, then ratios, estimates the training loss without dropout.

    Args:
      config: the model.
      masks: the training distribution of ratios.
      mesh: the devices; call the pass in `use_mesh(mesh)`.
      ratios: the number of ratios.

    Returns:
      The pass. Its batches are this process's rows, as `loader.validation_batches` gives them.
    """
    # The slots fit any ratio, so there is one program.
    draws = [masks.all_slots(num_hidden) for num_hidden in masks.quantiles(ratios)]

    @functools.partial(jax.jit, out_shardings=meshes.replicated(mesh))
    def batch_sums(
        params: Any, batch: Batch, first: Int[Array, ""], draw: MaskDraw
    ) -> Float[Array, "2"]:
        labels, weights = batch["labels"], batch["weights"]
        numbers = first + jnp.arange(len(labels), dtype=jnp.int32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), numbers)
        words = jax.vmap(lambda key: jax.random.bits(key, (config.positions,)))(keys)
        no_drop = jnp.zeros(labels.shape, bool)
        examples = Examples(batch["indices"], labels, jnp.argsort(words, axis=-1), no_drop)
        if config.has_probabilities:
            loss_BC = image_nll(config, params, examples, draw)
        else:
            noise_key = jax.random.fold_in(jax.random.key(1), first)
            loss_BC = image_loss(config, params, examples, draw, noise_key)
        return jnp.stack([jnp.sum(weights * jnp.mean(loss_BC, axis=-1)), jnp.sum(weights)])

    def validate(params: Any, batches: Iterable[Batch]) -> float:
        total = np.zeros(2)
        started: list[jax.Array] = []
        first = 0
        for local in batches:
            batch = meshes.to_global(local, mesh)
            before, started = (
                started,
                [batch_sums(params, batch, np.int32(first), draw) for draw in draws],
            )
            # One batch late, so that devices need not wait. With many programs waiting, the
            # collectives of several devices of one CPU block each other.
            total += _sum_on_host(before)
            first += len(batch["labels"])
        total += _sum_on_host(started)
        return float(total[0] / total[1])

    return validate


def _sum_on_host(sums: Sequence[jax.Array]) -> Float64[np.ndarray, "2"]:
    return np.sum(np.asarray(jax.device_get(sums), np.float64).reshape(-1, 2), axis=0)


def bits(nats: float) -> float:
    """Nats to bits."""
    return nats / math.log(2)
