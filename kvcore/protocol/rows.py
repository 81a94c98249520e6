"""What a transition table is made of. The rows are in rows_controller.py and rows_worker.py."""

from __future__ import annotations

from typing import List, Tuple

import msgspec


class Row(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """In ``state``, ``input`` makes ``machine`` do ``does`` and leaves it in ``next`` ("": where it was)."""

    machine: str
    state: str
    input: str
    does: str
    next: str = ""
    holes: Tuple[str, ...] = ()
    sends: Tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The input without its case: "Pinned" of "Pinned: the last rank"."""
        return self.input.partition(":")[0]


class Table:
    """The rows of one machine as they are written down: states, then inputs."""

    def __init__(self, machine: str, node: str, about: str) -> None:
        self.machine: str = machine
        self.node: str = node
        self.about: str = about
        self.rows: List[Row] = []

    def row(self, states: str, given: str, does: str, after: str = "", holes: str = "", sends: str = "") -> None:
        """One row for each of the states and of the kinds of input, which are separated by commas."""
        kinds, colon, case = given.partition(":")
        for state in states.split(", "):
            moved = "" if after == state else after
            for kind in kinds.split(", "):
                found = Row(
                    self.machine, state, kind + colon + case, does, moved, tuple(holes.split()), tuple(sends.split())
                )
                self.rows.append(found)

    def states(self) -> Tuple[str, ...]:
        return tuple(dict.fromkeys(row.state for row in self.rows))
