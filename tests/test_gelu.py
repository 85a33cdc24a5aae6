"""Bias, GELU and dropout: the plain version against formulas, the kernels against both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats
from tiny_model import on_mesh, relative_error, shard_shapes, triton_kernels

from tokenbridge_jax.ops import gelu
from tokenbridge_jax.ops.dropout import keep_elements
from tokenbridge_jax.ops.gelu import COLUMNS, gelu_dropout
from tokenbridge_jax.runtime import meshes

SEED = jnp.array([123, 456], jnp.uint32)


def inputs(*shape: int, dtype=jnp.float32) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x, its bias, and the gradient of the result.

    Sums with the bias are odd multiples of 1/32 below 8. They are never zero. A compiler may round
    them to bfloat16 or not: they are exact in both.
    """
    rng = np.random.default_rng(0)
    x, bias = (np.round(11 * rng.normal(size=size)) / 16 for size in (shape, shape[-1]))
    return tuple(jnp.asarray(a, dtype) for a in (x, bias + 1 / 32, rng.normal(size=shape)))


@functools.partial(jax.jit, static_argnums=(3, 4))
def both_ways(x, bias, d_y, rate, function=gelu_dropout):
    """The result, and the gradients with respect to x and bias."""
    y, backward = jax.vjp(lambda x, bias: function(x, bias, SEED, rate), x, bias)
    return y, *backward(d_y)


@functools.partial(jax.jit, static_argnums=3)
def kernels(x, bias, d_y, rate):
    """The same by the kernels, run as Python on this platform."""
    settings = dict(rate=rate, interpret=True)
    y = gelu.kernel_forward(x, bias, SEED, **settings)
    return y, *gelu.kernel_backward(x, bias, SEED, d_y, **settings)


# --- The plain version ----------------------------------------------------------------------------


def test_gelu_and_its_gradient_are_exact():
    x = jnp.linspace(-12, 12, 10_001)
    y, slope, _ = both_ways(x - 1, jnp.ones_like(x), jnp.ones_like(x), 0.0)
    exact = np.asarray(x - 1 + 1, np.float64)
    np.testing.assert_allclose(y, exact * special.ndtr(exact), rtol=3e-7, atol=1e-6)
    expected = special.ndtr(exact) + exact * stats.norm.pdf(exact)
    np.testing.assert_allclose(slope, expected, rtol=3e-7, atol=1e-6)


@pytest.mark.parametrize("shape", [(50, 60), (3, 7, COLUMNS + 10)])
def test_gelu_dropout_is_bias_then_gelu_then_dropout(shape: tuple[int, ...]):
    kept = keep_elements(SEED, shape, 0.1)

    def by_hand(x, bias, seed, rate):
        y = jax.nn.gelu(x + jnp.broadcast_to(bias, x.shape), approximate=False)
        return jnp.where(kept, y / 0.9, 0)

    actual = both_ways(*inputs(*shape), 0.1)
    expected = both_ways(*inputs(*shape), 0.1, by_hand)
    np.testing.assert_array_equal(actual[0] != 0, kept)
    for mine, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-6, atol=2e-6 * np.max(np.abs(other)))


def test_the_backward_pass_keeps_only_the_arguments():
    x, bias, _ = inputs(50, 60)
    _, backward = jax.vjp(lambda x, bias: gelu_dropout(x, bias, SEED, 0.3), x, bias)
    assert sorted(leaf.shape for leaf in jax.tree.leaves(backward)) == [(2,), (50, 60), (60,)]


def test_bfloat16_rounds_once():
    arguments = inputs(7, 1000, dtype=jnp.bfloat16)
    rounded = both_ways(*arguments, 0.3)
    exact = both_ways(*(argument.astype(jnp.float32) for argument in arguments), 0.3)
    for mine, other in zip(rounded[:2], exact, strict=False):
        assert mine.dtype == jnp.bfloat16
        np.testing.assert_array_equal(mine, other.astype(jnp.bfloat16))
    assert rounded[2].dtype == jnp.bfloat16
    assert relative_error(rounded[2], exact[2]) < 2**-8


# --- The kernels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, COLUMNS),  # Less than a tile.
        (3, 2, 2 * COLUMNS),  # The last tile is half full.
        (gelu.ROWS, COLUMNS),  # As many rows as one program of the backward pass sums.
        (3, gelu.ROWS // 2 + 1, COLUMNS),  # More rows than that.
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2**-7)])
def test_kernels_agree_with_the_plain_version(shape, rate: float, dtype, tolerance: float):
    arguments = inputs(*shape, dtype=dtype)
    actual, expected = kernels(*arguments, rate), both_ways(*arguments, rate)
    for mine, other in zip(actual, expected, strict=True):
        assert mine.dtype == other.dtype == dtype
        assert mine.shape == other.shape
        assert relative_error(mine, other) < tolerance
    np.testing.assert_array_equal(actual[0] == 0, expected[0] == 0)


