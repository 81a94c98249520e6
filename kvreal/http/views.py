"""One event's record, and how it looks from outside: what every rank and chunk came to, and how long it took."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import Dict, Final, List, Optional, Sequence, Set, Tuple

import msgspec
from msgspec import UNSET, UnsetType

from kvcore.protocol import machine as m
from kvcore.protocol.coordinator import Event
from kvcore.protocol.drain import Drain
from kvcore.protocol.messages import MoveRequest, SourceOutcome, event_name
from kvreal.http.models import ChunkOutcome, EventView, Progress, RankOutcome

ENDED: Final = frozenset({"done", "failed"})


class Totals:
    """Of a drain's children that have ended: bytes copied, by what, and how long each phase took, all together."""

    def __init__(self) -> None:
        self.ended: int = 0
        self.bytes: int = 0
        self.vias: Dict[str, None] = {}
        self.phases_s: Dict[str, float] = {}

    def add(self, child: EventView) -> None:
        self.ended += 1
        if isinstance(child.bytes, int):
            self.bytes += child.bytes
        if isinstance(child.transport, str):
            self.vias.update(dict.fromkeys(child.transport.split(", ")))
        if isinstance(child.phases_s, dict):
            for phase, seconds in child.phases_s.items():
                self.phases_s[phase] = self.phases_s.get(phase, 0.0) + seconds


class Record:
    """One event."""

    def __init__(self, number: int, kind: str, now: int, known: bool) -> None:
        self.number: int = number
        self.kind: str = kind
        self.state: str = "pinning"
        #: found in the journal: what had been heard of it went with an earlier life of the controller
        self.restored: bool = not known
        self.begun_ns: int = now if known else 0
        #: of a pin that was found in the journal: its deadline then, reckoned from the restart
        self.restored_hold_ns: int = 0
        self.ended_ns: int = 0
        #: state -> when it was entered, ns
        self.entered: Dict[str, int] = {}
        self.request: Optional[MoveRequest] = None
        self.event: Optional[Event] = None
        self.outcome: Optional[m.Outcome] = None
        self.parent: int = 0
        self.children: List[int] = []
        self.drain: Optional[Drain] = None
        self.bytes_per_token: List[int] = []
        self.block_tokens: int = 1
        #: rank -> positions that were at the destination before, positions that the source kept
        self.present: Dict[int, Tuple[int, ...]] = {}
        self.kept_at: Dict[int, Tuple[int, ...]] = {}
        self.committed: Dict[int, int] = {}
        #: destination ranks that have said that they brought nothing
        self.refused: Set[int] = set()
        #: of a drain, what its children that have ended came to
        self.totals: Totals = Totals()
        self.lens: Tuple[int, ...] = ()
        self.decided_n: int = 0
        #: what the stream was last told
        self.told: Tuple[str, int] = ("", 0)
        #: once it has ended: without ranks and chunks, and all of it (JSON, compressed)
        self.frozen: Optional[EventView] = None
        self.whole: bytes = b""

    @property
    def many(self) -> bool:
        """Several moves together."""
        return self.kind == "drain"

    def enter(self, state: str, now: int) -> None:
        self.state = state
        self.entered.setdefault(state, now)


def view_of(record: Record, full: bool, expires_in_s: Optional[float]) -> EventView:
    """An event that has not been frozen. ``full``: with its ranks and chunks."""
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
        num_tokens=_tokens(record, state),
        reason=(outcome.reason if outcome is not None else event.reason if event is not None else "") or UNSET,
        detail=(outcome.detail if outcome is not None else event.detail if event is not None else "") or UNSET,
        old_position=list(request.src) if request is not None else UNSET,
        new_positions=[list(place) for place in (request.dst, *request.also)]
        if request is not None and record.kind != "pin"
        else UNSET,
        copy=request.copy if request is not None and record.kind != "pin" else UNSET,
        requested_chunks=len(record.lens) or UNSET,
        requested_tokens=sum(record.lens) or UNSET,
        transport=_transport(record) or UNSET,
        bytes=_bytes(record, ranks),
        begun=record.begun_ns / 1e9 if record.begun_ns else UNSET,
        ended=record.ended_ns / 1e9 if record.ended_ns else UNSET,
        duration_s=(record.ended_ns - record.begun_ns) / 1e9 if record.ended_ns and record.begun_ns else UNSET,
        phases_s=_phases(record) if not record.restored and record.kind != "pin" else UNSET,
        idempotency_key=(request.idem if request is not None else "") or UNSET,
        parent=event_name(record.parent) if record.parent else UNSET,
        expires_in_s=UNSET if expires_in_s is None else expires_in_s,
        progress=_progress(record, drain),
        children=[event_name(child) for child in record.children] if full and record.many else UNSET,
        ranks=ranks if full and record.kind == "move" else UNSET,
        chunks=_chunks(record) if full and record.kind == "move" else UNSET,
    )


def _transport(record: Record) -> str:
    if record.many:
        return ", ".join(record.totals.vias)
    return record.outcome.via if record.outcome is not None else record.event.via if record.event is not None else ""


def _bytes(record: Record, ranks: List[RankOutcome]) -> int | UnsetType:
    if record.many:
        told = not record.restored or record.totals.ended
        return record.totals.bytes if told else UNSET
    return sum(rank.bytes for rank in ranks) if record.kind == "move" and not _unheard(record) else UNSET


def _tokens(record: Record, state: str) -> int:
    if record.kind == "pin":
        return sum(record.lens)
    if record.outcome is not None:
        return record.outcome.num_tokens
    if record.drain is not None:
        return record.drain.num_tokens()
    event = record.event
    return event.num_tokens if event is not None and state in ("copying", "releasing") else 0


