"""A system that refuses, and files that were damaged: what many tests of reading need."""

import contextlib
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokenbridge_jax.runtime.errors import UserError


def open_files() -> int:
    """How many files this process has open."""
    return len(os.listdir("/dev/fd")) - 1  # Without that of the listing.


@contextlib.contextmanager
def no_more_files() -> Iterator[None]:
    """Lets this process open no file (EMFILE): root, who may read all, is refused this too."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/dev/fd"))) + 2, limits[1])
    )
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
    """What was read, or the mistake that was told."""
    try:
        return read(), ""
    except UserError as error:
        return None, str(error)


@contextlib.contextmanager
def flipped(path: Path, bit: int) -> Iterator[None]:
    """The file has this bit flipped meanwhile."""
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)
    try:
        yield
    finally:
        path.write_bytes(content)
