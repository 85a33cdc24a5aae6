"""Paths given by users, and files that are written completely or not at all."""

import contextlib
import errno
import hashlib
import io as bytes_io
import json
import os
import tempfile
import time
import uuid
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from etils import epath
from jaxtyping import UInt8

from tokenbridge_jax.runtime.errors import UserError

# A temporary file that has not changed for this time belongs to a process that was killed.
LEFTOVER_SECONDS = 3600

# Advice for files that the system refuses. None of these errors means that a file is damaged.
_ADVICE = {
    errno.EACCES: "give this user the right to it (chmod, chown)",
    errno.EPERM: "give this user the right to it (chmod, chown)",
    errno.EROFS: "its file system is mounted read-only: mount it again, or name another folder",
    errno.EMFILE: "allow this process more open files (ulimit -n) and run again",
    errno.ENFILE: "the machine has too many files open: end other programs and run again",
    errno.ESTALE: "mount the network file system again and run again",
    errno.ETIMEDOUT: "the network file system does not answer: run again when it does",
    errno.EIO: "the disk or the network failed: run again, and if that fails use a copy",
    errno.EDQUOT: "the quota is used up: free some space and run again",
    errno.ENOMEM: "the machine is out of memory: end other programs and run again",
}
# The longest name of a file that most file systems allow.
NAME_BYTES = 255


def in_object_store(path: epath.PathLike) -> bool:
    """Whether a path begins with `gs://` or the like, and is not in a file system."""
    return "://" in str(path)


def expand(path: epath.PathLike) -> str:
    """Replaces `~` or `~user` at the beginning of a path by the home folder.

    Every path that a user gives is expanded. Expanding it again changes nothing.

    Raises:
      UserError: that home is unknown, or a name in the path is too long for a file.
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
        text = os.path.abspath(text)  # `pathlib` shortens ./~name to ~name, which means a home.
    for name in text.split("/"):
        check_name(name)
    return text


def check_name(name: str) -> None:
    """Raises `UserError` if the name is too long for a file."""
    if (length := len(os.fsencode(name))) > NAME_BYTES:
        raise UserError(
            f"the name {name[:20]}... has {length} bytes, a file's at most {NAME_BYTES}: choose a "
            "shorter one"
        )


def as_path(path: epath.PathLike) -> epath.Path:
    """The expanded path (see `expand`)."""
    return epath.Path(expand(path))


def local_path(path: epath.PathLike) -> Path:
    """The expanded path of a file of this machine, which can also be a link."""
    return Path(expand(path))


def user_cache() -> Path | None:
    """The folder for files that can be recreated; None for a user without a home."""
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return local_path(folder)
    return None if os.path.expanduser("~") == "~" else local_path("~/.cache")


def check_folder(path: epath.PathLike) -> epath.Path:
    """Checks a folder that will be written to later, and returns its path; it is not created.

    Raises:
      UserError: it cannot be created or written to.
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
    """Writes `data` to `path`, which always holds either its old content or all of the new.

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


def create_bytes(path: epath.PathLike, data: bytes) -> None:
    """Like `write_bytes`, but a file that is there stays, even if it came a moment ago.

    Of several processes that call this at once, the first one's file stays. In an object store or a
    file system without hard links it is the last one's.

    Raises:
      UserError: the disk is full or the folder is not writable.
    """
    if in_object_store(path):
        write_bytes(path, data)
        return
    temporary = Path(path).parent / f".{uuid.uuid4().hex}.tmp"
    write_bytes(temporary, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: epath.PathLike) -> Iterator[IO[bytes]]:
    """Opens a file that replaces `path` when complete; until then `path` keeps its old content.

    The bytes are written to a temporary file beside `path`, which is then renamed. For an object
    store they are written to a local file, which is then copied.

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
    temporary = path.parent / f".{uuid.uuid4().hex}.tmp"  # Not of `path.name`, which may be long.
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # If the folder is a file, this fails as well.
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise write_error(path, error) from error
        raise


def remove_leftovers(folder: epath.PathLike) -> None:
    """Removes temporary files of killed processes, but not those of processes that still run."""
    if in_object_store(folder):
        return  # `replacing` leaves none there.
    for temporary in Path(folder).glob(".*.tmp"):
        with contextlib.suppress(OSError):  # Another process may remove it, too.
            if time.time() - temporary.stat().st_mtime > LEFTOVER_SECONDS:
                temporary.unlink()


