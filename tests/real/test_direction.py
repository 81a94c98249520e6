"""Who moves the bytes, by what a profile says of each pair of locations: real processes do as simulated ones do."""

from __future__ import annotations

from pathlib import Path
from typing import Dict, List, Tuple

import pytest

from kvcore.protocol.machine import Note, Send
from kvcore.protocol.messages import Fetch, Push, Rid
from kvcore.scenario.build import Built, build
from kvcore.scenario.history import read
from kvcore.scenario.loader import loads
from kvcore.scenario.profile import load_profile
from kvreal.pool import Pool
from kvreal.run import run
from kvsim.run import run as simulate

PROFILE = """
name: both-ways
copies:
  - {transport: TRANSPORT, from: cpu, to: cpu, rates: [[1048576, 2.0e+9]]}
  - {transport: TRANSPORT, from: cpu, to: cpu, push: true, rates: [[1048576, 6.0e+9]]}
  - {transport: TRANSPORT, from: cpu, to: disk, rates: [[1048576, 5.0e+9]]}
  - {transport: TRANSPORT, from: cpu, to: disk, push: true, rates: [[1048576, 2.3e+9]]}
  - {transport: TRANSPORT, from: disk, to: cpu, push: true, rates: [[1048576, 9.0e+9]]}
"""

SCENARIO = """
name: both-ways
kv: {bytes_per_token: 1 KiB, chunk: 16 tokens}
network: {profile: PROFILE}
instances:
  a: {ranks: 2, locations: {LocalCPUBackend: 1 MiB, LocalDiskBackend: 1 MiB}}
  b: {ranks: 2, locations: {LocalCPUBackend: 1 MiB, LocalDiskBackend: 1 MiB}}
  c: {ranks: 2, direction: push, locations: {LocalCPUBackend: 1 MiB, LocalDiskBackend: 1 MiB}}
steps:
  - store: {at: a/LocalCPUBackend, prompt: p, tokens: 200}
  - settle
  - move: {from: a/LocalCPUBackend, to: b/LocalCPUBackend, prompt: p, copy: true, as: pushed}
  - settle
  - move: {from: a/LocalCPUBackend, to: b/LocalDiskBackend, prompt: p, copy: true, as: read}
  - settle
  - move: {from: b/LocalDiskBackend, to: a/LocalCPUBackend, prompt: p, as: one-way}
  - settle
  - move: {from: a/LocalCPUBackend, to: a/LocalDiskBackend, prompt: p, copy: true, as: inside}
  - settle
  - move: {from: a/LocalCPUBackend, to: c/LocalDiskBackend, prompt: p, as: told}
  - settle
  - use: {at: b/LocalCPUBackend, prompt: p}
  - use: {at: c/LocalDiskBackend, prompt: p}
"""

WHY = {
    "pushed": (True, "push: 6 GB/s, read 2 by profile both-ways"),
    "read": (False, "read: 5 GB/s, push 2.3 by profile both-ways"),
    "one-way": (False, ""),
    "inside": (False, ""),
    "told": (True, ""),
}


def scenario(folder: Path, transport: str) -> Built:
    path = folder / "profile.yaml"
    path.write_text(PROFILE.replace("TRANSPORT", transport))
    return build(loads(SCENARIO.replace("PROFILE", str(path)), "both-ways.yaml"))


def ways(path: Path) -> Dict[str, Tuple[bool, str]]:
    """Move -> (pushed?, why), as a history has it; ranks of one move do alike."""
    found: Dict[int, Tuple[bool, str]] = {}
    why: Dict[int, str] = {}
    pushes: Dict[Rid, None] = {}
    for line in read(path)[1]:
        for effect in line.out:
            if isinstance(effect, Note) and effect.kind == "direction":
                why[effect.event] = effect.detail
            if isinstance(effect, Send) and isinstance(effect.msg, Push):
                pushes[effect.msg.rid] = None
            if isinstance(effect, Send) and isinstance(effect.msg, Fetch):
                m = effect.msg
                assert found.setdefault(m.event, (m.push, why.get(m.event, "")))[0] == m.push
    assert len(pushes) == 2 * sum(way for way, _ in found.values())
    return dict(zip(WHY, (found[event] for event in sorted(found))))


@pytest.mark.parametrize("transport", ["socket", "nixl", "auto"])
def test_real_processes_and_simulated_ones_choose_alike(transport: str, tmp_path: Path) -> None:
    built = scenario(tmp_path, "socket" if transport == "auto" else transport)
    with Pool(transport) as pool:
        real = run(built, history=tmp_path / "real.jsonl", pool=pool)
    simulated = simulate(built, history=tmp_path / "sim.jsonl", transport=transport)
    for result in (real, simulated):
        assert not result.violations and not result.hung
        assert [one.state for one in result.operations if one.what in ("move", "use")] == ["done"] * 5 + ["ok"] * 2
    assert ways(tmp_path / "real.jsonl") == ways(tmp_path / "sim.jsonl") == WHY


def test_the_simulator_costs_a_push_by_its_own_row(tmp_path: Path) -> None:
    """100 KiB a rank, pushed: at the 6 GB/s of pushes; at the 2 GB/s of reads where no push was measured."""
    path = scenario_profile(tmp_path)
    text = SCENARIO.replace("PROFILE", str(path)).replace("16 tokens}", "16 tokens, direction: push}")
    built = build(loads(text, "both-ways.yaml"))
    took_ns: List[int] = []
    for known in (PROFILE, "".join(line for line in PROFILE.splitlines(True) if "push: true" not in line)):
        path.write_text(known.replace("TRANSPORT", "socket"))
        result = simulate(built, transport="socket")
        took_ns.append(next(phases.copy_ns for phases in result.phases if phases.op == "pushed"))
    assert took_ns[1] - took_ns[0] == pytest.approx(100 * 1024 * (1 / 2 - 1 / 6), rel=0.01)


def scenario_profile(folder: Path) -> Path:
    scenario(folder, "socket")
    return folder / "profile.yaml"


def test_a_profile_tells_only_what_was_measured_both_ways(tmp_path: Path) -> None:
    profile = load_profile(scenario_profile(tmp_path))
    known = profile.measured()
    assert known is not None and known.profile == "both-ways"
    assert [(cost.source, cost.target, cost.push) for cost in known.costs] == [
        ("cpu", "cpu", False), ("cpu", "cpu", True), ("cpu", "disk", False), ("cpu", "disk", True),
    ]  # fmt: skip
    assert profile.measured(("nixl",)) is None
