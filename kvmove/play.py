"""Play one scenario in one world or both, check what happened, compare: all of ``kvmove run`` but the printing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Final

import msgspec

from kvcore.scenario.build import Built, build
from kvcore.scenario.expect import expectations
from kvcore.scenario.history import read
from kvcore.scenario.loader import load
from kvcore.scenario.result import Result
from kvcore.scenario.schema import Scenario
from kvmove import compare

WORLDS: Final = ("sim", "real")

Progress = Callable[[str], AbstractContextManager[None]]


class Prepared(msgspec.Struct):
    """A scenario file that has been read, checked and compiled; nothing has run."""

    path: str
    scenario: Scenario
    built: Built


class Played(msgspec.Struct):
    """One scenario, played. ``results``, ``failures`` (of expectations), ``histories`` and ``wall_s`` are by world."""

    path: str
    scenario: Scenario
    built: Built
    results: dict[str, Result] = {}
    failures: dict[str, list[str]] = {}
    histories: dict[str, Path] = {}
    wall_s: dict[str, float] = {}
    comparison: compare.Comparison | None = None

    @property
    def good(self) -> bool:
        """No violation, no hang, every expectation met, both worlds equal where both were asked."""
        clean = all(not result.violations and not result.hung for result in self.results.values())
        return clean and not any(self.failures.values()) and (self.comparison is None or self.comparison.equal)


def silent(_what: str) -> AbstractContextManager[None]:
    return nullcontext()


def prepare(path: str, sets: Sequence[str] = (), seed: int | None = None) -> Prepared:
    """Raises what kvmove.errors knows for a file that cannot be read or says something wrong."""
    scenario = load(path, sets)
    return Prepared(path, scenario, build(scenario, seed))


def play(
    prepared: Prepared,
    worlds: Sequence[str],
    log: Path,
    *,
    transport: str = "auto",
    progress: Progress = silent,
    budget: int = compare.BUDGET,
) -> Played:
    """``log``: where the histories go, less their ending ``.sim.jsonl``. None of them stays if the run cannot end."""
    path, scenario, built = prepared.path, prepared.scenario, prepared.built
    played = Played(path, scenario, built)
    try:
        for world in worlds:
            history = log.with_name(f"{log.name}.{world}.jsonl")
            played.histories[world] = history
            doing = "simulating" if world == "sim" else "running for real"
            started = time.perf_counter()
            with progress(f"{doing}: {path}"):
                result = _run(world, built, history, transport)
            played.wall_s[world] = time.perf_counter() - started
            played.results[world] = result
            played.failures[world] = expectations(scenario, result)
        if len(worlds) == 2:
            with progress(f"comparing: {path}"):
                played.comparison = _compare(played, budget)
    except BaseException:
        for history in played.histories.values():
            history.unlink(missing_ok=True)
        raise
    return played


def _run(world: str, built: Built, log: Path, transport: str) -> Result:
    if world == "sim":
        from kvsim.run import run as simulate

        return simulate(built, history=log)
    from kvreal.run import run as run_for_real

    return run_for_real(built, history=log, transport=transport)


def _compare(played: Played, budget: int) -> compare.Comparison:
    sim, real = played.results["sim"], played.results["real"]
    return compare.Comparison(
        compare.replayed({world: read(log) for world, log in played.histories.items()}),
        compare.outcome(played.scenario.order, sim, real, lambda: _schedules(played, budget)),
        compare.times(sim, real),
    )


def _schedules(played: Played, budget: int) -> Iterator[Result]:
    """Simulated runs that differ in when things happen: another seed each, with every delay jittered."""
    from kvsim.run import run as simulate

    for number in range(1, budget):
        yield simulate(build(played.scenario, played.built.seed + number), jitter=True)
