"""Parameters as a safetensors file, which needs neither this package nor JAX to be read."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy
from etils import epath
from flax import traverse_util

from tokenbridge_jax import io
from tokenbridge_jax.errors import UserError


def write(path: epath.PathLike, tree: Mapping[str, Any]) -> None:
    """Writes nested arrays as safetensors, named `outer/inner`, whole or not at all."""
    flat = traverse_util.flatten_dict(dict(tree), sep="/")
    tensors = {name: np.ascontiguousarray(leaf) for name, leaf in flat.items()}
    io.write_bytes(path, safetensors.numpy.save(tensors))


def read(path: epath.PathLike) -> dict[str, Any]:
    """Reads what `write` wrote.

    Raises:
      UserError: the file is missing, cannot be read or is damaged.
    """
    path = epath.Path(path)
    try:
        flat = safetensors.numpy.load(path.read_bytes())
    except OSError as error:
        raise io.read_error(path, error) from error
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    return traverse_util.unflatten_dict(flat, sep="/")


def sha256(tree: Mapping[str, Any], start: bytes = b"") -> str:
    """SHA-256 of `start` and every array's name, shape, dtype and bytes, in the names' order."""
    digest = hashlib.sha256(start)
    for name, leaf in sorted(traverse_util.flatten_dict(dict(tree), sep="/").items()):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(array.data)
    return digest.hexdigest()
