"""The nearest settings that fit, found by compiling them.

Settings change one after another, the cheapest first, and stay changed:

  mesh.fsdp            parameters, EMA and optimizer over more devices: gathers
  model.remat=dots     attention and elementwise parts of the backbone computed twice
  model.head_chunk     down to MIN_CHUNK positions: smaller products, more reductions
  model.remat=full     the backbone's forward pass computed twice: a twelfth of all FLOPs at size L
  training.accumulation  work that a step does once for the parameters, several times
"""

from collections.abc import Callable, Iterator

from ml_collections import ConfigDict

MIN_CHUNK = 256
MAX_FSDP = 64

# What to change: `section.key` -> value.
Changes = dict[str, int | str]


def candidates(
    config: ConfigDict, devices: int, excess: int, saved: Callable[[int], float]
) -> Iterator[Changes]:
    """Settings that need less and less memory, each with all earlier changes.

    Args:
      config: the settings that do not fit.
      devices: of the mesh.
      excess: bytes on a device that do not fit.
      saved: `mesh.fsdp` -> bytes on a device that it saves at most. The smallest size that may be
        enough is tried; if none may be, the largest, unless it would hardly help.
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
    """A copy of a config with some values changed."""
    changed = config.copy_and_resolve_references()
    for name, value in changes.items():
        section, key = name.split(".")
        changed[section][key] = value
    return changed
