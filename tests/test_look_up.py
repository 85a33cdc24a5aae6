"""Look-ups in tables: their gradients against float64, on one device and on meshes.

And training steps as programs for NVIDIA GPUs: nothing in them adds numbers in an order that may
change from run to run.
"""

import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_model import AUTOENCODER, relative_error, tiny
from torch_networks import lpips_network
from toy import first_devices

from tokenbridge_jax.benchmark.inputs import make_model
from tokenbridge_jax.commands.arguments import config_from
from tokenbridge_jax.evaluation import lpips
from tokenbridge_jax.layers import look_up, pick
from tokenbridge_jax.ops.pallas import gpu_call, pl_triton
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.training.autoencoder_task import AutoencoderTask
from tokenbridge_jax.training.discriminator import Adversary
from tokenbridge_jax.training.masking import MaskSampler
from tokenbridge_jax.training.model_task import ModelTask, abstract_batch
from tokenbridge_jax.training.optimizer import OptimizerConfig, RunNumbers, make_optimizer
from tokenbridge_jax.training.state import abstract_state
from tokenbridge_jax.training.step import make_train_step

# For the programs with kernels.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated"),
    pytest.mark.usefixtures("gpu_to_lower_for"),
]
ROWS, WIDTH = 7, 5


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


@pytest.mark.parametrize("in_shards", [False, True])
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=str)
def test_on_a_mesh_the_gradient_sums_the_rows_of_all_devices(sizes, in_shards):
    """The table is split over its width, indices and rows over the images."""
    rng = np.random.default_rng(2)
    table = rng.normal(size=(ROWS, 8)).astype(np.float32)
    indices = rng.integers(ROWS, size=(16, 6)).astype(np.int32)
    weights = rng.normal(size=(16, 6, 8)).astype(np.float32)

    def loss(table, indices, weights):
        table = meshes.constrain(table, None, None)
        return jnp.sum(weights * look_up(table, indices, jnp.float32))

    def on_shard(*arguments):
        return meshes.sum_over_shards(jax.value_and_grad(loss)(*arguments))

    mesh = meshes.make_mesh(*sizes)
    split = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    with meshes.use_mesh(mesh):
        run = jax.value_and_grad(loss)
        if in_shards:
            run = meshes.on_batch_shards(on_shard, (-1, 0, 0), -1)
        placed = jax.device_put(table, split), *meshes.to_global((indices, weights), mesh)
        program = jax.jit(run, out_shardings=(None, split)).lower(*placed).compile()
    value, gradient = program(*placed)
    expected = np.zeros(table.shape)
    np.add.at(expected, indices, weights.astype(np.float64))
    assert relative_error(gradient, expected) < 5e-7
    assert relative_error(value, np.sum(expected * table)) < 1e-5
    # Devices add their sums. They copy nothing but the table, if it is split.
    copies = r" = (.*?) (?:all-gather|all-to-all|collective-permute)(?:-start)?\("
    copied = re.findall(r"\[([\d,]*)\]", " ".join(re.findall(copies, program.as_text())))
    largest = max((math.prod(map(int, shape.split(","))) for shape in copied), default=0)
    assert largest == (table.size if sizes[1] > 1 else 0)


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


# --- Whole steps ----------------------------------------------------------------------------------

# Wide enough for the kernels of attention, and for those of GELU with a batch of `IMAGES`.
WITH_KERNELS = dict(
    dtype="bfloat16", dropout=0.1, encoder_width=128, encoder_heads=2, decoder_width=128,
    decoder_heads=2, head_width=128, head_heads=2,
)  # fmt: skip
IMAGES = 1024


def for_gpus(traced: jax.stages.Traced) -> str:
    """The program for NVIDIA GPUs, as JAX gives it to XLA."""
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def unordered_sums(program: str) -> list[str]:
    """What a program for NVIDIA GPUs may add in another order at the next run.

    These are scatters to places that may repeat, gradients of max-pooling with windows that may
    overlap, and atomic additions of kernels. Convolutions are left out: see `docs/training.md`.
    """
    operation = r'"stablehlo\.(scatter|select_and_scatter)"\(.*?<\{(.*?)\}> \(\{.*?\}\) : (.*?)\n'
    disjoint = r"unique_indices = true|window_dimensions = (array<.*?>), window_strides = \1"
    scatters = re.findall(operation, program, re.DOTALL)
    sums = [f"{name} {types}" for name, how, types in scatters if not re.search(disjoint, how)]
    return sums + sorted(set(re.findall(r"atomic_\w+", program)))


