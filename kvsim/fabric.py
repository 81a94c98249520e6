"""Bytes on their way: fluid flows that share links max-min fairly.

A flow first spends its path's latency, using no bandwidth; then it joins its links. From then on it has the rate that
max-min fairness gives: no flow could have more without one that has no more than it having less. A disk, a NIC's side,
a switch's uplink and a PCIe lane are all just links.

What keeps it cheap: a flow alone on its links needs no solver; all that happens in one instant is solved once, at its
end; a start, an end or a change of capacity is solved among the flows that it changes, which are few even where
hundreds are coupled (SimGrid solves the whole connected component). Every solve puts one entry into the loop's heap,
for the first end among the flows whose rates it changed; an entry that a later solve has overtaken does nothing.

Rates are bytes a nanosecond (1.0 is 1 GB/s), floats; ends are whole nanoseconds, rounded up.
"""

from __future__ import annotations

from heapq import heapify, heappop, heapreplace
from math import ceil
from typing import Any, Callable, Dict, Final, List, Optional, Sequence, Tuple, final

from kvsim.loop import Loop

Done = Callable[[Any], None]


@final
class Link:
    """One direction of something that carries bytes."""

    __slots__ = (
        "capacity",
        "count",
        "flows",
        "index",
        "latency_ns",
        "left",
        "level",
        "mark",
        "name",
        "open",
        "peak",
        "spare",
        "squeezed",
    )

    def __init__(self, index: int, name: str, capacity: float, latency_ns: int) -> None:
        self.index: int = index
        self.name: str = name
        self.capacity: float = capacity
        self.latency_ns: int = latency_ns
        self.flows: Dict[int, Flow] = {}
        self.squeezed: bool = False  # its capacity has changed since the last solve
        # the solver's own, good while mark is that of the running solve:
        self.mark: int = 0
        self.spare: float = 0.0  # what the flows that keep their rates leave
        self.count: int = 0  # flows being solved
        self.left: float = 0.0  # spare, less what has been frozen
        self.open: int = 0  # flows not frozen yet
        self.level: float = -1.0  # the share at which it froze flows; -1.0: it froze none
        self.peak: float = 0.0  # the highest rate that a solved flow has got on it


@final
class Flow:
    """``remaining`` bytes were left at ``since_ns``, and ``rate`` since. ``stamp`` names the entry that will end it."""

    __slots__ = (
        "arg",
        "bottleneck",
        "cap",
        "done",
        "fid",
        "mark",
        "nbytes",
        "next_rate",
        "path",
        "rate",
        "remaining",
        "since_ns",
        "stamp",
    )

    def __init__(self, fid: int, path: Tuple[Link, ...], nbytes: int, done: Done, arg: Any, cap: float) -> None:
        self.fid: int = fid
        self.path: Tuple[Link, ...] = path
        self.nbytes: int = nbytes
        self.remaining: float = float(nbytes)
        self.done: Done = done
        self.arg: Any = arg
        self.cap: float = cap  # 0.0: none
        self.rate: float = 0.0
        self.since_ns: int = 0
        self.bottleneck: Optional[Link] = None  # None: its own cap, or none yet
        self.stamp: int = 0
        self.mark: int = 0
        self.next_rate: float = -1.0


_SPARE: Final = 1e-12
"""The part of a link's capacity that counts as nothing. Rates agree with an exact solution to far less than 1e-9."""

_ABOVE: Final = 1.0 + 1e-12
_BELOW: Final = 1.0 - 1e-12
_INFINITE: Final = 1e300

Ending = Tuple[int, int, int, Flow]
"""(end_ns, fid, stamp, flow)"""


