"""Threads that are kept: a copy of a few bytes should not pay for making one."""

from __future__ import annotations

import ctypes
import queue
import threading
from typing import Callable, Final, List, Optional

PR_SET_TIMERSLACK: Final = 29
SLACK_NS: Final = 1000
KEPT: Final = 8
"""Idle threads; more of them end when they have nothing to do."""

Task = Callable[[], None]

_libc: Final = ctypes.CDLL(None)


def punctual() -> None:
    """Let this thread's sleeps end when they should: by default the kernel adds up to 50 us, which is more than some of
    them last."""
    _libc.prctl(PR_SET_TIMERSLACK, SLACK_NS, 0, 0, 0)


class Workers:
    """``run`` never waits: there is always a thread, an idle one or a new one."""

    def __init__(self, name: str) -> None:
        self.name: str = name
        self.lock: threading.Lock = threading.Lock()
        self.idle: List[queue.SimpleQueue[Optional[Task]]] = []

    def run(self, task: Task) -> None:
        with self.lock:
            inbox = self.idle.pop() if self.idle else None
        if inbox is not None:
            inbox.put(task)
        else:
            threading.Thread(target=self._work, args=(task,), name=self.name, daemon=True).start()

    def _work(self, first: Task) -> None:
        inbox: queue.SimpleQueue[Optional[Task]] = queue.SimpleQueue()
        task: Optional[Task] = first
        punctual()
        while task is not None:
            task()
            with self.lock:
                if len(self.idle) >= KEPT:
                    return
                self.idle.append(inbox)
            task = inbox.get()

    def stop(self) -> None:
        """Idle threads end; busy ones when they are done and find that there are enough."""
        with self.lock:
            idle, self.idle = self.idle, []
        for inbox in idle:
            inbox.put(None)
