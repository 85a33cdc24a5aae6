"""Checksums of a checkpoint: a flipped bit in any of its files is reported, never loaded.

The chunks of arrays are compressed, and contain zstd's checksum of their content, XXH64.
TensorStore computes it when it writes and verifies it when it reads, in every process for the
chunks that the process needs: nothing is read twice, even in an object store. The other files are
small. Their CRC-32 are in `checksums.json`, which is written before a checkpoint counts as
complete. Checkpoints of earlier versions have no such file and are not verified.
"""

import functools
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath
from orbax.checkpoint._src.serialization import tensorstore_utils

from tokenbridge_jax.runtime import storage

FILE = "checksums.json"

# Folders that each process writes: chunks of arrays, and an index that is not read after Orbax has
# merged all indices.
_ARRAYS = "ocdbt.process_"
_BLOCK_BYTES = 2**20
_THREADS = 8


@functools.cache
def protect_arrays() -> bool:
    """Makes Orbax, which has no option for it, write arrays with checksums.

    Returns:
      Whether this works with the installed Orbax. If not, `write` includes the arrays.
    """
    plain = getattr(tensorstore_utils, "build_array_write_spec", None)
    if plain is None:
        return False

    @functools.wraps(plain)
    def with_checksums(*args: Any, **kwargs: Any) -> Any:
        spec = plain(*args, **kwargs)
        (sharding,) = spec.json.get("base", spec.json)["metadata"]["codecs"]
        compression = sharding["configuration"]["codecs"][-1]
        if compression["name"] != "zstd":
            raise ValueError(f"no checksum is known for arrays stored as {compression['name']}")
        options = {"level": 3} | compression.get("configuration", {})
        compression["configuration"] = options | {"checksum": True}
        return spec

    tensorstore_utils.build_array_write_spec = with_checksums
    return True


def write(checkpoint: epath.Path) -> None:
    """Writes `checksums.json` for the files in the folders of `checkpoint`.

    Raises:
      OSError: a file cannot be read.
      UserError: the list cannot be written.
    """
    parts = [path for path in checkpoint.iterdir() if path.is_dir()]
    files = sorted(str(file.relative_to(checkpoint)) for part in parts for file in _files(part))
    sums = dict(zip(files, _sums(checkpoint, files), strict=True))
    storage.write_json(checkpoint / FILE, {"crc32": sums, "crc32_of_these": _crc32_of_json(sums)})


def verify(checkpoint: epath.Path, parts: Iterable[str]) -> None:
    """Compares the files of these parts with `checksums.json`, if there is one.

    Raises:
      ValueError: a file is missing or has changed; the message names it.
      OSError: one cannot be read.
    """
    try:
        text = (checkpoint / FILE).read_bytes()
    except FileNotFoundError:
        return
    try:
        stored = json.loads(text)
        sums = stored["crc32"]
        whole = stored["crc32_of_these"] == _crc32_of_json(sums)
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"{FILE} is not what was written")
    of_parts = tuple(f"{part}/" for part in parts)
    files = [file for file in sums if file.startswith(of_parts)]
    for file, found in zip(files, _sums(checkpoint, files), strict=True):
        if found != sums[file]:
            state = "is missing" if found is None else "is not what was written"
            raise ValueError(f"{file} {state}")


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    """The files in a folder and its subfolders that contain no checksums of their own."""
    for path in folder.iterdir():
        if not path.is_dir():
            yield path
        elif not (protect_arrays() and path.name.startswith(_ARRAYS)):
            yield from _files(path)


def _sums(checkpoint: epath.Path, files: Sequence[str]) -> list[int | None]:
    """CRC-32 of every file; None if it is missing."""

    def crc32(name: str) -> int | None:
        value = 0
        try:
            with (checkpoint / name).open("rb") as file:
                while block := file.read(_BLOCK_BYTES):
                    value = zlib.crc32(block, value)
        except FileNotFoundError:
            return None
        return value

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(crc32, files))


def _crc32_of_json(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())
