"""``kvmove bench``: what moves cost on this machine, beside their limits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvmove import output
from kvmove.errors import FAILED, UserError


def bench(
    file: Annotated[
        str | None,
        typer.Argument(metavar="[MATRIX]", help="What to measure (YAML); a standard matrix if not given."),
    ] = None,
    out: Annotated[
        str, typer.Option("--out", help="Where bench.json and samples.parquet go.", metavar="DIR")
    ] = "out/bench",
    is_quick: Annotated[
        bool, typer.Option("--quick", help="A few repeats of everything up to 512 MiB: minutes, not an hour.")
    ] = False,
    repeats: Annotated[int | None, typer.Option("--repeats", help="Instead of the matrix's own.", min=1)] = None,
) -> None:
    """Measure moves over the transports, sizes, chunk sizes and places that a matrix names, beside their limits.

    In one run and in turns: our moves, a memcpy, bare NIXL with the same descriptors, raw sockets, and the same moves
    by the reference, LMCache, where `make bench-peer` has brought it. A move's time is from its request until its event
    is done and its source released; every byte is compared afterwards. `kvmove report` makes a page of it.

    Examples:

    * `kvmove bench --quick`
    * `kvmove bench kvmove/bench/record.yaml --out out/record`
    * `kvmove report out/record --out reports`

    Exit status: 0 measured, 1 a cell could not be measured or a scenario went wrong, 2 bad input.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {out}: expected a directory, and a file of that name is in the way")
    import msgspec

    from kvmove.bench import result, run

    here = run.machine()
    wanted = run.load(file, is_quick, here)
    if repeats is not None:
        wanted = msgspec.structs.replace(wanted, repeats=repeats)
    if not is_quick:  # which may leave out the cell of a goal
        run.check_goals(wanted, here)
    bencher = run.Bencher(wanted, here, output.progress)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None
    found = bencher.bench(_command(file, out, is_quick, repeats))
    for path in result.write(found, folder):
        print(path)
    for what, why in found.skipped.items():
        print(f"skipped: {what}: {why}")
    for what, why in found.failed.items():
        print(f"FAILED: {what}: {why}")
    bad = [one for one in found.outcomes if not one.good]
    for one in bad:
        print(f"FAILED: {one.file} ({one.world}): {one.why}")
    if bad or found.failed:
        raise typer.Exit(FAILED)


def _command(file: str | None, out: str, is_quick: bool, repeats: int | None) -> list[str]:
    """As it can be typed again."""
    words = ["bench", *([file] if file else []), *(["--quick"] if is_quick else [])]
    words += ["--repeats", str(repeats)] if repeats is not None else []
    return [*words, "--out", out]
