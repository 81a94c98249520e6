"""Timelines as a trace that Perfetto and Chrome show: nodes as processes, ranks as threads, each move a flow.

The format is Chrome's trace events, as JSON. Times are microseconds with three decimals: the history's nanoseconds.
Spans that overlap stand in lanes of their own, so that whatever is in one lane nests. Two worlds stand beside each
other with their first steps at one instant; ``otherData`` says by how much either was shifted.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from kvcore.scenario.history import read
from kvcore.scenario.result import CopyRecord, LinkRate, Result
from kvmove.spans import CONTROLLER, OPEN, Move, Span
from kvmove.timeline import CLIENT, Timeline, timeline

Event = dict[str, Any]

LANES: Final = 1000
"""Threads that a node may have: its rank's lanes are numbered from rank * LANES."""
ARROW_NS: Final = 1000
"""How long a message's ends are drawn, at most."""


class Process:
    """A row group: an instance, the controller, the client, or the links of a world."""

    def __init__(self, pid: int, name: str) -> None:
        self.pid: int = pid
        self.name: str = name
        self.threads: dict[int, str] = {}


class Tracer:
    def __init__(self, alone: bool) -> None:
        self.alone: bool = alone
        self.events: list[Event] = []
        self.processes: dict[str, Process] = {}
        self.places: dict[int, tuple[int, int]] = {}  # id(span) -> (pid, tid)

    def process(self, world: str, name: str) -> Process:
        key = name if self.alone else f"{world} {name}"
        if key not in self.processes:
            self.processes[key] = Process(len(self.processes) + 1, key)
        return self.processes[key]

    def add(self, line: Timeline, result: Result | None, shift_ns: int) -> None:
        """One world, ``shift_ns`` later than its own clock says."""
        world = line.world
        for node in (CLIENT, CONTROLLER, *line.built.nodes):
            self._home(world, node)
        self._spans(world, line.spans, shift_ns)
        for move in line.moves.values():
            self.events += self._flows(world, move, shift_ns)
        for mark in line.marks:
            process, tid = self._home(world, mark.node or CONTROLLER)
            event = _event("i", mark.text, "fault", mark.t + shift_ns, process.pid, tid)
            self.events.append({**event, "s": "p" if mark.node else "g"})
        self._rates(world, result, shift_ns)
        self._messages(world, line, shift_ns)

    def _home(self, world: str, node: str) -> tuple[Process, int]:
        """The process and the first thread of a node."""
        instance, _, rank = node.rpartition("/")
        process = self.process(world, instance or node)
        tid = int(rank) * LANES if instance else 0
        process.threads.setdefault(tid, f"rank {rank}" if instance else node)
        return process, tid

    # ---- slices
    def _spans(self, world: str, spans: Sequence[Span], shift_ns: int) -> None:
        """Each tree of spans into the first lane of its node that is free for as long as it lasts."""
        free: dict[str, list[tuple[int, int]]] = {}  # node -> (free from, lane), a heap
        count: dict[str, int] = {}
        for span in sorted(_separated(spans), key=lambda span: (span.begin_ns, -span.end_ns)):
            lanes = free.setdefault(span.node, [])
            if lanes and lanes[0][0] <= span.begin_ns:
                _, lane = heapq.heappop(lanes)
            else:
                lane = count[span.node] = count.get(span.node, -1) + 1
            heapq.heappush(lanes, (_last(span), lane))
            process, first = self._home(world, span.node)
            if lane:
                process.threads.setdefault(first + lane, f"{process.threads[first]} ({lane + 1})")
            self.events += self._slices(span, process.pid, first + lane, shift_ns)

    def _slices(self, span: Span, pid: int, tid: int, shift_ns: int) -> Iterator[Event]:
        self.places[id(span)] = (pid, tid)
        event = _event("X", span.name, span.kind, span.begin_ns + shift_ns, pid, tid)
        yield {**event, "dur": _us(span.end_ns - span.begin_ns), "args": {**span.args, "t_ns": span.begin_ns}}
        for one in span.inside:
            yield from self._slices(one, pid, tid, shift_ns)

    # ---- flows
    def _flows(self, world: str, move: Move, shift_ns: int) -> Iterator[Event]:
        """One a rank: from the controller's pin through source and destination back to the controller's last phase."""
        first, last = move.whole.inside[0], move.whole.inside[-1]
        ranks: dict[str, list[Span]] = {}
        for point in move.points:
            ranks.setdefault(point.node.rpartition("/")[2], []).append(point)
        for rank, points in (ranks or {"0": []}).items():
            inner = [point for point in points if first.begin_ns <= point.begin_ns <= last.end_ns]
            chain = [("s", first, first.begin_ns)]
            chain += [("t", point, point.begin_ns) for point in sorted(inner, key=lambda point: point.begin_ns)]
            chain.append(("f", last, max(last.begin_ns, chain[-1][2])))
            for phase, span, t in chain:
                pid, tid = self.places[id(span)]
                event = _event(phase, f"move {move.request.op}", "move", t + shift_ns, pid, tid)
                yield {**event, "id": f"{world} {move.event:x} {rank}", "bp": "e"}

    # ---- counters
    def _rates(self, world: str, result: Result | None, shift_ns: int) -> None:
        if result is None:
            return
        process = self.process(world, "links")
        for rate in _last_words(result.rates or measured_rates(result.copies)):
            event = _event("C", rate.link, "link", rate.t + shift_ns, process.pid, 0)
            self.events.append({**event, "args": {"GB/s": round(rate.bytes_per_s / 1e9, 6)}})

    # ---- messages
    def _messages(self, world: str, line: Timeline, shift_ns: int) -> None:
        """An arrow a message, between short slices on a thread of each node's own; a lost one ends where it began."""
        if not line.messages:
            return
        ends: dict[str, dict[int, list[str]]] = {}
        for arrow in line.arrows:
            ends.setdefault(arrow.src, {}).setdefault(arrow.sent_ns, []).append(arrow.text)
            if arrow.arrived_ns != OPEN:
                ends.setdefault(arrow.dst, {}).setdefault(arrow.arrived_ns, []).append(arrow.text)
        where: dict[str, tuple[int, int]] = {}
        for node, texts in ends.items():
            process, first = self._home(world, node)
            tid = first + LANES - 1
            process.threads.setdefault(tid, f"{process.threads[first]}: messages")
            where[node] = (process.pid, tid)
            times = sorted(texts)
            for t, after in zip(times, [*times[1:], times[-1] + ARROW_NS]):
                name = "; ".join(dict.fromkeys(texts[t]))
                event = _event("X", name, "message", t + shift_ns, *where[node])
                self.events.append({**event, "dur": _us(min(ARROW_NS, after - t))})
        for number, arrow in enumerate(line.arrows):
            if arrow.arrived_ns == OPEN:
                event = _event("i", f"{arrow.text}  not received", "lost", arrow.sent_ns + shift_ns, *where[arrow.src])
                self.events.append({**event, "s": "t"})
                continue
            for phase, node, t in (("s", arrow.src, arrow.sent_ns), ("f", arrow.dst, arrow.arrived_ns)):
                event = _event(phase, arrow.text, "message", t + shift_ns, *where[node])
                self.events.append({**event, "id": f"{world} message {number}", "bp": "e"})

    def named(self) -> list[Event]:
        """All events in order of time, behind what names processes and threads."""
        head: list[Event] = []
        for order, process in enumerate(self.processes.values()):
            head.append(_meta(process.pid, 0, "process_name", {"name": process.name}))
            head.append(_meta(process.pid, 0, "process_sort_index", {"sort_index": order}))
            for tid, name in sorted(process.threads.items()):
                head.append(_meta(process.pid, tid, "thread_name", {"name": name}))
                head.append(_meta(process.pid, tid, "thread_sort_index", {"sort_index": tid}))
        return head + sorted(self.events, key=lambda event: (event["ts"], -event.get("dur", 0.0)))


