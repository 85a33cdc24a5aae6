"""Devices and how arrays lie on them: the mesh, one table of logical rules, process start-up.

Arrays are annotated with logical axis names where they are made; `RULES` alone says which mesh
axis each name is split over. Mesh axes:

  data    copies of the parameters, each with its share of the batch
  fsdp    the batch is split further, and parameters, EMA and optimizer state are split too
  tensor  attention heads and MLP units are split
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from tokenbridge_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axis. Names that do not occur here are replicated.
RULES = (
    ("batch", ("data", "fsdp")),
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


def initialize(distributed: bool) -> None:
    """Joins the other processes of the job, before any device is touched.

    Nothing is guessed: without the flag a process stands alone; with it, a cluster that cannot be
    found is an error instead of a silent single-process run.

    Raises:
      UserError: there is no cluster to join.
    """
    if distributed:
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise UserError(f"--distributed found no cluster to join: {error}") from error


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Arranges the devices as a (data, fsdp, tensor) mesh; one size may be -1, for what is left.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    given = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise UserError(f"mesh sizes {sizes} must be positive, with at most one -1")
    if -1 in sizes and len(devices) % given == 0:
        sizes[sizes.index(-1)] = len(devices) // given
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"a mesh of data={data} fsdp={fsdp} tensor={tensor} does not fit {len(devices)} "
            "devices; set --config.mesh.* so that the sizes multiply to that number"
        )
    # Auto: the compiler propagates shardings from the annotations, where Explicit axes would turn
    # `with_logical_constraint` into an assertion.
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[Mesh]:
    """Makes `mesh` and the logical rules the ones that `constrain` and `jax.jit` see."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield mesh


class NamedAxes(nn.LogicallyPartitioned):
    """A parameter boxed with the logical names of its axes, and nothing more.

    Flax's own box also constrains the layout whenever it is opened under a mesh, which fails for
    sizes the mesh does not divide and for initialisers that work on a flattened shape. Layouts are
    set in one place instead: `out_shardings`, from `logical_shardings`.
    """

    def unbox(self, apply_constraint: bool = True) -> Any:
        del apply_constraint
        return self.value


def named_axes(init: Callable[..., Any], *names: str | None) -> Callable[..., Any]:
    """An initialiser whose parameter carries the logical names of its axes (see `RULES`)."""

    def init_named(*arguments: Any) -> NamedAxes:
        return NamedAxes(init(*arguments), names)

    return init_named


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Pins the layout of an activation; outside `use_mesh` it does nothing."""
    return nn.with_logical_constraint(x, logical_axes)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose first axis is the global batch."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts the batch is split: a batch size must be a multiple of it."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_shards_in_use() -> int:
    """Into how many parts the batch is split by the mesh of `use_mesh`; 1 outside it."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else batch_shards(mesh)


def logical_shardings(boxed: Any, mesh: Mesh) -> Any:
    """The shardings of a tree of parameters, from the logical names they were made with.

    Args:
      boxed: the abstract tree `jax.eval_shape(module.init, ...)` gives, boxes and all.
      mesh: the mesh to lay them on.

    Returns:
      A tree of `NamedSharding` with the structure of the unboxed parameters. An axis that its mesh
      axes do not divide is replicated: tiny models run on any mesh.
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


def axis_size(mesh: Mesh | AbstractMesh, name: str | tuple[str, ...]) -> int:
    """Into how many parts a mesh axis, or several together, split an array's axis."""
    return math.prod(mesh.shape[n] for n in ((name,) if isinstance(name, str) else name))


def to_global(local: Any, mesh: Mesh) -> Any:
    """Turns this process's share of a batch into global arrays, split along the first axis.

    Args:
      local: a tree of numpy arrays `[B / processes, ...]`.
      mesh: the mesh; B must be a multiple of data x fsdp.

    Raises:
      UserError: the batch does not divide over the mesh.
    """
    sharding = batch_sharding(mesh)

    def place(x: np.ndarray) -> jax.Array:
        if (len(x) * jax.process_count()) % batch_shards(mesh):
            raise UserError(
                f"a batch of {len(x) * jax.process_count()} does not divide over the "
                f"{batch_shards(mesh)} batch shards of the mesh; change the batch size"
            )
        return jax.make_array_from_process_local_data(sharding, x)

    return jax.tree.map(place, local)
