"""Counts of levels and of pairs of levels in the indices of images.

Only pairs that occur take memory; there are V^2 possible ones in each of over a hundred tables.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int64, Integer
from scipy.sparse import coo_array

from tokenbridge_jax.evaluation.features import gather_rows

# Numbers are counted when at least so many have been added.
_FEWEST = 2**16

PLACES = ("here", "right", "below")


class Table(NamedTuple):
    """The levels of two channels at a position, or of one channel at neighbouring positions.

    Attributes:
      place: the position of the second level, relative to the first: one of `PLACES`.
      channel: the channel of the first level.
      other: the channel of the second level.
    """

    place: str
    channel: int
    other: int


def all_tables(channels: int) -> list[Table]:
    """All tables to count: first the pairs of channels, in the order of `combinations`."""
    here = [Table("here", c, d) for c, d in itertools.combinations(range(channels), 2)]
    return here + [Table(place, c, c) for place in PLACES[1:] for c in range(channels)]


class Cells:
    """Counts numbers from 0 to `possible` - 1; only numbers that occur take memory.

    Attributes:
      seen: the numbers that occur, in ascending order.
      counts: how often each of them occurs.
    """

    def __init__(self, possible: int):
        self.seen, self.counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._possible = possible
        self._new: list[Int64[np.ndarray, " n"]] = []

    def add(self, numbers: Int64[np.ndarray, " n"]) -> None:
        """Adds numbers; they are counted when `count` is called, or before."""
        self._new.append(numbers)
        # Counting takes time in proportion to all numbers seen, so it waits for enough new ones.
        if sum(map(len, self._new)) >= max(len(self.seen), _FEWEST):
            self.count()

    def count(self) -> None:
        """Counts all numbers that were added."""
        if not self._new:
            return
        new, self._new = np.concatenate(self._new), []
        if self._possible <= len(new):
            counts = np.bincount(new, minlength=self._possible)
            seen = np.flatnonzero(counts)
            counts = counts[seen]
        else:
            seen, counts = np.unique(new, return_counts=True)
        self.join(np.append(self.seen, seen), np.append(self.counts, counts))

    def join(self, seen: Int64[np.ndarray, " n"], counts: Int64[np.ndarray, " n"]) -> None:
        """Replaces all counts by these, and adds up the counts of equal numbers."""
        order = np.argsort(seen, kind="stable")  # Fast for a few sorted parts.
        seen = seen[order]
        first = np.flatnonzero(np.diff(seen, prepend=-1))
        self.seen = seen[first]
        self.counts = np.add.reduceat(counts[order], first) if len(first) else counts


class TokenCounts:
    """Counts of levels, and of pairs of levels in some or all tables.

    Attributes:
      single: int64 `[C, V]`, how often every channel has every level.
      tables: the tables of pairs.
    """

    def __init__(self, channels: int, levels: int, tables: list[Table] | None = None):
        self.single = np.zeros((channels, levels), np.int64)
        self.tables = all_tables(channels) if tables is None else tables
        self._pairs = [Cells(levels**2) for _ in self.tables]

    def update(self, indices: Integer[np.ndarray, "N h w C"]) -> None:
        """Adds the indices of images."""
        channels, levels = self.single.shape
        grids = np.ascontiguousarray(np.moveaxis(indices, -1, 0), dtype=np.int64)
        for c in range(channels):
            self.single[c] += np.bincount(grids[c].ravel(), minlength=levels)
        for table, pairs in zip(self.tables, self._pairs, strict=True):
            one, other = grids[table.channel], grids[table.other]
            if table.place == "right":
                one, other = one[:, :, :-1], other[:, :, 1:]
            elif table.place == "below":
                one, other = one[:, :-1], other[:, 1:]
            pairs.add((one * levels + other).ravel())

    def sum_over_processes(self) -> None:
        """Adds the counts of the other processes."""
        self.single = gather_rows(self.single[None]).sum(axis=0)
        for pairs in self._pairs:
            pairs.count()
        if jax.process_count() == 1:
            return
        # All tables in one exchange, because every array size compiles another program.
        starts = np.arange(len(self.tables) + 1) * self.single.shape[1] ** 2
        numbered = zip(self._pairs, starts[:-1], strict=True)
        seen = gather_rows(np.concatenate([pairs.seen + start for pairs, start in numbered]))
        counts = gather_rows(np.concatenate([pairs.counts for pairs in self._pairs]))
        order = np.argsort(seen, kind="stable")
        seen, counts = seen[order], counts[order]
        places = np.searchsorted(seen, starts)
        for pairs, start, (a, b) in zip(
            self._pairs, starts[:-1], itertools.pairwise(places), strict=True
        ):
            pairs.join(seen[a:b] - start, counts[a:b])

    def matrices(self) -> Iterator[tuple[Table, coo_array]]:
        """Every table with its sparse matrix of counts, `[V, V]`."""
        levels = self.single.shape[1]
        for table, pairs in zip(self.tables, self._pairs, strict=True):
            pairs.count()
            places = np.divmod(pairs.seen, levels)
            yield table, coo_array((pairs.counts, places), shape=(levels, levels))
