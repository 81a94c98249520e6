"""The contract that every machine and every driver obeys.

    effects = machine.handle(now, input)     # the only mutator; runs to completion; says what to do
    machine.timers.next()                    # (deadline_ns, name) or None: the driver owes a TimerFired then

* ``now`` is int nanoseconds, an argument, and never falls. ``handle`` first lets every deadline <= now run (H37).
* The first input of a life is ``Boot``. A restart is a fresh machine and another ``Boot``; nothing else survives.
* Effects are carried out **in order**; a ``Journal`` is durable before anything that follows it is carried out.
  A driver may carry an effect out twice after a restart: each is idempotent at its receiver.
* Every asynchronous effect has one family of answering inputs:
  StartCopy -> CopyDone | CopyStopped (and until then CopyMoved, every progress_ns);
  AbortCopy -> CopyStopped (or the CopyDone that won the race);
  StartFill -> FillDone;  StartRead -> ReadDone;  CloseWindow -> WindowClosed.
* What the driver promises about bytes: CopyDone(ok) only after the last byte; after CopyStopped, CopyDone or
  WindowClosed nothing lands any more; a write addressed to an old epoch never lands; every copy ends (done or stopped).
* The same inputs give the same effects in any process, under any PYTHONHASHSEED.
"""

from __future__ import annotations

from typing import Callable, Dict, List, Optional, Tuple, Union

import msgspec

from kvcore.protocol.messages import (
    NO_ID,
    Inc,
    Key,
    MoveRequest,
    Pid,
    PinRequest,
    Register,
    Rid,
    SourceOutcome,
    Terms,
    Wire,
)
from kvcore.protocol.timers import TimerName as TimerName
from kvcore.protocol.timers import Timers as Timers


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
    parent: int = 0
    """The drain that this move is a chain of."""


class Promised(Record, frozen=True, gc=False):
    """Before num_tokens is answered to a request that can be repeated: its repetition is to be answered alike."""

    event: int
    num_tokens: int
    n: int


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
    promised: int = 0
    """num_tokens as it was answered before the event ended; 0 if it was not."""


JournalRecord = Union[Incarnation, Begin, Promised, Decide, EpochIssued, Outcome]


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
    """``via``: the transport that really carried the bytes; ``chosen``: why that one."""

    rid: Rid
    ok: bool
    why: str = ""
    via: str = ""
    chosen: str = ""


class CopyMoved(Record, frozen=True, gc=False):
    """So many tokens' bytes of a copy that runs have crossed. For people only: nothing depends on it."""

    rid: Rid
    num_tokens: int


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
    Boot, Received, TimerFired, CopyDone, CopyMoved, CopyStopped, FillDone, ReadDone, WindowClosed, Command
]


# ---- effects --------------------------------------------------------------------------------------------------------
class Send(Record, frozen=True, gc=False):
    dst: str
    msg: Wire


class StartCopy(Record, frozen=True, gc=False):
    """Move ``lens[i]`` tokens' bytes between my slots[i] of ``location`` and the peer's peer_slots[i].

    ``read``: from the peer to me; else from me to the peer (a push; ``rid`` is then the peer's). ``keys``: the
    chunks'. ``after``: get ready, but move no byte before that copy's last one, if it still runs: both are of one move.
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
    keys: Tuple[Key, ...] = ()
    terms: Optional[Terms] = None
    after: Rid = NO_ID


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


# ---- machines -------------------------------------------------------------------------------------------------------
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
