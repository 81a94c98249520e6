"""What all commands share: where text goes, how numbers read, how a wrong choice is refused."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from kvmove.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

#: Columns assumed where there is no terminal to ask: nothing is cut in a pipe.
PIPE_WIDTH: Final = 120
#: Choices that an error lists.
LISTED: Final = 14


def console(*, to_stderr: bool = False) -> Console:
    """Styled on a terminal, plain text in a pipe."""
    from rich.console import Console

    class Quiet(Console):
        """Nobody reads any more (``| head``): go on in silence, for the exit status is still to be told."""

        def on_broken_pipe(self) -> None:
            self.quiet = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())

    stream = sys.stderr if to_stderr else sys.stdout
    width = None if stream.isatty() else PIPE_WIDTH
    return Quiet(file=stream, width=width, highlight=False, soft_wrap=False)


@contextmanager
def progress(what: str, *, quiet: bool = False) -> Iterator[None]:
    """Say on stderr what is going on: a spinner on a terminal, one plain line elsewhere."""
    if quiet:
        yield
        return
    screen = console(to_stderr=True)
    if screen.is_terminal:
        with screen.status(what):
            yield
    else:
        print(what, file=sys.stderr, flush=True)
        yield


def grid(*columns: str, right: Sequence[str] = ()) -> Table:
    """A table of plain aligned columns that also reads well in a pipe. ``right``: the columns of numbers."""
    from rich.box import Box
    from rich.table import Table

    rule_below_head = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
    table = Table(box=rule_below_head, pad_edge=False, show_edge=False, header_style="bold", border_style="dim")
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return table


def duration(ns: int | float) -> str:
    """Three figures and a unit: ``184 us``, ``2.41 ms``, ``1.07 s``."""
    if ns < 0:
        return "-"
    value, unit = float(ns), "ns"
    for larger in ("us", "ms", "s"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    if unit == "ns":
        return f"{value:.0f} ns"
    return (
        f"{value:.0f} {unit}" if value >= 99.95 else f"{value:.1f} {unit}" if value >= 9.995 else f"{value:.2f} {unit}"
    )


def size(count: int) -> str:
    """``512 MiB``."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if value == int(value) else f"{value:.1f} {unit}"


def percent(error: float | None) -> str:
    """How far a prediction is off: ``+12%`` when it was too long; a factor when it is not even close."""
    if error is None:
        return "-"
    if error > 9:
        return f"x{error + 1:.0f}"
    return f"{error:+.0%}"


def plural(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def choice(option: str, given: str, allowed: Sequence[str]) -> str:
    """``given`` if it is one of ``allowed``; else a UserError that names the nearest."""
    if given in allowed:
        return given
    near = difflib.get_close_matches(given, allowed, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    listed = ", ".join(allowed) if len(allowed) <= LISTED else ", ".join([*allowed[:LISTED], "..."])
    raise UserError(f"{option} {given}: expected one of {listed}{hint}")


def transport_names() -> tuple[str, ...]:
    """What --transport may name: other packages' too, where the real world is installed."""
    try:
        from kvreal.transfer import names
    except ImportError:
        return ("auto", "arena", "nixl", "mooncake", "socket", "tcp")
    return names()
