"""Generated scenarios in simulation: every property at every step, quiet in the end, the same again, replayed equal."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcore.scenario.arbitrary import QUICK, WHOLE, Draw, scenario_from, seeded
from kvcore.scenario.build import build
from kvcore.scenario.history import ListHistory, check_replay
from kvcore.scenario.loader import dump, loads
from kvcore.scenario.schema import Scenario
from kvcore.scenario.valid import mistakes
from kvmove.campaign import KINDS, Coverage, troubles
from kvsim.run import header, run
from tests.compare.strategies import examples, note, scenarios

EXAMPLES = examples("KVMOVE_EXAMPLES", 340)
#: Far more than any run takes.
EVENTS_MAX = 300_000


def simulated(scenario: Scenario, coverage: Coverage, again: bool = False) -> None:
    """``again``: a second run must have the same history."""
    built = build(scenario)
    history = ListHistory(header(built))
    result = run(built, sink=history, max_events=EVENTS_MAX)
    coverage.add(scenario, result)
    assert troubles(scenario, result) == []
    replay = check_replay(header(built), history.lines)
    assert replay.equal, replay.first
    if again:
        second = ListHistory(header(built))
        run(build(scenario), sink=second, check=False, max_events=EVENTS_MAX)
        assert second.lines == history.lines


@pytest.mark.timeout(7200 if EXAMPLES > 500 else 900)
def test_generated_scenarios() -> None:
    """Each kind of fault in as many as another, besides whatever else is drawn; the table has no empty row."""
    coverage = Coverage()
    each = -(-EXAMPLES // len(KINDS))

    def campaign(kind: str) -> None:
        space = msgspec.structs.replace(WHOLE, must=kind)

        @settings(max_examples=each, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
        @given(scenarios(space), st.integers(0, 3))
        def run_one(scenario: Scenario, dice: int) -> None:
            note(scenario)
            simulated(scenario, coverage, again=dice == 3)

        run_one()

    for kind in KINDS:
        campaign(kind)
    print()
    print("\n".join(coverage.lines()))
    assert coverage.runs >= EXAMPLES
    assert coverage.empty() == []


@pytest.mark.timeout(7200 if EXAMPLES > 500 else 300)
def test_scenarios_without_a_certain_fault() -> None:
    """Strict ones and calm ones among them."""
    coverage = Coverage()
    orders = []

    @settings(max_examples=max(40, EXAMPLES // 8), deadline=None, suppress_health_check=list(HealthCheck))
    @given(scenarios())
    def run_one(scenario: Scenario) -> None:
        note(scenario)
        orders.append(scenario.order)
        simulated(scenario, coverage)

    run_one()
    assert {"strict", "racing"} <= set(orders)


# ---- the generator itself -------------------------------------------------------------------------------------------
def test_what_is_generated_is_valid_and_survives_yaml() -> None:
    for seed in range(400):
        scenario = scenario_from(seeded(seed), WHOLE, f"g{seed}", seed)
        assert not list(mistakes(scenario))
        assert loads(dump(scenario)) == scenario
        assert scenario == scenario_from(seeded(seed), WHOLE, f"g{seed}", seed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_that_must_be_there_is(kind: str) -> None:
    space = msgspec.structs.replace(WHOLE, must=kind)
    name = kind.split(" ")[0]
    for seed in range(20):
        assert any(name in fault.kinds for fault in scenario_from(seeded(seed), space).faults)


def test_the_smallest_choices_make_the_plainest_scenario() -> None:
    scenario = scenario_from(Draw(lambda least, most: least))
    assert [step.kind for step in scenario.steps] == ["store", "move", "settle", "lookup"]
    assert list(scenario.instances) == ["a", "b"] and not scenario.faults
    assert scenario.constants == QUICK
