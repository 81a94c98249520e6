"""Play one scenario in one world or both, check what happened, compare: all of ``kvmove run`` but the printing."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final

import msgspec

from kvcore.scenario.build import Built, build
from kvcore.scenario.expect import expectations
from kvcore.scenario.generate import expand
from kvcore.scenario.history import read
from kvcore.scenario.loader import load
from kvcore.scenario.result import Result
from kvcore.scenario.schema import Scenario
from kvmove import compare
from kvmove.errors import RealUnavailable
from kvmove.examine import Replay, examine, replayed

if TYPE_CHECKING:
    from kvreal.pool import Pool

#: Modules that a real node imports, and the packages that they come from.
REAL_NEEDS: Final = {"zmq": "pyzmq", "numpy": "numpy"}
#: What a scenario may need (``needs:``) that real nodes know how to use.
REAL_PROVIDES: Final[tuple[str, ...]] = ()

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
        """No violation, no hang, every expectation met, both worlds equal where both were asked."""
        clean = all(not result.violations and not result.hung for result in self.results.values())
        equal = self.comparison is None or self.comparison.equal
        return clean and equal and not any(self.failures.values()) and (self.replay is None or self.replay.equal)


def silent(_what: str) -> AbstractContextManager[None]:
    return nullcontext()


def prepare(path: str, sets: Sequence[str] = (), seed: int | None = None) -> Prepared:
    """Raises what kvmove.errors knows for a file that cannot be read or says something wrong."""
    scenario = expand(load(path, sets), seed)
    return Prepared(path, scenario, build(scenario, seed))


class Player:
    """Plays scenarios, one after another. Real processes are started once for all of them, and ended with it.

    RealUnavailable at once if "real" is among ``worlds`` and this machine cannot do it.
    """

    def __init__(
        self,
        worlds: Sequence[str],
        *,
        transport: str = "auto",
        progress: Progress = silent,
        budget: int = compare.BUDGET,
    ) -> None:
        self.worlds: tuple[str, ...] = tuple(worlds)
        self.progress: Progress = progress
        self.budget: int = budget
        self.pool: Pool | None = _pool(transport) if "real" in worlds else None

    def __enter__(self) -> Player:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.pool is not None:
            self.pool.close()

    def play(self, prepared: Prepared, log: Path) -> Played:
        """``log``: where the histories go, less their ending ``.sim.jsonl``. None stays if a run cannot end."""
        path, scenario, built = prepared.path, prepared.scenario, prepared.built
        played = Played(path, scenario, built)
        missing = [need for need in built.needs if need not in REAL_PROVIDES]
        try:
            for world in self.worlds:
                if world == "real" and missing:
                    played.skipped = f"{path} needs {' and '.join(missing)}, which real nodes cannot use here"
                    continue
                history = log.with_name(f"{log.name}.{world}.jsonl")
                played.histories[world] = history
                doing = "simulating" if world == "sim" else "running for real"
                with self.progress(f"{doing}: {path}"):
                    started = time.perf_counter()
                    result = self._run(world, built, history)
                    played.wall_s[world] = time.perf_counter() - started
                played.results[world] = result
                played.failures[world] = expectations(scenario, result)
            if "real" in played.results:
                with self.progress(f"comparing: {path}"):
                    self._compare(played)
        except BaseException:
            for history in played.histories.values():
                history.unlink(missing_ok=True)
            raise
        return played

    def _run(self, world: str, built: Built, history: Path) -> Result:
        if world == "sim":
            from kvsim.run import run as simulate

            return simulate(built, history=history)
        from kvreal.run import run as run_for_real

        return run_for_real(built, history=history, pool=self.pool)

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


def _pool(transport: str) -> Pool:
    missing = [package for module, package in REAL_NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise RealUnavailable(
            f"the real world cannot run here: {' and '.join(missing)} not installed (pip install 'kvmove[real]')"
        )
    from kvreal.pool import Pool
    from kvreal.transfer.base import TransferError

    try:
        return Pool(transport)
    except TransferError as error:
        raise RealUnavailable(f"the real world cannot run here: {error}") from None
