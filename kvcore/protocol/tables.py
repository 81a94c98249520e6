"""The protocol as data: what each machine does with each input in each state. Tests, docs and the CLI read these rows.

A row's ``input`` is a message's type, a driver's input or a timer ("retry timer"), then, after a colon, the case.
Every (state, message) pair is there; what is ignored says why; what a node does not take at all is refused by name
(a Note "unexpected"). ``sends`` are the effects of the row, in order, a repeated kind once: a message's type name, or
StartCopy, Journal, Note and so on. One machine's state is that of one event, reservation or process (``state_of``).
"""

from __future__ import annotations

from typing import Dict, Final, List, Sequence, Tuple

from kvcore.protocol.controller import Controller
from kvcore.protocol.machine import Effect, Machine, Send
from kvcore.protocol.messages import Rid
from kvcore.protocol.rows import Row
from kvcore.protocol.rows_controller import COORDINATOR, DRAIN, FANOUT, REGISTRY
from kvcore.protocol.rows_worker import BIRTH, DESTINATION, ENGINE, HOLD, QUARANTINE, SOURCE, WRITER
from kvcore.protocol.worker import Worker

TABLES: Final = (COORDINATOR, SOURCE, WRITER, DESTINATION, QUARANTINE, REGISTRY, BIRTH, ENGINE, HOLD, FANOUT, DRAIN)
ROWS: Final[Tuple[Row, ...]] = tuple(row for table in TABLES for row in table.rows)


def kinds(effects: Sequence[Effect]) -> Tuple[str, ...]:
    """Effects as rows name them: in order, a repeated kind once."""
    names: List[str] = []
    for effect in effects:
        name = type(effect.msg).__name__ if isinstance(effect, Send) else type(effect).__name__
        if not names or names[-1] != name:
            names.append(name)
    return tuple(names)


# ---- a running machine's state --------------------------------------------------------------------------------------
def state_of(machine: str, node: Machine, event: int = 0, rid: Rid = (0, 0), who: Tuple[str, int] = ("", 0)) -> str:
    """The state of ``machine``'s table that ``node`` is in: for an event, a reservation (writer, quarantine) or a
    process ``who`` (registry)."""
    if isinstance(node, Controller):
        return _controller_state(machine, node, event, who)
    assert isinstance(node, Worker)
    return _worker_state(machine, node, event, rid)


def _controller_state(machine: str, node: Controller, event: int, who: Tuple[str, int]) -> str:
    if machine == "coordinator":
        running = node.moves.events.get(event)
        ended = node.moves.ended.get(event)
        return running.state if running is not None else ended.state if ended is not None else "unknown"
    if machine == "drain":
        return "draining" if event in node.drains.open else "none"
    if machine == "fanout":
        return "asking" if event in node.fanouts.open else "none"
    known = node.registry.ranks.get(who)
    issued = any((r.register.instance, r.register.rank) == who for r in node.registry.issued.values())
    if who in node.members.probing:
        return "probing"
    if known is None:
        return "issued" if issued else "unknown"
    return "succeeding" if issued else "believed"


def _worker_state(machine: str, node: Worker, event: int, rid: Rid) -> str:
    if machine == "birth":
        return "registered" if node.epoch else "refused" if node.refused else "expelled" if node.last_epoch else "new"
    if machine == "source":
        return "held" if event in node.source.pins else "none"
    if machine == "writer":
        return "writing" if rid in node.source.writers else "none"
    if machine == "quarantine":
        return "waiting" if rid in node.destination.quarantines else "none"
    if machine == "hold":
        return "held" if event in node.engine.holds else "none"
    if machine == "engine":
        return "any"
    reservation = node.destination.reservations.get(event)
    if reservation is not None:
        return "fencing" if reservation.fencing else "copying"
    return "retained" if event in node.destination.retentions else "none"


# ---- for people -----------------------------------------------------------------------------------------------------
def as_markdown(rows: Sequence[Row]) -> str:
    """One table a machine; inputs that a state treats alike share a line, and so do states."""
    parts: List[str] = []
    for machine in dict.fromkeys(row.machine for row in rows):
        lines = [f"### {machine}", "", "| state | input | does | next | closes |", "|---|---|---|---|---|"]
        lines += [_line(states, inputs, row) for states, inputs, row in _merged(rows, machine)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _merged(rows: Sequence[Row], machine: str) -> List[Tuple[List[str], List[str], Row]]:
    same: Dict[Tuple[str, str, str, Tuple[str, ...]], Tuple[List[str], List[str], Row]] = {}
    for row in rows:
        if row.machine == machine:
            inputs = same.setdefault((row.state, row.does, row.next, row.holes), ([row.state], [], row))[1]
            inputs.append(row.input)
    wider: Dict[Tuple[str, str, str, Tuple[str, ...]], Tuple[List[str], List[str], Row]] = {}
    for states, inputs, row in same.values():
        found = wider.get((", ".join(inputs), row.does, row.next, row.holes))
        if found is None:
            wider[(", ".join(inputs), row.does, row.next, row.holes)] = (states, inputs, row)
        else:
            found[0].extend(states)
    return list(wider.values())


def _line(states: List[str], inputs: List[str], row: Row) -> str:
    cells = [", ".join(states), "; ".join(inputs), row.does, row.next, " ".join(hole.upper() for hole in row.holes)]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main() -> None:
    """Print the tables as docs/protocol.md carries them."""
    print(as_markdown(ROWS))


if __name__ == "__main__":
    main()
