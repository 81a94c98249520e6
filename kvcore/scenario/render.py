"""A history as a sequence diagram in text: one column a node, one row a message or a thing that a node did.

          client      ctl       a/0       b/0
0.021 ms     ├─────────▶         │         │     MoveRequest m  a/cpu -> b/cpu, 3 chunks  (+1 us)
0.022 ms     │         ├─────────▶         │     Pin 1-1  cpu, 3 chunks  (+1 us)
0.023 ms     │         │    ✕────┤         │     Pinned 1-1  LOST
0.023 ms     │         ●         │         │     journal Decide
"""

from __future__ import annotations

from collections import deque
from typing import Any, Deque, Dict, Final, Iterable, Iterator, List, Optional, Sequence, Tuple

import msgspec

from kvcore.protocol.machine import (
    AbortCopy,
    Begin,
    Boot,
    CloseWindow,
    Command,
    CopyDone,
    CopyStopped,
    Effect,
    FillDone,
    Input,
    Journal,
    Note,
    ReadDone,
    Received,
    Send,
    StartCopy,
    StartFill,
    StartRead,
    TimerFired,
    WindowClosed,
)
from kvcore.protocol.messages import Answer, Beat, Fetch, Pinned, Push, event_name
from kvcore.scenario.history import Header, Line

#: Fields that say little to a reader.
_SKIPPED: Final = frozenset(
    ["incarnation", "event", "op", "stamp", "namespace", "endpoint", "src_endpoint", "retain_ns", "lease_ns", "inc"]
    + ["nonce", "slots", "src_slots", "lens", "src_epoch", "version", "since_ns", "source", "src_location", "mine"]
    + ["measured"]
)
#: Fields that are shown by how many there are.
_COUNTED: Final = {"keys": "chunk", "adds": "more", "drops": "less", "entries": "chunk", "locations": "location"}
#: Fields whose value speaks for itself.
_BARE: Final = frozenset(["location", "state", "why", "reason", "of", "what", "detail", "instance"])
_LEFT: Final = 14
_WIDTH: Final = 10


class Row:
    """``dst`` "": something at ``node`` alone. ``arrived_ns`` -1: never."""

    def __init__(self, t: int, node: str, text: str, dst: str = "", event: int = 0, op: str = "") -> None:
        self.t: int = t
        self.node: str = node
        self.text: str = text
        self.dst: str = dst
        self.event: int = event
        self.op: str = op
        self.arrived_ns: int = -1
        self.again: bool = False
        self.lost: bool = False  # the receiver took other things since
        self.shown: bool = True


class Reader:
    """Turns lines into rows: pairs sends with receipts, and finds the event that each belongs to."""

    def __init__(self, everything: bool) -> None:
        self.everything: bool = everything
        self.rows: List[Row] = []
        self.flying: Dict[Tuple[str, str, Any], Deque[Row]] = {}
        self.seen: Dict[Tuple[str, str, Any], None] = {}
        self.event_of: Dict[Tuple[str, Any], int] = {}  # ("rid" | "pid" | "op", it) -> event
        self.lives: Dict[str, int] = {}
        self.last_ns: Dict[str, int] = {}  # node -> when it took its last input

    def line(self, line: Line, shown: bool) -> None:
        t, node, item = line.t, line.node, line.input
        self.last_ns[node] = t
        event = self._input(t, node, item, line.out, shown)
        for effect in line.out:
            self._effect(t, node, effect, event, shown)

    def _add(self, row: Row, shown: bool) -> Row:
        row.shown = shown
        if shown:
            self.rows.append(row)
        return row

    def _input(self, t: int, node: str, item: Input, out: Sequence[Effect], shown: bool) -> int:
        """The row of an input, where it deserves one; the event that it is about."""
        if isinstance(item, Received):
            return self._received(t, node, item, shown)
        if isinstance(item, Boot):
            self.lives[node] = life = self.lives.get(node, 0) + 1
            self._add(Row(t, node, "boots" if life == 1 else f"boots again: life {life}"), shown)
            return 0
        event = 0
        if isinstance(item, (CopyDone, CopyStopped)):
            event = self.event_of.get(("rid", item.rid), 0)
        elif isinstance(item, TimerFired):
            if not self.everything and all(isinstance(effect, Send) and isinstance(effect.msg, Beat) for effect in out):
                return 0
            event = item.name[1] if item.name[0] in ("retry", "reservation", "retention", "lease", "hold") else 0
        self._add(Row(t, node, describe_input(item), "", event), shown)
        return event

    def _received(self, t: int, node: str, item: Received, shown: bool) -> int:
        message = item.msg
        event = self._event(message)
        if isinstance(message, Beat) and not self.everything:
            return 0
        at = (item.src, node, message)
        flying = self.flying.get(at)
        if flying:
            flying.popleft().arrived_ns = t
            if not flying:
                del self.flying[at]
        else:
            row = Row(t, item.src, describe(message), node, event, getattr(message, "op", ""))
            row.arrived_ns = t
            row.again = at in self.seen
            self._add(row, shown)
        return event

    def _effect(self, t: int, node: str, effect: Effect, event: int, shown: bool) -> None:
        self._learn(effect, event)
        if isinstance(effect, Send):
            message = effect.msg
            if isinstance(message, Beat) and not self.everything:
                return
            own = self._event(message) or (event if not hasattr(message, "op") else 0)
            row = Row(t, node, describe(message), effect.dst, own, getattr(message, "op", ""))
            at = (node, effect.dst, message)
            self.seen[at] = None
            self.flying.setdefault(at, deque()).append(self._add(row, shown))
        elif self.everything or not isinstance(effect, Note) or effect.kind != "invoke":
            own = getattr(effect, "event", 0) or event
            op = effect.detail if isinstance(effect, Note) and node == "client" else ""
            self._add(Row(t, node, describe_effect(effect), "", 0 if op else own, op), shown)

    def _learn(self, effect: Effect, event: int) -> None:
        """What names an event from here on."""
        if isinstance(effect, StartCopy):
            self.event_of.setdefault(("rid", effect.rid), event)
        elif isinstance(effect, Journal) and isinstance(effect.record, Begin):
            self.event_of[("op", effect.record.request.op)] = effect.record.event
        elif isinstance(effect, Send):
            message = effect.msg
            if isinstance(message, Pinned):
                self.event_of[("pid", message.pid)] = message.event
            elif isinstance(message, Push):
                self.event_of.setdefault(("rid", message.rid), event)
            elif isinstance(message, Answer) and message.event:
                self.event_of[("op", message.op)] = message.event

    def _event(self, message: Any) -> int:
        event = getattr(message, "event", 0)
        if event:
            return int(event)
        for name in ("rid", "pid"):
            found = self.event_of.get((name, getattr(message, name, None)))
            if found:
                return found
        return 0


