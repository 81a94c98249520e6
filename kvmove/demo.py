"""``kvmove demo``: the same scenarios in both worlds, told to somebody who sees them for the first time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvcore.scenario.result import Operation
from kvmove import report
from kvmove.compare import Comparison
from kvmove.errors import FAILED, GOOD, RealUnavailable, UserError
from kvmove.output import duration, grid, percent, plural, size
from kvmove.play import Played, Player, prepare

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SCENARIOS: Final = ("smoke/move.yaml", "smoke/prompt-4k.yaml")
PROFILE: Final = "two-core-cpu.yaml"
OWN_PROFILE: Final = "profiles/this-machine.yaml"

INTRO: Final = """\
A serving instance keeps the KV cache of the prompts it has seen, cut into chunks. [bold]move[/bold] takes a prompt's \
chunks from one instance to another, so that the other need not compute them again, and loses none of them whatever \
fails on the way. The protocol is a handful of state machines without clocks or sockets. Below they run twice: under a \
simulated clock, then as real processes on this machine, from the same scenario file."""

PHASES: Final = {
    "control": "the source pins its chunks, the destination reserves room",
    "queue": "the copy waits for the transport, or for others",
    "copy": "the bytes cross",
    "commit": "the pin lived to the last byte: visible there, then deleted here",
}

NEXT: Final = (
    ("kvmove run scenarios/faults/*.yaml", "the same move while messages are lost and nodes crash"),
    ("kvmove run {first} --on both --history out", "what you have just seen, with its histories kept"),
    ("kvmove history out/move.real.jsonl", "every message of it, as a sequence diagram"),
    ("kvmove protocol --machine destination", "the table that each of those messages went through"),
    ("README.md, docs/architecture.md", "a scenario explained line by line; the house it runs in"),
)


def scenarios_directory() -> Path:
    """Beside the packages in a source tree, inside kvmove where it is installed."""
    return _beside("scenarios", SCENARIOS[0])


def profile_path() -> Path:
    """What the demo predicts by: what calibration wrote here, else a machine of the kind that it is mostly seen on."""
    own = Path(OWN_PROFILE)
    return own if own.is_file() else _beside("profiles", PROFILE) / PROFILE


def _beside(folder: str, file: str) -> Path:
    """A directory that we bring along, known by a file in it."""
    package = Path(__file__).resolve().parent
    for place in (package.parent / folder, package / folder):
        if (place / file).is_file():
            return place
    raise UserError(f"the demo's {folder} are missing: expected {package.parent / folder / file}")


def demo(screen: Console, progress: Callable[[str], AbstractContextManager[None]]) -> int:
    """Play SCENARIOS and explain; the exit status. A real world that cannot run here is said and skipped."""
    place = _short(scenarios_directory())
    profile = _short(profile_path())
    screen.print("[bold]One protocol, two worlds[/bold]\n")
    screen.print(INTRO + "\n")
    try:
        player = Player(("sim", "real"), progress=progress)
    except RealUnavailable as error:
        screen.print(f"{error}; it is skipped\n", markup=False)
        player = Player(("sim",), progress=progress)
    status = GOOD
    with player, tempfile.TemporaryDirectory(prefix="kvmove-") as logs:
        for number, name in enumerate(SCENARIOS, 1):
            prepared = prepare(str(place / name), [f"network.profile={profile}"])
            screen.rule(f"[bold]{number} of {len(SCENARIOS)}: {prepared.path}[/bold]", align="left", style="dim")
            screen.print(_about(prepared.scenario.about or prepared.scenario.name), markup=False)
            played = player.play(prepared, Path(logs) / Path(name).stem)
            _tell(screen, played)
            if not played.good:
                status = FAILED
    _next(screen, place)
    return status


def _short(path: Path) -> Path:
    """As one would type it from here, where that is shorter."""
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path


def _about(text: str) -> str:
    return " ".join(text.split())


