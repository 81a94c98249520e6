"""A move as its source sees it: the pin of one event, and the writer of one reservation (push only).

The pin is the token: one id, good for one life of one pin, is the fence, the permission to delete, and what makes
Release idempotent. A source remembers no finished event.
"""

from __future__ import annotations

from typing import Dict, List, Tuple, Union, final

from kvcore.protocol.config import Config
from kvcore.protocol.machine import AbortCopy, CopyDone, CopyMoved, CopyStopped, Effect, Note, Send, StartCopy, Timers
from kvcore.protocol.messages import (
    NO_ID,
    Fence,
    Fenced,
    Key,
    Moved,
    Pid,
    Pin,
    Pinned,
    Push,
    Pushed,
    Refused,
    Release,
    Released,
    Renew,
    Rid,
    Stop,
    Stopped,
)
from kvcore.protocol.pool import FEW, Pool, count_down, count_up


@final
class PinState:
    def __init__(self, event: int, pid: Pid, pool: Pool, keys: Tuple[Key, ...], slots: Tuple[int, ...], move: bool):
        self.event: int = event
        self.pid: Pid = pid
        self.pool: Pool = pool
        self.keys: Tuple[Key, ...] = keys
        self.slots: Tuple[int, ...] = slots
        self.move: bool = move
        self.lease_ns: int = 0
        self.until_ns: int = 0


@final
class Writer:
    def __init__(self, dst: str, pid: Pid) -> None:
        self.dst: str = dst
        self.pid: Pid = pid


