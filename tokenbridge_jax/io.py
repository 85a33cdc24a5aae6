"""Files that are either whole or not there."""

import contextlib
import errno
import json
import os
import uuid
from typing import Any

from etils import epath

from tokenbridge_jax.errors import UserError


def write_bytes(path: epath.PathLike, data: bytes) -> None:
    """Writes `data` to `path`, which holds either its old content or all of the new.

    The bytes go to a temporary file beside `path` that takes its name only when complete.

    Raises:
      UserError: the disk is full or the folder is not writable.
    """
    path = epath.Path(path)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            # Object stores have no descriptor; there the upload is atomic already.
            if hasattr(file, "fileno"):
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # Where the folder is a file, even this fails.
            temporary.unlink(missing_ok=True)
        raise write_error(path, error) from error


def write_error(path: epath.PathLike, error: OSError) -> UserError:
    """Turns a failed write to `path` into a message a user can act on."""
    if error.errno == errno.ENOSPC:
        return UserError(f"cannot write {path}: the disk is full; free some space and run again")
    return UserError(f"cannot write {path}: {error.strerror or error}")


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
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); it may be damaged") from error
