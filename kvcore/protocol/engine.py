"""What an engine and its users do with one rank's pools: store new KV, use it, hold it (a user's pin)."""

from __future__ import annotations

from typing import Dict, List, Tuple, Union, final

from kvcore.protocol.config import Config
from kvcore.protocol.machine import Effect, FillDone, Note, ReadDone, Send, StartFill, StartRead, Timers
from kvcore.protocol.messages import Answer, Held, Hold, Key, StoreRequest, Unhold, UseRequest
from kvcore.protocol.pool import Pool, count_down, count_up, parent_of


@final
class Fill:
    def __init__(self, client: str, m: StoreRequest, pool: Pool, held: List[int], own: List[int]) -> None:
        self.client: str = client
        self.op: str = m.op
        self.keys: Tuple[Key, ...] = m.keys
        self.lens: Tuple[int, ...] = m.lens
        self.pool: Pool = pool
        self.clears: int = pool.clears
        self.held: List[int] = held
        self.own: List[int] = own


@final
class Read:
    def __init__(self, client: str, op: str, pool: Pool, slots: List[int], num_tokens: int) -> None:
        self.client: str = client
        self.op: str = op
        self.pool: Pool = pool
        self.slots: List[int] = slots
        self.num_tokens: int = num_tokens


@final
class UserPin:
    def __init__(self, pool: Pool, slots: List[int]) -> None:
        self.pool: Pool = pool
        self.slots: List[int] = slots


@final
class Engine:
    def __init__(self, pools: Dict[str, Pool], timers: Timers, config: Config) -> None:
        self.pools: Dict[str, Pool] = pools
        self.timers: Timers = timers
        self.config: Config = config
        self.counter: int = 0
        self.fills: Dict[int, Fill] = {}
        self.reads: Dict[int, Read] = {}
        self.holds: Dict[int, UserPin] = {}

    # ---- store: new bytes are indexed only when whole
    def on_store(self, now: int, src: str, m: StoreRequest, out: List[Effect]) -> None:
        pool = self.pools.get(m.location)
        if pool is None:
            out.append(Send(src, Answer(m.op, "refused", reason="unknown_location", detail=", ".join(self.pools))))
            return
        held: List[int] = []
        for key in m.keys:
            entry = pool.index.get(key)
            if entry is not None:
                pool.ref(entry.slot)
                held.append(entry.slot)
            else:
                held.append(-1)
        own = pool.take_for(held, True)
        pool.unref_all([slot for slot in held[len(own) :] if slot >= 0])
        fill = Fill(src, m, pool, held[: len(own)], own)
        if not own:
            out.append(Send(src, Answer(m.op, "refused", reason="full", detail=f"{pool.slots} slots")))
        elif max(own) < 0:
            self._stored(now, fill, out)
        else:
            self.counter += 1
            self.fills[self.counter] = fill
            new = [i for i, slot in enumerate(own) if slot >= 0]
            out.append(
                StartFill(
                    self.counter,
                    pool.name,
                    tuple(own[i] for i in new),
                    tuple(m.keys[i] for i in new),
                    tuple(m.lens[i] for i in new),
                )
            )

    def on_fill_done(self, now: int, item: FillDone, out: List[Effect]) -> None:
        fill = self.fills.pop(item.fid, None)
        if fill is None:
            return  # said twice
        if item.ok and fill.clears == fill.pool.clears:
            self._stored(now, fill, out)
            return
        fill.pool.unref_all([slot for slot in fill.own + fill.held if slot >= 0])
        why = "cleared" if item.ok else "store_failed"
        out.append(Send(fill.client, Answer(fill.op, "refused", reason=why)))

    def _stored(self, now: int, fill: Fill, out: List[Effect]) -> None:
        pool = fill.pool
        keys = fill.keys[: len(fill.own)]
        first = pool.new_from(keys)
        if min(fill.own[first:], default=0) >= 0:
            pool.put_all(keys, fill.own, fill.lens, first, now)
        else:  # what was here has gone meanwhile
            first = len(keys)
        for i in range(first - 1, -1, -1):
            key = fill.keys[i]
            slot = fill.own[i] if fill.own[i] >= 0 else fill.held[i]
            if key in pool.index:
                pool.unref(slot)
                pool.touch(key, now)
            else:
                pool.put(key, slot, parent_of(fill.keys, i), fill.lens[i], now)
        n = len(fill.own)
        out.append(Send(fill.client, Answer(fill.op, "ok", num_tokens=sum(fill.lens[:n]), n=n)))

    # ---- use: a local reader holds references (H27)
    def on_use(self, now: int, src: str, m: UseRequest, out: List[Effect]) -> None:
        pool = self.pools.get(m.location)
        slots = pool.prefix(m.keys) if pool is not None else []
        n = len(slots)
        if pool is None or n == 0:
            out.append(Send(src, Answer(m.op, "ok", reason="nothing_held")))
            return
        for i in range(n - 1, -1, -1):
            pool.touch(m.keys[i], now)
            if self.config.rules.h27:
                pool.ref(slots[i])
        self.counter += 1
        self.reads[self.counter] = Read(src, m.op, pool, slots, sum(m.lens[:n]))
        out.append(StartRead(self.counter, m.location, tuple(slots), m.keys[:n], m.lens[:n], m.hold_ns))

    def on_read_done(self, now: int, item: ReadDone, out: List[Effect]) -> None:
        read = self.reads.pop(item.fid, None)
        if read is None:
            return  # said twice
        if self.config.rules.h27:
            read.pool.unref_all(read.slots)
        if item.ok:
            answer = Answer(read.op, "ok", num_tokens=read.num_tokens, n=len(read.slots))
        else:
            answer = Answer(read.op, "failed", reason="wrong_bytes", n=len(read.slots))
            out.append(Note("wrong_bytes", 0, read.op))
        out.append(Send(read.client, answer))

    # ---- user pins: an owner and a lease, so that a pin cannot leak
    def on_hold(self, now: int, src: str, m: Hold, out: List[Effect]) -> None:
        hold = self.holds.get(m.event)
        if hold is None:
            pool = self.pools.get(m.location)
            slots = pool.prefix(m.keys) if pool is not None else []
            if pool is None or not slots:
                out.append(Send(src, Held(m.event, 0)))
                return
            hold = self.holds[m.event] = UserPin(pool, slots)
            pool.ref_all(slots)
            count_up(pool.user, slots)
        self.timers.set(("hold", m.event, 0), now + m.lease_ns)
        out.append(Send(src, Held(m.event, len(hold.slots))))

    def on_unhold(self, now: int, src: str, m: Unhold, out: List[Effect]) -> None:
        self._unhold(m.event)
        out.append(Send(src, Held(m.event, 0)))

    def on_hold_timer(self, now: int, name: Tuple[str, int, int], out: List[Effect]) -> None:
        self._unhold(name[1])

    def lose(self, pool: Pool) -> None:
        """The bytes of a location are gone: no user's pin keeps them."""
        for event in [event for event, hold in self.holds.items() if hold.pool is pool]:
            self._unhold(event)

    def _unhold(self, event: int) -> None:
        hold = self.holds.pop(event, None)
        if hold is None:
            return
        self.timers.cancel(("hold", event, 0))
        count_down(hold.pool.user, hold.slots)
        hold.pool.unref_all(hold.slots)

    def pending(self) -> List[str]:
        fills = [f"store {fill.op} is being written" for fill in self.fills.values()]
        return fills + [f"use {read.op} is reading" for read in self.reads.values()]


EngineRequest = Union[StoreRequest, UseRequest, Hold, Unhold]
