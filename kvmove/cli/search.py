"""``kvmove search``: every schedule of small worlds, on the real machines."""

from __future__ import annotations

import typer

from kvmove.errors import FAILED


def search() -> None:
    """Search all schedules of small worlds exhaustively, on the real machines.

    A stub until the search lands.
    """
    raise typer.Exit(FAILED)
