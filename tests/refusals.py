"""Shared by tests of reading: a system that refuses to open files, and damaged files."""

import contextlib
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokenbridge_jax.runtime.errors import UserError


def open_files() -> int:
    """The number of files that this process has open."""
    return len(os.listdir("/dev/fd")) - 1  # The listing itself opens one.


@contextlib.contextmanager
def no_more_files() -> Iterator[None]:
    """Makes every opening of a file fail with EMFILE, which root cannot override."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    highest = max(map(int, os.listdir("/dev/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 2, limits[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def outcome(read: Callable[[], Any]) -> tuple[Any, str]:
    """Returns the result and "", or None and the message of the `UserError`."""
    try:
        return read(), ""
    except UserError as error:
        return None, str(error)


@contextlib.contextmanager
def flipped(path: Path, bit: int) -> Iterator[None]:
    """Flips one bit of a file within the block."""
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)
    try:
        yield
    finally:
        path.write_bytes(content)
