"""Slots and bytes as arrays: a copy may have thousands of chunks, and what is done to all of them is done at once."""

from __future__ import annotations

import struct
from typing import Iterator, Sequence, Tuple, Union

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Slots = Union[Sequence[int], Ints]


def ints(numbers: Slots) -> Ints:
    """As an array, which need not be writable. struct.error for what are no 64-bit integers."""
    if isinstance(numbers, np.ndarray):
        return numbers
    return np.frombuffer(struct.pack(f"={len(numbers)}q", *numbers), np.int64)  # a third of what numpy takes


def packed(numbers: Slots) -> bytes:
    """As messages carry them: eight bytes each, little-endian."""
    return ints(numbers).astype("<i8", copy=False).tobytes()


def unpacked(data: bytes) -> Ints:
    """ValueError if that is no whole number of them."""
    return np.frombuffer(data, dtype="<i8").astype(np.int64, copy=False)


def firsts(starts: Ints, sizes: Ints, *others: Ints) -> npt.NDArray[np.intp]:
    """Which ranges do not follow on the one before them, here and in each of ``others``: by position, 0 first."""
    apart = starts[:-1] + sizes[:-1] != starts[1:]
    for other in others:
        apart |= other[:-1] + sizes[:-1] != other[1:]
    return np.concatenate(([0], np.flatnonzero(apart) + 1)).astype(np.intp)


def runs(mine: Ints, theirs: Ints, sizes: Ints, limit: int) -> Tuple[Ints, Ints, Ints]:
    """Ranges by their starts at either end: neighbours at both are merged, then cut so that none is above ``limit``
    bytes."""
    if not len(sizes):
        return mine, theirs, sizes
    begin = firsts(mine, sizes, theirs)
    mine, theirs, sizes = mine[begin], theirs[begin], np.add.reduceat(sizes, begin)
    if int(sizes.max()) <= limit:
        return mine, theirs, sizes
    pieces = -(-sizes // limit)
    run = np.repeat(np.arange(len(sizes)), pieces)
    offset = (np.arange(len(run)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * limit
    return mine[run] + offset, theirs[run] + offset, np.minimum(sizes[run] - offset, limit)


class Spans:
    """What a copy moves, in order: so many bytes of a slot here and of a slot there. Iterates as (here, there, bytes).
    """

    def __init__(self, mine: Slots, theirs: Slots, sizes: Slots) -> None:
        self.mine: Ints = ints(mine)
        self.theirs: Ints = ints(theirs)
        self.sizes: Ints = ints(sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, at: int) -> Tuple[int, int, int]:
        return int(self.mine[at]), int(self.theirs[at]), int(self.sizes[at])

    def __iter__(self) -> Iterator[Tuple[int, int, int]]:
        return iter(zip(self.mine.tolist(), self.theirs.tolist(), self.sizes.tolist()))

    @property
    def nbytes(self) -> int:
        return int(self.sizes.sum())

    def first(self, fraction: float) -> Spans:
        """The first ``fraction`` of the bytes."""
        if fraction >= 1.0 or not len(self):
            return self
        ends = np.cumsum(self.sizes)
        limit = int(ends[-1] * fraction)
        count = int(np.searchsorted(ends, limit, side="left")) + 1 if limit > 0 else 0
        sizes = self.sizes[:count].copy()
        if count:
            sizes[-1] -= max(0, int(ends[count - 1]) - limit)
        return Spans(self.mine[:count], self.theirs[:count], sizes)
