"""What became of each event: built from the steps of the controller's machine, and from its journal after a restart.

``EventLog.step`` listens to the service. It keeps one record an event: where it is, what every rank and chunk came to,
how many bytes were copied and how long each phase took. Ended records are kept by count and age; what they need for an
answer is frozen, so that a long-lived controller's memory stays flat.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections import OrderedDict
from typing import Any, Callable, Dict, Final, Iterator, List, Optional, Protocol, Sequence, Set, Tuple

import msgspec
from msgspec import UNSET

from kvcore.protocol import machine as m
from kvcore.protocol.controller import Controller
from kvcore.protocol.coordinator import Event
from kvcore.protocol.drain import Drain
from kvcore.protocol.messages import Committed, MoveRequest, PinRequest, Released, SourceOutcome, event_name
from kvreal.http.models import ChunkOutcome, EventView, Progress, RankOutcome

ENDED: Final = frozenset({"done", "failed"})
STREAM_QUEUE: Final = 1_000
PRUNE_EVERY: Final = 64
MAX_CHILDREN: Final = 1_000
"""Chains of a drain that its event names; there may be more."""

Told = Tuple[str, object]
"""(kind, what): one message of the stream."""


class Keeper(Protocol):
    """Keeps ended events' records beside the journal, so that a restart loses no detail."""

    def keep(self, event: int, record: bytes) -> None: ...

    def kept(self) -> Sequence[Tuple[int, bytes]]: ...


class Record:
    """One event."""

    def __init__(self, number: int, kind: str, now: int, known: bool) -> None:
        self.number: int = number
        self.kind: str = kind
        self.state: str = "pinning"
        self.begun_ns: int = now if known else 0
        self.ended_ns: int = 0
        #: state -> when it was entered, ns
        self.entered: Dict[str, int] = {}
        self.request: Optional[MoveRequest] = None
        self.event: Optional[Event] = None
        self.outcome: Optional[m.Outcome] = None
        self.parent: int = 0
        self.children: List[int] = []
        self.drain: Optional[Drain] = None
        self.planned: int = 0
        self.bytes_per_token: List[int] = []
        #: rank -> positions that were at the destination before, positions that the source kept
        self.present: Dict[int, Tuple[int, ...]] = {}
        self.kept_at: Dict[int, Tuple[int, ...]] = {}
        self.committed: Dict[int, int] = {}
        self.lens: Tuple[int, ...] = ()
        self.decided_n: int = 0
        #: what the stream was last told
        self.told: str = ""
        #: once it has ended: without ranks and chunks, and all of it (JSON, compressed)
        self.frozen: Optional[EventView] = None
        self.whole: bytes = b""

    def enter(self, state: str, now: int) -> bool:
        """True if that is a new state."""
        if state == self.state and state in self.entered:
            return False
        self.state = state
        self.entered.setdefault(state, now)
        return True


