"""The contract that every machine and every driver obeys.

    effects = machine.handle(now, input)     # the only mutator; runs to completion; says what to do
    machine.timers.next()                    # (deadline_ns, name) or None: the driver owes a TimerFired then

* ``now`` is int nanoseconds, an argument, and never falls. ``handle`` first lets every deadline <= now run (H37).
* The first input of a life is ``Boot``. A restart is a fresh machine and another ``Boot``; nothing else survives.
* Effects are carried out **in order**; a ``Journal`` is durable before anything that follows it is carried out.
  A driver may carry an effect out twice after a restart: each is idempotent at its receiver.
* Every asynchronous effect has one family of answering inputs:
  StartCopy -> CopyDone | CopyStopped;  AbortCopy -> CopyStopped (or the CopyDone that won the race);
  StartFill -> FillDone;  StartRead -> ReadDone;  CloseWindow -> WindowClosed.
* What the driver promises about bytes: CopyDone(ok) only after the last byte; after CopyStopped, CopyDone or
  WindowClosed nothing lands any more; a write addressed to an old epoch never lands; every copy ends (done or stopped).
* The same inputs give the same effects in any process, under any PYTHONHASHSEED.
"""

from __future__ import annotations

import heapq
from typing import Dict, List, Optional, Tuple, Union

import msgspec

from kvcore.protocol.messages import (
    Inc,
    Key,
    MoveRequest,
    Pid,
    PinRequest,
    Register,
    Rid,
    SourceOutcome,
    Wire,
)

TimerName = Tuple[str, int, int]
"""(kind, a, b): e.g. ("retry", event, 0)."""


class Record(msgspec.Struct, frozen=True, gc=False, tag=True, omit_defaults=True, forbid_unknown_fields=True):
    """Base of inputs, effects and journal records."""


# ---- journal records: what must survive the controller ---------------------------------------------------------------
class Incarnation(Record, frozen=True, gc=False):
    """Before the first send of a life. Without it: two controllers, an event id used twice (H24)."""

    incarnation: int


class Begin(Record, frozen=True, gc=False):
    """Before the first Pin. Alone it means failed("controller restarted"): presumed abort. Of a user's pin: it lives
    on at the workers until it is unpinned or its lease ends."""

    event: int
    request: Union[MoveRequest, PinRequest]


class Decide(Record, frozen=True, gc=False):
    """Before the first Release(delete). The one point of no return (H08)."""

    event: int
    n: int
    num_tokens: int
    sources: Tuple[Tuple[str, Pid], ...]
    destinations: Tuple[Tuple[str, Inc], ...]
    delete: bool


class EpochIssued(Record, frozen=True, gc=False):
    """Before Registered. Without it an old process would be believed after a restart."""

    address: str
    epoch: int
    register: Register


class Outcome(Record, frozen=True, gc=False):
    """Before an event is forgotten; otherwise lazily."""

    event: int
    state: str
    reason: str = ""
    num_tokens: int = 0
    n: int = 0
    source: Tuple[SourceOutcome, ...] = ()
    detail: str = ""
    via: str = ""


JournalRecord = Union[Incarnation, Begin, Decide, EpochIssued, Outcome]


# ---- inputs ---------------------------------------------------------------------------------------------------------
class Boot(Record, frozen=True, gc=False):
    """The first input of a life. Controller: ``incarnation`` (0: one more than the journal's) and the journal's
    records, oldest first. Worker: a fresh ``nonce``. Client: nothing."""

    nonce: int = 0
    incarnation: int = 0
    journal: Tuple[JournalRecord, ...] = ()
    endpoint: str = ""


class Received(Record, frozen=True, gc=False):
    src: str
    msg: Wire


class TimerFired(Record, frozen=True, gc=False):
    """The driver's alarm. ``name`` is what ``timers.next()`` said; one that was cancelled meanwhile does nothing."""

    name: TimerName


class CopyDone(Record, frozen=True, gc=False):
    """``via``: the transport that really carried the bytes."""

    rid: Rid
    ok: bool
    why: str = ""
    via: str = ""


class CopyStopped(Record, frozen=True, gc=False):
    rid: Rid


class FillDone(Record, frozen=True, gc=False):
    fid: int
    ok: bool


class ReadDone(Record, frozen=True, gc=False):
    """``ok`` false: a byte differed from what the key stands for."""

    fid: int
    ok: bool


class WindowClosed(Record, frozen=True, gc=False):
    peer: str
    epoch: int


class Command(Record, frozen=True, gc=False):
    """Something a person or a face in the same process asks of a node: ``what`` is the node's to define."""

    what: str
    args: Tuple[str, ...] = ()


Input = Union[
    Boot, Received, TimerFired, CopyDone, CopyStopped, FillDone, ReadDone, WindowClosed, Command
]


# ---- effects --------------------------------------------------------------------------------------------------------
class Send(Record, frozen=True, gc=False):
    dst: str
    msg: Wire


class StartCopy(Record, frozen=True, gc=False):
    """Move ``lens[i]`` tokens' bytes between my slots[i] of ``location`` and the peer's peer_slots[i].

    ``read``: from the peer to me; else from me to the peer (a push; ``rid`` is then the peer's).
    """

    rid: Rid
    read: bool
    peer: str
    peer_epoch: int
    peer_location: str
    peer_slots: Tuple[int, ...]
    location: str
    slots: Tuple[int, ...]
    lens: Tuple[int, ...]
    endpoint: str = ""


class AbortCopy(Record, frozen=True, gc=False):
    rid: Rid


class StartFill(Record, frozen=True, gc=False):
    """Write the KV that ``keys`` stand for into ``slots``."""

    fid: int
    location: str
    slots: Tuple[int, ...]
    keys: Tuple[Key, ...]
    lens: Tuple[int, ...]


class StartRead(Record, frozen=True, gc=False):
    """Read ``slots``, compare with what ``keys`` stand for, and end no sooner than after ``hold_ns``."""

    fid: int
    location: str
    slots: Tuple[int, ...]
    keys: Tuple[Key, ...]
    lens: Tuple[int, ...]
    hold_ns: int = 0


class CloseWindow(Record, frozen=True, gc=False):
    """Make sure that nothing of process (peer, epoch) can land in my memory any more."""

    peer: str
    epoch: int


class Journal(Record, frozen=True, gc=False):
    record: JournalRecord


class Note(Record, frozen=True, gc=False):
    """For checkers, probes, logs and metrics; a driver need not do anything with it."""

    kind: str
    event: int = 0
    detail: str = ""


Effect = Union[Send, StartCopy, AbortCopy, StartFill, StartRead, CloseWindow, Journal, Note]


# ---- timers ---------------------------------------------------------------------------------------------------------
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
    """Base of controller, worker and client. A subclass fills ``on`` (by input type) and ``on_message`` (by message
    type) and ``on_timer`` (by the timer's kind); a pair that is in neither table raises ProtocolError."""

    def __init__(self) -> None:
        self.timers: Timers = Timers()
        self.out: List[Effect] = []

    def handle(self, now: int, item: Input) -> List[Effect]:
        raise NotImplementedError

    def pending(self) -> List[str]:
        """Why this machine is not quiet: one line a thing still open. Empty when quiet."""
        raise NotImplementedError


class ProtocolError(Exception):
    """A (state, message) pair that the tables do not have. A bug in a machine or a driver, never a user's fault."""
