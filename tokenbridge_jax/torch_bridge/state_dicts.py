"""Reads and writes files of state dicts: PyTorch files (with torch), `.safetensors` and `.npz`.

The content of a file decides how it is read, not its name. Arrays are numpy float32. A PyTorch file
is a pickle, which can contain any program, so only torch's weights-only loading reads it.
"""

import argparse
import contextlib
import importlib.util
import io as bytes_io
import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath

from tokenbridge_jax.runtime import storage
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.torch_bridge.kinds import recognise, unreadable
from tokenbridge_jax.torch_bridge.parts import Found, Network, find

TORCH_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")

WRITTEN_SUFFIXES = (*TORCH_SUFFIXES, ".safetensors")

# Prefix of the names of a state dict in an `.npz` file that also holds other arrays.
NPZ_PREFIX = "state/"

StateDict = dict[str, np.ndarray]


def read(path: epath.PathLike) -> dict[str, StateDict]:
    """Reads the state dicts of a file that is organised like the release's checkpoints.

    Returns:
      State dicts of float32 arrays: "model", and "model_ema" if the file has one. If the file has
      no dict `model`, "model" is its dict `state_dict`, or the whole file.

    Raises:
      UserError: the file is missing, damaged, of an unknown kind, holds something other than plain
        tensors, or would run code when read; or torch is needed and not installed.
    """
    path = Path(path)
    content = _load(path)
    if isinstance(content.get("model"), dict):
        names = [name for name in ("model", "model_ema") if isinstance(content.get(name), dict)]
        return {name: _arrays(path, content[name]) for name in names}
    state = content.get("state_dict")
    return {"model": _arrays(path, state if isinstance(state, dict) else content)}


def read_network(path: epath.PathLike, network: Network, prefixes: Collection[str] = ()) -> Found:
    """Finds a network's tensors anywhere in a file, and reads them as float32 arrays.

    The arguments `network` and `prefixes`, and the result, are those of `parts.find`.

    Raises:
      UserError: for the reasons of `read` and `parts.find`.
    """
    path = Path(path)
    content = _load(path)
    tensors = dict(_flat(content))
    if not tensors:
        keys = ", ".join(f"'{key}'" for key in list(content)[:3]) or "it"
        raise UserError(f"{path} holds no state dict in {keys}: there are no tensors")
    with naming(path):
        found = find(tensors, network, prefixes)
    return found._replace(parts={part: _arrays(path, x) for part, x in found.parts.items()})


@contextlib.contextmanager
def naming(path: epath.PathLike) -> Iterator[None]:
    """Puts the name of a file before the message of a `UserError`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def write(path: epath.PathLike, parts: Mapping[str, StateDict]) -> None:
    """Writes state dicts to a file, which is then complete, or unchanged if writing fails.

    Args:
      path: a `.safetensors` file gets only the part "model"; a file with one of PyTorch's suffixes
        gets a dict of all parts.
      parts: state dicts by name, as `read` returns them.

    Raises:
      UserError: the path has another suffix, the file cannot be written, or torch is not installed.
    """
    path = epath.Path(path)
    check_suffix(path)
    if path.suffix == ".safetensors":
        storage.write_bytes(path, safetensors.numpy.save(dict(parts["model"])))
        return
    torch = _torch(path)
    tensors = {
        part: {
            k: torch.from_numpy(np.require(v, requirements=["C", "W"])) for k, v in state.items()
        }
        for part, state in parts.items()
    }
    buffer = bytes_io.BytesIO()
    torch.save(tensors, buffer)
    storage.write_bytes(path, buffer.getvalue())


def check_suffix(path: epath.PathLike) -> None:
    """Raises `UserError` unless a path has a suffix that `write` can write here."""
    path = epath.Path(path)
    if path.suffix not in WRITTEN_SUFFIXES:
        raise UserError(f"{path} ends in none of {', '.join(WRITTEN_SUFFIXES)}")
    if path.suffix in TORCH_SUFFIXES:
        _torch(path)


def _load(path: Path) -> dict[Any, Any]:
    """Returns a file's tensors by name, or for a PyTorch file possibly dicts of dicts of them."""
    kind = recognise(path)
    if kind == "torch":
        return _load_torch(path)
    if kind == "index":
        return _load_shards(path)
    if kind == "npz":
        arrays = storage.read_npz(path)
        marked = {name: x for name, x in arrays.items() if name.startswith(NPZ_PREFIX)}
        return {name.removeprefix(NPZ_PREFIX): x for name, x in (marked or arrays).items()}
    try:
        return safetensors.numpy.load_file(path)
    except (AttributeError, KeyError) as error:
        raise unreadable(
            path, f"numpy has no such type ({error}); convert its tensors to float32"
        ) from error
    except Exception as error:  # A damaged file can raise anything in safetensors.
        raise _damaged(path, error) from error


def _load_shards(path: Path) -> dict[Any, Any]:
    tensors: dict[Any, Any] = {}
    for shard in sorted(map(str, set(storage.read_json(path)["weight_map"].values()))):
        if recognise(path.with_name(shard)) == "index":
            raise unreadable(path, f"it names {shard}, which holds no tensors")
        tensors |= _load(path.with_name(shard))
    return tensors


def _load_torch(path: Path) -> dict[Any, Any]:
    torch = _torch(path)
    # Because of this suffix, torch would read the file as safetensors.
    misnamed = path.suffix == ".safetensors"
    source = bytes_io.BytesIO(path.read_bytes()) if misnamed else path
    mapped = not misnamed and zipfile.is_zipfile(path)
    try:
        # Training scripts save their arguments in this type, which is harmless.
        harmless = torch.serialization.safe_globals([argparse.Namespace])
        with harmless, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # About old pickle protocols.
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL:? (\S+)", str(error))
        held = f"besides tensors it holds {asked[1]}" if asked else "it holds no PyTorch tensors"
        raise UserError(
            f"{path} is refused: {held}, and reading it could run any code; if you trust it, save "
            "its state dict alone"
        ) from error
    except Exception as error:  # A damaged file can raise anything in torch.
        raise _damaged(path, error) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict")
    return content


def _flat(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the tensors in dicts of dicts; their names are the keys, joined by dots."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif hasattr(value, "shape"):
            yield f"{prefix}{key}", value


def _arrays(path: Path, state: Mapping[Any, Any]) -> StateDict:
    arrays = {}
    for name, tensor in state.items():
        try:
            if not isinstance(tensor, np.ndarray):
                tensor = tensor.detach().float().numpy()
            elif tensor.dtype == "V2":  # bfloat16 in an .npz file.
                tensor = tensor.view(jnp.bfloat16)
            arrays[str(name)] = np.asarray(tensor, np.float32)
        except Exception as error:  # Text, numbers, or sparse, quantized or empty tensors.
            raise UserError(f"{path} holds {name}, which is not a plain tensor") from error
    return arrays


def _torch(path: epath.PathLike) -> Any:
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            f"{path} needs PyTorch: pip install 'tokenbridge_jax[torch]' (or use .safetensors)"
        )
    import torch

    return torch


def _damaged(path: Path, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return unreadable(path, f"it is cut short or damaged; get it again ({reason})")
