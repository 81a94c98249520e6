"""Generated scenarios on real processes, and the same simulated: replay equal, every property in both, answers that the
simulator gives too. The processes are started once; most examples take a tenth of a second."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings

from kvcore.scenario.arbitrary import WHOLE, scenario_from, seeded
from kvcore.scenario.build import Built, build
from kvcore.scenario.result import Result
from kvcore.scenario.schema import Scenario
from kvmove import compare
from kvmove.campaign import KINDS, Coverage, troubles
from kvmove.play import Player, Prepared
from kvmove.schedules import schedules
from kvsim.run import run
from tests.compare.strategies import examples, note, scenarios

#: Simulated schedules that a racing answer is looked for in; most are met by the first.
BUDGET = 1000
EXAMPLES = examples("KVMOVE_REAL_EXAMPLES", 2 * len(KINDS))


@pytest.fixture(scope="module")
def player() -> Iterator[Player]:
    pytest.importorskip("zmq", reason="the real world is not installed: no pyzmq")
    pytest.importorskip("numpy", reason="the real world is not installed: no numpy")
    with Player(("sim", "real"), budget=BUDGET) as found:
        yield found


def compared(player: Player, scenario: Scenario, folder: Path) -> tuple[Result, float]:
    """Play it in both worlds and hold everything against everything; the real result, and how long it took (s)."""
    played = player.play(Prepared(scenario.name, scenario, build(scenario)), folder / "generated")
    for world, result in played.results.items():
        assert troubles(scenario, result) == [], world
    assert played.comparison is not None
    assert played.comparison.replay.equal, played.comparison.replay.differs
    assert played.comparison.outcome.equal, "\n".join(played.comparison.outcome.differs)
    return played.results["real"], played.wall_s["real"]


@pytest.mark.real
@pytest.mark.timeout(7200 if EXAMPLES > 100 else 600)
def test_generated_scenarios_on_real_processes(player: Player, tmp_path: Path) -> None:
    coverage = Coverage()
    walls: list[float] = []
    each = -(-EXAMPLES // len(KINDS))

    def campaign(kind: str) -> None:
        space = msgspec.structs.replace(WHOLE, must=kind)

        @settings(
            max_examples=each,
            deadline=None,
            database=None,
            derandomize=EXAMPLES < 100,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        )
        @given(scenarios(space))
        def run_one(scenario: Scenario) -> None:
            note(scenario)
            result, wall_s = compared(player, scenario, tmp_path)
            coverage.add(scenario, result)
            walls.append(wall_s)

        run_one()

    for kind in KINDS:
        campaign(kind)
    print()
    print("\n".join(coverage.lines()))
    print(f"real runs: median {statistics.median(walls):.2f} s, longest {max(walls):.1f} s, in all {sum(walls):.0f} s")
    assert coverage.runs >= min(EXAMPLES, 25)
    assert coverage.empty() == []


# ---- an answer that no schedule gives --------------------------------------------------------------------------------
def racing() -> tuple[Built, Result]:
    """The first generated scenario that races and moves something."""
    for seed in range(1000):
        scenario = scenario_from(seeded(seed), WHOLE, f"g{seed}", seed)
        built = build(scenario)
        result = run(built)
        if scenario.order == "racing" and any(one.what == "move" and one.state == "done" for one in result.operations):
            return built, result
    raise AssertionError("no scenario moves anything")


def test_a_planted_answer_that_no_schedule_gives_fails() -> None:
    """A real answer that is off by a token, within the stated budget of schedules."""
    built, sim = racing()
    budget = 25
    told = [msgspec.structs.replace(one) for one in sim.operations]
    move = next(one for one in told if one.what == "move" and one.state == "done")
    move.num_tokens += 1
    real = msgspec.structs.replace(sim, world="real", operations=told)
    found = compare.outcome("racing", sim, real, lambda: schedules(built, budget))
    assert not found.equal and found.schedules == budget + 1
    assert found.differs[0].startswith(f"{move.op}: done") and f"{budget + 1} simulated schedules" in found.differs[0]


def test_a_planted_placement_that_no_schedule_gives_fails() -> None:
    built, sim = racing()
    place = next(iter(sim.placement))
    real = msgspec.structs.replace(sim, world="real", placement={**sim.placement, place: {"p": 9999}})
    found = compare.outcome("racing", sim, real, lambda: schedules(built, 5))
    assert not found.equal
    assert "placement" in found.differs[0]


def test_what_another_schedule_gives_is_no_failure() -> None:
    built, sim = racing()
    for other in schedules(built, 5):
        real = msgspec.structs.replace(other, world="real")
        assert compare.outcome("racing", sim, real, lambda: schedules(built, 5)).equal
