"""What a timeline is made of: spans, arrows, marks; and a move's own span, divided into its phases."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from kvcore.protocol.machine import Outcome
from kvcore.protocol.messages import MoveRequest, event_name

CONTROLLER: Final = "ctl"
OPEN: Final = -1


class Span(msgspec.Struct, gc=False):
    """``name`` at ``node`` from ``begin_ns`` to ``end_ns``. ``inside``: spans that lie within it, one after another."""

    node: str
    name: str
    kind: str
    begin_ns: int
    end_ns: int = OPEN
    event: int = 0
    args: dict[str, Any] = {}
    inside: list[Span] = []


class Arrow(msgspec.Struct, frozen=True, gc=False):
    """A message. ``arrived_ns`` OPEN: never."""

    src: str
    dst: str
    text: str
    sent_ns: int
    arrived_ns: int


class Mark(msgspec.Struct, frozen=True, gc=False):
    """Something that befell ``node`` ("": all) at an instant."""

    t: int
    node: str
    text: str


class Move:
    """A move as its controller saw it. What has not happened is OPEN."""

    def __init__(self, event: int, request: MoveRequest, begin_ns: int) -> None:
        self.event: int = event
        self.request: MoveRequest = request
        self.begin_ns: int = begin_ns
        self.fetched_ns: int = OPEN
        self.started_ns: int = OPEN
        self.copied_ns: int = OPEN
        self.decided_ns: int = OPEN
        self.end_ns: int = OPEN
        self.outcome: Outcome | None = None
        self.bytes: int = 0
        self.points: list[Span] = []
        """Spans of nodes that are part of it, in the order in which they began."""
        self.whole: Span = Span(CONTROLLER, f"move {request.op}", "move", begin_ns, event=event)


def divide(move: Move, last_ns: int) -> None:
    """The parts of a move on its controller, as ``EventPhases`` divides it: pin and reserve are control, copy is queue
    and copy, commit and release are commit."""
    whole = move.whole
    whole.end_ns = end_ns = move.end_ns if move.end_ns != OPEN else max(last_ns, move.begin_ns)
    outcome = move.outcome
    request = move.request
    whole.args = {
        "event": event_name(move.event), "from": "/".join(request.src), "to": "/".join(request.dst),
        "state": outcome.state if outcome is not None else "open", "reason": outcome.reason if outcome else "",
        "tokens": outcome.num_tokens if outcome is not None else 0, "bytes": move.bytes,
    }  # fmt: skip
    reached = [("pin", move.begin_ns), ("reserve", move.fetched_ns)]
    if move.copied_ns != OPEN or move.end_ns == OPEN:  # one that copied nothing is all control
        reached += [("copy", move.started_ns), ("commit", move.copied_ns)]
    reached.append(("release", move.decided_ns))
    begun = [(name, t) for name, t in reached if t != OPEN]
    for index, (name, t) in enumerate(begun):
        until = begun[index + 1][1] if index + 1 < len(begun) else end_ns
        t, until = min(t, end_ns), min(max(until, t), end_ns)
        whole.inside.append(Span(CONTROLLER, name, "phase", t, until, event=move.event))


def told(action: Any) -> str:
    """``crash b/0, restart_after 2 s``."""
    said = [type(action).__name__.lower()]
    for name in action.__struct_fields__:
        value = getattr(action, name)
        if name == "fault" or value in (-1, "", False):
            continue
        label = {"a": "between", "b": "and", "node": "", "what": ""}.get(name, name.removesuffix("_ns"))
        text = (
            " ".join(value)
            if isinstance(value, tuple)
            else f"{value / 1e9:g} s"
            if name.endswith("_ns")
            else str(value)
        )
        said.append(f"{label} {text}".strip())
    return " ".join(said)
