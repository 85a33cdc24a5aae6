"""Lists settings that need less memory, the cheapest first.

Settings change one after another and stay changed. This is what each of them costs:

  mesh.fsdp            gathers: parameters, EMA and optimizer are split over more devices
  model.remat=dots     attention and elementwise operations of the backbone are computed twice
  model.head_chunk     smaller products and more reductions; the least is MIN_CHUNK positions
  model.remat=full     the backbone's forward pass is computed twice: a twelfth of size L's FLOPs
  training.accumulation  the work for all parameters is done for every micro-batch
"""

from collections.abc import Callable, Iterator

from ml_collections import ConfigDict

MIN_CHUNK = 256
MAX_FSDP = 64

# Changed settings: `section.key` -> value.
Changes = dict[str, int | str]


def candidates(
    config: ConfigDict, devices: int, excess: int, saved: Callable[[int], float]
) -> Iterator[Changes]:
    """Yields settings that need less and less memory, each with all earlier changes.

    Args:
      config: the settings that do not fit.
      devices: number of devices in the mesh.
      excess: bytes on a device that do not fit.
      saved: `mesh.fsdp` -> bytes on a device that it saves at most. The smallest size that may save
        enough is tried; if there is none, the largest one, unless it saves little.
    """
    model, mesh, batch = config.model, config.mesh, config.training.batch_size
    tensor = max(mesh.tensor, 1)
    changes: Changes = {}
    sizes = [
        size
        for size in (2**n for n in range(1, MAX_FSDP.bit_length()))
        if size > mesh.fsdp > 0 and devices % (size * tensor) == 0
    ]
    enough = [size for size in sizes if saved(size) >= excess]
    if sizes and (enough or saved(sizes[-1]) >= excess / 8):
        changes = {"mesh.data": -1, "mesh.fsdp": (enough or sizes[::-1])[0]}
        yield changes
    if model.remat == "none":
        changes = changes | {"model.remat": "dots"}
        yield changes
    chunk = model.head_chunk
    while (chunk := chunk // 2) >= MIN_CHUNK:
        changes = changes | {"model.head_chunk": chunk}
        yield changes
    if model.remat != "full":
        changes = changes | {"model.remat": "full"}
        yield changes
    count = config.training.accumulation
    while (count := 2 * count) and batch % (count * devices // tensor) == 0:
        changes = changes | {"training.accumulation": count}
        yield changes


def with_changes(config: ConfigDict, changes: Changes) -> ConfigDict:
    """Returns a copy of a config with some values changed."""
    changed = config.copy_and_resolve_references()
    for name, value in changes.items():
        section, key = name.split(".")
        changed[section][key] = value
    return changed
