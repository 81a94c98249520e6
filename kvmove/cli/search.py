"""``kvmove search``: every order of things in small worlds, on the real machines."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from kvmove import output
from kvmove.errors import FAILED, UserError


def search(
    worlds: Annotated[
        list[str] | None, typer.Argument(metavar="[WORLD]...", help="Which; all if none is named.")
    ] = None,
    states: Annotated[int, typer.Option("--states", help="Stop after this many states of a world.", min=1)] = 4_000,
    without: Annotated[
        list[str] | None, typer.Option("--without", help="Switch a rule off, as in h03. Repeatable.", metavar="RULE")
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", help="Side by side; as many as there are cores if not given.", min=1)
    ] = None,
    list_worlds: Annotated[bool, typer.Option("--list", help="Only name the worlds.")] = False,
) -> None:
    """Search small worlds exhaustively: any message late, doubled or lost, any timer early, at every step.

    It searches the machines that production runs, not a model of them. For each world it says how many states it saw,
    whether those were all, how deep it went and which rare events it met; one that had to be met and was not is a
    failure, because then the search did not look where it says.

    Examples:

    * `kvmove search`
    * `kvmove search one-move --states 1000000`
    * `kvmove search one-move --without h12` (and see the hole open that rule h12 closes)

    Exit status: 0 nothing violated and everything met, 1 otherwise, 2 bad input.
    """
    from kvmove.version import compiled

    if compiled():
        raise UserError("the search forks machines, which the compiled core cannot do: run it on the pure one")

    from kvcore.protocol.config import Rules
    from kvcore.scenario.search.cases import CASES
    from kvcore.scenario.search.run import search_all, summary

    known = [case.name for case in CASES]
    if list_worlds:
        for name in known:
            print(name)
        return
    rules = [output.choice("--without", rule.lower(), Rules.__struct_fields__) for rule in without or ()]
    names = [output.choice("world", name, known) for name in worlds or known]
    if len(set(names)) < len(names):
        raise UserError(f"world {next(name for name in names if names.count(name) > 1)}: named twice")
    started = time.monotonic()
    total, good = 0, True
    with output.progress(f"searching {output.plural(len(names), 'world')}, {states:,} states each at most"):
        for found in search_all(names, states, rules, processes):
            print(summary(found), flush=True)
            for line in found.trace if found.violations else ():
                print("    " + line)
            total += found.states
            good = good and found.ok
    print(f"{total:,} states in {time.monotonic() - started:.0f} s: {'all good' if good else 'FAILED'}")
    if not good:
        raise typer.Exit(FAILED)
