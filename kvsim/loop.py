"""The clock: a simpy Environment whose heap also takes plain function calls.

A hot path never makes an Event, a process or a closure: it says ``at(when_ns, fn, a, b)`` and ``fn(a, b)`` is called
then. Whoever wants processes and resources writes ordinary simpy against the same object: its events go through the
same heap, in the same order. Time is int nanoseconds.

Entries are ``(when_ns, order, fn, a, b)``; ``order`` is a running number, so equal times fire in the order in which
they were asked for, shifted by a rank: simpy's urgent events come before, ``at_end_of_instant`` after the others.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Any, Callable, Final, List, Optional, Tuple, Union

import simpy
from simpy.core import EmptySchedule, StopSimulation
from simpy.events import NORMAL, Event, EventPriority

Callback = Callable[[Any, Any], None]
Entry = Tuple[int, int, Callback, Any, Any]

NEVER_NS: Final = 1 << 62
"""Later than anything: 146 years."""

_RANK: Final = 1 << 60


class EventLimit(Exception):
    """More events than the caller allowed: a run that goes round in circles."""


class Loop(simpy.Environment):
    def __init__(self) -> None:
        super().__init__(0)
        self.now_ns: int = 0
        self.heap: List[Entry] = []
        self.seq: int = 0
        self.horizon: int = 0

    # ---- plain calls ------------------------------------------------------------------------------------------------
    def at(self, when_ns: int, fn: Callback, a: Any = None, b: Any = None) -> None:
        """Call ``fn(a, b)`` at ``when_ns``, which must not be in the past."""
        seq = self.seq = self.seq + 1
        heappush(self.heap, (when_ns, seq, fn, a, b))

    def at_end_of_instant(self, fn: Callback, a: Any = None, b: Any = None) -> None:
        """Call ``fn(a, b)`` now, after everything else that is to happen now."""
        seq = self.seq = self.seq + 1
        heappush(self.heap, (self.now_ns, seq + _RANK, fn, a, b))

    def stop(self) -> None:
        """Let ``advance`` return when the running callback has ended. What is in the heap stays there."""
        seq = self.seq = self.seq + 1
        heappush(self.heap, (self.now_ns, seq - 4 * _RANK, _stop, None, None))

    def advance(self, until_ns: int, max_events: Optional[int] = None) -> None:
        """Fire what is due up to and including ``until_ns``; return earlier if stopped or if nothing is left.

        Raises EventLimit after ``max_events`` events, counted since the loop was made.
        """
        heap = self.heap
        seq = self.seq = self.seq + 1
        self.horizon = seq
        heappush(heap, (until_ns, seq + 4 * _RANK, self._reached, seq, None))
        try:
            if max_events is None:
                while True:
                    when, _, fn, a, b = heappop(heap)
                    self.now_ns = when
                    fn(a, b)
            while self.fired() < max_events:
                when, _, fn, a, b = heappop(heap)
                self.now_ns = when
                fn(a, b)
        except StopSimulation:
            return
        raise EventLimit(f"{max_events} events without an end, at {self.now_ns} ns")

    def fired(self) -> int:
        """Number of heap entries that have left the heap."""
        return self.seq - len(self.heap)

    # ---- simpy's own interface, over the same heap ------------------------------------------------------------------
    @property
    def now(self) -> Union[int, float]:
        return self.now_ns

    def schedule(self, event: Event, priority: EventPriority = NORMAL, delay: Union[int, float] = 0) -> None:
        seq = self.seq = self.seq + 1
        order = seq + (priority - NORMAL) * _RANK
        heappush(self.heap, (self.now_ns + int(delay), order, self._simpy_event, event, None))

    def peek(self) -> Union[int, float]:
        return self.heap[0][0] if self.heap else super().peek()

    def step(self) -> None:
        if not self.heap:
            raise EmptySchedule
        when, _, fn, a, b = heappop(self.heap)
        self.now_ns = when
        fn(a, b)

    def _reached(self, horizon: Any, _: Any) -> None:
        if horizon == self.horizon:  # not that of an advance which was stopped before it got there
            raise StopSimulation(None)

    def _simpy_event(self, event: Any, _: Any) -> None:
        self._queue.append((self.now_ns, NORMAL, 0, event))
        super().step()


def _stop(a: Any, b: Any) -> None:
    """simpy's way out of a run; it costs nothing until it happens."""
    raise StopSimulation(None)
