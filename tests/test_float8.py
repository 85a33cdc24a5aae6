"""Products of 8-bit floats against numpy and ml_dtypes; what a model with them computes."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from tiny_model import (
    TINY,
    equations,
    examples,
    lay_out,
    normal,
    random_batch,
    random_params,
    relative_error,
    tiny,
)

from tokenbridge_jax.loss import MaskDraw, training_loss
from tokenbridge_jax.model import abstract_params
from tokenbridge_jax.ops.float8 import float8_product, scaled
from tokenbridge_jax.quantizer import Unquantized
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.sampling.sampler import Request, generate
from tokenbridge_jax.sampling.schedule import SamplingSettings

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
LARGEST = {E4M3: 2.0**8, E5M2: 2.0**15}  # The largest number gets below this.


def scale_of(x: np.ndarray, dtype, axes=None) -> np.ndarray:
    """The power of two that takes the largest number along some axes below `LARGEST`."""
    largest = np.abs(np.asarray(x, np.float64)).max(axis=axes, keepdims=True)
    return LARGEST[dtype] / 2.0 ** np.floor(np.log2(largest) + 1)


def rounded(x: np.ndarray, dtype, axes=None) -> np.ndarray:
    """An array through an 8-bit dtype, in float64, with one scale along some axes."""
    scale = scale_of(x, dtype, axes)
    scaled = np.asarray(x, np.float64) * scale
    return scaled.astype(np.float32).astype(dtype).astype(np.float64) / scale


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("size", [1.0, 3e-7, 2e5, 1e-30, 1e30])
def test_arrays_are_rounded_to_8_bits_by_a_power_of_two(dtype, size: float):
    x = size * normal(0, 64, 33) * 10.0 ** normal(1, 64, 33)
    found = jax.jit(functools.partial(scaled, dtype=dtype))(x)
    assert found.values.dtype == dtype
    values = np.asarray(found.values, np.float64) * np.float64(found.scale)
    np.testing.assert_array_equal(values, rounded(x, dtype))
    assert LARGEST[dtype] / 2 <= np.abs(np.asarray(found.values, np.float32)).max()


def test_zeros_stay_and_what_is_not_finite_spoils_its_own_token():
    found = scaled(jnp.zeros(3), E4M3)
    assert (np.asarray(found.values, np.float32) * np.asarray(found.scale) == 0).all()
    for value in (jnp.nan, jnp.inf):
        y = float8_product(jnp.array([[1.0, value], [2.0, 3.0]]), jnp.ones((2, 1)), 1)
        assert np.isfinite(y).tolist() == [[False], [True]]
        _, backward = jax.vjp(lambda x: float8_product(x, jnp.ones((2, 1)), 1), jnp.ones((2, 2)))
        (d_x,) = backward(jnp.array([[value], [1.0]]))
        assert np.isfinite(d_x).tolist() == [[False] * 2, [True] * 2]


@pytest.mark.parametrize(
    ("x_shape", "kernel_shape", "axes"),
    [((7, 12), (12, 5), 1), ((2, 3, 8), (8, 3, 2, 4), 1), ((2, 3, 4, 5), (4, 5, 6), 2)],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_product_and_gradients_are_those_of_rounded_arrays(x_shape, kernel_shape, axes, dtype):
    x, kernel = normal(0, *x_shape, dtype=dtype), normal(1, *kernel_shape, dtype=dtype)
    d_y = 1e-6 * normal(2, *x_shape[:-axes], *kernel_shape[axes:], dtype=dtype)

    @jax.jit
    def run(x, kernel, d_y):
        y, backward = jax.vjp(lambda x, kernel: float8_product(x, kernel, axes), x, kernel)
        return y, *backward(d_y)

    tokens = x.ndim - axes
    inputs, outputs = tuple(range(tokens, x.ndim)), tuple(range(tokens, d_y.ndim))
    x8, kernel8 = rounded(x, E4M3, inputs), rounded(kernel, E4M3)
    # The sum over tokens is of their 8-bit values, times gradients with the tokens' scales.
    x_scale = scale_of(x, E4M3, inputs)
    of_token = x_scale.reshape(*x_scale.shape[:tokens], *[1] * len(outputs))
    weighted = rounded(np.asarray(d_y, np.float64) / of_token, E5M2)
    rows = list(range(tokens))
    expected = (
        np.tensordot(x8, kernel8, axes),
        np.tensordot(rounded(d_y, E5M2, outputs), kernel8, (outputs, range(axes, kernel.ndim))),
        np.tensordot(x8 * x_scale, weighted, (rows, rows)),
    )
    for array, right in zip(run(x, kernel, d_y), expected, strict=True):
        assert array.dtype == dtype
        assert array.shape == right.shape
        # Sums in float32, then one rounding.
        assert relative_error(array, right) < (1e-6 if dtype == "float32" else 2**-8)


# --- Models ---------------------------------------------------------------------------------------

HEADS = {
    "channel_ar": (tiny(encoder_layers=2), 5),
    "flow": (tiny(head="flow", encoder_layers=2, quantizer=Unquantized(), head_draws=2), 3),
    "mixture": (tiny(head="mixture", encoder_layers=2, quantizer=Unquantized()), 0),
}
DRAW = MaskDraw(jnp.int32(6), 6, 2)


@functools.cache
def loss_and_gradients(config):
    def run(params, batch):
        return training_loss(config, params, examples(batch), DRAW, jax.random.key(0))

    return jax.jit(jax.value_and_grad(run))


@pytest.mark.parametrize("head", HEADS)
def test_products_of_all_layers_have_8_bit_operands(head: str):
    """A linear layer has one forward and two backward; a block of the backbone has four layers."""
    config, of_block = HEADS[head]
    config = dataclasses.replace(config, float8=True, dtype="bfloat16")
    traced = loss_and_gradients(config).trace(abstract_params(config), random_batch(config, 2))
    found = collections.Counter()
    for times, eqn in equations(traced.jaxpr.jaxpr):
        if eqn.primitive.name == "dot_general":
            found[frozenset(x.aval.dtype.name for x in eqn.invars)] += times
    layers = 3 * 4 + of_block
    forward, backward = {"float8_e4m3fn"}, {"float8_e4m3fn", "float8_e5m2"}
    eight_bit = {pair: n for pair, n in found.items() if any("float8" in name for name in pair)}
    assert eight_bit == {frozenset(forward): layers, frozenset(backward): 2 * layers}
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert any("f8E5M2>" in line and "f8E4M3FN>" in line and "-> tensor" in line for line in dots)


def test_gradients_on_a_mesh_are_near_those_of_float32():
    params, batch = random_params(TINY, spread=0.1), random_batch(TINY, 8)
    loss, gradients = loss_and_gradients(TINY)(params, batch)
    config, mesh = tiny(float8=True), meshes.make_mesh(2, 2, 2)
    with meshes.use_mesh(mesh):
        batch = jax.device_put(batch, meshes.batch_sharding(mesh))
        loss8, gradients8 = loss_and_gradients(config)(lay_out(params, config, mesh), batch)
    assert 0 < abs(loss8 / loss - 1) < 0.02
    ours, exact = (ravel_pytree(jax.device_get(tree))[0] for tree in (gradients8, gradients))
    assert 0.001 < np.linalg.norm(ours - exact) / np.linalg.norm(exact) < 0.1


def test_samples_are_near_those_of_float32_and_do_not_depend_on_the_batch_size():
    params = random_params(TINY)
    labels = random_batch(TINY, 16)["labels"]

    def draw(config, some: list[int], settings: SamplingSettings) -> np.ndarray:
        numbers = np.array(some, np.int32)
        return np.asarray(generate(config, params, Request(labels[some], numbers), settings))

    # Four steps, so that what is drawn depends on what was drawn before.
    steps, float8 = SamplingSettings(4), tiny(float8=True)
    together = draw(float8, [*range(16)], steps)
    apart = [draw(float8, [i, i + 1], steps) for i in range(0, 16, 2)]
    assert (np.concatenate(apart) == together).mean() > 0.99
    # The likeliest indices of one step.
    likeliest = SamplingSettings(1, temperature=0.0)
    exact = draw(TINY, [*range(16)], likeliest)
    assert 0.7 < (exact == draw(float8, [*range(16)], likeliest)).mean() < 1
