"""What Orbax and TensorStore say of files that cannot be read or written, in a user's words."""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath


@contextlib.contextmanager
def quiet() -> Iterator[list[BaseException]]:
    """Drops the tracebacks that Orbax's threads log of errors it also raises; yields the errors."""
    dropped: list[BaseException] = []

    def says_something_new(record: logging.LogRecord) -> bool:
        text = f"{record.getMessage()} {record.exc_info}"
        from_orbax = "orbax" in record.pathname or "tensorstore_spec" in text
        if not from_orbax or record.levelno < logging.WARNING:
            return True
        if record.exc_info and record.exc_info[1]:
            dropped.append(record.exc_info[1])
        return False

    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    for logger in loggers:
        logger.filters.insert(0, says_something_new)  # The innermost is to see it.
    try:
        yield dropped
    finally:
        for logger in loggers:
            logger.removeFilter(says_something_new)


def quiet_from_now_on() -> None:
    """Drops what Python says of reads that Orbax no longer waits for, once one of them failed."""
    hook = sys.unraisablehook

    def drop_late_reads(unraisable: Any) -> None:
        text = f"{unraisable.object} {unraisable.exc_value}"
        if "Event loop is closed" not in text and "_read_array" not in text:
            hook(unraisable)

    if getattr(hook, "__name__", "") != drop_late_reads.__name__:
        sys.unraisablehook = drop_late_reads


def system_error(error: BaseException) -> OSError | None:
    """The system's reason for a failed write; tensorstore passes it on as text alone."""
    cause = _root_cause(error)
    if isinstance(cause, OSError):
        return cause
    number = re.search(r"os_error_code='(\d+)'", str(cause))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None


def _root_cause(error: BaseException) -> BaseException:
    while cause := error.__cause__ or error.__context__:
        error = cause
    return error


def refused(parts: Iterable[epath.Path]) -> tuple[epath.Path, OSError] | None:
    """The first file of these folders that the system will not open: Orbax may not tell."""
    for part in parts:
        try:
            for path in sorted(part.iterdir()):
                if path.is_dir():
                    if found := refused([path]):
                        return found
                else:
                    path.open("rb").close()
        except FileNotFoundError:
            continue
        except OSError as error:
            return epath.Path(error.filename or part), error
    return None


def reason(error: Exception) -> str:
    """What is wrong, in a line; of an array also which file it is in, if its part has only one."""
    text = str(_root_cause(error)).split("\n")[0]
    of_array = re.search(r'"([^"]*)/c/[^"]*" in OCDBT database at [^"]*"([^"]*)": (.*)', text)
    if not of_array:
        return text[:200]
    array, folder, what = of_array.groups()
    part = epath.Path(folder)
    files = sorted(str(f.relative_to(part)) for f in part.glob("ocdbt.process_*/d/*"))
    where = f"{part.name}/{files[0]}" if len(files) == 1 else part.name
    return f"{where}, array {array}: {what[:120]}"
