"""``kvmove demo``: two scenarios in both worlds, told to somebody who sees them for the first time."""

from __future__ import annotations

import typer

from kvmove import output


def demo() -> None:
    """Replay two scenarios in simulation and on this machine, compare, and explain what happened.

    Example:

    * `kvmove demo`
    """
    from kvmove.demo import demo as tell

    status = tell(output.console(), output.progress)
    if status:
        raise typer.Exit(status)
