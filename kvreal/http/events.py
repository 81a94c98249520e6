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
from typing import Callable, Dict, Final, Iterator, List, Optional, Protocol, Sequence, Set, Tuple

import msgspec

from kvcore.protocol import machine as m
from kvcore.protocol.controller import Controller
from kvcore.protocol.messages import Committed, MoveRequest, PinRequest, Refused, Released, event_number
from kvreal.http.models import EventView
from kvreal.http.views import Record, brief, view_of

STREAM_QUEUE: Final = 1_000
PRUNE_EVERY: Final = 64
SHORT: Final = 2_048
"""Details that are kept as they are: compressing them takes longer than writing them."""
MAX_CHILDREN: Final = 1_000
"""Chains of a drain that its event names; there may be more."""

Told = Tuple[str, object]
"""(kind, what): one message of the stream."""


class Keeper(Protocol):
    """Keeps ended events' records beside the journal, so that a restart loses no detail."""

    def keep(self, event: int, record: bytes) -> None: ...

    def kept(self) -> Sequence[Tuple[int, bytes]]: ...

    def began(self) -> Dict[int, int]:
        """Event -> when it began, ns since 1970."""
        ...


def packed(text: bytes, longest: int = 0) -> bytes:
    """Compressed, if it is longer than that and has not been before. JSON does not begin as compressed bytes do."""
    return zlib.compress(text, 1) if len(text) > longest and text.startswith(b"{") else text


def unpacked(text: bytes) -> bytes:
    return text if text.startswith(b"{") else zlib.decompress(text)


