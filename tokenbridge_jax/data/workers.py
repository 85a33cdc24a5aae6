"""Ordered work in several processes, by grain.

Threads of one Python process decode small pictures more slowly than a single thread does, because
they wait for the interpreter's lock. Processes do not share this lock. Their large arrays come back
through shared memory, without a copy in this process.
"""

import contextlib
import functools
import gc
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import cloudpickle
import grain
import jax
from absl import flags

from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.progress import say

# A process starts in one to three seconds, in which a core decodes at least so many pictures.
_LEAST_PICTURES = 500
# Each takes 0.4 GB with the names of ImageNet's pictures. Containers may have fewer cores than the
# machine that they see.
_MOST_PROCESSES = 32
# Results that wait in each process, and how many of a process exist at most: being made, waiting
# there, waiting here, and in use.
_READY, _AT_ONCE = 2, 8
# Smaller arrays go through a pipe.
_LEAST_SHARED = 2**16
_SHARED_MEMORY = Path("/dev/shm")
_SIGNALS = {signal.SIGINT, signal.SIGTERM}


def count_workers(asked: int, pictures: int) -> int:
    """The number of processes for the decoding of some pictures; 0: a thread of this process.

    Args:
      asked: `config.data.workers`. 0 is one for each core that this process may use, at most 32,
        and fewer for few pictures.
      pictures: how many there are.

    Raises:
      UserError: `asked` is negative.
    """
    if asked < 0:
        raise UserError(f"config.data.workers is {asked}, must be at least 0")
    if not asked:
        asked = min(cores(), _MOST_PROCESSES, pictures // _LEAST_PICTURES)
    return asked if asked > 1 else 0


def in_order(
    items: grain.MapDataset, work: Callable[[Any], Any], workers: int, result_bytes: int
) -> Generator[Any]:
    """Yields `work(item)` for each item in order, while several results are made ahead.

    A closed iterator ends its processes. So does the end of this process, even by SIGKILL. Worker
    processes import the main script, which therefore needs `if __name__ == "__main__":`. grain
    reads flags of absl, which count as parsed from here on.

    Args:
      items: what to work on.
      work: can be pickled, with all that it refers to.
      workers: number of processes, or 0 for a thread of this process.
      result_bytes: the size of the arrays of a result.

    Raises:
      UserError: `work` raised it, or a process was killed or could not start.
    """
    workers = _that_fit(min(workers, len(items)), result_bytes)
    if not workers:
        one_thread = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_READY)
        with contextlib.closing(iter(items.map(work).to_iter_dataset(one_thread))) as results:
            yield from results
        return
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    with tempfile.NamedTemporaryFile() as file:
        # Once, not once for each process.
        cloudpickle.dump(work, file)
        file.flush()
        # The process itself makes the results, without threads.
        alone = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        made = items.map(_Stored(file.name)).to_iter_dataset(alone)
        options = grain.experimental.DatasetOptions(min_shm_size=_LEAST_SHARED)
        made = grain.experimental.WithOptionsIterDataset(made, options)
        processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_READY)
        begin = functools.partial(_begin, os.getpid())
        results = iter(made.mp_prefetch(processes, worker_init_fn=begin))
        with contextlib.closing(results), _named_errors():
            with _without_signals():
                first = next(results)
            yield first
            del first
            yield from results
    gc.collect()  # The traceback of grain's StopIteration would keep the last results.


@contextlib.contextmanager
def _without_signals() -> Iterator[None]:
    """Processes and threads that start here do not get the signals of a whole process group."""
    resource_tracker.ensure_running()  # It would let the signals through when it starts.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _named_errors() -> Iterator[None]:
    """Turns the end of a process into one line."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).split(".")[0]
        if "terminated unexpectedly" not in reason:
            raise
        if "exit code -" in reason:
            raise UserError(
                f"a process that decodes pictures was killed ({reason}); if memory is short, use "
                "fewer of them: --config.data.workers=1"
            ) from error
        raise UserError(
            f"a process that decodes pictures could not start ({reason}); a script must be a file "
            'that does its work below `if __name__ == "__main__":`, or set config.data.workers to 1'
        ) from error


class _Stored:
    """A function in a file, which each process reads once."""

    def __init__(self, path: str):
        self._path = path

    def __call__(self, item: Any) -> Any:
        return _stored(self._path)(item)


@functools.cache
def _stored(path: str) -> Callable[[Any], Any]:
    work: Callable[[Any], Any] = cloudpickle.loads(Path(path).read_bytes())
    return work


def _begin(parent: int, *_: Any) -> None:
    """Lets a worker process end when its parent is gone, and keeps it from the devices."""
    jax.config.update("jax_platforms", "cpu")

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
    """As many workers as shared memory has room for, and a line if these are fewer; 0 for one."""
    fitting = workers
    if _SHARED_MEMORY.is_dir():  # Not on macOS, where there is no such limit.
        free = shutil.disk_usage(_SHARED_MEMORY).free
        fitting = min(workers, free // (_AT_ONCE * result_bytes))
    if fitting < workers:
        needed = workers * _AT_ONCE * result_bytes
        say(
            f"{max(fitting, 1)} instead of {workers} processes decode pictures, because "
            f"{_SHARED_MEMORY} has {free / 2**20:.0f} MiB of shared memory and not "
            f"{needed / 2**20:.0f}; Docker gives a container more with --shm-size"
        )
    return fitting if fitting > 1 else 0
