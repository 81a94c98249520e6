"""A question to every rank of an instance, asked until all have answered or time is up: clear, pin, unpin."""

from __future__ import annotations

from typing import Dict, List, Optional, Tuple, final

from kvcore.protocol.config import Config
from kvcore.protocol.machine import Begin, Effect, Journal, Outcome, Send, Timers
from kvcore.protocol.messages import NO_ID, Answer, Clear, Cleared, Held, Hold, Inc, PinRequest, Position, Unhold
from kvcore.protocol.registry import Registry


@final
class Fanout:
    """``kind``: clear, pin or unpin. ``answers``: -1 until that rank has answered. ``asked``: the incarnation that a
    rank was asked to clear: an answer under another epoch, or not above it, is not the answer to that."""

    def __init__(self, kind: str, number: int, client: str, op: str, location: str, ranks: List[str]) -> None:
        self.kind: str = kind
        self.number: int = number
        self.client: str = client
        self.op: str = op
        self.location: str = location
        self.ranks: List[str] = ranks
        self.answers: List[int] = [-1] * len(ranks)
        self.asked: List[Inc] = [NO_ID] * len(ranks)
        self.request: Optional[PinRequest] = None
        self.deadline_ns: int = 0


@final
class Fanouts:
    def __init__(self, registry: Registry, timers: Timers, config: Config) -> None:
        self.registry: Registry = registry
        self.timers: Timers = timers
        self.config: Config = config
        self.incarnation: int = 0
        self.open: Dict[int, Fanout] = {}
        #: user pins that live, as they were asked for
        self.pins: Dict[int, PinRequest] = {}
        #: pin -> the nonces of the processes that hold it, by rank; of those that the journal told of nothing is known
        self.processes: Dict[int, Tuple[int, ...]] = {}

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
                if inc is not None and inc[1] >= 0:
                    if fanout.asked[r][0] != inc[0]:
                        fanout.asked[r] = inc
                    out.append(Send(address, Clear(self.incarnation, number, fanout.location, inc)))
            elif fanout.kind == "pin":
                assert fanout.request is not None
                request = fanout.request
                hold = Hold(self.incarnation, number, fanout.location, request.keys, request.lease_ns)
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
        if fanout is None or fanout.kind != "clear" or src not in fanout.ranks:
            return
        asked = fanout.asked[fanout.ranks.index(src)]
        if m.inc[0] == asked[0] and (m.inc > asked or not self.config.rules.h20):
            self._answered(now, fanout, src, 0, out)

    def on_held(self, now: int, src: str, m: Held, out: List[Effect]) -> None:
        fanout = self.open.get(m.event)
        if fanout is not None and (fanout.kind == "unpin") == (m.n == 0):
            self._answered(now, fanout, src, m.n, out)
        elif fanout is not None and fanout.kind == "pin":
            # One rank holds nothing: pinned on all ranks or on none.
            self._end(fanout, Answer(fanout.op, "refused", 0, fanout.number, "nothing_held"), out)
            self.forget(fanout.number, "nothing_held", out)
            for address in fanout.ranks:
                out.append(Send(address, Unhold(self.incarnation, fanout.number)))

    def _answered(self, now: int, fanout: Fanout, src: str, n: int, out: List[Effect]) -> None:
        if src not in fanout.ranks:
            return
        fanout.answers[fanout.ranks.index(src)] = n
        least = min(fanout.answers)
        if least < 0:
            return
        tokens = sum(fanout.request.lens[:least]) if fanout.request is not None else 0
        if fanout.kind == "pin":
            assert fanout.request is not None
            if fanout.number not in self.pins:
                out.append(Journal(Begin(fanout.number, fanout.request)))
            self.keep(now, fanout.number, fanout.request)
            ranks = [self.registry.by_address.get(address) for address in fanout.ranks]
            self.processes[fanout.number] = tuple([rank.register.nonce if rank is not None else 0 for rank in ranks])
        elif fanout.kind == "unpin":
            self.forget(fanout.number, "unpinned", out)
        self._end(fanout, Answer(fanout.op, "ok", tokens, fanout.number, n=least), out)

    def keep(self, now: int, number: int, request: PinRequest) -> None:
        """A user's pin lives; it is forgotten here no sooner than it ends at the workers."""
        self.pins[number] = request
        self.timers.set(("hold", number, 0), now + request.lease_ns + self.config.retry_ns)

    def forget(self, number: int, why: str, out: List[Effect]) -> None:
        self.processes.pop(number, None)
        if self.pins.pop(number, None) is not None:
            self.timers.cancel(("hold", number, 0))
            out.append(Journal(Outcome(number, "done", why)))

    def cleared(self, position: Position, out: List[Effect]) -> None:
        """A place holds nothing any more, so no pin there keeps anything."""
        for number, request in list(self.pins.items()):
            if request.position == position:
                self.forget(number, "cleared", out)

    def believed(self, instance: str, rank: int, nonce: int, out: List[Effect]) -> None:
        """A process speaks for a rank from now on; pins that another one held went with that."""
        for number, request in list(self.pins.items()):
            nonces = self.processes.get(number, ())
            if request.position[0] == instance and rank < len(nonces) and nonces[rank] not in (0, nonce):
                self.forget(number, "restarted", out)

    def on_hold_timer(self, now: int, name: Tuple[str, int, int], out: List[Effect]) -> None:
        self.forget(name[1], "lapsed", out)

    def _end(self, fanout: Fanout, answer: Answer, out: List[Effect]) -> None:
        del self.open[fanout.number]
        self.timers.cancel(("fanout", fanout.number, 0))
        out.append(Send(fanout.client, answer))

    def participant_changed(self, now: int, address: str, out: List[Effect]) -> None:
        """A rank's process is not believed any more: what was to be pinned cannot be, what was to be unpinned is. What
        was to be cleared is asked of its next epoch: a process that was only silent has kept its bytes."""
        for fanout in list(self.open.values()):
            if address not in fanout.ranks:
                continue
            if fanout.kind == "pin":
                self._end(fanout, Answer(fanout.op, "failed", 0, fanout.number, "participant_restarted", address), out)
            elif fanout.kind == "unpin":
                self._answered(now, fanout, address, 0, out)
