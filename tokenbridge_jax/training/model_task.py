"""The model as a training task: masks and class dropout of a batch, its loss, its validation."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from tokenbridge_jax.loss import Examples, MaskDraw, image_nll, training_loss
from tokenbridge_jax.model import TokenBridgeConfig, init_params
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.training.masking import MaskSampler, draw_orders

Batch = Mapping[str, Any]


class ModelTask:
    """Trains a TokenBridge (see `step.Task`); the host's draw of a step is a `MaskDraw`."""

    def __init__(self, config: TokenBridgeConfig, class_dropout: float, head_fraction: float = 1.0):
        """Args:
        config: the model.
        class_dropout: the share of images trained with the null latent for a class.
        head_fraction: the share of hidden slots that the loss is measured at; see `loss.loss`.
        """
        self._config = config
        self._class_dropout = class_dropout
        self._head_fraction = head_fraction

    def init(self, key: PRNGKeyArray) -> Any:
        """Boxed float32 parameters."""
        return init_params(self._config, key)

    def examples(self, batch: Batch, key: PRNGKeyArray, draw: MaskDraw) -> Examples:
        """A random order for every image, and which of them lose their class."""
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
        """Mean cross-entropy in nats over hidden positions and channels, with dropout."""
        value = training_loss(
            self._config, params, examples, draw, key, head_fraction=self._head_fraction
        )
        return value, {}


def training_flops(
    config: TokenBridgeConfig, masks: MaskSampler, head_fraction: float = 1.0
) -> float:
    """Expected matmul FLOPs of training on one image: forward, and twice that backward.

    Neither padded slots nor recomputation count: it is the work the mathematics asks for.
    """
    forward = sum(
        probability * config.forward_flops(float(num_hidden), head_fraction * num_hidden)
        for num_hidden, probability in masks.probabilities().items()
    )
    return 3 * forward


def make_validation(
    config: TokenBridgeConfig, masks: MaskSampler, mesh: Mesh, *, ratios: int = 4
) -> Callable[[Any, Iterable[Batch]], float]:
    """Makes the validation pass: `(params, batches) -> nats an index`, the same at every call.

    Nothing in it is random: every image keeps its own order, numbered by its place in the split,
    no class is dropped, and each is measured at `ratios` fixed mask ratios, the middles of equally
    likely ranges of the training distribution. So the mean, over hidden positions and channels,
    then images, then ratios, is an estimate of the training loss without dropout.

    Args:
      config: the model.
      masks: the training distribution of ratios.
      mesh: the devices; call the pass in `use_mesh(mesh)`.
      ratios: how many.

    Returns:
      The pass. Its batches are this process's rows, as of `loader.validation_batches`.
    """
    # Slots for any ratio: one program for all.
    draws = [masks.all_slots(num_hidden) for num_hidden in masks.quantiles(ratios)]

    @functools.partial(jax.jit, out_shardings=meshes.replicated(mesh))
    def batch_nll(
        params: Any, batch: Batch, first: Int[Array, ""], draw: MaskDraw
    ) -> Float[Array, "2"]:
        numbers = first + jnp.arange(len(batch["labels"]), dtype=jnp.int32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), numbers)
        words = jax.vmap(lambda key: jax.random.bits(key, (config.positions,)))(keys)
        no_drop = jnp.zeros(batch["labels"].shape, bool)
        examples = Examples(batch["indices"], batch["labels"], jnp.argsort(words), no_drop)
        nll = image_nll(config, params, examples, draw)
        weights = batch["weights"]
        return jnp.stack([jnp.sum(weights * jnp.mean(nll, axis=-1)), jnp.sum(weights)])

    def validate(params: Any, batches: Iterable[Batch]) -> float:
        sums: list[jax.Array] = []
        first = 0
        for local in batches:
            batch = meshes.to_global(local, mesh)
            sums += [batch_nll(params, batch, np.int32(first), draw) for draw in draws]
            first += len(batch["labels"])
        total = np.sum(np.asarray(jax.device_get(sums), np.float64), axis=0)
        return float(total[0] / total[1])

    return validate


def bits(nats: float) -> float:
    """Nats to bits."""
    return nats / math.log(2)
