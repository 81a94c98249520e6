"""Whose turn it is: copies of one process take turns, batch by batch, by priority, by weight, and within their caps.

Bytes between two processes of a host are moved by system calls that block; a link has one end here. Either way what
runs at once only slows each other down, and a small copy behind a large one waits for all of it. So every copy asks for
its turn before each batch: the highest priority first, and among equals the one that has had the least for its weight.
"""

from __future__ import annotations

import threading
import time
from typing import Final, List, Optional

from kvreal.transfer.job import Job

BATCH_BYTES: Final = 16 << 20
"""What one turn moves: some 3 ms of a copy on one host, which is what another waits for at most."""
BURST_S: Final = 0.01
"""How far ahead of its cap a copy may be."""


class Flow:
    """``turn`` before a batch, ``done`` once it is posted or, where that blocks, moved."""

    def __init__(self) -> None:
        self.changed: threading.Condition = threading.Condition()
        self.active: List[Job] = []
        self.waiting: List[Job] = []
        self.busy: bool = False
        self.clock: float = 0.0
        """The service, by weight, of whoever had the last turn: newcomers begin there and not at nothing."""

    def enter(self, job: Job) -> None:
        """A copy that will move bytes begins."""
        with self.changed:
            self.active.append(job)
            job.service = self.clock

    def leave(self, job: Job) -> None:
        with self.changed:
            self.active.remove(job)
            job.over = True
            self.changed.notify_all()

    def pass_by(self, job: Job) -> None:
        """A copy that has ended: nobody waits for it any more, also if it has never moved a byte."""
        with self.changed:
            job.over = True
            job.before = None
            self.changed.notify_all()

    def turn(self, job: Job, nbytes: int, wait: bool = True) -> bool:
        """Wait until the copy may move that many bytes; without ``wait`` False if it may not yet. Stopped if it is told
        to stop meanwhile."""
        if not self._paced(job, nbytes, wait):
            return False
        with self.changed:
            job.service = max(job.service, self.clock)
            if not self.busy and not self.waiting and not _behind(job):
                self._take(job, nbytes)
                return True
            if not wait:
                return False
            self.waiting.append(job)
            try:
                while self.busy or self._next() is not job:
                    self.changed.wait(0.05)
                    job.check()
                self._take(job, nbytes)
            finally:
                self.waiting.remove(job)
                self.changed.notify_all()
        return True

    def _take(self, job: Job, nbytes: int) -> None:
        self.busy = True
        self.clock = job.service
        job.service += nbytes / job.weight
        job.asked_bytes += nbytes
        job.over = job.over or job.asked_bytes >= job.nbytes
        if job.cap_bytes_per_s > 0:
            job.pace.free_at_s += nbytes / job.cap_bytes_per_s

    def _next(self) -> Optional[Job]:
        """Of those that wait for nothing else."""
        return min(
            [job for job in self.waiting if not _behind(job)],
            key=lambda job: (-job.priority, job.service),
            default=None,
        )

    def done(self) -> None:
        with self.changed:
            self.busy = False
            if self.waiting:
                self.changed.notify_all()

    def _paced(self, job: Job, nbytes: int, wait: bool) -> bool:
        """Wait until the cap lets bytes go."""
        if job.cap_bytes_per_s <= 0:
            return True
        now = time.monotonic()
        job.pace.free_at_s = max(job.pace.free_at_s, now - BURST_S)
        wait_s = job.pace.free_at_s - now
        if wait_s > 0 and wait:
            job.aborted.wait(wait_s)
            job.check()
        return wait or wait_s <= 0

    def batch(self, job: Job) -> int:
        """Bytes of one turn: less where a cap would make a batch last long."""
        if job.cap_bytes_per_s <= 0:
            return BATCH_BYTES
        return max(64 << 10, min(BATCH_BYTES, int(job.cap_bytes_per_s * BURST_S)))

    def room(self, job: Job, most: int) -> int:
        """How many batches of a copy may be in flight at once, where that is more than one: by weight, and one while
        a copy of a higher priority is there."""
        with self.changed:
            others = [one for one in self.active if one is not job and not _behind(one)]
            if any(one.priority > job.priority for one in others):
                return 1
            weights = sum(one.weight for one in others if one.priority == job.priority)
            return max(1, round(most * job.weight / (job.weight + weights)))


def _behind(job: Job) -> bool:
    """Whether a copy of the same move has bytes to move before it."""
    return job.before is not None and not job.before.over
