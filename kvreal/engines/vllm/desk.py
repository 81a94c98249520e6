"""The rank's end: what vLLM's processes ask becomes requests to the machine, and what the machine asks of its engine
(fill these slots, read those) is handed to them.

A Look is a UseRequest whose read ends when the engine says so: until then the chunks' slots are referred to, so that
nothing (eviction, a move's deletion, a clear) gives them to others. The read also ends with its lease, or with the
connection of whoever asked; the engine hears of that when it says Loaded, and takes its copy for a failed one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import struct
from collections import OrderedDict, deque
from typing import Deque, Dict, Final, List, Optional, Tuple, Union, cast

from kvcore.protocol import machine as m
from kvcore.protocol.chunks import chunk_keys, next_key, root_key
from kvcore.protocol.messages import (
    Answer,
    Committed,
    Delta,
    Fetch,
    Key,
    Namespace,
    StoreRequest,
    UseRequest,
    event_name,
)
from kvcore.protocol.worker import Worker
from kvreal.engines.vllm.link import Drop, Filled, Loaded, Look, Prompt, Renew, Room, Seen, Store, Told
from kvreal.memory import Memory
from kvreal.rank import Local
from kvreal.transfer.job import Fate

log = logging.getLogger("kvmove.engine")

Task = Union[m.StartFill, m.StartRead]
REMEMBERED: Final = 100_000
"""Chunks of which it is known what move brought them."""


class Elsewhere:
    """Stands where EngineThread does: the engine that fills and reads is in another process, and says when it has."""

    def __init__(self, memory: Memory) -> None:
        self.memory: Memory = memory
        self.wake: int = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.begun: Deque[Task] = deque()
        self.results: Deque[Union[m.FillDone, m.ReadDone]] = deque()
        self.open: int = 0
        self.filled_bytes: int = 0
        self.read_bytes: int = 0
        self.read_errors: int = 0

    def begin(self) -> None:
        self.filled_bytes = self.read_bytes = self.read_errors = 0

    def start(self, task: Task, bytes_per_token: int, fate: Fate) -> None:
        """Whoever gave the machine the request takes it from ``begun`` at once."""
        self.open += 1
        if isinstance(task, m.StartFill):
            self.memory.soil(task.location, task.slots)
        self.begun.append(task)

    def finish(self, task: Task, ok: bool) -> None:
        done = m.FillDone(task.fid, ok) if isinstance(task, m.StartFill) else m.ReadDone(task.fid, ok)
        self.results.append(done)
        os.eventfd_write(self.wake, 1)

    def take(self) -> List[Union[m.FillDone, m.ReadDone]]:
        try:
            os.eventfd_read(self.wake)
        except BlockingIOError:
            return []
        found = list(self.results)
        self.results.clear()
        self.open -= len(found)
        return found


class Hold:
    """A read under way, for one Look."""

    def __init__(self, task: Task, client: object, lease_s: float) -> None:
        self.task: Task = task
        self.client: object = client
        self.lease_s: float = lease_s
        self.alarm: Optional[asyncio.TimerHandle] = None


class Tails:
    """How long the partial chunks after each chunk are, so that a longer prompt finds the tail of a shorter one."""

    def __init__(self, chunk_tokens: int) -> None:
        self.chunk_tokens: int = chunk_tokens
        self.lengths: Dict[Key, Dict[int, int]] = {}
        self.known: Dict[Key, Tuple[Key, int]] = {}

    def take(self, delta: Delta) -> None:
        for key in delta.drops:
            if key in self.known:
                parent, length = self.known.pop(key)
                counts = self.lengths[parent]
                counts[length] -= 1
                if not counts[length]:
                    del counts[length]
                if not counts:
                    del self.lengths[parent]
        for entry in delta.adds:
            if entry.num_tokens < self.chunk_tokens and entry.key not in self.known:
                self.known[entry.key] = (entry.parent, entry.num_tokens)
                counts = self.lengths.setdefault(entry.parent, {})
                counts[entry.num_tokens] = counts.get(entry.num_tokens, 0) + 1

    def after(self, parent: Key) -> List[int]:
        """Longest first."""
        return sorted(self.lengths.get(parent, ()), reverse=True)


class Desk:
    """Answers of one rank. ``client``: whose connection a question came over."""

    def __init__(self, local: Local) -> None:
        file = local.file
        self.local: Local = local
        self.space: Namespace = file.namespace
        self.store_at: str = file.store_at
        self.save_unfull: bool = file.save_unfull_chunk
        self.locations: List[str] = [place.name for place in file.searched()]
        self.engine: Elsewhere = local.service.worker.engine
        self.holds: Dict[str, Hold] = {}
        self.fills: Dict[str, Tuple[m.StartFill, asyncio.Future[Answer], object]] = {}
        self.tails: Dict[str, Tails] = {name: Tails(self.space.chunk_tokens) for name in self.locations}
        self.fetching: Dict[int, Tuple[Key, ...]] = {}
        self.moved: OrderedDict[Key, int] = OrderedDict()
        """Chunk -> the event of the move that brought it."""
        local.service.listeners.append(self._step)

    # ---- what the machine does meanwhile
    def _step(self, now: int, item: m.Input, effects: List[m.Effect]) -> None:
        if isinstance(item, m.Received) and isinstance(item.msg, Fetch):
            self.fetching[item.msg.event] = item.msg.keys
        for effect in effects:
            if not isinstance(effect, m.Send):
                continue
            message = effect.msg
            if isinstance(message, Delta):
                self.tails[message.location].take(message)
                for key in message.drops:
                    self.moved.pop(key, None)
            elif isinstance(message, Committed) and (keys := self.fetching.pop(message.event, None)) is not None:
                present = frozenset(message.present)
                for i in range(message.n):
                    if i not in present:
                        self.moved[keys[i]] = message.event
                while len(self.moved) > REMEMBERED:
                    self.moved.popitem(last=False)
        while len(self.fetching) > 1000:
            self.fetching.pop(next(iter(self.fetching)))

    # ---- questions
    def look(self, asked: Look, client: object) -> Seen:
        name = asked.name
        self.drop(Drop(name))
        location, keys, lens = self._longest(asked.prompt)
        if not keys:
            return Seen(name, 0)
        self.local.service.begin(UseRequest("", location, keys, lens))
        if not self.engine.begun:
            return Seen(name, 0)
        task = self.engine.begun.popleft()
        self.holds[name] = Hold(task, client, asked.lease_s)
        self._lease(name)
        moved = [(length, self.moved[key]) for key, length in zip(task.keys, task.lens) if key in self.moved]
        event = event_name(moved[-1][1]) if moved else ""
        return Seen(name, sum(task.lens), location, task.slots, sum(length for length, _ in moved), event)

    def _longest(self, prompt: Prompt) -> Tuple[str, Tuple[Key, ...], Tuple[int, ...]]:
        """(location, keys, lens) of the longest stored prefix; the tail of a shorter prompt may end it."""
        tokens = tokens_of(prompt)
        keys, lens = chunk_keys(self.space, tokens, prompt.adapter, prompt.salt)
        best: Tuple[str, Tuple[Key, ...], Tuple[int, ...]] = ("", (), ())
        size = self.space.chunk_tokens
        pools = cast(Worker, self.local.service.machine).pools
        for location in self.locations:
            pool = pools[location]
            n = len(pool.prefix(keys))
            found = (location, keys[:n], lens[:n])
            if n < len(keys):
                parent = keys[n - 1] if n else b""
                before = parent or root_key(self.space, prompt.adapter, prompt.salt)
                for length in self.tails[location].after(parent):
                    if length < lens[n]:
                        key = next_key(before, tokens[n * size : n * size + length])
                        if key in pool.index:
                            found = (location, (*keys[:n], key), (*lens[:n], length))
                            break
            if sum(found[2]) > sum(best[2]):
                best = found
        return best

    def _lease(self, name: str) -> None:
        hold = self.holds[name]
        if hold.alarm is not None:
            hold.alarm.cancel()
        hold.alarm = asyncio.get_running_loop().call_later(hold.lease_s, self._lapse, name)

    def _lapse(self, name: str) -> None:
        log.warning("the engine has not said for %.0f s what became of %s: it is not held any more",
                    self.holds[name].lease_s, name)  # fmt: skip
        self._let_go(name)

    def _let_go(self, name: str) -> bool:
        hold = self.holds.pop(name, None)
        if hold is None:
            return False
        if hold.alarm is not None:
            hold.alarm.cancel()
        self.engine.finish(hold.task, True)
        return True

    def renew(self, asked: Renew) -> None:
        if asked.name in self.holds:
            self._lease(asked.name)

    def drop(self, asked: Drop) -> None:
        self._let_go(asked.name)

    def loaded(self, asked: Loaded) -> Told:
        ok = self._let_go(asked.name)
        return Told(asked.name, ok, "" if ok else "lease_ended")

    # ---- stores
    def store(self, asked: Store, client: object) -> Room:
        name = asked.name
        keys, lens = chunk_keys(self.space, tokens_of(asked.prompt), asked.prompt.adapter, asked.prompt.salt)
        if not self.save_unfull and lens and lens[-1] < self.space.chunk_tokens:
            keys, lens = keys[:-1], lens[:-1]
        if not keys or name in self.fills:
            return Room(name, self.store_at)
        question = self.local.service.begin(StoreRequest("", self.store_at, keys, lens))
        if not self.engine.begun:
            answer = question.first.result() if question.first.done() else None
            return Room(name, self.store_at, why=answer.reason if answer is not None else "")
        task = self.engine.begun.popleft()
        assert isinstance(task, m.StartFill)
        self.fills[name] = (task, question.first, client)
        where = {key: i for i, key in enumerate(keys)}
        return Room(name, self.store_at, tuple([where[key] for key in task.keys]), task.slots)

    async def filled(self, asked: Filled) -> Told:
        found = self.fills.pop(asked.name, None)
        if found is None:
            return Told(asked.name, False, "unknown")
        task, answered, _ = found
        self.engine.finish(task, asked.ok)
        answer = await answered
        ok = answer.state == "ok"
        return Told(asked.name, ok, answer.reason, sum(task.lens) if ok else 0)

    def gone(self, client: object) -> None:
        """A connection has ended: what it held is let go, what it was filling is not to be believed."""
        for name in [name for name, hold in self.holds.items() if hold.client is client]:
            self._let_go(name)
        for name in [name for name, fill in self.fills.items() if fill[2] is client]:
            self.engine.finish(self.fills.pop(name)[0], False)


def tokens_of(prompt: Prompt) -> Tuple[int, ...]:
    return struct.unpack(f"<{len(prompt.tokens) // 4}I", prompt.tokens)
