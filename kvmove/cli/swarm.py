"""``kvmove swarm``: thousands of generated scenarios, checked; what fails is shrunk to a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from kvmove import output
from kvmove.errors import FAILED


def swarm(
    count: Annotated[int, typer.Option("--count", help="How many scenarios.", min=1, metavar="N")] = 10_000,
    seed: Annotated[int, typer.Option("--seed", help="The first one's; the next ones follow.", min=0)] = 0,
    size: Annotated[
        str, typer.Option("--size", help="tiny: 3 instances, 2 moves; whole: every kind of step.")
    ] = "tiny",
    without: Annotated[
        list[str] | None, typer.Option("--without", help="Switch a rule off, as in h03. Repeatable.", metavar="RULE")
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", help="Side by side; as many as there are cores if not given.", min=1)
    ] = None,
    out: Annotated[str, typer.Option("--out", help="Where shrunk scenarios go.", metavar="DIR")] = "out/swarm",
) -> None:
    """Generate scenarios from seeds, simulate them with every property checked, shrink what fails to a file.

    Each seed is one scenario: topology, steps and faults of every kind at any message, effect or time. The table says
    which faults fired in which phase of a move, and how the moves ended; a kind that never fired is a failure.

    Examples:

    * `kvmove swarm --count 100000`
    * `kvmove swarm --size whole --seed 1000000`
    * `kvmove swarm --without h16` (and see the hole open that rule h16 closes)

    Exit status: 0 all good, 1 something failed or a kind of fault never fired, 2 bad input.
    """
    import msgspec

    from kvcore.protocol.config import Rules
    from kvcore.scenario.arbitrary import TINY, WHOLE
    from kvmove import swarm as swarming

    output.choice("--size", size, ("tiny", "whole"))
    rules = [output.choice("--without", rule.lower(), Rules.__struct_fields__) for rule in without or ()]
    space = msgspec.structs.replace(TINY if size == "tiny" else WHOLE, without=tuple(rules))
    with output.progress(f"{count:,} {size} scenarios from seed {seed}"):
        tally = swarming.swarm(count, seed, space, processes)
    for line in tally.coverage.lines():
        print(line)
    paths = swarming.write(tally.finds, Path(out))
    for find in tally.finds:
        print(f"seed {find.seed}: {find.lines[0]}")
    for path in paths:
        print(f"shrunk: {os.path.relpath(path)}")
    rate = tally.count / tally.cpu_s if tally.cpu_s else 0.0
    print(
        f"{tally.count:,} scenarios, {tally.inputs:,} inputs, {rate:,.0f} scenarios a second and core:"
        f" {len(tally.finds) or 'none'} failed"
    )
    if tally.finds or tally.coverage.empty():
        raise typer.Exit(FAILED)