def test_kernels_are_exact_and_even_more_in_the_lower_tail():
    """Below -6, 1 + erf(x) has no correct digits, but the kernels have."""
    x = jnp.linspace(-12, 12, 8 * COLUMNS).reshape(8, COLUMNS)
    y, slope, d_bias = kernels(x, jnp.zeros(COLUMNS), jnp.ones_like(x), 0.0)
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(y, exact * special.ndtr(exact), rtol=1e-5, atol=0)
    expected = special.ndtr(exact) + exact * stats.norm.pdf(exact)
    np.testing.assert_allclose(slope, expected, rtol=3e-6, atol=1e-6)
    np.testing.assert_allclose(d_bias, expected.sum(axis=0), rtol=3e-6, atol=1e-6)


def test_the_code_for_gpus_is_the_polynomial(monkeypatch):
    """The PTX code, run instruction by instruction, against the version for other platforms."""
    operations = {
        "abs.f32": jnp.abs,
        "fma.rn.f32": lambda a, b, c: a * b + c,
        "mov.f32": jnp.asarray,
        "mul.rn.f32": jnp.multiply,
        "rcp.approx.ftz.f32": jnp.reciprocal,
    }
    x = jnp.linspace(-12, 12, 1001)
    registers = {"$1": x}

    def value(name: str) -> jax.Array:
        literal = name.startswith("0f")
        return np.uint32(int(name[2:], 16)).view(np.float32) if literal else registers[name]

    def run(code: str, **_):
        _, *instructions, _ = code.split(";")
        for instruction in instructions:
            name, target, *operands = instruction.replace(",", " ").split()
            registers[target] = operations[name](*map(value, operands))
        return (registers["$0"],)

    monkeypatch.setattr(gelu.pl_triton, "elementwise_inline_asm", run)
    np.testing.assert_allclose(gelu._ratio_in_ptx(x), gelu._ratio(x), rtol=2e-6)


# --- On several devices ---------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [(2, 2, 2), (8, 1, 1)])
@pytest.mark.parametrize(
    ("function", "images", "width"),
    [
        (both_ways, 8, 24),
        (kernels, 8, 2 * COLUMNS),
        (kernels, 3, 2 * COLUMNS),  # The mesh does not divide six rows.
    ],
)
def test_units_are_the_same_on_any_mesh(mesh, function, images: int, width: int):
    x, bias, d_y = inputs(images, 2, width)
    expected = function(x, bias, d_y, 0.1)
    units = ("data", "fsdp") if images == 8 else None, None, "tensor"
    arguments = (x, units), (bias, ("tensor",)), (d_y, units)
    actual = on_mesh(lambda *x: function(*x, 0.1), *arguments, sizes=mesh)
    np.testing.assert_array_equal(actual[0] == 0, expected[0] == 0)
    for mine, other in zip(actual, expected, strict=True):
        assert relative_error(mine, other) < 1e-6
    if mesh == (8, 1, 1) and images == 8:  # Also if every device runs the function by itself.

        def on_shard(*arguments):
            y, d_x, d_bias = function(*arguments, 0.1)
            return y, d_x, meshes.sum_over_shards(d_bias)

        alone = jax.jit(meshes.on_batch_shards(on_shard, (0, -1, 0), (0, 0, -1)))
        for mine, other in zip(on_mesh(alone, *arguments, sizes=mesh), expected, strict=True):
            assert relative_error(mine, other) < 1e-6
    if images == 8:
        share = (8 // (mesh[0] * mesh[1]), 2, width // mesh[2])
        assert shard_shapes(actual[0]) == shard_shapes(actual[1]) == {share}


# --- Platforms with and without kernels -----------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.usefixtures("gpu_to_lower_for")
@pytest.mark.parametrize(
    ("rows", "width", "dtype", "tensor", "kernels"),  # `rows` are those of one device.
    [
        (4096, COLUMNS, jnp.bfloat16, 1, 2),
        (4096, 2 * COLUMNS, jnp.bfloat16, 2, 2),
        (4096, COLUMNS, jnp.bfloat16, 2, 0),  # Each device would have half a tile.
        (4096, COLUMNS + 256, jnp.bfloat16, 1, 0),
        (4096, COLUMNS, jnp.float32, 1, 0),
        (640, COLUMNS, jnp.bfloat16, 1, 0),  # Sampling one image.
    ],
)
def test_gpus_run_one_kernel_forward_and_one_backward(rows, width, dtype, tensor, kernels: int):
    def gradients(x, bias, d_y):
        # With d_y = y, the gradient needs the forward pass, so this is not dead code.
        return both_ways(x, bias, both_ways(x, bias, d_y, 0.1)[0], 0.1)[1:]

    with meshes.use_mesh(meshes.make_mesh(-1, 1, tensor)):
        traced = jax.jit(gradients).trace(*inputs(8 // tensor, rows, width, dtype=dtype))
        assert triton_kernels(traced) == {"cuda": kernels, "cpu": 0, "tpu": 0}
