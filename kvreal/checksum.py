"""End-to-end checksums of chunks: the source says what its bytes sum to, the destination compares before it commits.

    there = sums(memory, location, slots, sizes, keys, mode)              # at the source
    compare(memory, location, slots, sizes, keys, mode, there)            # at the destination; raises Mismatch

A sum is the 64-bit xxh3 of a chunk's bytes, seeded with its key: a whole chunk of another prompt is found as surely as
a changed byte. xxh3, not crc32c: it is faster, and its Python reads a slot where it lies, where google-crc32c takes
nothing but bytes, and so a copy (tests/bench/test_checksum_speed.py measures both).

    off      nothing is read, there are no sums
    sample   first and last 4 KiB, and 4 KiB of every 256 KiB, at a place that the key says: a 64th of the bytes. Finds
             what is lost, late, mixed up or cut, as transports do it; one flipped bit it finds once in 64 times
    all      every byte

Both ends must use one mode. Sums are taken in threads, without the interpreter lock.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Final, Iterable, List, Literal, NamedTuple, Sequence, Tuple, Union, cast, get_args

import xxhash

from kvreal.memory import Memory
from kvreal.slab import Bytes, Slab
from kvreal.spans import Slots, ints

Mode = Literal["off", "sample", "all"]
MODES: Final[Tuple[str, ...]] = get_args(Mode)

PIECE: Final = 4 << 10
STRIPE: Final = 256 << 10
"""A piece of every stripe: no batch that a transport carries is smaller and yet worth sampling for."""
PARALLEL_BYTES: Final = 16 << 20
"""Less than this is summed sooner than threads are woken."""
UNLOCKED_BYTES: Final = 128 << 10
"""Of smaller chunks most of the time goes into Python, and threads wait for one another."""
MAX_THREADS: Final = 4


class Mismatch(Exception):
    """Bytes are not what the source had; one line. ``bad``: which of the chunks, by index."""

    def __init__(self, text: str, bad: Tuple[int, ...]) -> None:
        super().__init__(text)
        self.bad: Tuple[int, ...] = bad


def mode_of(word: str) -> Mode:
    """ValueError, one line: no such mode."""
    if word not in MODES:
        raise ValueError(f"checksums: found {word!r}, expected one of {', '.join(MODES)}")
    return cast(Mode, word)


def sums(
    memory: Memory, location: str, slots: Slots, sizes: Slots, keys: Sequence[bytes], mode: Mode
) -> List[int]:
    """For each slot the sum of its first ``sizes[i]`` bytes, which are the chunk ``keys[i]``. SlabError: no such slot.

    GPU memory is copied to the host for it, in ``sample`` only its pieces.
    """
    if mode == "off":
        return []
    seeds = [int.from_bytes(key[:8], "little") for key in keys]
    where = ints(slots)
    memory.check_all(location, where, ints(sizes))
    slots, sizes = where.tolist(), ints(sizes).tolist()
    if memory.on_disk(location):
        found = []
        for slot, size, key, seed in zip(slots, sizes, keys, seeds):  # each is read whole, one at a time
            read = Read(memory.get(location, slot, size, key))
            found += _sampled(read, [(0, size, seed)]) if mode == "sample" else _whole(read, [(0, size, seed)])
        return found
    slab, _ = memory.homes[location]
    starts = memory.starts(location, where).tolist()

    def part(first: int, last: int) -> List[int]:
        chunks = zip(starts[first:last], sizes[first:last], seeds[first:last])
        return _sampled(slab, chunks) if mode == "sample" else _whole(slab, chunks)

    threads = min(MAX_THREADS, os.cpu_count() or 1, len(slots))
    if mode == "sample" or threads < 2 or sum(sizes) < max(PARALLEL_BYTES, len(slots) * UNLOCKED_BYTES):
        return part(0, len(slots))
    edges = [len(slots) * at // threads for at in range(threads + 1)]
    found = []
    for some in _pool().map(part, edges[:-1], edges[1:]):
        found += some
    return found


def compare(
    memory: Memory,
    location: str,
    slots: Slots,
    sizes: Slots,
    keys: Sequence[bytes],
    mode: Mode,
    there: Sequence[int],
) -> None:
    """Mismatch unless each chunk here sums to what it did ``there``. In mode ``off`` nothing is compared."""
    if mode == "off":
        return
    if len(there) != len(slots):
        bad = tuple(range(len(slots)))
        raise Mismatch(f"{location}: {len(there)} checksums came for {len(slots)} chunks", bad)
    here = sums(memory, location, slots, sizes, keys, mode)
    bad = tuple(i for i, (mine, theirs) in enumerate(zip(here, there)) if mine != theirs)
    if bad:
        at = bad[0]
        raise Mismatch(
            f"{location}: {len(bad)} of {len(slots)} chunks have wrong bytes, the first is {keys[at].hex()[:16]} "
            f"({sizes[at]} bytes in slot {slots[at]}, xxh3 {here[at]:016x}, at the source {there[at]:016x})",
            bad,
        )


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="checksum")


class Read(NamedTuple):
    """A chunk that was read from a disk, where others have a slab."""

    bytes: Bytes
    tensor: Any = None


def _host(slab: Union[Slab, Read], start: int, size: int) -> Any:
    """These bytes where the host can read them: in place, or a copy of what lies on a GPU."""
    if slab.tensor is None:
        return slab.bytes.data[start : start + size]
    return slab.tensor[start : start + size].cpu().numpy().data


def _whole(slab: Union[Slab, Read], chunks: Iterable[Tuple[int, int, int]]) -> List[int]:
    """Of (start, size, seed): the sums of all bytes."""
    digest = xxhash.xxh3_64_intdigest
    return [digest(_host(slab, start, size), seed) for start, size, seed in chunks]


def _sampled(slab: Union[Slab, Read], chunks: Iterable[Tuple[int, int, int]]) -> List[int]:
    """Of (start, size, seed): the sums of the size, the first piece, one of every whole stripe, and the last.
    A chunk of few pieces is summed whole."""
    found: List[int] = []
    source: Any = slab.bytes if slab.tensor is None else slab.tensor
    for start, size, seed in chunks:
        if size <= 4 * PIECE:
            found.append(xxhash.xxh3_64_intdigest(_host(slab, start, size), seed))
            continue
        stripes = size // STRIPE
        offset = seed % (STRIPE // PIECE) * PIECE
        state = xxhash.xxh3_64(size.to_bytes(8, "little"), seed)
        state.update(_host(slab, start, PIECE))
        if stripes:
            middle = source[start : start + stripes * STRIPE].reshape(stripes, STRIPE)[:, offset : offset + PIECE]
            state.update((middle if slab.tensor is None else middle.cpu().numpy()).reshape(-1).data)
        state.update(_host(slab, start + size - PIECE, PIECE))
        found.append(state.intdigest())
    return found
