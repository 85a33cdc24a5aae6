"""Parameters as a safetensors file, which can be read without this package and without JAX.

The file's metadata hold a CRC-32 of the arrays, `crc32`, which `read` verifies.
"""

import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
import safetensors.numpy
from etils import epath
from flax import traverse_util

from tokenbridge_jax.runtime import storage
from tokenbridge_jax.runtime.errors import UserError


def write(path: epath.PathLike, tree: Mapping[str, Any]) -> None:
    """Writes nested arrays under names such as `outer/inner`, completely or not at all."""
    flat = traverse_util.flatten_dict(dict(tree), sep="/")
    tensors = {name: np.ascontiguousarray(leaf) for name, leaf in flat.items()}
    storage.write_bytes(path, safetensors.numpy.save(tensors, {"crc32": _crc32(tensors)}))


def read(path: epath.PathLike) -> dict[str, Any]:
    """Reads a file that `write` or another program wrote; only the former has a checksum.

    Raises:
      UserError: the file is missing, cannot be read or is damaged, or numpy lacks a type of it.
    """
    path = epath.Path(path)
    try:
        flat, stored = _load(path)
    except OSError as error:
        raise storage.read_error(path, error) from error
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds numbers of a type that numpy lacks, {error}") from error
    # JAX registers more types, but only some of the ways to read a file know them.
    if other := {str(x.dtype) for x in flat.values() if x.dtype.isbuiltin != 1}:
        raise UserError(f"{path} holds numbers of a type that numpy lacks, {min(other)}")
    if stored is not None and stored != _crc32(flat):
        raise UserError(
            f"{path} is damaged: it is not the file that was written; put back a copy of it"
        )
    return traverse_util.unflatten_dict(flat, sep="/")


def sha256(tree: Mapping[str, Any], start: bytes = b"") -> str:
    """SHA-256 of `start` and every array's name, shape, dtype and bytes, in the names' order."""
    digest = hashlib.sha256(start)
    for piece in _pieces(traverse_util.flatten_dict(dict(tree), sep="/")):
        digest.update(piece)
    return digest.hexdigest()


def _load(path: epath.Path) -> tuple[dict[str, np.ndarray], str | None]:
    """The arrays by name, and the checksum, if there is one.

    A local file is mapped, and not also read into memory as a whole.
    """
    if storage.in_object_store(path):
        data = path.read_bytes()
        return safetensors.numpy.load(data), _stored_crc32(io.BytesIO(data))
    with path.open("rb") as file:
        return safetensors.numpy.load_file(path), _stored_crc32(file)


def _stored_crc32(file: BinaryIO) -> str | None:
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return header.get("__metadata__", {}).get("crc32")


def _crc32(flat: Mapping[str, Any]) -> str:
    value = 0
    for piece in _pieces(flat):
        value = zlib.crc32(piece, value)
    return f"{value:08x}"


def _pieces(flat: Mapping[str, Any]) -> Iterator[bytes | memoryview]:
    for name, leaf in sorted(flat.items()):
        array = np.ascontiguousarray(leaf)
        yield f"{name} {array.shape} {array.dtype}".encode()
        yield array.data
