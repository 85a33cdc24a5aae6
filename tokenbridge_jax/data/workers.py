"""Ordered work in several processes, by grain.

Threads of one Python process decode small pictures more slowly than a single thread does, because
they wait for the interpreter's lock. Processes do not share this lock. Their arrays come back
through shared memory, without a copy in this process.
"""

import contextlib
import functools
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import grain
from absl import flags

from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.progress import say

# A process starts in one to three seconds, in which a core decodes at least so many pictures.
_LEAST_PICTURES = 500
# Results that wait in each process, and how many of a process exist at most: waiting there, being
# made, waiting here, and in use.
_READY, _AT_ONCE = 2, 6
# Smaller arrays go through a pipe.
_LEAST_SHARED = 2**16
_SHARED_MEMORY = Path("/dev/shm")


def count_workers(asked: int, pictures: int) -> int:
    """The number of processes for the decoding of some pictures; 0: a thread of this process.

    Args:
      asked: `config.data.workers`. 0 is one for each core that this process may use, but fewer for
        few pictures.
      pictures: how many there are.
    """
    if not asked:
        asked = min(cores(), pictures // _LEAST_PICTURES)
    return asked if asked > 1 else 0


def in_order(
    items: grain.MapDataset, work: Callable[[Any], Any], workers: int, result_bytes: int
) -> Generator[Any]:
    """Yields `work(item)` for each item in order, while several results are made ahead.

    A closed iterator ends its processes. So does the end of this process, even by SIGKILL.

    Args:
      items: what to work on.
      work: can be pickled, with all that it refers to.
      workers: number of processes, or 0 for a thread of this process.
      result_bytes: the size of the arrays of a result.

    Raises:
      UserError: `work` raised it, or a process was killed.
    """
    results = items.map(work)
    workers = _that_fit(workers, result_bytes)
    if not workers:
        one_thread = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_READY)
        with contextlib.closing(iter(results.to_iter_dataset(one_thread))) as iterator:
            yield from iterator
        return
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads flags of its own; here they have their defaults.
    # The process itself makes the results, without threads.
    made = results.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    options = grain.experimental.DatasetOptions(min_shm_size=_LEAST_SHARED)
    made = grain.experimental.WithOptionsIterDataset(made, options)
    processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_READY)
    begin = functools.partial(_begin, os.getpid())
    with contextlib.closing(iter(made.mp_prefetch(processes, worker_init_fn=begin))) as iterator:
        try:
            yield from iterator
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise UserError(
                f"a process that decodes pictures was killed ({str(error).split('.')[0]}); if "
                "memory is short, use fewer of them: --config.data.workers=1"
            ) from error


def _begin(parent: int, *_: Any) -> None:
    """Prepares a worker process: it ends when its parent does, and not before."""
    for number in (signal.SIGINT, signal.SIGTERM):  # They are sent to all processes of a group.
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _that_fit(workers: int, result_bytes: int) -> int:
    """As many workers as shared memory has room for, and a line if these are fewer."""
    if not _SHARED_MEMORY.is_dir():  # As on macOS, where there is no such limit.
        return workers
    free = shutil.disk_usage(_SHARED_MEMORY).free
    fitting = free // (_AT_ONCE * result_bytes)
    if workers <= fitting:
        return workers
    needed = workers * _AT_ONCE * result_bytes
    say(
        f"{max(fitting, 1)} instead of {workers} processes decode pictures, because "
        f"{_SHARED_MEMORY} has {free / 2**20:.0f} MiB of shared memory and not "
        f"{needed / 2**20:.0f}; Docker gives a container more with --shm-size"
    )
    return fitting if fitting > 1 else 0
