"""The engine of a node, in a thread beside the loop: stores KV (StartFill) and reads it back (StartRead).

What injected faults make of a task (fails, is cut short, spoils a byte) is carried out here, alike for every engine.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections import deque
from typing import Deque, List, Optional, Tuple, Union

import msgspec

from kvcore.protocol.machine import FillDone, ReadDone, StartFill, StartRead
from kvreal.engines import synthetic
from kvreal.engines.base import Engine
from kvreal.memory import Memory
from kvreal.store import DiskError
from kvreal.transfer.job import Fate

log = logging.getLogger("kvmove.engine")

Task = Union[StartFill, StartRead]
Result = Union[FillDone, ReadDone]


class Job(msgspec.Struct, frozen=True):
    task: Task
    bytes_per_token: int
    fate: Fate


class EngineThread:
    """``start`` a task; ``take`` what has ended when ``wake`` (an eventfd) is readable."""

    def __init__(self, memory: Memory, engine: Optional[Engine] = None) -> None:
        """``engine``: None for the synthetic one."""
        self.memory: Memory = memory
        self.engine: Engine = engine or synthetic.Synthetic()
        self.wake: int = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.tasks: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self.results: Deque[Result] = deque()
        self.open: int = 0
        self.filled_bytes: int = 0
        self.read_bytes: int = 0
        self.read_errors: int = 0
        """Tasks whose slots did not hold what their keys stand for."""
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def begin(self) -> None:
        """Count from here."""
        self.filled_bytes = self.read_bytes = self.read_errors = 0

    def start(self, task: Task, bytes_per_token: int, fate: Fate) -> None:
        self.open += 1
        self.tasks.put(Job(task, bytes_per_token, fate))

    def take(self) -> List[Result]:
        try:
            os.eventfd_read(self.wake)
        except BlockingIOError:
            return []
        found: List[Result] = []
        while self.results:
            found.append(self.results.popleft())
        self.open -= len(found)
        return found

    def _run(self) -> None:
        while True:
            job = self.tasks.get()
            task = job.task
            try:
                ok = self._fill(job, task) if isinstance(task, StartFill) else self._read(job, task)
            except Exception as error:  # a slot that is not there, memory that went away: this task fails, the node not
                log.warning("%s %d failed: %s: %s", type(task).__name__, task.fid, type(error).__name__, error)
                ok = False
            if isinstance(task, StartFill) and not ok:
                self.memory.forget(task.location, task.slots)
            self.results.append(FillDone(task.fid, ok) if isinstance(task, StartFill) else ReadDone(task.fid, ok))
            os.eventfd_write(self.wake, 1)

    def _fill(self, job: Job, task: StartFill) -> bool:
        fate = job.fate
        self.memory.soil(task.location, task.slots)
        n = int(len(task.slots) * fate.fraction + 0.5)
        part = task if n == len(task.slots) else first_chunks(task, n)
        ok = self.engine.fill(self.memory, part, job.bytes_per_token)
        self.filled_bytes += sum(part.lens) * job.bytes_per_token
        if fate.corrupt and task.slots:
            middle = len(task.slots) // 2
            nbytes = task.lens[middle] * job.bytes_per_token
            spoiled = self.memory.get(task.location, task.slots[middle], nbytes).copy()
            spoiled[nbytes // 2] ^= 0xFF
            self.memory.put(task.location, task.slots[middle], spoiled, task.keys[middle])
        return ok and not fate.fail

    def _read(self, job: Job, task: StartRead) -> bool:
        ok = self.engine.read(self.memory, task, job.bytes_per_token)
        self.read_bytes += sum(task.lens) * job.bytes_per_token
        self.read_errors += not ok
        return ok and not job.fate.fail


def first_chunks(task: StartFill, n: int) -> StartFill:
    return StartFill(task.fid, task.location, task.slots[:n], task.keys[:n], task.lens[:n])


def check_all(
    memory: Memory, location: str, chunks: List[Tuple[bytes, int, int]], bytes_per_token: int
) -> Tuple[int, List[Tuple[int, bytes, int]]]:
    """(bytes compared, [(slot, key, first differing offset)]) of (key, slot, num_tokens) chunks."""
    count = 0
    spoiled: List[Tuple[int, bytes, int]] = []
    for key, slot, tokens in chunks:
        try:
            view = memory.get(location, slot, tokens * bytes_per_token, key)
        except DiskError as error:
            log.warning("%s", error)
            spoiled.append((slot, key, 0))
            continue
        offset = synthetic.check(view, key, tokens, bytes_per_token)
        count += len(view)
        if offset >= 0:
            spoiled.append((slot, key, offset))
    return count, spoiled
