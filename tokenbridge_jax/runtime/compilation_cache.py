"""Compiled programs on disk: what one command has compiled, the next one reads.

The folder is `tokenbridge_jax/programs` in the user's cache (`storage.user_cache`). JAX keeps the
programs: the name of a file is a hash of the program, its options, the versions of the compiler and
the kind and number of devices, including the instructions that a CPU has. A lock makes the folder
safe for several processes at a time, and the programs that were used least recently are removed
when it is full.

Settings are JAX's own. `JAX_ENABLE_COMPILATION_CACHE=false` switches the cache off. If
`JAX_COMPILATION_CACHE_DIR` (or `jax.config`) names a folder, nothing is changed here.

JAX writes only from process 0 of a job, and a job whose processes do not all compile at the same
time may fail, because they wait for each other. So a job has a cache only if the user names one.
"""

import collections
import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from tokenbridge_jax.runtime import storage
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.progress import say

# Unless the environment has the setting.
SETTINGS = {
    "jax_compilation_cache_max_size": 2 * 2**30,
    # Hundreds of small programs are not worth a file each.
    "jax_persistent_cache_min_compile_time_secs": 0.5,
}

_TRACING = threading.Lock()  # See `compile_beside_others`.

# JAX's own, which it creates in every bounded folder. It waits for the lock as long.
_LOCK, _LOCK_SECONDS = ".lockfile", 10
# Where XLA keeps which algorithms it chose on a GPU. JAX does not bound this folder.
_CHOICES, _CHOICES_BYTES = "xla_gpu_per_fusion_autotune_cache_dir", 64 * 2**20


def enable() -> None:
    """Makes JAX keep compiled programs in the user's cache, unless it has another folder.

    If this is not possible, a line says why, and programs are compiled at every start.
    """
    given = jax.config.values
    if not given["jax_enable_compilation_cache"] or given["jax_compilation_cache_dir"]:
        return
    for name, value in SETTINGS.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    try:
        folder = _prepared_folder(bounded=jax.config.values["jax_compilation_cache_max_size"] != -1)
    except (OSError, UserError, KeyError) as error:
        # A KeyError is a user without a name, as in a container: JAX 0.10 needs one.
        say(f"compiled programs are not kept for the next start: {error}")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


def compile_beside_others(lower: Callable[[], jax.stages.Lowered]) -> Any:
    """Compiles what `lower` traces and lowers, while other threads compile other programs.

    They trace one after the other: when several training steps were traced at the same time, their
    text was another one in some runs, and they were not found on disk.
    """
    with _TRACING:
        lowered = lower()
    return lowered.compile()


@contextlib.contextmanager
def only_in(folder: str) -> Iterator[collections.Counter[str]]:
    """Inside, JAX keeps all programs in this folder and reads none from another one.

    Programs that this process has in memory are neither read nor written.

    Yields:
      Counts, which grow: programs `needed`, and those of them that were `read` from the folder.
    """
    events = {"compile_requests_use_cache": "needed", "cache_hits": "read"}
    count: collections.Counter[str] = collections.Counter()

    def listen(event: str, **_: Any) -> None:
        count[events.get(event.rpartition("/")[2], "")] += 1

    def change(settings: Mapping[str, Any]) -> None:
        for name, value in settings.items():
            jax.config.update(name, value)
        jax_cache.reset_cache()  # JAX reads the settings once.

    settings = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": folder,
        "jax_compilation_cache_max_size": -1,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        # XLA's own caches are in the folder, whose path JAX 0.10 then adds to the hash.
        "jax_persistent_cache_enable_xla_caches": None,
    }
    before = {name: jax.config.values[name] for name in settings}
    change(settings)
    jax.monitoring.register_event_listener(listen)
    try:
        yield count
    finally:
        jax.monitoring.unregister_event_listener(listen)
        change(before)


def _prepared_folder(*, bounded: bool) -> Path:
    """Creates the folder, does once what JAX will do there, and removes unfinished programs.

    A process that was killed, or a full disk, leaves half a program, which JAX would never replace.
    In a bounded folder JAX writes the time of the last use after the program, to another file. It
    needs this file of every program, so programs without a bound have a folder of their own.
    """
    cache = storage.user_cache()
    if cache is None:
        raise UserError("HOME is not set; JAX_COMPILATION_CACHE_DIR can name a folder for them")
    folder = cache / "tokenbridge_jax" / ("programs" if bounded else "programs_unbounded")
    storage.check_folder(folder)
    # Programs are code that will run: only this user may write them.
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    epath.Path(folder).stat()
    if bounded:
        with filelock.FileLock(folder / _LOCK, timeout=_LOCK_SECONDS):
            for program in folder.glob("*-cache"):
                if not program.with_name(f"{program.name.removesuffix('-cache')}-atime").exists():
                    program.unlink()
        _remove_oldest(folder / _CHOICES, _CHOICES_BYTES)
    return folder


def _remove_oldest(folder: Path, most_bytes: int) -> None:
    """Removes the oldest files of a folder, to which others may write, down to half of a size."""
    files = []
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            found = path.stat()
            files.append((found.st_mtime, found.st_size, path))
    total = sum(size for _, size, _ in files)
    if total <= most_bytes:
        return
    for _, size, path in sorted(files):
        if total <= most_bytes // 2:
            break
        with contextlib.suppress(FileNotFoundError, IsADirectoryError, PermissionError):
            path.unlink()
        total -= size
