"""What a run gives back, in either world: operations, violations, placement, and the phases of each move."""

from __future__ import annotations

from typing import Any, Dict, Iterable, List, Mapping, Optional, Protocol, Sequence, Tuple, Union

import msgspec

from kvcore.protocol.machine import Begin, CopyDone, Effect, Input, Journal, Outcome, Received, Send, StartCopy
from kvcore.protocol.messages import Fenced, Fetch, Found, MoveRequest, Push, Pushed, Rid, SourceOutcome, event_name
from kvcore.scenario.faults import Action


class Operation(msgspec.Struct, gc=False, omit_defaults=True, forbid_unknown_fields=True):
    """One client operation. ``state``: open, an event's state, ok, refused, or info (no answer: it may have happened).

    ``promised``: the num_tokens of a move's first answer; ``num_tokens`` the last word. -1 ns: not yet.
    """

    op: str
    what: str
    state: str = "open"
    num_tokens: int = 0
    promised: int = 0
    event: int = 0
    reason: str = ""
    detail: str = ""
    n: int = 0
    source: Tuple[SourceOutcome, ...] = ()
    found: Tuple[Found, ...] = ()
    text: str = ""
    start_ns: int = -1
    end_ns: int = -1

    @property
    def event_id(self) -> str:
        """The event as people see it; empty for an operation without one."""
        return event_name(self.event) if self.event else ""

    @property
    def duration_ns(self) -> int:
        """From request to end; -1 if it has not ended."""
        return self.end_ns - self.start_ns if self.end_ns >= 0 else -1


class Violation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A property of the protocol that did not hold at ``node`` at ``t`` ns; ``event`` 0: of none alone."""

    property: str
    node: str
    t: int
    text: str
    event: int = 0


class EventPhases(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """Where a done move's time went. ``control``: from its request at the controller to the start of its last copy;
    ``copy``: from there to the end of the last copy, less ``queue``, what the driver says it waited for others;
    ``commit``: from there to its final answer. A move that copied nothing is all control. One that goes prefix by
    prefix: its copies follow one another, so that they are as one, and it is all there at the last one's end."""

    event: int
    op: str
    control_ns: int
    queue_ns: int
    copy_ns: int
    commit_ns: int
    bytes: int

    @property
    def total_ns(self) -> int:
        return self.control_ns + self.queue_ns + self.copy_ns + self.commit_ns


class CopyRecord(msgspec.Struct, frozen=True):
    """A copy as the driver of a real node saw it; ns of the run's clock. ``began_ns``: the first byte; before it, it
    queued."""

    node: str
    rid: Rid
    state: str
    read: bool
    peer: str
    transport: str
    nbytes: int
    asked_ns: int
    began_ns: int
    ended_ns: int
    why: str = ""


class LinkRate(msgspec.Struct, frozen=True, gc=False):
    """From ``t`` ns on, all that crosses this link together has this rate. The last word on one instant counts."""

    t: int
    link: str
    bytes_per_s: float


class Result(msgspec.Struct, forbid_unknown_fields=True):
    """``world``: sim or real. ``hung``: who was not quiet at the deadline, and why; empty for a run that ended.

    ``placement``: ``instance/location`` -> prompt -> tokens. ``fired``: which faults did, ``kind at anchor`` -> times;
    ``struck``: what they did to nodes, and when. ``copies``: of real nodes, where they lived to tell. ``rates``: of
    simulated links, where they were asked for.
    """

    world: str
    scenario: str
    seed: int
    operations: List[Operation] = []
    violations: List[Violation] = []
    placement: Dict[str, Dict[str, int]] = {}
    metrics: Dict[str, Union[int, float, str]] = {}
    transport: Optional[str] = None
    phases: List[EventPhases] = []
    hung: List[str] = []
    history: Optional[str] = None
    fired: Dict[str, int] = {}
    struck: List[Tuple[int, Action]] = []
    copies: List[CopyRecord] = []
    rates: List[LinkRate] = []

    @property
    def clean(self) -> bool:
        return not self.violations and not self.hung

    def operation(self, name: str) -> Optional[Operation]:
        """The operation of a step, None if it was never issued."""
        for operation in self.operations:
            if operation.op == name:
                return operation
        return None

    def to_json(self) -> Dict[str, Any]:
        """Of one world, as ``kvmove run --json`` shows it."""
        return {
            "operations": [
                {**msgspec.to_builtins(_full(operation)), "event_id": operation.event_id}
                for operation in self.operations
            ],
            "violations": msgspec.to_builtins(self.violations),
            "placement": self.placement,
            "metrics": self.metrics,
            "transport": self.transport,
            "phases": [{**msgspec.to_builtins(phases), "event_id": event_name(phases.event)} for phases in self.phases],
            "hung": self.hung,
            "history": self.history,
            "fired": self.fired,
        }


def _full(operation: Operation) -> Dict[str, Any]:
    """All fields: what is left out on the wire is written for people's programs."""
    found = {name: getattr(operation, name) for name in operation.__struct_fields__ if name not in ("event", "found")}
    found["found"] = [msgspec.structs.asdict(one) for one in operation.found]
    return found