# ---- words ----------------------------------------------------------------------------------------------------------
def describe(message: Any) -> str:
    """A message in a few words: its name, its event or step, its main fields."""
    head = type(message).__name__
    op = getattr(message, "op", "")
    event = getattr(message, "event", 0)
    if op:
        head += f" {op}"
    if event:
        head += f" {event_name(event)}"
    if isinstance(message, Fetch):
        return f"{head}  {len(message.keys)} chunks of {message.src}{', push' if message.push else ''}"
    said: List[str] = []
    for field in msgspec.structs.fields(message):
        value = getattr(message, field.name)
        if field.name in _SKIPPED or value == field.default or value == () or (op and field.name == "n"):
            continue
        said.append(_field(field.name, value))
    said += [f"{one.num_tokens} tokens at {one.instance}/{one.location}" for one in getattr(message, "found", ())]
    return f"{head}  {', '.join([one for one in said if one])}".rstrip()


def _field(name: str, value: Any) -> str:
    if name in _COUNTED:
        unit = _COUNTED[name]
        return f"{len(value)} {unit}{'s' if unit.endswith(('k', 'n')) and len(value) != 1 else ''}"
    if name == "n":
        return f"{value} chunk{'' if value == 1 else 's'}"
    if name in _BARE:
        return str(value)
    if name == "found":
        return ""
    if name in ("src", "dst", "position") and isinstance(value, tuple):
        return f"{'-> ' if name == 'dst' else ''}{value[0]}/{value[1]}"
    if name in ("pid", "rid", "epoch"):
        number = value[1] if isinstance(value, tuple) else value & 0xFFFFFFFF
        return f"{name} {number}"
    if isinstance(value, bool):
        return name if value else f"not {name}"
    return f"{name} {value}"


def describe_effect(effect: Effect) -> str:
    if isinstance(effect, StartCopy):
        what = f"{_chunks(effect.slots)} {'from' if effect.read else 'to'} {effect.peer}/{effect.peer_location}"
        return f"starts copy {effect.rid[1]}: {what}"
    if isinstance(effect, AbortCopy):
        return f"aborts copy {effect.rid[1]}"
    if isinstance(effect, StartFill):
        return f"starts to fill {_chunks(effect.slots)} of {effect.location}"
    if isinstance(effect, StartRead):
        return f"starts to read {_chunks(effect.slots)} of {effect.location}"
    if isinstance(effect, CloseWindow):
        return f"closes the window of {effect.peer}"
    if isinstance(effect, Journal):
        record = effect.record
        state = getattr(record, "state", "")
        reason = getattr(record, "reason", "")
        return f"journal {type(record).__name__}{' ' + state if state else ''}{', ' + reason if reason else ''}"
    if isinstance(effect, Note):
        return f"{effect.kind} {effect.detail}".rstrip()
    return describe(effect)


