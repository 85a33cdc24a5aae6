"""The mesh of devices, and one table of rules for splitting arrays over it.

Arrays get logical axis names where they are made. `RULES` says over which mesh axis each name is
split. Mesh axes:

  data    copies of the parameters, each with its share of the batch; the only axis across slices
  fsdp    splits the batch further, and also parameters, EMA and optimizer state
  tensor  splits attention heads and MLP units
"""

import collections
import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Int32, Int64

from tokenbridge_jax.runtime.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")
_BATCH_AXES = ("data", "fsdp")

# Logical axis -> mesh axis. Axes with other names are replicated.
RULES = (
    ("batch", _BATCH_AXES),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("conv_out", "fsdp"),
    ("layers", None),
    ("positions", None),
    ("channels", None),
    ("levels", None),
    ("head_width", None),
    ("qkv", None),
    ("conv_in", None),
    ("kernel_h", None),
    ("kernel_w", None),
)


def axis_sizes(devices: int, data: int, fsdp: int, tensor: int) -> list[int]:
    """The sizes of the three axes, with -1 replaced by the number that uses all devices.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    sizes = [data, fsdp, tensor]
    given = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise UserError(f"mesh sizes {sizes} must be positive, with at most one -1")
    if -1 in sizes and devices % given == 0:
        sizes[sizes.index(-1)] = devices // given
    if math.prod(sizes) != devices:
        raise UserError(
            f"a mesh of data={data} fsdp={fsdp} tensor={tensor} does not fit {devices} "
            "devices; set --config.mesh.* so that the sizes multiply to that number"
        )
    return sizes


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    slices: int = -1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Arranges the devices as a (data, fsdp, tensor) mesh.

    Devices of one slice (a TPU slice, the GPUs of one NVLink domain) have a fast network. Between
    slices is the data-centre network. Only the axis `data`, which sums gradients once per update,
    crosses slices; fsdp and tensor stay inside one.

    Args:
      data: size of the axis. One of data, fsdp and tensor may be -1, to use all devices.
      fsdp: size of the axis.
      tensor: size of the axis.
      slices: number of slices; -1 takes it from the devices, and 1 treats all devices as one slice.
      devices: by default `jax.devices()`, all devices of the job.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or do not fit the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(len(devices), data, fsdp, tensor)
    of_slice = devices_by_slice(devices)
    found = len(of_slice)
    if slices != 1 and len(set(of_slice.values())) > 1:
        raise UserError(
            f"the slices have different numbers of devices: {sorted(of_slice.values())}; use equal "
            "ones, or set --config.mesh.slices=1 to treat all devices as one slice"
        )
    if slices not in (-1, 1, found):
        raise UserError(f"config.mesh.slices={slices}, but the devices are of {found} slices")
    if slices == -1:
        slices = found
    if sizes[0] % slices:
        raise UserError(
            f"mesh.data={sizes[0]} does not divide over {slices} slices; make it a multiple, or "
            "set --config.mesh.slices=1 to let the other axes cross the data-centre network"
        )
    # Physical axes may be split, because many sizes fit no torus otherwise.
    if slices > 1:
        inside = (sizes[0] // slices, *sizes[1:])
        arranged = mesh_utils.create_hybrid_device_mesh(
            inside, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    elif found > 1:
        arranged = np.array(sorted(devices, key=lambda device: device.id)).reshape(sizes)
    else:
        arranged = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    # With Auto axes the compiler propagates shardings from the annotations. Explicit axes would
    # turn `with_logical_constraint` into an assertion.
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def devices_by_slice(devices: Sequence[Any]) -> collections.Counter[int]:
    """The number of devices of every slice."""
    return collections.Counter(getattr(device, "slice_index", 0) for device in devices)


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[Mesh]:
    """Makes `constrain` and `jax.jit` use this mesh and the logical rules.

    Inside, JAX computes in 32 bits, even if the caller has enabled 64 bits.
    """
    with jax.enable_x64(False), jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield mesh


class NamedAxes(nn.LogicallyPartitioned):
    """A parameter in a box with the logical names of its axes.

    Flax's own box also constrains the layout whenever it is opened under a mesh. That fails for
    sizes that the mesh does not divide, and for initialisers that work on a flattened shape. Here
    layouts are set in one place: `out_shardings`, from `logical_shardings`.
    """

    def unbox(self, apply_constraint: bool = True) -> Any:
        del apply_constraint
        return self.value


def named_axes(init: Callable[..., Any], *names: str | None) -> Callable[..., Any]:
    """An initialiser whose parameter carries the logical names of its axes (see `RULES`)."""

    return functools.partial(_init_named, init, names)


def _init_named(
    init: Callable[..., Any], names: tuple[str | None, ...], *arguments: Any
) -> NamedAxes:
    return NamedAxes(init(*arguments), names)


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Fixes the layout of an activation; outside `use_mesh` it does nothing."""
    return x if in_shard() else nn.with_logical_constraint(x, logical_axes)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array of which every device holds a copy."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose first axis is the global batch."""
    return NamedSharding(mesh, PartitionSpec(_BATCH_AXES))


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """The number of parts that the batch is split into. Batch sizes must be multiples of it."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def round_up_batch(size: int, mesh: Mesh) -> int:
    """The smallest batch size of at least `size` that divides over the mesh."""
    return -(-size // batch_shards(mesh)) * batch_shards(mesh)


def batch_shards_in_use() -> int:
    """The number of parts that the mesh of `use_mesh` splits the batch into; 1 outside it.

    Also 1 inside `on_batch_shards`, where an array has the images of one part.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or in_shard() else batch_shards(mesh)


