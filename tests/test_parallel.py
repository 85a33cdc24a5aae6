"""Meshes, slices, the rows of a process, and the logical rules."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec
from tiny_model import TINY as CONFIG
from tiny_model import leaf_names

from tokenbridge_jax.model import init_params
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.runtime.errors import UserError


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, (8, 1, 1)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"data": 1, "fsdp": -1}, (1, 8, 1)),
        ({"data": 2, "fsdp": 1, "tensor": -1}, (2, 1, 4)),
        ({"data": -1, "fsdp": 4, "tensor": 2}, (1, 4, 2)),
    ],
)
def test_one_size_may_follow_from_the_others(sizes: dict[str, int], expected: tuple[int, ...]):
    mesh = meshes.make_mesh(**sizes)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert tuple(mesh.shape.values()) == expected
    assert sorted(d.id for d in mesh.devices.ravel()) == sorted(d.id for d in jax.devices())
    assert meshes.batch_shards(mesh) == expected[0] * expected[1]


def test_a_mesh_of_some_devices():
    mesh = meshes.make_mesh(devices=jax.devices()[2:5])
    assert mesh.devices.ravel().tolist() == jax.devices()[2:5]


@pytest.mark.parametrize(
    ("sizes", "message"),
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
def test_sizes_that_do_not_fit_are_named(sizes: dict[str, int], message: str):
    with pytest.raises(UserError, match=message):
        meshes.make_mesh(**sizes)


def test_batches_are_split():
    mesh = meshes.make_mesh(2, 2, 2)
    batch = {"a": np.arange(24).reshape(8, 3), "b": np.arange(8, dtype=np.uint8)}
    placed = meshes.to_global(batch, mesh)
    for name, array in placed.items():
        np.testing.assert_array_equal(array, batch[name])
        assert array.dtype == jax.dtypes.canonicalize_dtype(batch[name].dtype)
        # Four parts, in order; the two devices of a tensor group hold the same part.
        starts = sorted(shard.index[0].start for shard in array.addressable_shards)
        assert starts == [0, 0, 2, 2, 4, 4, 6, 6]
    with pytest.raises(UserError, match="6 rows of a batch do not divide over the 4 batch shards"):
        meshes.to_global(np.zeros((6, 1)), mesh)


def test_logical_names_become_shardings_if_sizes_divide():
    mesh = meshes.make_mesh(2, 2, 2)
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
            name: meshes.named_axes(zeros, *axes)(jax.random.key(0), shape)
            for name, (shape, axes, _) in shapes.items()
        }
        return boxed | {"unnamed": jnp.zeros((4, 4))}

    shardings = meshes.logical_shardings(jax.eval_shape(make), mesh)
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
    assert {"embed", "heads", "mlp", "layers"} <= names <= dict(meshes.RULES).keys()


def test_constrain_does_nothing_outside_a_mesh():
    x = jnp.ones((3, 5))
    np.testing.assert_array_equal(meshes.constrain(x, "batch", "embed"), x)


def test_parameters_are_made_sharded_and_equal_on_every_mesh():
    draws = []
    for sizes in [(8, 1, 1), (1, 4, 2)]:
        mesh = meshes.make_mesh(*sizes)
        boxed = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))
        shardings = meshes.logical_shardings(boxed, mesh)
        with meshes.use_mesh(mesh):
            init = jax.jit(
                lambda: nn.unbox(init_params(CONFIG, jax.random.key(0))), out_shardings=shardings
            )
            draws.append(leaf_names(init()))
    assert draws[0].keys() == draws[1].keys()
    for name, leaf in draws[0].items():
        np.testing.assert_array_equal(leaf, draws[1][name], err_msg=name)


@dataclasses.dataclass(frozen=True)
class Chip:
    """The attributes of a device that a mesh needs."""

    id: int
    process_index: int = 0
    slice_index: int = 0
    coords: tuple[int, ...] = ()
    platform: str = "fake"
    device_kind: str = "fake"
    core_on_chip: int = 0


def chips(slices, count, a_process, **fields):
    """`slices` x `count` chips in random order, with `a_process` chips on each process."""
    made = [
        Chip(i, process_index=i // a_process, slice_index=i // count, **fields)
        for i in range(slices * count)
    ]
    return np.random.default_rng(0).permutation(np.array(made)).tolist()


@pytest.mark.parametrize("sizes", [(-1, 1, 1), (4, 2, 2), (2, 2, -1), (-1, 8, 1), (8, 1, 2)])
def test_only_the_data_axis_crosses_slices(sizes):
    mesh = meshes.make_mesh(*sizes, devices=chips(2, 8, 4))
    seen = mesh.devices
    assert sorted(chip.id for chip in seen.ravel()) == list(range(16))
    slices = np.vectorize(lambda chip: chip.slice_index)(seen)
    # Along fsdp and tensor all chips are of one slice; along data the slices are in order.
    assert (slices == slices[:, :1, :1]).all()
    assert slices[:, 0, 0].tolist() == sorted(slices[:, 0, 0])


def test_the_number_of_slices_may_be_given():
    devices = chips(2, 8, 4)
    assert meshes.make_mesh(slices=2, devices=devices) == meshes.make_mesh(devices=devices)
    crossing = meshes.make_mesh(1, 16, 1, slices=1, devices=devices)
    assert [chip.id for chip in crossing.devices.ravel()] == list(range(16))
    with pytest.raises(UserError, match="slices=4, but the devices are of 2 slices"):
        meshes.make_mesh(slices=4, devices=devices)
    with pytest.raises(UserError, match="slices=2, but the devices are of 1 slice"):
        meshes.make_mesh(slices=2)
    with pytest.raises(UserError, match="data=1 does not divide over 2 slices"):
        meshes.make_mesh(1, 8, 2, devices=devices)


def test_a_mesh_need_not_follow_the_axes_of_a_torus():
    """8 x 8 on 4 x 4 x 4 chips: no axes of the torus multiply to 8."""
    torus = [
        Chip(i, coords=coords, platform="tpu", device_kind="TPU v4")
        for i, coords in enumerate(itertools.product(range(4), repeat=3))
    ]
    mesh = meshes.make_mesh(8, 8, 1, devices=torus)
    assert sorted(chip.id for chip in mesh.devices.ravel()) == list(range(64))


@pytest.mark.parametrize("sizes", [(16, 1, 1), (2, 4, 2), (2, 2, 4), (1, 2, 8), (4, 2, 2)])
@pytest.mark.parametrize("a_process", [2, 4, 8])
def test_a_process_reads_the_rows_of_its_devices(monkeypatch, sizes, a_process):
    """Also if processes share rows, and if the mesh does not follow the order of processes."""
    mesh = meshes.make_mesh(*sizes, devices=chips(1, 16, a_process))
    batch_size = 2 * sizes[0] * sizes[1]
    expected = {process: set() for process in range(16 // a_process)}
    for (data, fsdp, _), chip in np.ndenumerate(mesh.devices):
        shard = data * sizes[1] + fsdp
        expected[chip.process_index] |= {2 * shard, 2 * shard + 1}
    for process, rows in expected.items():
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert meshes.local_rows(mesh, batch_size).tolist() == sorted(rows)
    with pytest.raises(UserError, match=f"batch of {batch_size + 1} does not divide over"):
        meshes.local_rows(mesh, batch_size + 1)
