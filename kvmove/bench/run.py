"""All of one bench: cells, services, scenarios, and the machine that they ran on."""

from __future__ import annotations

import datetime
import os
import shlex
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import msgspec

from kvcore.scenario.build import Built
from kvcore.scenario.profile import Profile, load_profile
from kvcore.scenario.result import Result
from kvmove.bench import live, matrix, measure, result
from kvmove.bench.matrix import Machine, Matrix, Point, Scenarios
from kvmove.bench.result import Bench, Cell, Figure, Outcome, Timing
from kvmove.errors import RealUnavailable, UserError, line_for
from kvmove.play import Played, Player, prepare
from kvmove.version import version_text

QUICK_REPEATS = 5
QUICK_BYTES = 512 << 20


class Progress(Protocol):
    def __call__(self, what: str, /) -> AbstractContextManager[None]: ...


def machine() -> Machine:
    """What a matrix may ask for here. RealUnavailable if nothing can run for real."""
    try:
        from kvreal import transfer
        from kvreal.facts import meminfo
        from kvreal.slab import provides
    except ImportError as error:
        raise RealUnavailable(f"the real world cannot run here ({error}): pip install 'kvmove[real]'") from None
    known = transfer.here()
    return Machine(
        transports=tuple(transfer.available()),
        named=tuple(name for name, lack in known.items() if not lack and name not in transfer.available()),
        known=tuple(known),
        available_bytes=meminfo().get("MemAvailable", 0) << 10,
        gpu="gpu" in provides(),
    )


def quick(given: Matrix) -> Matrix:
    """Fewer repeats, and no size above 512 MiB."""
    blocks = []
    for block in given.cells:
        sizes = tuple(one for one in block.sizes if one.bytes <= QUICK_BYTES)
        if sizes or block.tokens:
            blocks.append(msgspec.structs.replace(block, sizes=sizes))
    services = [
        msgspec.structs.replace(
            one,
            memory=one.memory if one.memory is None or one.memory.bytes <= QUICK_BYTES else None,
            contention=one.contention if one.contention and one.contention.large.bytes <= QUICK_BYTES else None,
            reference=tuple(peer for peer in one.reference if peer.size is None or peer.size.bytes <= QUICK_BYTES),
        )
        for one in given.services
    ]
    scenarios = msgspec.structs.replace(given.scenarios, real=given.scenarios.real[:3], times=1)
    return msgspec.structs.replace(
        given,
        repeats=min(QUICK_REPEATS, given.repeats),
        warmup=1,
        cells=tuple(blocks),
        services=tuple(services),
        scenarios=scenarios,
    )


