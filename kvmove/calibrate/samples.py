"""What the played scenarios say: times of moves and their phases, of stores and reads, and what one message costs."""

from __future__ import annotations

from collections import defaultdict
from typing import Final

import msgspec

from kvcore.protocol.machine import FillDone, ReadDone, Received, StartFill, StartRead
from kvcore.scenario.history import Line
from kvcore.scenario.result import Result
from kvmove.calibrate.plan import Ask, Part

Kind = tuple[str, str, bool, bool]
"""(from, to, inside, push)"""
CPU: Final[Kind] = ("cpu", "cpu", False, False)


class Timed(msgspec.Struct, frozen=True):
    """One move as it went, in ns. ``first``: the first that there was between these two."""

    ask: Ask
    control_ns: int
    queue_ns: int
    copy_ns: int
    commit_ns: int
    first: bool = False


class Samples:
    """All of one transport."""

    def __init__(self, transport: str) -> None:
        self.transport: str = transport
        self.carried: dict[str, None] = {}
        self.moves: list[Timed] = []
        self.together: dict[str, list[float]] = {"process": [], "host": []}
        """Bytes a second of two copies at once, by one process and by two."""
        self.fills: dict[int, list[float]] = defaultdict(list)
        self.reads: dict[int, list[float]] = defaultdict(list)
        self.gaps: list[float] = []
        self.cpu_s: list[tuple[float, float]] = []
        """(GB moved, CPU seconds) beyond what the same run without them took."""

    def add(self, part: Part, result: Result, lines: list[Line]) -> None:
        """What one played part tells. Moves that did not end well tell nothing."""
        self.carried.update(dict.fromkeys(copy.transport for copy in result.copies if copy.state == "done"))
        if part.name == "burst":
            self.gaps += _gaps(lines)
            return
        self.moves += timed(part, result)
        self._contended(part, result)
        if part.name == "sizes":
            _tasks(part, lines, self.fills, self.reads)

    def _contended(self, part: Part, result: Result) -> None:
        ops = {operation.op: operation for operation in result.operations if operation.state == "done"}
        groups: dict[int, list[str]] = defaultdict(list)
        for op, ask in part.asks.items():
            if ask.group and op in ops:
                groups[ask.group].append(op)
        for group, names in groups.items():
            start = min(ops[name].start_ns for name in names)
            end = max(ops[name].end_ns for name in names)
            copies = [copy for copy in result.copies if start <= copy.asked_ns <= end and copy.state == "done"]
            if len(names) == len(copies) == 2:
                took_ns = max(copy.ended_ns for copy in copies) - min(copy.began_ns for copy in copies)
                rate = sum(copy.nbytes for copy in copies) * 1e9 / max(1, took_ns)
                self.together["process" if group % 2 else "host"].append(rate)

    # ---- asked by the fit
    def of(self, what: str, kind: Kind = CPU) -> dict[tuple[int, int], list[Timed]]:
        """The moves of a part that were alone and not the first, by (bytes, chunks)."""
        found: dict[tuple[int, int], list[Timed]] = defaultdict(list)
        for one in self.moves:
            ask = one.ask
            if ask.what == what and not ask.group and not one.first and kind_of(ask) == kind:
                found[(ask.nbytes, ask.chunks)].append(one)
        return dict(sorted(found.items()))

    def kinds(self) -> list[Kind]:
        asks = [one.ask for one in self.moves if one.ask.what in ("sizes", "kinds")]
        return list(dict.fromkeys(map(kind_of, asks)))


def kind_of(ask: Ask) -> Kind:
    return ask.source, ask.target, ask.inside, ask.push


def timed(part: Part, result: Result) -> list[Timed]:
    """A part's moves, in the order in which they ended."""
    found: list[Timed] = []
    met: set[str] = set()
    for one in result.phases:
        ask = part.asks.get(one.op)
        if ask is not None:
            first = not ask.inside and ask.ends not in met
            met.add(ask.ends)
            found.append(Timed(ask, one.control_ns, one.queue_ns, one.copy_ns, one.commit_ns, first))
    return found


def _gaps(lines: list[Line]) -> list[float]:
    """Between two messages that the controller took in while more were waiting."""
    times = [line.t for line in lines if line.node == "ctl" and isinstance(line.input, Received)]
    gaps = [float(later - earlier) for earlier, later in zip(times, times[1:], strict=False)]
    return sorted(gaps)[: max(1, len(gaps) * 3 // 4)]


def _tasks(part: Part, lines: list[Line], fills: dict[int, list[float]], reads: dict[int, list[float]]) -> None:
    """How long an engine filled or read, by bytes."""
    begun: dict[tuple[str, int, bool], tuple[int, int]] = {}
    sizes = part.built.bytes_per_token
    for line in lines:
        for effect in line.out:
            if isinstance(effect, (StartFill, StartRead)):
                nbytes = sum(effect.lens) * sizes.get(f"{line.node}/{effect.location}", 0)
                begun[(line.node, effect.fid, isinstance(effect, StartFill))] = (line.t, nbytes)
        item = line.input
        if isinstance(item, (FillDone, ReadDone)):
            filled = isinstance(item, FillDone)
            start = begun.pop((line.node, item.fid, filled), None)
            if start is not None and item.ok:
                (fills if filled else reads)[start[1]].append(float(line.t - start[0]))