def splits_only_batch(size: int) -> bool:
    """Whether the mesh in use splits a batch of this size, and nothing within an image."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or in_shard() or mesh.shape["tensor"] > 1:
        return False
    return batch_shards(mesh) > 1 and size % batch_shards(mesh) == 0


def on_batch_shards(function: Callable[..., Any], batch_axes: Any, out_axes: Any) -> Any:
    """Runs a function once for each batch shard, on that part of the arrays.

    So the function itself says when devices communicate, by `sum_over_shards`. Elsewhere the
    compiler decides: it sums over devices in every iteration of a loop. Draws that depend on an
    element's place in the batch add `batch_shard`.

    Args:
      function: called with the parts; arrays without a batch axis are whole.
      batch_axes: a tree, or the prefix of one, like the arguments: which axis is the batch, -1 for
        none.
      out_axes: likewise for the results.
    """

    def spec(axis: int) -> PartitionSpec:
        return PartitionSpec() if axis < 0 else PartitionSpec(*[None] * axis, _BATCH_AXES)

    return jax.shard_map(
        function,
        in_specs=jax.tree.map(spec, batch_axes),
        out_specs=jax.tree.map(spec, out_axes),
        check_vma=False,
    )


def in_shard() -> bool:
    """Whether this is the function of `on_batch_shards`, or another that sees one device's part."""
    return set(_BATCH_AXES) <= set(jax.sharding.get_abstract_mesh().manual_axes)


def batch_shard() -> Int32[jax.Array, ""] | int:
    """The number of this batch shard inside `on_batch_shards`; 0 outside it."""
    return jax.lax.axis_index(_BATCH_AXES) if in_shard() else 0


def sum_over_shards(tree: Any) -> Any:
    """The sums of arrays over all batch shards, inside `on_batch_shards`."""
    return jax.lax.psum(tree, _BATCH_AXES)


def logical_shardings(boxed: Any, mesh: Mesh) -> Any:
    """The shardings of a tree of parameters, from the logical names of their axes.

    Args:
      boxed: the abstract tree of boxes that `jax.eval_shape(module.init, ...)` returns.
      mesh: the mesh.

    Returns:
      A tree of `NamedSharding` with the structure of the unboxed parameters. An axis that its mesh
      axes do not divide is replicated, so that tiny models run on any mesh.
    """
    specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), RULES)

    def sharding(leaf: jax.ShapeDtypeStruct, spec: PartitionSpec) -> NamedSharding:
        names = tuple(spec) + (None,) * (len(leaf.shape) - len(spec))
        kept = [
            name if name and size % axis_size(mesh, name) == 0 else None
            for size, name in zip(leaf.shape, names, strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*kept))

    return jax.tree.map(sharding, nn.unbox(boxed), specs)


def abstract_arrays(boxed: Any, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of boxed abstract parameters on a mesh, without the boxes."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.unbox(boxed),
        logical_shardings(boxed, mesh),
    )


def on_host(array: jax.Array) -> np.ndarray:
    """A whole array of any layout, as numpy's; every process of a job must call this."""
    if not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def axis_size(mesh: Mesh | AbstractMesh, name: str | tuple[str, ...]) -> int:
    """The number of parts that a mesh axis, or several together, split an axis of an array into."""
    return math.prod(mesh.shape[n] for n in ((name,) if isinstance(name, str) else name))


def local_rows(mesh: Mesh, batch_size: int) -> Int64[np.ndarray, " b"]:
    """The rows of a global batch that this process's devices hold, in ascending order.

    Processes that share a tensor group hold the same rows. The rows of one process need not be
    adjacent, because a mesh follows the network of the devices, not the order of processes.

    Args:
      mesh: the devices.
      batch_size: B of the whole job.

    Raises:
      UserError: the batch does not divide over the mesh.
    """
    parts = batch_shards(mesh)
    if batch_size < 1 or batch_size % parts:
        raise UserError(
            f"a batch of {batch_size} does not divide over the {parts} batch shards of the mesh; "
            "change the batch size"
        )
    return np.flatnonzero(np.repeat(_local_shards(mesh), batch_size // parts))


def to_global(local: Any, mesh: Mesh) -> Any:
    """Turns this process's rows of a batch into global arrays, split along the first axis.

    Args:
      local: a tree of numpy arrays `[b, ...]` with the rows of `local_rows`. Scalars, which must be
        equal in all processes, are copied to every device.
      mesh: the devices.

    Raises:
      UserError: the rows do not divide over the batch shards that this process holds.
    """
    sharding, held = batch_sharding(mesh), _local_shards(mesh)
    parts, place_of_shard = int(np.sum(held)), np.cumsum(held) - 1

    def place(x: np.ndarray | np.generic) -> jax.Array:
        if isinstance(x, np.generic):
            return jax.make_array_from_callback((), replicated(mesh), lambda _: np.asarray(x))
        size, rest = divmod(len(x), parts)
        if rest:
            raise UserError(
                f"{len(x)} rows of a batch do not divide over the {parts} batch shards of this "
                "process; change the batch size"
            )

        def rows(index: Any) -> np.ndarray:
            start = size * int(place_of_shard[(index[0].start or 0) // size])
            return x[start : start + size]

        return jax.make_array_from_callback((size * len(held), *x.shape[1:]), sharding, rows)

    return jax.tree.map(place, local)


def _local_shards(mesh: Mesh) -> Bool[np.ndarray, " shards"]:
    """Whether each batch shard is on a device of this process."""
    processes = np.vectorize(lambda device: device.process_index)(mesh.devices)
    return np.any(processes.reshape(batch_shards(mesh), -1) == jax.process_index(), axis=1)
