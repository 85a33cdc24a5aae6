"""A small task with all features of the real ones: random examples, dropout, logical axes."""

import functools
import itertools
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tokenbridge_jax.runtime.meshes import constrain, make_mesh, named_axes
from tokenbridge_jax.training.optimizer import OptimizerConfig, RunNumbers, make_optimizer
from tokenbridge_jax.training.state import abstract_state, create_state
from tokenbridge_jax.training.step import make_train_step


class Regressor(nn.Module):
    """Two layers. A 2 x 2 x 2 mesh divides all sizes except the 3 outputs."""

    width: int
    dropout: float

    @nn.compact
    def __call__(self, x):
        xavier, zeros = nn.initializers.xavier_uniform(), nn.initializers.zeros
        kernel, bias = named_axes(xavier, "embed", "mlp"), named_axes(zeros, "mlp")
        x = nn.Dense(self.width, kernel_init=kernel, bias_init=bias, name="first")(x)
        x = constrain(nn.gelu(x), "batch", "mlp")
        x = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(x)
        return nn.Dense(3, kernel_init=named_axes(xavier, "mlp", "embed"), name="second")(x)


class ToyTask:
    """Regression from noisy inputs; `examples` adds the noise."""

    def __init__(self, dropout: float = 0.1, width: int = 8, noise: float = 0.1):
        self.model = Regressor(width, dropout)
        self.noise = noise

    def init(self, key):
        return self.model.init(key, jnp.zeros((1, 4)))["params"]

    def examples(self, batch, key, draw):
        noise = self.noise * jax.random.normal(key, batch["x"].shape)
        return {"x": batch["x"] + noise, "y": batch["y"]}

    def loss(self, params, examples, key, draw):
        rngs = {"dropout": key} if self.model.dropout else {}
        y = self.model.apply({"params": params}, examples["x"], rngs=rngs)
        error = jnp.mean(jnp.square(y - examples["y"]))
        return error, {"largest": jnp.max(jnp.abs(examples["y"]))}


def first_devices(data: int, fsdp: int, tensor: int) -> Mesh:
    """A mesh of these sizes, on the first devices."""
    return make_mesh(data, fsdp, tensor, devices=jax.devices()[: data * fsdp * tensor])


def toy_batch(step: int, size: int = 16) -> dict[str, np.ndarray]:
    """The batch of a step, which depends only on the step."""
    rng = np.random.default_rng([1, step])
    x = rng.normal(size=(size, 4)).astype(np.float32)
    return {"x": x, "y": np.tanh(x[:, :3])}


def toy_batches(start: int) -> Iterator[dict[str, np.ndarray]]:
    """The batches from `start` on."""
    return map(toy_batch, itertools.count(start))


def toy_training(task, mesh, *, accumulation=1, **recipe):
    """State and step of a toy task."""
    config = OptimizerConfig(**({"learning_rate": 0.01, "total_steps": 10} | recipe))
    optimizer, _ = make_optimizer(config)
    abstract = abstract_state(task.init, optimizer, mesh)
    state = create_state(task.init, optimizer, abstract, seed=0)
    settings = {"ema_decay": 0.9, "accumulation": accumulation}
    make = functools.partial(make_optimizer, config)
    step = make_train_step(task, make, abstract, mesh, **settings)
    return abstract, state, functools.partial(step, numbers=RunNumbers.of(config, seed=0))
