"""A classifier of CIFAR-10 pictures, trained on the real ones, which judges samples.

A residual network of eight convolutions with batch normalisation, trained for 16 epochs with
random crops and mirrored pictures. It sees the 32x32 pixels, and not the features of the other
scores.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from cifar10_features import cached, digest
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Integer, UInt8

from tokenbridge_jax.codec import in_batches
from tokenbridge_jax.runtime.progress import Progress

BATCH = 512
EPOCHS = 16
PEAK_RATE = 0.4  # Of SGD with momentum 0.9, for a batch of this size; proportional to it.
WEIGHT_DECAY = 5e-4
PADDING = 4  # Pixels around a picture, from which a random crop is taken.

Images = UInt8[np.ndarray, "N H W 3"]


class Network(nn.Module):
    """uint8 pictures `[B, 32, 32, 3]` -> float32 logits `[B, classes]`.

    Attributes:
      classes: the number of classes.
      width: channels of the first layer.
      dtype: of the computation.
    """

    classes: int
    width: int = 64
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Array, training: bool) -> Float[Array, "B classes"]:
        def layer(x: Array, width: int) -> Array:
            x = nn.Conv(width, (3, 3), use_bias=False, dtype=self.dtype)(x)
            x = nn.BatchNorm(use_running_average=not training, momentum=0.9, dtype=self.dtype)(x)
            return nn.relu(x)

        def halved(x: Array) -> Array:
            return nn.max_pool(x, (2, 2), (2, 2))

        x = layer(images.astype(jnp.float32) / 64 - 2, self.width)
        x = halved(layer(x, 2 * self.width))
        x = x + layer(layer(x, 2 * self.width), 2 * self.width)
        x = halved(layer(x, 4 * self.width))
        x = halved(layer(x, 8 * self.width))
        x = x + layer(layer(x, 8 * self.width), 8 * self.width)
        x = jnp.max(x, axis=(1, 2)).astype(jnp.float32)
        # Small logits at the start: the learning rate is high.
        return 0.125 * nn.Dense(self.classes, use_bias=False)(x)


class Classifier:
    """A trained network.

    Attributes:
      network: its sizes.
      variables: its parameters and the statistics of batch normalisation.
    """

    def __init__(self, network: Network, variables: Mapping[str, Any]):
        self.network, self.variables = network, variables
        self._logits = jax.jit(
            lambda variables, images: (
                network.apply(variables, images, training=False)
                + network.apply(variables, images[:, :, ::-1], training=False)
            )
        )

    def predict(self, images: Images) -> Integer[np.ndarray, " N"]:
        """The most likely class, from a picture and the mirrored one."""
        logits = in_batches(lambda x: np.asarray(self._logits(self.variables, x)), images, BATCH)
        return logits.argmax(axis=1)

    def accuracy(self, images: Images, labels: Integer[np.ndarray, " N"]) -> float:
        """The share of the pictures in which it finds their class."""
        return float(np.mean(self.predict(images) == labels))


def classifier(folder: Path, images: Images, labels: Integer[np.ndarray, " N"]) -> Classifier:
    """The classifier of these training pictures, from a file in `folder` if it was trained before.

    It is narrow if there are few pictures: a wide one takes long on a CPU and finds no more.
    """
    # CPUs compute bfloat16 slowly.
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    network = Network(int(labels.max()) + 1, 64 if len(images) >= 10_000 else 16, dtype)

    def train() -> dict[str, np.ndarray]:
        return flatten_dict(jax.device_get(_train(network, images, labels)), sep="/")

    arrays = cached(folder / "classifier.npz", digest(images, labels, EPOCHS), train)
    return Classifier(network, unflatten_dict(arrays, sep="/"))


def _train(network: Network, images: Images, labels: np.ndarray) -> Any:
    """The variables after all passes in random order; pictures stay on one device."""
    batch = min(BATCH, max(1, len(images) // 8))
    steps = len(images) // batch
    total = EPOCHS * steps
    peak = PEAK_RATE * batch / BATCH
    rate = optax.linear_onecycle_schedule(
        total, peak, pct_start=0.25, pct_final=1.0, final_div_factor=1e3
    )
    optimizer = optax.chain(
        optax.add_decayed_weights(WEIGHT_DECAY), optax.sgd(rate, momentum=0.9, nesterov=True)
    )
    pad = [(0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0)]
    data = jnp.asarray(np.pad(images, pad, mode="reflect")), jnp.asarray(labels)
    size = images.shape[1]

    def loss(params: Any, statistics: Any, pictures: Array, targets: Array) -> tuple[Array, Any]:
        logits, updated = network.apply(
            {"params": params, **statistics}, pictures, training=True, mutable=["batch_stats"]
        )
        smooth = optax.smooth_labels(jax.nn.one_hot(targets, network.classes), 0.1)
        return jnp.mean(optax.softmax_cross_entropy(logits, smooth)), updated

    def augment(picture: Array, key: Array) -> Array:
        mirror, *corner = jax.random.randint(key, (3,), 0, jnp.array([2, *[2 * PADDING + 1] * 2]))
        crop = jax.lax.dynamic_slice(picture, (*corner, 0), (size, size, 3))
        return jnp.where(mirror, crop[:, ::-1], crop)

    # One program for each update: XLA for CPUs computes convolutions slowly inside of a loop.
    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: Any, numbers: Array, key: Array) -> Any:
        params, statistics, moments = state
        pictures = jax.vmap(augment)(data[0][numbers], jax.random.split(key, batch))
        gradient, statistics = jax.grad(loss, has_aux=True)(
            params, statistics, pictures, data[1][numbers]
        )
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), statistics, moments

    variables = network.init(jax.random.key(0), images[:1], training=False)
    params = variables.pop("params")
    state = params, variables, optimizer.init(params)
    rng = np.random.default_rng(0)
    with Progress(total, desc="classifier", unit="batches") as bar:
        for number in range(total):
            if number % steps == 0:
                order = rng.permutation(len(images))[: steps * batch].reshape(steps, batch)
            key = jax.random.fold_in(jax.random.key(1), number)
            state = update(state, order[number % steps], key)
            bar.update(1)
    return {"params": state[0], **state[1]}
