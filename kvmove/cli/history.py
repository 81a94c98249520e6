"""``kvmove history``: a run's history as a sequence diagram in text."""

from __future__ import annotations

from typing import Annotated

import typer


def history(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A history that kvmove run --history wrote.")],
    event: Annotated[
        str | None, typer.Option("--event", "-e", help="Only this event, as in 1-4, or this operation.", metavar="E")
    ] = None,
    node: Annotated[
        str | None, typer.Option("--node", "-n", help="Only this node, as in a/0 or ctl.", metavar="N")
    ] = None,
    after: Annotated[str | None, typer.Option("--after", help="From this time on, as in '2 ms'.", metavar="T")] = None,
    before: Annotated[str | None, typer.Option("--before", help="Up to this time.", metavar="T")] = None,
) -> None:
    """Show what happened, message by message.

    Examples:

    * `kvmove run scenarios/smoke/move.yaml --history out`
    * `kvmove history out/move.sim.jsonl`
    * `kvmove history out/move.sim.jsonl --event 1-1 --node b/0 --after '2 ms'`
    """
    raise NotImplementedError
