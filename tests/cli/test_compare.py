"""Two results compared: what is equal, what differs, and which words say so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("kvcore.scenario.build")

from kvcore.scenario.result import EventPhases, Operation, Result
from kvmove import compare


def operation(op: str, state: str = "done", num_tokens: int = 12, reason: str = "", took_ns: int = 1000) -> Operation:
    return Operation(op, "move", state, num_tokens, reason=reason, start_ns=5, end_ns=5 + took_ns)


def result(world: str, *operations: Operation, placement: compare.Placement | None = None) -> Result:
    return Result(
        world=world, scenario="s", seed=0, operations=list(operations), violations=[], placement=placement or {}
    )


def test_strict_equal() -> None:
    placement = {"b/cpu": {"p": 12}}
    one, other = (result(world, operation("m"), placement=placement) for world in ("sim", "real"))
    assert compare.outcome("strict", one, other) == compare.Outcome(True, "strict", 1)


def test_strict_names_each_difference() -> None:
    sim = result("sim", operation("m"), operation("n"), placement={"b/cpu": {"p": 4096}})
    real = result("real", operation("m", "failed", 0, "nothing_held"), placement={"a/cpu": {"p": 4096}})
    found = compare.outcome("strict", sim, real)
    assert not found.equal
    assert found.differs == (
        "m: done, 12 tokens in simulation, failed (nothing_held), 0 tokens for real",
        "n: done, 12 tokens in simulation, never asked for real",
        "a/cpu ends with 0 tokens of p in simulation, 4,096 for real",
        "b/cpu ends with 4,096 tokens of p in simulation, 0 for real",
    )


def test_racing_looks_on_until_each_answer_is_met_and_no_further() -> None:
    sim, real = result("sim", operation("m")), result("real", operation("m", "failed", 0, "full"))
    asked = []

    def schedules() -> Iterator[Result]:
        for number in range(100):
            asked.append(number)
            yield result("sim", operation("m", "failed", 0, "full" if number == 3 else "copy_failed"))

    assert compare.outcome("racing", sim, real, schedules) == compare.Outcome(True, "racing", 5)
    assert asked == [0, 1, 2, 3]


def test_racing_a_planted_answer_that_no_schedule_gives_is_a_failure() -> None:
    sim, real = result("sim", operation("m")), result("real", operation("m", "done", 11))
    found = compare.outcome("racing", sim, real, lambda: iter([result("sim", operation("m", "failed", 0, "full"))] * 9))
    assert not found.equal and found.schedules == 10
    assert found.differs == (
        "m: done, 11 tokens for real; 10 simulated schedules give only done, 12 tokens or failed (full), 0 tokens",
    )


def test_racing_compares_the_final_placement_too() -> None:
    sim = result("sim", operation("m"), placement={"b/cpu": {"p": 12}})
    real = result("real", operation("m"), placement={"a/cpu": {"p": 12}, "b/cpu": {"p": 12}})
    assert compare.outcome("racing", sim, real).differs == (
        "the real final placement is none that 1 simulated schedules give: a/cpu ends with 0 tokens of p in simulation,"
        " 12 for real",
    )
    assert compare.outcome("racing", sim, real, lambda: iter([real])).equal


def test_times_have_moves_that_ended_in_both_worlds_and_their_phases() -> None:
    sim = result("sim", operation("m", took_ns=1500), operation("n"), operation("o"))
    real = result("real", operation("m", took_ns=1000), operation("n", took_ns=-6))
    sim.phases = [EventPhases(event=1, op="m", control_ns=500, queue_ns=0, copy_ns=900, commit_ns=100, bytes=64)]
    real.phases = [EventPhases(event=1, op="m", control_ns=250, queue_ns=0, copy_ns=600, commit_ns=150, bytes=64)]
    (row,) = compare.times(sim, real)
    assert (row.op, row.predicted_ns, row.measured_ns, row.error) == ("m", 1500, 1000, 0.5)
    assert row.phases["control"] == compare.Span(500, 250, 1.0)
    assert row.phases["queue"] == compare.Span(0, 0, None)
    assert row.phases["copy"].error == pytest.approx(0.5)
