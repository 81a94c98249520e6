"""Every scenario file in the tree, simulated: its expectations, every property, and that its faults really happen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from kvcore.scenario.build import build
from kvcore.scenario.expect import expectations
from kvcore.scenario.generate import expand
from kvcore.scenario.loader import load
from kvcore.scenario.result import Result
from kvcore.scenario.schema import Scenario
from kvsim.run import run
from tests.scenario_files import ROOT, files, idle_faults

#: Far more than any of them takes: one that goes round in circles is ended here.
EVENTS_MAX = 2_000_000

#: Without its rule the row's bug is back: what is seen of it is a property that breaks, an answer, or a run that hangs.
BITING = (
    ("scenarios/field/f07-slots-freed-under-a-sibling.yaml", "h12"),
    ("scenarios/field/f08-late-write-after-cancel.yaml", "h12"),
    ("scenarios/field/f10-slots-reused-before-the-read.yaml", "h09"),
    ("scenarios/field/f10-slots-reused-before-the-read.yaml", "h10"),
    ("scenarios/field/f10-reference-used-twice.yaml", "h09"),
    ("scenarios/field/f12-engine-still-writes.yaml", "h27"),
    ("scenarios/field/f14-destination-tier-goes.yaml", "h20"),
    ("scenarios/field/f17-cleanup-by-timers-alone.yaml", "h22"),
    ("scenarios/field/f20-end-of-copy-is-lost.yaml", "h38"),
    ("scenarios/field/f25-idle-and-reaped.yaml", "h29"),
    ("scenarios/field/f27-one-rank-knows.yaml", "h01"),
    ("scenarios/field/f35-one-rank-has-less.yaml", "h16"),
    ("scenarios/field/f36-four-ranks-one-slow.yaml", "h01"),
    ("scenarios/field/f43-room-that-cannot-come.yaml", "h21"),
    ("scenarios/field/f43-room-that-cannot-come.yaml", "h23"),
)


def simulate(path: str, without: tuple[str, ...] = (), history: Path | None = None) -> tuple[Scenario, Result]:
    scenario = expand(load(ROOT / path))
    if without:
        scenario = msgspec.structs.replace(scenario, without=without)
    return scenario, run(build(scenario), history=history, max_events=EVENTS_MAX)


def wrong(scenario: Scenario, result: Result) -> list[str]:
    """What it says that is not as the file expects."""
    meant = {name.lower() for name in scenario.violates}
    broken = {violation.property.lower() for violation in result.violations}
    lines = [str(violation) for violation in result.violations if violation.property.lower() not in meant]
    lines += [f"{name} was meant to be violated" for name in sorted(meant - broken)]
    return lines + [f"hung: {who}" for who in result.hung] + expectations(scenario, result)


def test_there_is_something_to_run() -> None:
    for folder, least in (("smoke", 5), ("faults", 60), ("field", 12)):
        assert len(files(folder)) >= least, folder


@pytest.mark.parametrize("path", files())
def test_as_expected(path: str) -> None:
    scenario, result = simulate(path)
    assert wrong(scenario, result) == []
    assert idle_faults(scenario.faults, result) == []


@pytest.mark.parametrize(("path", "rule"), BITING)
def test_without_its_rule_it_goes_wrong(path: str, rule: str) -> None:
    scenario, result = simulate(path, (rule,))
    assert wrong(scenario, result)


@pytest.mark.parametrize(
    "path",
    [
        "scenarios/smoke/tensor-parallel.yaml",
        "scenarios/faults/duplicate-everything.yaml",
        "scenarios/faults/crash-controller-decided.yaml",
        "scenarios/field/f17-cleanup-by-timers-alone.yaml",
        "scenarios/field/f21-sender-fails-often.yaml",
    ],
)
def test_the_same_history_in_another_process(path: str, tmp_path: Path) -> None:
    """Byte for byte, whatever Python hashes strings to."""
    logs = []
    for seed in ("1", "2"):
        log = tmp_path / f"{seed}.jsonl"
        code = (
            "import sys; from pathlib import Path; from tests.sim.test_scenarios import simulate;"
            "simulate(sys.argv[1], (), Path(sys.argv[2]))"
        )
        subprocess.run(
            [sys.executable, "-c", code, path, str(log)],
            check=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
        )
        logs.append(log.read_bytes())
    assert logs[0] == logs[1] and len(logs[0]) > 10_000


def test_throughput_is_back_once_failures_are_over() -> None:
    """F21: moves after the last failure take as long as they do in a run without any."""
    path = "scenarios/field/f21-sender-fails-often.yaml"
    scenario, result = simulate(path)
    fine = run(build(msgspec.structs.replace(scenario, faults=())))
    moves = [operation for operation in result.operations if operation.what == "move"]
    healthy = {operation.op: operation.duration_ns for operation in fine.operations}
    failed = [operation for operation in moves if operation.state != "done"]
    assert failed and len({operation.reason for operation in failed}) == 1
    last_ns = max(operation.end_ns for operation in failed)
    after = [operation for operation in moves if operation.start_ns > last_ns]
    assert len(after) > len(moves) // 2 and all(operation.state == "done" for operation in after)
    took_ns = sum(operation.duration_ns for operation in after)
    assert took_ns <= sum(healthy[operation.op] for operation in after) / 0.95
    assert all(operation.end_ns - operation.start_ns < 5_000_000 for operation in failed), "the client hears at once"
