"""The training state: all that a step reads and replaces, created in its final layout."""

import functools
from collections.abc import Callable
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from tokenbridge_jax.runtime import meshes

# Makes the boxed parameters of a model (their logical axis names on them) from a random key.
InitFunction = Callable[[jax.Array], Any]


@flax.struct.dataclass
class TrainState:
    """Everything that training carries from one step to the next.

    Attributes:
      step: the number of updates so far, an int32 scalar.
      params: float32 parameters, a plain nested dict.
      ema_params: exponential moving average of `params` over the updates, with the same structure;
        it starts at the initial parameters.
      opt_state: the optimizer's own state.
    """

    step: Any
    params: Any
    ema_params: Any
    opt_state: Any


def abstract_state(
    init: InitFunction, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of a training state, without making one.

    The EMA and the optimizer's moments have the layout of their parameters; counters are
    replicated.

    Args:
      init: makes the boxed parameters.
      optimizer: its state is part of the training state.
      mesh: the devices.

    Returns:
      A TrainState of `jax.ShapeDtypeStruct`, each with its sharding.
    """
    boxed = jax.eval_shape(init, jax.random.key(0))
    params = meshes.abstract_arrays(boxed, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    shapes = jax.eval_shape(functools.partial(_initial_state, optimizer), boxed)
    replicated = meshes.replicated(mesh)

    def place(shape: jax.ShapeDtypeStruct, sharding: Any = replicated) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    return TrainState(
        step=place(shapes.step),
        params=params,
        ema_params=params,
        opt_state=optax.tree_map_params(
            optimizer, place, shapes.opt_state, shardings, transform_non_params=place
        ),
    )


def state_shardings(state: TrainState) -> TrainState:
    """The shardings of a concrete or abstract state, as a TrainState."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def create_state(
    init: InitFunction,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    seed: int,
    stored: TrainState | None = None,
) -> TrainState:
    """Makes the initial state in its layout: no device ever holds all of it.

    The values depend on `seed` alone, not on the mesh.

    Args:
      init: makes the boxed parameters.
      optimizer: its state is part of the training state.
      abstract: the result of `abstract_state` for the same `init` and `optimizer`.
      seed: for the initial parameters.
      stored: a state with the structure of `abstract`, or None. Its leaves that have the shapes of
        `abstract` are taken unchanged, and only the others are made.
    """
    wanted, structure = jax.tree.flatten(abstract)
    leaves = jax.tree.leaves(stored) or [None] * len(wanted)
    new = [i for i, leaf in enumerate(leaves) if leaf is None or leaf.shape != wanted[i].shape]

    def make(key: jax.Array) -> list[jax.Array]:
        made = jax.tree.leaves(_initial_state(optimizer, init(key)))
        return [made[i] for i in new]

    jitted = jax.jit(make, out_shardings=[wanted[i].sharding for i in new])
    for i, leaf in zip(new, jitted(jax.random.key(seed)) if new else [], strict=True):
        leaves[i] = leaf
    return jax.tree.unflatten(structure, leaves)


def _initial_state(optimizer: optax.GradientTransformation, boxed: Any) -> TrainState:
    """The state before the first update, of boxed parameters."""
    params = nn.unbox(boxed)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        # A copy, because the step donates both and a buffer can only be donated once.
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
    )
