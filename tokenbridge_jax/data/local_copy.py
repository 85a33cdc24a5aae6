"""Copies token shards from an object store to the local disk, because ArrayRecord reads only files.

Every epoch of training reads all shards in random order, so each host needs all of them. The copy
is in `$TOKENBRIDGE_CACHE` (default `~/.cache/tokenbridge`). The name of its folder is a hash of
`dataset.json`, so that later runs find it and other shards get another folder.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from etils import epath

from tokenbridge_jax.runtime import storage
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.progress import Progress

INFO_FILE = "dataset.json"
# How many shards are copied at once, because one connection does not use all of a host's network.
THREADS = 8


def local_copy(folder: str | os.PathLike[str]) -> Path:
    """Returns a finished folder of token shards on this host's file system.

    Complete shards that an earlier call copied are not copied again, even if that call was killed.
    Several processes may call this at the same time.

    Args:
      folder: in the file system, which is returned unchanged, or in an object store
        (`gs://bucket/...`).

    Raises:
      UserError: the object store may not be read or holds no finished shards, a shard does not have
        the length given in `dataset.json`, or the disk is full. Other errors of an object store,
        such as a failing network, are passed on, because trying again may help.
    """
    if not storage.in_object_store(folder):
        return Path(storage.expand(folder))
    remote = epath.Path(folder)
    try:
        described = (remote / INFO_FILE).read_bytes()
    except FileNotFoundError as error:
        raise UserError(
            f"{remote} holds no finished token shards; run `tokenbridge tokenize` with a --workdir "
            "of a file system and copy its `tokens` there"
        ) from error
    except PermissionError as error:
        raise storage.read_error(remote, error) from error
    except ImportError as error:
        raise UserError(f"cannot read {remote}: {error}") from error
    splits = json.loads(described)["splits"].values()
    shards = [shard for split in splits for shard in split["shards"]]
    copy = _cache() / f"tokens-{hashlib.sha256(described).hexdigest()[:16]}"
    storage.remove_leftovers(copy)
    missing = [shard for shard in shards if _size(copy / shard["file"]) != shard["bytes"]]
    if missing:
        progress = Progress(len(missing), unit="shard", desc=f"{remote} -> {copy}")
        with progress, ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(lambda shard: _copy_shard(remote, copy, shard), missing):
                progress.update()
    if _size(copy / INFO_FILE) != len(described):
        storage.write_bytes(copy / INFO_FILE, described)
    return copy


def is_copy(shard: Path) -> bool:
    """Whether a shard is a copy of one in an object store."""
    return _cache() in shard.parents


def _cache() -> Path:
    if folder := os.environ.get("TOKENBRIDGE_CACHE"):
        return Path(storage.expand(folder))
    if cache := storage.user_cache():
        return cache / "tokenbridge"
    raise UserError(
        "token shards of an object store are copied to this machine, but its user has no home: set "
        "TOKENBRIDGE_CACHE to a folder for them"
    )


def _copy_shard(remote: epath.Path, copy: Path, shard: dict[str, object]) -> None:
    source = remote / str(shard["file"])
    try:
        data = source.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"token shard {source} is missing; copy it there again") from error
    if len(data) != shard["bytes"]:
        raise UserError(
            f"token shard {source} has {len(data)} bytes, not {shard['bytes']}; copy it there again"
        )
    storage.write_bytes(copy / source.name, data)


def _size(path: Path) -> int | None:
    return path.stat().st_size if storage.exists(path) else None