@final
class Fabric:
    def __init__(self, loop: Loop) -> None:
        self.loop: Loop = loop
        self.links: List[Link] = []
        self.flows: Dict[int, Flow] = {}
        self.last_fid: int = 0
        self.last_stamp: int = 0
        self.last_mark: int = 0
        self.dirty: List[Link] = []
        self.solves: int = 0
        self.filled_flows: int = 0

    # ---- the interface ----------------------------------------------------------------------------------------------
    def link(self, name: str, bytes_per_s: float, latency_ns: int = 0) -> Link:
        if bytes_per_s <= 0 or latency_ns < 0:
            raise ValueError(f"link {name}: {bytes_per_s} bytes/s, {latency_ns} ns; expected above 0, not below 0")
        link = Link(len(self.links), name, bytes_per_s / 1e9, latency_ns)
        self.links.append(link)
        return link

    def start(
        self, path: Tuple[Link, ...], nbytes: int, done: Done, arg: Any, cap: float = 0.0, after_ns: int = 0
    ) -> int:
        """Send ``nbytes`` over every link of ``path`` at once; ``done(arg)`` is called when the last byte has left.

        ``cap``: its own limit in bytes/s, 0 for none. ``after_ns``: it starts so much later than now. An empty path
        carries any number of bytes in no time. Returns the flow's id.
        """
        fid = self.last_fid = self.last_fid + 1
        flow = Flow(fid, path, nbytes, done, arg, cap / 1e9)
        self.flows[fid] = flow
        loop = self.loop
        joins_ns = loop.now_ns + after_ns
        for link in path:
            joins_ns += link.latency_ns
        if joins_ns > loop.now_ns:
            loop.at(joins_ns, self._join, flow, None)
        else:
            self._join(flow, None)
        return fid

    def cancel(self, fid: int) -> float:
        """End a flow now without calling its ``done``. Returns the fraction of its bytes that has crossed, 0.0 for an
        id that is not (or no longer) known."""
        flow = self.flows.pop(fid, None)
        if flow is None:
            return 0.0
        fraction = self._crossed(flow)
        self._leave(flow)
        return fraction

    def progress(self, fid: int) -> float:
        """The fraction of a flow's bytes that has crossed; 0.0 for an unknown id."""
        flow = self.flows.get(fid)
        return 0.0 if flow is None else self._crossed(flow)

    def rate(self, fid: int) -> float:
        """bytes/s, as of the last solve; 0.0 for an unknown id or one still in its latency."""
        flow = self.flows.get(fid)
        return 0.0 if flow is None else flow.rate * 1e9

    def set_capacity(self, link: Link, bytes_per_s: float) -> None:
        if bytes_per_s <= 0:
            raise ValueError(f"link {link.name}: {bytes_per_s} bytes/s, expected above 0")
        link.capacity = bytes_per_s / 1e9
        if link.flows:
            link.squeezed = True
            self._touch(link)

    # ---- joining and leaving ----------------------------------------------------------------------------------------
    def _join(self, flow: Flow, _: Any) -> None:
        fid = flow.fid
        if fid not in self.flows:
            return  # cancelled while in its latency
        now = self.loop.now_ns
        flow.since_ns = now
        path = flow.path
        alone = True
        rate = flow.cap
        bottleneck: Optional[Link] = None
        for link in path:
            if link.flows:
                alone = False
                self._touch(link)
            elif rate == 0.0 or link.capacity < rate:
                rate = link.capacity
                bottleneck = link
            link.flows[fid] = flow
        if alone:
            flow.rate = rate
            flow.bottleneck = bottleneck
            stamp = self.last_stamp = self.last_stamp + 1
            flow.stamp = stamp
            end_ns = now
            if rate > 0.0:
                end_ns = now + ceil(flow.remaining / rate)
            self.loop.at(end_ns, self._lone_end, flow, stamp)

    def _leave(self, flow: Flow) -> None:
        fid = flow.fid
        flow.stamp = 0
        for link in flow.path:
            flows = link.flows
            if fid in flows:
                del flows[fid]
                if flows:
                    self._touch(link)

    def _lone_end(self, flow: Flow, stamp: int) -> None:
        if flow.stamp == stamp:
            del self.flows[flow.fid]
            self._leave(flow)
            flow.done(flow.arg)

    def _next_end(self, endings: List[Ending], _: Any) -> None:
        """The first flow of a solve is at its end, unless a later solve or a cancel has moved it."""
        now = self.loop.now_ns
        while endings:
            end_ns, fid, stamp, flow = endings[0]
            if flow.stamp != stamp:
                heappop(endings)
            elif end_ns <= now:
                heappop(endings)
                del self.flows[fid]
                self._leave(flow)
                flow.done(flow.arg)
            else:
                self.loop.at(end_ns, self._next_end, endings)
                return

    def _crossed(self, flow: Flow) -> float:
        if flow.nbytes == 0:
            return 0.0
        gone = flow.nbytes - flow.remaining + flow.rate * (self.loop.now_ns - flow.since_ns)
        return min(1.0, max(0.0, gone / flow.nbytes))

    # ---- sharing ----------------------------------------------------------------------------------------------------
    def _touch(self, link: Link) -> None:
        if not self.dirty:
            self.loop.at_end_of_instant(self._solve_dirty)
        self.dirty.append(link)

    def _solve_dirty(self, _: Any, __: Any) -> None:
        """Make the rates max-min fair again, changing as few flows as that takes.

        Only the flows whose bottleneck has changed are solved anew, the others keep their rates and are what a link has
        less. Then each link that a solved flow crosses is looked at: a flow that kept its rate and ought not to have
        joins the solved ones, and again. When none is left, every flow has a bottleneck: a full link on which no flow
        has more, or its own cap. There is only one such allocation, so it is the one that solving all would give.
        """
        links, flows = self._affected()
        if not flows:
            return
        self.solves += 1
        more = flows
        while more:
            self.filled_flows += len(flows)
            fill(links, flows)
            more = misplaced(links, self.last_mark)
            for flow in more:
                self._include(flow, links, flows)
        self._apply(flows)

    def _affected(self) -> Tuple[List[Link], List[Flow]]:
        """New flows on dirty links, and those that had such a link as their bottleneck."""
        mark = self.last_mark = self.last_mark + 1
        links: List[Link] = []
        flows: List[Flow] = []
        for link in self.dirty:
            if link.mark != mark:
                _enter(link, mark, links)
        touched = self.dirty
        self.dirty = []
        for link in touched:
            squeezed = link.squeezed
            link.squeezed = False
            for flow in link.flows.values():
                if flow.mark != mark and (flow.bottleneck is link or flow.stamp == 0 or squeezed):
                    self._include(flow, links, flows)
        return links, flows

    def _include(self, flow: Flow, links: List[Link], flows: List[Flow]) -> None:
        mark = self.last_mark
        if flow.mark == mark:
            return
        flow.mark = mark
        flows.append(flow)
        for link in flow.path:
            if link.mark != mark:
                _enter(link, mark, links)
            link.spare += flow.rate
            link.count += 1

    def _apply(self, flows: List[Flow]) -> None:
        now = self.loop.now_ns
        stamp = self.last_stamp = self.last_stamp + 1
        endings: List[Ending] = []
        for flow in flows:
            rate = flow.next_rate
            if rate != flow.rate or flow.stamp == 0:
                left = flow.remaining - flow.rate * (now - flow.since_ns)
                if left < 0.0:
                    left = 0.0
                flow.remaining = left
                flow.since_ns = now
                flow.rate = rate
                flow.stamp = stamp
                endings.append((now + ceil(left / rate), flow.fid, stamp, flow))
        if endings:
            heapify(endings)
            self.loop.at(endings[0][0], self._next_end, endings)


