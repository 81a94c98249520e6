"""Many moves that are one event: all that a place holds (a drain).

The controller fixes the list, cuts it into chains and runs one move a chain, some at once: the pins and reservations of
one go on while another's bytes cross. Chains that begin with the same chunk follow one another, so that what they share
crosses once. The sum is the event's answer; what could not be moved fails it by name.
"""

from __future__ import annotations

from typing import Dict, List, Sequence, Tuple, final

from kvcore.protocol.chunks import namespace_mismatch
from kvcore.protocol.config import Config
from kvcore.protocol.coordinator import COPYING, DONE, FAILED, RELEASING, Coordinator, Event
from kvcore.protocol.machine import Begin, Decide, Effect, Journal, Outcome, Promised, Send
from kvcore.protocol.messages import Answer, Key, MoveRequest, Position
from kvcore.protocol.registry import Registry

Chain = Tuple[Tuple[Key, ...], Tuple[int, ...]]


@final
class Drain:
    def __init__(self, number: int, request: MoveRequest, client: str, chains: List[Chain], deadline_ns: int) -> None:
        self.number: int = number
        self.request: MoveRequest = request
        self.client: str = client
        self.chains: List[Chain] = chains
        self.deadline_ns: int = deadline_ns
        self.places: List[Position] = [request.dst, *request.also]
        self.next: int = 0
        #: moves under way: event -> (its chain, how many destinations it has been offered to)
        self.children: Dict[int, Tuple[int, int]] = {}
        #: its chains are being begun: whoever ends meanwhile is seen to there
        self.beginning: bool = False
        #: how many chains found no place to begin at
        self.unbegun: int = 0
        #: chunk key -> tokens: chains share their heads, a chunk counts once
        self.planned: Dict[Key, int] = {key: n for keys, lens in chains for key, n in zip(keys, lens)}
        self.moved: Dict[Key, int] = {}
        self.left: List[str] = []
        self.cancelled: str = ""
        #: its client has been told that it goes on; what is over before that has been promised to nobody
        self.announced: bool = False
        self.waiters: List[Tuple[str, str]] = []

    def child_ended(self, request: MoveRequest, state: str, reason: str, n: int, kept: int, why: str) -> None:
        """Count what one chain's move did. A shared head that stays for a later chain is not left behind."""
        if state == "done":
            for key, length in zip(request.keys[:n], request.lens[:n]):
                self.moved[key] = length
        if state != "done" or n < len(request.keys):
            chunks = len(request.keys) - (n if state == "done" else 0)
            self.left.append(f"{chunks} chunks: {reason or 'destination full'}")
        elif kept and why not in ("child_here", "gone"):
            self.left.append(f"{kept} chunks: kept, {why}")

    def may_begin(self, window: int) -> bool:
        """Whether the next chain may, beside those that move now."""
        if self.cancelled or self.next >= len(self.chains) or len(self.children) >= window:
            return False
        root = self.chains[self.next][0][0]
        return all(self.chains[chain][0][0] != root for chain, _ in self.children.values())

    def num_tokens(self) -> int:
        return sum(self.planned.values())


def moved_by(begins: Sequence[Begin], decided: Dict[int, Decide], ended: Dict[int, Outcome]) -> Dict[Key, int]:
    """What chains of a drain have moved, or will have: chunk key -> tokens. ``begins``: theirs, of the journal."""
    moved: Dict[Key, int] = {}
    for begin in begins:
        request = begin.request
        outcome = ended.get(begin.event)
        decide = decided.get(begin.event)
        n = outcome.n if outcome is not None and outcome.state == DONE else decide.n if decide is not None else 0
        moved.update(zip(request.keys[:n], request.lens[:n]))
    return moved


