"""What all machines are made of: deadlines by name, and the one way in. The contract is in machine.py."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Callable, Dict, List, Optional, Tuple

if TYPE_CHECKING:
    from kvcore.protocol.machine import Effect, Input

TimerName = Tuple[str, int, int]
"""(kind, a, b): e.g. ("retry", event, 0)."""


class Timers:
    """Deadlines by name. Pulled, never pushed: the driver keeps one alarm a node, for ``next()``.

    A heap with stale entries: setting or cancelling leaves the old entry where it is, and it is skipped when met.
    Equal deadlines fire in the order in which they were set.
    """

    def __init__(self) -> None:
        self.deadlines: Dict[TimerName, Tuple[int, int]] = {}
        self.heap: List[Tuple[int, int, TimerName]] = []
        self.count: int = 0

    def set(self, name: TimerName, deadline_ns: int) -> None:
        count = self.count = self.count + 1
        self.deadlines[name] = (deadline_ns, count)
        heapq.heappush(self.heap, (deadline_ns, count, name))
        if len(self.heap) > 64 and len(self.heap) > 4 * len(self.deadlines):
            self.heap = [(when, seq, timer) for timer, (when, seq) in self.deadlines.items()]
            heapq.heapify(self.heap)

    def cancel(self, name: TimerName) -> None:
        self.deadlines.pop(name, None)

    def armed(self, name: TimerName) -> bool:
        return name in self.deadlines

    def next(self) -> Optional[Tuple[int, TimerName]]:
        """The earliest (deadline_ns, name), or None."""
        heap = self.heap
        deadlines = self.deadlines
        while heap:
            when, count, name = heap[0]
            held = deadlines.get(name)
            if held is not None and held[1] == count:
                return when, name
            heapq.heappop(heap)
        return None

    def pop_due(self, now: int) -> Optional[TimerName]:
        """Take out the earliest timer whose deadline is <= now."""
        heap = self.heap
        deadlines = self.deadlines
        while heap and heap[0][0] <= now:
            _, count, name = heapq.heappop(heap)
            held = deadlines.get(name)
            if held is not None and held[1] == count:
                del deadlines[name]
                return name
        return None


class Machine:
    """Base of controller, worker and client. ``on_timer``: by a timer's kind, what runs when it is due."""

    def __init__(self) -> None:
        self.timers: Timers = Timers()
        self.on_timer: Dict[str, Callable[[int, TimerName, List[Effect]], None]] = {}

    def handle(self, now: int, item: Input) -> List[Effect]:
        raise NotImplementedError

    def run_due(self, now: int, out: List[Effect]) -> bool:
        """Run every deadline that has passed; True if there was one. Comes before any input, so that a paused node's
        late messages find its leases ended (H37)."""
        timers = self.timers
        name = timers.pop_due(now)
        if name is None:
            return False
        while name is not None:
            self.on_timer[name[0]](now, name, out)
            name = timers.pop_due(now)
        return True

    def fire(self, now: int, name: TimerName, out: List[Effect]) -> None:
        """Run one armed timer, due or not. Nothing if it has been cancelled."""
        if self.timers.armed(name):
            self.timers.cancel(name)
            self.on_timer[name[0]](now, name, out)

    def pending(self) -> List[str]:
        """Why this machine is not quiet: one line a thing still open. Empty when quiet."""
        raise NotImplementedError


class ProtocolError(Exception):
    """A (state, message) pair that the tables do not have. A bug in a machine or a driver, never a user's fault."""
