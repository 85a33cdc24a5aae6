"""Meshes, the logical rules, and the model on several meshes against the model on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec
from tiny_model import leaf_names, random_batch, random_params, relative_error, tiny

from tokenbridge_jax import parallel
from tokenbridge_jax.errors import UserError
from tokenbridge_jax.loss import image_nll, loss
from tokenbridge_jax.model import init_params

# A chunk is one slot on one device; on the meshes below three, six and one.
CONFIG = tiny(head_chunk=6, encoder_layers=2)
BATCH = 8
HIDDEN = 6


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        ({}, (8, 1, 1)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"data": 1, "fsdp": -1}, (1, 8, 1)),
        ({"data": 2, "fsdp": 1, "tensor": -1}, (2, 1, 4)),
        ({"data": -1, "fsdp": 4, "tensor": 2}, (1, 4, 2)),
    ],
)
def test_one_size_may_be_left_to_the_mesh(asked: dict[str, int], got: tuple[int, ...]):
    mesh = parallel.make_mesh(**asked)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert tuple(mesh.shape.values()) == got
    assert sorted(d.id for d in mesh.devices.ravel()) == sorted(d.id for d in jax.devices())
    assert parallel.batch_shards(mesh) == got[0] * got[1]


def test_a_mesh_of_some_devices():
    mesh = parallel.make_mesh(devices=jax.devices()[2:5])
    assert mesh.devices.ravel().tolist() == jax.devices()[2:5]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"data": 3}, "data=3 fsdp=1 tensor=1 does not fit 8 devices"),
        ({"data": -1, "fsdp": 3}, "data=-1 fsdp=3 tensor=1 does not fit 8 devices"),
        ({"data": 16}, "does not fit 8 devices; set --config.mesh"),
        ({"data": -1, "fsdp": -1}, "at most one -1"),
        ({"data": 0}, "must be positive"),
        ({"data": -2, "fsdp": -4}, "must be positive"),
        ({"tensor": 0}, "must be positive"),
    ],
)
def test_sizes_that_do_not_fit_are_named(asked: dict[str, int], message: str):
    with pytest.raises(UserError, match=message):
        parallel.make_mesh(**asked)


def test_batches_are_split_and_come_back():
    mesh = parallel.make_mesh(2, 2, 2)
    batch = {"a": np.arange(24).reshape(8, 3), "b": np.arange(8, dtype=np.uint8)}
    placed = parallel.to_global(batch, mesh)
    for name, array in placed.items():
        np.testing.assert_array_equal(array, batch[name])
        assert array.dtype == jax.dtypes.canonicalize_dtype(batch[name].dtype)
        # Four parts, in order; the two devices of a tensor group hold the same one.
        starts = sorted(shard.index[0].start for shard in array.addressable_shards)
        assert starts == [0, 0, 2, 2, 4, 4, 6, 6]
    with pytest.raises(UserError, match="batch of 6 does not divide over the 4 batch shards"):
        parallel.to_global(np.zeros((6, 1)), mesh)


def test_logical_names_become_shardings_where_sizes_divide():
    mesh = parallel.make_mesh(2, 2, 2)
    shapes = {
        "both": ((16, 32), ("embed", "mlp"), ("fsdp", "tensor")),
        "odd_embed": ((15, 32), ("embed", "mlp"), (None, "tensor")),
        "odd_mlp": ((16, 33), ("embed", "mlp"), ("fsdp", None)),
        "heads": ((4, 16, 3, 2, 8), ("layers", "embed", "qkv", "heads", "head_width"),
                  (None, "fsdp", None, "tensor", None)),
        "one_head": ((16, 1, 8), ("embed", "heads", "head_width"), ("fsdp", None, None)),
        "batch": ((8, 3), ("batch", None), (("data", "fsdp"), None)),
        "odd_batch": ((6, 3), ("batch", None), (None, None)),
        "levels": ((4, 6, 8), ("channels", "levels", "embed"), (None, None, "fsdp")),
    }  # fmt: skip

    def make():
        zeros = nn.initializers.zeros
        boxed = {
            name: parallel.named_axes(zeros, *axes)(jax.random.key(0), shape)
            for name, (shape, axes, _) in shapes.items()
        }
        return boxed | {"unnamed": jnp.zeros((4, 4))}

    shardings = parallel.logical_shardings(jax.eval_shape(make), mesh)
    assert shardings.keys() == shapes.keys() | {"unnamed"}
    for name, (shape, _, expected) in shapes.items():
        expected = NamedSharding(mesh, PartitionSpec(*expected))
        assert shardings[name].is_equivalent_to(expected, len(shape)), name
    assert shardings["unnamed"].is_fully_replicated


def test_every_logical_name_of_the_model_is_in_the_rules():
    boxed = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))
    specs = nn.get_partition_spec(boxed)
    is_spec = dict(is_leaf=lambda x: isinstance(x, PartitionSpec))
    names = {name for spec in jax.tree.leaves(specs, **is_spec) for name in spec if name}
    assert {"embed", "heads", "mlp", "layers"} <= names <= dict(parallel.RULES).keys()


def test_constrain_does_nothing_outside_a_mesh():
    x = jnp.ones((3, 5))
    np.testing.assert_array_equal(parallel.constrain(x, "batch", "embed"), x)


def _loss(params, batch):
    return loss(CONFIG, params, **_arguments(batch))


def _image_nll(params, batch):
    return image_nll(CONFIG, params, **_arguments(batch))


def _arguments(batch):
    return batch | dict(
        num_hidden=jnp.int32(HIDDEN),
        drop_class=jnp.arange(BATCH) == 0,
        hidden_slots=CONFIG.positions,
        visible_slots=CONFIG.positions,
    )


@pytest.fixture(scope="module")
def single():
    """Parameters, batch and what one device makes of them."""
    params, batch = random_params(CONFIG), random_batch(CONFIG, BATCH)
    loss_and_gradients = jax.jit(jax.value_and_grad(_loss))(params, batch)
    return params, batch, loss_and_gradients, jax.jit(_image_nll)(params, batch)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1), (1, 2, 4)])
def test_loss_and_gradients_on_a_mesh_are_those_of_one_device(single, sizes: tuple[int, ...]):
    params, batch, (expected, gradients), images = single
    mesh = parallel.make_mesh(*sizes)
    boxed = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))
    shardings = parallel.logical_shardings(boxed, mesh)
    placed = jax.device_put(params, shardings)

    # What a device holds of a large matrix is its share, not a copy.
    fc1 = placed["backbone"]["encoder_blocks"]["mlp"]["fc1"]["kernel"]
    share = fc1.addressable_shards[0].data.size
    assert share * sizes[1] * sizes[2] == fc1.size
    qkv = placed["head"]["blocks"]["attn"]["qkv"]["kernel"]
    assert qkv.addressable_shards[0].data.shape[3] == CONFIG.head_heads // sizes[2]

    with parallel.use_mesh(mesh):
        step = jax.jit(
            jax.value_and_grad(_loss), out_shardings=(parallel.replicated(mesh), shardings)
        )
        batch = parallel.to_global(batch, mesh)
        actual, actual_gradients = step(placed, batch)
        nll = jax.jit(_image_nll)(placed, batch)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    np.testing.assert_allclose(nll, images, rtol=2e-6)
    actual_gradients, gradients = leaf_names(actual_gradients), leaf_names(gradients)
    for name, expected in gradients.items():
        if name != "head/blocks/attn/k_norm/bias":  # Zero in exact arithmetic.
            assert relative_error(actual_gradients[name], expected) < 3e-5, name


def test_parameters_are_made_sharded_and_equal_on_every_mesh():
    draws = []
    for sizes in [(8, 1, 1), (1, 4, 2)]:
        mesh = parallel.make_mesh(*sizes)
        boxed = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))
        shardings = parallel.logical_shardings(boxed, mesh)
        with parallel.use_mesh(mesh):
            init = jax.jit(
                lambda: nn.unbox(init_params(CONFIG, jax.random.key(0))), out_shardings=shardings
            )
            draws.append(leaf_names(init()))
    assert draws[0].keys() == draws[1].keys()
    for name, leaf in draws[0].items():
        np.testing.assert_array_equal(leaf, draws[1][name], err_msg=name)
