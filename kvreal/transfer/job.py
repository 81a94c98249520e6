"""A copy: what was asked for, what becomes of it, and how it ended."""

from __future__ import annotations

import threading
import time
from typing import Callable, Optional, Sequence

import msgspec

from kvcore.protocol.machine import StartCopy
from kvcore.protocol.messages import Rid, Terms
from kvreal.slab import Bytes
from kvreal.spans import Spans, ints


class Fate(msgspec.Struct, frozen=True):
    """What an injected fault makes of a copy."""

    fail: bool = False
    corrupt: bool = False
    stuck: bool = False
    slow: float = 1.0
    fraction: float = 1.0
    delay_ns: int = 0


class Copy(msgspec.Struct, frozen=True):
    """``effect`` as the machine asked for it, and what only the driver knows."""

    effect: StartCopy
    endpoint: str
    epoch: int
    bytes_per_token: int
    copy_max_ns: int
    fate: Fate = Fate()
    progress_ns: int = 200_000_000


class Ended(msgspec.Struct, frozen=True):
    """``state``: done, failed or stopped. ``transport``: what carried the bytes. Times by the monotonic clock."""

    rid: Rid
    state: str
    why: str
    read: bool
    peer: str
    transport: str
    nbytes: int
    asked_ns: int
    began_ns: int
    ended_ns: int
    chosen: str = ""
    """Why that transport, in one line."""


class Progress(msgspec.Struct, frozen=True):
    """Of a copy that runs: of so many tokens the bytes have crossed."""

    rid: Rid
    num_tokens: int


class WindowShut(msgspec.Struct, frozen=True):
    peer: str
    epoch: int


class Stopped(Exception):
    """Raised inside a copy that was told to stop, when it has."""


class Pace:
    """Of all copies of one move: its cap is theirs together."""

    def __init__(self) -> None:
        self.free_at_s: float = 0.0
        """When the cap lets the next byte go, by the monotonic clock."""


class Job:
    """A copy under way. ``wake`` is how its transport wakes a thread that waits for the network."""

    def __init__(self, copy: Copy, before: Optional[Job] = None) -> None:
        """``before``: a copy of the same move whose bytes go first."""
        effect = copy.effect
        self.copy: Copy = copy
        self.before: Optional[Job] = before
        self.asked_bytes: int = 0
        """Of how many bytes it has had its turn."""
        self.over: bool = False
        """It asks for no more turns."""
        self.asked_ns: int = time.monotonic_ns()
        self.began_ns: int = 0
        self.deadline_ns: int = self.asked_ns + copy.copy_max_ns
        self.aborted: threading.Event = threading.Event()
        self.expired: bool = False
        self.tell_ns: int = self.asked_ns + copy.progress_ns
        """When to say next how far it is."""
        self.told: int = 0
        self.lock: threading.Lock = threading.Lock()
        self.wake: Optional[Callable[[], None]] = None
        self.moved: int = 0
        self.chosen: str = ""
        self.corrupt: bool = copy.fate.corrupt
        """A byte of it is still to be turned over."""
        terms = effect.terms or Terms()
        self.priority: int = terms.priority
        self.weight: int = terms.weight
        self.cap_bytes_per_s: int = terms.cap_bytes_per_s
        self.service: float = 0.0
        """What it has had so far for its weight, bytes; flow.py."""
        self.pace: Pace = Pace() if before is None else before.pace
        sizes = ints(effect.lens) * copy.bytes_per_token
        self.spans: Spans = Spans(effect.slots, effect.peer_slots, sizes).first(copy.fate.fraction)
        self.nbytes: int = self.spans.nbytes

    def progress(self, now: int) -> Optional[Progress]:
        """How far it is, if that is to be said by now and has not been."""
        if now < self.tell_ns:
            return None
        self.tell_ns = now + self.copy.progress_ns
        effect = self.copy.effect
        num_tokens = self.moved * sum(effect.lens) // self.nbytes if self.nbytes else 0
        if num_tokens <= self.told:
            return None
        self.told = num_tokens
        return Progress(effect.rid, num_tokens)

    def outgoing(self, views: Sequence[Bytes]) -> Sequence[Bytes]:
        """What a push sends of these. If an injected fault wants wrong bytes, one byte of the first ones that go is
        turned over."""
        if not self.corrupt or self.moved:
            return views
        found = list(views)
        middle = len(found) // 2
        found[middle] = found[middle].copy()
        found[middle][(len(found[middle]) - 1) // 2] ^= 0xFF  # no chunk's first byte, unless it has no other
        return found

    def woken_by(self, wake: Optional[Callable[[], None]]) -> None:
        """Once this returns, an earlier one is not called any more: what it wakes may be used by others."""
        with self.lock:
            self.wake = wake
        if wake is not None:
            self.check()

    def stop(self) -> None:
        """Told to stop: its thread notices, or is woken."""
        with self.lock:
            self.aborted.set()
            if self.wake is not None:
                self.wake()

    def check(self) -> None:
        """Raise Stopped if the copy was told to stop."""
        if self.aborted.is_set():
            raise Stopped

    def began(self) -> None:
        """The first byte is about to move: what came before was queueing."""
        if not self.began_ns:
            self.began_ns = time.monotonic_ns()