def _tell(screen: Console, played: Played) -> None:
    """What happened, in the order in which one would ask."""
    screen.print()
    screen.print(_answers(played))
    screen.print()
    facts = grid("", "")
    facts.show_header = False
    for name, text in _facts(played):
        facts.add_row(f"[bold]{name}[/bold]", text)
    screen.print(facts)
    if played.comparison is not None and played.comparison.time:
        screen.print()
        screen.print(_times(played.comparison))
        profile = played.built.network.profile
        screen.print(f"\npredicted by {profile}; `kvmove calibrate` measures this machine", markup=False)
    if not played.good:
        for world in played.results:
            for line in report.verdicts(played, world):
                screen.print("  " + line, markup=False, soft_wrap=True)
        if played.replay is not None:
            report.print_replay(screen, played.replay)
        if played.comparison is not None:
            report.print_comparison(screen, played.comparison)
    screen.print()


def _answers(played: Played) -> Table:
    """What was asked, and what each world answered."""
    headings = {"sim": "answered in simulation", "real": "for real"}
    table = grid("step", "asked", *(headings[world] for world in played.results))
    by_world = {world: {one.op: one for one in result.operations} for world, result in played.results.items()}
    first = next(iter(played.results.values()))
    for operation in first.operations:
        if operation.what in ("settle", "sleep", "wait"):
            continue
        answers = [_answer(found.get(operation.op)) for found in by_world.values()]
        if len(answers) == 2 and answers[0] == answers[1]:
            answers[1] = "the same"
        table.add_row(operation.op, f"{operation.what} {operation.text}".strip(), *answers)
    return table


def _answer(operation: Operation | None) -> str:
    if operation is None:
        return "never asked"
    if operation.what != "move" or not operation.event_id:
        return report.op_answer(operation)
    return f"at once: {operation.promised:,} tokens, event {operation.event_id}; then {report.op_answer(operation)}"


def _facts(played: Played) -> list[tuple[str, str]]:
    found = []
    real = played.results.get("real")
    if real is not None:
        moved = sum(one.bytes for one in real.phases)
        found.append(("moved", f"{size(moved)}, carried by [bold]{real.transport}[/bold]"))
        checked = size(int(real.metrics.get("bytes_checked", 0)))
        wiped = size(int(real.metrics.get("bytes_overwritten", 0)))
        found.append(
            ("bytes", f"{checked} compared with what was stored, after {wiped} of free memory was overwritten")
        )
    for world, result in played.results.items():
        spent = f"{played.wall_s[world]:.1f} s of wall time"
        nodes = plural(len(played.built.specs), "node")
        how = f"{nodes}, each its own process" if world == "real" else f"{nodes} under a simulated clock"
        violations = "no property violated" if not result.violations else plural(len(result.violations), "VIOLATION")
        found.append(("in simulation" if world == "sim" else "for real", f"{how}: {violations}, {spent}"))
    if played.comparison is not None:
        replay, outcome = played.comparison.replay, played.comparison.outcome
        steps = f"{sum(replay.nodes.values()):,} inputs of both histories through fresh machines"
        found.append(("replayed", f"{steps}: {'equal effects each time' if replay.equal else 'effects DIFFER'}"))
        found.append(("compared", f"answers and final placement: {'equal' if outcome.equal else 'DIFFERENT'}"))
    expected = len(played.scenario.expect)
    if expected:
        failed = sum(len(lines) for lines in played.failures.values())
        found.append(("expected", f"{plural(expected, 'expectation')}: {'met' if not failed else f'{failed} NOT met'}"))
    return found


def _times(comparison: Comparison) -> Table:
    """Each move's phases, with a word on what happens in them."""
    table = grid("time of", "predicted", "measured", "error", "", right=("predicted", "measured", "error"))
    for op in comparison.time:
        whole = (duration(op.predicted_ns), duration(op.measured_ns), percent(op.error))
        table.add_row(f"[bold]{op.op}[/bold]", *whole, "from request to end")
        for name, phase in op.phases.items():
            row = (duration(phase.predicted_ns), duration(phase.measured_ns), percent(phase.error))
            table.add_row(f"  {name}", *row, f"[dim]{PHASES[name]}[/dim]")
    return table


def _next(screen: Console, place: Path) -> None:
    screen.rule("[bold]where to look next[/bold]", align="left", style="dim")
    table = grid("", "")
    table.show_header = False
    for command, what in NEXT:
        table.add_row(command.format(first=place / SCENARIOS[0]), what)
    screen.print(table)