def _enter(link: Link, mark: int, links: List[Link]) -> None:
    link.mark = mark
    links.append(link)
    spare = link.capacity
    for flow in link.flows.values():
        spare -= flow.rate
    link.spare = spare
    link.count = 0


def fill(links: Sequence[Link], flows: Sequence[Flow]) -> None:
    """Progressive filling of ``flows`` into what ``links`` have to spare: sets next_rate and bottleneck of each flow.

    The link with the least share left freezes its flows at it. A share only ever rises as flows freeze elsewhere, so a
    heap with stale entries serves: what is met too low is put back.
    """
    heap: List[Tuple[float, int, Optional[Flow], Link]] = []
    for link in links:
        count = link.count
        link.level = -1.0
        link.left = link.spare
        link.open = count
        if count:
            share = link.spare / count
            heap.append((share if share > 0.0 else 0.0, link.index, None, link))
    for flow in flows:
        flow.next_rate = -1.0
        if flow.cap > 0.0:
            heap.append((flow.cap, -flow.fid, flow, flow.path[0]))
    heapify(heap)
    todo = len(flows)
    while todo:
        share, index, capped, link = heap[0]
        if capped is not None:
            heappop(heap)
            if capped.next_rate < 0.0:
                todo -= 1
                capped.next_rate = share
                capped.bottleneck = None
                for other in capped.path:
                    other.left -= share
                    other.open -= 1
                    other.peak = share
            continue
        count = link.open
        if count == 0:
            heappop(heap)
            continue
        now_share = link.left / count
        if now_share > share:
            heapreplace(heap, (now_share, index, None, link))
            continue
        heappop(heap)
        link.level = share
        mark = link.mark
        for flow in link.flows.values():
            if flow.mark == mark and flow.next_rate < 0.0:
                flow.next_rate = share
                flow.bottleneck = link
                todo -= 1
                for other in flow.path:
                    other.left -= share
                    other.open -= 1
                    other.peak = share


def misplaced(links: Sequence[Link], mark: int) -> List[Flow]:
    """The flows outside the solved set whose rates are not max-min fair any more beside those that ``fill`` gave."""
    found: List[Flow] = []
    for link in links:
        flows = link.flows
        count = link.count
        if count == len(flows):
            continue
        level = link.level
        top = level * _ABOVE if level >= 0.0 else _INFINITE
        if link.left > link.capacity * _SPARE:
            low = _INFINITE
        else:
            low = link.peak * _BELOW if count else 0.0
        for flow in flows.values():
            if flow.mark != mark:
                rate = flow.rate
                if rate > top or (rate < low and flow.bottleneck is link):
                    found.append(flow)
    return found
