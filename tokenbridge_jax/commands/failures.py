"""Reports unexpected failures: one line for the user, and the traceback in a file."""

import errno
import os
import sys
import tempfile
import traceback

# File errors that only the user can solve. ENOENT is not among them: after a short fault of a
# network file system, the file may be there again when the job restarts.
_FOR_THE_USER = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.EPERM,
    errno.EROFS,
}

# Messages of compilers and runtimes can fill pages.
_LONGEST = 300


def describe(error: Exception) -> tuple[str, int]:
    """Returns the failure in one line, and the exit status: 2 if the user must solve it, else 1."""
    if isinstance(error, OSError) and error.strerror:
        named = f"cannot read or write {_names(error)}: " if error.filename is not None else ""
        return f"{named}{error.strerror}", 2 if error.errno in _FOR_THE_USER else 1
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return message if len(message) <= _LONGEST else f"{message[:_LONGEST]}...", 1


def keep(name: str, error: Exception) -> str:
    """Writes the traceback to a new file in the temporary folder, or else to stderr.

    Returns:
      The end of an error message, which names the file; empty if it could not be written.
    """
    whole = "".join(traceback.format_exception(error))
    try:
        descriptor, path = tempfile.mkstemp(".txt", f"tokenbridge-{name}-")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(whole)
    except OSError:
        print(whole, file=sys.stderr, end="")
        return ""
    return f"; the whole traceback is in {path}"


def _names(error: OSError) -> str:
    names = [error.filename, error.filename2]
    return " or ".join(os.fsdecode(x) if isinstance(x, bytes) else str(x) for x in names if x)
