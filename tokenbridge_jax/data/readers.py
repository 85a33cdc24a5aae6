"""Single records of many shards, with a bounded number of open files."""

import resource
from collections.abc import Sequence
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader

from tokenbridge_jax.data.local_copy import is_copy
from tokenbridge_jax.runtime import storage
from tokenbridge_jax.runtime.errors import UserError

# How many readers of a split stay open. Each has a file descriptor. Opening one takes about 50
# microseconds.
_MOST = 4096
# Readers use at most this share of the files that this process may open (1,024 on most Linux
# systems, 256 on macOS). Other splits need some as well, and checkpoints open many at once.
_SHARE = 1 / 3
# Nothing is read ahead: neither records nor, on opening, the last megabyte of the file.
_OPTIONS = "readahead_buffer_size:0,footer_prefetch_bytes:0"


class ShardReaders:
    """Reads records from any thread. The shards that are read first stay open."""

    def __init__(self, files: Sequence[tuple[Path, int]]):
        """`files` are the shards' paths and numbers of records."""
        self._files = files
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = _MOST if soft == resource.RLIM_INFINITY else min(_MOST, int(soft * _SHARE))
        self._open: dict[int, ArrayRecordReader] = {}

    def read(self, shard: int, places: Sequence[int]) -> list[bytes]:
        """The records at these places of a shard.

        Raises:
          UserError: the shard is damaged, or the system does not let it be read.
        """
        reader = self._open.get(shard)
        if reader is None:
            reader = self._opened(shard)
            # No other shard is closed for this one, because each is as likely to be read next.
            if len(self._open) < self._most:
                self._open[shard] = reader
        try:
            # Ranges of one record are several times as fast as a list of places, for which the
            # reader uses its thread pool and a table of all records of the shard.
            return [reader.read(place, place + 1)[0] for place in places]
        except RuntimeError as error:
            path, _ = self._files[shard]
            if reason := storage.refusal(path, str(error)):
                raise storage.read_error(path, reason) from error
            raise damaged(path, f"is damaged ({str(error).split(';')[0]})") from error

    def _opened(self, shard: int) -> ArrayRecordReader:
        path, records = self._files[shard]
        for _ in range(2):
            # With a buffer smaller than a record, no more than the record is read from the file.
            reader = ArrayRecordReader(str(path), _OPTIONS, file_reader_buffer_size=1024)
            found = reader.num_records()
            if found == records:
                return reader
            # The reader does not say what the system refused, and by now it may work again.
            if reason := storage.refusal(path):
                raise storage.read_error(path, reason)
        raise damaged(path, f"is damaged (it lists {found} records, not {records})")


def damaged(shard: Path, reason: str) -> UserError:
    """The error for a shard whose content is not what was written."""
    advice = (
        "move it elsewhere and run again, which copies it again"
        if is_copy(shard)
        else "put back a copy of it, or move it elsewhere and run `tokenbridge tokenize` again, "
        "which writes only what is missing"
    )
    return UserError(f"token shard {shard} {reason}; {advice}")