def _event(phase: str, name: str, kind: str, t: int, pid: int, tid: int) -> Event:
    return {"ph": phase, "name": name, "cat": kind, "ts": _us(t), "pid": pid, "tid": tid}


def _meta(pid: int, tid: int, name: str, args: dict[str, Any]) -> Event:
    return {"ph": "M", "name": name, "pid": pid, "tid": tid, "args": args}


def _us(ns: int) -> float:
    return ns / 1000


def _last(span: Span) -> int:
    return max([span.end_ns, *[_last(one) for one in span.inside]])


def _separated(spans: Iterable[Span]) -> Iterator[Span]:
    """The trees again, without what does not lie within what it is inside of, or overlaps what came before it there:
    that stands beside it."""
    for span in spans:
        kept: list[Span] = []
        for one in sorted(span.inside, key=lambda one: one.begin_ns):
            beside = kept and one.begin_ns < kept[-1].end_ns
            if beside or one.begin_ns < span.begin_ns or one.end_ns > span.end_ns:
                yield from _separated([one])
            else:
                kept.append(one)
        span.inside = kept
        for one in kept:
            yield from (other for other in _separated([one]) if other is not one)
        yield span


def _last_words(rates: Iterable[LinkRate]) -> list[LinkRate]:
    """Of several changes of one link in one instant the last."""
    found: dict[tuple[int, str], LinkRate] = {}
    for rate in rates:
        found.pop((rate.t, rate.link), None)
        found[(rate.t, rate.link)] = rate
    return list(found.values())


