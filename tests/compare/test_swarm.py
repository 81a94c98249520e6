"""The swarm finds a planted bug and shrinks it to a file that a person can read; the table's empty rows fail it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from kvcore.protocol import machine
from kvcore.protocol.messages import Wire
from kvcore.scenario.arbitrary import TINY, scenario_from, seeded
from kvcore.scenario.build import build
from kvcore.scenario.loader import load
from kvcore.scenario.result import Result, Violation
from kvmove.campaign import KINDS, PHASE_OF, PHASES, Coverage, phase_of, troubles, unexpected
from kvmove.cli import call
from kvmove.swarm import judge, kind_of, swarm, write
from kvsim.run import run


# ---- finding and shrinking ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rule", "what", "steps", "faults"),
    [
        ("h16", "Shared", 2, 0),  # a chunk whose child is still here is deleted
        ("h03", "Loss", 5, 2),  # what is deleted is another entry than the pinned one
        ("h13", "Free", 3, 1),  # a doubled Push writes again
    ],
)
def test_a_planted_bug_is_found_and_shrunk(tmp_path: Path, rule: str, what: str, steps: int, faults: int) -> None:
    space = msgspec.structs.replace(TINY, without=(rule,))
    tally = swarm(1500, 0, space, processes=1)
    found = [find for find in tally.finds if find.what == what]
    assert found, [find.lines for find in tally.finds]
    (path, *_) = write([find for find in found if find.text], tmp_path)
    small = load(path)
    assert any(kind_of(line) == what for line in judge(small))
    assert len(small.steps) <= steps and len(small.faults) <= faults, path.read_text()
    assert len(small.instances) == 2 and small.without == (rule,)
    assert judge(msgspec.structs.replace(small, without=())) == [], "with the rule on it is good"
    assert path.read_text().startswith("# Found by a swarm")


def test_without_a_planted_bug_nothing_is_found_and_two_swarms_are_alike() -> None:
    one, other = (swarm(600, 0, TINY, processes=count) for count in (1, 2))
    assert one.finds == [] and one.count == 600
    assert (one.count, one.inputs, one.coverage) == (other.count, other.inputs, other.coverage)


def test_an_exception_is_a_find(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: object, **__: object) -> Result:
        raise KeyError("slot")

    monkeypatch.setattr("kvmove.swarm.run", breaks)
    lines = judge(scenario_from(seeded(1), TINY))
    assert kind_of(lines[0]) == "KeyError"


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = str(tmp_path / "found")
    assert call(["swarm", "--count", "500", "--processes", "1", "--out", out]) == 0
    text = capsys.readouterr().out
    assert "EMPTY ROW" not in text and "none failed" in text
    assert call(["swarm", "--count", "300", "--without", "h16", "--processes", "1", "--out", out]) == 1
    text = capsys.readouterr().out
    assert "Shared at" in text and "shrunk: " in text
    assert list(Path(out).glob("shared-*.yaml"))
    assert call(["swarm", "--without", "h99"]) == 2


# ---- the table ------------------------------------------------------------------------------------------------------
def test_a_kind_of_fault_that_never_fired_is_an_empty_row_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    coverage = Coverage()
    assert coverage.empty() == list(KINDS)
    for seed in range(4):  # not every one meets the message that its fault waits for
        scenario = scenario_from(seeded(seed), msgspec.structs.replace(TINY, must="pause", faults=(1, 1)))
        coverage.add(scenario, run(build(scenario)))
    assert "pause" not in coverage.empty() and "unmount" in coverage.empty()
    assert "EMPTY ROW: no run met unmount" in list(coverage.lines())
    assert call(["swarm", "--count", "3", "--processes", "1"]) == 1
    assert "EMPTY ROW" in capsys.readouterr().out


def test_every_message_effect_record_and_input_has_its_phase() -> None:
    """So that no anchor that is added later goes to the wrong column unseen."""
    from typing import get_args

    known = {kind.__name__ for union in (Wire, machine.JournalRecord) for kind in get_args(union)}
    known |= {kind.__name__ for kind in get_args(machine.Effect)} - {"Send", "Note"}
    known |= {"CopyDone", "CopyStopped", "FillDone", "ReadDone", "WindowClosed"}
    assert known - set(PHASE_OF) == set()
    assert phase_of("sent Pin") == "pin" and phase_of("a time") == "any" and phase_of("ended m1") == "users"
    assert set(PHASE_OF.values()) <= set(PHASES)


def test_tables_of_several_processes_add_up() -> None:
    one, other, both = Coverage(), Coverage(), Coverage()
    for seed in range(40):
        scenario = scenario_from(seeded(seed), TINY)
        result = run(build(scenario))
        (one if seed % 2 else other).add(scenario, result)
        both.add(scenario, result)
    one.merge(other)
    assert one == both


# ---- what a fault is for --------------------------------------------------------------------------------------------
def violation(prop: str, text: str = "") -> Violation:
    return Violation(prop, "a/0", 1, text)


def test_only_wrong_bytes_that_a_fault_is_for_are_expected() -> None:
    scenario = scenario_from(seeded(1), TINY)
    read = violation("Byte", "an engine that loads KV (read 1) found wrong bytes")
    result = Result("sim", "s", 0, violations=[violation("Byte"), read, violation("Loss")])
    assert unexpected(scenario, result) == result.violations
    result.fired = {"unmount at sent Pin": 1}
    assert unexpected(scenario, result) == [result.violations[0], result.violations[2]]
    result.fired = {"copy corrupt at started StartCopy": 1}
    assert unexpected(scenario, result) == [result.violations[2]]
    result.hung = ["a/0: paused"]
    assert troubles(scenario, result)[-1] == "hung: a/0: paused"
