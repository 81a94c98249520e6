"""Play one scenario in one world or both, check what happened, compare: all of ``kvmove run`` but the printing."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Final

import msgspec

from kvcore.scenario.build import Built, as_measured, build
from kvcore.scenario.expect import expectations
from kvcore.scenario.generate import expand
from kvcore.scenario.history import read
from kvcore.scenario.loader import load
from kvcore.scenario.result import Result, Violation
from kvcore.scenario.schema import Scenario
from kvcore.scenario.topology import kind_of
from kvmove import compare
from kvmove.away import Fleet
from kvmove.errors import RealUnavailable
from kvmove.examine import Replay, examine, replayed

#: Modules that a real node imports, and the packages that they come from.
REAL_NEEDS: Final = {"zmq": "pyzmq", "numpy": "numpy"}

Progress = Callable[[str], AbstractContextManager[None]]


class Prepared(msgspec.Struct):
    """A scenario file that has been read, checked and compiled; nothing has run."""

    path: str
    scenario: Scenario
    built: Built


class Played(msgspec.Struct):
    """One scenario, played. ``results``, ``failures`` (of expectations), ``histories`` and ``wall_s`` are by world.
    ``skipped``: why it was not played for real, though that was asked; empty if it was. ``replay``: of every history,
    where one is real."""

    path: str
    scenario: Scenario
    built: Built
    results: dict[str, Result] = {}
    failures: dict[str, list[str]] = {}
    histories: dict[str, Path] = {}
    wall_s: dict[str, float] = {}
    comparison: compare.Comparison | None = None
    skipped: str = ""
    replay: Replay | None = None

    @property
    def good(self) -> bool:
        """Nothing violated but what it is meant to violate, no hang, every expectation met, both worlds equal where
        both were asked."""
        clean = all(not self.unexpected(world) and not result.hung for world, result in self.results.items())
        equal = self.comparison is None or self.comparison.equal
        return clean and equal and not any(self.failures.values()) and (self.replay is None or self.replay.equal)

    def unexpected(self, world: str) -> list[Violation]:
        """Violations of properties that the scenario does not name in ``violates``."""
        meant = {name.lower() for name in self.scenario.violates}
        return [one for one in self.results[world].violations if one.property.lower() not in meant]


def silent(_what: str) -> AbstractContextManager[None]:
    return nullcontext()


def prepare(path: str, sets: Sequence[str] = (), seed: int | None = None) -> Prepared:
    """Raises what kvmove.errors knows for a file that cannot be read or says something wrong."""
    scenario = expand(load(path, sets), seed)
    return Prepared(path, scenario, build(scenario, seed))


class Player:
    """Plays scenarios, one after another. Real processes are started once for all of them, and ended with it.

    RealUnavailable at once if "real" is among ``worlds`` and this machine cannot do it. ``rates``: simulations tell
    what crossed each link when, which a trace shows. ``peers``, ``secret``, ``bind``: as Fleet takes them.
    """

    def __init__(
        self,
        worlds: Sequence[str],
        *,
        transport: str = "auto",
        progress: Progress = silent,
        budget: int = compare.BUDGET,
        rates: bool = False,
        peers: Sequence[str] = (),
        secret: bytes = b"",
        bind: str = "",
    ) -> None:
        self.worlds: tuple[str, ...] = tuple(worlds)
        self.transport: str = transport
        self.progress: Progress = progress
        self.budget: int = budget
        self.rates: bool = rates
        self.fleet: Fleet | None = _fleet(transport, peers, secret, bind) if "real" in worlds else None
        self.provides: tuple[str, ...] = _provides() if "real" in worlds else ()
        self.away: bool = bool(peers)

    def __enter__(self) -> Player:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.fleet is not None:
            self.fleet.close()

    def play(self, prepared: Prepared, log: Path, *, keep: bool = True) -> Played:
        """``log``: where the histories go, less their ending ``.sim.jsonl``. None stays if a run cannot end.

        Unless ``keep``, a simulation that nothing is compared with writes none; if it turns out badly it is repeated
        with one, and is the same again.
        """
        path, scenario, built = prepared.path, prepared.scenario, as_measured(prepared.built, self.transport)
        played = Played(path, scenario, built)
        missing = [need for need in self._needs(built) if need not in self.provides]
        try:
            for world in self.worlds:
                if world == "real" and missing:
                    played.skipped = f"{path} needs {' and '.join(missing)}, which this machine lacks"
                    continue
                history = None
                if keep or "real" in self.worlds:
                    history = played.histories[world] = log.with_name(f"{log.name}.{world}.jsonl")
                doing = "simulating" if world == "sim" else "running for real"
                with self.progress(f"{doing}: {path}"):
                    started = time.perf_counter()
                    result = self._run(world, built, history)
                    played.wall_s[world] = time.perf_counter() - started
                played.results[world] = result
            if "real" in played.results:
                with self.progress(f"comparing: {path}"):
                    self._compare(played)
            for world, result in played.results.items():
                broken = {one.property.lower() for one in result.violations}
                unmet = [f"violates: expected {one}" for one in scenario.violates if one.lower() not in broken]
                played.failures[world] = [*expectations(scenario, result), *unmet]
            if not played.good and not played.histories:
                with self.progress(f"simulating: {path} again, to see why"):
                    played.histories["sim"] = log.with_name(f"{log.name}.sim.jsonl")
                    self._run("sim", built, played.histories["sim"])
        except BaseException:
            for history in played.histories.values():
                history.unlink(missing_ok=True)
            raise
        return played

    def _needs(self, built: Built) -> tuple[str, ...]:
        """What it says, and a GPU where an instance has its memory; that of a peer's is the peer's."""
        gpu = any(kind_of(place) == "gpu" for one in built.instances.values() for place in one.locations)
        return (*built.needs, "gpu") if gpu and not self.away and "gpu" not in built.needs else built.needs

    def _run(self, world: str, built: Built, history: Path | None) -> Result:
        if world == "sim":
            from kvsim.run import run as simulate

            return simulate(built, history=history, rates=self.rates, transport=self.transport)
        from kvreal.run import run as run_for_real

        assert self.fleet is not None
        return run_for_real(built, history=history, pool=self.fleet.pool, elsewhere=self.fleet.elsewhere(built))

    def _compare(self, played: Played) -> None:
        """Replay and check what happened for real; hold it against the simulation, if there is one."""
        real = played.results["real"]
        replay, violations = examine(*read(played.histories["real"]), quiet=not real.hung)
        real.violations.extend(violations)
        played.replay = replay
        if "sim" not in played.results:
            return
        from kvmove.schedules import schedules

        sim = played.results["sim"]
        played.replay = replay = replayed(*read(played.histories["sim"])) + replay
        outcome = compare.outcome(played.scenario.order, sim, real, lambda: schedules(played.built, self.budget))
        played.comparison = compare.Comparison(replay, outcome, compare.times(sim, real))


def _provides() -> tuple[str, ...]:
    from kvreal.slab import provides

    return provides()


def _fleet(transport: str, peers: Sequence[str], secret: bytes, bind: str) -> Fleet:
    missing = [package for module, package in REAL_NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise RealUnavailable(
            f"the real world cannot run here: {' and '.join(missing)} not installed (pip install 'kvmove[real]')"
        )
    from kvreal.transfer import TransferError

    try:
        return Fleet(transport, peers, secret, bind)
    except TransferError as error:
        raise RealUnavailable(f"the real world cannot run here: {error}") from None
