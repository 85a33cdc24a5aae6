"""Files of state dicts: `.pth` and its kin (with torch), `.safetensors` and `.npz` (without).

A file that is read is what its content says, whatever its name ends in. Arrays come and go as numpy
float32. A file of PyTorch's is a pickle, which can hold any program:
only what torch's weights-only loading takes for harmless is read.
"""

import argparse
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
READ_SUFFIXES = (*WRITTEN_SUFFIXES, ".npz")

# What `.npz` files put before the names of a state dict, beside other arrays.
NPZ_PREFIX = "state/"

StateDict = dict[str, np.ndarray]


def read(path: epath.PathLike) -> dict[str, StateDict]:
    """Reads the state dicts of a file that is laid out as those of the release are.

    Returns:
      "model", and "model_ema" if the file has one: names to float32 arrays. A file's dict
      `state_dict`, or all of it, is "model" where it has no `model`.

    Raises:
      UserError: the file is missing, damaged, of an unknown kind, or would run code when read; or
        torch is needed and not there.
    """
    path = Path(path)
    content = _load(path)
    parts = {name: content[name] for name in ("model", "model_ema") if _is_dict(content, name)}
    if "model" not in parts:
        parts = {"model": content["state_dict"] if _is_dict(content, "state_dict") else content}
    for part, state in parts.items():
        if any(not hasattr(tensor, "shape") for tensor in state.values()):
            raise UserError(
                f"{path} holds no state dict in '{part}': not all of it are plain tensors"
            )
    return {part: _arrays(path, state) for part, state in parts.items()}


def read_network(path: epath.PathLike, network: Network, prefixes: Collection[str] = ()) -> Found:
    """Reads a network's tensors, float32 arrays, from wherever they lie in a file: `parts.find`.

    Raises:
      UserError: as `read` and `parts.find` do.
    """
    path = Path(path)
    content = _load(path)
    tensors = dict(_flat(content))
    if not tensors:
        keys = ", ".join(f"'{key}'" for key in list(content)[:3]) or "it"
        raise UserError(f"{path} holds no state dict in {keys}: there are no tensors")
    try:
        found = find(tensors, network, prefixes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    parts = {part: _arrays(path, state) for part, state in found.parts.items()}
    return Found(parts, found.places, found.notes)


def write(path: epath.PathLike, parts: Mapping[str, StateDict]) -> None:
    """Writes state dicts, the file whole or not at all.

    Args:
      path: of a suffix of PyTorch's: a dict of all parts; `.safetensors`: the part "model" alone.
      parts: by name, as `read` gives them.

    Raises:
      UserError: the suffix is another, the file cannot be written, or torch is not there.
    """
    path = epath.Path(path)
    check_suffix(path, WRITTEN_SUFFIXES)
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


def check_suffix(path: epath.PathLike, suffixes: tuple[str, ...]) -> None:
    """Raises `UserError` unless the path ends in one of `suffixes`; torch must be there if its."""
    path = epath.Path(path)
    if path.suffix not in suffixes:
        raise UserError(f"{path} ends in none of {', '.join(suffixes)}")
    if path.suffix in TORCH_SUFFIXES:
        _torch(path)


def _load(path: Path) -> dict[Any, Any]:
    """What a file holds: tensors by name, in dicts of dicts if it is PyTorch's."""
    if not path.exists():
        check_suffix(path, READ_SUFFIXES)
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
    except Exception as error:  # Whatever a damaged file makes safetensors raise.
        raise _damaged(path, error) from error


def _load_shards(path: Path) -> dict[Any, Any]:
    tensors: dict[Any, Any] = {}
    for shard in sorted(map(str, set(storage.read_json(path)["weight_map"].values()))):
        if recognise(path.with_name(shard)) == "index":
            raise unreadable(path, f"{shard}, which it names, holds no tensors")
        tensors |= _load(path.with_name(shard))
    return tensors


def _load_torch(path: Path) -> dict[Any, Any]:
    torch = _torch(path)
    # By this ending torch would read it as the other kind, whatever it is.
    misnamed = path.suffix == ".safetensors"
    source = bytes_io.BytesIO(path.read_bytes()) if misnamed else path
    mapped = not misnamed and zipfile.is_zipfile(path)
    try:
        # Checkpoints of training scripts hold their arguments, a plain bag of values.
        harmless = torch.serialization.safe_globals([argparse.Namespace])
        with harmless, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of old pickle protocols.
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL:? (\S+)", str(error))
        held = f"besides tensors it holds {asked[1]}" if asked else "it holds no tensors of PyTorch"
        raise UserError(
            f"{path} is refused: {held}, and reading such may run any code; where you trust it, "
            "save its state dict alone"
        ) from error
    except Exception as error:  # Whatever a damaged file makes torch raise.
        raise _damaged(path, error) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no state dict but a {type(content).__name__}")
    return content


def _is_dict(content: Mapping[Any, Any], name: str) -> bool:
    return isinstance(content.get(name), dict)


def _flat(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors in dicts of dicts, by the keys that lead to them, joined by dots."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif hasattr(value, "shape"):
            yield f"{prefix}{key}", value


def _arrays(path: Path, state: Mapping[Any, Any]) -> StateDict:
    return {str(name): _array(path, name, tensor) for name, tensor in state.items()}


def _array(path: Path, name: Any, tensor: Any) -> np.ndarray:
    try:
        if isinstance(tensor, np.ndarray):
            if tensor.dtype == "V2":  # All that .npz files say of bfloat16.
                tensor = tensor.view(jnp.bfloat16)
            return np.asarray(tensor, np.float32)
        return tensor.detach().float().numpy()
    except Exception as error:  # Words, or tensors that are sparse, quantized or without values.
        raise UserError(f"{path} holds {name}, which is no plain tensor") from error


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
