"""Machine: the controller. Registry, coordinators, and the clients that ask."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional, final

from kvcore.protocol.chunks import namespace_mismatch
from kvcore.protocol.config import ControllerSpec
from kvcore.protocol.coordinator import COPYING, FAILED, RELEASING, Coordinator
from kvcore.protocol.drain import Drains, moved_by
from kvcore.protocol.fanout import Fanout, Fanouts
from kvcore.protocol.machine import (
    Begin,
    Boot,
    Decide,
    Effect,
    EpochIssued,
    Incarnation,
    Input,
    Journal,
    Machine,
    Note,
    Outcome,
    Promised,
    ProtocolError,
    Received,
    Send,
    TimerFired,
)
from kvcore.protocol.membership import Membership
from kvcore.protocol.messages import (
    Alive,
    Answer,
    Beat,
    CancelRequest,
    Cleared,
    ClearRequest,
    Committed,
    Delta,
    Held,
    LookupRequest,
    MoveRequest,
    Pinned,
    PinRequest,
    Position,
    Refused,
    Register,
    Released,
    Reserved,
    Snap,
    StatusRequest,
    Suspect,
    UnpinRequest,
    event_name,
)
from kvcore.protocol.registry import Registry

VERSION = 1


def other_request(first: MoveRequest, m: MoveRequest) -> str:
    """How ``m`` asks for something else than ``first``, both values; "" if it asks for the same."""
    for name, before, now in (("old_position", first.src, m.src), ("new_position", first.dst, m.dst)):
        if before != now:
            return f"{name} was {'/'.join(before)}, is {'/'.join(now)}"
    if first.also != m.also:
        before_also = ", ".join(["/".join(place) for place in first.also]) or "none"
        also = ", ".join(["/".join(place) for place in m.also]) or "none"
        return f"more destinations were {before_also}, are {also}"
    if first.keys != m.keys:
        much = f"{sum(first.lens)} tokens" if first.keys else "all"
        return f"tokens were {much}, are {f'{sum(m.lens)} tokens' if m.keys else 'all'}, and not the same"
    if first.copy != m.copy:
        return f"copy was {str(first.copy).lower()}, is {str(m.copy).lower()}"
    if first.evict != m.evict:
        return f"if_room was {str(not first.evict).lower()}, is {str(not m.evict).lower()}"
    return ""


@final
class Controller(Machine):
    def __init__(self, spec: ControllerSpec) -> None:
        super().__init__()
        config = spec.config
        self.spec: ControllerSpec = spec
        self.incarnation: int = 0
        self.registry: Registry = Registry(config)
        self.moves: Coordinator = Coordinator(self.registry, self.timers, config)
        self.fanouts: Fanouts = Fanouts(self.registry, self.timers, config)
        self.members: Membership = Membership(self.registry, self.moves, self.fanouts, self.timers, config)
        self.drains: Drains = Drains(self.registry, self.moves, config)
        self.on_message: Dict[Any, Callable[[int, str, Any, List[Effect]], None]] = {}
        self.wire()

    def wire(self) -> None:
        """Fill the dispatch tables (again, after the machine has been copied without them)."""
        moves = self.moves
        members = self.members
        moves.on_ended = self.drains.child_ended
        self.on_message = {
            Pinned: moves.on_pinned,
            Reserved: moves.on_reserved,
            Committed: moves.on_committed,
            Refused: moves.on_refused,
            Released: moves.on_released,
            Register: members.on_register,
            Alive: members.on_alive,
            Beat: members.on_beat,
            Delta: members.on_delta,
            Snap: members.on_snap,
            Suspect: members.on_suspect,
            Cleared: members.on_cleared,
            Held: self.fanouts.on_held,
            MoveRequest: self.on_move,
            LookupRequest: self.on_lookup,
            PinRequest: self.on_pin,
            UnpinRequest: self.on_unpin,
            ClearRequest: self.on_clear,
            CancelRequest: self.on_cancel,
            StatusRequest: self.on_status,
        }
        self.on_timer = {
            "retry": moves.on_retry,
            "forget": moves.on_forget,
            "fanout": self.fanouts.on_timer,
            "hold": self.fanouts.on_hold_timer,
            "dead": members.on_dead_timer,
            "restored": members.on_restored_timer,
            "probe": members.on_probe_timer,
        }

    def handle(self, now: int, item: Input) -> List[Effect]:
        out: List[Effect] = []
        heap = self.timers.heap
        ran = bool(heap) and heap[0][0] <= now and self.spec.config.rules.h37 and self.run_due(now, out)
        kind = type(item)
        if kind is Received:
            message = item.msg  # type: ignore[union-attr]
            handler = self.on_message.get(type(message))
            if handler is not None:
                handler(now, item.src, message, out)  # type: ignore[union-attr]
            else:
                out.append(Note("unexpected", 0, f"{type(message).__name__} from {item.src}"))  # type: ignore[union-attr]
        elif kind is TimerFired:
            if not ran:  # else it has run, and may be armed again
                self.fire(now, item.name, out)  # type: ignore[union-attr]
        elif kind is Boot:
            self.on_boot(now, item, out)  # type: ignore[arg-type]
        else:
            raise ProtocolError(f"{self.spec.name}: a controller has no input {kind.__name__}")
        return out

    # ---- birth
    def on_boot(self, now: int, item: Boot, out: List[Effect]) -> None:
        last = 0
        begun: Dict[int, Begin] = {}
        promised: Dict[int, Promised] = {}
        decided: Dict[int, Decide] = {}
        ended: Dict[int, Outcome] = {}
        children: Dict[int, List[Begin]] = {}
        for record in item.journal:
            if isinstance(record, Incarnation):
                last = max(last, record.incarnation)
            elif isinstance(record, Begin):
                begun[record.event] = record
                if record.parent:
                    children.setdefault(record.parent, []).append(record)
            elif isinstance(record, Promised):
                promised[record.event] = record
            elif isinstance(record, Decide):
                decided[record.event] = record
            elif isinstance(record, Outcome):
                ended[record.event] = record
            elif isinstance(record, EpochIssued):
                self.registry.issue(record.address, record.epoch, record.register, True)
        self.incarnation = item.incarnation or last + 1
        self.moves.incarnation = self.incarnation
        self.timers.set(("restored", 0, 0), now + self.spec.config.dead_ns)
        self.fanouts.incarnation = self.incarnation
        self.members.incarnation = self.incarnation
        out.append(Journal(Incarnation(self.incarnation)))
        for number, begin in begun.items():
            request = begin.request
            if isinstance(request, MoveRequest):
                self.moves.name_event(number, request)
            outcome = ended.get(number)
            if isinstance(request, PinRequest):
                if outcome is None:
                    self.fanouts.keep(now, number, request)
                continue
            if outcome is not None:
                self.moves.remember(now, outcome)
            elif number in decided:
                self.moves.recover(now, begin, decided[number], out)
            else:
                # Begin alone: presumed abort.
                told = promised.get(number)
                moved = moved_by(children.get(number, []), decided, ended)
                outcome = Outcome(
                    number, FAILED, "controller_restarted", sum(moved.values()), len(moved),
                    promised=told.num_tokens if told else 0,
                )
                self.moves.remember(now, outcome)
                out.append(Journal(outcome))

    # ---- clients
    def on_move(self, now: int, src: str, m: MoveRequest, out: List[Effect]) -> None:
        if m.idem and m.idem in self.moves.by_idem:
            self._again(src, m, out)
            return
        if len(self.moves.events) >= self.spec.config.events_max:
            out.append(Send(src, Answer(m.op, "refused", reason="busy", detail=f"{len(self.moves.events)} events")))
            return
        sources, reason, detail = self.registry.place(m.src)
        if sources is not None:
            destinations, reason, detail = self.registry.place(m.dst)
        if sources is None or destinations is None:
            out.append(Send(src, Answer(m.op, "refused", reason=reason, detail=detail)))
            return
        difference = namespace_mismatch(sources[0].space(m.src[1]), destinations[0].space(m.dst[1]))
        why = ("mismatch", f"source {difference[0]}; destination {difference[1]}") if difference else ("", "")
        if difference or m.keys:
            self.moves.begin(now, src, m, sources, destinations, why, out)
        else:
            self.drains.begin(now, src, m, self.registry.chains(m.src), out)

    def _again(self, src: str, m: MoveRequest, out: List[Effect]) -> None:
        """The same idempotency key: the same answer, and never a second move."""
        first = self.moves.requests[m.idem]
        number = self.moves.by_idem[m.idem]
        difference = other_request(first, m)
        if difference:
            detail = f"{m.idem!r} was given for event {event_name(number)} before, with another request: {difference}"
            out.append(Send(src, Answer(m.op, "refused", 0, 0, "idempotency_key_reused", detail)))
            return
        event = self.moves.events.get(number)
        if event is not None:
            event.clients.append((src, m.op))
            if event.state in (COPYING, RELEASING):
                out.append(Send(src, self.moves.answer(number, m.op)))
        elif number in self.drains.open:
            self.drains.open[number].waiters.append((src, m.op))
            out.append(Send(src, self.drains.answer(number, m.op)))
        else:
            self.moves.answer_again(src, number, m.op, out)

    def on_lookup(self, now: int, src: str, m: LookupRequest, out: List[Effect]) -> None:
        out.append(Send(src, Answer(m.op, "ok", found=self.registry.lookup(m.keys, m.lens))))

    def on_status(self, now: int, src: str, m: StatusRequest, out: List[Effect]) -> None:
        number = self.moves.by_idem.get(m.idem, 0) if m.idem else m.event
        event = self.moves.events.get(number)
        if m.wait and event is not None:
            event.waiters.append((src, m.op))
        elif m.wait and number in self.drains.open:
            self.drains.open[number].waiters.append((src, m.op))
        elif number in self.drains.open:
            out.append(Send(src, self.drains.answer(number, m.op)))
        else:
            out.append(Send(src, self.moves.answer(number, m.op)))

    def on_cancel(self, now: int, src: str, m: CancelRequest, out: List[Effect]) -> None:
        drain = self.drains.open.get(m.event)
        event = self.moves.events.get(m.event)
        if drain is not None:
            self.drains.cancel(now, drain, out)
            if m.event in self.drains.open:  # chains that have been decided go on to their ends; no other begins
                out.append(Send(src, self.drains.answer(m.event, m.op)))
                return
        elif event is not None and event.state != RELEASING:
            self.moves.fail(now, event, "cancelled", out)
        elif event is not None:
            answer = self.moves.answer(m.event, m.op)
            out.append(Send(src, Answer(m.op, answer.state, answer.num_tokens, m.event, "too_late", n=answer.n)))
            return
        out.append(Send(src, self.moves.answer(m.event, m.op)))

    def _fanout(
        self, now: int, src: str, op: str, kind: str, position: Position, number: int, out: List[Effect]
    ) -> Optional[Fanout]:
        ranks, reason, detail = self.registry.place(position)
        if ranks is None:
            out.append(Send(src, Answer(op, "refused", reason=reason, detail=detail)))
            return None
        addresses = [rank.address for rank in ranks]
        return Fanout(kind, number or self.moves.new_event(), src, op, position[1], addresses)

    def on_pin(self, now: int, src: str, m: PinRequest, out: List[Effect]) -> None:
        request = m
        if m.event:
            earlier = self.fanouts.pins.get(m.event)
            if earlier is None or m.event in self.fanouts.open:
                reason = "in_progress" if earlier is not None else "unknown_event"
                out.append(Send(src, Answer(m.op, "refused", 0, m.event, reason)))
                return
            request = earlier
        fanout = self._fanout(now, src, m.op, "pin", request.position, m.event, out)
        if fanout is not None:
            lease_ns = m.lease_ns or request.lease_ns or self.spec.config.hold_ns
            fanout.request = PinRequest(m.op, request.position, request.keys, request.lens, lease_ns)
            self.fanouts.start(now, fanout, out)

    def on_unpin(self, now: int, src: str, m: UnpinRequest, out: List[Effect]) -> None:
        pin = self.fanouts.pins.get(m.event)
        if pin is None or m.event in self.fanouts.open:
            reason = "in_progress" if pin is not None else "unknown_event"
            out.append(Send(src, Answer(m.op, "refused", 0, m.event, reason)))
            return
        fanout = self._fanout(now, src, m.op, "unpin", pin.position, m.event, out)
        if fanout is not None:
            self.fanouts.start(now, fanout, out)

    def on_clear(self, now: int, src: str, m: ClearRequest, out: List[Effect]) -> None:
        fanout = self._fanout(now, src, m.op, "clear", m.position, 0, out)
        if fanout is not None:
            self.fanouts.start(now, fanout, out)

    def pending(self) -> List[str]:
        lines = [f"event {event.number & 0xFFFFFFFF} is {event.state}" for event in self.moves.events.values()]
        lines += [f"drain {number & 0xFFFFFFFF} at chain {drain.next}" for number, drain in self.drains.open.items()]
        lines += [f"{fanout.kind} {fanout.op} waits" for fanout in self.fanouts.open.values()]
        return lines + [f"probing for {who[0]}/{who[1]}" for who in self.members.probing]
