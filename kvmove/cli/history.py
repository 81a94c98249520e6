"""``kvmove history``: a run's history as a sequence diagram in text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from kvmove.errors import UserError


def history(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A history that kvmove run --history wrote.")],
    events: Annotated[
        list[str] | None,
        typer.Option("--event", "-e", help="Only this event (1-4), or this step (m). Repeatable.", metavar="E"),
    ] = None,
    nodes: Annotated[
        list[str] | None,
        typer.Option("--node", "-n", help="Only this node: a/0, ctl, client, or a for its ranks.", metavar="N"),
    ] = None,
    after: Annotated[str | None, typer.Option("--after", help="From this time on: '2 ms'.", metavar="T")] = None,
    before: Annotated[str | None, typer.Option("--before", help="Up to this time: '2 leases'.", metavar="T")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Heartbeats too.")] = False,
) -> None:
    """Show what happened, message by message: a column a node, a row a message or a thing that a node did.

    Examples:

    * `kvmove run scenarios/smoke/move.yaml --history out`
    * `kvmove history out/move.sim.jsonl`
    * `kvmove history out/move.sim.jsonl --event m --node ctl --after '2 ms'`
    """
    from kvcore.protocol.config import Config
    from kvcore.scenario.history import read
    from kvcore.scenario.render import diagram

    header, lines = read(Path(file), lambda text: print(f"kvmove: {text}", file=sys.stderr))
    built = header.built
    config = built.config if built is not None else Config()
    if built is not None:
        _known("--node", nodes, {name for node in built.nodes for name in (node, node.partition("/")[0])})
    for row in diagram(
        header,
        lines,
        events=events,
        nodes=nodes,
        after=_time("--after", after, config),
        before=_time("--before", before, config),
        everything=everything,
    ):
        print(row)


def _known(option: str, given: list[str] | None, known: set[str]) -> None:
    from kvmove.output import choice

    for name in given or ():
        choice(option, name, sorted(known))


def _time(option: str, text: str | None, config: object) -> int | None:
    """Nanoseconds of a time as scenarios write them."""
    from kvcore.protocol.config import Config
    from kvcore.scenario.units import Duration, UnitError

    assert isinstance(config, Config)
    if text is None:
        return None
    try:
        return Duration.parse(text).ns(config)
    except UnitError as error:
        raise UserError(f"{option} {text}: {error}") from None