@final
class Source:
    """The pins and writers of one rank."""

    def __init__(self, pools: Dict[str, Pool], timers: Timers, config: Config) -> None:
        self.pools: Dict[str, Pool] = pools
        self.timers: Timers = timers
        self.config: Config = config
        self.epoch: int = 0
        self.counter: int = 0
        self.pins: Dict[int, PinState] = {}
        self.alive: Dict[Pid, int] = {}
        self.writers: Dict[Rid, Writer] = {}
        #: (destination, its epoch) -> highest reservation id seen there: a doubled or late Push is refused (H13)
        self.marks: Dict[Tuple[str, int], int] = {}
        #: below the mark and never seen: what a Push that was heard is to be written after, and that was lost or is
        #: late. Each may come once, until a Stop says that it is not wanted any more.
        self.awaited: Dict[Tuple[str, int, int], None] = {}
        #: only without h04: what a source that remembered finished events would delete again
        self.finished: Dict[int, PinState] = {}

    def restart(self, epoch: int, out: List[Effect]) -> None:
        """A new epoch: nothing of the old life is believed."""
        for event in list(self.pins):
            self._unpin(event)
        for rid in self.writers:
            out.append(AbortCopy(rid))
        self.epoch = epoch
        self.counter = 0

    # ---- pins
    def on_pin(self, now: int, src: str, m: Pin, out: List[Effect]) -> None:
        pin = self.pins.get(m.event)
        if pin is None:
            pool = self.pools.get(m.location)
            if pool is None:
                known = ", ".join(self.pools)
                out.append(Send(src, Refused(m.event, "Pin", "unknown_location", NO_ID, known, m.location)))
                return
            slots = tuple(pool.prefix(m.keys))
            if not slots:
                out.append(Send(src, Pinned(m.event, pool.inc)))
                return
            self.counter += 1
            pid = (self.epoch if self.config.rules.h11 else 0, self.counter)
            pin = PinState(m.event, pid, pool, m.keys, slots, m.move)
            self.pins[m.event] = pin
            self.alive[pid] = m.event
            pool.ref_all(slots)
            if m.move:
                count_up(pool.moving, slots)
            pin.lease_ns = m.lease_ns
            self._lease(now, pin)
        elif not self.config.rules.h39:
            self._lease(now, pin)
        out.append(Send(src, Pinned(m.event, pin.pool.inc, pin.pid, pin.slots, now)))

    def on_renew(self, now: int, src: str, m: Renew, out: List[Effect]) -> None:
        pin = self.pins.get(m.event)
        if pin is not None and pin.pid == m.pid:
            self._lease(m.at_ns if self.config.rules.h39 else now, pin)
            out.append(Send(src, Pinned(m.event, pin.pool.inc, pin.pid, pin.slots, now)))
        else:
            # Never a new pin: what it would hold may not be what the event's bytes were read from (H15).
            out.append(Send(src, Pinned(m.event, NO_ID)))

    def _lease(self, since_ns: int, pin: PinState) -> None:
        """Run the lease from ``since_ns`` on, a moment of this process's clock; never shorten it."""
        until_ns = since_ns + pin.lease_ns
        if until_ns > pin.until_ns and self.config.rules.h22:
            pin.until_ns = until_ns
            self.timers.set(("lease", pin.event, 0), until_ns)

    def on_lease(self, now: int, name: Tuple[str, int, int], out: List[Effect]) -> None:
        self._unpin(name[1])
        out.append(Note("pin_lapsed", name[1]))

    def _unpin(self, event: int, dropped: int = 0) -> PinState:
        """Kill the pin's id, then let go of its slots; of the first ``dropped`` for the index too."""
        pin = self.pins.pop(event)
        del self.alive[pin.pid]
        self.timers.cancel(("lease", event, 0))
        pool = pin.pool
        if pin.move:
            count_down(pool.moving, pin.slots)
        if dropped:
            pool.unref_all(pin.slots[dropped:])
            pool.unref_all(pin.slots[:dropped], 2)
        else:
            pool.unref_all(pin.slots)
        if not self.config.rules.h04:
            self.finished[event] = pin
        return pin

    def lose(self, pool: Pool) -> None:
        """The bytes of a location are gone, and the permission to read them with them."""
        for event in [event for event, pin in self.pins.items() if pin.pool is pool]:
            self._unpin(event)

    def on_release(self, now: int, src: str, m: Release, out: List[Effect]) -> None:
        rules = self.config.rules
        pin = self.pins.get(m.event)
        if not rules.h04 and pin is None and m.event in self.finished:
            old = self.finished[m.event]
            for key in old.keys[: m.n] if m.delete else ():
                if key in old.pool.index:
                    old.pool.drop(key)
        if pin is None or (pin.pid != m.pid and m.pid != NO_ID and rules.h05):
            out.append(Send(src, Released(m.event, m.pid, 0, 0, "pin_gone")))
            return
        deleted = dropped = 0
        kept_at: List[int] = []
        why = ""
        if m.delete:
            n = m.n if rules.h21 else len(pin.slots)
            if n >= FEW and pin.pool.drop_all(pin.keys[:n], pin.slots[:n]):
                dropped = deleted = n
                n = 0
            for i in range(n - 1, -1, -1):
                reason = self._keeps(pin, i)
                if reason:
                    kept_at.append(i)
                    why = why or reason
                else:
                    pin.pool.drop(pin.keys[i])
                    deleted += 1
        self._unpin(m.event, dropped)
        out.append(Send(src, Released(m.event, m.pid, deleted, len(kept_at), why, tuple(kept_at))))

    def _keeps(self, pin: PinState, i: int) -> str:
        """Why the i-th pinned chunk must stay, or ""."""
        rules = self.config.rules
        pool = pin.pool
        key = pin.keys[i]
        entry = pool.index.get(key)
        if entry is None:
            return "gone"
        if entry.slot != pin.slots[i] and rules.h03:
            return "replaced"
        if key in pool.kids and rules.h16:
            return "child_here"
        if entry.slot in pool.user:
            return "user_pin"
        if key in pool.retained and rules.h34:
            return "retained"
        return ""

    def on_fence(self, now: int, src: str, m: Fence, out: List[Effect]) -> None:
        out.append(Send(src, Fenced(m.rid, m.pid in self.alive)))

    # ---- writers
    def on_push(self, now: int, src: str, m: Push, out: List[Effect]) -> None:
        rules = self.config.rules
        if m.rid in self.writers:
            return
        where = (src, m.epoch)
        mark = self.marks.get(where, 0)
        if m.rid[1] <= mark and rules.h13:
            if (*where, m.rid[1]) not in self.awaited:
                out.append(Send(src, Pushed(m.rid, False, "copy_failed")))
                return
            del self.awaited[(*where, m.rid[1])]
        if m.after[1] > mark:
            self.awaited[(*where, m.after[1])] = None
        self.marks[where] = max(m.rid[1], mark)
        if m.pid not in self.alive and rules.h09:
            out.append(Send(src, Pushed(m.rid, False, "source_changed")))
            return
        self.writers[m.rid] = Writer(src, m.pid)
        out.append(
            StartCopy(
                m.rid, False, src, m.epoch, m.location, m.slots, m.src_location, m.src_slots, m.lens, m.endpoint,
                m.keys, m.terms, m.after,
            )
        )

    def on_stop(self, now: int, src: str, m: Stop, out: List[Effect]) -> None:
        if self.config.rules.h13c:
            where = (src, m.rid[0])
            self.awaited.pop((*where, m.rid[1]), None)
            self.marks[where] = max(m.rid[1], self.marks.get(where, 0))
        if m.rid in self.writers:
            out.append(AbortCopy(m.rid))  # its end answers
        else:
            out.append(Send(src, Stopped(m.rid)))

    def on_copy_moved(self, item: CopyMoved, out: List[Effect]) -> bool:
        """True if ``item`` is of a writer of mine."""
        writer = self.writers.get(item.rid)
        if writer is not None:
            out.append(Send(writer.dst, Moved(item.rid, item.num_tokens)))
        return writer is not None

    def writer_ended(self, now: int, item: Union[CopyDone, CopyStopped], out: List[Effect]) -> bool:
        """True if ``item`` was the end of a writer of mine."""
        writer = self.writers.pop(item.rid, None)
        if writer is None:
            return False
        if isinstance(item, CopyDone):
            alive = writer.pid in self.alive or not self.config.rules.h09
            why = item.why if not item.ok else "" if alive else "source_changed"
            out.append(Send(writer.dst, Pushed(item.rid, item.ok and alive, why, item.via, item.chosen)))
        else:
            out.append(Send(writer.dst, Stopped(item.rid)))
        return True