def step_for_gpus(task, batch, draw, sizes=(1, 1, 1), accumulation=1) -> str:
    """The program of a whole update, given `mesh -> abstract batch`."""
    mesh = first_devices(*sizes)
    config = OptimizerConfig(learning_rate=0.01, total_steps=10)
    optimizer, _ = make_optimizer(config)
    abstract = abstract_state(task.init, optimizer, mesh)
    settings = {"ema_decay": 0.9, "accumulation": accumulation}
    make = functools.partial(make_optimizer, config)
    step = make_train_step(task, make, abstract, mesh, **settings)
    numbers = RunNumbers.of(config, seed=0)
    with meshes.use_mesh(mesh):
        return for_gpus(step.trace(abstract, batch(mesh), draw, numbers))


@pytest.mark.parametrize(
    ("changes", "head_fraction", "settings", "kernels"),
    [
        ({}, 1.0, {}, 12),
        ({"scan_layers": False, "remat": "full", "head_chunk": 2048}, 0.5, {"accumulation": 2}, 12),
        ({"head": "parallel", "scan_layers": False}, 0.5, {}, 12),
        ({"channels_per_group": 2}, 0.5, {}, 12),
        ({"dtype": "float32"}, 1.0, {}, 0),
        # A device of these has too few images for the kernels of GELU.
        ({"head_chunk": 512}, 1.0, {"sizes": (2, 4, 1)}, 6),
        ({"scan_layers": False}, 1.0, {"sizes": (2, 2, 2)}, 6),
    ],
    ids=str,
)
def test_a_step_of_the_model_adds_in_one_order(changes, head_fraction, settings, kernels):
    config = tiny(**WITH_KERNELS | changes)
    program = step_for_gpus(
        ModelTask(config, 0.1, head_fraction),
        lambda mesh: abstract_batch(config, IMAGES, mesh),
        MaskSampler(config.positions, bucket=8).draw(0, 0),
        **settings,
    )
    assert unordered_sums(program) == []
    # It calls no other library, whose kernels may add in any order.
    assert set(re.findall(r"custom_call @([^(]+)", program)) <= {"__gpu$xla.gpu.triton"}
    assert "stablehlo.convolution" not in program
    # This package's kernels are there, so that the search above includes them.
    assert program.count("gpu.triton") >= kernels


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_only_convolutions_of_a_step_of_the_autoencoder_may_add_in_another_order(precision):
    task = AutoencoderTask(
        AUTOENCODER, precision, 1e-6, adversary=Adversary(weight=0.7, channels=8, layers=1)
    )

    def batch(mesh):
        sharding = meshes.batch_sharding(mesh)
        return {"images": jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.uint8, sharding=sharding)}

    program = step_for_gpus(task, batch, task.draw(0))
    assert unordered_sums(program) == []
    assert "custom_call" not in program


def test_the_gradient_of_lpips_adds_in_one_order():
    params = lpips.import_lpips(*lpips_network("vgg")[1:])

    def total(image, params):
        return jnp.sum(lpips.training_distance(params, image, image))

    program = for_gpus(jax.jit(jax.grad(total)).trace(jnp.zeros((1, 16, 16, 3)), params))
    assert "select_and_scatter" in program
    assert unordered_sums(program) == []


def test_what_adds_in_any_order_is_found():
    order, table = jnp.zeros((3, 8), jnp.int32), jnp.ones((8, 2))

    def gradient_for_gpus(function, argument):
        return for_gpus(jax.jit(jax.grad(lambda x: jnp.sum(function(x) ** 2))).trace(argument))

    def on_gpus_only(table):
        return jax.lax.platform_dependent(
            table,
            cuda=lambda table: table[order],
            default=lambda table: look_up(table, order, jnp.float32),
        )

    repeated = "scatter (tensor<8x2xf32>, tensor<3x8x1xi32>, tensor<3x8x2xf32>) -> tensor<8x2xf32>"
    for function in (lambda table: table[order], on_gpus_only):
        assert unordered_sums(gradient_for_gpus(function, table)) == [repeated]
    for window, found in ((2, []), (3, ["select_and_scatter"])):
        pooled = gradient_for_gpus(
            lambda x, side=window: nn.max_pool(x, (side, side), (2, 2)), jnp.ones((1, 8, 8, 1))
        )
        assert [one.split()[0] for one in unordered_sums(pooled)] == found

    def kernel(x_ref, out_ref):
        pl_triton.atomic_add(out_ref, (0,), x_ref[0])

    shape = jax.ShapeDtypeStruct((16,), jnp.float32)
    call = gpu_call(kernel, out_shape=shape, warps=1, interpret=False)
    assert unordered_sums(for_gpus(jax.jit(call).trace(shape))) == ["atomic_rmw"]


def test_the_products_cost_less_than_a_hundredth_of_a_step():
    model = make_model(config_from(["--config=imagenet256:size=L"]))
    hidden = model.positions
    positions = model.buffer + model.positions
    products = model.classes * model.encoder_width  # Of one image.
    products += model.positions * positions * model.encoder_width
    products += model.positions * (positions + model.positions) * model.decoder_width
    products += hidden * (model.channels - 1) * model.levels * model.head_width
    assert 2 * products < 0.001 * 3 * model.forward_flops(float(hidden), hidden)
