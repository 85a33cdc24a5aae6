"""Compiled programs beside the weights of a saved pipeline, so that its first images come sooner.

  programs/*-cache         the programs, as JAX keeps them on disk
  programs/programs.json   what they are for: versions, devices, and the calls of `generate`

The name of a program is JAX's hash of all that it depends on. So a program of another model,
version, device or setting is never used, whatever the folder says. But a program is machine code:
whoever writes the folder decides what it does. It is loaded only if the user asks for it, and never
copied to the user's own folder of compiled programs.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jaxlib
from etils import epath
from jax.sharding import Mesh

from tokenbridge_jax.codec import Codec
from tokenbridge_jax.model_config import TokenBridgeConfig
from tokenbridge_jax.runtime import compilation_cache, storage
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.progress import say

FOLDER = "programs"
_FACTS = "programs.json"


@runtime_checkable
class Drawing(Protocol):
    """What this module needs of a pipeline."""

    config: TokenBridgeConfig
    codec: Codec
    mesh: Mesh

    def generate(self, class_ids: Any, **arguments: Any) -> Any:
        """See `Pipeline.generate`."""


def compile_for(pipeline: Drawing, calls: Sequence[Mapping[str, Any]] | Any) -> dict[str, bytes]:
    """Compiles the programs of some calls of `generate` anew, for the devices of the pipeline.

    Args:
      pipeline: draws once for every call.
      calls: the arguments of each.

    Returns:
      The files of the folder by name; none without a call.

    Raises:
      UserError: an argument is not as `generate` needs it, or this is a job of several processes.
    """
    if not calls:
        return {}
    if not _are_calls(calls):
        raise UserError(
            f"programs={calls!r} must be a list of dicts with class_ids, such as "
            '[{"class_ids": [3] * 64, "num_iter": 16}]'
        )
    if jax.process_count() > 1:
        raise UserError("compiled programs can be saved by a single process only; save without")
    try:
        about = json.dumps({"for": _machine(pipeline), "calls": calls}, indent=2)
    except TypeError as error:
        raise UserError(f"programs must be arguments of `generate` in JSON: {error}") from error
    jax.clear_caches()  # A program that is in memory would not be written.
    with tempfile.TemporaryDirectory() as folder:
        with compilation_cache.only_in(folder):
            for call in calls:
                pipeline.generate(**call)
        files = {path.name: path.read_bytes() for path in Path(folder).glob("*-cache")}
    return files | {_FACTS: f"{about}\n".encode()}


def load(pipeline: Drawing, directory: epath.Path) -> None:
    """Loads the programs of a saved folder by drawing once for each of its calls of `generate`.

    If they are for other versions or devices, a line says so, and they are not used.
    """
    folder = directory / FOLDER
    if not storage.exists(folder / _FACTS):
        say(f"{directory} has no compiled programs: they are compiled here when they are needed")
        return
    about, here = storage.read_json(folder / _FACTS), _machine(pipeline)
    if not (
        isinstance(about, Mapping)
        and isinstance(about.get("for"), Mapping)
        and _are_calls(about.get("calls"))
    ):
        say(f"{folder / _FACTS} is damaged: programs are compiled here when they are needed")
        return
    if other := [f"{key} {value}" for key, value in about["for"].items() if value != here.get(key)]:
        say(f"{folder} is for {', '.join(other)}: programs are compiled here when they are needed")
        return
    with tempfile.TemporaryDirectory() as copied:
        for path in folder.glob("*-cache"):
            (Path(copied) / path.name).write_bytes(path.read_bytes())
        with compilation_cache.only_in(copied) as count:
            for call in about["calls"]:
                pipeline.generate(**call)
    if missing := count["needed"] - count["read"]:
        say(f"{missing} of {count['needed']} programs of {folder} did not fit and were compiled")


def _are_calls(value: Any) -> bool:
    """Whether this is a list of keyword arguments of `generate`."""
    return isinstance(value, Sequence) and all(
        isinstance(call, Mapping) and "class_ids" in call and all(isinstance(x, str) for x in call)
        for call in value
    )


def _machine(pipeline: Drawing) -> dict[str, Any]:
    """What programs depend on, as far as a user can tell."""
    device = pipeline.mesh.devices.flat[0]
    return {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "device": device.device_kind,
        "devices": pipeline.mesh.size,
        "dtype": pipeline.config.dtype,
        "precision": pipeline.codec.precision,
    }