def write_error(path: epath.PathLike, error: OSError) -> UserError:
    """The user's message for a failed write to `path`."""
    if error.errno == errno.ENOSPC:
        return UserError(f"cannot write {path}: the disk is full; free some space and run again")
    return UserError(f"cannot write {path}: {_reason_and_advice(error)}")


def read_error(path: epath.PathLike, error: OSError) -> UserError:
    """The user's message for a failed read of `path`, whose content may still be good."""
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path} does not exist")
    return UserError(f"cannot read {path}: {_reason_and_advice(error)}")


def refusal(path: epath.PathLike, said: str = "") -> OSError | None:
    """The system's reason for refusing to read a file; None if it can be read to its end.

    Args:
      path: of the file.
      said: the text of a library's error, which may contain the system's reason.
    """
    for number in _ADVICE:
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
    """Whether there is a file or folder at `path`.

    Raises:
      UserError: the system does not answer, as for a folder that this user may not read.
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


def _reason_and_advice(error: OSError) -> str:
    advice = _ADVICE.get(error.errno or 0)
    return f"{error.strerror or error}" + (f"; {advice}" if advice else "")


def write_npy(path: epath.PathLike, array: np.ndarray) -> None:
    """Like `np.save`, but the file is written completely or not at all (see `write_bytes`)."""
    buffer = bytes_io.BytesIO()
    np.save(buffer, array)
    write_bytes(path, buffer.getvalue())


def write_npz(path: epath.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Like `np.savez`, but the file is written completely or not at all (see `write_bytes`)."""
    buffer = bytes_io.BytesIO()
    np.savez(buffer, **dict(arrays))  # type: ignore[arg-type]
    write_bytes(path, buffer.getvalue())


@contextlib.contextmanager
def npz_in_parts(
    path: epath.PathLike, name: str, shape: Sequence[int], **others: np.ndarray
) -> Iterator[Callable[[UInt8[np.ndarray, "n ..."]], None]]:
    """Writes a `.npz` file as `np.savez` would, with an array `name` that comes in parts.

    The file is written completely or not at all.

    Args:
      path: of the file.
      name: of the array, which is uint8.
      shape: of the whole array.
      **others: further arrays.

    Yields:
      A function that appends rows to the array.

    Raises:
      UserError: it cannot be written.
    """
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        for other, array in others.items():
            with archive.open(f"{other}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array))
        with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
            np.lib.format.write_array_header_1_0(member, header)

            def append(rows: UInt8[np.ndarray, "n ..."]) -> None:
                member.write(np.ascontiguousarray(rows).data)

            yield append


def read_npz(path: epath.PathLike, *, without: Collection[str] = ()) -> dict[str, np.ndarray]:
    """The arrays of a `.npz` file by name. Their CRC is checked.

    Args:
      path: of the file.
      without: names of arrays to leave out.

    Raises:
      UserError: the file is missing, cannot be read, is damaged, or is another kind of file.
    """
    arrays = {}
    with open_npz(path) as archive:
        for member in archive.namelist():
            name = member.removesuffix(".npy")
            if name != member and name not in without:
                # `np.load` may stop before the end of a member, where zipfile compares the CRC.
                file = bytes_io.BytesIO(archive.read(member))
                arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
    return arrays


@contextlib.contextmanager
def open_npz(path: epath.PathLike) -> Iterator[zipfile.ZipFile]:
    """Opens a `.npz` file as an archive of `.npy` files.

    Raises:
      UserError: the file is missing, cannot be read, is damaged, or is another kind of file. The
        body of the `with` may raise it as well.
    """
    with npy_errors(path), epath.Path(path).open("rb") as file, zipfile.ZipFile(file) as archive:
        yield archive


@contextlib.contextmanager
def npy_errors(path: epath.PathLike, advice: str = "put back a copy of it") -> Iterator[None]:
    """Turns all errors of reading a `.npz` or `.npy` file into a `UserError` with this advice."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # Zipfile, zlib and numpy raise many kinds for a damaged file.
        # For a damaged offset the system reports an invalid argument.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise read_error(path, error) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        kind = epath.Path(path).suffix or ".npz"
        raise UserError(
            f"{path} cannot be read: {reason}; it is damaged, or not a {kind} file of numbers: "
            f"{advice}"
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


def write_json(
    path: epath.PathLike,
    value: Any,
    write: Callable[[epath.PathLike, bytes], None] = write_bytes,
) -> None:
    """Writes `value` as indented JSON with `write_bytes` or `create_bytes`."""
    write(path, (json.dumps(value, indent=2) + "\n").encode())


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