def brief(view: EventView) -> EventView:
    return msgspec.structs.replace(view, ranks=UNSET, chunks=UNSET, children=UNSET)


def _phases(record: Record) -> Dict[str, float]:
    """Seconds in each state that it has left; a drain has its children's."""
    if record.many:
        return dict(record.totals.phases_s)
    times = sorted(record.entered.items(), key=lambda item: item[1])
    return {name: (times[i + 1][1] - t) / 1e9 for i, (name, t) in enumerate(times[:-1])}


def _progress(record: Record, drain: Optional[Drain]) -> Progress | UnsetType:
    if drain is not None:
        return Progress(
            planned_tokens=drain.num_tokens(),
            moved_tokens=sum(drain.moved.values()),
            chains=len(drain.chains),
            chains_begun=drain.next,
        )
    event = record.event
    if event is None or event.state != "copying" or record.outcome is not None:
        return UNSET
    arrived = event.arrived()
    step = record.request.step if record.request is not None else 0
    return Progress(
        planned_tokens=event.num_tokens,
        moved_tokens=arrived,
        moved_chunks=bisect_right(list(accumulate(record.lens[: event.n])), arrived),
        visible_tokens=sum(record.lens[: event.shown()]) if step else UNSET,
    )


def _n(record: Record) -> int:
    if record.outcome is not None:
        return record.outcome.n if record.outcome.state == "done" else 0
    return record.event.n if record.event is not None else record.decided_n


def _unheard(record: Record) -> bool:
    """What the destinations said of it went with an earlier life of the controller."""
    return record.restored and (record.event is None or (record.decided_n > 0 and not record.committed))


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
        block = record.block_tokens
        if committed or event.state != "copying":
            copied = sum(-(-n // block) * block for i, n in enumerate(record.lens[:committed]) if i not in there) * size
        else:
            copied = event.progress.get(r, (0, 0, 0))[2] * size
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
                chosen="; ".join(filter(None, (event.chosen, event.direction))) if copied else "",
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
    unheard = _unheard(record)
    found: List[ChunkOutcome] = []
    present = [set(record.present.get(r, ())) for r in range(ranks)]
    kept = [set(record.kept_at.get(r, ())) for r in range(ranks)]
    named = set().union(*present, *kept)
    cuts = {n, *record.committed.values()}
    alike: Optional[Tuple[str, str]] = None
    for i, tokens in enumerate(record.lens):
        if i in cuts:
            alike = None
        elif alike is not None and i not in named:  # as its neighbour: nobody has said anything else of it
            found.append(ChunkOutcome(i, tokens, *alike))
            continue
        if unheard and state == "failed":
            where = "unknown"  # a destination may have committed it all the same
        elif unheard and i < n:
            where = "copied"  # decided: it is there
        else:
            where = _destination(record, state, present, i)
        if state != "done" or i >= n:
            source = "untouched"
        elif copy:
            source = "kept"
        else:
            source = _source(record, event, ranks, kept, i)
        if state == "done" and record.outcome is not None and record.outcome.reason == "same_place" and i < n:
            where, source = "present", "kept"  # a move to where it is: nothing was copied, and nothing deleted
        found.append(ChunkOutcome(i, tokens, where, source))
        if i not in named:
            alike = (where, source)
    return found


def _destination(record: Record, state: str, present: List[Set[int]], i: int) -> str:
    """What is known of one chunk at the destination, by what each of its ranks has said."""
    ranks = len(present)
    here = [record.committed.get(r, 0) > i for r in range(ranks)]
    if any(here):
        reason = record.outcome.reason if record.outcome is not None else ""
        if state == "failed" and reason.startswith("destination_"):
            return "unknown"  # cleared, or another process: what was committed may have gone with it
        if not all(here):
            return "partial"
        return "present" if all(i in there for there in present) else "copied"
    asked = state == "failed" and "reserving" in record.entered
    silent = any(r not in record.committed and r not in record.refused for r in range(ranks))
    return "unknown" if asked and silent else "none"


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


def together(name: str, views: Sequence[EventView]) -> EventView:
    """Several events as one: it goes on while any of them does, and has failed if any of them has."""
    going = [view for view in views if view.state not in ENDED]
    failed = [view for view in views if view.state == "failed" and view.reason != "nothing_held"]
    some = [view for view in views if view.reason != "nothing_held"]
    worst = (going or failed or some or list(views))[0]
    steps = [view.progress for view in views if isinstance(view.progress, Progress)]
    totals = Totals()
    for view in views:
        totals.add(view)
    begun = min((view.begun for view in views if isinstance(view.begun, float)), default=UNSET)
    ended = UNSET if going else max((view.ended for view in views if isinstance(view.ended, float)), default=UNSET)
    return EventView(
        event_id=name,
        kind=views[0].kind,
        state=worst.state,
        num_tokens=sum(view.num_tokens for view in views),
        reason=worst.reason,
        detail=worst.detail,
        transport=", ".join(totals.vias) or UNSET,
        bytes=totals.bytes if any(isinstance(view.bytes, int) for view in views) else UNSET,
        begun=begun,
        ended=ended,
        duration_s=ended - begun if isinstance(begun, float) and isinstance(ended, float) else UNSET,
        phases_s=totals.phases_s or UNSET,
        progress=Progress(
            planned_tokens=sum(step.planned_tokens for step in steps),
            moved_tokens=sum(step.moved_tokens for step in steps),
            chains=sum(step.chains for step in steps if isinstance(step.chains, int)),
            chains_begun=sum(step.chains_begun for step in steps if isinstance(step.chains_begun, int)),
        )
        if steps
        else UNSET,
        children=[view.event_id for view in views],
    )  # fmt: skip
