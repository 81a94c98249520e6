"""``kvmove protocol``: the transition table, and the state diagrams drawn from it."""

from __future__ import annotations

from typing import Annotated

import typer

from kvmove.output import choice


def protocol(
    form: Annotated[
        str, typer.Option("--format", "-f", help="text, markdown, dot (Graphviz) or mermaid.", show_default=True)
    ] = "text",
    machine: Annotated[
        str | None, typer.Option("--machine", "-m", help="Only this one: coordinator, source, destination, ...")
    ] = None,
) -> None:
    """Print the protocol: what each machine does with each input in each state.

    Every pair is either in this table or refused by name; the tests read the same table. [Hnn] names the hole that a
    rule closes; docs/protocol.md tells each one's story.

    Examples:

    * `kvmove protocol --machine source`
    * `kvmove protocol --format dot --machine coordinator | dot -Tsvg > coordinator.svg`
    * `kvmove protocol --format mermaid`
    """
    from kvcore.protocol.tables import ROWS
    from kvmove import diagram

    form = choice("--format", form, diagram.FORMATS)
    rows = ROWS
    if machine is not None:
        machine = choice("--machine", machine, diagram.machines(ROWS))
        rows = tuple(row for row in ROWS if row.machine == machine)
    print(diagram.draw(rows, form))
