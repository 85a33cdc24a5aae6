"""Ordered work in several processes.

Threads of one Python process decode small pictures more slowly than a single thread does, because
they wait for the interpreter's lock. Processes do not share this lock. Their arrays come back
through shared memory. docs/performance.md says why these are not grain's worker processes.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import pickle
import shutil
import signal
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np

from tokenbridge_jax.runtime import children
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.hardware import host_cores
from tokenbridge_jax.runtime.progress import say

# A process starts in one to three seconds, in which a core decodes at least so many pictures.
_LEAST_PICTURES = 500
# Each takes 0.4 GB with the names of ImageNet's pictures.
_MOST_PROCESSES = 32
# Results of each process that are being made or wait.
_AHEAD = 3
# More than a picture's label and the reason why it is broken take.
NOTE_BYTES = 2**10
# What a result of any size takes beside its arrays.
_MARGIN = 2**12
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
        asked = min(host_cores(), _MOST_PROCESSES, pictures // _LEAST_PICTURES)
    return asked if asked > 1 else 0


def in_order(
    items: Sequence[Any], work: Callable[[Any], Any], workers: int, result_bytes: int
) -> Generator[Any]:
    """Yields `work(item)` for each item in order, while several results are made ahead.

    A closed iterator ends its processes. So does the end of this process, even by SIGKILL. Worker
    processes import the main script, which therefore needs `if __name__ == "__main__":`.

    Args:
      items: what to work on.
      work: can be pickled, with all that it refers to.
      workers: number of processes, or 0 for a thread of this process.
      result_bytes: the largest size of the data of a result.

    Raises:
      UserError: `work` raised it, or a process was killed or could not start.
    """
    slot_bytes = result_bytes + _MARGIN
    workers = _that_fit(min(workers, len(items)), slot_bytes)
    if not workers:
        with _closed(ThreadPoolExecutor(1)) as thread:
            yield from _ahead((thread.submit(work, item) for item in items), _AHEAD)
        return
    slots = workers * _AHEAD
    with _pickled(work) as path, _shared_memory(slots * slot_bytes) as memory:
        begin = functools.partial(_begin, path, memory.name, slot_bytes)
        with _closed(ProcessPoolExecutor(workers, _Context(), begin)) as pool, _named_error():
            made = (_submit(pool, item, number % slots) for number, item in enumerate(items))
            yield from _ahead(made, slots, functools.partial(_copied, memory))


def _ahead(
    futures: Iterator[Future[Any]],
    count: int,
    receive: Callable[[Any], Any] = lambda result: result,
) -> Generator[Any]:
    """Yields `receive(result)` for each future, in order; `count` of them exist at a time."""
    waiting = collections.deque(itertools.islice(futures, count))
    while waiting:
        result = receive(waiting.popleft().result())
        waiting.extend(itertools.islice(futures, 1))
        yield result


@contextlib.contextmanager
def _closed(pool: Executor) -> Iterator[Executor]:
    """Ends the pool at the end, without the work that has not begun."""
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _pickled(work: Any) -> Iterator[str]:
    """A file of the pickled work: it is pickled once, not once for each process."""
    with tempfile.NamedTemporaryFile() as file:
        pickle.dump(work, file)
        file.flush()
        yield file.name


@contextlib.contextmanager
def _shared_memory(size: int) -> Iterator[SharedMemory]:
    with _without_signals():  # Python's tracker of shared memory starts here.
        memory = SharedMemory(create=True, size=size)
    try:
        yield memory
    finally:
        memory.close()
        memory.unlink()


def _submit(pool: Executor, item: Any, slot: int) -> Future[Any]:
    with _without_signals():  # Processes start here.
        return pool.submit(_make, item, slot)


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
def _named_error() -> Iterator[None]:
    """Turns the end of a process into one line."""
    try:
        yield
    except BrokenProcessPool as error:
        raise UserError(
            "a process that decodes pictures was killed or could not start; if memory is short, "
            "use fewer of them: --config.data.workers=1 (a script of your own must be a file that "
            'does its work below `if __name__ == "__main__":`)'
        ) from error


class _Process(SpawnProcess):
    def terminate(self) -> None:
        """Ends a process, which ignores SIGTERM."""
        self.kill()


class _Context(SpawnContext):
    Process = _Process


@dataclasses.dataclass
class _Worker:
    """What a worker process has: its work, and the slots for results in shared memory."""

    work: Callable[[Any], Any]
    memory: SharedMemory
    slot_bytes: int


_worker: _Worker


def _begin(path: str, memory: str, slot_bytes: int) -> None:
    """The first call in a worker process."""
    global _worker
    children.begin()
    _worker = _Worker(pickle.loads(Path(path).read_bytes()), SharedMemory(memory), slot_bytes)


def _make(item: Any, slot: int) -> tuple[int, list[int]]:
    """Works in a worker process.

    The result and its arrays go to the slot, one after another. Only their place goes through the
    pool's pipe: a process that is killed while it writes there leaves a part of a message, and the
    pool would wait for the rest forever.

    Returns:
      Where the result begins in shared memory, and the sizes in bytes of its pickle and arrays.

    Raises:
      ValueError: the result is larger than the slot.
    """
    arrays = list[pickle.PickleBuffer]()
    result = pickle.dumps(_worker.work(item), protocol=5, buffer_callback=arrays.append)
    buffers: list[Any] = [result, *(array.raw() for array in arrays)]
    parts = [np.frombuffer(buffer, np.uint8) for buffer in buffers]
    sizes = [part.size for part in parts]
    if sum(sizes) > _worker.slot_bytes:
        raise ValueError(f"a result has {sum(sizes)} bytes, and its slot {_worker.slot_bytes}")
    begin = slot * _worker.slot_bytes
    place = np.ndarray(sum(sizes), np.uint8, _worker.memory.buf, begin)
    np.concatenate(parts, out=place)
    return begin, sizes


def _copied(memory: SharedMemory, made: tuple[int, list[int]]) -> Any:
    """The result that `_make` describes. Its slot can be used again."""
    begin, sizes = made
    place = np.ndarray(sum(sizes), np.uint8, memory.buf, begin)
    result, *arrays = (part.copy() for part in np.split(place, np.cumsum(sizes)[:-1]))
    return pickle.loads(result.tobytes(), buffers=arrays)


def _that_fit(workers: int, slot_bytes: int) -> int:
    """As many workers as shared memory has room for, and a line if these are fewer; 0 for one."""
    fitting = workers
    if _SHARED_MEMORY.is_dir():  # Not on macOS, where there is no such limit.
        free = shutil.disk_usage(_SHARED_MEMORY).free
        fitting = min(workers, free // (_AHEAD * slot_bytes))
    if fitting < workers:
        needed = workers * _AHEAD * slot_bytes
        say(
            f"{max(fitting, 1)} instead of {workers} processes decode pictures, because "
            f"{_SHARED_MEMORY} has {free / 2**20:.0f} MiB of shared memory and not "
            f"{needed / 2**20:.0f}; Docker gives a container more with --shm-size"
        )
    return fitting if fitting > 1 else 0
