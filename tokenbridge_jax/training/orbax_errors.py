"""Reduces the errors of Orbax and TensorStore about unreadable or unwritable files to one line."""

import contextlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from etils import epath


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops the tracebacks that Orbax's threads log for errors that Orbax also raises."""

    def is_from_elsewhere(record: logging.LogRecord) -> bool:
        text = f"{record.getMessage()} {record.exc_info}"
        from_orbax = "orbax" in record.pathname or "tensorstore_spec" in text
        return not from_orbax or record.levelno < logging.WARNING

    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    for logger in loggers:
        logger.addFilter(is_from_elsewhere)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_from_elsewhere)


def quiet_from_now_on() -> None:
    """Drops the messages of Python about reads that Orbax abandons after one of them has failed."""
    hook = sys.unraisablehook
    never_awaited = r"coroutine '(Store|\w*Handler|\w*Metadata\w*|_?read\w*)\b.*' was never awaited"
    warnings.filterwarnings("ignore", never_awaited, RuntimeWarning)

    def drop_late_reads(unraisable: Any) -> None:
        text = f"{unraisable.object} {unraisable.exc_value}"
        # Where warnings are errors, the filter has no effect.
        if not re.search(f"Event loop is closed|_read_array|{never_awaited}", text):
            hook(unraisable)

    if getattr(hook, "__name__", "") != drop_late_reads.__name__:
        sys.unraisablehook = drop_late_reads


def system_error(error: BaseException) -> OSError | None:
    """The system's reason for a failure, which TensorStore reports only as text."""
    cause = _root_cause(error)
    if isinstance(cause, OSError):
        return cause
    number = re.search(r"os_error_code='(\d+)'", str(cause))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None


def _root_cause(error: BaseException) -> BaseException:
    while cause := error.__cause__ or error.__context__:
        error = cause
    return error


def refused(path: epath.Path) -> OSError | None:
    """Why the system does not open `path` or a file under it; Orbax may not report it."""
    try:
        if path.is_dir():
            return next(filter(None, map(refused, sorted(path.iterdir()))), None)
        path.open("rb").close()
    except FileNotFoundError:
        pass
    except OSError as error:
        error.filename = error.filename or path
        return error
    return None


def reason(error: Exception) -> str:
    """What is wrong, in one line; for an array also its file, if its part has only one file."""
    text = str(_root_cause(error)).split("\n")[0] or type(error).__name__
    of_array = re.search(r'"([^"]*)/c/[^"]*" in OCDBT database at [^"]*"([^"]*)": (.*)', text)
    if not of_array:
        return text[:200]
    array, folder, what = of_array.groups()
    part = epath.Path(folder)
    files = sorted(str(f.relative_to(part)) for f in part.glob("ocdbt.process_*/d/*"))
    where = f"{part.name}/{files[0]}" if len(files) == 1 else part.name
    return f"{where}, array {array}: {what[:120]}"
