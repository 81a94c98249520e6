"""``kvmove calibrate``: measure this machine, and write the profile that the simulator reads."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from kvmove import output
from kvmove.errors import FAILED, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from kvmove.calibrate.accuracy import Accuracy

OUT: Final = "profiles/this-machine.yaml"
CHECK_S: Final = 25.0
"""How long the check takes, about: the progress bar's last part."""


def calibrate(
    out: Annotated[str, typer.Option("--out", help="Write the profile there.", metavar="FILE")] = OUT,
    quick: Annotated[
        bool, typer.Option("--quick", help="Once through, fewer sizes: about 20 s, and 25 s for its check.")
    ] = False,
    seconds: Annotated[
        float, typer.Option("--seconds", help="Measure again and again for about so long.", min=1.0, max=3600.0)
    ] = 40.0,
    transport: Annotated[
        list[str] | None, typer.Option("--transport", help="Only this one. Repeatable.", metavar="NAME")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Hold the profile against the smoke scenarios, in both worlds.")
    ] = True,
    against: Annotated[
        str | None, typer.Option("--against", help="Measure nothing: check this profile.", metavar="FILE")
    ] = None,
    of_its_kind: Annotated[
        bool, typer.Option("--of-its-kind", help="For every machine of this kind: without what tells them apart.")
    ] = False,
    json_out: Annotated[
        str | None, typer.Option("--json", help="Write profile and check there as JSON; - for stdout.", metavar="OUT")
    ] = None,
) -> None:
    """Measure what moves cost on this machine, and write a profile that the simulator reads.

    Real processes move real bytes by each transport and between each kind of location: small and large, in few chunks
    and many, alone and in each other's way. From that come what a message, a chunk and a byte cost. The profile is then
    held against the smoke scenarios, which had no part in it: each is played in both worlds, and the predicted times
    stand beside the measured ones.

    Run it while the machine has nothing else to do.

    Examples:

    * `kvmove calibrate`, then `kvmove run FILE --on both --set network.profile=profiles/this-machine.yaml`
    * `kvmove calibrate --quick --transport nixl --out nixl.yaml`
    * `kvmove calibrate --against profiles/two-core-cpu.yaml`

    Exit status: 0 written and checked, 1 a move of the check was not done, 2 bad input or nothing that can be measured
    here, 130 Ctrl-C.
    """
    target = Path(out)
    if against is None:
        _writable("--out", target)
    if json_out not in (None, "-"):
        _writable("--json", Path(str(json_out)))

    import msgspec

    from kvcore.scenario.profile import load_profile
    from kvmove import calibrate as work

    screen = output.console(to_stderr=json_out == "-")
    names = list(transport or ())
    chosen = work.transports(names)
    if against is not None:
        profile = load_profile(Path(against))
        for line in work.foreign([against]):
            screen.print(f"kvmove: {line}", markup=False, soft_wrap=True)
        with _progress(CHECK_S) as step:
            accuracy: Accuracy | None = work.check(
                profile, chosen[0] if names else work.AUTO, work.QUICK_REPEATS if quick else work.REPEATS, step
            )
    else:
        spent = 20.0 if quick else seconds
        with _progress(spent + (CHECK_S if check else 0.0)) as step:
            found = work.calibrate(
                target.stem,
                names,
                quick=quick,
                seconds=0.0 if quick else seconds,
                of_its_kind=of_its_kind,
                checked=check,
                step=step,
            )
        profile, accuracy = found.fitted.profile, found.accuracy
        _write(target, found.text)
        for name, why in found.lacking.items():
            screen.print(f"not measured: {name}: {why}", markup=False, soft_wrap=True)
        if found.busy:
            line = f"kvmove: this machine was busy (load {found.busy:.1f}): the profile is that of a busy machine"
            output.console(to_stderr=True).print(line, markup=False, soft_wrap=True)
        screen.print(f"wrote {target}: {output.plural(len(profile.copies), 'kind')} of copies", markup=False)
    if accuracy is not None:
        _show(screen, accuracy)
    if json_out is not None:
        data = msgspec.json.format(msgspec.json.encode({"profile": profile, "accuracy": accuracy}), indent=2)
        if json_out == "-":
            print(data.decode())
        else:
            _write(Path(json_out), data.decode() + "\n")
    if accuracy is not None and (accuracy.left_out or not accuracy.moves):
        raise typer.Exit(FAILED)


def _show(screen: Console, accuracy: Accuracy) -> None:
    """Each move, predicted beside measured, and its phases."""
    table = output.grid(
        "move", "phase", "predicted", "measured", "+-", "error", right=("predicted", "measured", "+-", "error")
    )
    for move in accuracy.moves:
        measured = move.measured
        times = (output.duration(move.predicted_ns), output.duration(measured.median), f"{measured.percent:.0f}%")
        table.add_row(f"[bold]{move.scenario} {move.op}[/bold]", "whole", *times, output.percent(move.error))
        for name, phase in move.phases.items():
            if phase.predicted_ns or phase.measured_ns:
                ends = (output.duration(phase.predicted_ns), output.duration(phase.measured_ns), "")
                table.add_row("", name, *ends, output.percent(phase.error))
    screen.print(table)
    for name in accuracy.left_out:
        screen.print(f"left out: {name}: it was not done each time", markup=False)
    screen.print(
        f"\nover {accuracy.transport}, middle one of {accuracy.repeats} runs each: median error"
        f" [bold]{accuracy.median_error:.0%}[/bold] of a move's duration, worst {accuracy.worst_error:.0%}"
    )


@contextmanager
def _progress(seconds: float) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal; one line elsewhere."""
    import time

    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    screen = output.console(to_stderr=True)
    started = time.monotonic()
    if not screen.is_terminal:
        screen.print(f"measuring for about {seconds:.0f} s")
        yield lambda text: None
        return
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=screen, transient=True) as bar:
        task = bar.add_task("", total=seconds)

        def step(text: str) -> None:
            bar.update(task, completed=min(seconds * 0.99, time.monotonic() - started), description=text)

        yield step


def _writable(option: str, path: Path) -> None:
    """UserError before anything is measured; nothing is made for it."""
    if path.is_dir():
        raise UserError(f"{option} {path}: expected a file, and that is a directory")
    folder = path.absolute().parent
    while not folder.exists() and path.parts[:-1] == Path(OUT).parts[:-1]:
        folder = folder.parent  # the directory that we propose is made if need be, any other must be there
    if not folder.is_dir():
        raise UserError(f"{option} {path}: there is no directory {path.parent}")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"{option} {path}: may not be written")


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    try:
        path.parent.mkdir(exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