def describe_input(item: Input) -> str:
    if isinstance(item, TimerFired):
        return f"timer {item.name[0]}"
    if isinstance(item, CopyDone):
        return f"copy {item.rid[1]} {'is done' if item.ok else 'failed'}{': ' + item.why if item.why else ''}"
    if isinstance(item, CopyStopped):
        return f"copy {item.rid[1]} has stopped"
    if isinstance(item, FillDone):
        return "filled" if item.ok else "filling failed"
    if isinstance(item, ReadDone):
        return "read" if item.ok else "read WRONG BYTES"
    if isinstance(item, WindowClosed):
        return f"the window of {item.peer} is closed"
    if isinstance(item, Command):
        return f"command {' '.join((item.what, *item.args))}"
    return describe(item)


def _chunks(slots: Tuple[int, ...]) -> str:
    return f"{len(slots)} chunk{'' if len(slots) == 1 else 's'}"


def duration(ns: int) -> str:
    """``12 us``, ``1.25 ms``, ``3 s``."""
    for unit, size in (("s", 10**9), ("ms", 10**6), ("us", 10**3)):
        if ns >= size:
            return f"{ns / size:.3g} {unit}" if ns < 1000 * size else f"{ns / size:.0f} {unit}"
    return f"{ns} ns"


# ---- drawing --------------------------------------------------------------------------------------------------------
def diagram(
    header: Header,
    lines: Iterable[Line],
    events: Optional[Iterable[str]] = None,
    nodes: Optional[Iterable[str]] = None,
    after: Optional[int] = None,
    before: Optional[int] = None,
    everything: bool = False,
) -> Iterator[str]:
    """Rows of a history, of some events (``1-4``) or steps, nodes (``a`` means its ranks) and times (ns) only.

    ``everything``: heartbeats too. What is to be shown is held in memory, a long history is not.
    """
    reader = Reader(everything)
    for line in lines:
        if before is not None and line.t > before:
            break
        reader.line(line, after is None or line.t >= after)
    rows = [row for row in reader.rows if _wanted(row, reader, events, nodes)]
    for row in rows:
        row.lost = row.arrived_ns < 0 and row.t < reader.last_ns.get(row.dst, row.t)
    where = "in simulation" if header.world == "sim" else "for real"
    yield f"{header.scenario}, {where}, seed {header.seed}"
    if not rows:
        yield "nothing matches"
        return
    yield from draw(rows, _columns(header, rows))


def _wanted(row: Row, reader: Reader, events: Optional[Iterable[str]], nodes: Optional[Iterable[str]]) -> bool:
    if nodes is not None:
        names = set(nodes)
        if not any(node in names or node.partition("/")[0] in names for node in (row.node, row.dst) if node):
            return False
    if events is None:
        return True
    names = set(events)
    event = row.event or reader.event_of.get(("op", row.op), 0)
    ops = {name for name in names if reader.event_of.get(("op", name), -1) == event}
    return row.op in names or bool(ops) or (event != 0 and event_name(event) in names)


def _columns(header: Header, rows: Sequence[Row]) -> List[str]:
    """The nodes that take part, the client first and else in the order of what was built, or of appearance."""
    used = dict.fromkeys([node for row in rows for node in (row.node, row.dst) if node])
    known = [spec.name for spec in header.built.specs] if header.built is not None else []
    ordered = [node for node in [*known, *used] if node in used]
    return list(dict.fromkeys([node for node in ordered if node == "client"] + ordered))


def draw(rows: Sequence[Row], columns: Sequence[str]) -> Iterator[str]:
    """The head, repeated every 40 rows, and a line a row."""
    width = max(_WIDTH, *[len(name) + 2 for name in columns])
    centre = {name: _LEFT + width * i + width // 2 for i, name in enumerate(columns)}
    right = _LEFT + width * len(columns)
    head = " " * _LEFT + "".join([name.center(width) for name in columns])
    for number, row in enumerate(rows):
        if number % 40 == 0:
            yield head.rstrip()
        cells = [" "] * right
        for at in centre.values():
            cells[at] = "│"
        _arrow(cells, centre, row)
        yield f"{row.t / 1e6:11,.3f} ms"[-_LEFT:] + "".join(cells[_LEFT:]) + " " + _label(row)


def _arrow(cells: List[str], centre: Dict[str, int], row: Row) -> None:
    start = centre[row.node]
    if not row.dst or row.dst == row.node:
        cells[start] = "●" if not row.dst else "↻"
        return
    end = centre[row.dst]
    step = 1 if end > start else -1
    arrived = row.arrived_ns >= 0
    if not arrived:  # it stops half way
        end = (start + end) // 2
    for at in range(start + step, end, step):
        cells[at] = "─"
    cells[start] = "├" if step > 0 else "┤"
    cells[end] = "✕" if not arrived else "▶" if step > 0 else "◀"


def _label(row: Row) -> str:
    if not row.dst:
        return f"{row.node}: {row.text}"
    if row.arrived_ns < 0:
        return f"{row.text}  {'LOST' if row.lost else 'not received by the end'}"
    if row.again:
        return f"{row.text}  AGAIN"
    return f"{row.text}  (+{duration(row.arrived_ns - row.t)})"
