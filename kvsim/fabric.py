"""Bytes on their way: fluid flows that share links max-min fairly.

A flow first spends its path's latency, using no bandwidth; then it joins its links. From then on it has the rate that
max-min fairness gives: no flow could have more without one that has no more than it having less. A disk, a NIC's side,
a switch's uplink and a PCIe lane are all just links.

What keeps it cheap: a flow alone on its links needs no solver; all that happens in one instant is solved once, at its
end, among the flows that it changes (kvsim/maxmin.py). Every solve puts one entry into the loop's heap,
for the first end among the flows whose rates it changed; an entry that a later solve has overtaken does nothing.

Rates are bytes a nanosecond (1.0 is 1 GB/s), floats; ends are whole nanoseconds, rounded up.
"""

from __future__ import annotations

from heapq import heapify, heappop
from math import ceil
from typing import Any, Dict, List, Optional, Sequence, Tuple, final

from kvcore.protocol.messages import Terms
from kvcore.scenario.result import LinkRate
from kvsim import weighted
from kvsim.loop import Loop
from kvsim.maxmin import Done, Flow, Link, Solver

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
        self.latent: bool = False  # some link has a latency
        self.dirty: List[Link] = []
        self.solver: Solver = Solver()
        self.unlike: int = 0  # flows with a priority or a weight of their own
        self.was_unlike: bool = False  # at the last solve
        self.watched: bool = False  # note every change of a link's rate
        self.rates: List[LinkRate] = []

    # ---- the interface ----------------------------------------------------------------------------------------------
    def link(self, name: str, bytes_per_s: float, latency_ns: int = 0) -> Link:
        if bytes_per_s <= 0 or latency_ns < 0:
            raise ValueError(f"link {name}: {bytes_per_s} bytes/s, {latency_ns} ns; expected above 0, not below 0")
        link = Link(len(self.links), name, bytes_per_s / 1e9, latency_ns)
        self.links.append(link)
        self.latent = self.latent or latency_ns > 0
        return link

    def start(
        self,
        path: Tuple[Link, ...],
        nbytes: int,
        done: Done,
        arg: Any,
        cap: float = 0.0,
        after_ns: int = 0,
        owner: object = None,
        terms: Optional[Terms] = None,
    ) -> int:
        """Send ``nbytes`` over every link of ``path`` at once; ``done(arg)`` is called when the last byte has left.

        ``cap``: its own limit in bytes/s, 0 for none. ``after_ns``: it starts so much later than now. An empty path
        carries any number of bytes in no time. ``owner``: whose flow it is; ``terms``: its priority and weight among
        that one's. Returns the flow's id.
        """
        fid = self.last_fid = self.last_fid + 1
        flow = Flow(fid, path, nbytes, done, arg, cap / 1e9, owner, terms)
        self.flows[fid] = flow
        if terms is not None:
            self.unlike += 1
        loop = self.loop
        joins_ns = loop.now_ns + after_ns
        if self.latent:
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
            link.resized = True
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
            if self.watched:
                self._note(path)

    def _leave(self, flow: Flow) -> None:
        fid = flow.fid
        flow.stamp = 0
        if flow.terms is not None:
            self.unlike -= 1
        for link in flow.path:
            flows = link.flows
            if fid in flows:
                del flows[fid]
                if flows:
                    self._touch(link)
        if self.watched:
            self._note(flow.path)

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

    def _note(self, links: Sequence[Link]) -> None:
        for link in links:
            rate = sum([flow.rate for flow in link.flows.values()])
            self.rates.append(LinkRate(self.loop.now_ns, link.name, rate * 1e9))

    # ---- sharing ----------------------------------------------------------------------------------------------------
    def _touch(self, link: Link) -> None:
        if not self.dirty:
            self.loop.at_end_of_instant(self._solve_dirty)
        self.dirty.append(link)

    def _solve_dirty(self, _: Any, __: Any) -> None:
        dirty = self.dirty
        self.dirty = []
        now = self.loop.now_ns
        stamp = self.last_stamp = self.last_stamp + 1
        endings: List[Ending] = []
        if self.unlike or self.was_unlike:  # once more after the last of them has gone, so that its like are fair again
            self.was_unlike = self.unlike > 0
            solved = weighted.solve(dirty)
        else:
            solved = self.solver.solve(dirty)
        for flow in solved:
            rate = flow.next_rate
            if rate != flow.rate or flow.stamp == 0:
                left = flow.remaining - flow.rate * (now - flow.since_ns)
                if left < 0.0:
                    left = 0.0
                flow.remaining = left
                flow.since_ns = now
                flow.rate = rate
                flow.stamp = stamp
                if rate > 0.0:  # else it waits until others have gone
                    endings.append((now + ceil(left / rate), flow.fid, stamp, flow))
                if self.watched:
                    self._note(flow.path)
        if endings:
            heapify(endings)
            self.loop.at(endings[0][0], self._next_end, endings)
