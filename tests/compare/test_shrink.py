"""Shrinking, with predicates instead of runs: what does not matter goes, what matters stays, all of it is valid."""

from __future__ import annotations

from kvcore.scenario.arbitrary import WHOLE, scenario_from, seeded
from kvcore.scenario.schema import Scenario
from kvcore.scenario.shrink import ROOMY, shrink
from kvcore.scenario.valid import mistakes


def first(fails: object) -> Scenario:
    assert callable(fails)
    return next(s for s in (scenario_from(seeded(seed), WHOLE) for seed in range(5000)) if fails(s))


def crashes_during_a_copy(scenario: Scenario) -> bool:
    """A move that copies from one instance to another, and a crash of its destination."""
    copies = [step.move for step in scenario.steps if step.move is not None and step.move.copy]
    ends = [(move.src.partition("/")[0], move.dst.partition("/")[0]) for move in copies]
    crashed = [fault.crash.node for fault in scenario.faults if fault.crash is not None]
    return any(dst in crashed and src != dst for src, dst in ends)


def test_only_what_matters_is_left() -> None:
    large = first(lambda s: crashes_during_a_copy(s) and len(s.steps) > 6 and len(s.faults) > 1)
    small = shrink(large, crashes_during_a_copy)
    assert len(small.faults) == 1 and small.faults[0].kinds == ("crash",)
    assert [step.kind for step in small.steps] == ["move"]
    assert len(small.instances) == 2 and len(small.prompts) == 1
    (move,) = [step.move for step in small.steps]
    assert move is not None and move.copy and not move.background and move.tokens is None
    assert all(one.ranks == 1 and len(one.locations) == 1 for one in small.instances.values())


def test_every_candidate_is_valid_and_the_result_is_a_fixed_point() -> None:
    tried = []

    def fails(scenario: Scenario) -> bool:
        tried.append(scenario)
        return any(step.move is not None for step in scenario.steps)

    large = first(lambda s: len(s.steps) > 8 and len(s.faults) > 2)
    small = shrink(large, fails)
    assert tried and not any(list(mistakes(scenario)) for scenario in tried)
    assert shrink(small, fails) == small
    chunk = small.kv.chunk_tokens * small.kv.token_bytes
    assert all(
        place.size.bytes >= ROOMY * chunk for one in small.instances.values() for place in one.locations.values()
    )


def test_a_size_that_matters_is_kept() -> None:
    def tight(scenario: Scenario) -> bool:
        """Some place has room for two chunks at most."""
        chunk = scenario.kv.chunk_tokens * scenario.kv.token_bytes
        places = [place for one in scenario.instances.values() for place in one.locations.values()]
        return any(place.size.bytes <= 2 * chunk for place in places)

    small = shrink(first(tight), tight)
    assert tight(small)
    assert small.steps == () and small.faults == () and len(small.instances) == 1


def test_a_budget_is_kept() -> None:
    runs = []

    def fails(scenario: Scenario) -> bool:
        runs.append(scenario)
        return True

    shrink(first(lambda s: len(s.steps) > 8), fails, budget=5)
    assert len(runs) == 5
