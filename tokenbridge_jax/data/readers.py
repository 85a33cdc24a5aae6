"""Single records of many shards, with a bounded number of open files."""

import collections
import resource
import threading
from collections.abc import Sequence
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader

from tokenbridge_jax.data.local_copy import is_copy
from tokenbridge_jax.runtime import storage
from tokenbridge_jax.runtime.errors import UserError

# Readers of a split that stay open: each has a descriptor. To open one costs some 50 microseconds.
_MOST = 128
# Nor more than one in so many of the files that this process may open: there are other splits, and
# checkpoints open many at once.
_SHARE = 8
# Nothing is read ahead: neither records nor, on opening, the last megabyte of the file.
_OPTIONS = "readahead_buffer_size:0,footer_prefetch_bytes:0"


class ShardReaders:
    """Reads records from any thread; those shards stay open that were read last."""

    def __init__(self, files: Sequence[tuple[Path, int]]):
        """`files` are the shards' paths and numbers of records."""
        self._files = files
        # On macOS a process may open 256 files, elsewhere 1,024 or more.
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = _MOST if soft == resource.RLIM_INFINITY else min(_MOST, soft // _SHARE)
        self._open: collections.OrderedDict[int, ArrayRecordReader] = collections.OrderedDict()
        self._lock = threading.Lock()

    def read(self, shard: int, place: int) -> bytes:
        """The record at `place` of a shard.

        Raises:
          UserError: the shard is damaged, or the system does not let it be read.
        """
        try:
            # A range of one: a list of places costs several times as much, for it goes through the
            # reader's thread pool and a table of all the shard's records.
            (record,) = self._reader(shard).read(place, place + 1)
        except RuntimeError as error:
            path, _ = self._files[shard]
            if reason := storage.refusal(path, str(error)):
                raise storage.read_error(path, reason) from error
            raise damaged(path, f"is damaged ({str(error).split(';')[0]})") from error
        return record

    def _reader(self, shard: int) -> ArrayRecordReader:
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
        reader = self._opened(shard)
        with self._lock:
            self._open[shard] = reader
            if len(self._open) > self._most:
                self._open.popitem(last=False)  # Closes when no thread reads from it any more.
        return reader

    def _opened(self, shard: int) -> ArrayRecordReader:
        path, records = self._files[shard]
        for _ in range(2):
            # With a buffer smaller than a record, no more than the record is read from the file.
            reader = ArrayRecordReader(str(path), _OPTIONS, file_reader_buffer_size=1024)
            found = reader.num_records()
            if found == records:
                return reader
            # The reader does not tell what the system refused, and that may have passed by now.
            if reason := storage.refusal(path):
                raise storage.read_error(path, reason)
        raise damaged(path, f"is damaged (it lists {found} records, not {records})")


def damaged(shard: Path, reason: str) -> UserError:
    """What to tell a user about a shard that is not what was written."""
    mend = (
        "move it elsewhere and run again, which copies it again"
        if is_copy(shard)
        else "put back a copy of it, or move it elsewhere and run `tokenbridge tokenize` again, "
        "which writes only what is missing"
    )
    return UserError(f"token shard {shard} {reason}; {mend}")
