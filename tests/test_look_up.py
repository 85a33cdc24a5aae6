"""Look-ups in tables: their gradients against float64, and that they are the same at every run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import (
    AUTOENCODER,
    BATCH,
    DROPOUT_KEY,
    HIDDEN,
    equations,
    examples,
    random_batch,
    relative_error,
    tiny,
)

from tokenbridge_jax.benchmark.inputs import make_model
from tokenbridge_jax.commands.arguments import config_from
from tokenbridge_jax.layers import look_up, pick
from tokenbridge_jax.loss import MaskDraw, training_loss
from tokenbridge_jax.model import abstract_params
from tokenbridge_jax.training.autoencoder_task import AutoencoderTask

ROWS, WIDTH = 7, 5


def unordered_sums(function, *arguments) -> list[str]:
    """The scatter-adds in a function's gradient that may add to one place more than once."""
    jaxpr = jax.make_jaxpr(jax.grad(function))(*arguments).jaxpr
    return [
        " ".join(x.aval.str_short() for x in equation.invars)
        for _, equation in equations(jaxpr)
        if equation.primitive.name == "scatter-add" and not equation.params["unique_indices"]
    ]


# --- Single look-ups ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(40,), (8, 6)])
def test_the_gradient_sums_the_rows_of_every_index(dtype, shape):
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(ROWS, WIDTH)), jnp.float32)
    indices = jnp.asarray(rng.integers(ROWS - 1, size=shape))  # The last row is not looked up.
    weights = jnp.asarray(rng.normal(size=(*shape, WIDTH)), dtype)

    np.testing.assert_array_equal(look_up(table, indices, dtype), table[indices].astype(dtype))
    _, gradient_of = jax.vjp(lambda table: look_up(table, indices, dtype), table)
    (gradient,) = jax.jit(gradient_of)(weights)
    expected = np.zeros((ROWS, WIDTH))
    for place in np.ndindex(shape):
        expected[indices[place]] += np.asarray(weights[place], np.float64)
    assert gradient.dtype == jnp.float32
    # Terms of 8 bits, sums of 24.
    assert relative_error(gradient, expected) < 5e-7
    _, taken = jax.vjp(lambda table: jnp.take(table, indices, axis=0).astype(dtype), table)
    assert relative_error(gradient, taken(weights)[0]) < 5e-7
    assert not gradient[-1].any()


def test_a_sum_in_bfloat16_would_stop_growing():
    indices = jnp.zeros(1000, jnp.int32)
    _, gradient_of = jax.vjp(lambda t: look_up(t, indices, jnp.bfloat16), jnp.ones((2, 1)))
    (gradient,) = gradient_of(jnp.ones((1000, 1), jnp.bfloat16))
    np.testing.assert_array_equal(gradient, [[1000], [0]])


@pytest.mark.parametrize("axis", [-1, 1])
def test_picking_is_taking_along_an_axis(axis):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(4, 3, 6)), jnp.float32)
    # What is not picked has no effect, whatever it is.
    x = x.at[0, 0, 0].set(jnp.nan)
    indices = jnp.asarray(rng.integers(1, 3, size=np.delete(x.shape, axis)))
    weights = jnp.asarray(rng.normal(size=indices.shape), jnp.float32)

    def picked(x):
        return jnp.sum(weights * pick(x, indices, axis))

    def taken(x):
        along = jnp.take_along_axis(x, jnp.expand_dims(indices, axis), axis)
        return jnp.sum(weights * along.squeeze(axis))

    for ours, theirs in zip(
        jax.value_and_grad(picked)(x), jax.value_and_grad(taken)(x), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert np.isnan(pick(jnp.ones((1, 256)), jnp.array([256]))).all()
    assert pick(jnp.arange(256.0), jnp.uint8(255)) == 255


# --- Whole losses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dropout": 0.1, "dtype": "bfloat16", "head_chunk": 6},
        {"scan_layers": False, "remat": "full"},
        {"channels_per_group": 2},
        {"head": "parallel"},
    ],
    ids=str,
)
def test_no_gradient_of_the_model_depends_on_the_order_of_its_terms(changes):
    config = tiny(**changes)
    draw = MaskDraw(jnp.int32(HIDDEN), 8, 4)

    def loss(params, batch):
        key = DROPOUT_KEY if config.dropout else None
        return training_loss(config, params, examples(batch), draw, key)

    assert unordered_sums(loss, abstract_params(config), random_batch(config, BATCH)) == []
    # With an ordinary look-up there would be one.
    order = random_batch(config, BATCH)["order"]
    table = jnp.ones((config.positions, 2))
    assert unordered_sums(lambda table: jnp.sum(table[order] ** 2), table) == [
        "float32[8,2] int32[3,8,1] float32[3,8,2]"
    ]


def test_no_gradient_of_the_autoencoder_depends_on_the_order_of_its_terms():
    task, key = AutoencoderTask(AUTOENCODER, "float32", kl_weight=1e-6), jax.random.key(0)
    params = jax.eval_shape(task.init, key)
    batch = task.examples({"images": jnp.zeros((2, 8, 8, 1), jnp.uint8)}, key, None)
    assert unordered_sums(lambda p: task.loss(p, batch, key, None)[0], params) == []


def test_the_products_cost_less_than_a_hundredth_of_a_step():
    model = make_model(config_from(["--config=imagenet256:size=L"]))
    hidden = model.positions
    positions = model.buffer + model.positions
    products = model.classes * model.encoder_width  # Of one image.
    products += model.positions * positions * model.encoder_width
    products += model.positions * (positions + model.positions) * model.decoder_width
    products += hidden * (model.channels - 1) * model.levels * model.head_width
    assert 2 * products < 0.001 * 3 * model.forward_flops(float(hidden), hidden)
