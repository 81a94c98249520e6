"""``kvmove report``: a page of what was measured, or of what changed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from kvmove.errors import UserError


def report(
    folders: Annotated[
        list[str],
        typer.Argument(metavar="DIR...", help="What `kvmove bench` wrote, and the hardware suite.", show_default=False),
    ],
    out: Annotated[
        str, typer.Option("--out", help="A directory of the report's name is made there.", metavar="DIR")
    ] = "reports",
    name: Annotated[str | None, typer.Option("--name", help="Instead of the bench's own.", metavar="NAME")] = None,
    is_diff: Annotated[
        bool, typer.Option("--diff", help="Two directories: what changed from one to the other.")
    ] = False,
) -> None:
    """Write one page of what was measured: OUT/NAME/index.html, which needs no network, and the same as README.md.

    A directory may hold bench.json (`kvmove bench --out DIR`), JUnit files of the hardware suite (`pytest
    tests/hardware --junit-xml DIR/hardware.xml`) and results of runs (`kvmove run ... --json DIR/faults.json`).
    Any of them alone will do. Benches of one machine are put together on one page; bench.json goes beside it, so that
    it can be compared later.

    Examples:

    * `kvmove report out/bench --out reports`
    * `kvmove report --diff reports/before reports/after --out reports`

    Exit status: 0 written, 2 bad input.
    """
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"{folder}: expected a directory of `kvmove bench`, or with results of the hardware suite")
    if is_diff and len(folders) != 2:
        raise UserError(f"--diff: expected two directories, found {len(folders)}")
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(f"a report needs more ({error}): pip install 'kvmove[report]'") from None

    from kvmove.bench import result
    from kvmove.reports import diff, page, sections, sources

    if is_diff:
        a, b = (result.read(Path(folder)) for folder in folders)
        title = f"{a.name} and {b.name}" if a.name != b.name else f"{a.name}, before and after"
        target = Path(out) / _file_name(name or f"{a.name}-{b.name}-diff")
        written = page.write(target, title, "What changed between two benches.", diff.sections(a, b))
    else:
        found = sources.read(folders)
        target = Path(out) / _file_name(name or found.bench.name)
        written = page.write(target, found.bench.name, found.bench.about, sections.sections(found))
        if found.commands:
            written.append(result.write_json(found.bench, target))
    for path in written:
        print(path)


def _file_name(name: str) -> str:
    """``Two cores, no GPU`` -> ``two-cores-no-gpu``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "report"
