"""``kvmove doctor``: what this machine has, what of kvmove works on it, and how to add what is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kvmove import output
from kvmove.errors import FAILED

if TYPE_CHECKING:
    from rich.console import Console

    from kvreal.doctor import Report, Tried


def doctor(
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")] = False,
) -> None:
    """Say what this machine has, and try what of kvmove works on it.

    Each transport moves a few KiB between real processes, from every kind of location to every other. What is missing
    stands below, each with the one command that adds it. The JSON object has the same: `machine`, `transports`
    (`pairs` and what carried the bytes there, `failed` and why), `kinds` of locations, `missing`.

    Examples:

    * `kvmove doctor`
    * `kvmove doctor --json | jq '.transports[] | select(.works) | .transport'`

    Exit status: 0 something real works, 1 nothing does.
    """
    import msgspec

    from kvreal.doctor import examine

    if json_:
        report = examine()
        body = {**msgspec.to_builtins(report), "works": report.works}
        print(msgspec.json.format(msgspec.json.encode(body), indent=2).decode())
    else:
        with output.progress("asking this machine, and trying each transport"):
            report = examine()
        _show(output.console(), report)
    if not report.works:
        raise typer.Exit(FAILED)


def _show(screen: Console, report: Report) -> None:
    from rich.markup import escape

    screen.print("[bold]this machine[/bold]")
    table = output.grid("", "")
    table.show_header = False
    for name, text in _facts(report):
        table.add_row(name, escape(text))
    screen.print(table)
    screen.print("\n[bold]what works[/bold]")
    table = output.grid("", "", "", "")
    table.show_header = False
    for one in report.transports:
        for number, (text, detail) in enumerate(_tried(one)):
            first = ("", "") if number else (f"transport {one.transport}", _verdict(one.works))
            table.add_row(*first, escape(text), escape(detail))
    if report.auto:
        table.add_row("transport auto", "takes", ", else ".join(report.auto), "for each copy, what both ends have")
    for pair, why in report.directions.items():
        way, _, rates = why.partition(": ")
        table.add_row("direction", pair, way, escape(rates))
    if not report.directions:
        table.add_row("direction", "", "read", escape(report.measured))
    for kind, found in report.kinds.items():
        works = found == "works"
        table.add_row(f"{kind} memory", _verdict(works), "" if works else escape(found))
    screen.print(table)
    if report.missing:
        screen.print("\n[bold]what is missing[/bold]")
        table = output.grid("", "so", "add it with")
        for lack in report.missing:
            table.add_row(*(escape(text) for text in (lack.what, lack.so, lack.command or "-")))
        screen.print(table)


def _verdict(works: bool) -> str:
    return "[green]works[/green]" if works else "[red]does not[/red]"


def _facts(report: Report) -> list[tuple[str, str]]:
    here = report.machine
    memlock = "no limit" if here.memlock_bytes < 0 else output.size(here.memlock_bytes)
    traced = "not restricted" if here.ptrace_scope < 0 else f"{here.ptrace_scope}"
    huge = f"{here.huge_pages_free} of {here.huge_pages} reserved ones free, transparent: "
    counts = f"{output.plural(here.cores, 'core')}, {output.plural(here.numa_nodes, 'NUMA node')}"
    rows = [
        ("processor", f"{here.cpu}, {counts}"),
        ("memory", f"{output.size(here.memory_bytes)}, {output.size(here.memory_free_bytes)} free"),
        ("/dev/shm", f"{output.size(here.shm_bytes)}, {output.size(here.shm_free_bytes)} free"),
        ("huge pages", huge + (here.transparent_huge_pages or "unknown")),
        ("memlock limit", memlock),
        ("GPUs", ", ".join(f"{one.name} ({output.size(one.memory_bytes)})" for one in here.gpus) or "none"),
        ("RDMA devices", ", ".join(here.rdma) or "none"),
        ("UCX transports", ", ".join(here.ucx_transports) or "unknown"),
        ("NIXL plugins", ", ".join(here.nixl_plugins) or "none"),
        ("kernel", f"{here.system}; CMA {'works' if here.cma else 'does not work'}, ptrace scope {traced}, user"
                   f" namespaces {'work' if here.user_namespaces else 'do not work'}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in here.versions.items())),
    ]  # fmt: skip
    return rows + [("note", text) for text in here.notes]


def _tried(one: Tried) -> list[tuple[str, str]]:
    """(pairs, what carried them) of one transport, pairs that went alike together; then what failed."""
    alike: dict[str, list[str]] = {}
    for pair, carrier in one.pairs.items():
        alike.setdefault(carrier or "said nothing", []).append(pair)
    rows = [(", ".join(pairs), f"by {carrier}") for carrier, pairs in alike.items()]
    rows += [(pair, f"failed: {why}") for pair, why in one.failed.items()]
    return rows + ([(one.why, "")] if one.why or not rows else [])
