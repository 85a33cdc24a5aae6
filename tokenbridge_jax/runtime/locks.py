"""Locks of workdirs: only one run at a time may use one."""

import contextlib
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from etils import epath

from tokenbridge_jax.runtime import storage
from tokenbridge_jax.runtime.errors import UserError

# How long to wait for the lock of a killed process, which first frees its memory.
LOCK_SECONDS = 5


@contextlib.contextmanager
def lock(workdir: epath.PathLike) -> Iterator[None]:
    """Keeps other runs out of a workdir. The kernel frees the lock when this process ends.

    A missing workdir is made. If the body raises, what was made for the lock is removed again, but
    not a folder in which there is something else by then.

    Object stores have no such locks. Nor do some network file systems; for those a line is printed.
    The lock is also lost when this process closes another descriptor of the same file.

    Raises:
      UserError: another process has the lock; the message says which.
    """
    if storage.in_object_store(workdir):
        yield
        return
    path = Path(workdir) / ".lock"
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        new = [place for place in (path, *path.parents) if not os.path.lexists(place)]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+b", buffering=0)
        except OSError as error:
            # A run that failed may have removed the folder just now.
            gone = isinstance(error, FileNotFoundError | FileExistsError)
            if gone and not path.parent.is_file() and time.monotonic() < deadline:
                continue
            raise storage.write_error(path, error) from error
        with file:
            _acquire(file, path, deadline)
            if not os.fstat(file.fileno()).st_nlink:
                continue  # The run that had the lock failed and has removed the file.
            since = time.strftime("%Y-%m-%d %H:%M:%S %z")
            name = f"process {os.getpid()} on {socket.gethostname()} since {since}\n"
            with contextlib.suppress(OSError):  # On a full disk the lock works without a name.
                file.truncate(0)
                file.write(name.encode())
            try:
                yield
            except BaseException:
                _remove(new)  # While the file is locked.
                raise
            return


def _acquire(file: IO[bytes], path: Path, deadline: float) -> None:
    """Locks the file; it stays unlocked in a file system without locks.

    Raises:
      UserError: another process has the lock until the deadline.
    """
    while True:
        try:
            # `flock` would pass the lock on to child processes.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except (BlockingIOError, PermissionError):
            if time.monotonic() > deadline:
                file.seek(0)
                holder = file.read().decode(errors="replace").strip() or "another process"
                raise UserError(
                    f"{path.parent} is in use by {holder}; stop that one or use another --workdir"
                ) from None
            time.sleep(0.2)
        except OSError as error:
            reason = error.strerror or error
            print(f"{path} cannot be locked ({reason}): start no other run here", file=sys.stderr)
            return


def _remove(new: Sequence[Path]) -> None:
    """Removes a lock file and the folders that were made for it, the innermost first."""
    with contextlib.suppress(OSError):  # A folder is no longer empty.
        for place in new:
            if place.is_dir():
                place.rmdir()
            else:
                place.unlink()
