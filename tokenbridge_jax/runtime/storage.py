"""Paths as people write them, files that are either whole or not there, the lock of a workdir."""

import contextlib
import errno
import fcntl
import hashlib
import io as bytes_io
import json
import os
import socket
import sys
import tempfile
import time
import uuid
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from etils import epath

from tokenbridge_jax.runtime.errors import UserError

# A process that is killed may take as long to give back its memory, and then its locks.
LOCK_SECONDS = 5

# What helps where the system refuses a file: nothing of it says that the file is damaged.
_MENDS = {
    errno.EACCES: "give this user the right to it (chmod, chown)",
    errno.EPERM: "give this user the right to it (chmod, chown)",
    errno.EROFS: "its file system is mounted read-only: mount it anew, or name another folder",
    errno.EMFILE: "allow this process more open files (ulimit -n) and run again",
    errno.ENFILE: "the machine has too many files open: end other programs and run again",
    errno.ESTALE: "mount the network file system anew and run again",
    errno.ETIMEDOUT: "the network file system does not answer: run again when it does",
    errno.EIO: "the disk or the network failed: run again, and if it stays read a copy",
    errno.EDQUOT: "the quota is used up: free some space and run again",
    errno.ENOMEM: "the machine is out of memory: end other programs and run again",
}


# What a file system allows for one name; most allow as much.
NAME_BYTES = 255


def in_object_store(path: epath.PathLike) -> bool:
    """Whether a path is one of `gs://` and its like, not of a file system."""
    return "://" in str(path)


def expand(path: epath.PathLike) -> str:
    """A path as somebody wrote it, with the folder that `~` or `~user` at its beginning stands for.

    Everything a user names goes through here once more than it must: twice changes nothing.

    Raises:
      UserError: nobody knows that folder, or a name in the path is longer than a file's can be.
    """
    text = os.fspath(path)
    if in_object_store(text):
        return text
    if text.startswith("~"):
        home, _, rest = text.partition("/")
        if (folder := os.path.expanduser(home)) == home:
            unknown = f"there is no user '{home[1:]}'" if home[1:] else "HOME is not set"
            raise UserError(f"{text}: {unknown}; write the whole path (or ./{text})")
        text = os.path.join(folder, rest)
    elif os.path.normpath(text).startswith("~"):
        text = os.path.abspath(text)  # `pathlib` makes ./~name a ~name, which means another thing.
    for name in text.split("/"):
        check_name(name)
    return text


def check_name(name: str) -> None:
    """Raises `UserError` where a file of this name cannot be."""
    if (length := len(os.fsencode(name))) > NAME_BYTES:
        raise UserError(
            f"the name {name[:20]}... has {length} bytes, a file's at most {NAME_BYTES}: choose a "
            "shorter one"
        )


def as_path(path: epath.PathLike) -> epath.Path:
    """The path that somebody's words stand for (see `expand`)."""
    return epath.Path(expand(path))


def user_cache() -> Path | None:
    """The folder for what can be had again; None for a user without a home."""
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(expand(folder))
    return None if os.path.expanduser("~") == "~" else Path(expand("~/.cache"))


def check_folder(path: epath.PathLike) -> epath.Path:
    """A folder to write to later; it is not made yet.

    Raises:
      UserError: it could not be made, or not be written to.
    """
    folder = as_path(path)
    if in_object_store(folder):
        return folder
    place = Path(os.path.abspath(folder))
    nearest = next(x for x in (place, *place.parents) if os.path.exists(x))
    if not nearest.is_dir():
        raise UserError(f"cannot write to {folder}: {nearest} is a file; name a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {folder}: {nearest} is not writable; name another folder")
    return folder


def write_bytes(path: epath.PathLike, data: bytes) -> None:
    """Writes `data` to `path`, which holds either its old content or all of the new.

    Raises:
      UserError: the disk is full or the folder is not writable.
    """
    path = epath.Path(path)
    if in_object_store(path):
        try:
            path.write_bytes(data)
        except OSError as error:
            raise write_error(path, error) from error
        return
    with replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: epath.PathLike) -> Iterator[IO[bytes]]:
    """A file to write to in place of `path`, which holds either its old content or all of the new.

    The bytes go to a temporary file beside `path` that takes its name only when complete, or that
    is copied to an object store then.

    Raises:
      UserError: the disk is full or the folder is not writable.
    """
    path = epath.Path(path)
    if in_object_store(path):
        with tempfile.TemporaryDirectory() as folder:
            local = epath.Path(folder) / path.name
            with replacing(local) as file:
                yield file
            try:
                local.copy(path, overwrite=True)
            except OSError as error:
                raise write_error(path, error) from error
        return
    temporary = path.parent / f".{uuid.uuid4().hex}.tmp"  # As long as the name may be.
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # Where the folder is a file, even this fails.
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise write_error(path, error) from error
        raise