class EventLog:
    def __init__(self, machine: Controller, keeper: Optional[Keeper] = None) -> None:
        self.machine: Controller = machine
        self.keeper: Optional[Keeper] = keeper
        self.records: OrderedDict[int, Record] = OrderedDict()
        self.waiting: Dict[int, Set[asyncio.Future[None]]] = {}
        self.streams: Set[asyncio.Queue[Optional[Told]]] = set()
        #: told of each ended event (metrics)
        self.on_ended: List[Callable[[EventView], None]] = []
        config = machine.spec.config
        self.keep_count: int = config.events_kept
        self.keep_ns: int = config.events_kept_ns
        self.begun: int = 0
        self._decode = msgspec.json.Decoder(EventView).decode

    # ---- listening
    def step(self, now: int, item: m.Input, effects: List[m.Effect]) -> None:
        """One step of the machine; called before its effects are carried out, in the same breath."""
        if isinstance(item, m.Boot):
            self._restore(now, item.journal)
        touched: Dict[int, None] = {}
        if isinstance(item, m.Received):
            message = item.msg
            if isinstance(message, Committed) and message.n:
                self._committed(item.src, message)
            elif isinstance(message, Released):
                self._released(item.src, message)
            number = getattr(message, "event", 0)
            if number in self.records:
                touched[number] = None
        for effect in effects:
            if isinstance(effect, m.Journal):
                self._journaled(now, effect.record, touched)
            elif isinstance(effect, m.Note) and effect.kind in ("believed", "dead", "register_refused"):
                self._tell("instance", {"what": effect.kind, "detail": effect.detail, "t": now / 1e9})
        for number in touched:
            self._look(now, self.records[number])

    def _restore(self, now: int, journal: Tuple[m.JournalRecord, ...]) -> None:
        for record in journal:
            self._journaled(now, record, {}, restoring=True)
        moves = self.machine.moves
        if self.keeper is not None:
            for number, frozen in self.keeper.kept():
                kept = self.records.get(number)
                if kept is not None:
                    kept.whole = frozen
                    kept.frozen = brief(self._decode(zlib.decompress(frozen)))
        for number, kept in list(self.records.items()):
            event = moves.events.get(number)
            if event is not None:
                kept.event = event
                kept.enter(event.state, now)
            elif kept.outcome is not None and number not in moves.ended and kept.kind != "pin":
                del self.records[number]
        self._prune(now)

    def _journaled(self, now: int, record: m.JournalRecord, touched: Dict[int, None], restoring: bool = False) -> None:
        if isinstance(record, m.Begin):
            self._begun(now, record, restoring)
            touched[record.event] = None
        elif isinstance(record, m.Decide):
            found = self.records.get(record.event)
            if found is not None:
                found.decided_n = record.n
        elif isinstance(record, m.Outcome):
            found = self.records.get(record.event)
            if found is not None:
                found.outcome = record
                found.enter(record.state, now)
                found.ended_ns = 0 if restoring else now
                touched[record.event] = None

    def _begun(self, now: int, begin: m.Begin, restoring: bool) -> None:
        number = begin.event
        request = begin.request
        kind = "pin" if isinstance(request, PinRequest) else "drain" if not request.keys else "move"
        record = self.records[number] = Record(number, kind, now, not restoring)
        record.lens = request.lens
        machine = self.machine
        if isinstance(request, PinRequest):
            record.enter("held", now)
            record.request = MoveRequest(request.op, request.position, request.position)
            self._prune(now)
            return
        record.request = msgspec.structs.replace(request, keys=())
        record.event = machine.moves.events.get(number)
        record.drain = machine.drains.open.get(number)
        record.parent = machine.drains.parents.get(number, 0)
        if record.parent in self.records:
            children = self.records[record.parent].children
            if len(children) < MAX_CHILDREN:
                children.append(number)
        record.bytes_per_token = [
            rank.register.namespace.bytes_per_token for rank in machine.registry.instance(request.src[0]) or []
        ]
        record.enter("copying" if kind == "drain" else "pinning", now)
        self._prune(now)

    def _committed(self, src: str, message: Committed) -> None:
        record = self.records.get(message.event)
        if record is not None and record.event is not None and src in record.event.dst:
            r = record.event.dst.index(src)
            record.present[r] = message.present
            record.committed[r] = message.n

    def _released(self, src: str, message: Released) -> None:
        record = self.records.get(message.event)
        if record is not None and record.event is not None and src in record.event.src:
            record.kept_at[record.event.src.index(src)] = message.kept_at

    def _look(self, now: int, record: Record) -> None:
        """Has it come to another state? Tell whoever waits."""
        event = record.event
        if record.outcome is not None:
            if record.frozen is None:
                self._end(now, record)
            return
        if record.drain is None and record.kind == "drain":
            record.drain = self.machine.drains.open.get(record.number)
        if event is not None:
            record.enter(event.state, now)
        if record.told != record.state or record.kind != "move":
            record.told = record.state
            self._tell("event", self.view(record, False))
        if record.parent in self.records:
            parent = self.records[record.parent]
            if parent.outcome is None and event is not None and event.state == "pinning":
                self._tell("event", self.view(parent, False))

    def _end(self, now: int, record: Record) -> None:
        view = self.view(record, True)
        record.frozen = brief(view)
        record.whole = zlib.compress(msgspec.json.encode(view), 1)
        record.event = record.drain = None
        record.lens = ()
        record.present, record.kept_at, record.committed = {}, {}, {}
        self.records.move_to_end(record.number)
        if self.keeper is not None:
            self.keeper.keep(record.number, record.whole)
        for future in self.waiting.pop(record.number, set()):
            if not future.done():
                future.set_result(None)
        for listener in self.on_ended:
            listener(view)
        self._tell("event", record.frozen)

    def _prune(self, now: int) -> None:
        """Ended events beyond the count, or older than the age. Ended ones are in the order of their ends."""
        self.begun += 1
        if self.begun % PRUNE_EVERY:
            return
        for number in list(self._oldest_ended(now)):
            del self.records[number]

    def _oldest_ended(self, now: int) -> Iterator[int]:
        extra = len(self.records) - self.keep_count
        for number, record in self.records.items():
            if record.outcome is None:
                continue
            if extra <= 0 and (not record.ended_ns or record.ended_ns + self.keep_ns > now):
                return
            extra -= 1
            yield number

    # ---- asking
    def get(self, number: int) -> Optional[EventView]:
        record = self.records.get(number)
        return None if record is None else self.view(record, True)

    def newest(self, limit: int, state: str = "", kind: str = "", since: int = 0) -> List[EventView]:
        """Without ranks and chunks, the newest first."""
        found: List[EventView] = []
        for number in sorted(self.records, reverse=True):
            if len(found) >= limit or number <= since:
                break
            record = self.records[number]
            if state not in ("", record.state) or kind not in ("", record.kind):
                continue
            found.append(self.view(record, False))
        return found

    async def ended(self, number: int, timeout_s: float) -> None:
        """Return when the event has ended or the time is up."""
        record = self.records.get(number)
        if record is None or record.outcome is not None:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.setdefault(number, set()).add(future)
        try:
            await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            pass
        finally:
            left = self.waiting.get(number)
            if left is not None:
                left.discard(future)
                if not left:
                    del self.waiting[number]

    # ---- the stream
    def open_stream(self) -> asyncio.Queue[Optional[Told]]:
        queue: asyncio.Queue[Optional[Told]] = asyncio.Queue(STREAM_QUEUE)
        self.streams.add(queue)
        return queue

    def close_streams(self) -> None:
        for queue in self.streams:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(None)

    def _tell(self, kind: str, what: object) -> None:
        for queue in list(self.streams):
            try:
                queue.put_nowait((kind, what))
            except asyncio.QueueFull:  # too slow to follow: it is told so, and begins again
                self.streams.discard(queue)
                while not queue.empty():
                    queue.get_nowait()
                queue.put_nowait(("lagged", {"detail": "you were more than 1000 messages behind; read /events again"}))
                queue.put_nowait(None)

    # ---- views
    def view(self, record: Record, full: bool) -> EventView:
        if record.frozen is not None:
            return self._decode(zlib.decompress(record.whole)) if full else record.frozen
        request = record.request
        event = record.event
        outcome = record.outcome
        state = outcome.state if outcome is not None else record.state
        ranks = _ranks(record)
        drain = record.drain
        return EventView(
            event_id=event_name(record.number),
            kind="copy" if request is not None and request.copy and record.kind == "move" else record.kind,
            state=state,
            num_tokens=self._tokens(record, state),
            reason=(outcome.reason if outcome is not None else event.reason if event is not None else "") or UNSET,
            detail=(outcome.detail if outcome is not None else event.detail if event is not None else "") or UNSET,
            old_position=list(request.src) if request is not None else UNSET,
            new_positions=[list(place) for place in (request.dst, *request.also)]
            if request is not None and record.kind != "pin"
            else UNSET,
            copy=request.copy if request is not None and record.kind != "pin" else UNSET,
            requested_chunks=len(record.lens) or UNSET,
            requested_tokens=sum(record.lens) or UNSET,
            transport=(outcome.via if outcome is not None else event.via if event is not None else "") or UNSET,
            bytes=sum(rank.bytes for rank in ranks) if record.kind == "move" else UNSET,
            begun=record.begun_ns / 1e9 if record.begun_ns else UNSET,
            ended=record.ended_ns / 1e9 if record.ended_ns else UNSET,
            duration_s=(record.ended_ns - record.begun_ns) / 1e9 if record.ended_ns and record.begun_ns else UNSET,
            phases_s=_phases(record) if record.begun_ns and record.kind != "pin" else UNSET,
            idempotency_key=(request.idem if request is not None else "") or UNSET,
            parent=event_name(record.parent) if record.parent else UNSET,
            expires_in_s=self._expires(record),
            progress=_progress(drain) if drain is not None else UNSET,
            children=[event_name(child) for child in record.children] if full and record.kind == "drain" else UNSET,
            ranks=ranks if full and record.kind == "move" else UNSET,
            chunks=_chunks(record) if full and record.kind == "move" else UNSET,
        )

    def _tokens(self, record: Record, state: str) -> int:
        if record.kind == "pin":
            return sum(record.lens)
        if record.outcome is not None:
            return record.outcome.num_tokens
        if record.drain is not None:
            return record.drain.num_tokens()
        event = record.event
        return event.num_tokens if event is not None and state in ("copying", "releasing") else 0

    def _expires(self, record: Record) -> Any:
        if record.kind != "pin" or record.outcome is not None:
            return UNSET
        return self.expires_in_s(record.number)

    def expires_in_s(self, number: int) -> float:
        """How much longer a pin lives, at the least."""
        deadline = self.machine.timers.deadlines.get(("hold", number, 0))
        if deadline is None:
            return 0.0
        left = deadline[0] - self.machine.spec.config.retry_ns - time.time_ns()
        return max(0.0, round(left / 1e9, 3))


