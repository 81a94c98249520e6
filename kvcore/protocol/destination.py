"""A move as its destination sees it: the reservation of one event, its quarantine and its retention."""

from __future__ import annotations

from typing import Dict, List, Tuple, final

from kvcore.protocol.config import Config
from kvcore.protocol.machine import AbortCopy, CopyDone, CopyMoved, Effect, Note, Send, StartCopy, Timers
from kvcore.protocol.messages import (
    NO_ID,
    Committed,
    End,
    Fence,
    Fenced,
    Fetch,
    Key,
    Moved,
    Push,
    Pushed,
    Refused,
    Reserved,
    Retain,
    Rid,
    Stop,
    Stopped,
    Suspect,
)
from kvcore.protocol.pool import FEW, Pool, parent_of
from kvcore.protocol.reservation import Part, Quarantine, Reservation, Retention


@final
class Destination:
    """The reservations, quarantines and retentions of one rank."""

    def __init__(self, name: str, controller: str, pools: Dict[str, Pool], timers: Timers, config: Config) -> None:
        self.name: str = name
        self.controller: str = controller
        self.pools: Dict[str, Pool] = pools
        self.timers: Timers = timers
        self.config: Config = config
        self.epoch: int = 0
        self.counter: int = 0
        #: where a pushing peer finds this process's memory
        self.endpoint: str = ""
        self.reservations: Dict[int, Reservation] = {}
        self.by_rid: Dict[Rid, Reservation] = {}
        self.quarantines: Dict[Rid, Quarantine] = {}
        self.retentions: Dict[int, Retention] = {}
        #: peer -> highest epoch of it that is gone and whose window is closed
        self.gone: Dict[str, int] = {}

    def restart(self, now: int, epoch: int, out: List[Effect]) -> None:
        """A new epoch: reservations of the old one end; what may still be written stays quarantined. Retentions live
        on: a process expelled for silence has kept its bytes, and a source may be about to rely on them (H40)."""
        for event in list(self.reservations):
            self._abort(now, self.reservations[event], out)
        if not self.config.rules.h40:
            for event in list(self.retentions):
                self._unretain(event)
        self.epoch = epoch
        self.counter = 0

    # ---- Fetch
    def on_fetch(self, now: int, src: str, m: Fetch, out: List[Effect]) -> None:
        pool = self.pools.get(m.location)
        if pool is None or pool.inc != m.inc:
            out.append(Send(src, Refused(m.event, "Fetch", "stale_inc", pool.inc if pool else NO_ID)))
            return
        retention = self.retentions.get(m.event)
        if retention is not None:
            self._retain_again(now, m.event, retention)
            out.append(self._committed(src, m.event, retention, m.stamp, m.incarnation))
            return
        reservation = self.reservations.get(m.event)
        if reservation is not None:
            self._stamp(reservation, src, m.stamp, m.incarnation)
            out.append(self._reserved(src, reservation))
            for part in reservation.parts:
                if part.copied and not part.good:
                    out.append(Send(reservation.src, Fence(reservation.pid, part.rid)))
                elif reservation.push and not part.good:
                    out.append(self._push(reservation, part))
            return
        self._reserve(now, src, pool, m, out)

    def _reserve(self, now: int, src: str, pool: Pool, m: Fetch, out: List[Effect]) -> None:
        rules = self.config.rules
        index = pool.index
        want = len(m.keys)
        held = [-1] * want
        # First hold what is here, so that fitting the rest can never evict the prompt's own head (H07, H19).
        here = not index.keys().isdisjoint(m.keys)
        if here:
            for i in range(want):
                entry = index.get(m.keys[i])
                # Leaving is not there: a chunk under a deleting pin is copied anew (H02).
                if entry is not None and not (rules.h02 and entry.slot in pool.moving):
                    held[i] = entry.slot
                    if rules.h07 and rules.h19:
                        pool.ref(entry.slot)
        own = pool.take_for(held, m.evict) if here else pool.take_all(want, m.evict)
        n = len(own)
        if not (rules.h07 and rules.h19):
            self._hold_late(pool, m.keys, held)
        for i in range(n, want):
            if held[i] >= 0 and rules.h07:
                pool.unref(held[i])
        if n == 0:
            if rules.h23:
                have = f"{pool.slots} slots, {len(pool.refs)} in use"
                out.append(Send(src, Refused(m.event, "Fetch", "full", pool.inc, have, f"{want} chunks")))
            return
        r = Reservation((self.epoch, self.counter + 1), pool, m, n, held[:n], own, src)
        out.append(self._reserved(src, r))
        self.reservations[m.event] = r
        if len(r.present) == n:
            r.step = n  # nothing is copied, so there is nothing to go in steps
        self._begin_parts(r, out)
        if r.parts[0].good:
            self._advance(now, r, out)
        else:
            self._alarm(now, r)

    def _reserved(self, controller: str, r: Reservation) -> Send:
        return Send(controller, Reserved(r.event, r.pool.inc, len(r.keys), r.shown, r.before + r.moved, r.moved))

    def _begin_parts(self, r: Reservation, out: List[Effect]) -> None:
        """Begin as many as may be under way. One whose chunks are all here is good at once."""
        while r.begun < len(r.keys) and len(r.parts) < self.config.step_window:
            self.counter += 1
            part = Part((self.epoch, self.counter), r.begun, min(r.begun + r.step, len(r.keys)), r.newest)
            r.begun = part.end
            r.parts.append(part)
            if r.present and max(r.own[part.start : part.end]) < 0:
                part.copied = part.good = True
                continue
            self.by_rid[part.rid] = r
            out.append(self._push(r, part) if r.push else self._read(r, part))
            r.newest = part.rid
            if not self.config.rules.h10 and not r.push:
                out.append(Send(r.src, Fence(r.pid, part.rid)))

    def _advance(self, now: int, r: Reservation, out: List[Effect]) -> None:
        """Make the good parts visible that have none before them that is not, and begin others in their stead."""
        shown = r.shown
        while r.parts and r.parts[0].good:
            part = r.parts.pop(0)
            if part.end == len(r.keys):
                self._commit(now, r, out)
                return
            self._show(now, r, part)
            self._begin_parts(r, out)
        if r.shown > shown:
            out.append(self._reserved(r.controller, r))
        self._alarm(now, r)

    def _alarm(self, now: int, r: Reservation) -> None:
        """For the part that all others wait for. A source that does not answer for a lease has no pin any more."""
        if self.config.rules.h38:
            limit = self.config.lease_ns if r.parts[0].copied else self.config.copy_max_ns
            self.timers.set(("reservation", r.event, 0), now + limit)

    def _hold_late(self, pool: Pool, keys: Tuple[Key, ...], held: List[int]) -> None:
        """What goes wrong without h19: what was counted as present may have been evicted to fit the rest."""
        if self.config.rules.h07:
            for i, slot in enumerate(held):
                entry = pool.index.get(keys[i])
                if slot >= 0 and entry is not None:
                    held[i] = entry.slot
                    pool.ref(entry.slot)
                elif slot >= 0:
                    held[i] = -2

    def _read(self, r: Reservation, part: Part) -> StartCopy:
        ours, theirs, lens, keys = r.to_copy(part)
        return StartCopy(
            part.rid, True, r.src, r.src_epoch, r.src_location, theirs, r.pool.name, ours, lens, r.endpoint, keys,
            r.terms, part.after,
        )  # fmt: skip

    def _push(self, r: Reservation, part: Part) -> Send:
        ours, theirs, lens, keys = r.to_copy(part)
        push = Push(
            part.rid, r.pid, r.src_location, theirs, r.pool.name, ours, lens, self.epoch, self.endpoint, keys,
            r.terms, part.after,
        )  # fmt: skip
        return Send(r.src, push)

    def _stamp(self, r: Reservation, controller: str, stamp: int, incarnation: int) -> None:
        r.controller = controller
        r.stamp = max(stamp, r.stamp) if incarnation == r.incarnation else stamp
        r.incarnation = incarnation

    # ---- the bytes are on their way
    def on_moved(self, now: int, src: str, m: Moved, out: List[Effect]) -> None:
        self._moved(m.rid, m.num_tokens, out)

    def on_copy_moved(self, item: CopyMoved, out: List[Effect]) -> None:
        self._moved(item.rid, item.num_tokens, out)

    def _moved(self, rid: Rid, num_tokens: int, out: List[Effect]) -> None:
        r = self.by_rid.get(rid)
        if r is not None:
            part = r.part(rid)
            if num_tokens > part.moved and not part.copied:
                r.moved += num_tokens - part.moved
                part.moved = num_tokens
                out.append(self._reserved(r.controller, r))

    def _arrived(self, r: Reservation, part: Part) -> None:
        part.copied = True
        if r.step < len(r.keys):  # else whoever looks sees the end next
            whole = sum([r.lens[i] for i in range(part.start, part.end) if r.own[i] >= 0])
            r.moved += whole - part.moved
            part.moved = whole

    # ---- the bytes have arrived, or will not
    def on_copy_done(self, now: int, item: CopyDone, out: List[Effect]) -> None:
        rules = self.config.rules
        r = self.by_rid.get(item.rid)
        if r is None or r.push:
            self.end_quarantine(item.rid)
            return
        part = r.part(item.rid)
        r.via, r.chosen = item.via, item.chosen
        self._arrived(r, part)
        if not item.ok:
            self._refuse(now, r, "copy_failed", out, item.why)
        elif not rules.h09:
            self._good(now, r, part, out)
        elif rules.h10:
            out.append(Send(r.src, Fence(r.pid, part.rid)))
            if part is r.parts[0]:
                self._alarm(now, r)
        elif part.fence is not None:
            self._fenced(now, r, part, part.fence, out)

    def on_fenced(self, now: int, src: str, m: Fenced, out: List[Effect]) -> None:
        r = self.by_rid.get(m.rid)
        if r is None:
            self.end_quarantine(m.rid)
            return
        part = r.part(m.rid)
        if part.copied:
            self._fenced(now, r, part, m.alive, out)
        else:
            part.fence = m.alive

    def _fenced(self, now: int, r: Reservation, part: Part, alive: bool, out: List[Effect]) -> None:
        if alive:
            self._good(now, r, part, out)
        elif self.config.rules.h31:
            self._refuse(now, r, "source_changed", out)
        else:
            part.copied = False
            out.append(self._read(r, part))

    def _good(self, now: int, r: Reservation, part: Part, out: List[Effect]) -> None:
        """Its bytes are what the source held while its pin was alive."""
        del self.by_rid[part.rid]
        part.copied = part.good = True
        if part is r.parts[0]:
            self._advance(now, r, out)

    def on_pushed(self, now: int, src: str, m: Pushed, out: List[Effect]) -> None:
        r = self.by_rid.get(m.rid)
        if r is None and not self.config.rules.h14:
            r = next((other for other in self.reservations.values() if other.push and other.src == src), None)
        if r is None or not r.push:
            self.end_quarantine(m.rid)
            return
        part = r.part(m.rid) if m.rid in self.by_rid else r.parts[0]
        self._arrived(r, part)
        if m.ok:
            r.via, r.chosen = m.via, m.chosen
            self._good(now, r, part, out)
        else:
            self._refuse(now, r, "source_changed" if m.why == "source_changed" else "copy_failed", out, m.why)

    def on_stopped(self, now: int, src: str, m: Stopped, out: List[Effect]) -> None:
        self.end_quarantine(m.rid)

    def _forget(self, r: Reservation) -> None:
        self.reservations.pop(r.event, None)
        for part in r.parts:
            self.by_rid.pop(part.rid, None)
        self.timers.cancel(("reservation", r.event, 0))

    def _unhold(self, r: Reservation) -> None:
        if self.config.rules.h07:
            r.pool.unref_all([slot for slot in r.held if slot >= 0])

    def _refuse(self, now: int, r: Reservation, why: str, out: List[Effect], detail: str = "") -> None:
        """Never tried again under this event (H31). What is visible of it stays, as chunks that nobody needs."""
        self._abort(now, r, out)
        out.append(Send(r.controller, Refused(r.event, "Fetch", why, r.pool.inc, detail)))

    def _show(self, now: int, r: Reservation, part: Part) -> None:
        """Atomically make a part visible that is not the last, and hold it. What another move has meanwhile taken away
        before it stands again: a chunk that is here has those before it (H16), so the first one found ends the look."""
        pool = r.pool
        index = pool.index
        holds = self.config.rules.h07
        start, end = part.start, part.end
        r.shown = end
        while start and holds and r.keys[start - 1] not in index:
            start -= 1
        slots = r.own[start:end]
        if end - start >= FEW and min(slots) >= 0 and index.keys().isdisjoint(r.keys[start:end]):
            r.held[start:end], r.own[start:end] = slots, [-1] * len(slots)
            if holds:
                pool.ref_all(slots)
            pool.put_all(r.keys[:end], r.held[:end], r.lens[:end], start, now)
            return
        for i in range(end - 1, start - 1, -1):
            key = r.keys[i]
            slot = r.own[i]
            entry = index.get(key)
            r.own[i] = -1
            if entry is not None and (slot < 0 or not (self.config.rules.h02 and entry.slot in pool.moving)):
                if slot >= 0:
                    pool.unref(slot)
                    r.held[i] = entry.slot
                    if holds:
                        pool.ref(entry.slot)
                pool.touch(key, now)
                continue
            if slot < 0:
                slot = r.held[i]
                if slot == -2 or not holds:
                    continue  # only without h07 or h19: counted, but gone
            r.held[i] = slot
            if holds:
                pool.ref(slot)
            pool.put(key, slot, parent_of(r.keys, i), r.lens[i], now)

    def _commit(self, now: int, r: Reservation, out: List[Effect]) -> None:
        """Atomically make every key visible, and retain them all until the event is over."""
        self._forget(r)
        pool = r.pool
        index = pool.index
        first = len(r.keys)
        if first >= FEW:
            new = pool.new_from(r.keys)
            if min(r.own[new:], default=0) >= 0:  # else, without h07 or h19, some were counted, but have gone
                pool.put_all(r.keys, r.own, r.lens, new, now)
                first = new
        for i in range(first - 1, -1, -1):
            key = r.keys[i]
            slot = r.own[i]
            entry = index.get(key)
            if slot < 0:
                slot = r.held[i]
                if slot == -2 or (entry is None and not self.config.rules.h07):
                    continue  # only without h07 or h19: counted, but gone
                if entry is not None:
                    if self.config.rules.h07:
                        pool.unref(slot)
                    pool.touch(key, now)
                    continue
            elif entry is not None and not (self.config.rules.h02 and entry.slot in pool.moving):
                pool.unref(slot)
                pool.touch(key, now)
                continue
            pool.put(key, slot, parent_of(r.keys, i), r.lens[i], now)
        retention = self._retain(now, r)
        out.append(self._committed(r.controller, r.event, retention, r.stamp, r.incarnation))

    def _committed(self, controller: str, event: int, kept: Retention, stamp: int, incarnation: int) -> Send:
        committed = Committed(event, kept.inc, kept.n, stamp, incarnation, kept.present, kept.via, kept.chosen)
        return Send(controller, committed)

    # ---- retention
    def _retain(self, now: int, r: Reservation) -> Retention:
        index = r.pool.index
        # Without h07 or h19 a counted key may be gone.
        try:
            retention = Retention(r, r.keys, [index[key].slot for key in r.keys])
        except KeyError:
            keys = tuple([key for key in r.keys if key in index])
            retention = Retention(r, keys, [index[key].slot for key in keys])
        self.retentions[r.event] = retention
        r.pool.retain(retention.keys, retention.slots)
        self.timers.set(("retention", r.event, 0), now + r.retain_ns)
        return retention

    def _retain_again(self, now: int, event: int, retention: Retention) -> None:
        self.timers.set(("retention", event, 0), now + retention.retain_ns)

    def _unretain(self, event: int) -> None:
        retention = self.retentions.pop(event)
        self.timers.cancel(("retention", event, 0))
        retention.pool.unretain(retention.keys, retention.slots)

    def on_retain(self, now: int, src: str, m: Retain, out: List[Effect]) -> None:
        retention = self.retentions.get(m.event)
        reservation = self.reservations.get(m.event)
        if retention is not None:
            self._retain_again(now, m.event, retention)
            out.append(self._committed(src, m.event, retention, m.stamp, m.incarnation))
        elif reservation is not None:
            self._stamp(reservation, src, m.stamp, m.incarnation)
            out.append(self._reserved(src, reservation))
        else:
            pool = self.pools.get(m.location)
            out.append(Send(src, Committed(m.event, pool.inc if pool else NO_ID, 0, m.stamp, m.incarnation)))

    def on_retention_timer(self, now: int, name: Tuple[str, int, int], out: List[Effect]) -> None:
        self._unretain(name[1])
        out.append(Note("retention_lapsed", name[1]))

    # ---- the end of it
    def on_end(self, now: int, src: str, m: End, out: List[Effect]) -> None:
        if m.event in self.retentions:
            self._unretain(m.event)
        r = self.reservations.get(m.event)
        if r is not None:
            self._abort(now, r, out)

    def on_reservation_timer(self, now: int, name: Tuple[str, int, int], out: List[Effect]) -> None:
        """The copy, the Push or the Fence has not been answered in time (H38)."""
        r = self.reservations[name[1]]
        self._refuse(now, r, "source_changed" if r.parts[0].copied else "copy_failed", out, "timed out")

    def clear(self, now: int, pool: Pool, out: List[Effect]) -> None:
        """A clear ends the location's reservations and retentions (H20)."""
        if self.config.rules.h20:
            for r in [r for r in self.reservations.values() if r.pool is pool]:
                self._abort(now, r, out)
        for event in [event for event, retention in self.retentions.items() if retention.pool is pool]:
            self._unretain(event)

    def _abort(self, now: int, r: Reservation, out: List[Effect]) -> None:
        """Slots whose writer has ended, or has none yet, are free at once; the others once it is known to have."""
        self._forget(r)
        self._unhold(r)
        r.pool.unref_all([slot for slot in r.own[r.begun :] if slot >= 0])
        writer_gone = r.push and self.gone.get(r.src, 0) >= r.src_epoch
        for part in r.parts:
            if part.copied or writer_gone or not self.config.rules.h12:
                r.pool.unref_all(r.own_of(part))
                if not part.copied and not r.push:
                    out.append(AbortCopy(part.rid))
                continue
            self.quarantines[part.rid] = Quarantine(r.pool, r.own_of(part), r.src, r.src_epoch, r.push)
            if r.push:
                out.append(Send(r.src, Stop(part.rid)))
                self.timers.set(("quarantine", part.rid[0], part.rid[1]), now + self.config.stop_retry_ns)
            else:
                out.append(AbortCopy(part.rid))

    def end_quarantine(self, rid: Rid) -> None:
        """The writer of ``rid`` is known to have stopped. Harmless for any other rid."""
        quarantine = self.quarantines.pop(rid, None)
        if quarantine is not None:
            self.timers.cancel(("quarantine", rid[0], rid[1]))
            quarantine.pool.unref_all(quarantine.slots)

    def on_quarantine_timer(self, now: int, name: Tuple[str, int, int], out: List[Effect]) -> None:
        rid = (name[1], name[2])
        quarantine = self.quarantines[rid]
        self.timers.set(name, now + self.config.stop_retry_ns)
        out.append(Send(quarantine.src, Stop(rid)))
        out.append(Send(self.controller, Suspect(quarantine.src, quarantine.src_epoch)))

    def window_closed(self, peer: str, epoch: int) -> None:
        """Nothing of (peer, epoch) lands here any more: its quarantines end (H30)."""
        self.gone[peer] = max(epoch, self.gone.get(peer, 0))
        for rid in [rid for rid, q in self.quarantines.items() if q.src == peer and q.src_epoch <= epoch]:
            self.end_quarantine(rid)
