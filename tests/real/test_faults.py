"""Faults for real: signals to processes, losses in the network layer, bad copies in the transfer layer.

What must hold in every one: no wrong byte, nobody hangs, the log replays, and the prompt is somewhere unless the
process that held it died.
"""

from __future__ import annotations

from pathlib import Path
from typing import Set

import pytest

from kvcore.scenario.history import check_replay, read
from kvreal.pool import Pool
from kvreal.run import run
from tests.real.scenarios import scenario

pytestmark = pytest.mark.real

A, B = "a/LocalCPUBackend", "b/LocalCPUBackend"

CASES = {
    # name: (faults, states that m may end in, where p may be afterwards; {} means gone)
    "crash destination at Committed": (
        "  - {when: {sent: Committed, by: b}, drop: all, crash: {node: b, restart_after: 1 lease}}", {"failed"}, {A}),
    "crash destination after the copy": (
        "  - {when: {sent: Reserved, by: b}, crash: {node: b, restart_after: 0.2 leases}}", {"failed"}, {A}),
    "crash source": (
        "  - {when: {sent: Pinned, by: a}, crash: {node: a, restart_after: 0.2 leases}}", {"failed"}, {""}),
    "crash source for good": ("  - {when: {sent: Pinned, by: a}, crash: {node: a}}", {"failed"}, {""}),
    "pause source": ("  - {when: {sent: Pinned, by: a}, pause: {node: a, for: 1 lease}}", {"failed", "done"}, {A, B}),
    "pause destination": (
        "  - {when: {sent: Reserved, by: b}, pause: {node: b, for: 1 lease}}", {"failed", "done"}, {A, B, A + B}),
    "partition the two": (
        "  - {when: {sent: Fetch}, partition: {between: a, and: b, for: 2 retries}}", {"failed", "done"}, {A, B}),
    "partition from the controller": (
        "  - {when: {sent: Pin}, partition: {between: ctl, and: a, for: 2 retries}}", {"done"}, {B}),
    "partition at a time": (
        "  - {when: {at: 0 s}, partition: {between: ctl, and: b, for: 2 retries}}", {"done"}, {B}),
    "losses": (
        "  - {when: {sent: Fetch}, drop: 1}\n  - {when: {sent: Committed}, drop: 2}\n"
        "  - {when: {sent: Released}, drop: 1}", {"done"}, {B}),
    "doubled": ("  - {when: {sent: Release}, duplicate: 2, delay: 0.5 retries}", {"done"}, {B}),
    "late": ("  - {when: {sent: Fetch}, delay: 1.5 retries}", {"done"}, {B}),
    "overtaken": ("  - {when: {sent: Pinned}, reorder: true}", {"done"}, {B}),
    "copy fails": ("  - {copy: {fail: true, fraction: 0.5}}", {"failed"}, {A}),
    "copy slow": ("  - {copy: {slow: 20}}", {"done"}, {B}),
    "node slow": ("  - {when: {at: 0 s}, slow: {node: b, factor: 20, for: 1 lease}}", {"done"}, {B}),
    "full": ("  - {when: {at: 0 s}, full: {at: b/LocalCPUBackend, for: 1 lease}}", {"failed"}, {A}),
    "cancel": ("  - {when: {sent: Fetch}, cancel: m}", {"failed", "done"}, {A, B, A + B}),
    "client dies": ("  - {when: {sent: Fetch}, crash: {node: client, restart_after: 1 retries}}", {"info"}, {A, B}),
    "namespace": ("  - {namespace: {node: b, dtype: float16}}", {"failed"}, {A}),
}  # fmt: skip


@pytest.mark.parametrize("direction", ["read", "push"])
@pytest.mark.parametrize("name", sorted(CASES))
def test_fault(name: str, direction: str, pool: Pool, tmp_path: Path) -> None:
    faults, ends, places = CASES[name]
    path = tmp_path / "history.jsonl"
    result = run(scenario(faults=faults, direction=direction), pool=pool, history=path)
    assert result.clean, (result.violations, result.hung)
    if "namespace" not in name:
        assert result.fired, "the fault did not happen"
    move = result.operation("m")
    assert move is not None and move.state in ends, (move.state, move.reason)
    whole: Set[str] = {place for place, prompts in result.placement.items() if prompts.get("p") == 200}
    assert "".join(sorted(whole)) in places, result.placement
    if name == "cancel":  # what has been committed before it fails stays, as a copy; the source has lost nothing
        assert whole == {B} if move.state == "done" else A in whole, (move.state, result.placement)
    report = check_replay(*read(path))
    assert report.equal, report.first


@pytest.mark.parametrize("at", ["Begin", "Decide"])
def test_a_controller_that_dies_and_comes_back(at: str, pool: Pool) -> None:
    """Its journal is all it has: presumed abort before Decide, the end of the move after it."""
    body = """
steps:
  - store: {at: a/LocalCPUBackend, prompt: p, tokens: 200}
  - move: {from: a/LocalCPUBackend, to: b/LocalCPUBackend, prompt: p, as: m, timeout: 5 retries}
  - settle:
"""
    faults = f"  - {{when: {{started: {at}}}, crash: {{node: ctl, restart_after: 1 retries}}}}"
    result = run(scenario(body, faults), pool=pool)
    assert result.clean, (result.violations, result.hung)
    assert result.placement == ({A: {"p": 200}} if at == "Begin" else {B: {"p": 200}})
    assert result.metrics["processes"] == 5


def test_a_stuck_copy_ends_within_copy_max(pool: Pool) -> None:
    built = scenario(faults="  - {copy: {stuck: true, fraction: 0.5}}", copy_max="0.5 s")
    result = run(built, pool=pool)
    assert result.clean and result.placement == {A: {"p": 200}}
    move = result.operation("m")
    assert move is not None and (move.state, move.reason) == ("failed", "copy_failed")
