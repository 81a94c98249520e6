"""Deadlines by name: pulled, never pushed."""

from __future__ import annotations

import heapq
from typing import Dict, List, Optional, Tuple

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
