"""Expectations: each that is not met is one line with step, field, expected and got."""

from __future__ import annotations

from typing import Any, List

import msgspec
import pytest

from kvcore.protocol.messages import Found, SourceOutcome
from kvcore.scenario.build import build
from kvcore.scenario.expect import check_expectations, expectations, unmet
from kvcore.scenario.result import Operation, Result
from kvcore.scenario.schema import Expect
from tests.core.scenario.tiny import play, scenario

MOVE = Operation(
    "m",
    "move",
    "failed",
    0,
    256,
    reason="destination_restarted",
    detail="b/0",
    source=(SourceOutcome(0, 0, 3, "retained"), SourceOutcome(1, -1, 3, "pin_gone")),
)
LOOKUP = Operation("l", "lookup", "ok", 256, found=(Found("a", "cpu", 256), Found("b", "cpu", 0)))


def lines(expected: Any, operation: Operation = MOVE) -> List[str]:
    return unmet(msgspec.convert(expected, Expect), operation)


@pytest.mark.parametrize(
    "expected",
    [
        {},
        {"state": "failed", "num_tokens": 0, "promised": 256},
        {"state": ["done", "failed"]},
        {"num_tokens": [0, 256]},
        {"reason": "destination restarted"},
        {"reason": "destination_restarted"},
        {"reason": ["full", "restarted"]},
        {"reason": "b/0"},
        {"kept": 3, "why": "pin gone"},
    ],
)
def test_met(expected: Any) -> None:
    assert lines(expected) == []


@pytest.mark.parametrize(
    ("expected", "line"),
    [
        ({"state": "done"}, "state: expected done, got failed"),
        ({"state": ["done", "ok"]}, "state: expected done or ok, got failed"),
        ({"num_tokens": 256}, "num_tokens: expected 256, got 0"),
        ({"reason": "full"}, "reason: expected full, got destination_restarted b/0"),
        ({"reason": ""}, "reason: expected none, got destination_restarted b/0"),
        ({"deleted": 0}, "deleted: expected 0 at every source rank, got 0, unknown"),
        ({"why": "child"}, "why: expected child, got retained, pin_gone"),
    ],
)
def test_not_met(expected: Any, line: str) -> None:
    assert lines(expected) == [line]


def test_found_is_that_and_no_more() -> None:
    assert lines({"found": {"a/cpu": 256}}, LOOKUP) == []
    assert lines({"found": {"a/cpu": 256, "b/cpu": 0}}, LOOKUP) == []
    assert lines({"found": {"b/cpu": 256}}, LOOKUP) == [
        "found: expected 256 tokens at b/cpu, got 256 tokens at a/cpu",
    ]
    assert lines({"found": {}}, LOOKUP) == ["found: expected nothing anywhere, got 256 tokens at a/cpu"]


def test_a_source_that_was_never_asked_kept_nothing_and_deleted_nothing() -> None:
    assert lines({"deleted": 0, "kept": 0}, Operation("m", "move", "failed")) == []


STEPS = [
    {"store": {"at": "a/cpu", "prompt": "p", "tokens": "5", "as": "s"}},
    {"move": {"from": "a/cpu", "to": "b/cpu", "prompt": "p", "as": "m"}},
    {"lookup": {"prompt": "p", "as": "l"}},
]


def test_of_a_run() -> None:
    good = {"m": {"state": "done", "num_tokens": 5, "deleted": 3}, "l": {"found": {"b/cpu": 5}}}
    built, _, result = play(steps=STEPS, expect=good)
    assert expectations(built, result) == [] == check_expectations(scenario(steps=STEPS, expect=good), result)
    bad = build(scenario(steps=STEPS, expect={"m": {"num_tokens": 4}, "l": {"found": {"a/cpu": 5}}}))
    assert expectations(bad, result) == [
        "m: num_tokens: expected 4, got 5",
        "l: found: expected 5 tokens at a/cpu, got 5 tokens at b/cpu",
    ]


def test_a_step_that_was_never_asked() -> None:
    built = build(scenario(steps=STEPS, expect={"l": {"state": "ok"}}))
    assert expectations(built, Result("sim", "tiny", 0)) == ["l: expected it to be asked, but the run ended before it"]