def _expire(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class EventLog:
    def __init__(self, machine: Controller, keeper: Optional[Keeper] = None) -> None:
        self.machine: Controller = machine
        self.keeper: Optional[Keeper] = keeper
        self.records: OrderedDict[int, Record] = OrderedDict()
        self.waiting: Dict[int, Set[asyncio.Future[None]]] = {}
        self.streams: Set[asyncio.Queue[Optional[Told]]] = set()
        #: ended, and not told yet
        self.over: List[Tuple[int, EventView]] = []
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
            elif isinstance(message, Refused) and message.of == "Fetch":
                self._refused(item.src, message)
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

    def onlook(self, now: int, item: m.Input, effects: List[m.Effect]) -> None:
        """An onlooker of the service: tells ``on_ended`` of the events that have ended."""
        over, self.over = self.over, []
        for number, view in over:
            record = self.records.get(number)
            if record is not None:
                record.whole = packed(record.whole)
            for listener in self.on_ended:
                listener(view)

    def _restore(self, now: int, journal: Tuple[m.JournalRecord, ...]) -> None:
        for record in journal:
            self._journaled(now, record, {}, restoring=True)
        moves = self.machine.moves
        if self.keeper is not None:
            for number, begun_ns in self.keeper.began().items():
                if number in self.records:
                    self.records[number].begun_ns = begun_ns
            for number, frozen in self.keeper.kept():
                kept = self.records.get(number)
                if kept is not None:
                    kept.whole = packed(frozen)
                    kept.frozen = brief(self._decode(unpacked(frozen)))
                    self._child_ended(kept.frozen)
        for number, kept in list(self.records.items()):
            hold = self.machine.timers.deadlines.get(("hold", number, 0))
            kept.restored_hold_ns = hold[0] if hold is not None else 0
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
        kind = "pin" if isinstance(request, PinRequest) else "move" if request.keys else "drain"
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
        record.parent = begin.parent
        if record.parent in self.records:
            children = self.records[record.parent].children
            if len(children) < MAX_CHILDREN:
                children.append(number)
        spaces = [rank.space(request.src[1]) for rank in machine.registry.instance(request.src[0]) or []]
        record.bytes_per_token = [space.bytes_per_token for space in spaces]
        record.block_tokens = max([space.block_tokens for space in spaces], default=1)
        record.enter("copying" if record.many else "pinning", now)
        self._prune(now)

    def _committed(self, src: str, message: Committed) -> None:
        record = self.records.get(message.event)
        if record is not None and record.event is not None and src in record.event.dst:
            r = record.event.dst.index(src)
            if r < len(record.event.dst_incs) and message.inc == record.event.dst_incs[r]:
                record.present[r] = message.present
                record.committed[r] = message.n

    def _refused(self, src: str, message: Refused) -> None:
        record = self.records.get(message.event)
        if record is not None and record.event is not None and src in record.event.dst:
            record.refused.add(record.event.dst.index(src))

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
        if record.drain is None and record.many:
            record.drain = self.machine.drains.open.get(record.number)
        if event is not None:
            record.enter(event.state, now)
        moved = sum([here for _, here, _ in event.progress.values()]) if event is not None else 0
        if record.told != (record.state, moved) or record.kind != "move":
            record.told = (record.state, moved)
            if self.streams:  # a view is for somebody to look at: a move comes through here at each of its steps
                self._tell("event", self.view(record, False))
        if self.streams and record.parent in self.records:
            parent = self.records[record.parent]
            if parent.outcome is None and event is not None and event.state == "pinning":
                self._tell("event", self.view(parent, False))

    def _end(self, now: int, record: Record) -> None:
        view = self.view(record, True)
        record.frozen = brief(view)
        self._child_ended(view)
        record.whole = packed(msgspec.json.encode(view), SHORT)
        record.event = record.drain = None
        record.lens = ()
        record.present, record.kept_at, record.committed = {}, {}, {}
        self.records.move_to_end(record.number)
        if self.keeper is not None:
            self.keeper.keep(record.number, record.whole)
        for future in self.waiting.pop(record.number, set()):
            if not future.done():
                future.set_result(None)
        self.over.append((record.number, view))
        self._tell("event", record.frozen)

    def _child_ended(self, view: EventView) -> None:
        """A drain's event has its children's totals."""
        parent = self.records.get(event_number(view.parent)) if isinstance(view.parent, str) else None
        if parent is not None and parent.frozen is None:
            parent.totals.add(view)

    def note(self, now: int, view: EventView) -> None:
        """An event that the journal knows nothing of, and that has ended: its id was answered, so it is known here
        until it is forgotten like others, or this process ends."""
        record = Record(event_number(view.event_id), view.kind, now, True)
        record.outcome = m.Outcome(record.number, view.state, view.reason if isinstance(view.reason, str) else "")
        record.enter(view.state, now)
        record.ended_ns = now
        record.frozen = brief(view)
        record.whole = packed(msgspec.json.encode(view))
        self.records.setdefault(record.number, record)
        self._prune(now)

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
    def get(self, number: int, full: bool = True) -> Optional[EventView]:
        record = self.records.get(number)
        return None if record is None else self.view(record, full)

    def whole(self, number: int) -> Optional[bytes]:
        """An ended event's view, as JSON; None if it is not known or has not ended."""
        record = self.records.get(number)
        return unpacked(record.whole) if record is not None and record.frozen is not None else None

    def newest(self, limit: int, state: str = "", kind: str = "", since: int = 0) -> List[EventView]:
        """Without ranks and chunks, the newest first."""
        found: List[EventView] = []
        for number in sorted(self.records, reverse=True):
            if len(found) >= limit or number <= since:
                break
            record = self.records[number]
            if state not in ("", record.state) or kind not in ("", record.kind, "copy"):
                continue
            view = self.view(record, False)
            if kind in ("", view.kind):  # a copy's record is a move's
                found.append(view)
        return found

    async def ended(self, number: int, timeout_s: float) -> None:
        """Return when the event has ended or the time is up."""
        record = self.records.get(number)
        if record is None or record.outcome is not None:
            return
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self.waiting.setdefault(number, set()).add(future)
        alarm = loop.call_later(timeout_s, _expire, future)
        try:
            await future
        finally:
            alarm.cancel()
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
            return self._decode(unpacked(record.whole)) if full else record.frozen
        lives = record.kind == "pin" and record.outcome is None
        return view_of(record, full, self.expires_in_s(record.number) if lives else None)

    def expires_in_s(self, number: int) -> float:
        """How much longer a pin lives, at the least."""
        deadline = self.machine.timers.deadlines.get(("hold", number, 0))
        if deadline is None:
            return 0.0
        ends_ns = deadline[0] - self.machine.spec.config.retry_ns
        record = self.records.get(number)
        pin = self.machine.fanouts.pins.get(number)
        if record is not None and pin is not None and deadline[0] == record.restored_hold_ns and record.begun_ns:
            # The machine only knows that it ends no later than if it had begun at the restart.
            ends_ns = min(ends_ns, record.begun_ns + pin.lease_ns)
        return max(0.0, round((ends_ns - time.time_ns()) / 1e9, 3))
