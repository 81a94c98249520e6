"""A history as spans of time: what each node was at, each move's phases, and where one thing leads to another.

Pure: lines and a result go in. Every time is one of the history's, or of the copies that a real node's driver timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from kvcore.protocol.machine import (
    Begin,
    Boot,
    CopyDone,
    CopyStopped,
    Decide,
    Effect,
    FillDone,
    Journal,
    Note,
    Outcome,
    ReadDone,
    Received,
    Send,
    StartCopy,
    StartFill,
    StartRead,
)
from kvcore.protocol.messages import (
    NO_ID,
    Beat,
    Committed,
    End,
    Fence,
    Fenced,
    Fetch,
    MoveRequest,
    Pin,
    Pinned,
    Push,
    Pushed,
    Refused,
    Released,
    Reserved,
    Rid,
    event_name,
)
from kvcore.scenario.build import Built
from kvcore.scenario.history import Line
from kvcore.scenario.render import describe
from kvcore.scenario.result import CopyRecord, Result
from kvmove.spans import OPEN, Arrow, Mark, Move, Span, divide, told

CLIENT: Final = "client"


class Timeline:
    """Feed ``step`` with the lines of one history, in order of time; then ``finish``."""

    def __init__(self, world: str, built: Built, messages: bool = False) -> None:
        self.world: str = world
        self.built: Built = built
        self.bytes_per_token: dict[str, int] = built.bytes_per_token
        self.messages: bool = messages
        self.spans: list[Span] = []
        """Those that lie within none."""
        self.moves: dict[int, Move] = {}
        self.marks: list[Mark] = []
        self.arrows: list[Arrow] = []
        self.copies: dict[Rid, Span] = {}
        self.start_ns: int = 0
        """The client's first step."""
        self.last_ns: int = 0
        self._seen_ns: dict[str, int] = {}
        self._open: dict[tuple[str, str, Any], Span] = {}  # (node, kind, id) -> what has not ended
        self._event_of: dict[Rid, int] = {}
        self._flying: dict[tuple[str, str, Any], list[int]] = {}
        self._told: dict[type[Effect], Callable[[Line, Any], None]] = {
            Journal: self._journaled,
            Send: self._sent,
            StartCopy: self._copy_starts,
            StartFill: lambda line, effect: self._engine(line, effect, "store"),
            StartRead: lambda line, effect: self._engine(line, effect, "use"),
            Note: self._noted,
        }

    def step(self, line: Line) -> None:
        node, item = line.node, line.input
        if isinstance(item, Boot) and node in self._seen_ns:
            self._died(node, self._seen_ns[node])
            self.marks.append(Mark(line.t, node, f"{node} boots again"))
        if isinstance(item, Received):
            self._received(line, item)
        elif isinstance(item, (CopyDone, CopyStopped)):
            self._copy_ended(line, item)
        elif isinstance(item, (FillDone, ReadDone)):
            self._close(node, "engine", item.fid, line.t, ok=item.ok)
        for effect in line.out:
            told = self._told.get(type(effect))
            if told is not None:
                told(line, effect)
        self._seen_ns[node] = self.last_ns = line.t

    # ---- opening and closing
    def _begin(
        self,
        node: str,
        kind: str,
        ident: Any,
        name: str,
        t: int,
        event: int = 0,
        within: Span | None = None,
        **args: Any,
    ) -> Span:
        span = Span(node, name, kind, t, event=event, args=args)
        if within is not None:
            within.inside.append(span)
        else:
            self.spans.append(span)
        self._open[(node, kind, ident)] = span
        move = self.moves.get(event)
        if move is not None:
            move.points.append(span)
        return span

    def _close(self, node: str, kind: str, ident: Any, t: int, **args: Any) -> None:
        span = self._open.pop((node, kind, ident), None)
        if span is not None:
            span.end_ns = t
            span.args = {**span.args, **args}

    def _died(self, node: str, t: int) -> None:
        """Whatever a dead process was at ended with the last thing that it did."""
        for where, kind, ident in [key for key in self._open if key[0] == node]:
            self._close(where, kind, ident, t, cut_off="the process died")

    def _op(self, event: int) -> str:
        move = self.moves.get(event)
        return move.request.op if move is not None else event_name(event)

    # ---- what a node takes
    def _received(self, line: Line, item: Received) -> None:
        t, node, message = line.t, line.node, item.msg
        if self.messages and type(message) is not Beat:
            sent = self._flying.get((item.src, node, message))
            if sent:
                self.arrows.append(Arrow(item.src, node, describe(message), sent.pop(0), t))
        if isinstance(message, Fenced):
            self._close(node, "fence", message.rid, t, alive=message.alive)
        elif isinstance(message, Pushed):
            self._close(node, "await push", message.rid, t, ok=message.ok)
            self._copied(message.rid, t)
        elif isinstance(message, End):
            for kind in ("fetch", "retain"):
                self._close(node, kind, message.event, t)
        elif isinstance(message, Pin):
            self._pinned(line, message)
        elif isinstance(message, Fetch) and any(
            isinstance(e, Send) and isinstance(e.msg, (Reserved, Committed)) for e in line.out
        ):
            if (node, "fetch", message.event) not in self._open and (node, "retain", message.event) not in self._open:
                name = f"fetch {self._op(message.event)}"
                chunks = len(message.keys)
                self._begin(node, "fetch", message.event, name, t, message.event, chunks=chunks, source=message.src)

    def _pinned(self, line: Line, message: Pin) -> None:
        held = [e.msg for e in line.out if isinstance(e, Send) and isinstance(e.msg, Pinned) and e.msg.pid != NO_ID]
        if held and (line.node, "pin", message.event) not in self._open:
            name = f"pinned for {self._op(message.event)}"
            self._begin(line.node, "pin", message.event, name, line.t, message.event, chunks=len(held[0].slots))

    # ---- what a node asks for
    def _journaled(self, line: Line, effect: Journal) -> None:
        record = effect.record
        if isinstance(record, Begin) and isinstance(record.request, MoveRequest):
            move = self.moves[record.event] = Move(record.event, record.request, line.t)
            self.spans.append(move.whole)
        elif isinstance(record, (Decide, Outcome)):
            found = self.moves.get(record.event)
            if found is None:
                return
            if isinstance(record, Decide):
                found.decided_ns = line.t
            else:
                found.end_ns, found.outcome = line.t, record

    def _sent(self, line: Line, effect: Send) -> None:
        t, node, message = line.t, line.node, effect.msg
        if type(message) is Beat:
            return
        if self.messages:
            self._flying.setdefault((node, effect.dst, message), []).append(t)
        if isinstance(message, Fetch):
            move = self.moves.get(message.event)
            if move is not None and move.fetched_ns == OPEN:
                move.fetched_ns = t
        elif isinstance(message, Push):
            event = self._event(line, message.rid)
            if (node, "await push", message.rid) not in self._open:
                within = self._open.get((node, "fetch", event))
                self._begin(node, "await push", message.rid, "await push", t, 0, within)
        elif isinstance(message, Fence):
            event = self._event_of.get(message.rid, 0)
            if (node, "fence", message.rid) not in self._open:
                self._begin(node, "fence", message.rid, "fence", t, event, self._open.get((node, "fetch", event)))
        elif isinstance(message, Committed):
            self._committed(line, message)
        elif isinstance(message, Refused):
            self._close(node, "fetch", message.event, t, refused=message.why)
        elif isinstance(message, Released):
            self._close(node, "pin", message.event, t, deleted=message.deleted, kept=message.kept)

    def _committed(self, line: Line, message: Committed) -> None:
        node, t, event = line.node, line.t, message.event
        if message.n == 0:
            self._close(node, "retain", event, t)
        elif (node, "fetch", event) in self._open:
            self._close(node, "fetch", event, t, committed=message.n, present=len(message.present))
            self._begin(node, "retain", event, f"retained for {self._op(event)}", t)

    def _event(self, line: Line, rid: Rid) -> int:
        """The event of a reservation, which a Fetch, or a Push that asks for it, has just made known."""
        item = line.input
        if isinstance(item, Received) and isinstance(item.msg, Fetch):
            self._event_of[rid] = item.msg.event
        return self._event_of.get(rid, 0)

    def _copy_starts(self, line: Line, effect: StartCopy) -> None:
        t, node = line.t, line.node
        event = self._event(line, effect.rid)
        nbytes = sum(effect.lens) * self.bytes_per_token.get(f"{node}/{effect.location}", 0)
        within = self._open.get((node, "fetch" if effect.read else "pin", event))
        name = f"copy {'from' if effect.read else 'to'} {effect.peer}"
        args = {"bytes": nbytes, "chunks": len(effect.slots), "read": effect.read, "transport": ""}
        args |= {"peer": f"{effect.peer}/{effect.peer_location}", "here": effect.location}
        self.copies[effect.rid] = self._begin(node, "copy", effect.rid, name, t, event, within, **args)
        move = self.moves.get(event)
        if move is not None:
            move.started_ns = max(move.started_ns, t)
            move.bytes += nbytes

    def _copy_ended(self, line: Line, item: CopyDone | CopyStopped) -> None:
        if isinstance(item, CopyStopped):
            self._close(line.node, "copy", item.rid, line.t, state="stopped")
            return
        self._close(line.node, "copy", item.rid, line.t, state="done" if item.ok else "failed", transport=item.via)
        if not item.ok:
            self.marks.append(Mark(line.t, line.node, f"copy failed: {item.why}"))
        self._copied(item.rid, line.t)

    def _copied(self, rid: Rid, t: int) -> None:
        move = self.moves.get(self._event_of.get(rid, 0))
        if move is not None:
            move.copied_ns = max(move.copied_ns, t)

    def _engine(self, line: Line, effect: StartFill | StartRead, what: str) -> None:
        op = getattr(getattr(line.input, "msg", None), "op", "")
        self._begin(
            line.node, "engine", effect.fid, f"{what} {op}".rstrip(), line.t,
            chunks=len(effect.slots), location=effect.location, tokens=sum(effect.lens),
        )  # fmt: skip

    def _noted(self, line: Line, effect: Note) -> None:
        if effect.kind == "pin_lapsed":
            self._close(line.node, "pin", effect.event, line.t, lapsed=True)
        elif effect.kind == "retention_lapsed":
            self._close(line.node, "retain", effect.event, line.t, lapsed=True)
        elif effect.kind == "start" and line.node == CLIENT:
            self.start_ns = line.t

    # ---- the end
    def finish(self, result: Result | None) -> Timeline:
        """All that is open ends with the history. ``result``: of the same run; its copies and faults are put in."""
        for key in list(self._open):
            self._close(*key, self.last_ns, open=True)
        for move in self.moves.values():
            divide(move, self.last_ns)
        for (src, dst, message), times in self._flying.items():
            self.arrows += [Arrow(src, dst, describe(message), t, OPEN) for t in times]
        self.arrows.sort(key=lambda arrow: arrow.sent_ns)
        if result is not None:
            for record in result.copies:
                self._timed(record)
            for t, action in result.struck:
                self.marks.append(Mark(t, getattr(action, "node", ""), told(action)))
            for operation in result.operations:
                if operation.start_ns >= 0:
                    end_ns = operation.end_ns if operation.end_ns >= 0 else self.last_ns
                    args = {"state": operation.state, "tokens": operation.num_tokens, "event": operation.event_id}
                    name = f"{operation.what} {operation.op}"
                    self.spans.append(Span(CLIENT, name, "step", operation.start_ns, end_ns, args=args))
        self.marks.sort(key=lambda mark: mark.t)
        return self

    def _timed(self, record: CopyRecord) -> None:
        """What the driver knows of a copy: when its first byte and its last one moved."""
        span = self.copies.get(record.rid)
        if span is None or span.node != record.node:
            return
        queue_ns = record.began_ns - record.asked_ns
        span.args = {**span.args, "state": record.state, "transport": record.transport, "queue_ns": queue_ns}
        if span.begin_ns <= record.began_ns <= record.ended_ns <= span.end_ns:
            args = {"bytes": record.nbytes, "transport": record.transport}
            name = f"bytes over {record.transport or 'nothing'}"
            span.inside.append(Span(record.node, name, "bytes", record.began_ns, record.ended_ns, args=args))


def timeline(
    world: str, built: Built, lines: Iterable[Line], result: Result | None, messages: bool = False
) -> Timeline:
    """One history's. ``messages``: with an arrow for each."""
    found = Timeline(world, built, messages)
    for line in lines:
        found.step(line)
    return found.finish(result)
