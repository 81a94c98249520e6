"""Who gets how much: max-min fair rates, solved only among the flows that a change changes.

An allocation is max-min fair if and only if no link carries more than it can and every flow has a *bottleneck*: a full
link on which no flow has more, or its own cap. There is exactly one such allocation. So after a start, an end or a new
capacity it is enough to solve anew the flows whose bottleneck changed, and to look whether the others' bottlenecks
still hold: where they do not, those flows join in. Where hundreds of flows are coupled through shared links, such a
change reaches a few of them; SimGrid and the textbook solve the whole connected component.

``Solver.solve`` is progressive filling: the link with the least share left freezes its flows at that share. A share
only rises while flows freeze elsewhere, so a heap with stale entries serves: what is met too low is put back.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush, heapreplace
from typing import Any, Callable, Dict, Final, List, Optional, Tuple, final

from kvcore.protocol.messages import Terms

Done = Callable[[Any], None]

_SPARE: Final = 1e-12
"""The part of a link's capacity that counts as nothing. Rates agree with an exact solution to far less than 1e-9."""

_ABOVE: Final = 1.0 + 1e-12
_BELOW: Final = 1.0 - 1e-12
_INFINITE: Final = 1e300


@final
class Link:
    """One direction of something that carries bytes. ``capacity`` in bytes a nanosecond."""

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
        "posted",
        "resized",
        "spare",
    )

    def __init__(self, index: int, name: str, capacity: float, latency_ns: int) -> None:
        self.index: int = index
        self.name: str = name
        self.capacity: float = capacity
        self.latency_ns: int = latency_ns
        self.flows: Dict[int, Flow] = {}
        self.resized: bool = False  # since the last solve
        # the solver's own, good while mark is that of the running solve:
        self.mark: int = 0
        self.spare: float = 0.0  # what the flows that keep their rates leave
        self.count: int = 0  # flows being solved
        self.left: float = 0.0  # spare, less what has been frozen
        self.open: int = 0  # flows not frozen yet
        self.level: float = -1.0  # the share at which it froze flows; -1.0: it froze none
        self.posted: float = -1.0  # the share that stands in the heap for it; -1.0: none
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
        "owner",
        "path",
        "rate",
        "remaining",
        "since_ns",
        "stamp",
        "terms",
    )

    def __init__(
        self,
        fid: int,
        path: Tuple[Link, ...],
        nbytes: int,
        done: Done,
        arg: Any,
        cap: float,
        owner: object = None,
        terms: Optional[Terms] = None,
    ) -> None:
        self.fid: int = fid
        self.path: Tuple[Link, ...] = path  # each link once
        self.nbytes: int = nbytes
        self.remaining: float = float(nbytes)
        self.done: Done = done
        self.arg: Any = arg
        self.cap: float = cap  # 0.0: none
        self.owner: object = owner  # who carries it out
        self.terms: Optional[Terms] = terms  # None: as all are; kvsim/weighted.py
        self.rate: float = 0.0
        self.since_ns: int = 0
        self.stamp: int = 0  # 0: it has no rate yet
        self.bottleneck: Optional[Link] = None  # None: its own cap, or none yet
        self.mark: int = 0
        self.next_rate: float = -1.0


Share = Tuple[float, int, Optional[Flow], Link]
"""(share, a number that makes it unique, the flow whose cap this is, the link)."""