@final
class Drains:
    def __init__(self, registry: Registry, moves: Coordinator, config: Config) -> None:
        self.registry: Registry = registry
        self.moves: Coordinator = moves
        self.config: Config = config
        self.open: Dict[int, Drain] = {}
        #: child move -> its drain
        self.parents: Dict[int, int] = {}

    def begin(self, now: int, client: str, m: MoveRequest, chains: List[Chain], out: List[Effect]) -> None:
        """``chains``: all that the place holds."""
        number = self.moves.new_event()
        out.append(Journal(Begin(number, m)))
        self.moves.name_event(number, m)
        deadline_ns = now + (m.deadline_ns or self.config.deadline_ns)
        drain = Drain(number, m, client, chains, deadline_ns)
        orphans = self.registry.count(m.src) - len(drain.planned)
        if orphans:
            drain.left.append(f"{orphans} chunks: some rank lacks them or an ancestor")
        self.open[number] = drain
        if m.idem:
            out.append(Journal(Promised(number, drain.num_tokens(), len(drain.planned))))
        out.append(Send(client, Answer(m.op, COPYING, drain.num_tokens(), number)))
        self._on(now, drain, out)
        drain.announced = True

    def _on(self, now: int, drain: Drain, out: List[Effect]) -> None:
        """Begin moves of the chains that may begin, or end the drain."""
        if drain.beginning:
            return
        drain.beginning = True
        while drain.may_begin(self.config.drain_window):
            drain.next += 1
            self._offer(now, drain, drain.next - 1, 0, out)
        drain.beginning = False
        if not drain.children and drain.number in self.open:
            self._end(now, drain, out)

    def _offer(self, now: int, drain: Drain, chain: int, tried: int, out: List[Effect]) -> None:
        """Chains go to the destinations in turn; one that cannot be taken is offered to the next of them."""
        m = drain.request
        dst = drain.places[(chain + tried) % len(drain.places)]
        sources, reason, detail = self.registry.place(m.src)
        destinations = None
        if sources is not None:
            destinations, reason, detail = self.registry.place(dst)
        if sources is None or destinations is None or now >= drain.deadline_ns:
            drain.cancelled = drain.cancelled or reason or "deadline"
            drain.unbegun += 1
            return
        keys, lens = drain.chains[chain]
        left_ns = drain.deadline_ns - now
        child = MoveRequest(f"{m.op}/{chain + 1}", m.src, dst, keys, lens, m.copy, "", left_ns, m.evict, (), m.terms)
        difference = namespace_mismatch(sources[0].space(m.src[1]), destinations[0].space(dst[1]))
        why = ("mismatch", f"source {difference[0]}; destination {difference[1]}") if difference else ("", "")
        number = self.moves.new_event()
        self.parents[number] = drain.number
        drain.children[number] = (chain, tried + 1)
        self.moves.begin(now, "", child, sources, destinations, why, out, number, drain.number)

    def child_ended(self, now: int, event: Event, out: List[Effect]) -> None:
        """An event has ended; if it moved a chain of mine, the drain goes on."""
        drain = self.open.get(self.parents.pop(event.number, 0))
        if drain is None:
            return
        chain, tried = drain.children.pop(event.number)
        if event.state == FAILED and tried < len(drain.places) and not drain.cancelled:
            self._offer(now, drain, chain, tried, out)
        else:
            kept = max([item.kept for item in event.released if item is not None] or [0])
            why = next((item.why for item in event.released if item is not None and item.kept), "")
            drain.child_ended(event.request, event.state, event.reason, event.n, kept, why)
        self._on(now, drain, out)

    def cancel(self, now: int, drain: Drain, out: List[Effect]) -> None:
        """No chain begins any more, and those that are not decided fail."""
        drain.cancelled = "cancelled"
        drain.beginning = True
        for number in list(drain.children):
            event = self.moves.events.get(number)
            if event is not None and event.state != RELEASING:
                self.moves.fail(now, event, "cancelled", out)
        drain.beginning = False
        self._on(now, drain, out)

    def _end(self, now: int, drain: Drain, out: List[Effect]) -> None:
        del self.open[drain.number]
        if drain.cancelled:
            unbegun = len(drain.chains) - drain.next + drain.unbegun
            if unbegun or not drain.left:
                drain.left.append(f"{unbegun} chains not begun: {drain.cancelled}")
        tokens = sum(drain.moved.values())
        state = FAILED if drain.left or not drain.planned else DONE
        reason = (drain.cancelled or "incomplete") if drain.left else "" if drain.planned else "nothing_held"
        left = "; ".join(drain.left[:8])
        promised = drain.num_tokens() if drain.announced else 0
        outcome = Outcome(drain.number, state, reason, tokens, len(drain.moved), (), left, promised=promised)
        self.moves.remember(now, outcome)
        out.append(Journal(outcome))
        for client, op in [(drain.client, drain.request.op), *drain.waiters]:
            out.append(Send(client, self.moves.answer(drain.number, op)))

    def answer(self, number: int, op: str) -> Answer:
        """How far a drain has come."""
        drain = self.open[number]
        progress = f"chain {drain.next} of {len(drain.chains)}"
        return Answer(op, COPYING, drain.num_tokens(), number, drain.cancelled, progress, len(drain.moved))