class Bencher:
    """Does what a matrix says, part by part. What cannot be done is in ``skipped``, with the reason."""

    def __init__(self, wanted: Matrix, here: Machine, progress: Progress) -> None:
        self.matrix: Matrix = wanted
        self.here: Machine = here
        self.progress: Progress = progress
        self.profile: Profile = load_profile(Path(wanted.profile)) if wanted.profile else Profile()
        self.skipped: dict[str, str] = {}
        self.failed: dict[str, str] = {}

    def bench(self, command: Sequence[str]) -> Bench:
        begun, started = datetime.datetime.now(datetime.UTC), time.monotonic()
        facts, versions = machine_text()
        cells = [*self.cells(), *self.beside()]
        figures = self.figures()
        outcomes, timings = self.scenarios(self.matrix.scenarios)
        return Bench(
            name=self.matrix.name,
            about=self.matrix.about,
            begun=begun.strftime("%Y-%m-%d %H:%M UTC"),
            took_s=round(time.monotonic() - started, 1),
            command=shlex.join(["kvmove", *command]),
            seed=self.matrix.seed,
            repeats=self.matrix.repeats,
            warmup=self.matrix.warmup,
            profile=self.matrix.profile or "the default profile",
            machine=facts,
            versions=versions,
            cells=tuple(cells),
            figures=tuple(figures),
            goals=self.matrix.goals,
            outcomes=tuple(outcomes),
            timings=tuple(timings),
            skipped=self.skipped,
            failed=self.failed,
        )

    # ---- parts
    def cells(self) -> list[Cell]:
        points = matrix.points(self.matrix, self.here)
        pools = measure.Pools()
        found = []
        try:
            for number, point in enumerate(points, 1):
                with self.progress(f"cell {number} of {len(points)}: {point.name}"):
                    cell = self._cell(point, pools)
                if cell is not None:
                    found.append(cell)
        finally:
            pools.close()
        return found

    def _cell(self, point: Point, pools: measure.Pools) -> Cell | None:
        """None if it cannot be: one such cell is no reason to lose the others."""
        try:
            return measure.measure(point, self.matrix.repeats, self.matrix.warmup, pools, self._simulate)
        except Exception as error:
            why = line_for(error)
            if why is None:
                raise
            pools.close()
            self.failed[point.name] = why
            return None

    def _simulate(self, built: Built, transport: str) -> Result:
        from kvsim.run import run

        return run(built, profile=self.profile, transport=transport)

    def beside(self) -> list[Cell]:
        """Moves over HTTP, beside the reference where it is."""
        from kvreal.reference.peer import found

        asked = [(services, peer) for services in self.matrix.services for peer in services.reference]
        python, why = found() if asked else (None, "")
        if asked and python is None:
            self.skipped["the reference"] = why
        cells = []
        for services, peer in asked:
            with self.progress(f"{services.name}: {peer.name}{' beside the reference' if python else ''}"):
                try:
                    cells.append(live.beside(services, peer, self.matrix.repeats, self.matrix.warmup, python))
                except UserError as error:
                    self.failed[f"{services.name}: {peer.name}"] = str(error)
        return cells

    def figures(self) -> list[Figure]:
        found: list[Figure] = []
        for services in self.matrix.services:
            if services.idle is None and services.memory is None and services.contention is None:
                continue
            with self.progress(f"{services.name}: idle CPU, memory, contention"):
                try:
                    found += live.figures(services, self.matrix.repeats)
                except UserError as error:
                    self.failed[services.name] = str(error)
        return found

    def scenarios(self, wanted: Scenarios) -> tuple[list[Outcome], list[Timing]]:
        outcomes: list[Outcome] = []
        timings: list[Timing] = []
        with tempfile.TemporaryDirectory(prefix="kvmove-bench-") as folder:
            log = Path(folder) / "log"
            sim = [file for pattern in wanted.simulated for file in matrix.scenario_files(pattern)]
            real = [file for pattern in wanted.real for file in matrix.scenario_files(pattern)]
            timed = [file for pattern in wanted.timed for file in matrix.scenario_files(pattern)]
            if sim:
                with Player(("sim",)) as player, self.progress(f"simulating {len(sim)} scenarios with faults"):
                    outcomes += [one for file in sim for one in self._play(player, file, log)]
            if real or timed:
                with Player(("sim", "real")) as player:
                    for file in real:
                        with self.progress(f"both worlds: {file}"):
                            outcomes += [one for one in self._play(player, file, log) if one.world == "real"]
                    for file in timed:
                        with self.progress(f"predicted and measured: {file}"):
                            timings += self._time(player, file, log, wanted.times)
        return outcomes, timings

    def _play(self, player: Player, file: str, log: Path) -> list[Outcome]:
        played = player.play(prepare(file), log, keep=False)
        if played.skipped:
            self.skipped[file] = played.skipped
        return [_outcome(played, world) for world in played.results]

    def _time(self, player: Player, file: str, log: Path, times: int) -> list[Timing]:
        """The median over ``times`` runs of each move, against the profile's prediction."""
        name = f"network.profile={self.matrix.profile}" if self.matrix.profile else ""
        measured: dict[str, list[float]] = {}
        predicted: dict[str, float] = {}
        for _ in range(times):
            played = player.play(prepare(file, [name] if name else ()), log, keep=False)
            if played.comparison is None:
                self.skipped[file] = played.skipped or "could not be compared"
                return []
            for op in played.comparison.time:
                measured.setdefault(op.op, []).append(op.measured_ns / 1e9)
                predicted[op.op] = op.predicted_ns / 1e9
        shown = _short(file)
        return [
            Timing(file=shown, op=op, predicted_s=predicted[op], measured_s=statistics.median(found))
            for op, found in measured.items()
        ]


def _short(file: str) -> str:
    """``faults/drop-pin.yaml``."""
    path = Path(file)
    return f"{path.parent.name}/{path.name}"


def _outcome(played: Played, world: str) -> Outcome:
    result = played.results[world]
    moves = Counter(operation.state for operation in result.operations if operation.what == "move")
    unexpected = played.unexpected(world)
    why = [*(one.text for one in unexpected), *result.hung, *played.failures[world]]
    differs = played.comparison is not None and not played.comparison.equal
    if differs and not why and played.comparison is not None:
        why = [*played.comparison.outcome.differs, *played.comparison.replay.differs]
    return Outcome(
        file=_short(played.path),
        name=played.scenario.name,
        world=world,
        good=not why,
        wall_s=round(played.wall_s[world], 3),
        fired=result.fired,
        violations=len(unexpected),
        moves=moves,
        why=why[0] if why else "",
    )


def machine_text() -> tuple[dict[str, str], dict[str, str]]:
    """(what this machine is, versions): names to text, nothing that tells whose it is."""
    from kvreal.facts import machine as facts_of

    facts = facts_of()
    load = {"other load": f"{os.getloadavg()[0]:.1f} runnable on average in the minute before"}
    return result.described(facts) | load, {"kvmove": version_text().removeprefix("kvmove "), **facts.versions}


def load(path: str | None, is_quick: bool, here: Machine) -> Matrix:
    """The matrix of a file, or the standard one."""
    if is_quick:
        here = msgspec.structs.replace(here, largest_bytes=QUICK_BYTES)
    wanted = matrix.load(path or str(matrix.STANDARD), here)
    return quick(wanted) if is_quick else wanted


def check_goals(wanted: Matrix, here: Machine) -> None:
    """UserError for a goal of a cell that nothing measures."""
    names = {point.name for point in matrix.points(wanted, here)}
    names |= {f"{one.name}: {peer.name}" for one in wanted.services for peer in one.reference}
    for goal in wanted.goals:
        if goal.cell and goal.cell not in names:
            raise UserError(f"goals: {goal.say}: no cell is called {goal.cell!r}, only {', '.join(sorted(names))}")
