"""A question to every rank of an instance, asked until all have answered or time is up: clear, pin, unpin."""

from __future__ import annotations

from typing import Dict, List, Tuple, final

from kvcore.protocol.config import Config
from kvcore.protocol.machine import Effect, Send, Timers
from kvcore.protocol.messages import Answer, Clear, Cleared, Held, Hold, Key, Unhold
from kvcore.protocol.registry import Registry


@final
class Fanout:
    """``kind``: clear, pin or unpin. ``answers``: -1 until that rank has answered."""

    def __init__(self, kind: str, number: int, client: str, op: str, location: str, ranks: List[str]) -> None:
        self.kind: str = kind
        self.number: int = number
        self.client: str = client
        self.op: str = op
        self.location: str = location
        self.ranks: List[str] = ranks
        self.answers: List[int] = [-1] * len(ranks)
        self.keys: Tuple[Key, ...] = ()
        self.lens: Tuple[int, ...] = ()
        self.lease_ns: int = 0
        self.deadline_ns: int = 0


@final
class Fanouts:
    def __init__(self, registry: Registry, timers: Timers, config: Config) -> None:
        self.registry: Registry = registry
        self.timers: Timers = timers
        self.config: Config = config
        self.incarnation: int = 0
        self.open: Dict[int, Fanout] = {}
        #: user pins that live, for unpin: event -> ranks
        self.pins: Dict[int, List[str]] = {}

    def start(self, now: int, fanout: Fanout, out: List[Effect]) -> None:
        fanout.deadline_ns = now + self.config.deadline_ns
        self.open[fanout.number] = fanout
        self._ask(now, fanout, out)

    def _ask(self, now: int, fanout: Fanout, out: List[Effect]) -> None:
        number = fanout.number
        for r, address in enumerate(fanout.ranks):
            if fanout.answers[r] >= 0:
                continue
            if fanout.kind == "clear":
                inc = self.registry.inc(address, fanout.location)
                if inc is not None:
                    out.append(Send(address, Clear(self.incarnation, number, fanout.location, inc)))
            elif fanout.kind == "pin":
                hold = Hold(self.incarnation, number, fanout.location, fanout.keys, fanout.lease_ns)
                out.append(Send(address, hold))
            else:
                out.append(Send(address, Unhold(self.incarnation, number)))
        when = now + self.config.retry_ns
        self.timers.set(("fanout", number, 0), min(when, max(fanout.deadline_ns, now + 1)))

    def on_timer(self, now: int, name: Tuple[str, int, int], out: List[Effect]) -> None:
        fanout = self.open.get(name[1])
        if fanout is None:
            return
        if now < fanout.deadline_ns:
            self._ask(now, fanout, out)
            return
        silent = ", ".join(address for r, address in enumerate(fanout.ranks) if fanout.answers[r] < 0)
        self._end(fanout, Answer(fanout.op, "failed", 0, fanout.number, "unreachable", silent), out)

    def on_cleared(self, now: int, src: str, m: Cleared, out: List[Effect]) -> None:
        fanout = self.open.get(m.event)
        if fanout is not None and fanout.kind == "clear":
            # Under a lower incarnation than this answer's the location held nothing that came after the request.
            self._answered(fanout, src, 0, out)

    def on_held(self, now: int, src: str, m: Held, out: List[Effect]) -> None:
        fanout = self.open.get(m.event)
        if fanout is not None and (fanout.kind == "unpin") == (m.n == 0):
            self._answered(fanout, src, m.n, out)
        elif fanout is not None and fanout.kind == "pin":
            # One rank holds nothing: pinned on all ranks or on none.
            self._end(fanout, Answer(fanout.op, "refused", 0, fanout.number, "nothing_held"), out)
            self.pins.pop(fanout.number, None)
            for address in fanout.ranks:
                out.append(Send(address, Unhold(self.incarnation, fanout.number)))

    def _answered(self, fanout: Fanout, src: str, n: int, out: List[Effect]) -> None:
        if src not in fanout.ranks:
            return
        fanout.answers[fanout.ranks.index(src)] = n
        least = min(fanout.answers)
        if least < 0:
            return
        tokens = sum(fanout.lens[:least])
        if fanout.kind == "pin":
            self.pins[fanout.number] = fanout.ranks
        elif fanout.kind == "unpin":
            self.pins.pop(fanout.number, None)
        self._end(fanout, Answer(fanout.op, "ok", tokens, fanout.number, n=least), out)

    def _end(self, fanout: Fanout, answer: Answer, out: List[Effect]) -> None:
        del self.open[fanout.number]
        self.timers.cancel(("fanout", fanout.number, 0))
        out.append(Send(fanout.client, answer))

    def participant_changed(self, address: str, out: List[Effect]) -> None:
        """A rank's process is gone: what was to be cleared is gone with it, what was to be pinned cannot be."""
        for fanout in list(self.open.values()):
            if address not in fanout.ranks:
                continue
            if fanout.kind == "pin":
                self._end(fanout, Answer(fanout.op, "failed", 0, fanout.number, "participant_restarted", address), out)
            else:
                self._answered(fanout, address, 0, out)
