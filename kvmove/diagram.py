"""The protocol's transition table, as people read it: text, Markdown, Graphviz and Mermaid, all from the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

FORMATS: Final = ("text", "markdown", "dot", "mermaid")


class Row(Protocol):
    """kvcore.protocol.tables.Row: in ``state``, ``input`` makes the machine do ``does`` and leaves it in ``next``."""

    @property
    def machine(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def input(self) -> str: ...
    @property
    def does(self) -> str: ...
    @property
    def next(self) -> str: ...
    @property
    def holes(self) -> Sequence[str]: ...


def draw(rows: Sequence[Row], form: str) -> str:
    """All machines of ``rows``, one after another, in one of FORMATS."""
    renderer = {"text": text, "markdown": markdown, "dot": dot, "mermaid": mermaid}[form]
    parts = [renderer(machine, [row for row in rows if row.machine == machine]) for machine in machines(rows)]
    return "\n\n".join(parts)


def machines(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.machine for row in rows))


def states(rows: Sequence[Row]) -> list[str]:
    """In the order in which the table speaks of them."""
    return list(dict.fromkeys([row.state for row in rows] + [row.next for row in rows if row.next]))


def edges(rows: Sequence[Row]) -> list[tuple[str, str, list[str]]]:
    """(state, next, inputs that lead there), for those that change the state; without the case after the colon."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.next and row.next != row.state:
            inputs = found.setdefault((row.state, row.next), [])
            kind = row.input.partition(":")[0]
            if kind not in inputs:
                inputs.append(kind)
    return [(state, after, inputs) for (state, after), inputs in found.items()]


def holes(row: Row) -> str:
    return " ".join(hole.upper() for hole in row.holes)


def text(machine: str, rows: Sequence[Row]) -> str:
    """A table a state and, above it, the state diagram as one line an arrow."""
    lines = [machine.upper(), ""]
    width = max((len(state) for state in states(rows)), default=0)
    for state, after, inputs in edges(rows):
        lines.append(f"  {state:<{width}} --> {after:<{width}}  on {', '.join(inputs)}")
    for state in dict.fromkeys(row.state for row in rows):
        lines += ["", f"  in {state}"]
        here = [row for row in rows if row.state == state]
        wide = max(len(row.input) for row in here)
        for row in here:
            then = f" -> {row.next}" if row.next and row.next != row.state else ""
            closes = f"  [{holes(row)}]" if row.holes else ""
            lines.append(f"    {row.input:<{wide}}  {row.does or 'nothing'}{then}{closes}")
    return "\n".join(lines)


def markdown(machine: str, rows: Sequence[Row]) -> str:
    lines = [f"### {machine}", "", "| state | input | does | next | closes |", "|---|---|---|---|---|"]
    for row in rows:
        cells = [row.state, row.input, row.does or "nothing", row.next or row.state, holes(row)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def dot(machine: str, rows: Sequence[Row]) -> str:
    lines = [f"digraph {_id(machine)} {{", "  rankdir=LR;", '  node [shape=box, style=rounded, fontname="sans-serif"];']
    lines += [f'  {_id(state)} [label="{state}"];' for state in states(rows)]
    for state, after, inputs in edges(rows):
        label = "\\n".join(one.replace('"', '\\"') for one in inputs)
        lines.append(f'  {_id(state)} -> {_id(after)} [label="{label}"];')
    return "\n".join([*lines, "}"])


def mermaid(machine: str, rows: Sequence[Row]) -> str:
    lines = [f"%% {machine}", "stateDiagram-v2"]
    lines += [f'  state "{state}" as {_id(state)}' for state in states(rows)]
    for state, after, inputs in edges(rows):
        label = ", ".join(one.replace(":", " ").replace(";", " ") for one in inputs)  # both end a Mermaid label
        lines.append(f"  {_id(state)} --> {_id(after)}: {label}")
    return "\n".join(lines)


def _id(name: str) -> str:
    """A name that dot and Mermaid take without quotes."""
    return "".join(character if character.isalnum() else "_" for character in name)