def brief(view: EventView) -> EventView:
    return msgspec.structs.replace(view, ranks=UNSET, chunks=UNSET, children=UNSET)


def _phases(record: Record) -> Dict[str, float]:
    """Seconds in each state that it has left."""
    times = sorted(record.entered.items(), key=lambda item: item[1])
    return {name: (times[i + 1][1] - t) / 1e9 for i, (name, t) in enumerate(times[:-1])}


def _progress(drain: Drain) -> Progress:
    return Progress(len(drain.chains), drain.next, drain.num_tokens(), sum(drain.moved.values()))


def _n(record: Record) -> int:
    if record.outcome is not None:
        return record.outcome.n if record.outcome.state == "done" else 0
    return record.event.n if record.event is not None else record.decided_n


def _ranks(record: Record) -> List[RankOutcome]:
    event = record.event
    if event is None:
        source = record.outcome.source if record.outcome is not None else ()
        return [
            RankOutcome(rank=item.rank, source="", destination="", deleted=item.deleted, kept=item.kept, why=item.why)
            for item in source
        ]
    found: List[RankOutcome] = []
    for r, (src, dst) in enumerate(zip(event.src, event.dst)):
        released: Optional[SourceOutcome] = event.released[r]
        committed = record.committed.get(r, 0)
        present = [i for i in record.present.get(r, ()) if i < committed]
        there = set(present)
        size = record.bytes_per_token[r] if r < len(record.bytes_per_token) else 0
        copied = sum(n for i, n in enumerate(record.lens[:committed]) if i not in there) * size
        found.append(
            RankOutcome(
                rank=r,
                source=src,
                destination=dst,
                pinned=len(event.slots[r]) if r < len(event.slots) else 0,
                reserved=max(0, event.reserved[r]) if r < len(event.reserved) else 0,
                committed=committed,
                present=len(present),
                bytes=copied,
                deleted=released.deleted if released is not None else 0,
                kept=released.kept if released is not None else 0,
                why=released.why if released is not None else "",
                via=event.via if copied else "",
            )
        )
    return found