# ---- phases ----------------------------------------------------------------------------------------------------------
class _Open:
    """A move that has begun and has not ended."""

    def __init__(self, request: MoveRequest, begun_ns: int) -> None:
        self.op: str = request.op
        self.begun_ns: int = begun_ns
        self.started_ns: int = -1
        self.copied_ns: int = -1
        self.queue_ns: int = 0
        self.bytes: int = 0
        self.rids: List[Rid] = []
        #: those whose bytes follow another's of this move
        self.behind: Dict[Rid, None] = {}


class PhaseTracker:
    """Fed with every step of every node, in order of time, it fills ``done``. ``bytes_per_token``: by
    address and location, as ``Built`` has it."""

    def __init__(self, bytes_per_token: Mapping[str, int], controller: str = "ctl") -> None:
        self.bytes_per_token: Mapping[str, int] = bytes_per_token
        self.controller: str = controller
        self.done: List[EventPhases] = []
        self._open: Dict[int, _Open] = {}
        self._event_of: Dict[Rid, int] = {}  # a reservation's id holds its epoch: no two are alike

    def step(self, now: int, node: str, item: Input, effects: Sequence[Effect]) -> None:
        if node == self.controller:
            for effect in effects:
                if type(effect) is Journal:
                    self._journaled(now, effect)
            return
        kind = type(item)
        if kind is Received:
            message = item.msg  # type: ignore[union-attr]
            if type(message) is Fetch:
                self._fetched(now, node, message.event, effects)
            elif type(message) is Pushed:
                self._copied(now, message.rid)
                self._went_on(node, effects)
            elif type(message) is Fenced:
                self._went_on(node, effects)
        elif kind is CopyDone:
            self._copied(now, item.rid)  # type: ignore[union-attr]

    def queued(self, rid: Rid, ns: int) -> None:
        """The driver's word: of this copy's time it waited so long for others."""
        move = self._open.get(self._event_of.get(rid, 0))
        if move is not None and rid not in move.behind:  # one that waited for its own move's bytes has not queued
            move.queue_ns = max(move.queue_ns, ns)

    def _journaled(self, now: int, effect: Journal) -> None:
        record = effect.record
        if type(record) is Begin:
            if type(record.request) is MoveRequest:
                self._open[record.event] = _Open(record.request, now)
        elif type(record) is Outcome:
            move = self._open.pop(record.event, None)
            if move is None:
                return
            for rid in move.rids:
                del self._event_of[rid]
            if record.state == "done":
                self._finish(now, record.event, move)

    def _fetched(self, now: int, node: str, event: int, effects: Sequence[Effect]) -> None:
        move = self._open.get(event)
        if move is None:
            return
        for rid, after, location, lens in _copies(effects):
            if rid not in self._event_of:  # a Push may be sent again
                if after in self._event_of:
                    move.behind[rid] = None
                else:
                    move.started_ns = max(move.started_ns, now)
                self._add(f"{node}/{location}", event, move, rid, lens)

    def _went_on(self, node: str, effects: Sequence[Effect]) -> None:
        """A part of a move is there: it may have begun the next one's copy."""
        for rid, after, location, lens in _copies(effects):
            event = self._event_of.get(after, 0)
            move = self._open.get(event)
            if move is not None and rid not in self._event_of:
                move.behind[rid] = None
                self._add(f"{node}/{location}", event, move, rid, lens)

    def _add(self, at: str, event: int, move: _Open, rid: Rid, lens: Tuple[int, ...]) -> None:
        self._event_of[rid] = event
        move.rids.append(rid)
        move.bytes += sum(lens) * self.bytes_per_token.get(at, 0)

    def _copied(self, now: int, rid: Rid) -> None:
        move = self._open.get(self._event_of.get(rid, 0))
        if move is not None:
            move.copied_ns = max(move.copied_ns, now)

    def _finish(self, now: int, event: int, move: _Open) -> None:
        started = move.started_ns if move.copied_ns >= 0 else now
        copied = max(move.copied_ns, started)
        queue = min(move.queue_ns, copied - started)
        self.done.append(
            EventPhases(
                event, move.op, started - move.begun_ns, queue, copied - started - queue, now - copied, move.bytes
            )
        )


def _copies(effects: Sequence[Effect]) -> List[Tuple[Rid, Rid, str, Tuple[int, ...]]]:
    """(id, the one before it in its move, location, lens) of the copies that a destination begins or asks for."""
    found: List[Tuple[Rid, Rid, str, Tuple[int, ...]]] = []
    for effect in effects:
        if type(effect) is StartCopy:
            found.append((effect.rid, effect.after, effect.location, effect.lens))
        elif type(effect) is Send and type(effect.msg) is Push:
            found.append((effect.msg.rid, effect.msg.after, effect.msg.location, effect.msg.lens))
    return found


class _Step(Protocol):
    """What a history's Line is to us."""

    @property
    def t(self) -> int: ...
    @property
    def node(self) -> str: ...
    @property
    def input(self) -> Input: ...
    @property
    def out(self) -> List[Effect]: ...


def phases(lines: Iterable[_Step], bytes_per_token: Mapping[str, int]) -> List[EventPhases]:
    """The phases of every done move of a history, in the order in which they ended."""
    tracker = PhaseTracker(bytes_per_token)
    for line in lines:
        tracker.step(line.t, line.node, line.input, line.out)
    return tracker.done