def measured_rates(copies: Iterable[CopyRecord]) -> list[LinkRate]:
    """What crossed between each two nodes, by the average rate of each copy while it ran."""
    changes: list[tuple[int, str, float]] = []
    for copy in copies:
        took_ns = copy.ended_ns - copy.began_ns
        if took_ns <= 0 or not copy.nbytes:
            continue
        src, dst = (copy.peer, copy.node) if copy.read else (copy.node, copy.peer)
        rate = copy.nbytes / took_ns * 1e9
        changes += [(copy.began_ns, f"{src} -> {dst}", rate), (copy.ended_ns, f"{src} -> {dst}", -rate)]
    running: dict[str, list[float]] = {}
    found = []
    for t, link, rate in sorted(changes):
        rates = running.setdefault(link, [])
        if rate < 0:
            rates.remove(-rate)
        else:
            rates.append(rate)
        found.append(LinkRate(t, link, sum(rates)))
    return found


def trace(lines: Sequence[Timeline], results: Sequence[Result | None]) -> dict[str, Any]:
    """The JSON object of one or more worlds, each with the result of its run."""
    latest = max((line.start_ns for line in lines), default=0)
    tracer = Tracer(alone=len(lines) == 1)
    other: dict[str, Any] = {}
    for line, result in zip(lines, results):
        shift_ns = latest - line.start_ns
        tracer.add(line, result, shift_ns)
        other[line.world] = {
            "scenario": line.built.name, "seed": line.built.seed, "shift_ns": shift_ns,
            "transport": (result.transport or "") if result is not None else "",
        }  # fmt: skip
    return {"traceEvents": tracer.named(), "displayTimeUnit": "ns", "otherData": other}


def of_run(histories: dict[str, Path], results: dict[str, Result], messages: bool = False) -> bytes:
    """The trace of one scenario that was played, by world. HistoryError: a history that cannot be read."""
    lines = []
    for world, path in histories.items():
        header, steps = read(path)
        assert header.built is not None
        lines.append(timeline(world, header.built, steps, results.get(world), messages))
    return msgspec.json.encode(trace(lines, [results.get(line.world) for line in lines]))