def write_error(path: epath.PathLike, error: OSError) -> UserError:
    """Turns a failed write to `path` into a message a user can act on."""
    if error.errno == errno.ENOSPC:
        return UserError(f"cannot write {path}: the disk is full; free some space and run again")
    return UserError(f"cannot write {path}: {_reason_and_mend(error)}")


def read_error(path: epath.PathLike, error: OSError) -> UserError:
    """Turns a failed read of `path` into a message a user can act on; its content may be good."""
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path} does not exist")
    return UserError(f"cannot read {path}: {_reason_and_mend(error)}")


def refusal(path: epath.PathLike, said: str = "") -> OSError | None:
    """The system's reason not to let a file be read; None if it can be read to its end.

    Args:
      path: of the file.
      said: the text of a library's error, which may hold the reason.
    """
    for number in _MENDS:
        if os.strerror(number) in said:
            return OSError(number, os.strerror(number))
    try:
        with epath.Path(path).open("rb") as file:
            while file.read(2**20):
                pass
    except OSError as error:
        return error
    return None


def exists(path: epath.PathLike) -> bool:
    """Whether there is something at `path`.

    Raises:
      UserError: the system does not say, as in a folder that this user may not look into.
    """
    if in_object_store(path):
        return epath.Path(path).exists()
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise read_error(path, error) from error
    return True


def _reason_and_mend(error: OSError) -> str:
    mend = _MENDS.get(error.errno or 0)
    return f"{error.strerror or error}" + (f"; {mend}" if mend else "")


def write_npz(path: epath.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """`np.savez`, whole or not at all (see `write_bytes`)."""
    buffer = bytes_io.BytesIO()
    np.savez(buffer, **dict(arrays))  # type: ignore[arg-type]
    write_bytes(path, buffer.getvalue())


def read_npz(path: epath.PathLike, *, without: Collection[str] = ()) -> dict[str, np.ndarray]:
    """The arrays of a `.npz` file by name, every byte of them checked by its CRC.

    Args:
      path: of the file.
      without: names of arrays to leave out.

    Raises:
      UserError: it is missing, cannot be read, or is damaged or something else.
    """
    arrays = {}
    with open_npz(path) as archive:
        for member in archive.namelist():
            name = member.removesuffix(".npy")
            if name != member and name not in without:
                # `np.load` need not read to the end of a member, where zipfile compares the CRC.
                file = bytes_io.BytesIO(archive.read(member))
                arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
    return arrays


@contextlib.contextmanager
def open_npz(path: epath.PathLike) -> Iterator[zipfile.ZipFile]:
    """A `.npz` file as an archive of `.npy` files.

    Raises:
      UserError: within its body, too: the file is missing, cannot be read, or is damaged or
        something else.
    """
    with npy_errors(path), epath.Path(path).open("rb") as file, zipfile.ZipFile(file) as archive:
        yield archive


@contextlib.contextmanager
def npy_errors(path: epath.PathLike, mend: str = "put back a copy of it") -> Iterator[None]:
    """Tells in one line whatever reading a `.npz` or `.npy` file raises, and the mend."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # A damaged one makes zipfile, zlib and numpy raise nearly anything.
        # An offset that is damaged is an invalid argument.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise read_error(path, error) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        kind = epath.Path(path).suffix or ".npz"
        raise UserError(
            f"{path} cannot be read: {reason}; it is no {kind} file of numbers, or a damaged one: "
            f"{mend}"
        ) from error


def sha256(path: epath.PathLike) -> str:
    """SHA-256 of a file's content, in hexadecimal.

    Raises:
      UserError: it cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise read_error(path, error) from error


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON, whole or not at all (see `write_bytes`)."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: epath.PathLike) -> Any:
    """Reads a JSON file.

    Raises:
      UserError: the file is missing, cannot be read or is not JSON.
    """
    path = epath.Path(path)
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise read_error(path, error) from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); it may be damaged") from error


@contextlib.contextmanager
def lock(workdir: epath.PathLike) -> Iterator[None]:
    """Keeps other runs out of a workdir; the kernel frees it when this process ends, however.

    Object stores have no such locks; nor have some network file systems, where a line says so. It
    is gone, too, when this process closes any other descriptor of the same file.

    Raises:
      UserError: another process has it; the message says which.
    """
    if in_object_store(workdir):
        yield
        return
    path = Path(workdir) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b", buffering=0)
    except OSError as error:
        raise write_error(path, error) from error
    with file:
        try:
            if not _acquired(file):
                file.seek(0)
                holder = file.read().decode(errors="replace").strip() or "another process"
                raise UserError(
                    f"{workdir} is in use by {holder}; stop that one or use another --workdir"
                )
        except OSError as error:
            reason = error.strerror or error
            print(f"{path} cannot be locked ({reason}): start no other run here", file=sys.stderr)
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        with contextlib.suppress(OSError):  # On a full disk the lock holds, without a name.
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode())
        yield


def _acquired(file: IO[bytes]) -> bool:
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            # A lock of `flock` would live on in children of the process.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except (BlockingIOError, PermissionError):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
