"""Machine: one rank of one instance. Pools, and what sources, destinations and engines do with them.

A worker answers; only the controller retransmits. Timers: its registration and beat, a pin's lease, a user pin's
lease, a reservation's end, a quarantine's Stop, a retention's lease.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Tuple, final

from kvcore.protocol.config import WorkerSpec, unusual
from kvcore.protocol.destination import Destination
from kvcore.protocol.engine import Engine
from kvcore.protocol.machine import (
    Boot,
    CloseWindow,
    Command,
    CopyDone,
    CopyMoved,
    CopyStopped,
    Effect,
    FillDone,
    Input,
    Machine,
    Note,
    ProtocolError,
    ReadDone,
    Received,
    Send,
    TimerFired,
    TimerName,
    WindowClosed,
)
from kvcore.protocol.messages import (
    Alive,
    Beat,
    Clear,
    Cleared,
    End,
    Expelled,
    Fence,
    Fenced,
    Fetch,
    Hold,
    LocationSeq,
    Moved,
    PeerGone,
    Pin,
    Probe,
    Push,
    Pushed,
    Register,
    Registered,
    RegisterRefused,
    Release,
    Renew,
    Resync,
    Retain,
    Snap,
    Stop,
    Stopped,
    StoreRequest,
    Unhold,
    UseRequest,
)
from kvcore.protocol.pool import Pool
from kvcore.protocol.source import Source

REGISTER: TimerName = ("register", 0, 0)
BEAT: TimerName = ("beat", 0, 0)


@final
class Worker(Machine):
    def __init__(self, spec: WorkerSpec) -> None:
        super().__init__()
        config = spec.config
        self.spec: WorkerSpec = spec
        self.epoch: int = 0
        #: highest epoch that was ever mine: an old Registered that arrives late is not believed
        self.last_epoch: int = 0
        self.nonce: int = 0
        self.endpoint: str = ""
        self.born_ns: int = 0
        self.refused: str = ""
        self.constants: Tuple[Tuple[str, int], ...] = unusual(config)
        #: highest incarnation of a controller that I have heard
        self.incarnation: int = 0
        self.pools: Dict[str, Pool] = {p.name: Pool(p.name, p.slots, config.rules) for p in spec.locations}
        self.pool_list: List[Pool] = list(self.pools.values())
        self.source: Source = Source(self.pools, self.timers, config)
        self.destination: Destination = Destination(spec.name, spec.controller, self.pools, self.timers, config)
        self.engine: Engine = Engine(self.pools, self.timers, config)
        self.on_message: Dict[Any, Callable[[int, str, Any, List[Effect]], None]] = {}
        #: what a process without an epoch handles too; an engine needs no controller to store and use
        self.on_birth: Dict[Any, Callable[[int, str, Any, List[Effect]], None]] = {}
        self.on_input: Dict[Any, Callable[[int, Any, List[Effect]], None]] = {}
        #: messages that carry an incarnation
        self.commands: Dict[Any, bool] = {}
        self.wire()

    def wire(self) -> None:
        """Fill the dispatch tables (again, after the machine has been copied without them)."""
        source = self.source
        destination = self.destination
        engine = self.engine
        self.on_message = {
            Pin: source.on_pin,
            Renew: source.on_renew,
            Release: source.on_release,
            Fence: source.on_fence,
            Push: source.on_push,
            Stop: source.on_stop,
            Fetch: destination.on_fetch,
            Retain: destination.on_retain,
            End: destination.on_end,
            Fenced: destination.on_fenced,
            Moved: destination.on_moved,
            Pushed: destination.on_pushed,
            Stopped: destination.on_stopped,
            Hold: engine.on_hold,
            Unhold: engine.on_unhold,
            Clear: self.on_clear,
            Resync: self.on_resync,
            PeerGone: self.on_peer_gone,
        }
        self.on_birth = {
            Registered: self.on_registered,
            RegisterRefused: self.on_register_refused,
            Probe: self.on_probe,
            Expelled: self.on_expelled,
            StoreRequest: engine.on_store,
            UseRequest: engine.on_use,
        }
        self.on_input = {
            Boot: self.on_boot,
            CopyDone: self.on_copy_done,
            CopyMoved: self.on_copy_moved,
            CopyStopped: self.on_copy_stopped,
            FillDone: engine.on_fill_done,
            ReadDone: engine.on_read_done,
            WindowClosed: self.on_window_closed,
            Command: self.on_command,
        }
        self.on_timer = {
            "register": self.on_register_timer,
            "beat": self.on_beat_timer,
            "lease": source.on_lease,
            "hold": engine.on_hold_timer,
            "reservation": destination.on_reservation_timer,
            "quarantine": destination.on_quarantine_timer,
            "retention": destination.on_retention_timer,
        }
        kinds = [*self.on_message, *self.on_birth]
        self.commands = {kind: True for kind in kinds if "incarnation" in kind.__struct_fields__}

    def handle(self, now: int, item: Input) -> List[Effect]:
        out: List[Effect] = []
        heap = self.timers.heap
        ran = bool(heap) and heap[0][0] <= now and self.spec.config.rules.h37 and self.run_due(now, out)
        kind = type(item)
        if kind is Received:
            self._received(now, item.src, item.msg, out)  # type: ignore[union-attr]
        elif kind is TimerFired:
            if not ran:  # else it has run, and may be armed again
                self.fire(now, item.name, out)  # type: ignore[union-attr]
        else:
            handler = self.on_input.get(kind)
            if handler is None:
                raise ProtocolError(f"{self.spec.name}: a worker has no input {kind.__name__}")
            handler(now, item, out)
        for pool in self.pool_list:
            if pool.adds or pool.drops:
                # Before all else, so that whoever hears of a commit finds it in the view.
                out.insert(0, Send(self.spec.controller, pool.delta()))
        return out

    def _received(self, now: int, src: str, m: Any, out: List[Effect]) -> None:
        kind = type(m)
        handler = self.on_message.get(kind)
        if handler is None or not self.epoch:
            early = self.on_birth.get(kind)
            if early is None:
                why = "unexpected" if handler is None else "no_epoch"
                out.append(Note(why, 0, f"{kind.__name__} from {src}"))
                return
            handler = early
        # Whatever carries an incarnation comes from a controller; one that has been succeeded is not obeyed (H28).
        if kind in self.commands:
            incarnation = m.incarnation
            if incarnation < self.incarnation and self.spec.config.rules.h28:
                out.append(Note("stale_incarnation", getattr(m, "event", 0), kind.__name__))
                return
            self.incarnation = incarnation
        handler(now, src, m, out)

    # ---- birth
    def on_boot(self, now: int, item: Boot, out: List[Effect]) -> None:
        self.nonce = item.nonce
        self.endpoint = self.destination.endpoint = item.endpoint
        self.born_ns = now
        self.on_register_timer(now, REGISTER, out)

    def on_register_timer(self, now: int, name: TimerName, out: List[Effect]) -> None:
        spec = self.spec
        out.append(
            Send(
                spec.controller,
                Register(
                    spec.instance,
                    spec.rank,
                    self.nonce,
                    spec.namespace,
                    spec.locations,
                    self.endpoint,
                    self.born_ns,
                    constants=self.constants,
                    direction=spec.config.direction,
                    measured=spec.measured,
                ),
            )
        )
        self.timers.set(REGISTER, now + spec.config.retry_ns)

    def on_registered(self, now: int, src: str, m: Registered, out: List[Effect]) -> None:
        if m.nonce != self.nonce or m.epoch <= self.last_epoch:
            return
        self.source.restart(m.epoch, out)
        self.destination.restart(now, m.epoch, out)
        self.epoch = self.last_epoch = m.epoch
        self.refused = ""
        for pool in self.pool_list:
            # A view of a new epoch starts empty at seq 0; whatever is still here must be asked for by a Resync.
            pool.inc = (m.epoch, pool.clears)
            pool.seq = 1 if pool.index else 0
            pool.adds.clear()
            pool.drops.clear()
        self.timers.cancel(REGISTER)
        out.append(Note("registered", m.epoch))
        self.on_beat_timer(now, BEAT, out)

    def on_register_refused(self, now: int, src: str, m: RegisterRefused, out: List[Effect]) -> None:
        if m.nonce == self.nonce and not self.epoch:
            self.refused = f"{m.why}: have {m.have}, got {m.got}"
            if m.why != "mismatch":
                # Mates that differ may be about to go (an instance that restarts with other weights): ask on.
                self.timers.cancel(REGISTER)
            out.append(Note("register_refused", 0, self.refused))

    def on_probe(self, now: int, src: str, m: Probe, out: List[Effect]) -> None:
        out.append(Send(src, Alive(m.nonce, self.epoch, self.nonce)))

    def on_expelled(self, now: int, src: str, m: Expelled, out: List[Effect]) -> None:
        if m.epoch == self.epoch and self.epoch:
            # Alive, but not believed any more: keep the bytes, take a new epoch. Until it comes nothing is answered.
            self.epoch = 0
            self.timers.cancel(BEAT)
            out.append(Note("expelled", m.epoch))
            self.source.restart(m.epoch, out)
            self.destination.restart(now, m.epoch, out)
            self.on_register_timer(now, REGISTER, out)

    # ---- inventory
    def on_beat_timer(self, now: int, name: TimerName, out: List[Effect]) -> None:
        seqs = tuple([LocationSeq(pool.name, pool.inc, pool.seq) for pool in self.pool_list])
        out.append(Send(self.spec.controller, Beat(self.epoch, seqs)))
        self.timers.set(BEAT, now + self.spec.config.beat_ns)

    def on_resync(self, now: int, src: str, m: Resync, out: List[Effect]) -> None:
        pool = self.pools.get(m.location)
        if pool is not None:
            out.append(Send(src, Snap(pool.name, pool.inc, pool.seq, pool.entries())))

    def on_clear(self, now: int, src: str, m: Clear, out: List[Effect]) -> None:
        pool = self.pools.get(m.location)
        if pool is None:
            return
        # A doubled Clear finds the incarnation raised already and empties nothing that came after it.
        if pool.inc == m.inc:
            self.destination.clear(now, pool, out)
            count = pool.clear()
            out.append(Note("cleared", m.event, f"{pool.name}: {count} chunks"))
        out.append(Send(src, Cleared(m.event, pool.name, pool.inc)))

    # ---- copies and windows
    def on_copy_done(self, now: int, item: CopyDone, out: List[Effect]) -> None:
        if not self.source.writer_ended(now, item, out):
            self.destination.on_copy_done(now, item, out)

    def on_copy_moved(self, now: int, item: CopyMoved, out: List[Effect]) -> None:
        if not self.source.on_copy_moved(item, out):
            self.destination.on_copy_moved(item, out)

    def on_copy_stopped(self, now: int, item: CopyStopped, out: List[Effect]) -> None:
        if not self.source.writer_ended(now, item, out):
            self.destination.end_quarantine(item.rid)

    def on_peer_gone(self, now: int, src: str, m: PeerGone, out: List[Effect]) -> None:
        if self.spec.config.rules.h30:
            out.append(CloseWindow(m.peer, m.epoch))

    def on_window_closed(self, now: int, item: WindowClosed, out: List[Effect]) -> None:
        self.destination.window_closed(item.peer, item.epoch)

    def on_command(self, now: int, item: Command, out: List[Effect]) -> None:
        """``full`` (location, on | off): an injected fault, nothing can be taken. ``unmount`` (location, on | off): all
        that is there is gone as well. ``evict`` (location): one chunk."""
        if item.what in ("full", "unmount"):
            pool = self.pools[item.args[0]]
            pool.full = item.args[1] == "on"
            if pool.full and item.what == "unmount":
                self._lose(now, pool, out)
        elif item.what == "evict":
            self.pools[item.args[0]].evict()
        else:
            raise ProtocolError(f"{self.spec.name}: a worker has no command {item.what}")

    def _lose(self, now: int, pool: Pool, out: List[Effect]) -> None:
        """Unlike a clear it takes the bytes: whatever pins them is over too."""
        self.destination.clear(now, pool, out)
        self.source.lose(pool)
        self.engine.lose(pool)
        out.append(Note("unmounted", 0, f"{pool.name}: {pool.clear()} chunks"))
        if self.epoch:
            self.on_beat_timer(now, BEAT, out)

    def pending(self) -> List[str]:
        source = self.source
        destination = self.destination
        lines = [f"registering{': refused, ' + self.refused if self.refused else ''}"] if self._unborn() else []
        lines += [f"pin of event {event}" for event in source.pins]
        lines += [f"writing for reservation {rid[1]} of {w.dst}" for rid, w in source.writers.items()]
        for event, r in destination.reservations.items():
            lines.append(f"reservation of event {event} is {'fencing' if r.fencing else 'copying'} from {r.src}")
        lines += [f"quarantine {rid[1]} waits for {q.src}" for rid, q in destination.quarantines.items()]
        lines += [f"retention of event {event}" for event in destination.retentions]
        return lines + self.engine.pending()

    def _unborn(self) -> bool:
        return not self.epoch and not self.refused