@final
class Solver:
    def __init__(self) -> None:
        self.mark: int = 0
        self.links: List[Link] = []
        self.flows: List[Flow] = []
        self.heap: List[Share] = []
        self.todo: int = 0
        self.solves: int = 0
        self.fills: int = 0
        self.filled: int = 0

    def solve(self, dirty: List[Link]) -> List[Flow]:
        """Flows whose ``next_rate`` is their rate from now on; all others keep what they have."""
        self._begin(dirty)
        if not self.flows:
            return self.flows
        self.solves += 1
        while True:
            if len(self.flows) == 1:
                self._fill_one(self.flows[0])
            else:
                self._fill()
            wrong = self._misplaced()
            if not wrong:
                return self.flows
            for flow in wrong:
                if flow.mark != self.mark:
                    self._include(flow)

    def _begin(self, dirty: List[Link]) -> None:
        """New flows on dirty links, and those that had such a link as their bottleneck."""
        mark = self.mark = self.mark + 1
        self.links = []
        self.flows = []
        for link in dirty:
            if link.mark != mark:
                self._enter(link)
        for link in dirty:
            resized = link.resized
            link.resized = False
            for flow in link.flows.values():
                if flow.mark != mark and (flow.bottleneck is link or flow.stamp == 0 or resized):
                    self._include(flow)

    def _enter(self, link: Link) -> None:
        link.mark = self.mark
        self.links.append(link)
        spare = link.capacity
        for flow in link.flows.values():
            spare -= flow.rate
        link.spare = spare
        link.count = 0
        link.left = spare
        link.open = 0
        link.level = -1.0
        link.posted = -1.0
        link.peak = 0.0

    def _include(self, flow: Flow) -> None:
        mark = self.mark
        flow.mark = mark
        self.flows.append(flow)
        for link in flow.path:
            if link.mark != mark:
                self._enter(link)
            link.spare += flow.rate
            link.count += 1

    def _pull(self, flow: Flow) -> None:
        """Include a flow while filling. Its rate is not below what is frozen so far, so nothing frozen is wrong."""
        self._include(flow)
        self.todo += 1
        flow.next_rate = -1.0
        rate = flow.rate
        for link in flow.path:
            left = link.left = link.left + rate
            count = link.open = link.open + 1
            share = left / count
            if share < link.posted or link.posted < 0.0:
                link.posted = share
                heappush(self.heap, (share, -link.index - 1, None, link))
        if flow.cap > 0.0:
            heappush(self.heap, (flow.cap, flow.fid, flow, flow.path[0]))

    def _fill_one(self, flow: Flow) -> None:
        """A flow that changes alone gets what its links have to spare."""
        rate = flow.cap
        bottleneck: Optional[Link] = None
        for link in flow.path:
            if rate == 0.0 or link.spare < rate:
                rate = link.spare if link.spare > 0.0 else 0.0
                bottleneck = link
                if rate == 0.0:
                    break
        flow.next_rate = rate
        flow.bottleneck = bottleneck
        for link in flow.path:
            link.left = link.spare - rate
            link.level = rate if link is bottleneck else -1.0
            link.peak = rate

    def _fill(self) -> None:
        self.fills += 1
        heap: List[Share] = []
        for link in self.links:
            count = link.count
            spare = link.left = link.spare
            link.level = -1.0
            link.open = count
            link.posted = -1.0
            if count:
                posted = link.posted = spare / count if spare > 0.0 else 0.0
                heap.append((posted, -link.index - 1, None, link))
        for flow in self.flows:
            flow.next_rate = -1.0
            if flow.cap > 0.0:
                heap.append((flow.cap, flow.fid, flow, flow.path[0]))
        heapify(heap)
        self.heap = heap
        self.todo = len(self.flows)
        while self.todo:
            share, number, capped, link = heap[0]
            if capped is not None:
                heappop(heap)
                if capped.next_rate < 0.0:
                    self._freeze([capped], share, None)
                continue
            if share != link.posted:
                heappop(heap)  # a lower share has been posted since
                continue
            count = link.open
            if count == 0:
                link.posted = -1.0
                heappop(heap)
                continue
            now_share = link.left / count
            if now_share > share:
                link.posted = now_share
                heapreplace(heap, (now_share, number, None, link))
                continue
            if link.count < len(link.flows) and self._pull_above(link, share):
                continue
            link.posted = -1.0
            heappop(heap)
            link.level = share
            mark = self.mark
            self._freeze([f for f in link.flows.values() if f.mark == mark and f.next_rate < 0.0], share, link)
        self.filled += len(self.flows)

    def _freeze(self, flows: List[Flow], share: float, bottleneck: Optional[Link]) -> None:
        slack: List[Link] = []
        for flow in flows:
            flow.next_rate = share
            flow.bottleneck = bottleneck
            for link in flow.path:
                link.left -= share
                link.peak = share
                count = link.open = link.open - 1
                if count == 0 and link is not bottleneck and link.count < len(link.flows):
                    slack.append(link)
        self.todo -= len(flows)
        for link in slack:
            if link.open == 0 and link.left > link.capacity * _SPARE:
                self._pull_bound(link, share)

    def _pull_above(self, link: Link, share: float) -> bool:
        """Flows that have more than a full link's share give way."""
        top = share * _ABOVE
        mark = self.mark
        pulled = False
        for flow in [f for f in link.flows.values() if f.mark != mark and f.rate > top]:
            self._pull(flow)
            pulled = True
        return pulled

    def _pull_bound(self, link: Link, share: float) -> None:
        """A link that is not full holds nobody back."""
        mark = self.mark
        for flow in [f for f in link.flows.values() if f.mark != mark and f.bottleneck is link and f.rate >= share]:
            self._pull(flow)

    def _misplaced(self) -> List[Flow]:
        """The flows outside the solved ones whose rates are not max-min fair any more beside those."""
        found: List[Flow] = []
        mark = self.mark
        for link in self.links:
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
