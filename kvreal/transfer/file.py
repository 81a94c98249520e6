"""Copies within a process of which an end is a file: slot by slot, several at a time in threads of their own.

What is read is compared with what the file says of itself (kvreal/store.py) before the copy is done, and a chunk whose
key is known is taken from no other's file. Between two processes the socket transport stages a disk's chunks.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Final, List, Tuple

import numpy as np

from kvreal.memory import Memory
from kvreal.transfer import posix
from kvreal.transfer.flow import Flow
from kvreal.transfer.job import Job

THREADS: Final = 4
"""Chunks on their way at once. More is not faster, and each takes a slot's memory where neither end is memory."""

Span = Tuple[int, int, int, bytes]
"""Slot at the target, slot at the source, bytes, key."""


@lru_cache(maxsize=1)
def workers() -> ThreadPoolExecutor:
    """For what is read from disks, and written there."""
    return ThreadPoolExecutor(THREADS, thread_name_prefix="file")


def spans_of(job: Job) -> List[Span]:
    """What a local copy moves; without keys where nobody said them."""
    effect = job.copy.effect
    keys = effect.keys or (b"",) * len(job.spans)
    sides = [(mine, theirs) if effect.read else (theirs, mine) for mine, theirs, _ in job.spans]
    return [(to, fro, size, key) for (to, fro), (_, _, size), key in zip(sides, job.spans, keys)]


def carry(job: Job, memory: Memory, flow: Flow, to: str, fro: str) -> None:
    """Move ``job.spans`` between two locations of this process. DiskError; Stopped."""
    waiting = spans_of(job)
    while waiting:
        some, waiting = waiting[:THREADS], waiting[THREADS:]
        flow.turn(job, sum(size for _, _, size, _ in some))
        try:
            moves: List[Future[None]] = [workers().submit(_one, memory, to, fro, span) for span in some]
            errors = [move.exception() for move in moves]  # all of them have ended before anything is said
        finally:
            flow.done()
        for error in errors:
            if error is not None:
                raise error
        job.moved += sum(size for _, _, size, _ in some)
        job.check()


def _one(memory: Memory, to: str, fro: str, span: Span) -> None:
    target, source, size, key = span
    gds = posix.gds() if memory.on_gpu(to) or memory.on_gpu(fro) else None
    if gds is not None and memory.on_gpu(fro):
        data = memory.get(fro, source, size)
        memory.stores[to].write(target, data, key, posix.Direct(gds, memory, fro, source))
    elif gds is not None:
        memory.check(to, target, size)
        data = np.empty(size, dtype=np.uint8)
        memory.stores[fro].read(source, data, key, posix.Direct(gds, memory, to, target))
    elif memory.mapped(to):
        memory.fetch(fro, source, memory.view(to, target, size), key)
    else:
        memory.put(to, target, memory.get(fro, source, size, key), key)
