"""Machine: the controller. Registry, coordinators, and the clients that ask."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional, Tuple, final

from kvcore.protocol.chunks import namespace_mismatch
from kvcore.protocol.config import ControllerSpec
from kvcore.protocol.coordinator import COPYING, DONE, FAILED, RELEASING, Coordinator, Event
from kvcore.protocol.drain import Drain
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
    ProtocolError,
    Received,
    Send,
    TimerFired,
    TimerName,
)
from kvcore.protocol.messages import (
    Alive,
    Answer,
    Beat,
    CancelRequest,
    Cleared,
    ClearRequest,
    Committed,
    Delta,
    Expelled,
    Held,
    LookupRequest,
    MoveRequest,
    PeerGone,
    Pinned,
    PinRequest,
    Position,
    Probe,
    Refused,
    Register,
    Registered,
    RegisterRefused,
    Released,
    Reserved,
    Resync,
    Snap,
    StatusRequest,
    Suspect,
    UnpinRequest,
    event_id,
)
from kvcore.protocol.registry import Rank, Registry, View

VERSION = 1


@final
class Probing:
    """A second process claims a place: is the first one still there?"""

    def __init__(self, number: int, address: str, register: Register, known: Rank, until_ns: int) -> None:
        self.number: int = number
        self.address: str = address
        self.register: Register = register
        self.known: Rank = known
        self.until_ns: int = until_ns


@final
class Controller(Machine):
    def __init__(self, spec: ControllerSpec) -> None:
        super().__init__()
        config = spec.config
        self.spec: ControllerSpec = spec
        self.incarnation: int = 0
        self.epochs: int = 0
        self.registry: Registry = Registry(config)
        self.moves: Coordinator = Coordinator(self.registry, self.timers, config)
        self.fanouts: Fanouts = Fanouts(self.registry, self.timers, config)
        self.drains: Dict[int, Drain] = {}
        #: child move -> its drain
        self.parents: Dict[int, int] = {}
        self.probing: Dict[Tuple[str, int], Probing] = {}
        self.on_message: Dict[Any, Callable[[int, str, Any, List[Effect]], None]] = {}
        self.on_timer: Dict[str, Callable[[int, TimerName, List[Effect]], None]] = {}
        self.wire()

    def wire(self) -> None:
        """Fill the dispatch tables (again, after the machine has been copied without them)."""
        moves = self.moves
        moves.on_ended = self.on_child_ended
        self.on_message = {
            Pinned: moves.on_pinned,
            Reserved: moves.on_reserved,
            Committed: moves.on_committed,
            Refused: moves.on_refused,
            Released: moves.on_released,
            Register: self.on_register,
            Alive: self.on_alive,
            Beat: self.on_beat,
            Delta: self.on_delta,
            Snap: self.on_snap,
            Suspect: self.on_suspect,
            Cleared: self.on_cleared,
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
            "dead": self.on_dead_timer,
            "restored": self.on_restored_timer,
            "probe": self.on_probe_timer,
        }

    def handle(self, now: int, item: Input) -> List[Effect]:
        out: List[Effect] = []
        ran: List[TimerName] = []
        heap = self.timers.heap
        if heap and heap[0][0] <= now and self.spec.config.rules.h37:
            name = self.timers.pop_due(now)
            while name is not None:
                ran.append(name)
                self.on_timer[name[0]](now, name, out)
                name = self.timers.pop_due(now)
        kind = type(item)
        if kind is Received:
            message = item.msg  # type: ignore[union-attr]
            handler = self.on_message.get(type(message))
            if handler is not None:
                handler(now, item.src, message, out)  # type: ignore[union-attr]
            else:
                out.append(Note("unexpected", 0, f"{type(message).__name__} from {item.src}"))  # type: ignore[union-attr]
        elif kind is TimerFired:
            fired = item.name  # type: ignore[union-attr]
            # One that was due has run already, and is armed again if it is periodic.
            if fired not in ran and self.timers.armed(fired):
                self.timers.cancel(fired)
                self.on_timer[fired[0]](now, fired, out)
        elif kind is Boot:
            self.on_boot(now, item, out)  # type: ignore[arg-type]
        else:
            raise ProtocolError(f"{self.spec.name}: a controller has no input {kind.__name__}")
        return out

    # ---- birth
    def on_boot(self, now: int, item: Boot, out: List[Effect]) -> None:
        last = 0
        begun: Dict[int, Begin] = {}
        decided: Dict[int, Decide] = {}
        ended: Dict[int, Outcome] = {}
        for record in item.journal:
            if isinstance(record, Incarnation):
                last = max(last, record.incarnation)
            elif isinstance(record, Begin):
                begun[record.event] = record
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
        out.append(Journal(Incarnation(self.incarnation)))
        for number, begin in begun.items():
            request = begin.request
            if isinstance(request, MoveRequest):
                self.moves.name_event(number, request)
            outcome = ended.get(number)
            if outcome is not None:
                self.moves.remember(now, outcome)
            elif number in decided:
                self.moves.recover(now, begin, decided[number], out)
            else:
                # Begin alone: presumed abort.
                outcome = Outcome(number, FAILED, "controller_restarted")
                self.moves.remember(now, outcome)
                out.append(Journal(outcome))

    # ---- registration
    def on_register(self, now: int, src: str, m: Register, out: List[Effect]) -> None:
        if m.version != VERSION:
            self._refuse(src, m, "version", str(VERSION), str(m.version), out)
            return
        known = self.registry.ranks.get((m.instance, m.rank))
        difference = self._difference(m)
        if difference is not None:
            self._refuse(src, m, "mismatch", difference[0], difference[1], out)
        elif known is not None and known.register.nonce == m.nonce and known.address == src:
            out.append(Send(src, Registered(self.incarnation, m.nonce, known.epoch)))
        elif known is not None:
            self._probe(now, src, m, known, out)
        else:
            self._issue(now, src, m, out)

    def _difference(self, m: Register) -> Optional[Tuple[str, str]]:
        """All ranks of an instance have one namespace: both sides' values where another believed rank differs."""
        for rank in range(m.namespace.ranks):
            other = self.registry.ranks.get((m.instance, rank))
            if other is not None and rank != m.rank:
                return namespace_mismatch(other.register.namespace, m.namespace)
        return None

    def _refuse(self, src: str, m: Register, why: str, have: str, got: str, out: List[Effect]) -> None:
        out.append(Send(src, RegisterRefused(self.incarnation, m.nonce, why, have, got)))
        out.append(Note("register_refused", 0, f"{m.instance} rank {m.rank} at {src}: {why}, have {have}, got {got}"))

    def _issue(self, now: int, src: str, m: Register, out: List[Effect]) -> None:
        for rank in self.registry.waiting.get(self.registry.number(m), []):
            if rank.address == src and rank.register.nonce == m.nonce and rank.epoch >> 32 == self.incarnation:
                out.append(Send(src, Registered(self.incarnation, m.nonce, rank.epoch)))
                return
        self.epochs += 1
        epoch = event_id(self.incarnation, self.epochs)
        rank = self.registry.issue(src, epoch, m, False)
        out.append(Journal(EpochIssued(src, epoch, m)))
        out.append(Send(src, Registered(self.incarnation, m.nonce, epoch)))
        if not self.spec.config.rules.h32:
            self._believe(now, rank, out)

    def _probe(self, now: int, src: str, m: Register, known: Rank, out: List[Effect]) -> None:
        who = (m.instance, m.rank)
        probing = self.probing.get(who)
        if probing is None:
            probing = Probing(known.number, src, m, known, now + 3 * self.spec.config.retry_ns)
            self.probing[who] = probing
            self.timers.set(("probe", known.number, 0), probing.until_ns)
        if probing.address == src:
            out.append(Send(known.address, Probe(self.incarnation, m.nonce)))

    def on_alive(self, now: int, src: str, m: Alive, out: List[Effect]) -> None:
        for who, probing in list(self.probing.items()):
            if probing.register.nonce != m.nonce or probing.known.address != src:
                continue
            if m.epoch == probing.known.epoch:
                self._probed(who, probing)
                since = f"{src}, since {probing.known.register.since_ns} ns"
                self._refuse(probing.address, probing.register, "duplicate_id", since, probing.address, out)
            elif m.mine == probing.register.nonce:
                # The claimant itself answers at the known address: the one before it is gone.
                self._probed(who, probing)
                self._issue(now, probing.address, probing.register, out)

    def on_probe_timer(self, now: int, name: TimerName, out: List[Effect]) -> None:
        for who, probing in list(self.probing.items()):
            if probing.number == name[1]:
                self._probed(who, probing)
                self._issue(now, probing.address, probing.register, out)

    def _probed(self, who: Tuple[str, int], probing: Probing) -> None:
        del self.probing[who]
        self.timers.cancel(("probe", probing.number, 0))

    def _believe(self, now: int, rank: Rank, out: List[Effect]) -> None:
        old = self.registry.ranks.get((rank.register.instance, rank.register.rank))
        if old is not None:
            # Under another address it may be another process, and the old one merely not heard of.
            self._out(now, old, "restarted" if old.address == rank.address else "replaced", out)
        who = (rank.register.instance, rank.register.rank)
        probing = self.probing.get(who)
        if probing is not None and probing.register.nonce == rank.register.nonce:
            # A double of the Register that it once sent: the claim is settled, and must not bring a second epoch.
            self._probed(who, probing)
        self.registry.believe(now, rank)
        self.timers.set(("dead", rank.number, 0), now + self.spec.config.dead_ns)
        out.append(Note("believed", rank.epoch, rank.address))

    def _out(self, now: int, rank: Rank, why: str, out: List[Effect]) -> None:
        """A process is not believed any more."""
        self.registry.drop(rank)
        self.timers.cancel(("dead", rank.number, 0))
        self.moves.participant_changed(now, rank.address, "", why, out)
        self.fanouts.participant_changed(rank.address, out)

    def on_dead_timer(self, now: int, name: TimerName, out: List[Effect]) -> None:
        for rank in self.registry.ranks.values():
            if rank.number == name[1]:
                out.append(Note("dead", rank.epoch, rank.address))
                self._out(now, rank, "dead", out)
                return

    def on_restored_timer(self, now: int, name: TimerName, out: List[Effect]) -> None:
        """Whoever the journal knew and who has not been heard since is not waited for any longer."""
        self.registry.forget_issued_before(event_id(self.incarnation, 0))

    def on_suspect(self, now: int, src: str, m: Suspect, out: List[Effect]) -> None:
        rank = self.registry.by_address.get(m.peer)
        if (rank is None or rank.epoch != m.epoch) and (m.peer, m.epoch) not in self.registry.issued:
            out.append(Send(src, PeerGone(self.incarnation, m.peer, m.epoch)))

    # ---- inventories
    def on_beat(self, now: int, src: str, m: Beat, out: List[Effect]) -> None:
        rank = self.registry.by_address.get(src)
        if rank is None or rank.epoch != m.epoch:
            issued = self.registry.issued.get((src, m.epoch))
            if issued is None or (rank is not None and rank.epoch > m.epoch):
                out.append(Send(src, Expelled(self.incarnation, m.epoch)))
                return
            if self._difference(issued.register) is not None:
                # Its mates were believed meanwhile, and differ: it learns why when it registers anew.
                self.registry.forget_issued(issued)
                out.append(Send(src, Expelled(self.incarnation, m.epoch)))
                return
            rank = issued
            self._believe(now, rank, out)
        else:
            rank.heard_ns = now
            self.timers.set(("dead", rank.number, 0), now + self.spec.config.dead_ns)
        for item in m.locations:
            view = rank.views.get(item.location)
            if view is not None and item.inc > view.inc:
                self._new_inc(now, src, item.location, view, item.inc, out)
        for location in self.registry.beat(rank, m):
            out.append(Send(src, Resync(self.incarnation, location)))

    def _new_inc(self, now: int, src: str, location: str, view: View, inc: Tuple[int, int], out: List[Effect]) -> None:
        """The location has been cleared; or I have been restarted and hear of it for the first time."""
        known = view.inc[1] >= 0
        self.registry.reset(view, inc)
        if known:
            self.moves.participant_changed(now, src, location, "cleared", out)

    def _view(self, src: str, location: str, inc: Tuple[int, int]) -> Optional[View]:
        rank = self.registry.by_address.get(src)
        if rank is None or rank.epoch != inc[0]:
            return None
        return rank.views.get(location)

    def on_delta(self, now: int, src: str, m: Delta, out: List[Effect]) -> None:
        view = self._view(src, m.location, m.inc)
        if view is None:
            out.append(Note("stale_epoch", 0, f"Delta from {src}"))
            return
        if m.inc > view.inc:
            self._new_inc(now, src, m.location, view, m.inc, out)
        if not self.registry.delta(view, m):
            out.append(Send(src, Resync(self.incarnation, m.location)))

    def on_snap(self, now: int, src: str, m: Snap, out: List[Effect]) -> None:
        view = self._view(src, m.location, m.inc)
        if view is None:
            out.append(Note("stale_epoch", 0, f"Snap from {src}"))
            return
        if m.inc > view.inc:
            self._new_inc(now, src, m.location, view, m.inc, out)
        self.registry.snap(view, m)

    def on_cleared(self, now: int, src: str, m: Cleared, out: List[Effect]) -> None:
        view = self._view(src, m.location, m.inc)
        if view is not None and m.inc > view.inc:
            self._new_inc(now, src, m.location, view, m.inc, out)
        self.fanouts.on_cleared(now, src, m, out)

    # ---- clients
    def _place(self, position: Position) -> Tuple[Optional[List[Rank]], str, str]:
        """(ranks, reason, detail): the ranks of a position, or why there are none, naming what is known."""
        ranks = self.registry.instance(position[0])
        if ranks is None:
            known = ", ".join(self.registry.instances())
            return None, "unknown_instance", f"{position[0]!r} is not here; known: {known or 'none'}"
        for rank in ranks:
            if position[1] not in rank.views:
                known = ", ".join(rank.views)
                return None, "unknown_location", f"{position[1]!r} is not at {position[0]}; known: {known}"
        return ranks, "", ""

    def on_move(self, now: int, src: str, m: MoveRequest, out: List[Effect]) -> None:
        if m.idem and m.idem in self.moves.by_idem:
            self._again(src, m, out)
            return
        sources, reason, detail = self._place(m.src)
        if sources is not None:
            destinations, reason, detail = self._place(m.dst)
        if sources is None or destinations is None:
            out.append(Send(src, Answer(m.op, "refused", reason=reason, detail=detail)))
            return
        difference = namespace_mismatch(sources[0].register.namespace, destinations[0].register.namespace)
        why = ("mismatch", f"source {difference[0]}; destination {difference[1]}") if difference else ("", "")
        if m.keys or difference:
            self.moves.begin(now, src, m, sources, destinations, why, out)
        else:
            self._drain(now, src, m, out)

    def _again(self, src: str, m: MoveRequest, out: List[Effect]) -> None:
        """The same idempotency key: the same answer, and never a second move."""
        first = self.moves.requests[m.idem]
        if (first.src, first.dst, first.keys, first.copy) != (m.src, m.dst, m.keys, m.copy):
            out.append(Send(src, Answer(m.op, "refused", reason="idempotency_key_reused", detail=m.idem)))
            return
        number = self.moves.by_idem[m.idem]
        event = self.moves.events.get(number)
        if event is not None:
            event.clients.append((src, m.op))
            if event.state in (COPYING, RELEASING):
                out.append(Send(src, self.moves.answer(number, m.op)))
        elif number in self.drains:
            self.drains[number].waiters.append((src, m.op))
            out.append(Send(src, self._draining(number, m.op)))
        else:
            out.append(Send(src, self.moves.answer(number, m.op)))

    def _draining(self, number: int, op: str) -> Answer:
        drain = self.drains[number]
        return Answer(op, COPYING, drain.num_tokens(), number, drain.cancelled)

    def on_lookup(self, now: int, src: str, m: LookupRequest, out: List[Effect]) -> None:
        out.append(Send(src, Answer(m.op, "ok", found=self.registry.lookup(m.keys, m.lens))))

    def on_status(self, now: int, src: str, m: StatusRequest, out: List[Effect]) -> None:
        number = self.moves.by_idem.get(m.idem, 0) if m.idem else m.event
        event = self.moves.events.get(number)
        if m.wait and event is not None:
            event.waiters.append((src, m.op))
        elif m.wait and number in self.drains:
            self.drains[number].waiters.append((src, m.op))
        elif number in self.drains:
            out.append(Send(src, self._draining(number, m.op)))
        else:
            out.append(Send(src, self.moves.answer(number, m.op)))

    def on_cancel(self, now: int, src: str, m: CancelRequest, out: List[Effect]) -> None:
        drain = self.drains.get(m.event)
        event = self.moves.events.get(drain.child if drain is not None else m.event)
        if drain is not None:
            drain.cancelled = "cancelled"
        if event is not None and event.state != RELEASING:
            self.moves.fail(now, event, "cancelled", out)
        elif drain is not None:
            # The chain that runs has been decided; no other begins.
            out.append(Send(src, self._draining(m.event, m.op)))
            return
        elif event is not None:
            answer = self.moves.answer(m.event, m.op)
            out.append(Send(src, Answer(m.op, answer.state, answer.num_tokens, m.event, "too_late", n=answer.n)))
            return
        out.append(Send(src, self.moves.answer(m.event, m.op)))

    def _fanout(
        self, now: int, src: str, op: str, kind: str, position: Position, out: List[Effect]
    ) -> Optional[Fanout]:
        ranks, reason, detail = self._place(position)
        if ranks is None:
            out.append(Send(src, Answer(op, "refused", reason=reason, detail=detail)))
            return None
        return Fanout(kind, self.moves.new_event(), src, op, position[1], [rank.address for rank in ranks])

    def on_pin(self, now: int, src: str, m: PinRequest, out: List[Effect]) -> None:
        fanout = self._fanout(now, src, m.op, "pin", m.position, out)
        if fanout is not None:
            fanout.keys = m.keys
            fanout.lens = m.lens
            fanout.lease_ns = m.lease_ns or self.spec.config.hold_ns
            self.fanouts.start(now, fanout, out)

    def on_unpin(self, now: int, src: str, m: UnpinRequest, out: List[Effect]) -> None:
        ranks = self.fanouts.pins.get(m.event)
        if ranks is None or m.event in self.fanouts.open:
            reason = "unknown_event" if ranks is None else "in_progress"
            out.append(Send(src, Answer(m.op, "refused", 0, m.event, reason)))
        else:
            self.fanouts.start(now, Fanout("unpin", m.event, src, m.op, "", ranks), out)

    def on_clear(self, now: int, src: str, m: ClearRequest, out: List[Effect]) -> None:
        fanout = self._fanout(now, src, m.op, "clear", m.position, out)
        if fanout is not None:
            self.fanouts.start(now, fanout, out)

    # ---- drains
    def _drain(self, now: int, src: str, m: MoveRequest, out: List[Effect]) -> None:
        number = self.moves.new_event()
        out.append(Journal(Begin(number, m)))
        self.moves.name_event(number, m)
        deadline_ns = now + (m.deadline_ns or self.spec.config.deadline_ns)
        drain = Drain(number, m, src, self.registry.chains(m.src), deadline_ns)
        orphans = self.registry.count(m.src) - len(drain.planned)
        if orphans:
            drain.left.append(f"{orphans} chunks: some rank lacks them or an ancestor")
        self.drains[number] = drain
        out.append(Send(src, Answer(m.op, COPYING, drain.num_tokens(), number)))
        self._drain_on(now, drain, out)

    def _drain_on(self, now: int, drain: Drain, out: List[Effect]) -> None:
        m = drain.request
        while drain.next < len(drain.chains) and not drain.cancelled:
            sources, reason, detail = self._place(m.src)
            destinations = None
            if sources is not None:
                destinations, reason, detail = self._place(m.dst)
            if sources is None or destinations is None or now >= drain.deadline_ns:
                drain.cancelled = reason or "deadline"
                break
            keys, lens = drain.chains[drain.next]
            drain.next += 1
            left_ns = drain.deadline_ns - now
            child = MoveRequest(f"{m.op}/{drain.next}", m.src, m.dst, keys, lens, m.copy, "", left_ns, m.evict)
            event = self.moves.begin(now, "", child, sources, destinations, ("", ""), out)
            self.parents[event.number] = drain.number
            drain.child = event.number
            return
        self._drained(now, drain, out)

    def on_child_ended(self, now: int, event: Event, out: List[Effect]) -> None:
        number = self.parents.pop(event.number, 0)
        drain = self.drains.get(number)
        if drain is None:
            return
        kept = max([item.kept for item in event.released if item is not None] or [0])
        why = next((item.why for item in event.released if item is not None and item.kept), "")
        drain.child_ended(event.request, event.state, event.reason, event.n, kept, why)
        self._drain_on(now, drain, out)

    def _drained(self, now: int, drain: Drain, out: List[Effect]) -> None:
        del self.drains[drain.number]
        if drain.cancelled:
            left = len(drain.chains) - drain.next
            drain.left.append(f"{left} chains not begun: {drain.cancelled}")
        tokens = sum(drain.moved.values())
        state = FAILED if drain.left or not drain.planned else DONE
        reason = (drain.cancelled or "incomplete") if drain.left else "" if drain.planned else "nothing_held"
        outcome = Outcome(drain.number, state, reason, tokens, len(drain.moved), (), "; ".join(drain.left[:8]))
        self.moves.remember(now, outcome)
        out.append(Journal(outcome))
        for client, op in [(drain.client, drain.request.op), *drain.waiters]:
            out.append(Send(client, self.moves.answer(drain.number, op)))

    def pending(self) -> List[str]:
        lines = [f"event {event.number & 0xFFFFFFFF} is {event.state}" for event in self.moves.events.values()]
        lines += [f"drain {number & 0xFFFFFFFF} at chain {drain.next}" for number, drain in self.drains.items()]
        lines += [f"{fanout.kind} {fanout.op} waits" for fanout in self.fanouts.open.values()]
        return lines + [f"probing for {who[0]}/{who[1]}" for who in self.probing]
