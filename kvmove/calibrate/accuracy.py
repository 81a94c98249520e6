"""A profile held against scenarios that had no part in it: each played in both worlds, predicted beside measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Final

import msgspec

from kvcore.scenario.build import with_measured
from kvcore.scenario.profile import Profile
from kvcore.scenario.result import Result
from kvmove import compare
from kvmove.demo import scenarios_directory
from kvmove.play import Prepared, prepare
from kvmove.spread import Spread, spread

if TYPE_CHECKING:
    from kvreal.pool import Pool

SLOW_S: Final = 2.0
SLOWLY: Final = 3
"""A scenario that takes longer is played no more often than that."""


class Phase(msgspec.Struct, frozen=True):
    """ns; ``error``: predicted / measured - 1, None where nothing was measured."""

    predicted_ns: int
    measured_ns: int
    error: float | None


class Move(msgspec.Struct, frozen=True):
    """One move: the middle one of its measured times, and their spread; ``phases`` likewise."""

    scenario: str
    op: str
    predicted_ns: int
    measured: Spread
    error: float
    phases: dict[str, Phase]


class Accuracy(msgspec.Struct, frozen=True):
    """``median_error`` and ``worst_error``: of the moves' absolute errors; 0.1 is 10%. ``left_out``: moves that were
    done in simulation, but not each time for real."""

    transport: str
    repeats: int
    moves: tuple[Move, ...]
    median_error: float
    worst_error: float
    left_out: tuple[str, ...] = ()


def scenarios() -> dict[str, Prepared]:
    """All of scenarios/smoke, by name."""
    return {path.stem: prepare(str(path)) for path in sorted((scenarios_directory() / "smoke").glob("*.yaml"))}


def check(profile: Profile, transport: str, repeats: int, step: Callable[[str], None]) -> Accuracy:
    """Play each ``repeats`` times for real, in turn, after once for nothing; and once in simulation.

    Raises what ``kvreal.run`` raises."""
    from kvreal.pool import Pool
    from kvsim.run import run as simulate

    took: dict[str, float] = {}
    prepared = scenarios()
    for one in prepared.values():
        one.built = with_measured(one.built, profile, transport)
    real: dict[str, list[Result]] = {name: [] for name in prepared}
    with Pool(transport) as pool:
        for number in range(repeats + 1):
            for name, one in prepared.items():
                if number > SLOWLY and took[name] > SLOW_S:
                    continue
                step(f"checking: {name}")
                began = time.monotonic()
                result = _play(one, pool)
                took[name] = time.monotonic() - began
                if number:
                    real[name].append(result)
    carried = list(dict.fromkeys(result.transport for found in real.values() for result in found if result.transport))
    moves: list[Move] = []
    left_out: list[str] = []
    for name, one in prepared.items():
        simulated = simulate(one.built, profile=profile, transport=transport, check=False)
        found = _moves(name, simulated, real[name])
        moves += found
        asked = [one.op for one in simulated.operations if one.what == "move" and one.state == "done"]
        left_out += [f"{name} {op}" for op in asked if op not in [move.op for move in found]]
    errors = [abs(move.error) for move in moves]
    middle = median(errors) if errors else 0.0
    return Accuracy(" ".join(carried), repeats, tuple(moves), middle, max(errors, default=0.0), tuple(left_out))


def _play(one: Prepared, pool: Pool) -> Result:
    from kvreal.run import run

    return run(one.built, pool=pool)


def _moves(name: str, simulated: Result, real: Sequence[Result]) -> list[Move]:
    """Those that were done each time, in both worlds: a failure takes as long as a timeout, which is no prediction."""
    every = [{one.op: one for one in compare.times(simulated, result)} for result in real]
    found = []
    for operation in simulated.operations:
        done = all(_done(result, operation.op) for result in [simulated, *real])
        if operation.what != "move" or not done or not all(operation.op in times for times in every):
            continue
        times = [one[operation.op] for one in every]
        measured = spread(one.measured_ns for one in times)
        predicted_ns = times[0].predicted_ns
        phases = {}
        for phase in times[0].phases:
            middle = round(median(one.phases[phase].measured_ns for one in times))
            ours = times[0].phases[phase].predicted_ns
            phases[phase] = Phase(ours, middle, ours / middle - 1 if middle else None)
        error = predicted_ns / measured.median - 1
        found.append(Move(name, operation.op, predicted_ns, measured, error, phases))
    return found


def _done(result: Result, op: str) -> bool:
    operation = result.operation(op)
    return operation is not None and operation.state == "done"
