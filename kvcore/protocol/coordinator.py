"""A move as the controller sees it: one event, from Begin to done or failed.

PINNING -> RESERVING -> COPYING -> RELEASING -> DONE, and FAILED from each of the first three. Decide is the one point
of no return: before it anything may fail the event, after it nothing can.
"""

from __future__ import annotations

from typing import Callable, Dict, Final, List, Optional, Tuple, final

from kvcore.protocol.config import Config
from kvcore.protocol.links import best_direction, kind_of
from kvcore.protocol.machine import Begin, Decide, Effect, Journal, Note, Outcome, Promised, Send, Timers
from kvcore.protocol.messages import (
    NO_ID,
    Answer,
    Committed,
    End,
    Fetch,
    Inc,
    MoveRequest,
    Pid,
    Pin,
    Pinned,
    Refused,
    Release,
    Released,
    Renew,
    Reserved,
    Retain,
    SourceOutcome,
    Terms,
    event_id,
)
from kvcore.protocol.registry import Rank, Registry

PINNING: Final = "pinning"
RESERVING: Final = "reserving"
COPYING: Final = "copying"
RELEASING: Final = "releasing"
DONE: Final = "done"
FAILED: Final = "failed"


def _of_each(terms: Optional[Terms], ranks: int) -> Optional[Terms]:
    """The terms of one rank's copy: they share the cap."""
    if terms is None or not terms.cap_bytes_per_s or ranks == 1:
        return terms
    return Terms(terms.priority, terms.weight, max(1, terms.cap_bytes_per_s // ranks))


@final
class Event:
    def __init__(self, number: int, request: MoveRequest, now: int, deadline_ns: int) -> None:
        self.number: int = number
        self.request: MoveRequest = request
        self.state: str = PINNING
        self.reason: str = ""
        self.detail: str = ""
        self.begun_ns: int = now
        self.deadline_ns: int = deadline_ns
        #: of one rank's copy
        self.terms: Optional[Terms] = request.terms
        #: who is answered when num_tokens is fixed and when the event ends: (address, op)
        self.clients: List[Tuple[str, str]] = []
        #: who waits for the end only
        self.waiters: List[Tuple[str, str]] = []
        self.src: List[str] = []
        self.dst: List[str] = []
        self.src_epochs: List[int] = []
        self.src_endpoints: List[str] = []
        self.src_incs: List[Inc] = []
        self.dst_incs: List[Inc] = []
        self.pids: List[Pid] = []
        self.slots: List[Tuple[int, ...]] = []
        self.pinned: int = 0
        #: each source's clock in the newest Pinned of its pin
        self.pinned_ns: List[int] = []
        self.n: int = 0
        self.num_tokens: int = 0
        #: num_tokens as the clients have been told
        self.promised: int = 0
        self.reserved: List[int] = []
        #: how far destinations were when they last said so: rank -> the most of (chunks that it shows, tokens whose
        #: bytes are there, those of them that this move has brought)
        self.progress: Dict[int, Tuple[int, int, int]] = {}
        self.committed: List[int] = []
        self.stamps: List[int] = []
        self.released: List[Optional[SourceOutcome]] = []
        self.renewed_ns: int = now
        self.give_up_ns: int = 0
        self.via: str = ""
        self.chosen: str = ""
        #: who moves the bytes, and why if that was measured
        self.push: bool = False
        self.direction: str = ""
        #: every later Release keeps: a retention may have lapsed, or this is a copy
        self.keep: bool = request.copy
        #: found decided in the journal: no Release before every retention has been confirmed, or given up (H36)
        self.confirming: bool = False

    def arrived(self) -> int:
        """Of how many of its tokens every destination has the bytes, as far as it has said so."""
        if not self.progress:
            return 0
        here = [self.progress[r][1] if r in self.progress else 0 for r, n in enumerate(self.committed) if n < 0]
        return min([*here, self.num_tokens])

    def shown(self) -> int:
        """How many chunks every destination shows already, of a move that goes in steps."""
        return min([self.progress[r][0] if r in self.progress else 0 for r in range(len(self.dst))])


@final
class Coordinator:
    def __init__(self, registry: Registry, timers: Timers, config: Config) -> None:
        self.registry: Registry = registry
        self.timers: Timers = timers
        self.config: Config = config
        self.incarnation: int = 0
        self.counter: int = 0
        self.events: Dict[int, Event] = {}
        self.by_idem: Dict[str, int] = {}
        self.requests: Dict[str, MoveRequest] = {}
        self.idem_of: Dict[int, str] = {}
        #: address -> its events that have not ended
        self.by_node: Dict[str, Dict[int, None]] = {}
        self.ended: Dict[int, Outcome] = {}
        self.ended_ns: Dict[int, int] = {}
        #: done without its sources' word: a Release may still be on its way, so its retentions lapse by themselves
        self.given_up: Dict[int, None] = {}
        #: told of each event's end (drains)
        self.on_ended: Optional[Callable[[int, Event, List[Effect]], None]] = None

    def new_event(self) -> int:
        self.counter += 1
        return event_id(self.incarnation if self.config.rules.h24 else 0, self.counter)

    # ---- begin
    def begin(
        self,
        now: int,
        client: str,
        m: MoveRequest,
        src: List[Rank],
        dst: List[Rank],
        why: Tuple[str, str],
        out: List[Effect],
        number: int = 0,
        parent: int = 0,
    ) -> Event:
        """Journal Begin and pin at every source rank. ``why`` (reason, detail): fail at once instead. ``parent``: the
        drain that it belongs to."""
        config = self.config
        number = number or self.new_event()
        event = Event(number, m, now, now + (m.deadline_ns or config.deadline_ns))
        if client:
            event.clients.append((client, m.op))
        self.name_event(number, m)
        out.append(Journal(Begin(number, m, parent)))
        self.events[number] = event
        if why[0]:
            event.detail = why[1]
            self.finish(now, event, FAILED, why[0], out)
            return event
        ranks = len(src)
        event.terms = _of_each(m.terms, ranks)
        event.src = [rank.address for rank in src]
        event.dst = [rank.address for rank in dst]
        event.src_epochs = [rank.epoch for rank in src]
        event.src_endpoints = [rank.register.endpoint for rank in src]
        event.src_incs = [rank.views[m.src[1]].inc for rank in src]
        event.pids = [NO_ID] * ranks
        event.slots = [()] * ranks
        event.pinned_ns = [0] * ranks
        event.reserved = [-1] * ranks
        event.committed = [-1] * ranks
        event.stamps = [0] * ranks
        event.released = [None] * ranks
        for address in event.src + event.dst:
            self.by_node.setdefault(address, {})[number] = None
        self._pin(event, out)
        self._alarm(now, event)
        return event

    def _pin(self, event: Event, out: List[Effect]) -> None:
        m = event.request
        pin = Pin(self.incarnation, event.number, m.src[1], m.keys, not m.copy, self.config.lease_ns)
        for r, address in enumerate(event.src):
            if event.pids[r] == NO_ID:
                out.append(Send(address, pin))

    def _alarm(self, now: int, event: Event) -> None:
        when = now + self.config.retry_ns
        limit = event.give_up_ns if event.state == RELEASING else event.deadline_ns
        self.timers.set(("retry", event.number, 0), when if when < limit or now >= limit else limit)

    def name_event(self, number: int, m: MoveRequest) -> None:
        """Remember an idempotency key for as long as its event."""
        if m.idem:
            self.by_idem[m.idem] = number
            self.requests[m.idem] = m
            self.idem_of[number] = m.idem

    def recover(self, now: int, begin: Begin, decide: Decide, out: List[Effect]) -> None:
        """Found decided in the journal: ask every destination whether it still retains, and only then delete (H36)."""
        m = begin.request
        assert isinstance(m, MoveRequest)
        event = Event(begin.event, m, now, now)
        event.state = RELEASING
        event.src = [address for address, _ in decide.sources]
        event.pids = [pid for _, pid in decide.sources]
        event.dst = [address for address, _ in decide.destinations]
        event.dst_incs = [inc for _, inc in decide.destinations]
        ranks = len(event.src)
        event.released = [None] * ranks
        event.committed = [-1] * ranks
        event.stamps = [0] * ranks
        event.n = decide.n
        event.num_tokens = event.promised = decide.num_tokens
        event.give_up_ns = now + self.config.release_give_up_ns
        event.confirming = decide.delete and self.config.rules.h36
        self.events[event.number] = event
        for address in event.src + event.dst:
            self.by_node.setdefault(address, {})[event.number] = None
        self._retain(now, event, list(range(ranks)), out)
        if not event.confirming:
            self._release(event, out)
        self._alarm(now, event)

    # ---- PINNING
    def on_pinned(self, now: int, src: str, m: Pinned, out: List[Effect]) -> None:
        event = self.events.get(m.event)
        if event is None or src not in event.src:
            if m.pid != NO_ID:
                out.append(Send(src, Release(self.incarnation, m.event, m.pid, 0, False)))
            return
        r = event.src.index(src)
        if event.state == PINNING:
            if event.pids[r] != NO_ID:
                if m.pid != NO_ID and m.pid != event.pids[r]:
                    self._second_pin(event, r, src, m, out)
                return
            if m.pid == NO_ID:
                self.fail(now, event, "nothing_held", out, but=src)
                return
            event.pids[r] = m.pid
            event.slots[r] = m.slots
            event.pinned_ns[r] = m.at_ns
            event.pinned += 1
            if event.pinned == len(event.src):
                event.n = min([len(slots) for slots in event.slots])
                self._all_pinned(now, event, out)
        elif m.pid == NO_ID:
            if event.state != RELEASING:
                out.append(Note("source_may_keep", m.event, src))
        elif m.pid != event.pids[r]:
            self._second_pin(event, r, src, m, out)
        elif event.pinned_ns and m.at_ns > event.pinned_ns[r]:
            event.pinned_ns[r] = m.at_ns

    def _second_pin(self, event: Event, r: int, src: str, m: Pinned, out: List[Effect]) -> None:
        """A pin that lapsed is never replaced within its event (H15)."""
        if self.config.rules.h15:
            out.append(Send(src, Release(self.incarnation, m.event, m.pid, 0, False)))
        else:
            event.pids[r] = m.pid

    def _all_pinned(self, now: int, event: Event, out: List[Effect]) -> None:
        m = event.request
        if m.src == m.dst and self.config.rules.h06:
            event.num_tokens = sum(m.lens[: event.n])
            for r, address in enumerate(event.src):
                out.append(Send(address, Release(self.incarnation, event.number, event.pids[r], 0, False)))
                event.released[r] = SourceOutcome(r, 0, 0, "same_place")
            self.finish(now, event, DONE, "same_place", out)
            return
        incs: List[Inc] = []
        for address in event.dst:
            inc = self.registry.inc(address, m.dst[1])
            if inc is None:
                self.fail(now, event, "destination_gone", out)
                return
            incs.append(inc)
        event.dst_incs = incs
        event.state = RESERVING
        self._direct(event, out)
        self._fetch(now, event, out)

    def _direct(self, event: Event, out: List[Effect]) -> None:
        """Who moves the bytes. Within one process nobody need be asked."""
        m = event.request
        if event.src == event.dst:
            return
        ranks = self.registry.by_address
        event.push, event.direction = self.direction(
            [ranks[address] for address in event.src], [ranks[address] for address in event.dst],
            m.src[1], m.dst[1], sum(m.lens[: event.n]), event.n,
        )  # fmt: skip
        if event.direction:
            out.append(Note("direction", event.number, event.direction))

    def direction(
        self, src: List[Rank], dst: List[Rank], source: str, target: str, num_tokens: int, chunks: int
    ) -> Tuple[bool, str]:
        """(push?, why) of a copy between two locations of two instances: as the destination says, else as I am told,
        else as was measured. All ranks of a move do alike."""
        for said in (dst[0].register.direction, self.config.direction):
            if said != "auto":
                return said == "push", ""
        pairs = [(one.register.measured, other.register.measured) for one, other in zip(src, dst)]
        nbytes = num_tokens * src[0].space(source).bytes_per_token
        return best_direction(pairs, kind_of(source), kind_of(target), nbytes, chunks)

    # ---- RESERVING, COPYING
    def _fetch(self, now: int, event: Event, out: List[Effect]) -> None:
        m = event.request
        keys = m.keys[: event.n]
        lens = m.lens[: event.n]
        for r, address in enumerate(event.dst):
            if event.committed[r] < 0:
                src = event.src[r]
                out.append(
                    Send(
                        address,
                        Fetch(
                            self.incarnation,
                            event.number,
                            m.dst[1],
                            event.dst_incs[r],
                            keys,
                            lens,
                            src,
                            event.src_epochs[r],
                            m.src[1],
                            event.pids[r],
                            event.slots[r],
                            self.config.retain_ns,
                            now,
                            event.push,
                            m.evict,
                            event.src_endpoints[r],
                            event.terms,
                            m.step,
                        ),
                    )
                )

    def _rank(self, event: Event, src: str, inc: Inc) -> int:
        """The destination rank that speaks, or -1 if it is none or speaks under another incarnation (H18)."""
        if src not in event.dst:
            return -1
        r = event.dst.index(src)
        return r if inc == event.dst_incs[r] or not self.config.rules.h18 else -1

    def on_reserved(self, now: int, src: str, m: Reserved, out: List[Effect]) -> None:
        event = self.events.get(m.event)
        if event is None:
            self._late(src, m.event, out)
        elif event.state in (RESERVING, COPYING):
            r = self._rank(event, src, m.inc)
            if r < 0:
                return
            if m.here:
                shown, here, moved = event.progress.get(r, (0, 0, 0))
                event.progress[r] = (max(m.shown, shown), max(m.here, here), max(m.moved, moved))
            if event.reserved[r] < 0:
                event.reserved[r] = m.n
                self._all_reserved(now, event, out)

    def _all_reserved(self, now: int, event: Event, out: List[Effect]) -> None:
        least = min(event.reserved)
        if least < 0:
            return
        event.n = min(event.n, least)
        event.num_tokens = sum(event.request.lens[: event.n])
        event.state = COPYING
        event.promised = event.num_tokens
        if event.request.idem:
            out.append(Journal(Promised(event.number, event.num_tokens, event.n)))
        self._answer(event, event.clients, out)
        self._maybe_decide(now, event, out)

    def on_committed(self, now: int, src: str, m: Committed, out: List[Effect]) -> None:
        event = self.events.get(m.event)
        if event is None:
            self._late(src, m.event, out)
            return
        if event.state == PINNING:
            return
        r = self._rank(event, src, m.inc)
        if r < 0:
            if event.confirming and src in event.dst and m.incarnation == self.incarnation:
                self._keep(now, event, out)
            return
        if m.n == 0:
            if m.incarnation == self.incarnation:
                self._lapsed(now, event, r, m, out)
            return
        if event.state == RELEASING:
            self._confirmed(now, event, r, m, out)
            return
        event.committed[r] = m.n
        event.via = m.via or event.via
        event.chosen = m.chosen or event.chosen
        if m.incarnation == self.incarnation and m.stamp > event.stamps[r]:
            event.stamps[r] = m.stamp
        if event.state == RESERVING:
            if event.reserved[r] < 0:
                event.reserved[r] = m.n
                self._all_reserved(now, event, out)
        else:
            self._maybe_decide(now, event, out)
        if not self.config.rules.h01 and event.number in self.events:
            self._release_early(event, r, out)

    def _lapsed(self, now: int, event: Event, r: int, m: Committed, out: List[Effect]) -> None:
        """That rank's retention is over: what it committed may have been evicted."""
        if event.state == RELEASING:
            self._keep(now, event, out)
        elif event.committed[r] >= 0 and m.stamp >= event.stamps[r]:
            self.fail(now, event, "retention_lapsed", out)

    def _maybe_decide(self, now: int, event: Event, out: List[Effect]) -> None:
        if min(event.committed) < event.n:
            return
        if not event.request.copy and self.config.rules.h35:
            # A retention that lapsed before Decide guards nothing: each rank must have said so freshly (H35).
            stale = [r for r in range(len(event.dst)) if now - event.stamps[r] >= self.config.lease_ns]
            if stale:
                self._retain(now, event, stale, out)
                return
        self._decide(now, event, out)

    def _retain(self, now: int, event: Event, ranks: List[int], out: List[Effect]) -> None:
        for r in ranks:
            out.append(
                Send(event.dst[r], Retain(self.incarnation, event.number, event.request.dst[1], now))
            )

    def _decide(self, now: int, event: Event, out: List[Effect]) -> None:
        event.state = RELEASING
        event.give_up_ns = now + self.config.release_give_up_ns
        if self.config.rules.h08:
            out.append(
                Journal(
                    Decide(
                        event.number,
                        event.n,
                        event.num_tokens,
                        tuple(zip(event.src, event.pids)),
                        tuple(zip(event.dst, event.dst_incs)),
                        not event.request.copy,
                    )
                )
            )
        out.append(Note("decided", event.number))
        self._release(event, out)
        self._alarm(now, event)

    # ---- RELEASING
    def _release(self, event: Event, out: List[Effect]) -> None:
        for r, address in enumerate(event.src):
            if event.released[r] is None:
                out.append(
                    Send(
                        address,
                        Release(self.incarnation, event.number, event.pids[r], event.n, not event.keep),
                    )
                )

    def _release_early(self, event: Event, r: int, out: List[Effect]) -> None:
        """What goes wrong without h01: one rank's source is deleted before every destination rank has committed."""
        out.append(Send(event.src[r], Release(self.incarnation, event.number, event.pids[r], event.n, not event.keep)))

    def _confirmed(self, now: int, event: Event, r: int, m: Committed, out: List[Effect]) -> None:
        if event.confirming and m.incarnation == self.incarnation:
            event.committed[r] = m.n
            if min(event.committed) >= event.n:
                event.confirming = False
                self._release(event, out)

    def _keep(self, now: int, event: Event, out: List[Effect]) -> None:
        """A retention may have lapsed: from here on every Release keeps."""
        event.keep = True
        if event.confirming:
            event.confirming = False
            self._release(event, out)

    def on_released(self, now: int, src: str, m: Released, out: List[Effect]) -> None:
        event = self.events.get(m.event)
        if event is None or event.state != RELEASING or src not in event.src:
            return
        r = event.src.index(src)
        if m.pid != event.pids[r] or event.released[r] is not None:
            return
        deleted = -1 if m.why == "pin_gone" and self.config.rules.h25 else m.deleted
        event.released[r] = SourceOutcome(r, deleted, m.kept, m.why)
        self._maybe_done(now, event, out)

    def _maybe_done(self, now: int, event: Event, out: List[Effect]) -> None:
        if None not in event.released:
            self.finish(now, event, DONE, "", out)

    # ---- the world around it changes
    def on_refused(self, now: int, src: str, m: Refused, out: List[Effect]) -> None:
        event = self.events.get(m.event)
        if event is None or event.state == RELEASING:
            return
        detail = f"{src}: have {m.have or m.inc}, want {m.want}" if m.want else f"{src}: {m.have}" if m.have else src
        if m.of == "Pin":
            if event.state == PINNING and src in event.src:
                self.fail(now, event, m.why, out, detail)
        elif src in event.dst and event.state != PINNING:
            r = event.dst.index(src)
            if event.committed[r] < 0 and (m.why == "stale_inc" or m.inc == event.dst_incs[r]):
                self.fail(now, event, m.why, out, detail)

    def participant_changed(self, now: int, address: str, location: str, why: str, out: List[Effect]) -> None:
        """``address`` has a new epoch, is dead, or its ``location`` was cleared ("" means all of it)."""
        for number in list(self.by_node.get(address, ())):
            event = self.events.get(number)
            if event is None:
                continue
            m = event.request
            as_src = address in event.src and location in ("", m.src[1])
            as_dst = address in event.dst and location in ("", m.dst[1])
            if event.state != RELEASING:
                if as_src or as_dst:
                    role = "destination" if as_dst else "source"
                    self.fail(now, event, f"{role}_{why}", out, address)
                continue
            if as_dst:
                self._keep(now, event, out)
            if as_src and not location:
                r = event.src.index(address)
                if event.released[r] is None:
                    event.released[r] = SourceOutcome(r, -1, 0, why)
                    if why != "restarted":
                        # Silent is not ended: a Release may wait in front of a paused process, as after a give-up.
                        self.given_up[number] = None
                    self._maybe_done(now, event, out)

    def on_retry(self, now: int, name: Tuple[str, int, int], out: List[Effect]) -> None:
        event = self.events.get(name[1])
        if event is None:
            return
        if event.state == RELEASING:
            self._retry_release(now, event, out)
        elif now >= event.deadline_ns:
            self.fail(now, event, "deadline", out)
            return
        elif event.state == PINNING:
            self._pin(event, out)
        else:
            self._fetch(now, event, out)
            self._retain(now, event, [r for r, n in enumerate(event.committed) if n >= 0], out)
            if now - event.renewed_ns >= self.config.renew_ns:
                event.renewed_ns = now
                for r, address in enumerate(event.src):
                    out.append(Send(address, Renew(self.incarnation, event.number, event.pids[r], event.pinned_ns[r])))
        if event.number in self.events:
            self._alarm(now, event)

    def _retry_release(self, now: int, event: Event, out: List[Effect]) -> None:
        if now >= event.give_up_ns:
            if event.confirming:
                event.give_up_ns = now + self.config.release_give_up_ns
                self._keep(now, event, out)
                return
            for r in range(len(event.src)):
                if event.released[r] is None:
                    event.released[r] = SourceOutcome(r, -1, 0, "unreachable")
            self.given_up[event.number] = None
            self.finish(now, event, DONE, "source_unreachable", out)
            return
        self._retain(now, event, list(range(len(event.dst))), out)
        if not event.confirming:
            self._release(event, out)

    # ---- ends
    def fail(
        self, now: int, event: Event, why: str, out: List[Effect], detail: str = "", but: str = ""
    ) -> None:
        """Before Decide only. Tell everyone once, best effort: leases, copies and timers end the rest by themselves.
        ``but``: a source that has just said that it holds nothing."""
        event.detail = detail
        if event.state != PINNING:
            for address in event.dst:
                out.append(Send(address, End(self.incarnation, event.number)))
        for r, address in enumerate(event.src):
            if address != but:
                out.append(Send(address, Release(self.incarnation, event.number, event.pids[r], 0, False)))
        self.finish(now, event, FAILED, why, out)

    def finish(self, now: int, event: Event, state: str, reason: str, out: List[Effect]) -> None:
        if state == DONE and event.state == RELEASING and event.number not in self.given_up:
            for address in event.dst:
                out.append(Send(address, End(self.incarnation, event.number)))
        event.state = state
        event.reason = reason
        number = event.number
        del self.events[number]
        self.timers.cancel(("retry", number, 0))
        by_node = self.by_node
        for address in event.src + event.dst:
            held = by_node.get(address)
            if held is not None:
                held.pop(number, None)
        num_tokens = event.num_tokens if state == DONE else 0
        source = tuple([released for released in event.released if released is not None])
        outcome = Outcome(
            number, state, reason, num_tokens, event.n, source, event.detail, event.via, event.promised
        )
        self.remember(now, outcome)
        out.append(Journal(outcome))
        self._answer(event, event.clients + event.waiters, out)
        if self.on_ended is not None:
            self.on_ended(now, event, out)

    def remember(self, now: int, outcome: Outcome) -> None:
        self.ended[outcome.event] = outcome
        self.ended_ns[outcome.event] = now
        if len(self.ended) == 1:
            self.timers.set(("forget", 0, 0), now + self.config.events_kept_ns)
        if len(self.ended) > self.config.events_kept:
            self._forget(next(iter(self.ended)))

    def on_forget(self, now: int, name: Tuple[str, int, int], out: List[Effect]) -> None:
        for number, ended_ns in list(self.ended_ns.items()):
            if ended_ns + self.config.events_kept_ns > now:
                self.timers.set(name, ended_ns + self.config.events_kept_ns)
                return
            self._forget(number)

    def _forget(self, number: int) -> None:
        del self.ended[number]
        del self.ended_ns[number]
        self.given_up.pop(number, None)
        idem = self.idem_of.pop(number, "")
        if idem:
            del self.by_idem[idem]
            del self.requests[idem]

    def _late(self, src: str, number: int, out: List[Effect]) -> None:
        """A destination still works for an event that is over. After a give-up its retention must lapse by itself."""
        if number not in self.given_up:
            out.append(Send(src, End(self.incarnation, number)))

    def answer(self, number: int, op: str) -> Answer:
        """What is known of an event now."""
        event = self.events.get(number)
        if event is not None:
            tokens = event.num_tokens if event.state in (COPYING, RELEASING) else 0
            here = event.arrived() if event.state == COPYING else 0
            return Answer(
                op, event.state, tokens, number, event.reason, event.detail, event.n, via=event.via, here=here
            )
        outcome = self.ended.get(number)
        if outcome is None:
            return Answer(op, "refused", 0, number, "unknown_event")
        return Answer(
            op,
            outcome.state,
            outcome.num_tokens,
            number,
            outcome.reason,
            outcome.detail,
            outcome.n,
            outcome.source,
            via=outcome.via,
        )

    def answer_again(self, client: str, number: int, op: str, out: List[Effect]) -> None:
        """What was answered the first time: num_tokens once that was fixed, and the end."""
        outcome = self.ended.get(number)
        if outcome is not None and outcome.promised:
            out.append(Send(client, Answer(op, COPYING, outcome.promised, number, n=outcome.n, via=outcome.via)))
        out.append(Send(client, self.answer(number, op)))

    def _answer(self, event: Event, clients: List[Tuple[str, str]], out: List[Effect]) -> None:
        for client, op in clients:
            out.append(Send(client, self.answer(event.number, op)))
