"""The synthetic engine of a node, in a thread beside the loop: stores KV (StartFill) and reads it back (StartRead)."""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from typing import Deque, List, Tuple, Union

import msgspec

from kvcore.protocol.machine import FillDone, ReadDone, StartFill, StartRead
from kvreal.engines import synthetic
from kvreal.memory import Memory
from kvreal.transfer.base import Fate

Task = Union[StartFill, StartRead]
Result = Union[FillDone, ReadDone]


class Job(msgspec.Struct, frozen=True):
    task: Task
    bytes_per_token: int
    fate: Fate


class EngineThread:
    """``start`` a task; ``take`` what has ended when ``wake`` (an eventfd) is readable."""

    def __init__(self, memory: Memory) -> None:
        self.memory: Memory = memory
        self.wake: int = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.tasks: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self.results: Deque[Result] = deque()
        self.open: int = 0
        self.filled_bytes: int = 0
        self.read_bytes: int = 0
        self.read_errors: int = 0
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
            except Exception:  # a slot that is not there, memory that went away: this task fails, the node goes on
                ok = False
            self.results.append(FillDone(task.fid, ok) if isinstance(task, StartFill) else ReadDone(task.fid, ok))
            os.eventfd_write(self.wake, 1)

    def _fill(self, job: Job, task: StartFill) -> bool:
        memory = self.memory
        fate = job.fate
        memory.soil(task.location, task.slots)
        chunks = list(zip(task.slots, task.keys, task.lens))
        for slot, key, tokens in chunks[: int(len(chunks) * fate.fraction + 0.5)]:
            nbytes = tokens * job.bytes_per_token
            if memory.on_gpu(task.location):
                scratch = synthetic.blank(nbytes)
                synthetic.fill(scratch, key, tokens, job.bytes_per_token)
                memory.put(task.location, slot, scratch)
            else:
                synthetic.fill(memory.view(task.location, slot, nbytes), key, tokens, job.bytes_per_token)
            self.filled_bytes += nbytes
        if fate.corrupt and chunks:
            slot, _, tokens = chunks[len(chunks) // 2]
            spoiled = memory.get(task.location, slot, tokens * job.bytes_per_token).copy()
            spoiled[len(spoiled) // 2] ^= 0xFF
            memory.put(task.location, slot, spoiled)
        return not fate.fail

    def _read(self, job: Job, task: StartRead) -> bool:
        ok = True
        for slot, key, tokens in zip(task.slots, task.keys, task.lens):
            view = self.memory.get(task.location, slot, tokens * job.bytes_per_token)
            if synthetic.check(view, key, tokens, job.bytes_per_token) >= 0:
                ok = False
                self.read_errors += 1
            self.read_bytes += len(view)
        return ok and not job.fate.fail


def check_all(
    memory: Memory, location: str, chunks: List[Tuple[bytes, int, int]], bytes_per_token: int
) -> Tuple[int, List[Tuple[int, bytes, int]]]:
    """(bytes compared, [(slot, key, first differing offset)]) of (key, slot, num_tokens) chunks."""
    count = 0
    spoiled: List[Tuple[int, bytes, int]] = []
    for key, slot, tokens in chunks:
        view = memory.get(location, slot, tokens * bytes_per_token)
        offset = synthetic.check(view, key, tokens, bytes_per_token)
        count += len(view)
        if offset >= 0:
            spoiled.append((slot, key, offset))
    return count, spoiled