def _chunks(record: Record) -> List[ChunkOutcome]:
    """Of every chunk that was asked for; over all ranks the worst."""
    state = record.outcome.state if record.outcome is not None else record.state
    event = record.event
    ranks = len(event.src) if event is not None else 0
    n = _n(record)
    copy = record.request is not None and record.request.copy
    found: List[ChunkOutcome] = []
    present = [set(record.present.get(r, ())) for r in range(ranks)]
    kept = [set(record.kept_at.get(r, ())) for r in range(ranks)]
    for i, tokens in enumerate(record.lens):
        here = [record.committed.get(r, 0) > i for r in range(ranks)]
        if state == "failed" or not ranks or not all(here) or i >= n:
            where = "none"
        else:
            where = "present" if all(i in there for there in present) else "copied"
        if state != "done" or i >= n:
            source = "untouched"
        elif copy:
            source = "kept"
        else:
            source = _source(record, event, ranks, kept, i)
        if state == "done" and event is None and i < n:
            where = "copied"
        found.append(ChunkOutcome(i, tokens, where, source))
    return found


def _source(record: Record, event: Optional[Event], ranks: int, kept: List[Set[int]], i: int) -> str:
    if event is None:
        return "unknown"
    outcomes = event.released
    if any(item is None or item.deleted < 0 for item in outcomes) or not ranks:
        return "unknown"
    if any(i in positions for positions in kept):
        return "kept"
    silent = any(r not in record.kept_at and item is not None and item.kept for r, item in enumerate(outcomes))
    return "unknown" if silent else "deleted"
