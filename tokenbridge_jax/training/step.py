"""One update: loss and gradients (the mean over micro-batches), clip, AdamW, EMA."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.training.optimizer import RunNumbers
from tokenbridge_jax.training.state import TrainState, state_shardings

Metrics = dict[str, Float[Array, ""]]


@runtime_checkable
class Task(Protocol):
    """What to train: parameters, the random choices of a batch, and its loss.

    `draw` is the host's decision for this step (a `MaskDraw` for the model, None for the
    autoencoder). Its static fields select the compiled program.
    """

    def init(self, key: PRNGKeyArray) -> PyTree:
        """Boxed initial parameters."""

    def examples(self, batch: PyTree, key: PRNGKeyArray, draw: Any) -> PyTree:
        """Makes every random choice that belongs to one example, for the whole batch at once.

        The batch is the first axis of all leaves. Micro-batches are slices of the result, so
        accumulation does not change these choices.
        """

    def loss(
        self, params: PyTree, examples: PyTree, key: PRNGKeyArray, draw: Any
    ) -> tuple[Float[Array, ""], Metrics]:
        """The mean loss over `examples`, and other scalars to report; `key` is for dropout."""


def make_train_step(
    task: Task,
    make_optimizer: Callable[[RunNumbers], tuple[optax.GradientTransformation, optax.Schedule]],
    abstract: TrainState,
    mesh: Mesh,
    *,
    ema_decay: float,
    accumulation: int = 1,
) -> Callable[[TrainState, PyTree, Any, RunNumbers], tuple[TrainState, Metrics]]:
    """Makes the jitted `step(state, batch, draw, numbers) -> (state, metrics)`.

    Call it in `use_mesh(mesh)`. The state is donated and returned in the same layout, so one
    program serves all steps. All randomness comes from `fold_in(key(numbers.seed), state.step)` and
    the batch's global shape. Devices, processes and restarts do not change it. So a run on another
    mesh has the same losses up to float32 rounding: sums over the batch and over split axes have
    another order. (Dropout in the head also depends on its number of chunks, and `model.head_chunk`
    counts positions per device.)

    Args:
      task: computes the loss.
      make_optimizer: gives the optimizer, and its learning rate for the metrics; see
        `optimizer.make_optimizer`.
      abstract: has the shardings of the state (`state.abstract_state`).
      mesh: the devices; batches are split along data x fsdp (`meshes.to_global`).
      ema_decay: d in `ema <- d ema + (1 - d) params`, applied after every update.
      accumulation: the number of micro-batches in a batch.

    Returns:
      The step. Its metrics are float32 scalars on the device: `loss`, `grad_norm` (before
      clipping), `learning_rate` (of this update), `param_norm` (after it) and the task's own.
    """
    shardings = state_shardings(abstract)

    def step(
        state: TrainState, batch: PyTree, draw: Any, numbers: RunNumbers
    ) -> tuple[TrainState, Metrics]:
        optimizer, schedule = make_optimizer(numbers)
        key = jax.random.fold_in(jax.random.key(numbers.seed), state.step)
        examples_key, loss_key = jax.random.split(key)
        examples = task.examples(batch, examples_key, draw)

        def micro_step(index: Any, micro_examples: PyTree) -> tuple[PyTree, Metrics]:
            (loss, aux), gradients = jax.value_and_grad(task.loss, has_aux=True)(
                state.params, micro_examples, jax.random.fold_in(loss_key, index), draw
            )
            return gradients, {"loss": loss, **aux}

        if accumulation == 1:
            gradients, metrics = micro_step(0, examples)
        else:
            gradients, metrics = _accumulate(
                micro_step, examples, accumulation, mesh, shardings.params
            )

        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = jax.tree.map(
            # Not d * average + (1 - d) * new, whose float32 factors do not add up to 1.
            lambda average, new: average + (1 - ema_decay) * (new - average),
            state.ema_params,
            params,
        )
        metrics |= {
            "grad_norm": optax.tree.norm(gradients),
            "learning_rate": schedule(state.step),
            "param_norm": optax.tree.norm(params),
        }
        metrics = jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), metrics)
        return TrainState(state.step + 1, params, ema_params, opt_state), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, meshes.replicated(mesh)))


def _accumulate(
    micro_step: Callable[[Any, PyTree], tuple[PyTree, Metrics]],
    examples: PyTree,
    count: int,
    mesh: Mesh,
    shardings: PyTree,
) -> tuple[PyTree, Metrics]:
    """Mean gradients and metrics over `count` micro-batches.

    They equal those of the whole batch: all micro-batches have one size, and the loss is a mean.
    """

    def split(x: jax.Array) -> jax.Array:
        # Example i is in micro-batch i % count: each device splits its own rows, and no row moves.
        micro = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
        sharding = NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))
        return jax.lax.with_sharding_constraint(micro, sharding)

    def constrain(total: tuple[PyTree, Metrics]) -> tuple[PyTree, Metrics]:
        return jax.lax.with_sharding_constraint(total[0], shardings), total[1]

    def body(carry: PyTree, inputs: tuple[Any, PyTree]) -> tuple[PyTree, None]:
        return constrain(jax.tree.map(jnp.add, carry, micro_step(*inputs))), None

    # Traced once, for the shapes and for the loop.
    micro_step = jax.jit(micro_step, inline=True)
    micro_batches = (jnp.arange(count), jax.tree.map(split, examples))
    shapes = jax.eval_shape(lambda xs: micro_step(*jax.tree.map(lambda x: x[0], xs)), micro_batches)
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    total, _ = jax.lax.scan(body, constrain(zeros), micro_batches)
    return jax.tree.map(lambda x: x / count, total)
