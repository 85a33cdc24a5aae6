"""Files of state dicts: `.pth` and its kin (with torch), `.safetensors` and `.npz` (without).

Arrays come and go as numpy float32. A file of PyTorch's is a pickle, which can hold any program:
only what torch's weights-only loading takes for harmless is read.
"""

import argparse
import importlib.util
import io as bytes_io
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from etils import epath

from tokenbridge_jax import io
from tokenbridge_jax.errors import UserError

TORCH_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")

WRITTEN_SUFFIXES = (*TORCH_SUFFIXES, ".safetensors")
READ_SUFFIXES = (*WRITTEN_SUFFIXES, ".npz")

# What `.npz` files put before the names of a state dict, beside other arrays.
NPZ_PREFIX = "state/"

StateDict = dict[str, np.ndarray]


def read(path: epath.PathLike) -> dict[str, StateDict]:
    """Reads the state dicts of a file.

    Returns:
      "model", and "model_ema" if the file has one: names to float32 arrays.

    Raises:
      UserError: the file is missing, damaged, of an unknown kind, or would run code when read; or
        torch is needed and not there.
    """
    path = Path(path)
    check_suffix(path, READ_SUFFIXES)
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch(path)
    try:
        if path.suffix == ".safetensors":
            arrays = safetensors.numpy.load_file(path)
        else:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
        arrays = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
    except Exception as error:  # Whatever a damaged file, or one of another kind, makes them raise.
        raise _damaged(path, error) from error
    if any(name.startswith(NPZ_PREFIX) for name in arrays):
        arrays = {
            name.removeprefix(NPZ_PREFIX): array
            for name, array in arrays.items()
            if name.startswith(NPZ_PREFIX)
        }
    return {"model": arrays}


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
        io.write_bytes(path, safetensors.numpy.save(dict(parts["model"])))
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
    io.write_bytes(path, buffer.getvalue())


def check_suffix(path: epath.PathLike, suffixes: tuple[str, ...]) -> None:
    """Raises `UserError` unless the path ends in one of `suffixes`; torch must be there if its."""
    path = epath.Path(path)
    if path.suffix not in suffixes:
        raise UserError(f"{path} ends in none of {', '.join(suffixes)}")
    if path.suffix in TORCH_SUFFIXES:
        _torch(path)


def _read_torch(path: Path) -> dict[str, StateDict]:
    torch = _torch(path)
    try:
        # Checkpoints of training scripts hold their arguments, a plain bag of values.
        harmless = torch.serialization.safe_globals([argparse.Namespace])
        with harmless, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of old pickle protocols.
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
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
    parts = {name: content[name] for name in ("model", "model_ema") if name in content}
    if "model" not in parts:
        parts = {"model": content.get("state_dict", content)}
    return {part: _arrays(path, part, state) for part, state in parts.items()}


def _arrays(path: Path, part: str, state: Any) -> StateDict:
    try:
        return {str(name): tensor.detach().float().numpy() for name, tensor in state.items()}
    except (AttributeError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{path} holds no state dict in '{part}': not all of it are plain tensors"
        ) from error


def _torch(path: epath.PathLike) -> Any:
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            f"{path} needs PyTorch: pip install 'tokenbridge_jax[torch]' (or use .safetensors)"
        )
    import torch

    return torch


def _damaged(path: Path, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return UserError(f"{path} cannot be read, it may be damaged: {reason}")
